"""Compare methods on one model and one data set: one run for each method and seed, and a table of them.

What keeps the table honest:

- All runs train on the same rows and are scored on the same held-out rows, whatever their seed: the split is made once,
  with the run file's own ``train.seed``, and written to ``data/`` in the output directory. Seeds vary the start of what
  is new, the order of the rows and dropout.
- The quality of a run is that of its *last* step. Choosing the best evaluation (``train.keep_best``) or the moment to
  stop (``train.early_stopping``) would choose on the rows that the table is about, so both are off here.
- A learning-rate search splits the *training* rows once more. It never sees a held-out row.
"""

from typing import Any

from mindpet.train.comparison.cells import Watcher
from mindpet.train.comparison.plan import Plan, variant_named
from mindpet.train.comparison.runner import CellRunner
from mindpet.train.comparison.search import SEARCH_FILE, judge, recorded_rate
from mindpet.train.comparison.splits import write_splits
from mindpet.train.comparison.tables import collect, write_comparison
from mindpet.train.config import RunFileError


def compare(
    plan: Plan,
    watcher: Watcher | None = None,
    search: bool = False,
    only: list[str] | None = None,
    redo: list[str] | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Run what is not finished of a plan, and write ``comparison.md``, ``.csv``, ``.json`` and ``.png``.

    Args:
        plan: of :func:`mindpet.train.comparison.plan.make_plan`.
        watcher: is told how it goes on.
        search: look for a learning rate for each method first; it is kept in its ``search.json``.
        only: ``METHOD`` or ``METHOD:SEED``; run these alone. The table is of the whole plan as always.
        redo: the same; begin these anew although they are finished.
        jobs: cells at a time.

    Returns:
        The content of ``comparison.json``, and under ``failures`` the last lines of each cell that failed.

    Raises:
        RunFileError: `only` or `redo` names what is not in the plan.
        DataError: the data cannot be used.
        Interrupted: on SIGINT or SIGTERM.
    """
    watcher = watcher or Watcher()
    everything = [(name, seed) for seed in plan.seeds for name in plan.variants]  # each method once, then again
    wanted = _selected(everything, only, "--only") if only else everything
    again = _selected(everything, redo or [], "--redo")
    names = list(dict.fromkeys(name for name, _ in wanted))
    data, fitting = write_splits(plan, watcher, search or any(plan.directory.glob(f"*/{SEARCH_FILE}")))
    plan = plan.with_changes(list(plan.variants), data=data)
    searches = {name: plan.search_cells(name, fitting) for name in plan.variants} if fitting else {}
    looking = [cell for name in names for cell in searches[name]] if search else []
    runner = CellRunner(jobs, len(looking) + len(wanted), watcher)
    runner.redo = {cell for cell in looking if all((cell.variant, seed) in again for seed in plan.seeds)}
    runner.run(looking)
    searching = {name for name in names if search and not judge(plan.directory / name, searches[name], runner, watcher)}
    found = {name: rate for name, cells in searches.items() if (rate := recorded_rate(plan.directory / name, cells))}
    for name, rate in found.items():
        plan = plan.with_changes([name], train={"learning_rate": rate})
        if not search:
            watcher.message(f"{name}: learning rate {rate:g}, as a search found before ({SEARCH_FILE}).")

    def write() -> dict[str, Any]:
        result = collect(plan, set(found), jobs, {str(cell): words for cell, words in runner.failures.items()})
        write_comparison(result, plan.directory)
        return result

    cells_by_pair = {(name, cell.config.train.seed): cell for name in plan.variants for cell in plan.cells(name)}
    runner.redo = {cells_by_pair[pair] for pair in wanted if pair in again}
    lost = searching | {cell.variant for cell in runner.failures}  # or no rate of their search worked
    runner.after = write
    runner.run([cells_by_pair[pair] for pair in everything if pair in wanted and pair[0] not in lost])
    return write()


def _selected(everything: list[tuple[str, int]], words: list[str], option: str) -> list[tuple[str, int]]:
    """The cells that ``METHOD`` or ``METHOD:SEED`` words mean."""
    chosen, problems = list[tuple[str, int]](), list[str]()
    for word in words:
        name, colon, seed = word.partition(":")
        try:
            name = variant_named(name)
        except ValueError as error:
            problems.append(f"{option} {word}: {error}")
            continue
        found = [pair for pair in everything if pair[0] == name and (not colon or str(pair[1]) == seed.strip())]
        if not found:
            there = ", ".join(dict.fromkeys(f"{one}:{number}" for one, number in everything))
            problems.append(f"{option} {word}: is not in this comparison, which has {there}")
        chosen += found
    if problems:
        raise RunFileError("\n".join(problems))
    return chosen
