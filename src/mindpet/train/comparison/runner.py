"""Runs cells in processes of their own, so that peak memory and compiled graphs are theirs and a crash costs one."""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from mindpet import _files
from mindpet._checks import NothingFitsError
from mindpet.train.comparison.cells import Cell, Watcher
from mindpet.train.config import as_yaml
from mindpet.train.fit import Interrupted
from mindpet.train.processes import environment_of, lock_of, wishes_to_stop

_PROGRESS = re.compile(r"step (\d+)/(\d+)\b.*?([\d.]+) s left")
_SHOWN = 8  # last lines of a failed run
_PATIENCE = 120.0  # seconds that a run gets to finish its step and save


class _Process:
    """A cell that runs: the process, and how far it is."""

    def __init__(self, cell: Cell, jobs: int, lock: int):
        self.cell, self.begun = cell, time.monotonic()
        run_file, self.log = cell.directory / "cell.yaml", cell.directory / "log.txt"
        self.errors = cell.directory / "errors.txt"
        _files.write_text(run_file, as_yaml(cell.config))
        self.resumed = cell.can_resume()
        how = "--resume" if self.resumed else "--overwrite"
        words = [sys.executable, "-m", "mindpet", "finetune", str(run_file), how]
        with open(self.log, "w", encoding="utf-8") as output, open(self.errors, "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**environment_of(jobs * cell.config.parallel.processes), "COLUMNS": "120"},
                pass_fds=(lock,),
            )

    def position(self) -> tuple[int, int, float] | None:
        """(step, total, seconds left), once the run has said so."""
        with open(self.log, "rb") as file:
            file.seek(max(0, os.path.getsize(self.log) - 4096))
            found = _PROGRESS.findall(file.read().decode("utf-8", "replace"))
        return (int(found[-1][0]), int(found[-1][1]), float(found[-1][2])) if found else None

    def last_lines(self) -> str:
        """The end of what the run said about its failure, or else of what it printed."""
        for path in (self.errors, self.log):
            lines = [line.rstrip() for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
            if lines:
                break
        return "\n".join(lines[-_SHOWN:])


class CellRunner:
    """Runs cells, `jobs` at a time, each in its own process.

    Args:
        jobs: how many at once.
        total: cells of the whole comparison, for the estimate.
        watcher: is told how it goes on.
        after: is called whenever a cell has ended.

    Attributes:
        redo: cells to begin anew although they are finished.
        failures: the last lines of each cell that failed.
    """

    def __init__(self, jobs: int, total: int, watcher: Watcher, after: Callable[[], Any] = lambda: None):
        self.jobs, self.total, self.watcher, self.after = jobs, total, watcher, after
        self.redo: set[Cell] = set()
        self.failures: dict[Cell, str] = {}
        self.done = 0
        self.seconds: dict[str, list[float]] = {}

    def run(self, cells: list[Cell]) -> None:
        """Run what is not finished; a failed cell does not stop the others.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after the running cells have saved.
        """
        waiting, running = list(cells), list[_Process]()
        with wishes_to_stop() as wishes:
            try:
                while (waiting or running) and not wishes:
                    while waiting and len(running) < self.jobs and not wishes:
                        process = self._start(waiting.pop(0))
                        running += [process] if process else []
                    if running:
                        time.sleep(0.2)
                    for process in [one for one in running if one.process.poll() is not None]:
                        running.remove(process)
                        self._ended(process)
                    self._show(running, waiting)
                if wishes:
                    self._interrupt(running, wishes)
            finally:
                for one in running:  # none is left, unless something here went wrong
                    one.process.terminate()
        if wishes:
            raise Interrupted(
                f"Stopped; {self.done} of {self.total} cells are done, the rest is saved. The same command goes on "
                "(without --redo, which begins anew)."
            )

    def _start(self, cell: Cell) -> _Process | None:
        lock = lock_of(cell.directory)
        if lock is None:
            self.watcher.message(f"{cell}: another process runs it at this moment; left to that one.")
            self.done += 1
            return None
        try:
            if cell in self.redo:
                cell.forget()
            refusal = cell.refusal()
            if refusal or cell.report() is not None:
                self.watcher.message(f"{cell}: " + ("does not apply." if refusal else "is finished already."))
                self._count(cell)
                return None
            self.watcher.message(f"{cell}: {_beginning(cell)} ({self.done + 1} of {self.total}).")
            return _Process(cell, self.jobs, lock)
        finally:
            os.close(lock)  # the process has it now, if there is one

    def _ended(self, process: _Process) -> None:
        cell, status = process.cell, process.process.returncode
        self.watcher.ended(str(cell))
        if status == 0:
            after = (cell.report() or {}).get("after", {})
            words = ", ".join(f"{key} {value:.4g}" for key, value in after.items())
            self.watcher.message(f"{cell}: done in {time.monotonic() - process.begun:.0f} s. {words}")
        elif status == NothingFitsError.exit_code and cell.config.method.options.get("targets") is None:
            reason = process.last_lines()
            cell.refuse(reason)
            self.watcher.message(f"{cell}: the method does not apply to this network:\n{reason}")
        else:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            self.failures[cell] = process.last_lines() or f"It ended with {how}."
            if process.resumed:
                self.failures[cell] += f"\nIt went on from a save; --redo {cell.variant} begins anew."
            self.watcher.message(f"{cell}: failed with {how}:\n{self.failures[cell]}")
        self._count(cell)
        self.after()

    def _count(self, cell: Cell) -> None:
        self.done += 1
        report = cell.report()
        if report:
            self.seconds.setdefault(cell.variant, []).append(report["seconds"]["whole"])

    def _show(self, running: list[_Process], waiting: list[Cell]) -> None:
        known, left = [second for times in self.seconds.values() for second in times], 0.0
        for process in running:
            position = process.position()
            elapsed = time.monotonic() - process.begun
            if position:
                self.watcher.progress(str(process.cell), *position[:2])
                left += position[2]
                known.append(elapsed + position[2])
            elif known:
                left += max(0.0, statistics.median(self.seconds.get(process.cell.variant, known)) - elapsed)
        later = self.total - self.done - len(running)
        if not known:
            self.watcher.overall(self.done, self.total, None)
            return
        per_cell = [statistics.median(self.seconds.get(cell.variant, known)) for cell in waiting]
        beyond = max(0, later - len(waiting)) * statistics.median(known)
        self.watcher.overall(self.done, self.total, (left + sum(per_cell) + beyond) / self.jobs)

    def _interrupt(self, running: list[_Process], wishes: list[int]) -> None:
        """Have the running cells save and end; a second interruption ends them at once.

        They may have the signal already, when it went to the whole group, and end at once when they get the same one
        twice: so they are sent the other one of the two, which they take for the same wish.
        """
        self.watcher.message("Stopping: the running cells finish their step and save...")
        for one in running:
            one.process.send_signal(signal.SIGINT if wishes[0] == signal.SIGTERM else signal.SIGTERM)
        end = time.monotonic() + _PATIENCE
        while any(one.process.poll() is None for one in running) and len(wishes) == 1 and time.monotonic() < end:
            time.sleep(0.1)
        for one in running:
            one.process.kill()  # does nothing to those that have ended
            one.process.wait()


def _beginning(cell: Cell) -> str:
    """What the run does first."""
    if cell.can_resume():
        return "going on from its last save"
    changes = cell.changes() if (cell.directory / "run.yaml").is_file() else []
    return "done anew, settings have changed (" + "; ".join(changes) + ")" if changes else "begins"
