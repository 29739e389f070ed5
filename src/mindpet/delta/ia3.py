"""(IA)^3: factors on keys, values and hidden activations. Liu et al. 2022, arXiv:2205.05638, section 3.3.

::

    keys and values:         x ── W + b ── * l ── y
    feed-forward's output:   x ── * l ── W + b ── y
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from mindspore import Tensor, nn
from mindspore import dtype as mstype

from mindpet.delta.dense import ComputeDense
from mindpet.delta.method import FEEDFORWARD, DeltaConfig, Method, PeftNames, patterns_of


@dataclass(frozen=True, kw_only=True)
class IA3Config(DeltaConfig):
    """(IA)^3 on every targeted dense layer.

    Attributes:
        feedforward: patterns on the paths of those of the targets whose input is multiplied, and not the output; None
            takes the feed-forward outputs of the networks in `mindpet.models`.
    """

    feedforward: Sequence[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.feedforward is not None:
            given = patterns_of(type(self).__name__, "feedforward", self.feedforward)
            object.__setattr__(self, "feedforward", given)

    def at(self, path: str) -> "IA3Config":
        """With ``feedforward`` empty where the output of the cell at `path` is multiplied."""
        chosen = FEEDFORWARD if self.feedforward is None else self.feedforward
        return replace(self, feedforward=("*",) if any(fnmatchcase(path, pattern) for pattern in chosen) else ())

    def patterns(self) -> dict[str, str]:
        """The patterns of feed-forward layers, where they are given."""
        return dict.fromkeys(self.feedforward or (), "feedforward")


class IA3Dense(ComputeDense):
    r"""A dense layer with a trained factor for each output, or for each input.

    .. math:: y = \sigma\bigl(l \circ (x W^T + b)\bigr) \quad\text{or}\quad y = \sigma\bigl((l \circ x) W^T + b\bigr)

    Shapes: x ``(..., in)``, W ``(out, in)``, l ``(out, 1)``, or ``(1, in)`` for a feed-forward layer, y
    ``(..., out)``. l starts at one, so the layer starts as the dense layer it replaces. Cost:
    ``in if feedforward else out`` parameters and ``in if feedforward else out`` floating-point operations a row.

    >>> from mindspore import ops
    >>> layer = IA3Dense.from_dense(nn.Dense(6, 4), IA3Config())
    >>> layer(ops.ones((3, 5, 6))).shape
    (3, 5, 4)
    """

    delta_method = "ia3"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: IA3Config) -> "IA3Dense":
        """The same dense layer, weight and bias shared, with new factors in the dtype of its weight."""
        layer = cls.borrow(dense)
        layer.on_input = bool(config.feedforward)
        shape = (1, dense.in_channels) if layer.on_input else (dense.out_channels, 1)
        layer.add_delta("mindpet_delta_ia3_l", "ones", *shape)
        return layer

    def construct(self, x):
        factors = self.cast(self.reshape(self.mindpet_delta_ia3_l, (-1,)), self.compute_dtype)
        rows = self.rows_of(x)  # (rows, in)
        if self.on_input:
            rows = self.dense_rows(rows * factors)  # (rows, out)
        else:
            rows = self.dense_rows(rows) * factors  # (rows, out)
        return self.shaped_like(self.activated(rows), x)

    def delta_weight(self) -> Tensor:
        """What is added to W: W with its rows, or its columns, times l - 1, in float32."""
        return self.weight.astype(mstype.float32) * (self.mindpet_delta_ia3_l.astype(mstype.float32) - 1)

    def delta_bias(self) -> Tensor | None:
        """What is added to b: b times l - 1, in float32; nothing where the inputs are multiplied."""
        if self.on_input or not self.has_bias:
            return None
        return self.bias.astype(mstype.float32) * (self.mindpet_delta_ia3_l.astype(mstype.float32).reshape((-1,)) - 1)


METHOD = Method(
    name="ia3",
    config=IA3Config,
    trainable=("*mindpet_delta_ia3*",),
    paper="Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper, arXiv:2205.05638",
    adapt={nn.Dense: IA3Dense.from_dense},
    targets=("*.key", "*.value", "*.k_proj", "*.v_proj", "*.c_attn", *FEEDFORWARD),
    learning_rate=0.003,
    peft=PeftNames(
        "IA3",
        tensors={"ia3_l": "mindpet_delta_ia3_l"},
        options={},
        modules={"feedforward_modules": "feedforward"},
        free=("init_ia3_weights",),
    ),
)
