"""A comparison on the screen: which cells run, how far they are, and the table at the end."""

import time
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from mindpet.cli.console import console_of
from mindpet.train.comparison.cells import Watcher
from mindpet.train.comparison.tables import cells_of_row, notes, quality_heading

_LINE_EVERY = 30.0  # seconds between lines where there is no terminal


class Board(Watcher):
    """Bars on a terminal, plain lines elsewhere; a context, so that the bars go away in the end."""

    def __init__(self) -> None:
        self.console = console_of()
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.last_line, self.running = time.monotonic(), dict[str, tuple[int, int]]()

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
            )
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self.bars.stop()

    def message(self, text: str) -> None:
        """A line above the bars."""
        stamp = "" if self.bars else time.strftime("%H:%M:%S ")
        self.console.print(stamp + text, markup=False, soft_wrap=True)

    def progress(self, cell: str, step: int, total: int) -> None:
        """The bar of a cell, or a word in the next line."""
        self.running[cell] = (step, total)
        self._bar(cell, step, total)

    def ended(self, cell: str) -> None:
        """Its bar goes away."""
        self.running.pop(cell, None)
        if self.bars and cell in self.tasks:
            self.bars.remove_task(self.tasks.pop(cell))

    def overall(self, done: int, total: int, seconds_left: float | None) -> None:
        """The bar of all cells, or a line every half minute."""
        left = "" if seconds_left is None else f"about {_duration(seconds_left)} left"
        self._bar("all cells", done, total, left)
        if not self.bars and time.monotonic() - self.last_line >= _LINE_EVERY:
            self.last_line = time.monotonic()
            now = [f"{cell}: step {step}/{of}" for cell, (step, of) in self.running.items()]
            self.message("; ".join([f"{done} of {total} cells done", *now, *([left] if left else [])]))

    def _bar(self, name: str, done: int, total: int, left: str = "") -> None:
        if self.bars:
            if name not in self.tasks:
                self.tasks[name] = self.bars.add_task(name, total=total, left=left)
            self.bars.update(self.tasks[name], completed=done, total=total, left=left)


def print_comparison(console: Console, result: dict[str, Any], directory: Path) -> None:
    """The table of a comparison; columns that say the same in every row go below it."""
    rows = [cells_of_row(row, result["quality"]) for row in result["rows"]]
    names = list(rows[0])
    same = {name for name in ("epochs", "optimizer") if len({row[name] for row in rows}) == 1}
    quality, gap = quality_heading(result)
    headings = {"learning rate": "learning\nrate", "memory": "MiB: static\n+ dynamic", "s a step": "seconds\na step"}
    headings |= dict(zip(names[-2:], (quality.replace(" (", "\n("), gap.replace(" (", "\n("))))
    table = Table(title=Text(f"comparison: {directory}"), box=SIMPLE_HEAD)
    for name in names:
        words = name in ("method", "settings", "optimizer")
        if name not in same:
            table.add_column(
                headings.get(name, name),
                justify="left" if words else "right",
                no_wrap=name != "settings",
                overflow="fold",
            )
    for row in rows:
        table.add_row(*(Text(value) for name, value in row.items() if name not in same))
    console.print(table)
    common = ", ".join(rows[0][name] + " epochs" * rows[0][name].isdigit() for name in names if name in same)
    console.print("\n".join(([f"All with {common}."] if common else []) + notes(result)), markup=False)
    for row in result["rows"]:
        if row["reason"]:
            console.print(f"{row['method']} does not apply here: {' '.join(row['reason'].split())}", markup=False)
    console.print(f"Written: {directory}/comparison.md, .csv, .json, .png", markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{hours} h {round((seconds - 3600 * hours) / 60)} min"
