"""What a run leaves behind to look at: the picture and the figures."""

import resource
import sys
from pathlib import Path
from typing import Any

from mindpet import _files


def draw_curve(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss of each step, its running mean, and each evaluation's accuracy or perplexity, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [record for record in records if "loss" in record]
    figure, left = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    x = [record["step"] for record in steps]
    losses = [record["loss"] for record in steps]
    left.plot(x, losses, color="#9ecae1", linewidth=0.8, label="loss of a step")
    left.plot(x, _running_mean(losses), color="#08519c", linewidth=1.8, label="running mean")
    left.set_xlabel("step")
    left.set_ylabel("training loss", color="#08519c")
    left.set_ylim(bottom=0)
    left.grid(alpha=0.25)
    _draw_scores(left, records)
    left.set_title(title, fontsize=10)
    figure.legend(loc="lower center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    with _files.whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)


def _draw_scores(left: Any, records: list[dict[str, Any]]) -> None:
    """The evaluations, on an axis of their own at the right: a share in percent, or a perplexity."""
    for key, name, factor, shown in (
        ("accuracy", "held-out accuracy (%)", 100, "{:.1f}"),
        ("perplexity", "held-out perplexity", 1, "{:.4g}"),
    ):
        scored = [record for record in records if key in record]
        if not scored:
            continue
        right = left.twinx()
        steps, values = [record["step"] for record in scored], [factor * record[key] for record in scored]
        right.plot(steps, values, "o-", color="#d94801", markersize=4, label=key)
        right.set_ylabel(name, color="#d94801")
        last = (steps[-1], values[-1])
        right.annotate(shown.format(last[1]), last, (0, -14), textcoords="offset points", color="#d94801", ha="right")
        right.set_ylim(0, 101 if key == "accuracy" else None)


def _running_mean(values: list[float], keep: float = 0.9) -> list[float]:
    means, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        means.append(mean / (1 - keep**count))
    return means


def peak_memory_mib() -> float:
    """The largest memory this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def counted(number: int, what: str) -> str:
    """A number of things in words.

    >>> counted(1, "row"), counted(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size_of(directory: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    if directory.is_file():
        return directory.stat().st_size
    return sum(entry.stat().st_size for entry in directory.rglob("*") if entry.is_file())
