"""The output directory of a run: what is in it, who may write there, and what may be written over."""

import errno
import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mindpet import _files
from mindpet.parallel.group import Group
from mindpet.train.config import RunConfig, RunFileError, differences, load_run
from mindpet.train.fit import CHECKPOINT, CannotResume
from mindpet.train.prepare import Prepared
from mindpet.train.processes import lock_of
from mindpet.train.rate import with_rate

_WRITTEN = (
    *(f"{name}.json" for name in ("before", "data", "labels", "report")),
    "run.yaml",
    "metrics.jsonl",
    "curve.png",
    CHECKPOINT,
)
_DELTA = ("delta.safetensors", "delta.json")
_LOCK = ".writer.lock"
_NO_MEMORY = re.compile(
    r"bad_alloc|out of memory|memory (is not|isn't|not) enough|not enough memory|(cannot|failed to|unable to) allocate"
    r"|alloc(ate|ation)?\b.{0,30} fail|start new thread|temporarily unavailable[\s\S]*task\.cc",  # threads get no stack
    re.IGNORECASE,
)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


class CannotWrite(RuntimeError):
    """The output directory takes no more; what was saved before is intact."""


class OutOfMemory(RuntimeError):
    """The machine has no more memory; what was saved before is intact."""


def check(config: RunConfig, directory: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to write over a run, or to go on where there is none or another one.

    Raises:
        RunFileError, CannotResume: with what can be done.
    """
    _check_place(directory)
    there = directory / "run.yaml"
    if not resume:
        if there.exists() and not overwrite:
            raise RunFileError(
                f"{directory} holds a run already: go on with --resume, start anew with --overwrite, or choose another "
                "output.directory."
            )
        return
    if not there.is_file():
        raise CannotResume(f"{directory} has no run.yaml: there is nothing to go on from.")
    if (directory / "report.json").is_file():
        raise CannotResume(f"The run in {directory} is finished; see its report.json.")
    try:
        changed = differences(with_rate(load_run(there)), config)
    except RunFileError as error:
        raise CannotResume(f"It cannot be told what the run in {directory} was. {error}") from error
    if changed:
        raise CannotResume(f"The run in {directory} was begun with other settings:\n  " + "\n  ".join(changed))


def _check_place(directory: Path) -> None:
    """What there is of the path takes files."""
    there = next(each for each in (directory, *directory.parents) if os.path.exists(each))
    if not there.is_dir():
        raise RunFileError(f"The output.directory {directory} cannot be made: {there} is a file, not a directory.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunFileError(
            f"The output.directory {directory} cannot be written to: {there} is read-only, or not yours to write."
        )


def enter(held: ExitStack, config: RunConfig, directory: Path, resume: bool, overwrite: bool, group: Group) -> None:
    """Let the leading process be the only one that writes into the directory, as long as `held` lasts.

    Raises:
        RunFileError, CannotResume: another run writes there, or was there meanwhile.
    """
    wrong: Exception | None = None
    try:
        if group.leads:
            held.enter_context(_writable(directory))
            held.enter_context(_only_writer(directory))
            check(config, directory, resume, overwrite)
    except (RunFileError, CannotResume, OSError) as error:
        wrong = error
    if group.any(wrong is not None):
        if wrong is None:
            time.sleep(1)  # the word of the leading process comes first
        raise wrong or RunFileError(f"The leading process cannot write into {directory}.")


@contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    """Nobody else writes into the directory.

    Raises:
        RunFileError: somebody does.
    """
    lock = lock_of(directory, _LOCK)
    if lock is None:
        raise RunFileError(
            f"Another run writes into {directory} at this moment: wait for it, or choose another output.directory."
        )
    try:
        second = lock_of(directory, _LOCK)
        if second is None:  # locks keep others out here
            _files.remove_leftovers(directory, *_WRITTEN)
            _files.remove_leftovers(directory / "delta", *_DELTA)
        else:
            os.close(second)
        yield
    finally:
        os.close(lock)


@contextmanager
def _writable(directory: Path) -> Iterator[None]:
    """What keeps files from being written is told with what is saved.

    Raises:
        CannotWrite: the directory takes no more.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error, _files.NotWrittenError) and error.errno not in _FULL:
            raise
        raise CannotWrite(f"{directory} cannot be written to: {error}.\n{way_on(directory, 'room')}") from error


@contextmanager
def enough_memory(directory: Path) -> Iterator[None]:
    """What the machine has no memory for is told with what is saved.

    Raises:
        OutOfMemory: there was not enough.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "mindpet" or not _is_of_memory(error):
            raise
        raise OutOfMemory(
            f"There was not enough memory. {way_on(directory, 'more')}\n"
            "With less memory: begin anew with half of train.batch_size, twice train.accumulate, which is the same "
            f"batch, or a smaller data.max_length.\n{type(error).__name__}: {error}"
        ) from error


def _is_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def way_on(directory: Path, wanted: str) -> str:
    """What to do when there is what was wanted."""
    if (directory / CHECKPOINT).is_file() and (directory / "run.yaml").is_file():
        again = f"mindpet finetune {shlex.quote(str(directory / 'run.yaml'))} --resume"
        return f"The last save is intact. When there is {wanted}, go on with: {again}"
    return "Nothing was saved yet: begin again with --overwrite."


def begin(directory: Path, prepared: Prepared) -> None:
    """Nothing of an older run stays; labels, and which rows are held out, are written down."""
    for name in _WRITTEN:
        (directory / name).unlink(missing_ok=True)
    for name in _DELTA:
        (directory / "delta" / name).unlink(missing_ok=True)
    if prepared.labels:
        _files.write_json(directory / "labels.json", prepared.labels)
    _files.write_json(directory / "data.json", {"held_out": prepared.test.digest()})
