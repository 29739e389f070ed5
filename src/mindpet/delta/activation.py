"""Activations by MindSpore's names, built so that a shard strategy reaches every operator in them.

MindSpore 2.10 computes some of its activations in functions (``nn.GELU``, ``nn.LeakyReLU``, ``nn.SiLU``, ...): such a
Cell holds no operator that a strategy could be written on. Of ``HSwish`` the parallel compiler has no version: it cuts
the batch over all devices, whatever the strategy says. Those are built here from operators; the others are MindSpore's
own Cells.
"""

from typing import Any

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import Primitive

from mindpet import _checks, _compat

_NOT_CUT = ("HSwish",)
_LOG_SOFTMAX = ("LogSoftmax", "LogSoftmaxExt")
_REFUSED = {
    "threshold": "it needs a threshold and a value: pass mindspore.nn.Threshold(threshold, value) itself",
    "softmax2d": "it normalises over channels of images, and a dense layer applies its activation to rows",
}


class _GELU(nn.Cell):
    """Tanh form of GELU, as ``mindspore.nn.GELU()``."""

    mindpet_kernel = "gelu_tanh"  # what mindpet.kernels.accelerate replaces it by

    def __init__(self):
        super().__init__()
        self.gelu = ops.GeLU()

    def construct(self, x):
        return self.gelu(x)


class _SiLU(nn.Cell):
    """x * sigmoid(x)."""

    def __init__(self):
        super().__init__()
        self.sigmoid = ops.Sigmoid()
        self.mul = ops.Mul()

    def construct(self, x):
        return self.mul(x, self.sigmoid(x))


class _HSwish(nn.Cell):
    """x * hsigmoid(x)."""

    def __init__(self):
        super().__init__()
        self.hsigmoid = ops.HSigmoid()
        self.mul = ops.Mul()

    def construct(self, x):
        return self.mul(x, self.hsigmoid(x))


class _LeakyReLU(nn.Cell):
    """max(x, 0.2 x)."""

    second_operand = {"mul": "scalar"}

    def __init__(self):
        super().__init__()
        self.mul = ops.Mul()
        self.maximum = ops.Maximum()

    def construct(self, x):
        return self.maximum(x, self.mul(x, 0.2))


class _Tanhshrink(nn.Cell):
    """x - tanh(x)."""

    def __init__(self):
        super().__init__()
        self.tanh = ops.Tanh()
        self.sub = ops.Sub()

    def construct(self, x):
        return self.sub(x, self.tanh(x))


class _Hardtanh(nn.Cell):
    """min(max(x, -1), 1)."""

    second_operand = {"maximum": "scalar", "minimum": "scalar"}

    def __init__(self):
        super().__init__()
        self.maximum = ops.Maximum()
        self.minimum = ops.Minimum()

    def construct(self, x):
        return self.minimum(self.maximum(x, -1.0), 1.0)


class _Softmin(nn.Cell):
    """softmax(-x) over the last axis."""

    def __init__(self):
        super().__init__()
        self.neg = ops.Neg()
        self.softmax = ops.Softmax(axis=-1)

    def construct(self, x):
        return self.softmax(self.neg(x))


class _LogSoftmax(nn.Cell):
    """log(softmax(x)) over the last axis."""

    def __init__(self):
        super().__init__()
        self.log_softmax = ops.LogSoftmax(axis=-1)

    def construct(self, x):
        return self.log_softmax(x)


class _LogSigmoid(nn.Cell):
    """log(sigmoid(x)) = min(x, 0) - log(1 + exp(-abs(x))), which overflows nowhere."""

    second_operand = {"minimum": "scalar", "add": "scalar"}

    def __init__(self):
        super().__init__()
        self.minimum = ops.Minimum()
        self.abs = ops.Abs()
        self.neg = ops.Neg()
        self.exp = ops.Exp()
        self.add = ops.Add()
        self.log = ops.Log()
        self.sub = ops.Sub()

    def construct(self, x):
        tail = self.log(self.add(self.exp(self.neg(self.abs(x))), 1.0))
        return self.sub(self.minimum(x, 0.0), tail)


class _PReLU(nn.Cell):
    """max(x, 0) + weight * min(x, 0) with one trainable weight, at 0.25 to begin with."""

    second_operand = {"prelu": "vector"}

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor([0.25], mstype.float32), name="weight")
        self.prelu = ops.PReLU()
        self.cast = ops.Cast()

    def construct(self, x):
        return self.prelu(x, self.cast(self.weight, x.dtype))


_OWN = {
    "gelu": _GELU,
    "silu": _SiLU,
    "hswish": _HSwish,
    "leakyrelu": _LeakyReLU,
    "tanhshrink": _Tanhshrink,
    "hardtanh": _Hardtanh,
    "softmin": _Softmin,
    "logsoftmax": _LogSoftmax,
    "logsoftmaxExt": _LogSoftmax,
    "logsigmoid": _LogSigmoid,
    "prelu": _PReLU,
    "preluExt": _PReLU,
}
_TWO_OPERANDS = ("Add", "Sub", "Mul", "Maximum", "Minimum", "PReLU")


def activation_names() -> list[str]:
    """Every name that :func:`build_activation` takes."""
    return sorted(set(_compat.activation_classes()) - set(_REFUSED))


def build_activation(owner: str, argument: str, name: str, unknown: type[Exception] = KeyError) -> nn.Cell:
    """The activation of that name.

    Raises:
        KeyError, or what `unknown` says: a name that MindSpore does not know, or knows but that cannot follow a dense
            layer; the message names the known ones.

    >>> build_activation("Dense", "activation", "relu")(Tensor([-1.0, 2.0])).asnumpy().tolist()
    [0.0, 2.0]
    """
    if name in _REFUSED:
        raise unknown(f"For '{owner}', '{argument}' cannot be {name!r}: {_REFUSED[name]}.")
    known = _compat.activation_classes()
    if name not in known:
        raise unknown(
            f"For '{owner}', '{argument}' must be one of {', '.join(activation_names())}, "
            f"but got {_checks.shown(name)}{_checks.near(name, known)}."
        )
    kind = _OWN[name] if name in _OWN else known[name]
    return kind()


def resolve_activation(owner: str, value: Any) -> Any:
    """A str becomes a Cell; a Cell, a Primitive or None stays."""
    _checks.activation_kind(owner, "activation", value)
    return build_activation(owner, "activation", value) if isinstance(value, str) else value


def shard_activation(activation: Any, strategy: tuple) -> None:
    """Write `strategy` on every operator of the activation; its first tuple is for the activation's input."""
    kinds = getattr(activation, "second_operand", {})
    for operator in _operators(activation):
        if operator.name in _TWO_OPERANDS:
            second = {"scalar": (), "vector": (1,)}.get(kinds.get(operator.instance_name, ""), strategy[0])
            operator.shard((strategy[0], second))
        else:
            operator.shard(strategy[:1])


def refuse_activation(owner: str, argument: str, activation: Any, strategy: tuple | None) -> None:
    """Find activations that cannot be cut. Without a strategy only LogSoftmax is one.

    Raises:
        ValueError: LogSoftmax in a parallel mode; an activation that holds no operator, or one that MindSpore cuts by
            its batch whatever the strategy says.
    """
    if activation is None:
        return
    operators = _operators(activation)
    if _compat.in_parallel_compile_mode() and any(operator.name in _LOG_SOFTMAX for operator in operators):
        raise ValueError(
            f"For '{owner}', '{argument}' cannot be set: in semi-auto and auto parallel mode LogSoftmax is not "
            "supported as an activation."
        )
    if strategy is None:
        return
    if not operators or type(activation) is nn.RReLU:
        reason = f"{type(activation).__name__} has no operator that takes a strategy"
    elif any(operator.name in _NOT_CUT for operator in operators):
        reason = f"MindSpore does not read a strategy of {operators[0].name}"
    else:
        return
    raise ValueError(
        f"For '{owner}', '{argument}' cannot be set: {reason}; give the activation by name, one of "
        f"{', '.join(_shardable_names())}, or as a Primitive."
    )


def normalised_axes(activation: Any) -> tuple[int, ...]:
    """The axes of ``(rows, columns)`` that the activation normalises over, which no strategy can cut.

    >>> normalised_axes(nn.Softmax(axis=-1)), normalised_axes(nn.ReLU())
    ((1,), ())
    """
    found: set[int] = set()
    for operator in _operators(activation):
        if operator.name in ("Softmax", *_LOG_SOFTMAX):
            axis = getattr(operator, "axis", -1)
            found |= {each % 2 for each in (axis if isinstance(axis, (tuple, list)) else (axis,))}
    return tuple(sorted(found))


def _operators(activation: Any) -> list[Primitive]:
    if isinstance(activation, Primitive):
        return [activation]
    unsplit = ("Cast", "Shape", "Reshape")
    return [operator for operator in _compat.primitives_of(activation) if operator.name not in unsplit]


def _shardable_names() -> list[str]:
    return [name for name in activation_names() if name not in ("rrelu", "logsoftmax", "logsoftmaxExt")]
