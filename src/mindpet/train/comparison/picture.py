"""The picture of a comparison: quality against the share of the parameters that train."""

import os
from pathlib import Path
from typing import Any

from mindpet import _files

_PLACES = [(7, 6), (-7, 6), (7, -6), (-7, -6), (0, 10), (0, -10)]  # of a label, in points; then further and further


def draw_comparison(result: dict[str, Any], path: Path) -> None:
    """One point for each method, its deviation as a bar, full fine-tuning as a line across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    factor = 100.0 if result["quality"] == "accuracy" else 1.0
    rows = [row for row in result["rows"] if row["mean"] is not None]
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    points = []
    for index, row in enumerate(rows):
        x, y, spread = 100 * row["share"], factor * row["mean"], factor * (row["deviation"] or 0.0)
        colour = "#555555" if row["method"] == "full" else f"C{index % 10}"
        axes.errorbar(x, y, yerr=spread or None, fmt="o", color=colour, capsize=3, markersize=6, elinewidth=1)
        points.append((row["method"], x, y, spread, colour))
        if row["method"] == "full":
            axes.axhline(y, color=colour, linestyle="--", linewidth=1)
            axes.axhspan(y - spread, y + spread, color=colour, alpha=0.1, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.25)
    axes.set_xlabel("parameters that train (%)")
    less = result["quality"] == "perplexity"
    axes.set_ylabel("held-out perplexity (less is better)" if less else f"held-out {result['quality']} (%)")
    if result["quality"] == "accuracy":
        axes.set_ylim(top=min(axes.get_ylim()[1], 101.0))
    seeds = len(result["seeds"])
    axes.set_title(f"{Path(os.path.abspath(result['model'])).name}, {seeds} seed{'s' * (seeds > 1)}", fontsize=10)
    figure.tight_layout()
    _label(figure, axes, points)
    with _files.whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)


def _label(figure: Any, axes: Any, points: list[tuple[str, float, float, float, str]]) -> None:
    """Write each point's name at the nearest place where it covers no other name, no point, no bar and no line."""
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    pixels = axes.transData.transform
    taken = [line.get_window_extent(renderer) for line in axes.lines if line.get_linestyle() == "--"]
    for _, x, y, spread, _ in points:
        taken.append(type(axes.bbox.frozen())([pixels((x, y - spread)), pixels((x, y + spread))]).padded(4))
    for name, x, y, _, colour in points:
        for step in range(1, 9):
            text = None
            for right, up in ((step * across, step * along) for across, along in _PLACES):
                text = axes.annotate(
                    name,
                    (x, y),
                    (right, up),
                    textcoords="offset points",
                    ha="left" if right > 0 else "right" if right < 0 else "center",
                    va="bottom" if up > 0 else "top",
                    color=colour,
                    fontsize=9,
                    arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6} if step > 1 else None,
                )
                text.update_positions(renderer)
                box = Text.get_window_extent(text, renderer).padded(1)  # without its line to the point
                inside = (
                    axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 < box.y1 < axes.bbox.y1
                )
                if inside and not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break
                text.remove()
                text = None
            if text is not None:
                break
        else:  # better on top of something than not at all
            axes.annotate(name, (x, y), _PLACES[0], textcoords="offset points", color=colour, fontsize=9)
