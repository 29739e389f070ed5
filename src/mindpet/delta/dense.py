"""The dense layer that the adapted layers share: MindSpore's own, with a choice of computing dtype."""

from typing import TYPE_CHECKING, Any

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import initializer

from mindpet import _checks, _compat
from mindpet.delta.activation import resolve_activation

if TYPE_CHECKING:
    from typing_extensions import Self

_BORROWED = ("in_channels", "out_channels", "has_bias", "reshape", "matmul", "activation", "activation_flag")


def is_plain_dense(cell: nn.Cell) -> bool:
    """Whether a Cell is a dense layer and nothing else: y = activation(x W^T + b)."""
    return type(cell) in (nn.Dense, ComputeDense) or "plain_dense" in vars(type(cell))


def share_dense(dense: nn.Dense, layer: nn.Dense) -> None:
    """Make `layer`, which is still empty, hold the parameters and operators of `dense`."""
    nn.Cell.__init__(layer)
    names = [(parameter, parameter.name) for parameter in dense.get_parameters()]
    for name in _BORROWED:
        setattr(layer, name, getattr(dense, name))
    layer.weight = dense.base_weight if isinstance(dense, ComputeDense) else dense.weight
    layer.bias = dense.bias if dense.has_bias else None
    if dense.has_bias:
        layer.bias_add = dense.bias_add
    layer.fused_product = getattr(dense, "fused_product", None)
    for parameter, name in names:  # a Cell that is set as an attribute, an activation, has its parameters renamed
        parameter.name = name
    layer.set_train(dense.training)


class ComputeDense(nn.Dense):
    r"""A dense layer that multiplies in `compute_dtype`, whatever dtype its weight is kept in.

    .. math:: y = \sigma(x W^T + b)

    Shapes: x ``(..., in)``, W ``(out, in)``, b ``(out,)``, y ``(..., out)``. The output has the input's dtype.
    """

    untransposed = False  # whether `delta_weight` is right for a weight (in, out) as well

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
        param_init_type: Any = mstype.float32,
        compute_dtype: Any = mstype.float16,
    ):
        owner = type(self).__name__
        in_channels = _checks.positive_int(owner, "in_channels", in_channels)
        out_channels = _checks.positive_int(owner, "out_channels", out_channels)
        _checks.init_value(owner, "weight_init", weight_init, (out_channels, in_channels))
        _checks.init_value(owner, "bias_init", bias_init, (out_channels,))
        _checks.boolean(owner, "has_bias", has_bias)
        _checks.float_type(owner, "param_init_type", param_init_type)
        _checks.float_type(owner, "compute_dtype", compute_dtype)
        activation = resolve_activation(owner, activation)
        super().__init__(in_channels, out_channels, weight_init, bias_init, has_bias, activation, dtype=param_init_type)
        self.compute_dtype = compute_dtype
        self.cast = ops.Cast()
        self.fused_product: Any = None  # a Cell that computes product and bias at once: see mindpet.kernels.accelerate

    @classmethod
    def borrow(cls, dense: nn.Dense) -> "Self":
        """A layer of this class around the weight, bias and operators of `dense`: nothing is copied.

        Strategies already written on the operators stay. It computes in the dtype of the weight. What the subclass
        adds beside the dense part is still to be made.
        """
        usual = type(dense).construct in (nn.Dense.construct, ComputeDense.construct)
        if not usual and not is_plain_dense(dense):
            raise TypeError(
                f"A {type(dense).__name__} has a construct of its own, which a {cls.__name__} in its place would not "
                "compute: exclude it, or place the layer by hand."
            )
        if not getattr(dense.matmul, "transpose_b", True) and hasattr(cls, "delta_weight") and not cls.untransposed:
            raise ValueError(f"For '{cls.__name__}', the weight must be (out, in), but this product takes (in, out).")
        layer = cls.__new__(cls)
        share_dense(dense, layer)
        own = getattr(dense, "compute_dtype", layer.weight.dtype)
        layer.compute_dtype = _compat.forced_dtype(dense) or own
        layer.cast = ops.Cast()
        return layer

    def plain(self) -> nn.Dense:
        """The dense layer alone: weight, bias and operators shared."""
        if self.compute_dtype != self.base_weight.dtype:
            return ComputeDense.borrow(self)
        layer = nn.Dense.__new__(nn.Dense)
        share_dense(self, layer)
        layer.shape_op = ops.Shape()
        return layer

    def add_delta(self, name: str, start: Any, *shape: int) -> None:
        """A new parameter of that name, in the dtype of the weight."""
        setattr(self, name, Parameter(initializer(start, shape, self.weight.dtype), name=name))

    @property
    def base_weight(self) -> Parameter:
        """The weight that a delta is added to in merging."""
        return self.weight

    def rows_of(self, x):
        """The input as rows in the computing dtype: (..., in) -> (rows, in)."""
        _checks.require_kernel(self.compute_dtype)
        if x.ndim != 2:
            x = self.reshape(x, (-1, x.shape[-1]))
        return self.cast(x, self.compute_dtype)

    def dense_rows(self, rows):
        """X W^T + b on rows: (rows, in) -> (rows, out)."""
        weight = self.cast(self.weight, self.compute_dtype)
        if self.fused_product is not None and self.fused_product.multiplies(rows, weight):
            return self.fused_product(rows, weight, self.cast(self.bias, self.compute_dtype))
        return self.biased(self.matmul(rows, weight))

    def biased(self, rows):
        """With b added, where there is one: (rows, out) -> (rows, out)."""
        if self.has_bias:
            rows = self.bias_add(rows, self.cast(self.bias, self.compute_dtype))
        return rows

    def activated(self, rows):
        """Through the activation, where there is one: (rows, out) -> (rows, out)."""
        if self.activation_flag:
            rows = self.activation(rows)
        return rows

    def shaped_like(self, rows, x):
        """Back to the input's leading axes and dtype: (rows, out) -> (..., out)."""
        if x.ndim != 2:
            rows = self.reshape(rows, x.shape[:-1] + (rows.shape[-1],))
        return self.cast(rows, x.dtype)

    def construct(self, x):
        return self.shaped_like(self.activated(self.dense_rows(self.rows_of(x))), x)


class BranchDense(ComputeDense):
    r"""A dense layer with something added to its product: :math:`y = \sigma(x W^T + b + \mathrm{branch}(x))`.

    A subclass says what is added, ``branch(rows)``: rows ``(rows, in)`` in the computing dtype to ``(rows, out)``.
    """

    def branch(self, rows):
        """What is added: (rows, in) -> (rows, out)."""
        raise NotImplementedError

    def construct(self, x):
        rows = self.rows_of(x)
        return self.shaped_like(self.activated(self.dense_rows(rows) + self.branch(rows)), x)


class ChangedInputDense(ComputeDense):
    r"""A dense layer whose input passes through a square matrix: :math:`y = \sigma(x R W^T + b)`.

    A subclass says how, ``changed_input(rows)``: x R for rows ``(rows, in)``, in whatever dtype they are given.
    """

    def changed_input(self, rows):
        """The product x R: (rows, in) -> (rows, in)."""
        raise NotImplementedError

    def construct(self, x):
        rows = self.dense_rows(self.changed_input(self.rows_of(x)))  # (rows, out)
        return self.shaped_like(self.activated(rows), x)

    def delta_weight(self) -> Tensor:
        """W R^T - W in float32, in the shape of W."""
        weight = self.weight.astype(mstype.float32)
        matrix = self.changed_input(ops.eye(self.in_channels, self.in_channels, mstype.float32))  # R
        return self.matmul(weight, matrix) - weight


class ReweightedDense(ComputeDense):
    r"""A dense layer whose weight is computed from its own and a delta: :math:`y = \sigma(x W'^T + b)`.

    A subclass says what W' is, ``changed_weight(w)``: the weight ``(out, in)``, in whatever dtype it is given, to one
    of that shape and dtype. Beside making W', a call costs one product.
    """

    def changed_weight(self, weight):
        """W' from W: (out, in) -> (out, in)."""
        raise NotImplementedError

    def construct(self, x):
        rows = self.matmul(self.rows_of(x), self.changed_weight(self.cast(self.weight, self.compute_dtype)))
        return self.shaped_like(self.activated(self.biased(rows)), x)

    def delta_weight(self) -> Tensor:
        """W' - W in float32, in the shape of W."""
        weight = self.weight.astype(mstype.float32)
        return self.changed_weight(weight) - weight
