"""What a run leaves behind to look at: the picture and the figures."""

import resource
import sys
from pathlib import Path
from typing import Any

from mindpet import _files


def draw_curve(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss of each step, its running mean, and the accuracy of each evaluation, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [record for record in records if "loss" in record]
    scores = [record for record in records if "accuracy" in record]
    figure, left = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    x = [record["step"] for record in steps]
    losses = [record["loss"] for record in steps]
    left.plot(x, losses, color="#9ecae1", linewidth=0.8, label="loss of a step")
    left.plot(x, _running_mean(losses), color="#08519c", linewidth=1.8, label="running mean")
    left.set_xlabel("step")
    left.set_ylabel("training loss", color="#08519c")
    left.set_ylim(bottom=0)
    left.grid(alpha=0.25)
    if scores:
        right = left.twinx()
        percent = [100 * record["accuracy"] for record in scores]
        right.plot(
            [record["step"] for record in scores], percent, "o-", color="#d94801", markersize=4, label="accuracy"
        )
        right.set_ylabel("held-out accuracy (%)", color="#d94801")
        right.annotate(
            f"{percent[-1]:.1f}",
            (scores[-1]["step"], percent[-1]),
            (0, -14),
            textcoords="offset points",
            color="#d94801",
            ha="right",
        )
        right.set_ylim(0, 101)
    left.set_title(title, fontsize=10)
    figure.legend(loc="lower center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    with _files.whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)


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


def size_of(directory: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(entry.stat().st_size for entry in directory.rglob("*") if entry.is_file())
