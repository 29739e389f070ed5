"""LoRA-FA: LoRA with A frozen. Zhang et al. 2023, arXiv:2308.03303, section 3.

::

    x ──┬── W (frozen) ─────────────────────────────┬── + ── σ ── y
        └── dropout ── A (frozen) ── B ── alpha/r ──┘

Only B trains, so backpropagation keeps the `rank` numbers behind A for each row and not the whole input of the branch,
and there is half the optimizer state. The update stays in the row space that A drew at random.
"""

from dataclasses import dataclass

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet.delta.dense import BranchDense
from mindpet.delta.lora import LoRAConfig
from mindpet.delta.lora_start import branch_start
from mindpet.delta.method import ATTENTION, Method
from mindpet.utils.version_control import get_dropout


@dataclass(frozen=True, kw_only=True)
class LoRAFAConfig(LoRAConfig):
    """LoRA-FA on every targeted dense layer: the options of LoRA, but A starts ``kaiming`` or ``gaussian``.

    Attributes:
        start: where A and B start: ``kaiming`` or ``gaussian``.
    """

    starts = ("kaiming", "gaussian")


class LoRAFADense(BranchDense):
    r"""A dense layer with a low-rank branch of which the half behind the input stays as it was drawn.

    .. math:: y = \sigma\bigl(x W^T + b + \tfrac{\alpha}{r}\, \mathrm{dropout}(x) A^T B^T\bigr)

    Shapes: x ``(..., in)``, W ``(out, in)``, A ``(rank, in)``, B ``(out, rank)``, y ``(..., out)``. A is frozen and
    saved with the delta; B starts at zero, so the layer starts as the dense layer it replaces. Cost: ``rank * out``
    parameters that train, ``rank * in`` that do not, and ``2 * rank * (in + out) + 2 * out`` floating-point operations
    a row.

    >>> layer = LoRAFADense.from_dense(nn.Dense(6, 4), LoRAFAConfig(rank=2))
    >>> layer(ops.ones((3, 5, 6))).shape, layer.mindpet_delta_frozen_lora_fa_a.requires_grad
    ((3, 5, 4), False)
    """

    delta_method = "lora_fa"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: LoRAFAConfig) -> "LoRAFADense":
        """The same dense layer, weight and bias shared, with a new branch in the dtype of its weight."""
        layer = cls.borrow(dense)
        a, b = branch_start(config, dense.weight)
        # a name that no pattern of what trains matches: of LoRA's and of this one
        layer.mindpet_delta_frozen_lora_fa_a = Parameter(a, "mindpet_delta_frozen_lora_fa_a", requires_grad=False)
        layer.mindpet_delta_lora_fa_b = Parameter(b, name="mindpet_delta_lora_fa_b")
        layer.lora_rank, layer.lora_alpha = config.rank, config.scaled_alpha
        layer.scale = config.scaled_alpha / config.rank
        layer.lora_dropout = get_dropout(float(config.dropout))
        layer.product = ops.MatMul(transpose_b=True)
        return layer

    def branch(self, rows):
        """Alpha / rank * dropout(x) A^T B^T: (rows, in) -> (rows, out)."""
        a, b = self.factors()
        inner = self.product(self.lora_dropout(rows), self.cast(a, self.compute_dtype))  # (rows, rank)
        return self.product(inner, self.cast(b, self.compute_dtype)) * self.scale

    def factors(self):
        """A and B."""
        return self.mindpet_delta_frozen_lora_fa_a, self.mindpet_delta_lora_fa_b

    def delta_weight(self) -> Tensor:
        """What the branch adds to W, in float32: ``alpha / rank * B A``."""
        a, b = self.factors()
        return ops.matmul(b.astype(mstype.float32), a.astype(mstype.float32)) * self.scale


METHOD = Method(
    name="lora_fa",
    config=LoRAFAConfig,
    trainable=("*mindpet_delta_lora_fa*",),
    paper="Zhang et al. 2023, LoRA-FA: Memory-efficient Low-rank Adaptation, arXiv:2308.03303",
    adapt={nn.Dense: LoRAFADense.from_dense},
    targets=ATTENTION,
    learning_rate=0.001,
)
