"""What commands that start processes of their own have in common."""

import errno
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = ".lock"


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment_of(processes: int) -> dict[str, str]:
    """Of so many processes at once: they share the cores, unless OMP_NUM_THREADS says otherwise; no colours."""
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    return environment


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def on_signals(handle: Callable[[int, dict[int, Any]], object]) -> Iterator[None]:
    """Within it SIGINT and SIGTERM call ``handle(number, before)``, with the handlers that there were before.

    Both, since a graph of MindSpore's makes a SIGTERM of a SIGINT. In another thread than the main one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, _: handle(number, before))
    try:
        yield
    finally:
        restore(before)


def restore(handlers: dict[int, Any]) -> None:
    """Put these handlers of signals back."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def wishes_to_stop() -> Iterator[list[int]]:
    """SIGINT and SIGTERM as they come, in a list: an exception could come when a process has begun but has no name."""
    wishes: list[int] = []
    with on_signals(lambda number, _: wishes.append(number)):
        yield wishes


def lock_of(directory: Path, name: str = LOCK) -> int | None:
    """A lock on the directory that lives as long as a process which inherits it; None when somebody has it."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError as error:  # a file system without locks: nobody can be kept out there
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            os.close(lock)
            raise
    return lock
