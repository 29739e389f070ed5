"""What the processes of a job are: ``python -m mindpet.train.msrun work RUN_FILE ...`` is one, without ``work`` msrun.

Nothing heavy is imported before the kernel knows that a process is to end with its parent, whatever becomes of that.
"""

import ctypes
import os
import signal
import sys

PARENT = "MINDPET_PARENT"  # pid, in the environment


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ[PARENT]):  # it has gone already
        os._exit(1)
    os.environ[PARENT] = str(os.getpid())


def main() -> int:
    """One process of a job, msrun itself among them."""
    _end_with_parent()
    # a signal to all processes at once must not end a step: the launcher passes it on to those that can save
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.argv[1] == "work":
        from mindpet.train.launch import work

        return work(sys.argv[2], sys.argv[3:])
    from mindspore.parallel.cluster.run import main as msrun

    return msrun() or 0


if __name__ == "__main__":
    sys.exit(main())
