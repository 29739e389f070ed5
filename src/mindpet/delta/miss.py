"""MiSS: matrix shard sharing. Kang, Yin 2024, arXiv:2409.15371, section 3.

::

    x ──┬── W (frozen) ──────────────────────────────────┬── + ── σ ── y
        └── dropout ── sum of every r-th input ── D ─────┘
"""

from dataclasses import dataclass

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet import _checks
from mindpet.delta.dense import BranchDense
from mindpet.delta.method import ATTENTION, DeltaConfig, Method, PeftNames
from mindpet.utils.version_control import get_dropout


@dataclass(frozen=True, kw_only=True)
class MiSSConfig(DeltaConfig):
    """MiSS on every targeted dense layer.

    Attributes:
        rank: r, rows of D; at most the size of the input.
        dropout: probability, on the branch's input, in training only.
    """

    rank: int = 64
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.positive_int(owner, "rank", self.rank)
        _checks.rate(owner, "dropout", self.dropout, allow_int=True)


class MiSSDense(BranchDense):
    r"""A dense layer whose delta is one block of r columns, repeated.

    .. math:: y = \sigma(x W^T + b + s D), \qquad s_j = \sum_k \mathrm{dropout}(x)_{j + kr}

    Shapes: x ``(..., in)``, W ``(out, in)``, s ``(..., rank)``, D ``(rank, out)``, y ``(..., out)``. The delta of W is
    D^T beside itself in/r times, the last time in part if r does not divide in. D starts at zero, so the layer starts
    as the dense layer it replaces. Cost: ``rank * out`` parameters and
    ``rank * ceil(in / rank) + (2 * rank + 1) * out`` floating-point operations a row.

    >>> from mindspore import ops
    >>> layer = MiSSDense.from_dense(nn.Dense(6, 4), MiSSConfig(rank=2))
    >>> layer(ops.ones((3, 5, 6))).shape
    (3, 5, 4)
    """

    delta_method = "miss"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: MiSSConfig) -> "MiSSDense":
        """The same dense layer, weight and bias shared, with a new block in the dtype of its weight."""
        layer = cls.borrow(dense)
        if config.rank > dense.in_channels:
            raise ValueError(
                f"For 'MiSSConfig', 'rank' must be at most {dense.in_channels}, the size of the input, but got "
                f"{config.rank}."
            )
        layer.rank = config.rank
        layer.shards = -(-dense.in_channels // config.rank)
        layer.missing = layer.shards * config.rank - dense.in_channels
        layer.dropout = get_dropout(float(config.dropout))
        layer.add_delta("mindpet_delta_miss_block", "zeros", config.rank, dense.out_channels)
        return layer

    def branch(self, rows):
        """The product s D: (rows, in) -> (rows, out)."""
        rows = self.dropout(rows)
        if self.missing:
            rows = ops.cat((rows, ops.zeros((rows.shape[0], self.missing), rows.dtype)), 1)
        sums = rows.reshape((-1, self.shards, self.rank)).sum(1)  # (rows, rank)
        return sums @ self.mindpet_delta_miss_block.astype(rows.dtype)

    def delta_weight(self) -> Tensor:
        """D^T beside itself, cut to the size of W, in float32."""
        block = self.mindpet_delta_miss_block.astype(mstype.float32).T  # (out, rank)
        return ops.tile(block, (1, self.shards))[:, : self.in_channels]


METHOD = Method(
    name="miss",
    config=MiSSConfig,
    trainable=("*mindpet_delta_miss*",),
    paper="Kang, Yin 2024, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure, "
    "arXiv:2409.15371",
    adapt={nn.Dense: MiSSDense.from_dense},
    targets=ATTENTION,
    learning_rate=0.001,
    peft=PeftNames(
        "MISS",
        tensors={"miss_block": "mindpet_delta_miss_block"},
        options={"r": "rank", "miss_dropout": "dropout"},
        fixed={"init_weights": True},  # "bat" and "mini" are other deltas
        alike={"init_weights": (False,)},  # another start
        free=("mini_r",),
    ),
)
