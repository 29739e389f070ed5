"""Strategies: how many ways the operators of a layer are cut over the devices, checked before they are written.

A table says for each argument of ``shard`` which operator it is for and what the axes of that operator's inputs are, in
the manner of einsum: ``"rows in, out in"`` is a matrix product of ``(rows, in)`` and ``(out, in)``. An axis that two
inputs share is cut once. MindSpore finds a wrong strategy only when it compiles the network, and then says
``operator MatMul init failed``; what can be known from the weights is said here, when ``shard`` is called.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from mindspore import nn
from mindspore.ops import Primitive

from mindpet import _checks, _compat
from mindpet.delta.activation import normalised_axes, refuse_activation, shard_activation

_PRODUCT = "rows in, out in"  # of the dense layer itself


@dataclass(frozen=True)
class Sharded:
    """One argument of ``shard``.

    Attributes:
        path: where the layer keeps the operator, or the activation.
        axes: the axes of its inputs.
        activation: whether it is an activation, of one or more operators that are all cut alike.
    """

    path: str
    axes: str
    activation: bool = False


Table = Mapping[str, Sharded]

# The dense layer in front of an adapter.
ORIGINAL_DENSE = {
    "strategy_matmul_org": Sharded("matmul", _PRODUCT),
    "strategy_bias_org": Sharded("bias_add", "rows out, out"),
    "strategy_activation_org": Sharded("activation", "rows out", activation=True),
}


def below(name: str, table: Table) -> dict[str, Sharded]:
    """The table of a layer that another one holds under `name`."""
    return {argument: replace(entry, path=f"{name}.{entry.path}") for argument, entry in table.items()}


def operator_of(layer: nn.Cell, entry: Sharded) -> Any:
    """The operator or the activation, or None: a dense layer may have no bias and no activation."""
    try:
        found = attrgetter(entry.path)(layer)
    except AttributeError:
        return None
    return getattr(found, "original", found)  # where mindpet.accelerate has put a Cell around it


def input_axes(operator: Any, entry: Sharded) -> list[tuple[str, ...]]:
    """The axes of each input: ``"rows in, out in"`` gives ``[("rows", "in"), ("out", "in")]``."""
    axes = [tuple(part.split()) for part in entry.axes.split(",")]
    if entry.axes == _PRODUCT and not getattr(operator, "transpose_b", True):
        axes[1] = axes[1][::-1]  # a product that another toolkit has put in keeps its weight the other way round
    return axes


def shard_operators(layer: Any, arguments: Mapping[str, Any]) -> None:
    """Check every strategy, then write them all. None leaves an operator as it is.

    Args:
        layer: has a table `sharded`, and `axis_sizes()`.
        arguments: the strategies by the names of the table; ``locals()`` of a ``shard`` will do.

    Raises:
        TypeError: a strategy that is not a tuple of tuples of ints.
        ValueError: strategies that cannot be, with all that is wrong in one message; a LogSoftmax in a parallel mode;
            an activation that cannot be cut. Nothing is written then.
    """
    given = {argument: arguments[argument] for argument in layer.sharded}
    require_fitting(type(layer).__name__, layer, given)
    for argument, strategy in given.items():
        entry = layer.sharded[argument]
        operator = operator_of(layer, entry)
        if operator is None or strategy is None:
            continue
        if entry.activation:
            shard_activation(operator, strategy)
        else:
            operator.shard(strategy)


def require_fitting(owner: str, layer: Any, given: Mapping[str, tuple | None]) -> None:
    """The checks of :func:`shard_operators`; `owner` is what the message calls the layer."""
    problems = []
    for argument, strategy in given.items():
        entry = layer.sharded[argument]
        operator = operator_of(layer, entry)
        if entry.activation:
            refuse_activation(owner, argument, operator, strategy)
        if operator is None or strategy is None or _has_layouts(strategy):
            continue
        _require_tuples(owner, argument, strategy)
        axes, sizes = input_axes(operator, entry), layer.axis_sizes()
        whole: tuple[int, ...] = ()
        if entry.activation:
            whole = normalised_axes(operator)
            if len(set(strategy)) == 1:
                strategy = strategy[:1]  # the user document's example has one tuple more than there are inputs
        reason = _reason(strategy, axes, sizes, whole)
        if reason:
            kind = operator.name if isinstance(operator, Primitive) else type(operator).__name__.lstrip("_")
            problems.append(f"{argument}={given[argument]} of {kind} on {_shapes(axes, sizes)}: {reason}")
    if problems:
        number = "this strategy does" if len(problems) == 1 else "these strategies do"
        raise ValueError("\n  ".join([f"For '{owner}', {number} not fit:", *problems]))


def _reason(
    strategy: tuple[tuple[int, ...], ...], axes: list[tuple[str, ...]], sizes: Mapping[str, int], whole: tuple[int, ...]
) -> str:
    """What is wrong with a strategy, or an empty text."""
    if len(strategy) != len(axes):
        return f"it must have one tuple for each of the {len(axes)} inputs, but has {len(strategy)}"
    cuts: dict[str, int] = {}
    for position, (numbers, names) in enumerate(zip(strategy, axes, strict=True), start=1):
        if len(numbers) != len(names):
            return f"the tuple of input {position} must have {len(names)} numbers, one for each axis, but is {numbers}"
        for number, name in zip(numbers, names, strict=True):
            if number <= 0:
                return f"{number} is no number of parts; 1 leaves an axis whole"
            if number != cuts.setdefault(name, number):
                return f"an axis that two inputs share is cut into {cuts[name]} parts in one and {number} in the other"
            if sizes.get(name, number) % number:
                return f"an axis of {sizes[name]} cannot be cut into {number} equal parts"
    if any(strategy[0][axis] != 1 for axis in whole):
        return f"it normalises over axis {whole[0]}, which must stay whole: 1"
    return _device_reason(math.prod(cuts.values()))


def _device_reason(needed: int) -> str:
    """Whether an operator can be cut over so many devices: MindSpore repeats it on the others, evenly."""
    devices = _compat.device_count()
    if devices is None or devices % needed == 0:
        return ""
    many = "too many for" if needed > devices else "not an equal share of"
    return f"it needs {needed} devices, {many} {devices}"


def require_devices(owner: str, text: str, needed: int) -> None:
    """For layers without a table: that many devices can be had.

    Raises:
        ValueError: more than there are, or not a divisor of them.
    """
    reason = _device_reason(needed)
    if reason:
        raise ValueError(f"For '{owner}', {text} does not fit: {reason}.")


def _has_layouts(strategy: Any) -> bool:
    return isinstance(strategy, tuple) and any(type(each).__name__ == "Layout" for each in strategy)


def _require_tuples(owner: str, argument: str, strategy: Any) -> None:
    def is_int(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    fits = isinstance(strategy, tuple) and all(isinstance(each, tuple) and all(map(is_int, each)) for each in strategy)
    if not fits:
        raise TypeError(
            f"For '{owner}', '{argument}' must be a tuple with a tuple of ints for each input of the operator, "
            f"such as ((2, 1), (4, 1)), but got {_checks.shown(strategy)}."
        )


def _shapes(axes: list[tuple[str, ...]], sizes: Mapping[str, int]) -> str:
    """``(rows, 784) and (512, 784)``."""
    shapes = []
    for names in axes:
        comma = "," if len(names) == 1 else ""
        shapes.append("(" + ", ".join(str(sizes.get(name, name)) for name in names) + comma + ")")
    return " and ".join(shapes)
