"""Low-Rank Adapter. Mahabadi et al. 2021, Compacter, arXiv:2106.04647, section 4: the adapter's weights as products.

The user document calls it the step between the adapter and Compacter: each weight ``(k, d)`` of the bottleneck is the
product of a ``(k, r)`` and an ``(r, d)`` matrix.
"""

from dataclasses import dataclass
from typing import Any

from mindspore import Parameter, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import initializer

from mindpet import _checks
from mindpet.delta.activation import build_activation
from mindpet.delta.dense import ComputeDense
from mindpet.delta.method import AFTER_BLOCKS, DeltaConfig, Method
from mindpet.delta.strategy import ORIGINAL_DENSE, Sharded, below, shard_operators

_PREFIX = "mindpet_delta_low_rank_adapter"
_DOWN, _UP = f"{_PREFIX}_down_sampler", f"{_PREFIX}_up_sampler"


@dataclass(frozen=True, kw_only=True)
class LowRankAdapterConfig(DeltaConfig):
    """A low-rank bottleneck behind every targeted dense layer.

    Attributes:
        reduction_factor: the bottleneck is ``out // reduction_factor`` wide.
        rank: r, rank of each weight of the bottleneck.
        non_linearity: activation inside the bottleneck, by name.
    """

    reduction_factor: int = 32
    rank: int = 1
    non_linearity: str = "gelu"

    def __post_init__(self):
        super().__post_init__()
        _checks.positive_int("LowRankAdapterConfig", "reduction_factor", self.reduction_factor)
        _checks.positive_int("LowRankAdapterConfig", "rank", self.rank)
        build_activation("LowRankAdapterConfig", "non_linearity", self.non_linearity, unknown=ValueError)


class LowRankSampler(nn.Cell):
    r"""A dense layer whose weight is a product of two thin matrices: :math:`y = x (L R) + b`.

    Shapes: x ``(rows, in)``, L ``(in, rank)``, R ``(rank, out)``, b ``(out,)``, y ``(rows, out)``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, rank: int, weight_init: Any, dtype: Any, compute_dtype: Any
    ):
        super().__init__()
        left, right = "mindpet_delta_low_rank_adapter_weight_left", "mindpet_delta_low_rank_adapter_weight_right"
        self.mindpet_delta_low_rank_adapter_weight_left = Parameter(
            initializer(weight_init, (in_channels, rank), dtype), name=left
        )
        self.mindpet_delta_low_rank_adapter_weight_right = Parameter(
            initializer(weight_init, (rank, out_channels), dtype), name=right
        )
        self.bias = Parameter(initializer("zeros", (out_channels,), dtype), name="bias")
        self.matmul_weight = ops.MatMul()
        self.matmul_input = ops.MatMul()
        self.bias_add = ops.BiasAdd()
        self.cast = ops.Cast()
        self.compute_dtype = compute_dtype

    def construct(self, rows):
        left = self.cast(self.mindpet_delta_low_rank_adapter_weight_left, self.compute_dtype)
        right = self.cast(self.mindpet_delta_low_rank_adapter_weight_right, self.compute_dtype)
        rows = self.matmul_input(rows, self.matmul_weight(left, right))  # (rows, out)
        return self.bias_add(rows, self.cast(self.bias, self.compute_dtype))


class LowRankAdapterLayer(nn.Cell):
    r"""A bottleneck of low-rank weights with a residual connection.

    .. math:: y = x + \sigma\bigl(x (L_{down} R_{down}) + b_{down}\bigr) (L_{up} R_{up}) + b_{up}

    Shapes, with ``k = hidden // reduction_factor``: x and y ``(..., hidden)``, L_down ``(hidden, r)``, R_down
    ``(r, k)``, L_up ``(k, r)``, R_up ``(r, hidden)``. Cost: ``2 * r * (hidden + k) + hidden + k`` parameters,
    ``(4 * hidden + 1) * k + 2 * hidden`` floating-point operations a row and ``4 * r * hidden * k`` a call.

    Started as documented (``xavier_uniform`` on all four matrices) the layer is close to the identity, not the
    identity: the branch starts small, not at zero.

    Args:
        hidden_size: size of the last axis.
        reduction_factor: how many times narrower the bottleneck is.
        low_rank_size: r.
        low_rank_w_init: start of the four matrices, by name or as an Initializer.
        non_linearity: σ, by MindSpore's name.
        param_init_type: dtype of the parameters.
        compute_dtype: dtype of the products.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size that is not positive, a `reduction_factor` above `hidden_size`, an unknown name.

    >>> from mindspore import ops
    >>> LowRankAdapterLayer(8, reduction_factor=4)(ops.ones((3, 8))).shape
    (3, 8)
    """

    delta_method = "low_rank_adapter"
    sharded = {
        "strategy_matmul_down_sampler_weight": Sharded(f"{_DOWN}.matmul_weight", "out rank, rank bottleneck"),
        "strategy_matmul_down_sampler_input": Sharded(f"{_DOWN}.matmul_input", "rows out, out bottleneck"),
        "strategy_bias_down_sampler": Sharded(f"{_DOWN}.bias_add", "rows bottleneck, bottleneck"),
        "strategy_non_linearity": Sharded(f"{_PREFIX}_non_linear", "rows bottleneck", activation=True),
        "strategy_matmul_up_sampler_weight": Sharded(f"{_UP}.matmul_weight", "bottleneck rank, rank out"),
        "strategy_matmul_up_sampler_input": Sharded(f"{_UP}.matmul_input", "rows bottleneck, bottleneck out"),
        "strategy_bias_up_sampler": Sharded(f"{_UP}.bias_add", "rows out, out"),
        "strategy_residual_add": Sharded("residual_add", "rows out, rows out"),
    }

    def __init__(
        self,
        hidden_size: int,
        reduction_factor: int = 1,
        low_rank_size: int = 1,
        low_rank_w_init: Any = "xavier_uniform",
        non_linearity: str = "gelu",
        param_init_type: Any = mstype.float32,
        compute_dtype: Any = mstype.float16,
    ):
        super().__init__()
        owner = type(self).__name__
        hidden_size = _checks.positive_int(owner, "hidden_size", hidden_size)
        reduction_factor = _checks.positive_int(owner, "reduction_factor", reduction_factor)
        rank = _checks.positive_int(owner, "low_rank_size", low_rank_size)
        _checks.init_value(owner, "low_rank_w_init", low_rank_w_init, names_only=True)
        _checks.string(owner, "non_linearity", non_linearity)
        _checks.float_type(owner, "param_init_type", param_init_type)
        _checks.float_type(owner, "compute_dtype", compute_dtype)
        if reduction_factor > hidden_size:
            raise ValueError(
                f"For '{owner}', 'reduction_factor' must be at most {hidden_size}, the size of what it reduces, "
                f"but got {_checks.shown(reduction_factor)}."
            )
        width = hidden_size // reduction_factor
        kinds = (rank, low_rank_w_init, param_init_type, compute_dtype)
        self.hidden_size, self.reduction_factor, self.low_rank_size = hidden_size, reduction_factor, rank
        self.mindpet_delta_low_rank_adapter_non_linear = build_activation(
            owner, "non_linearity", non_linearity, unknown=ValueError
        )
        self.mindpet_delta_low_rank_adapter_down_sampler = LowRankSampler(hidden_size, width, *kinds)
        self.mindpet_delta_low_rank_adapter_up_sampler = LowRankSampler(width, hidden_size, *kinds)
        self.residual_add = ops.Add()
        self.compute_dtype = compute_dtype
        self.cast, self.reshape = ops.Cast(), ops.Reshape()

    def construct(self, x):
        rows = x if x.ndim == 2 else self.reshape(x, (-1, x.shape[-1]))  # (rows, hidden)
        _checks.require_kernel(self.compute_dtype)
        branch = self.mindpet_delta_low_rank_adapter_down_sampler(self.cast(rows, self.compute_dtype))  # (rows, k)
        branch = self.mindpet_delta_low_rank_adapter_up_sampler(
            self.mindpet_delta_low_rank_adapter_non_linear(branch)
        )  # (rows, hidden)
        return self.reshape(self.residual_add(rows, self.cast(branch, x.dtype)), x.shape)

    def shard(
        self,
        strategy_matmul_down_sampler_weight: tuple | None = None,
        strategy_matmul_down_sampler_input: tuple | None = None,
        strategy_bias_down_sampler: tuple | None = None,
        strategy_non_linearity: tuple | None = None,
        strategy_matmul_up_sampler_weight: tuple | None = None,
        strategy_matmul_up_sampler_input: tuple | None = None,
        strategy_bias_up_sampler: tuple | None = None,
        strategy_residual_add: tuple | None = None,
    ) -> None:
        """Say how each operator is cut over the devices; no product here transposes its second input.

        See :meth:`mindpet.delta.lora.LoRADense.shard`.
        """
        shard_operators(self, locals())

    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the axes that strategies cut, but for the rows of the input."""
        width = self.hidden_size // self.reduction_factor
        return {"out": self.hidden_size, "bottleneck": width, "rank": self.low_rank_size}


class LowRankAdapterDense(ComputeDense):
    r"""A dense layer followed by a :class:`LowRankAdapterLayer`.

    .. math:: h = \sigma(x W^T + b), \qquad y = \mathrm{LowRankAdapterLayer}(h)

    Shapes: x ``(..., in)``, W ``(out, in)``, b ``(out,)``, h and y ``(..., out)``. Cost:
    ``2 * rank * (out + out // reduction_factor) + out + out // reduction_factor`` parameters,
    ``(4 * out + 1) * (out // reduction_factor) + 2 * out`` floating-point operations a row and
    ``4 * rank * out * (out // reduction_factor)`` a call.

    Args:
        in_channels: size of the input's last axis.
        out_channels: size of the output's last axis.
        weight_init: start of W: a Tensor ``(out, in)``, a name, an Initializer or a number.
        bias_init: start of b.
        has_bias: whether b exists.
        activation: σ of the dense layer, by name, as a Cell or as a Primitive.
        reduction_factor: the bottleneck is ``out_channels // reduction_factor`` wide.
        low_rank_size: r, rank of each weight of the bottleneck.
        low_rank_w_init: start of those weights, by name or as an Initializer.
        non_linearity: activation inside the bottleneck, by name.
        param_init_type: dtype of the parameters.
        compute_dtype: dtype of the products.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size that is not positive, a `reduction_factor` above `out_channels`, an initial value of another
            shape or an unknown name, an unknown `non_linearity`.
        KeyError: an activation that MindSpore does not know.

    >>> from mindspore import ops
    >>> LowRankAdapterDense(6, 8, reduction_factor=4)(ops.ones((3, 6))).shape
    (3, 8)
    """

    delta_method = "low_rank_adapter"
    sharded = {**ORIGINAL_DENSE, **below(_PREFIX, LowRankAdapterLayer.sharded)}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
        reduction_factor: int = 1,
        low_rank_size: int = 1,
        low_rank_w_init: Any = "xavier_uniform",
        non_linearity: str = "gelu",
        param_init_type: Any = mstype.float32,
        compute_dtype: Any = mstype.float16,
    ):
        super().__init__(
            in_channels, out_channels, weight_init, bias_init, has_bias, activation, param_init_type, compute_dtype
        )
        self.mindpet_delta_low_rank_adapter = LowRankAdapterLayer(
            self.out_channels,
            reduction_factor,
            low_rank_size,
            low_rank_w_init,
            non_linearity,
            param_init_type,
            compute_dtype,
        )

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: LowRankAdapterConfig) -> "LowRankAdapterDense":
        """The same dense layer, weight and bias shared, with a new low-rank bottleneck behind it."""
        layer = cls.borrow(dense)
        layer.mindpet_delta_low_rank_adapter = LowRankAdapterLayer(
            dense.out_channels,
            config.reduction_factor,
            config.rank,
            non_linearity=config.non_linearity,
            param_init_type=dense.weight.dtype,
            compute_dtype=layer.compute_dtype,
        )
        return layer

    def construct(self, x):
        hidden = self.activated(self.dense_rows(self.rows_of(x)))  # (rows, out)
        return self.shaped_like(self.mindpet_delta_low_rank_adapter(hidden), x)

    def shard(
        self,
        strategy_matmul_org: tuple | None = None,
        strategy_bias_org: tuple | None = None,
        strategy_activation_org: tuple | None = None,
        strategy_matmul_down_sampler_weight: tuple | None = None,
        strategy_matmul_down_sampler_input: tuple | None = None,
        strategy_bias_down_sampler: tuple | None = None,
        strategy_non_linearity: tuple | None = None,
        strategy_matmul_up_sampler_weight: tuple | None = None,
        strategy_matmul_up_sampler_input: tuple | None = None,
        strategy_bias_up_sampler: tuple | None = None,
        strategy_residual_add: tuple | None = None,
    ) -> None:
        """Say how each operator is cut over the devices; see :meth:`mindpet.delta.lora.LoRADense.shard`."""
        shard_operators(self, locals())

    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the axes that strategies cut, but for the rows of the input."""
        return {"in": self.in_channels, **self.mindpet_delta_low_rank_adapter.axis_sizes()}


METHOD = Method(
    name="low_rank_adapter",
    config=LowRankAdapterConfig,
    trainable=("*mindpet_delta_low_rank_adapter*",),
    paper="Mahabadi et al. 2021, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, arXiv:2106.04647",
    adapt={nn.Dense: LowRankAdapterDense.from_dense},
    targets=AFTER_BLOCKS,
    learning_rate=0.003,
)
