"""One cell of a comparison is one run: what it is, and what its directory says of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindpet import _files
from mindpet.train.config import RunConfig, RunFileError, differences, load_run, settings_of
from mindpet.train.fit import CHECKPOINT

_REFUSAL = "does-not-apply.json"


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a comparison.

    Attributes:
        variant: the row that it belongs to.
        name: what tells it apart in that row, ``seed 1`` or ``rate 0.003``.
        config: the whole run; its output directory is the cell's.
    """

    variant: str
    name: str
    config: RunConfig

    @property
    def directory(self) -> Path:
        """Where the run is."""
        return Path(self.config.output.directory)

    def __str__(self) -> str:
        return f"{self.variant}, {self.name}"

    def report(self) -> dict[str, Any] | None:
        """The report of the finished run with these settings, if there is one."""
        if (self.directory / "report.json").is_file() and not self.changes():
            return _files.read_json(self.directory / "report.json")
        return None

    def refusal(self) -> str:
        """Why the method does not apply to this network, if a run with these settings found out."""
        if (self.directory / _REFUSAL).is_file():
            content = _files.read_json(self.directory / _REFUSAL)
            if content["settings"] == settings_of(self.config):
                return content["reason"]
        return ""

    def changes(self) -> list[str]:
        """What differs between the run in the directory and this cell; a word on it where there is no such run."""
        try:
            return differences(load_run(self.directory / "run.yaml"), self.config)
        except RunFileError:
            return ["its run.yaml cannot be read" if (self.directory / "run.yaml").is_file() else "it was not begun"]

    def can_resume(self) -> bool:
        """Whether an unfinished run with these settings left something to go on from."""
        return (self.directory / CHECKPOINT).is_file() and not self.changes()

    def refuse(self, reason: str) -> None:
        """Write down that the method does not apply."""
        content = {"reason": reason, "settings": settings_of(self.config)}
        _files.write_json(self.directory / _REFUSAL, content)

    def forget(self) -> None:
        """Have the run made anew."""
        for name in ("report.json", CHECKPOINT, _REFUSAL):
            (self.directory / name).unlink(missing_ok=True)


class Watcher:
    """Is told how a comparison goes on. This one says nothing."""

    def message(self, text: str) -> None:
        """Something worth a line."""

    def progress(self, cell: str, step: int, total: int) -> None:
        """A running cell is so far."""

    def overall(self, done: int, total: int, seconds_left: float | None) -> None:
        """So many cells are done; the seconds are an estimate for the rest of them."""

    def ended(self, cell: str) -> None:
        """A cell runs no more."""
