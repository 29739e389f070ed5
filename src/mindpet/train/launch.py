"""Starts the processes of a run with msrun, shows what they say, and ends all of them when one is lost.

::

    mindpet finetune ──starts──▶ msrun ──starts──▶ scheduler, process 0, process 1, ...
            ▲                                            │
            └── <output>/parallel/events.jsonl ◀──writes─┘
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import psutil

from mindpet import _files
from mindpet.train.config import RunConfig, RunFileError, as_yaml, load_run
from mindpet.train.fit import Diverged, Interrupted, Reporter
from mindpet.train.msrun import PARENT
from mindpet.train.processes import LOCK, environment_of, free_port, lock_of, wishes_to_stop

_PLACE = "MINDPET_PARALLEL"  # where the processes of a job are told to write what they have to say
_AGREED = (Interrupted, Diverged)  # ends that all processes come to together
_GRACE = 3.0  # seconds for msrun to say why a process ended, and for the last words of the others
_ROOM = 1 << 16  # bytes without which a process cannot say how it ended
_EXIT = 30.0  # seconds from the end of the work to that of the processes


class ProcessLost(RuntimeError):
    """One of the processes of a run ended before its work was done; the others were stopped."""


def launch(config: RunConfig, reporter: Reporter, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Run ``finetune`` in `config.parallel.processes` processes on this machine.

    Raises:
        ProcessLost: one of them was killed, or ended without a word.
        Interrupted, and whatever else :func:`mindpet.train.run.finetune` raises.
    """
    place = Path(config.output.directory) / "parallel"
    lock = lock_of(place)
    if lock is None:
        raise RunFileError(f"Another command runs in {place.parent} at this moment.")
    try:
        for old in place.iterdir():
            if old.is_file() and old.name != LOCK:
                old.unlink()
        _files.write_text(place / "run.yaml", as_yaml(config))
        count = config.parallel.processes
        reporter.message(f"Starting {count} processes, which takes about 15 seconds; their output goes to {place}.")
        with wishes_to_stop() as wishes:
            job = _Job(place, count, [*["--resume"] * resume, *["--overwrite"] * overwrite])
            try:
                return _follow(job, reporter, wishes)
            finally:
                job.kill()
                reporter.stop()
    finally:
        os.close(lock)


class _Job:
    """msrun and what it has started."""

    def __init__(self, place: Path, count: int, flags: list[str]):
        self.place, self.count = place, count
        words = [sys.executable, "-m", "mindpet.train.msrun"]
        words += [f"--worker_num={count}", f"--local_worker_num={count}", "--master_addr=127.0.0.1"]
        words += [f"--master_port={free_port()}", f"--log_dir={place}", "--join=True"]
        words += [f"--tail_worker_log={count}"]  # that of none: each tail is a process that outlives msrun
        words += ["python3", "-m", "mindpet.train.msrun", "work", str(place / "run.yaml"), *flags]
        with open(place / "msrun.log", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(place, count),
                start_new_session=True,  # Ctrl-C is for the launcher, which has it passed on
            )

    def at_work(self) -> dict[int, dict[str, Any]]:
        """Number and beginning of each process that has said who it is, and not yet that it is done; by rank."""
        paths = {rank: self.place / f"process-{rank}.json" for rank in range(self.count) if not self.outcome(rank)}
        return {rank: _files.read_json(path) for rank, path in paths.items() if path.is_file()}

    def outcome(self, rank: int) -> dict[str, Any]:
        """How the work of a process ended, when it did."""
        path = self.place / f"outcome-{rank}.json"
        return _files.read_json(path) if path.is_file() else {}

    def failure(self) -> BaseException | None:
        """The first exception that a process has told of."""
        outcomes = [one for rank in range(self.count) if "error" in (one := self.outcome(rank))]
        if not outcomes:
            return None
        return _again(**min(outcomes, key=lambda one: one["time"])["error"])

    def ended(self) -> tuple[int, str]:
        """(pid, how) of the first process that did not end well, as msrun says it; pid 0 if it says nothing."""
        end = time.monotonic() + _GRACE
        found = None
        while found is None and time.monotonic() < end:
            text = (self.place / "msrun.log").read_text("utf-8", "replace")
            found = re.search(r"Worker process (\d+) exit with exception. Error code: (-?\d+)", text)
            time.sleep(0.1)
        if found is None:
            return 0, "ended"
        code = int(found[2])
        return int(found[1]), f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"

    def last_lines(self, rank: int, count: int = 8) -> str:
        """The end of what a process printed."""
        path = self.place / f"worker_{rank}.log"
        text = path.read_text("utf-8", "replace") if path.is_file() else ""
        return "\n".join(line.rstrip() for line in text.splitlines()[-count:] if line.strip())

    def kill(self) -> None:
        """End every process of the job at once; those that have ended are left alone."""
        mine = []
        with contextlib.suppress(psutil.NoSuchProcess):
            msrun = psutil.Process(self.process.pid)
            msrun.suspend()  # it is to start nobody now
            mine = msrun.children(recursive=True)
        left = [_process(**words) for words in self.at_work().values()]  # those whose msrun is gone, too
        for one in [*mine, *left]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if one is not None:
                    one.kill()
        self.process.kill()
        self.process.wait()


def _follow(job: _Job, reporter: Reporter, wishes: list[int]) -> dict[str, Any]:
    """Pass on what the first process says until the job is over."""
    events = job.place / "events.jsonl"
    position, step, training, asked, done = 0, 0, False, False, 0.0
    while True:
        over = job.process.poll() is not None
        lost = [(rank, words["pid"]) for rank, words in job.at_work().items() if not _lives(_process(**words))]
        position, fresh = _read_events(events, position)
        for name, values in fresh:
            training = training or name == "start"
            step = values[0].get("step", step) if name == "step" else step
            getattr(reporter, name)(*values)
        failure = job.failure()
        finished = all(job.outcome(rank) for rank in range(job.count))
        alone = failure is not None and not isinstance(failure, _AGREED)  # the others wait for one that is gone
        done = done or (time.monotonic() if finished or alone else 0.0)
        if over or (done and time.monotonic() - done > (_GRACE if alone else _EXIT)):
            break
        if lost and not alone:
            named, how = job.ended()
            rank, pid = next((one for one in lost if one[1] == named), lost[0])
            if not job.outcome(rank):  # it had still to write it down
                raise _lost(job, rank, f"(pid {pid}) {how}", step)
        if wishes and not asked:
            if not training:
                raise KeyboardInterrupt
            asked = True
            reporter.message("Finishing the present step, then saving...")
            for words in job.at_work().values():
                process = _process(**words)
                if process is not None and _lives(process):
                    process.send_signal(signal.SIGTERM)
        if len(wishes) > 1:
            raise KeyboardInterrupt
        time.sleep(0.1)
    for name, values in _read_events(events, position)[1]:
        getattr(reporter, name)(*values)
    if failure := job.failure():
        raise failure
    report = job.place.parent / "report.json"
    if not all(job.outcome(rank) for rank in range(job.count)) or not report.is_file():
        rank = next((rank for rank in range(job.count) if not job.outcome(rank)), 0)
        raise _lost(job, rank, "did not come to its end", step)
    return _files.read_json(report)


def _lost(job: _Job, rank: int, how: str, step: int) -> ProcessLost:
    lines = job.last_lines(rank)
    run_file = shlex.quote(str(job.place.parent / "run.yaml"))
    begun = (job.place.parent / "checkpoint.safetensors").is_file()
    full = shutil.disk_usage(job.place).free < _ROOM  # it could not even say so
    return ProcessLost(
        f"Process {rank} of {job.count} (counted from 0) {how}"
        + (f" after step {step}" if step else " before the first step")
        + "; the others were stopped."
        + (f" It said last:\n{lines}" if lines else "")
        + ("\nNo space is left on the disk of the output directory: make room first." if full else "")
        + (f"\nGo on with: mindpet finetune {run_file} --resume" if begun else "")
        + f"\nAll output is in {job.place}."
    )


def work(run_file: str, flags: list[str]) -> int:
    """What each process of a job does, the scheduler too. Returns its exit status."""
    from mindpet.parallel.group import join, schedules
    from mindpet.train.run import finetune

    os.environ.setdefault("GLOG_v", "3")
    if schedules():
        join()
        return 0
    place, rank, own = Path(os.environ[_PLACE]), int(os.environ["RANK_ID"]), psutil.Process()
    _files.write_json(place / f"process-{rank}.json", {"pid": own.pid, "created": own.create_time()})
    outcome: dict[str, Any] = {}
    status = 0
    with open(place / "events.jsonl", "a", encoding="utf-8") if rank == 0 else open(os.devnull, "w") as events:
        try:
            finetune(load_run(run_file), _Events(events), "--resume" in flags, "--overwrite" in flags)
        except Exception as error:
            status = 0 if isinstance(error, _AGREED) else 1
            outcome["error"] = _told(error)
            if status:
                sys.excepthook(type(error), error, error.__traceback__)
    _files.write_json(place / f"outcome-{rank}.json", {**outcome, "time": time.time()})
    return status


class _Events(Reporter):
    """Writes down what a reporter is told, one call a line."""

    def __init__(self, file: IO[str]):
        self.file = file

    def _write(self, name: str, *values: Any) -> None:
        self.file.write(json.dumps([name, values]) + "\n")
        self.file.flush()

    def start(self, done: int, total: int) -> None:
        self._write("start", done, total)

    def step(self, record: dict[str, Any]) -> None:
        self._write("step", record)

    def evaluation(self, record: dict[str, Any], best: bool) -> None:
        self._write("evaluation", record, best)

    def message(self, text: str) -> None:
        self._write("message", text)

    def stop(self) -> None:
        self._write("stop")


def _read_events(path: Path, position: int) -> tuple[int, list[tuple[str, list[Any]]]]:
    """(where to go on, the calls written since `position`); a line that is not whole yet is left for later."""
    if not path.is_file():
        return position, []
    with open(path, "rb") as file:
        file.seek(position)
        whole = file.read().rpartition(b"\n")[0]
    lines = whole.splitlines()
    return position + (len(whole) + 1 if whole else 0), [tuple(json.loads(line)) for line in lines]


def _told(error: Exception) -> dict[str, Any]:
    """An exception as JSON holds it."""
    kind, message, args = type(error), str(error), error.args
    if isinstance(error, OSError) and error.errno:
        first, second = (os.fspath(n) if isinstance(n, os.PathLike) else n for n in (error.filename, error.filename2))
        args = (error.errno, error.strerror, first, *([] if second is None else [None, second]))
        message = str(OSError(*args))
    told = {"kind": f"{kind.__module__}.{kind.__qualname__}", "message": message, "args": list(args)}
    return told if all(isinstance(value, (str, int, float, type(None))) for value in args) else {**told, "args": []}


def _again(kind: str, message: str, args: list[Any]) -> Exception:
    """The same, if it is Python's or this package's and made from its arguments; else a RuntimeError that names it."""
    classes: list[type[Exception]] = [Exception]
    for one in classes:
        classes += one.__subclasses__()
    for one in classes:
        known = one.__module__ == "builtins" or one.__module__.partition(".")[0] == "mindpet"
        if known and f"{one.__module__}.{one.__qualname__}" == kind:
            with contextlib.suppress(Exception):  # some want other arguments than those that they keep
                error = one(*args)
                if str(error) == message:
                    return error
    return RuntimeError(f"{kind.removeprefix('builtins.')}: {message}")


def _process(pid: int, created: float) -> psutil.Process | None:
    """The process with that number, if it still is the one that was meant."""
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - created) < 1.0 else None
    except psutil.NoSuchProcess:
        return None


def _lives(process: psutil.Process | None) -> bool:
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _environment(place: Path, count: int) -> dict[str, str]:
    """The processes share the cores, and find this Python first."""
    environment = environment_of(count)
    # msrun starts what is called python3: this one
    python = place / "bin" / "python3"
    python.parent.mkdir(exist_ok=True)
    _files.write_text(python, f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    environment["PATH"] = os.pathsep.join([str(python.parent), environment.get("PATH", "")])
    environment[PARENT] = str(os.getpid())
    environment["GLOG_v"] = min("3", environment.get("GLOG_v", "3"))  # msrun logs as an error how a process ended
    environment[_PLACE] = str(place)
    return environment
