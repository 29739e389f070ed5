"""The learning rate of a method: the best of a grid, judged on training rows that are kept apart for it."""

from pathlib import Path
from typing import Any

from mindpet import _files
from mindpet.train.comparison.cells import Cell, Watcher
from mindpet.train.comparison.runner import CellRunner
from mindpet.train.comparison.tables import quality_of
from mindpet.train.config import RunFileError, settings_of

SEARCH_FILE = "search.json"


def judge(directory: Path, cells: list[Cell], runner: CellRunner, watcher: Watcher) -> bool:
    """Write down which rate of a search was the best on the validation rows; none when all of them failed.

    Returns:
        False, with nothing written, as long as another process runs one of the cells: a part of a grid is no search.
    """
    reports = [cell.report() for cell in cells]
    failed = [runner.failures.get(cell) or cell.refusal() for cell in cells]
    if not all(report or words for report, words in zip(reports, failed)):
        watcher.message(
            f"{cells[0].variant}: its search is not finished; another process is at it. Its runs wait for that."
        )
        return False
    candidates, found = [], list[tuple[float, float, float]]()
    rates = [cell.config.train.learning_rate or 0.0 for cell in cells]
    for rate, report, words in zip(rates, reports, failed):
        entry: dict[str, Any] = {"learning_rate": rate}
        if report is None:
            entry["failed"] = words
        else:
            key, value, sign = quality_of(report)
            entry[key] = value
            entry["evaluation_loss"] = loss = report["after"]["evaluation_loss"]
            found.append((sign * value, -loss, rate))  # of equals the lower loss
        candidates.append(entry)
    if not found:
        return True
    for cell in cells:
        runner.failures.pop(cell, None)  # a rate that is too high is an answer, too
    chosen = max(found)[2]
    at_edge = len(rates) > 1 and chosen in (min(rates), max(rates))
    _files.write_json(
        directory / SEARCH_FILE,
        {
            "chosen": chosen,
            "at_edge": at_edge,
            "judged_on": cells[0].config.data.test,
            "trained_on": cells[0].config.data.train,
            "candidates": candidates,
            "settings": _search_settings(cells),
        },
    )
    edge = " It is at the edge of the grid: a wider compare.grid may hold a better one." if at_edge else ""
    watcher.message(f"{cells[0].variant}: the best learning rate on the validation rows is {chosen:g}.{edge}")
    return True


def recorded_rate(directory: Path, cells: list[Cell]) -> float | None:
    """The rate that a search with these very settings found, if there was one."""
    path = directory / SEARCH_FILE
    if not path.is_file():
        return None
    content = _files.read_json(path, RunFileError)
    return content["chosen"] if content["settings"] == _search_settings(cells) else None


def _search_settings(cells: list[Cell]) -> list[dict[str, Any]]:
    return [settings_of(cell.config) for cell in cells]
