"""The two halves of a layer of LLaMA's for a few rows, such as the next token: five kernels for seventeen operators.

For one row MindSpore takes as long to run the operators around the products as those take. What stands here computes
the same, with weights as they are or packed, and is there only while the step of a cache is compiled for few rows: see
mindpet.models.cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mindspore import Parameter, nn
from mindspore import dtype as mstype

from mindpet import _compat
from mindpet.kernels import few, operators
from mindpet.kernels.cells import (
    Fast,
    FastAttention,
    FastDense,
    FastGatedSiLU,
    FastMatMul,
    FastRMSNorm,
    FastRotary,
    is_mask_of,
)


class _AsItIs(nn.Cell):
    """A weight in the place of codes and factors; a Cell, since a graph takes attributes of those alone."""

    def __init__(self, weight: Parameter):
        super().__init__(auto_prefix=False)
        self.__dict__.update(codes=weight, factors=weight)  # not by setattr: it is another Cell's


def _weights(dense: nn.Dense) -> nn.Cell:
    """What has the `codes` and `factors` of its weight."""
    packed = dense.matmul.packed
    return packed if packed is not None else _AsItIs(dense.weight)


class _Short(Fast, nn.Cell):
    """What both have: a norm before, and a product whose result is added to what came in."""

    def __init__(self, norm: FastRMSNorm, last: nn.Dense):
        super().__init__(auto_prefix=False)
        self.norm, self.last = norm, _weights(last)
        self.onto = few.ProductOnto()

    def takes_few(self, rows):
        """Whether these are few enough."""
        return self.takes(rows) and len(rows.shape) == 2 and rows.shape[0] <= operators.FEW


class ShortMLP(_Short):
    r"""Rows ``(rows, hidden)`` to :math:`x + D\,(\mathrm{silu}(G n) \odot U n)` with n their norm."""

    def __init__(self, norm: FastRMSNorm, mlp: Any):
        super().__init__(norm, mlp.down_proj)
        self.gate, self.up = _weights(mlp.gate_proj), _weights(mlp.up_proj)
        self.gated = few.NormAndGate()

    def construct(self, rows):
        both = self.gate.codes, self.gate.factors, self.up.codes, self.up.factors
        wide = self.gated(rows, self.norm.weight, self.norm.fast.epsilon, *both)
        return self.onto(wide, self.last.codes, self.last.factors, rows)


class ShortAttention(_Short):
    """Rows ``(batch * n, hidden)`` plus the attention of their norm to what a cache holds and they add to it."""

    def __init__(self, norm: FastRMSNorm, attention: Any):
        super().__init__(norm, attention.o_proj)
        self.query, self.key, self.value = map(_weights, _inputs(attention))
        self.three = few.NormAndThreeProducts()
        whole = attention.core.whole
        self.heads = attention.core.original.heads
        self.attention = few.CachedAttention(whole.counts, whole.factors)

    def takes_few_of(self, rows, mask, cos, extra):
        """Whether these are few enough, and there is a cache, all in float32."""
        if extra is None or len(extra) < 3:
            return False
        batch, tokens = cos.shape[0], cos.shape[1]
        fits = is_mask_of(mask.shape, (batch, self.heads, tokens, extra[0].shape[0] // batch))
        return fits and self.takes(mask) and self.takes_few(rows) and extra[0].dtype == mstype.float32

    def construct(self, rows, mask, cos, sin, extra):
        query, key, value = self.query, self.key, self.value
        three = query.codes, query.factors, key.codes, key.factors, value.codes, value.factors
        parts = self.three(rows, self.norm.weight, self.norm.fast.epsilon, *three)
        mixed = self.attention(*parts, cos, sin, *extra, mask)
        return self.onto(mixed, self.last.codes, self.last.factors, rows)


@contextmanager
def short_layers_in_use(network: nn.Cell) -> Iterator[None]:
    """What is compiled within it takes few rows through what is short of its layers; nothing else ever does.

    Those are the Cells with `shortened`, which says what their `short_attention` and `short_mlp` can be. Outside both
    are None.
    """
    layers: list[Any] = [cell for _, cell in network.cells_and_names() if hasattr(cell, "shortened")]
    try:
        for layer in layers:  # not by setattr: they hold what the layer has already
            vars(layer).update(zip(("short_attention", "short_mlp"), layer.shortened()))
        yield
    finally:
        for layer in layers:
            vars(layer).update(short_attention=None, short_mlp=None)


def short_mlp(norm: nn.Cell, mlp: Any) -> ShortMLP | None:
    """The second half of a layer, where all of it is plain."""
    plain = _is_plain(norm, FastRMSNorm) and _is_plain(mlp.act, FastGatedSiLU) and not _is_changed(mlp)
    dense = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return ShortMLP(norm, mlp) if plain and all(map(_multiplies, dense)) else None


def short_attention(norm: nn.Cell, attention: Any) -> ShortAttention | None:
    """The first half of a layer, where all of it is plain; the caller sees to the slot for a prompt."""
    plain = _is_plain(norm, FastRMSNorm) and _is_plain(attention.core, FastAttention) and not _is_changed(attention)
    plain = plain and _is_plain(attention.turn, FastRotary)
    dense = *_inputs(attention), attention.o_proj
    return ShortAttention(norm, attention) if plain and all(map(_multiplies, dense)) else None


def _inputs(attention: Any) -> tuple[nn.Dense, nn.Dense, nn.Dense]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _is_plain(cell: Any, kind: type[nn.Cell]) -> bool:
    weight = getattr(cell, "weight", None)
    return type(cell) is kind and not _is_changed(cell) and (weight is None or weight.dtype == mstype.float32)


def _is_changed(cell: nn.Cell) -> bool:
    """Whether somebody watches it, has it compute in another dtype, or gave it a method of its own."""
    own = any(callable(value) and hasattr(type(cell), name) for name, value in vars(cell).items())
    return own or _compat.has_hooks(cell) or _compat.forced_dtype(cell) is not None


def _multiplies(dense: Any) -> bool:
    """Whether it is nothing but the product with its weight."""
    if type(dense) not in (nn.Dense, FastDense) or dense.has_bias or dense.activation_flag or _is_changed(dense):
        return False
    fits = dense.weight.dtype == mstype.float32 and dense.weight.shape[1] % operators.BLOCK == 0
    return fits and isinstance(dense.matmul, FastMatMul)
