"""What the user sees: a progress bar on a terminal, plain lines elsewhere, tables at the end."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from mindpet.cli.console import console_of
from mindpet.train.fit import Reporter
from mindpet.train.metrics import LanguageScores, Scores
from mindpet.train.report import counted

if TYPE_CHECKING:
    from mindpet.train.artifacts import Inspection

_LINE_EVERY = 5.0  # seconds between lines where there is no terminal
_SCORES = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("macro_f1", "macro F1", "{:.3f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("token_accuracy", "token accuracy", "{:.2%}"),
    ("evaluation_loss", "loss", "{:.3f}"),
)  # key of a record, its name, its format; a record has those of its task


class Screen(Reporter):
    """Draws a run on the console.

    Args:
        quiet: print nothing but what is asked for.
    """

    def __init__(self, quiet: bool = False):
        self.console = console_of(quiet)
        self.progress: Progress | None = None
        self.total = 0
        self.last_line = 0.0

    def start(self, done: int, total: int) -> None:
        """Show the bar."""
        self.total = total
        if done:
            self.message(f"Going on after step {done} of {total}.")
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.progress.start()
            self.task = self.progress.add_task("training", total=total, completed=done, figures="compiling")
        self.since: tuple[float, int] | None = None

    def step(self, record: dict[str, Any]) -> None:
        """Move the bar, or print a line every few seconds."""
        rate, speed, tokens = record["learning_rate"], record["samples_per_second"], record["tokens_per_second"]
        figures = f"loss {record['loss']:.3f}  rate {rate:.1e}  {speed:.3g} samples/s  {tokens:.0f} tokens/s"
        now, step = time.monotonic(), record["step"]
        if self.since is None:  # what is left is estimated without the first step, which was compiled
            self.since = now, step
            if self.progress:
                self.progress.reset(self.task, completed=step)
        if self.progress:
            self.progress.update(self.task, completed=step, figures=figures)
        elif now - self.last_line >= _LINE_EVERY or step == self.total:
            self.last_line = now
            begun, before = self.since
            left = ""
            if step > before:
                left = f"  {(now - begun) / (step - before) * (self.total - step):.0f} s left"
            self.console.print(f"step {step}/{self.total}  {figures}{left}", soft_wrap=True)

    def evaluation(self, record: dict[str, Any], best: bool) -> None:
        """A line for each evaluation."""
        scores = ", ".join(f"{name} {shown.format(record[key])}" for key, name, shown in _SCORES if key in record)
        self.message(f"step {record['step']}: held-out {scores}{'  (best so far)' if best else ''}")

    def message(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the bar away."""
        if self.progress:
            self.progress.stop()
            self.progress = None


def print_report(console: Console, report: dict[str, Any], directory: Path) -> None:
    """The table at the end of a run."""
    table = Table("", "before", "after", title=Text(f"{report['method']}: {directory}"))
    for key, name, shown in _SCORES:
        if key in report["after"]:
            values = (shown.format(report[when][key]) for when in ("before", "after"))
            table.add_row(f"held-out {name}", *values)
    console.print(table)
    parameters, seconds = report["parameters"], report["seconds"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "trained", f"{parameters['trainable']:,} of {parameters['total']:,} parameters ({parameters['share']:.2%})"
    )
    facts.add_row("rows", f"{report['rows']['train']} trained on, {report['rows']['test']} held out")
    if "tokens" in report:
        facts.add_row("tokens", f"{report['tokens']['train']:,} trained on, {report['tokens']['test']:,} held out")
    if report["kept_step"] != report["step"]:
        facts.add_row("kept", f"step {report['kept_step']} of {report['step']}, the best evaluation (train.keep_best)")
    facts.add_row("delta", f"{_size(report['delta_bytes'])} (the model: {_size(report['model_bytes'])})")
    facts.add_row(
        "time", f"{seconds['training']} s of training, {seconds['whole']} s in all; {counted(report['step'], 'step')}"
    )
    facts.add_row("peak memory", f"{report['peak_memory_mib']} MiB")
    facts.add_row("picture", Text(str(directory / "curve.png")))
    facts.add_row("delta in", Text(str(directory / "delta")))
    console.print(facts)
    verb, what = ("generate", "a beginning") if report["task"] == "language" else ("infer", "a text")
    console.print(f'\nUse it: mindpet {verb} {directory} "{what}"', markup=False)


def print_scores(console: Console, scores: Scores | LanguageScores, labels: list[str]) -> None:
    """Overall figures, and one line for each label of a classifier."""
    if isinstance(scores, LanguageScores):
        console.print(
            f"{scores.tokens:,} tokens: perplexity {scores.perplexity:.2f}, token accuracy "
            f"{scores.token_accuracy:.2%}, loss {scores.loss:.3f}"
        )
        return
    console.print(
        f"{scores.rows} rows: accuracy {scores.accuracy:.2%}, macro F1 {scores.macro_f1:.3f}, loss {scores.loss:.3f}"
    )
    table = Table("label", "rows", "recall", "precision", "most often taken for")
    for index, label in enumerate(labels):
        row, column = scores.confusion[index], scores.confusion[:, index]
        wrong = row.copy()
        wrong[index] = 0
        table.add_row(
            Text(label),
            str(row.sum()),
            f"{row[index] / row.sum():.1%}" if row.sum() else "-",
            f"{row[index] / column.sum():.1%}" if column.sum() else "-",
            Text(f"{labels[wrong.argmax()]} ({wrong.max()})" if wrong.any() else "-"),
        )
    console.print(table)


def print_predictions(console: Console, texts: list[str], predictions: list[dict[str, float]]) -> None:
    """Each text with its most probable labels."""
    table = Table("text", "label", "probability", "next")
    for text, chances in zip(texts, predictions):
        (label, chance), *others = chances.items()
        following = f"{others[0][0]} {others[0][1]:.1%}" if others else ""
        table.add_row(Text(text), Text(label), f"{chance:.1%}", Text(following))
    console.print(table)


def print_inspection(console: Console, found: "Inspection", most: int = 12) -> None:
    """What would be adapted, what would train, and what is left."""
    table = Table(Column("adapted cell", no_wrap=True), "becomes")  # paths are copied into run files
    for path, words in list(found.adapted.items())[:most]:
        table.add_row(Text(path), Text(words))
    if len(found.adapted) > most:
        table.add_row(f"and {len(found.adapted) - most} more", "")
    if found.adapted:
        console.print(table)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("method", Text(found.method))
    facts.add_row("trains", f"{found.trainable:,} of {found.total:,} parameters ({found.trainable / found.total:.2%})")
    facts.add_row("also trained", Text(_listed(list(found.trained))))
    facts.add_row("weights", _size(found.bytes_of_weights))
    facts.add_row("gradients and Adam", _size(found.bytes_of_training))
    facts.add_row("dense layers left", Text(_listed(found.left)))
    console.print(facts)


def print_rows(console: Console, rows: list[dict[str, str]], spared: tuple[str, ...] = ()) -> None:
    """A table of dictionaries with the same keys; without the `spared` ones, in this order, that find no room."""
    for count in range(len(spared) + 1):
        names = [name for name in rows[0] if name not in spared[:count]]
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(names):
            table.add_column(name, no_wrap=number == 0)
        for row in rows:
            table.add_row(*(Text(row[name]) for name in names))
        if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
            break
    console.print(table)
    if len(names) < len(rows[0]):
        console.print(f"A wider terminal shows {', '.join(name for name in rows[0] if name not in names)} as well.")


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
