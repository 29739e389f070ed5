"""LoKr: low-rank Kronecker product. Yeh et al. 2023, LyCORIS, arXiv:2309.14859, section 3.

::

    x ──┬── W (frozen) ───────────────── + b ──┬── + ── σ ── y
        └── alpha/r (W1 ⊗ B2 A2) ──────────────┘

The Kronecker product repeats the second factor in blocks, each scaled by an entry of the first.
"""

import math
from dataclasses import dataclass

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import HeUniform, Initializer

from mindpet import _checks
from mindpet._kronecker import factors
from mindpet.delta.dense import BranchDense
from mindpet.delta.method import ATTENTION, Method, PeftNames, RankedConfig


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(RankedConfig):
    """LoKr on every targeted dense layer; the delta is scaled by alpha / rank.

    Attributes:
        rank: r of the second factor; one of which half a side is not more than r is there as it is.
        decompose_both: the first factor is a product of rank r too, where that is smaller.
        decompose_factor: sides of the first factor; -1 takes the divisors nearest to the square roots.
    """

    alpha: float = 8.0
    decompose_both: bool = False
    decompose_factor: int = -1

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.boolean(owner, "decompose_both", self.decompose_both)
        if self.decompose_factor != -1:
            _checks.positive_int(owner, "decompose_factor", self.decompose_factor)

    def axes(self) -> dict[str, int]:
        """None: a rank that is larger than the factors makes them whole, however large it is."""
        return {}


class LoKrDense(BranchDense):
    r"""A dense layer whose delta is the Kronecker product of two small matrices.

    .. math:: y = \sigma\bigl(x (W + \tfrac{\alpha}{r}\, W_1 \otimes W_2)^T + b\bigr), \quad W_2 = B_2 A_2

    Shapes: x ``(..., in)``, W ``(out, in)``, W1 ``(l, m)``, W2 ``(k, n)`` with ``out = l k`` and ``in = m n``, B2
    ``(k, rank)``, A2 ``(rank, n)``, y ``(..., out)``. W1 or its B1 starts at zero, so the layer starts as the dense
    layer it replaces. A factor that is smaller than the rank would make it is kept whole, as W2 then, and W1 is kept
    whole without `decompose_both`. Cost: ``factors(out, in, rank, decompose_both, decompose_factor).size`` parameters,
    usually l m + rank (k + n), and, since W1 ⊗ W2 is not formed, ``2 * m * (rank * (k + n) if low_right else k * n)
    + 2 * k * (rank * (l + m) if low_left else l * m) + 2 * out`` floating-point operations a row, with low_left and
    low_right for whether W1 and W2 are products of two.

    >>> layer = LoKrDense.from_dense(nn.Dense(6, 4), LoKrConfig(rank=1))
    >>> layer(ops.ones((3, 5, 6))).shape, layer.mindpet_delta_lokr_w1.shape, layer.mindpet_delta_lokr_w2_b.shape
    ((3, 5, 4), (2, 2), (1, 3))
    """

    delta_method = "lokr"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: LoKrConfig) -> "LoKrDense":
        """The same dense layer, weight and bias shared, with a new delta in the dtype of its weight."""
        layer = cls.borrow(dense)
        sizes = (dense.out_channels, dense.in_channels)
        found = factors(*sizes, config.rank, config.decompose_both, config.decompose_factor)
        random = HeUniform(negative_slope=math.sqrt(5))
        layer._add_factor("w1", found.left, found.left_rank, "zeros")
        layer._add_factor("w2", found.right, found.right_rank, random)
        layer.left, layer.right = found.left, found.right
        layer.low_left, layer.low_right = found.left_rank is not None, found.right_rank is not None
        layer.scale = config.alpha / config.rank
        layer.product = ops.MatMul(transpose_b=True)
        return layer

    def _add_factor(self, name: str, shape: tuple[int, int], rank: int | None, start: str | Initializer) -> None:
        name = f"mindpet_delta_lokr_{name}"
        if rank is None:
            self.add_delta(name, start, *shape)
        else:
            self.add_delta(f"{name}_a", start, shape[0], rank)
            self.add_delta(f"{name}_b", HeUniform(negative_slope=math.sqrt(5)), rank, shape[1])

    def branch(self, rows):
        """Alpha / r (W1 ⊗ W2) x: with x as (m, n), W2 goes over its last axis, then W1 over the first.

        Shapes: (rows, in) -> (rows, out).
        """
        kind, (left_out, left_in), (right_out, right_in) = self.compute_dtype, self.left, self.right
        x = rows.reshape((-1, right_in))  # (rows m, n)
        if self.low_right:
            x = self.product(x, self.cast(self.mindpet_delta_lokr_w2_b, kind))  # (rows m, rank)
            x = self.product(x, self.cast(self.mindpet_delta_lokr_w2_a, kind))  # (rows m, k)
        else:
            x = self.product(x, self.cast(self.mindpet_delta_lokr_w2, kind))  # (rows m, k)
        x = x.reshape((-1, left_in, right_out)).transpose((0, 2, 1)).reshape((-1, left_in))  # (rows k, m)
        if self.low_left:
            x = self.product(x, self.cast(self.mindpet_delta_lokr_w1_b, kind))  # (rows k, rank)
            x = self.product(x, self.cast(self.mindpet_delta_lokr_w1_a, kind))  # (rows k, l)
        else:
            x = self.product(x, self.cast(self.mindpet_delta_lokr_w1, kind))  # (rows k, l)
        x = x.reshape((-1, right_out, left_out)).transpose((0, 2, 1))  # (rows, l, k)
        return x.reshape((-1, left_out * right_out)) * self.scale

    def delta_weight(self) -> Tensor:
        """Alpha / r W1 ⊗ W2 in float32, in the shape of W."""
        if self.low_left:
            left = _product(self.mindpet_delta_lokr_w1_a, self.mindpet_delta_lokr_w1_b)
        else:
            left = self.mindpet_delta_lokr_w1.astype(mstype.float32)
        if self.low_right:
            right = _product(self.mindpet_delta_lokr_w2_a, self.mindpet_delta_lokr_w2_b)
        else:
            right = self.mindpet_delta_lokr_w2.astype(mstype.float32)
        blocks = left.reshape((left.shape[0], 1, left.shape[1], 1)) * right.reshape((1, right.shape[0], 1, -1))
        return blocks.reshape(self.weight.shape) * self.scale  # (l, k, m, n) -> (out, in)


def _product(a: Parameter, b: Parameter) -> Tensor:
    return ops.matmul(a.astype(mstype.float32), b.astype(mstype.float32))


METHOD = Method(
    name="lokr",
    config=LoKrConfig,
    trainable=("*mindpet_delta_lokr*",),
    paper="Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, "
    "arXiv:2309.14859",
    adapt={nn.Dense: LoKrDense.from_dense},
    targets=ATTENTION,
    learning_rate=0.001,
    peft=PeftNames(
        "LOKR",
        tensors={f"lokr_{part}": f"mindpet_delta_lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
        options={
            "r": "rank",
            "alpha": "alpha",
            "decompose_both": "decompose_both",
            "decompose_factor": "decompose_factor",
        },
        fixed={"use_effective_conv2d": False},
        free=("rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights"),
    ),
)
