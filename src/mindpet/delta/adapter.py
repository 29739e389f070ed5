"""Adapter: Parameter-Efficient Transfer Learning for NLP. Houlsby et al. 2019, arXiv:1902.00751, section 2.1.

::

    x ──┬── down (hidden -> bottleneck) ── σ ── up (bottleneck -> hidden) ── + ── y
        └────────────────────────────────────────────────────────────────────┘
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from mindspore import dtype as mstype
from mindspore import nn, ops
from mindspore.common.initializer import TruncatedNormal

from mindpet import _checks
from mindpet.delta.activation import build_activation
from mindpet.delta.dense import ComputeDense
from mindpet.delta.low_rank_adapter import LowRankAdapterDense, LowRankAdapterLayer
from mindpet.delta.method import AFTER_BLOCKS, DeltaConfig, Method
from mindpet.delta.strategy import ORIGINAL_DENSE, Sharded, below, shard_operators

__all__ = ["AdapterConfig", "AdapterDense", "AdapterLayer", "LowRankAdapterDense", "LowRankAdapterLayer"]


_DOWN, _UP = "mindpet_delta_adapter_down_sampler", "mindpet_delta_adapter_up_sampler"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(DeltaConfig):
    """A bottleneck behind every targeted dense layer.

    Attributes:
        size: m, width of the bottleneck.
        non_linearity: activation inside the bottleneck, by name.
    """

    size: int = 64
    non_linearity: str = "gelu"

    def __post_init__(self):
        super().__post_init__()
        _checks.positive_int("AdapterConfig", "size", self.size)
        build_activation("AdapterConfig", "non_linearity", self.non_linearity, unknown=ValueError)


class AdapterLayer(nn.Cell):
    r"""A bottleneck with a residual connection, to follow a layer of a frozen network.

    .. math:: y = x + \sigma(x W_{down}^T + b_{down})\, W_{up}^T + b_{up}

    Shapes: x and y ``(..., hidden)``, W_down ``(bottleneck, hidden)``, W_up ``(hidden, bottleneck)``. Both weights
    start from a normal distribution of deviation 0.01, cut at two deviations, and the biases at zero, so the layer
    starts near the identity (section 3.6). Cost: ``2 * hidden * bottleneck + hidden + bottleneck`` parameters and
    ``4 * hidden * bottleneck + 2 * hidden + bottleneck`` floating-point operations a row.

    Args:
        hidden_size: size of the last axis.
        bottleneck_size: width of the bottleneck.
        non_linearity: σ, by MindSpore's name.
        param_init_type: dtype of the parameters.
        compute_dtype: dtype of the products.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size that is not positive, an unknown `non_linearity`.

    >>> from mindspore import ops
    >>> AdapterLayer(8, bottleneck_size=2)(ops.ones((3, 8))).shape
    (3, 8)
    """

    delta_method = "adapter"
    sharded = below(
        "mindpet_delta_adapter_block",
        {
            "strategy_matmul_down_sampler": Sharded(f"{_DOWN}.matmul", "rows out, bottleneck out"),
            "strategy_bias_down_sampler": Sharded(f"{_DOWN}.bias_add", "rows bottleneck, bottleneck"),
            "strategy_non_linearity": Sharded("mindpet_delta_adapter_non_linear", "rows bottleneck", activation=True),
            "strategy_matmul_up_sampler": Sharded(f"{_UP}.matmul", "rows bottleneck, out bottleneck"),
            "strategy_bias_up_sampler": Sharded(f"{_UP}.bias_add", "rows out, out"),
        },
    ) | {"strategy_residual_add": Sharded("residual_add", "rows out, rows out")}

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: Any = mstype.float32,
        compute_dtype: Any = mstype.float16,
    ):
        super().__init__()
        owner = type(self).__name__
        hidden_size = _checks.positive_int(owner, "hidden_size", hidden_size)
        bottleneck_size = _checks.positive_int(owner, "bottleneck_size", bottleneck_size)
        _checks.string(owner, "non_linearity", non_linearity)
        _checks.float_type(owner, "param_init_type", param_init_type)
        _checks.float_type(owner, "compute_dtype", compute_dtype)
        activation = build_activation(owner, "non_linearity", non_linearity, unknown=ValueError)
        kinds = {"param_init_type": param_init_type, "compute_dtype": compute_dtype}
        down = ComputeDense(hidden_size, bottleneck_size, TruncatedNormal(0.01), **kinds)
        up = ComputeDense(bottleneck_size, hidden_size, TruncatedNormal(0.01), **kinds)
        self.hidden_size, self.bottleneck_size, self.non_linearity = hidden_size, bottleneck_size, non_linearity
        self.mindpet_delta_adapter_block = nn.SequentialCell(
            OrderedDict(
                mindpet_delta_adapter_down_sampler=down,
                mindpet_delta_adapter_non_linear=activation,
                mindpet_delta_adapter_up_sampler=up,
            )
        )
        self.residual_add = ops.Add()
        self.compute_dtype = compute_dtype
        self.cast, self.reshape = ops.Cast(), ops.Reshape()

    def construct(self, x):
        rows = x if x.ndim == 2 else self.reshape(x, (-1, x.shape[-1]))  # (rows, hidden)
        branch = self.mindpet_delta_adapter_block(self.cast(rows, self.compute_dtype))  # (rows, hidden)
        return self.reshape(self.residual_add(rows, self.cast(branch, x.dtype)), x.shape)

    def shard(
        self,
        strategy_matmul_down_sampler: tuple | None = None,
        strategy_bias_down_sampler: tuple | None = None,
        strategy_non_linearity: tuple | None = None,
        strategy_matmul_up_sampler: tuple | None = None,
        strategy_bias_up_sampler: tuple | None = None,
        strategy_residual_add: tuple | None = None,
    ) -> None:
        """Say how each operator is cut over the devices; see :meth:`mindpet.delta.lora.LoRADense.shard`."""
        shard_operators(self, locals())

    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the axes that strategies cut, but for the rows of the input."""
        return {"out": self.hidden_size, "bottleneck": self.bottleneck_size}


class AdapterDense(ComputeDense):
    r"""A dense layer followed by an :class:`AdapterLayer`.

    .. math:: h = \sigma(x W^T + b), \qquad y = \mathrm{AdapterLayer}(h)

    Shapes: x ``(..., in)``, W ``(out, in)``, b ``(out,)``, h and y ``(..., out)``. Cost:
    ``2 * out * size + out + size`` parameters and ``4 * out * size + 2 * out + size`` floating-point operations a row,
    with the size of the bottleneck.

    Args:
        in_channels: size of the input's last axis.
        out_channels: size of the output's last axis.
        weight_init: start of W: a Tensor ``(out, in)``, a name, an Initializer or a number.
        bias_init: start of b.
        has_bias: whether b exists.
        activation: σ of the dense layer, by name, as a Cell or as a Primitive.
        bottleneck_size: width of the bottleneck.
        non_linearity: activation inside the bottleneck, by name.
        param_init_type: dtype of the parameters.
        compute_dtype: dtype of the products.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size that is not positive, an initial value of another shape or an unknown name, an unknown
            `non_linearity`.
        KeyError: an activation that MindSpore does not know.

    >>> from mindspore import ops
    >>> AdapterDense(6, 8, bottleneck_size=2)(ops.ones((3, 6))).shape
    (3, 8)
    """

    delta_method = "adapter"
    sharded = {**ORIGINAL_DENSE, **below("mindpet_delta_adapter", AdapterLayer.sharded)}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: Any = mstype.float32,
        compute_dtype: Any = mstype.float16,
    ):
        super().__init__(
            in_channels, out_channels, weight_init, bias_init, has_bias, activation, param_init_type, compute_dtype
        )
        self.mindpet_delta_adapter = AdapterLayer(
            self.out_channels, bottleneck_size, non_linearity, param_init_type, compute_dtype
        )

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: AdapterConfig) -> "AdapterDense":
        """The same dense layer, weight and bias shared, with a new bottleneck behind it."""
        layer = cls.borrow(dense)
        layer.mindpet_delta_adapter = AdapterLayer(
            dense.out_channels, config.size, config.non_linearity, dense.weight.dtype, layer.compute_dtype
        )
        return layer

    def construct(self, x):
        hidden = self.activated(self.dense_rows(self.rows_of(x)))  # (rows, out)
        return self.shaped_like(self.mindpet_delta_adapter(hidden), x)

    def shard(
        self,
        strategy_matmul_org: tuple | None = None,
        strategy_bias_org: tuple | None = None,
        strategy_activation_org: tuple | None = None,
        strategy_matmul_down_sampler: tuple | None = None,
        strategy_bias_down_sampler: tuple | None = None,
        strategy_non_linearity: tuple | None = None,
        strategy_matmul_up_sampler: tuple | None = None,
        strategy_bias_up_sampler: tuple | None = None,
        strategy_residual_add: tuple | None = None,
    ) -> None:
        """Say how each operator is cut over the devices; see :meth:`mindpet.delta.lora.LoRADense.shard`."""
        shard_operators(self, locals())

    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the axes that strategies cut, but for the rows of the input."""
        return {"in": self.in_channels, **self.mindpet_delta_adapter.axis_sizes()}


METHOD = Method(
    name="adapter",
    config=AdapterConfig,
    trainable=("*mindpet_delta_adapter*",),
    paper="Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751",
    adapt={nn.Dense: AdapterDense.from_dense},
    targets=AFTER_BLOCKS,
    learning_rate=0.001,
)
