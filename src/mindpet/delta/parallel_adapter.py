"""Scaled parallel adapter. He et al. 2021, Towards a Unified View of Parameter-Efficient Transfer Learning.

arXiv:2110.04366, sections 3.3 and 4.5.

::

    x ──┬── W (frozen) ────────────────────┬── + ── σ ── y
        └── down ── f ── up ── scale ──────┘

Differs from the paper in: what stands beside is a dense layer, by default the last one of every feed-forward network,
and not the feed-forward network as a whole. The branch's input is that layer's.
"""

import math
from dataclasses import dataclass

from mindspore import nn, ops
from mindspore.common.initializer import HeUniform

from mindpet import _checks
from mindpet.delta.activation import build_activation
from mindpet.delta.dense import BranchDense
from mindpet.delta.method import FEEDFORWARD, DeltaConfig, Method


@dataclass(frozen=True, kw_only=True)
class ParallelAdapterConfig(DeltaConfig):
    """A bottleneck beside every targeted dense layer.

    Attributes:
        size: m, width of the bottleneck.
        scale: s, what the bottleneck's output is multiplied by.
        non_linearity: activation inside the bottleneck, by name.
    """

    size: int = 64
    scale: float = 4.0
    non_linearity: str = "relu"

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.positive_int(owner, "size", self.size)
        _checks.non_zero_number(owner, "scale", self.scale)
        build_activation(owner, "non_linearity", self.non_linearity, unknown=ValueError)


class ParallelAdapterDense(BranchDense):
    r"""A dense layer with a trainable bottleneck beside it, on the same input.

    .. math:: y = \sigma\bigl(x W^T + b + s\,(f(x D^T + c)\, U^T + e)\bigr)

    Shapes: x ``(..., in)``, W ``(out, in)``, D ``(size, in)``, c ``(size,)``, U ``(out, size)``, e ``(out,)``, y
    ``(..., out)``. U, c and e start at zero, so the layer starts as the dense layer it replaces; D starts uniform
    within ``1 / sqrt(in)``. Cost: ``size * (in + out) + size + out`` parameters and
    ``2 * size * (in + out) + size + 3 * out`` floating-point operations a row.

    >>> layer = ParallelAdapterDense.from_dense(nn.Dense(6, 4), ParallelAdapterConfig(size=2))
    >>> layer(ops.ones((3, 5, 6))).shape
    (3, 5, 4)
    """

    delta_method = "parallel_adapter"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: ParallelAdapterConfig) -> "ParallelAdapterDense":
        """The same dense layer, weight and bias shared, with a new bottleneck in the dtype of its weight."""
        layer = cls.borrow(dense)
        out, into, size = dense.out_channels, dense.in_channels, config.size
        start = HeUniform(negative_slope=math.sqrt(5))
        layer.add_delta("mindpet_delta_parallel_adapter_down", start, size, into)
        layer.add_delta("mindpet_delta_parallel_adapter_down_bias", "zeros", size)
        layer.add_delta("mindpet_delta_parallel_adapter_up", "zeros", out, size)
        layer.add_delta("mindpet_delta_parallel_adapter_up_bias", "zeros", out)
        layer.mindpet_delta_parallel_adapter_non_linear = build_activation(
            cls.__name__, "non_linearity", config.non_linearity, unknown=ValueError
        )
        layer.product = ops.MatMul(transpose_b=True)
        layer.scale = config.scale
        return layer

    def branch(self, rows):
        """The bottleneck, s (f(x D^T + c) U^T + e): (rows, in) -> (rows, out)."""
        kind = rows.dtype
        inner = self.product(rows, self.mindpet_delta_parallel_adapter_down.astype(kind))  # (rows, size)
        inner = self.mindpet_delta_parallel_adapter_non_linear(
            inner + self.mindpet_delta_parallel_adapter_down_bias.astype(kind)
        )
        out = self.product(inner, self.mindpet_delta_parallel_adapter_up.astype(kind))  # (rows, out)
        return (out + self.mindpet_delta_parallel_adapter_up_bias.astype(kind)) * self.scale


METHOD = Method(
    name="parallel_adapter",
    config=ParallelAdapterConfig,
    trainable=("*mindpet_delta_parallel_adapter*",),
    paper="He et al. 2021, Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv:2110.04366",
    adapt={nn.Dense: ParallelAdapterDense.from_dense},
    targets=FEEDFORWARD,
    learning_rate=0.001,
)
