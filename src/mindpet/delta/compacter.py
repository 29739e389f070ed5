"""Compacter: Efficient Low-Rank Hypercomplex Adapter Layers. Mahabadi et al. 2021, arXiv:2106.04647, section 4.

::

    x ──┬── down ── f ── up ── + ── y      down = A₁ ⊗ B₁ + ... + A_n ⊗ B_n,  B_i = s_i t_iᵀ;  up likewise
        └──────────────────────┘           every layer has its own B, and all have the same A
"""

import math
from dataclasses import dataclass
from typing import Any

from mindspore import Parameter, nn, ops
from mindspore.common.initializer import Normal, Uniform, initializer

from mindpet import _checks
from mindpet.delta.activation import build_activation
from mindpet.delta.dense import ComputeDense
from mindpet.delta.method import AFTER_BLOCKS, DeltaConfig, Method


@dataclass(frozen=True, kw_only=True)
class CompacterConfig(DeltaConfig):
    """A hypercomplex bottleneck behind every targeted dense layer.

    Attributes:
        size: width of the bottleneck, a multiple of `phm_dim`.
        phm_dim: n, how many Kronecker products are added up.
        rank: r of each B, if they are products of thin matrices.
        low_rank: whether they are; else each B is whole.
        shared: whether all layers have the same A; else each product of each layer has its own.
        non_linearity: activation inside the bottleneck, by name.
    """

    size: int = 24
    phm_dim: int = 4
    rank: int = 1
    low_rank: bool = True
    shared: bool = True
    non_linearity: str = "gelu"

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        for name in ("size", "phm_dim", "rank"):
            _checks.positive_int(owner, name, getattr(self, name))
        for name in ("low_rank", "shared"):
            _checks.boolean(owner, name, getattr(self, name))
        if self.size % self.phm_dim:
            raise ValueError(
                f"For '{owner}', 'size' must be a multiple of 'phm_dim' ({self.phm_dim}), but got {self.size}."
            )
        build_activation(owner, "non_linearity", self.non_linearity, unknown=ValueError)


class PHMDense(nn.Cell):
    r"""A dense layer whose weight is a sum of Kronecker products (Zhang et al. 2021, arXiv:2102.08597).

    .. math:: y = x \Bigl(\sum_{i=1}^n A_i \otimes B_i\Bigr) + b, \qquad B_i = S_i T_i \text{ if they are of low rank}

    Shapes: x ``(rows, in)``, A ``(n, n, n)``, B ``(n, in / n, out / n)``, S ``(n, in / n, rank)``, T
    ``(n, rank, out / n)``, b ``(out,)``, y ``(rows, out)``. Making the weight costs ``2 * n * in * out``
    floating-point operations, the product ``2 * in * out`` a row.

    Args:
        in_channels: size of the input's last axis.
        out_channels: size of the output's last axis.
        config: with `phm_dim`, `rank` and `low_rank`.
        rule: A, if others have it too; else a new one is made.
        dtype: of the parameters.
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: CompacterConfig, rule: Parameter | None, dtype: Any
    ):
        super().__init__()
        n, first, last = config.phm_dim, in_channels // config.phm_dim, out_channels // config.phm_dim
        self.mindpet_delta_compacter_rule = new_rule(n, dtype) if rule is None else rule

        def part(name: str, rows: int, columns: int) -> Parameter:
            bound = math.sqrt(6 / (rows + columns))  # Glorot's, of each matrix by itself
            return Parameter(initializer(Uniform(bound), (n, rows, columns), dtype), name=name)

        self.low_rank = config.low_rank
        if config.low_rank:
            self.mindpet_delta_compacter_left = part("mindpet_delta_compacter_left", first, config.rank)
            self.mindpet_delta_compacter_right = part("mindpet_delta_compacter_right", config.rank, last)
        else:
            self.mindpet_delta_compacter_whole = part("mindpet_delta_compacter_whole", first, last)
        self.bias = Parameter(initializer("zeros", (out_channels,), dtype), name="bias")
        self.n, self.split, self.shape = n, (n, n, first, last), (in_channels, out_channels)
        self.product = ops.MatMul()

    def weight_in(self, kind):
        """The sum of the Kronecker products, (in, out)."""
        if self.low_rank:
            left, right = self.mindpet_delta_compacter_left, self.mindpet_delta_compacter_right
            b = ops.bmm(left.astype(kind), right.astype(kind))  # (n, in / n, out / n)
        else:
            b = self.mindpet_delta_compacter_whole.astype(kind)
        rule = self.mindpet_delta_compacter_rule.astype(kind).reshape((self.n, -1))  # (n, n * n)
        blocks = self.product(rule.transpose((1, 0)), b.reshape((self.n, -1)))  # (n * n, in / n * out / n)
        return blocks.reshape(self.split).transpose((0, 2, 1, 3)).reshape(self.shape)

    def construct(self, rows):
        return self.product(rows, self.weight_in(rows.dtype)) + self.bias.astype(rows.dtype)


class CompacterDense(ComputeDense):
    r"""A dense layer followed by a bottleneck of hypercomplex layers with a residual connection.

    .. math:: h = \sigma(x W^T + b), \qquad y = h + \mathrm{up}(f(\mathrm{down}(h)))

    Shapes: x ``(..., in)``, W ``(out, in)``, h and y ``(..., out)``; down and up are :class:`PHMDense` between out and
    size. A starts normal with a deviation of 1e-4, so the layer starts near the dense layer that it replaces. Cost:
    ``2 * (rank * (out + size) if low_rank else out * size // phm_dim) + size + out + (2 - shared) * phm_dim**3``
    parameters, the last of them once for all layers where they share A, ``4 * out * size + 2 * out + size``
    floating-point operations a row and ``4 * (phm_dim + low_rank * rank / phm_dim) * out * size`` a call.

    >>> layer = CompacterDense.from_dense(nn.Dense(6, 8), CompacterConfig(size=4, phm_dim=2), None)
    >>> layer(ops.ones((3, 6))).shape
    (3, 8)
    """

    delta_method = "compacter"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: CompacterConfig, rule: Parameter | None) -> "CompacterDense":
        """The same dense layer, weight and bias shared, with a new bottleneck behind it that uses `rule` for A."""
        out, dtype = dense.out_channels, dense.weight.dtype
        _checks.divisor(
            type(config).__name__, "phm_dim", config.phm_dim, out, f"the size of the output of {dense.weight.name}"
        )
        layer = cls.borrow(dense)
        layer.mindpet_delta_compacter_down = PHMDense(out, config.size, config, rule, dtype)
        layer.mindpet_delta_compacter_non_linear = build_activation(
            cls.__name__, "non_linearity", config.non_linearity, unknown=ValueError
        )
        layer.mindpet_delta_compacter_up = PHMDense(config.size, out, config, rule, dtype)
        return layer

    def construct(self, x):
        hidden = self.activated(self.dense_rows(self.rows_of(x)))  # (rows, out)
        inner = self.mindpet_delta_compacter_non_linear(self.mindpet_delta_compacter_down(hidden))  # (rows, size)
        return self.shaped_like(hidden + self.mindpet_delta_compacter_up(inner), x)


def new_rule(n: int, dtype: Any) -> Parameter:
    """A, at its start: (n, n, n)."""
    return Parameter(initializer(Normal(1e-4), (n, n, n), dtype), name="mindpet_delta_compacter_rule")


def one_rule(cells: list[nn.Dense], config: CompacterConfig) -> Parameter | None:
    """The A of all layers, or None where each has its own."""
    return new_rule(config.phm_dim, cells[0].weight.dtype) if config.shared else None


METHOD = Method(
    name="compacter",
    config=CompacterConfig,
    trainable=("*mindpet_delta_compacter*",),
    paper="Mahabadi et al. 2021, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, arXiv:2106.04647",
    adapt={nn.Dense: CompacterDense.from_dense},
    share=one_rule,
    targets=AFTER_BLOCKS,
    learning_rate=0.003,
)
