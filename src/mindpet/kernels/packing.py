"""Weights that were read from a file of 4 or 8 bits a weight, kept in as few beside their float32.

A token that is generated reads every weight once, so that its time is that of reading them. Which weights came from
such a file is seen by the weights alone: those that blocks of codes give back to the last bit. Nothing changes but the
order in which products are summed.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype

from mindpet import _compat
from mindpet.delta.dense import ComputeDense, ReweightedDense
from mindpet.kernels import build
from mindpet.kernels.cells import FastDense, FastMatMul
from mindpet.kernels.operators import BLOCK, PackedProduct

_BYTES = (16, 32)  # of a block
_WORTHWHILE = 1 << 15  # weights


def pack_weights(network: nn.Cell, table: Parameter | None = None) -> bool:
    """Pack what can be packed, and let go of what its weights are not any more; whether anything changed.

    Args:
        network: one that :func:`mindpet.kernels.accelerate` has been through.
        table: what its head, at ``head``, multiplies with, where that is a parameter.
    """
    products = list(_products(network, table))
    # blocks that somebody has MindSpore compile as one would all take the first one's
    possible = bool(products) and not build.why_not()
    possible = possible and not any(_compat.is_lazily_inlined(cell) for _, cell in network.cells_and_names())
    changed = False
    for product, weight in products:
        if product.packed is not None and not (possible and _agrees(product.packed, weight)):
            product.packed, changed = None, True
        elif product.packed is None and possible and (packed := _packed(weight)) is not None:
            product.packed, changed = packed, True
    return changed


@contextmanager
def packed_in_use(network: nn.Cell) -> Iterator[None]:
    """What is compiled within it multiplies a few rows with packed weights; nothing else ever does.

    Whoever calls it sees to it that the weights have not changed since, see :func:`pack_weights`.
    """
    products = [cell for _, cell in network.cells_and_names() if isinstance(cell, FastMatMul)]
    try:
        for product in products:
            product.uses_packed = product.packed is not None
        yield
    finally:
        for product in products:
            product.uses_packed = False


def _products(network: nn.Cell, table: Parameter | None) -> Iterator[tuple[FastMatMul, Parameter]]:
    own = [(cell.matmul, cell.weight) for _, cell in network.cells_and_names() if _multiplies_with_its_weight(cell)]
    for product, weight in [(getattr(network, "head", None), table), *own]:
        if not isinstance(product, FastMatMul) or weight is None or weight.dtype != mstype.float32:
            continue
        if weight.size >= _WORTHWHILE and weight.shape[1] % BLOCK == 0:
            yield product, weight


def _multiplies_with_its_weight(cell: nn.Cell) -> bool:
    """Whether its product is with its weight as it is: some methods change it first, and somebody else may."""
    if type(cell) in (nn.Dense, FastDense):
        return True
    ours = isinstance(cell, ComputeDense) and type(cell).__module__.startswith("mindpet.")
    return ours and not isinstance(cell, ReweightedDense) and isinstance(getattr(cell, "weight", None), Parameter)


def _packed(weight: Parameter) -> PackedProduct | None:
    out, into = weight.shape
    for size in _BYTES:
        codes = np.empty((out * into // BLOCK, size), np.uint8)
        factors = np.empty((out * into // BLOCK, 2), np.float32)
        if _call("mindpet_pack", weight, codes, factors):
            return PackedProduct(weight.name, Tensor(codes), Tensor(factors))
    return None


def _agrees(packed: PackedProduct, weight: Parameter) -> bool:
    return _call("mindpet_is_packed", weight, packed.codes.asnumpy(), packed.factors.asnumpy())


def _call(function: str, weight: Parameter, codes: np.ndarray, factors: np.ndarray) -> bool:
    values = np.ascontiguousarray(weight.asnumpy())
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, codes, factors)]
    sizes = (ctypes.c_int64(each) for each in (*weight.shape, codes.shape[1]))
    return bool(getattr(_loaded(build.library()), function)(pointers[0], *sizes, *pointers[1:]))


@functools.cache
def _loaded(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))
