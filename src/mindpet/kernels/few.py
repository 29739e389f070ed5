"""Kernels for a few rows, such as the next token of a text, as Cells: what a half of a layer of LLaMA's is made of.

No gradient goes through them. A weight W ``(out, in)`` is given as codes and factors, see
:class:`~mindpet.kernels.operators.PackedProduct`, or twice as it is.
"""

from typing import Any

from mindspore import Tensor, nn

from mindpet.kernels.operators import BLOCK, Kernel


def _product(at: int, *shapes: Any) -> Any:
    """The shape of x W^T, where W is at this place of the inputs."""
    (rows, into), weight, factors = shapes[0], shapes[at], shapes[at + 1]
    return [rows, weight[0] if weight == factors else weight[0] * BLOCK // into]


def _three_products(*shapes: Any) -> Any:
    return _product(3, *shapes), _product(5, *shapes), _product(7, *shapes)


def _gated(*shapes: Any) -> Any:
    return _product(3, *shapes)


def _fourth(*shapes: Any) -> Any:
    return shapes[3]


class ProductOnto(nn.Cell):
    """rows + x W^T: `construct` takes (x, W, rows), with x ``(rows, in)`` and rows ``(rows, out)``."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = Kernel("few_onto", _fourth)

    def construct(self, x, codes, factors, rows):
        return self.forward(x, codes, factors, rows)


class NormAndThreeProducts(nn.Cell):
    """n W^T of three W, with n the RMSNorm of x: `construct` takes (x, weight, epsilon, W, W, W)."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = Kernel("few_three", _three_products, 3)

    def construct(self, *inputs):
        return self.forward(*inputs)


class NormAndGate(nn.Cell):
    r""":math:`\mathrm{silu}(n G^T) \odot n U^T`, n the RMSNorm of x: `construct` takes (x, weight, epsilon, G, U)."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = Kernel("few_gated", _gated)

    def construct(self, *inputs):
        return self.forward(*inputs)


class CachedAttention(nn.Cell):
    """Rotary positions and attention of a few tokens, ``(batch * n, heads * dim)``, to the slots of a cache.

    Their keys and values ``(batch * n, groups * dim)`` are written into `keys` and `values`, Parameters ``(batch *
    capacity, groups * dim)``, at `slots` int32 ``(batch * n, 1)``. A token sees the slots of its sample up to its own,
    as the mask says, which is added to the scores: ``(batch, heads, n, capacity)`` with 1 for any axis but the last.
    Nothing else of the graph may read the two Parameters.

    Args:
        counts: of heads and groups, int32 ``(2,)``.
        factors: of which the first is that of the scores, ``(2,)``.
    """

    def __init__(self, counts: Tensor, factors: Tensor):
        super().__init__(auto_prefix=False)
        self.counts, self.factors = counts, factors
        self.forward = Kernel("cached_attention")

    def construct(self, query, key, value, cos, sin, keys, values, slots, mask):
        return self.forward(query, key, value, cos, sin, keys, values, slots, mask, self.counts, self.factors)
