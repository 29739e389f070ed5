"""One cell of a comparison is one run: what it is, and what its directory says of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindpet import _files
from mindpet.train.config import RunConfig, RunFileError, load_run
from mindpet.train.fit import CHECKPOINT

_SECTIONS = ("model", "method", "data", "train")
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
            old = settings_of(load_run(self.directory / "run.yaml"))
        except RunFileError:
            return ["its run.yaml cannot be read" if (self.directory / "run.yaml").is_file() else "it was not begun"]
        new = settings_of(self.config)
        return [
            f"{section}.{key}: it was {old[section].get(key)!r}, now {new[section].get(key)!r}"
            for section in _SECTIONS
            for key in sorted({*old[section], *new[section]})
            if old[section].get(key) != new[section].get(key)
        ]

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


def settings_of(config: RunConfig) -> dict[str, Any]:
    """All that makes two runs the same, as JSON has it."""
    return json.loads(json.dumps(config.model_dump(include=set(_SECTIONS))))


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
