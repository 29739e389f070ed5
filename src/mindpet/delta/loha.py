"""LoHa: low-rank Hadamard product. Hyeon-Woo et al. 2022, FedPara, arXiv:2108.06098, section 2.2.

As a delta of a frozen weight: Yeh et al. 2023, LyCORIS, arXiv:2309.14859, section 3.2.

::

    x ── W + alpha/r (B1 A1) ∘ (B2 A2) ── + b ── σ ── y

The entrywise product of two matrices of rank r has a rank of up to r².
"""

from dataclasses import dataclass

from mindspore import nn
from mindspore.common.initializer import Normal

from mindpet.delta.dense import ReweightedDense
from mindpet.delta.method import ATTENTION, Method, PeftNames, RankedConfig


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(RankedConfig):
    """LoHa on every targeted dense layer; r of each of the two products, which are scaled by alpha / rank together."""

    alpha: float = 8.0


class LoHaDense(ReweightedDense):
    r"""A dense layer whose delta is the entrywise product of two low-rank matrices.

    .. math:: y = \sigma\bigl(x (W + \tfrac{\alpha}{r}\, (B_1 A_1) \circ (B_2 A_2))^T + b\bigr)

    Shapes: x ``(..., in)``, W ``(out, in)``, A1 and A2 ``(rank, in)``, B1 and B2 ``(out, rank)``, y ``(..., out)``.
    B2 starts at zero, so the layer starts as the dense layer it replaces. Cost: ``2 * rank * (in + out)`` parameters
    and ``(4 * rank + 3) * in * out`` floating-point operations a call, however many rows there are.

    >>> from mindspore import ops
    >>> layer = LoHaDense.from_dense(nn.Dense(6, 4), LoHaConfig(rank=2))
    >>> layer(ops.ones((3, 5, 6))).shape
    (3, 5, 4)
    """

    delta_method = "loha"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: LoHaConfig) -> "LoHaDense":
        """The same dense layer, weight and bias shared, with a new delta in the dtype of its weight."""
        layer = cls.borrow(dense)
        out, into, rank = dense.out_channels, dense.in_channels, config.rank
        layer.add_delta("mindpet_delta_loha_b1", Normal(0.1), out, rank)
        layer.add_delta("mindpet_delta_loha_a1", Normal(1.0), rank, into)
        layer.add_delta("mindpet_delta_loha_b2", "zeros", out, rank)
        layer.add_delta("mindpet_delta_loha_a2", Normal(1.0), rank, into)
        layer.scale = config.alpha / config.rank
        return layer

    def changed_weight(self, weight):
        """W + alpha / r (B1 A1) ∘ (B2 A2): (out, in) -> (out, in)."""
        kind = weight.dtype
        first = self.mindpet_delta_loha_b1.astype(kind) @ self.mindpet_delta_loha_a1.astype(kind)  # (out, in)
        second = self.mindpet_delta_loha_b2.astype(kind) @ self.mindpet_delta_loha_a2.astype(kind)  # (out, in)
        return weight + first * second * self.scale  # (out, in)


METHOD = Method(
    name="loha",
    config=LoHaConfig,
    trainable=("*mindpet_delta_loha*",),
    paper="Hyeon-Woo et al. 2022, FedPara: Low-rank Hadamard Product for Federated Learning, arXiv:2108.06098",
    adapt={nn.Dense: LoHaDense.from_dense},
    targets=ATTENTION,
    learning_rate=0.001,
    peft=PeftNames(
        "LOHA",
        tensors={
            "hada_w1_a": "mindpet_delta_loha_b1",
            "hada_w1_b": "mindpet_delta_loha_a1",
            "hada_w2_a": "mindpet_delta_loha_b2",
            "hada_w2_b": "mindpet_delta_loha_a2",
        },
        options={"r": "rank", "alpha": "alpha"},
        fixed={"use_effective_conv2d": False},
        free=("rank_dropout", "module_dropout", "init_weights"),
    ),
)
