"""DoRA: weight-decomposed low-rank adaptation. Liu et al. 2024, arXiv:2402.09353, sections 4.1 and 4.3.

::

    x ──┬── W (frozen) ────────────────────┬── + ── * m / ||W + alpha/r B A|| ── + b ── σ ── y
        └── dropout ── A ── B ── alpha/r ──┘

Each row of the weight has a trained length m and takes its direction from a frozen row and LoRA's change of it. (The
paper writes W as (in, out) and speaks of columns.)
"""

from dataclasses import dataclass

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet.delta.dense import ComputeDense
from mindpet.delta.lora import LoRAConfig
from mindpet.delta.lora_start import branch_start
from mindpet.delta.method import ATTENTION, Method
from mindpet.utils.version_control import get_dropout


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """DoRA on every targeted dense layer: the options of LoRA, of whose starts ``pissa`` and ``olora`` are not here.

    Attributes:
        start: where A and B start: ``kaiming``, ``gaussian`` or ``orthogonal``.
    """

    starts = ("kaiming", "gaussian", "orthogonal")


class DoRADense(ComputeDense):
    r"""A dense layer with a trained length for each row of its weight, and a low-rank branch that turns the rows.

    .. math:: y = \sigma\Bigl(\tfrac{m}{n} \circ \bigl(x W^T + \tfrac{\alpha}{r}\, \mathrm{dropout}(x) A^T B^T\bigr)
        + b\Bigr), \qquad n_i = \bigl\lVert W_i + \tfrac{\alpha}{r}\, B_i A \bigr\rVert_2

    Shapes: x ``(..., in)``, W ``(out, in)``, A ``(rank, in)``, B ``(out, rank)``, m and n ``(out,)``, y ``(..., out)``.
    n counts as a constant in the gradient (section 4.3). m starts at the lengths of the rows of W and B at zero, so the
    layer starts as the dense layer it replaces: load the base weights first. Cost: ``rank * (in + out) + out``
    parameters, ``2 * rank * (in + out) + 3 * out`` floating-point operations a row and
    ``2 * (rank + 2) * in * out + 3 * out`` a call.

    Differs from PEFT in training with dropout: the frozen product sees the whole input in both of its terms there and
    here, but PEFT drops inputs of the part of it by which m / n differs from 1.

    >>> layer = DoRADense.from_dense(nn.Dense(6, 4), DoRAConfig(rank=2))
    >>> layer(ops.ones((3, 5, 6))).shape, layer.mindpet_delta_dora_magnitude.shape
    ((3, 5, 4), (4,))
    """

    delta_method = "dora"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: DoRAConfig) -> "DoRADense":
        """The same dense layer, weight and bias shared, with a new delta in the dtype of its weight."""
        layer = cls.borrow(dense)
        a, b = branch_start(config, dense.weight)
        layer.mindpet_delta_dora_a = Parameter(a, name="mindpet_delta_dora_a")
        layer.mindpet_delta_dora_b = Parameter(b, name="mindpet_delta_dora_b")
        layer.lora_rank, layer.lora_alpha = config.rank, config.scaled_alpha
        layer.scale = config.scaled_alpha / config.rank
        layer.lora_dropout = get_dropout(float(config.dropout))
        layer.product = ops.MatMul(transpose_b=True)
        dense.weight.init_data()  # of a network built without values
        length = layer.lengths(layer.turned()).astype(dense.weight.dtype)
        layer.mindpet_delta_dora_magnitude = Parameter(length, name="mindpet_delta_dora_magnitude")
        return layer

    def factors(self):
        """A and B."""
        return self.mindpet_delta_dora_a, self.mindpet_delta_dora_b

    def turned(self):
        """W + alpha / r B A in float32: (out, in)."""
        a, b = self.factors()
        turn = ops.matmul(b.astype(mstype.float32), a.astype(mstype.float32)) * self.scale
        return self.weight.astype(mstype.float32) + turn

    def lengths(self, turned):
        """n, as exact as the dtype of m: (out, in) -> (out,); of a row of zeros not 0, by which m would be divided."""
        lengths = ops.maximum(ops.sqrt(ops.square(turned).sum(1)), 1e-7)
        return lengths.astype(self.weight.dtype).astype(mstype.float32)

    def ratios(self, turned):
        """The ratios m / n, with n as a constant: (out,)."""
        return self.mindpet_delta_dora_magnitude.astype(mstype.float32) / ops.stop_gradient(self.lengths(turned))

    def construct(self, x):
        rows = self.rows_of(x)  # (rows, in)
        a, b = self.factors()
        branch = self.product(self.lora_dropout(rows), self.cast(a, self.compute_dtype))  # (rows, rank)
        branch = self.product(branch, self.cast(b, self.compute_dtype))  # (rows, out)
        out = self.matmul(rows, self.cast(self.weight, self.compute_dtype)) + branch * self.scale
        out = out * self.cast(self.ratios(self.turned()), self.compute_dtype)
        return self.shaped_like(self.activated(self.biased(out)), x)

    def delta_weight(self) -> Tensor:
        """What the weight is changed by, in float32: m / n (W + alpha / r B A) - W."""
        turned = self.turned()
        return self.ratios(turned).reshape((-1, 1)) * turned - self.weight.astype(mstype.float32)


METHOD = Method(
    name="dora",
    config=DoRAConfig,
    trainable=("*mindpet_delta_dora*",),
    paper="Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353",
    adapt={nn.Dense: DoRADense.from_dense},
    targets=ATTENTION,
    learning_rate=0.001,
)
