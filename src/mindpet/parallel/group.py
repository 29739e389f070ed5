"""The processes that train one network together, each on its part of every batch.

::

    joined batch   0 1 2 3 4 5 6 7 8 9     batch_size 10
    process 0      0 1 2 3                 4 rows each, the last batch filled up with blank ones
    process 1              4 5 6 7
    process 2                      8 9 .  .
"""

import os

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mindpet import _compat

_ROLE = "MS_ROLE"  # what msrun tells each process: MS_WORKER or MS_SCHED


class Group:
    """Processes that work together; one alone unless `rank` and `size` say otherwise.

    Attributes:
        rank: which of them this is, from 0.
        size: how many there are.

    >>> Group(1, 3).share(10).tolist()  # the last one gets 8, 9 and two blanks
    [4, 5, 6, 7]
    >>> Group(2, 3).share(10).tolist(), Group().share(3).tolist()
    ([8, 9, 10, 10], [0, 1, 2])
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def part_of(self, batch_size: int) -> int:
        """Rows of a joined batch that each process has."""
        return -(-batch_size // self.size)

    def share(self, count: int) -> np.ndarray:
        """The indices of this process's part of `count` rows: as many for each process, filled up with `count`."""
        part = self.part_of(count)
        return np.minimum(np.arange(self.rank * part, (self.rank + 1) * part), count)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """`values` of all processes, bit for bit: ``(size, ...)``. All must call it, with the same shape and dtype."""
        values = np.ascontiguousarray(values)
        if self.size == 1:
            return values[np.newaxis]
        words = np.zeros(-(-values.nbytes // 4), np.int32)  # the CPU gathers no bytes
        words.view(np.uint8)[: values.nbytes] = values.reshape(-1).view(np.uint8)
        together = ops.AllGather()(Tensor(words)).asnumpy().view(np.uint8).reshape(self.size, -1)
        raw = np.ascontiguousarray(together[:, : values.nbytes])
        return raw.view(values.dtype).reshape((self.size, *values.shape))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in one process at least. All must call it; all get the same answer."""
        return (self.size > 1 and bool(self.gather(np.array([flag])).any())) or flag

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            self.gather(np.zeros(1, np.int32))

    def require_same(self, text: str, what: str) -> None:
        """Every process must have the same text.

        Raises:
            RuntimeError: one has another.
        """
        digests = self.gather(np.frombuffer(text.encode().ljust(512, b" ")[:512], np.uint8))
        if (digests != digests[0]).any():
            raise RuntimeError(f"The {self.size} processes do not have the same {what}: they must read the same files.")


ALONE = Group()


def launched() -> bool:
    """Whether a launcher such as msrun has started this process as one of several."""
    return os.environ.get(_ROLE) in ("MS_WORKER", "MS_SCHED")


def schedules() -> bool:
    """Whether this is the launcher's process without work, which only brings the others together."""
    return os.environ.get(_ROLE) == "MS_SCHED"


def join() -> Group:
    """Meet the other processes, if a launcher has started some; the scheduler stays in here until they are done."""
    if not launched():
        return ALONE
    from mindspore.communication import GlobalComm, get_group_size, get_rank, init

    # or else the others fail when the first process works alone for half a minute, saving a large network for instance
    os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", "86400")
    if not GlobalComm.INITED:
        if _compat.device_target() == "CPU":
            ms.set_device("CPU")
            init("mccl")
        else:
            init()
    return Group(get_rank(), get_group_size())
