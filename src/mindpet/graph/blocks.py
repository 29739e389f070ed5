"""Blocks of a network that differ in nothing but their parameters, compiled as one.

MindSpore differentiates and optimises the graph of each layer by itself: the more layers, the longer and the more
memory. Blocks with the same key (MindSpore's ``lazy_inline`` with the policy ``"front"``) become one graph first, which
takes their parameters as inputs and is put in for each of them when it is done. MindSpore believes the key: constants
of the first block would stand for those of all. So blocks get it here, while they are compiled and not longer, after
everything in them but their parameters was compared.
"""

import itertools
import types
from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from mindspore import Parameter, nn

from mindpet import _checks, _compat
from mindpet.graph.facts import Facts, NotKnown

_NUMBERS = itertools.count()  # no two groups of a process have one key
_met: "WeakKeyDictionary[nn.Cell, set[Hashable]]" = WeakKeyDictionary()  # the calls that each was compiled for


@contextmanager
def equal_blocks_as_one(cell: nn.Cell) -> Iterator[None]:
    """Within the block of code, what is compiled of `cell` takes its equal blocks for one.

    Blocks of MindSpore's cells and of this package's are looked at; those with hooks, and those that are computed again
    in the backward pass, are compiled each by itself. What was compiled stays valid afterwards.

    Results stay what they are, to the last bit.

    Args:
        cell: the outermost Cell that is compiled, such as a training step; of a function under ``ms.jit``, the Cell
            that it calls.

    Raises:
        TypeError: `cell` is not a Cell.
    """
    if not isinstance(cell, nn.Cell):
        raise TypeError(
            f"For 'equal_blocks_as_one', 'cell' must be a Cell, such as a training step, but got {_checks.shown(cell)}."
        )
    marked = []
    hiding = [inner for _, inner in cell.cells_and_names() if hasattr(inner, "hidden_parameters")]
    with _compat.shown_parameters(hiding):  # or those of the first block would be taken for all
        try:
            for blocks in equal_blocks(cell):
                key = f"mindpet_block_{next(_NUMBERS)}"
                for block in blocks:
                    marked.append(block)
                    _compat.set_reuse_key(block, key)
            yield
        finally:
            for block in marked:
                _compat.set_reuse_key(block, None)


@contextmanager
def first_call(cell: nn.Cell, call: Hashable) -> Iterator[bool]:
    """Around a call in graph mode: whether it is the first one of its kind, which compiles with equal blocks as one.

    Args:
        cell: what is called.
        call: what a graph is compiled for, such as the shapes of the inputs; whether the cell trains is known.
    """
    if not _compat.in_graph_mode():
        yield False
        return
    if not cell.compile_cache:  # nothing was compiled yet, or what was has been forgotten
        _met.pop(cell, None)
    met = _met.setdefault(cell, set())
    if (cell.training, call) in met:
        yield False
        return
    with equal_blocks_as_one(cell):
        yield True
    met.add((cell.training, call))


def equal_blocks(cell: nn.Cell) -> list[list[nn.Cell]]:
    """Groups of two blocks or more that compile to one graph: Cells in one list, with others in them.

    >>> block = lambda size: nn.SequentialCell(nn.Dense(2, size), nn.Dense(size, 2))
    >>> [len(group) for group in equal_blocks(nn.CellList([block(3), block(4), block(3)]))]
    [2]
    """
    groups = []
    inside: set[int] = set()  # blocks that have a group, and what is in them
    for _, inner in cell.cells_and_names():
        if id(inner) in inside or not isinstance(inner, (nn.CellList, nn.SequentialCell)):
            continue
        equal: dict[Any, dict[int, nn.Cell]] = defaultdict(dict)
        for block in _compat.children(inner).values():
            if _compat.children(block) and not _compat.has_reuse_key(block):
                equal[_told(block)][id(block)] = block
        for facts, blocks in equal.items():
            if facts is not None and len(blocks) > 1:
                groups.append(list(blocks.values()))
                inside.update(id(each) for block in blocks.values() for _, each in block.cells_and_names())
    return groups


def _told(block: nn.Cell) -> tuple[str, ...] | None:
    """All that its graph depends on, or None for a block that is to be compiled by itself."""
    inner = [each for _, each in block.cells_and_names()]
    if any(_compat.has_hooks(each) or _compat.is_recomputed(each) for each in inner):
        return None
    try:
        return tuple(_Local().of_cell(block))
    except NotKnown:
        return None


class _Local(Facts):
    """Within one process: parameters by the order in which the block has them, anything else by what it is."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}

    def of_parameter(self, parameter: Parameter) -> str:
        number = self.numbers.setdefault(id(parameter), len(self.numbers))
        return f"{number} {parameter.shape} {parameter.dtype} {parameter.requires_grad}"

    def of_object(self, value: Any, depth: int) -> str:
        if isinstance(value, types.MethodType):
            return f"method {id(value.__self__)} {id(value.__func__)}"
        return self.of_other(value, "")

    def of_other(self, value: Any, why: str) -> str:
        return f"{type(value).__qualname__} {id(value)}"
