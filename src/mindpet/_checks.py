"""Argument checks: one function for each kind of mistake.

Every message reads ``For 'LoRADense', 'lora_rank' must be a positive int, but got 0 (int).``: who was called, which
argument, what would be right, what was given.
"""

import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Initializer
from mindspore.ops import Primitive

from mindpet import _compat
from mindpet._near import near as near
from mindpet._near import near_names as near_names

FLOAT_TYPES = (mstype.float32, mstype.float16, mstype.bfloat16)


class NotPositiveError(TypeError, ValueError):
    """An int that is zero or negative: the user document calls it a TypeError in places, a ValueError in others."""


class NothingFitsError(ValueError):
    """A method finds nothing in a network that it could adapt or train."""

    exit_code = 3


def shown(value: Any) -> str:
    """The value and its type, short enough for a message."""
    text = repr(value)
    if len(text) > 80:
        text = text[:77] + "..."
    return f"{text} ({type(value).__name__})"


def positive_int(owner: str, name: str, value: Any) -> int:
    """An int above zero, NumPy's ints included and bools not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"For '{owner}', '{name}' must be a positive int, but got {shown(value)}.")
    if value <= 0:
        raise NotPositiveError(f"For '{owner}', '{name}' must be a positive int, but got {shown(value)}.")
    return int(value)


def divisor(owner: str, name: str, value: int, size: int, what: str) -> int:
    """A number that divides a size, which is told with the nearest that do."""
    if size % value:
        able = sorted((number for number in range(1, size + 1) if size % number == 0), key=lambda n: abs(n - value))
        raise ValueError(
            f"For '{owner}', '{name}' must divide {size}, {what}, but got {value}: the nearest that do are "
            f"{' and '.join(map(str, able[:2]))}."
        )
    return value


def int_from_zero(owner: str, name: str, value: Any) -> int:
    """An int from zero on, a seed for instance."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"For '{owner}', '{name}' must be an int from 0 on, but got {shown(value)}.")
    if value < 0:
        raise ValueError(f"For '{owner}', '{name}' must be an int from 0 on, but got {shown(value)}.")
    return int(value)


def boolean(owner: str, name: str, value: Any) -> bool:
    """A bool and nothing that merely looks like one."""
    if not isinstance(value, bool):
        raise TypeError(f"For '{owner}', '{name}' must be a bool, but got {shown(value)}.")
    return value


def choice(owner: str, name: str, value: Any, known: Sequence[str]) -> str:
    """One of a few names."""
    if not isinstance(value, str) or value not in known:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(
            f"For '{owner}', '{name}' must be one of {', '.join(known)}, but got {shown(value)}{near(value, known)}."
        )
    return value


def non_zero_number(owner: str, name: str, value: Any) -> float:
    """A finite int or float other than zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"For '{owner}', '{name}' must be an int or a float, but got {shown(value)}.")
    if value == 0 or not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"For '{owner}', '{name}' must be finite and not 0, but got {shown(value)}.")
    return value


def rate(owner: str, name: str, value: Any, *, allow_int: bool = False) -> float:
    """A probability in [0, 1). ``lora_dropout`` refuses ints, as documented; the prefix layers take them."""
    kinds = (int, float) if allow_int else (float,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"For '{owner}', '{name}' must be a float in [0, 1), but got {shown(value)}.")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"For '{owner}', '{name}' must be in [0, 1), but got {shown(value)}.")
    return float(value)


def float_type(owner: str, name: str, value: Any) -> Any:
    """One of float32, float16 and bfloat16."""
    if not any(value is kind or (isinstance(value, mstype.Type) and value == kind) for kind in FLOAT_TYPES):
        raise TypeError(
            f"For '{owner}', '{name}' must be mindspore.float32, mindspore.float16 or mindspore.bfloat16, "
            f"but got {shown(value)}."
        )
    return value


@ops.constexpr
def require_kernel(dtype: Any) -> None:
    """Refuse to multiply in a dtype that the device has no kernel for, before MindSpore fails with its own message."""
    if dtype == mstype.bfloat16 and _compat.device_target() == "CPU":
        raise TypeError(
            "'compute_dtype' is bfloat16, but MindSpore has no bfloat16 matrix product on a CPU: use float32 or "
            "float16 here, or select another device with mindspore.set_device."
        )


def init_value(
    owner: str, name: str, value: Any, shape: tuple[int, ...] | None = None, *, names_only: bool = False
) -> Any:
    """What ``mindspore.common.initializer.initializer`` takes; a Tensor must already have the shape."""
    kinds = (str, Initializer) if names_only else (Tensor, str, Initializer, numbers.Number)
    if isinstance(value, bool) or not isinstance(value, kinds):
        allowed = "a str or an Initializer" if names_only else "a Tensor, a str, an Initializer or a number"
        raise TypeError(f"For '{owner}', '{name}' must be {allowed}, but got {shown(value)}.")
    if isinstance(value, str):
        known = _compat.initializer_names()
        if value.lower() not in known:
            raise ValueError(
                f"For '{owner}', '{name}' must be one of {', '.join(sorted(known))}, "
                f"but got {shown(value)}{near(value, known)}."
            )
    if isinstance(value, Tensor) and shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"For '{owner}', '{name}' must have shape {tuple(shape)}, but got a Tensor of shape {tuple(value.shape)}."
        )
    return value


def activation_kind(owner: str, name: str, value: Any) -> Any:
    """A str, a Cell, a Primitive or None."""
    if value is not None and not isinstance(value, (str, nn.Cell, Primitive)):
        raise TypeError(f"For '{owner}', '{name}' must be a str, a Cell, a Primitive or None, but got {shown(value)}.")
    return value


def table(owner: str, name: str, value: Any) -> Mapping[str, Any]:
    """A mapping whose keys are str."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"For '{owner}', '{name}' must be a mapping from str, but got {shown(value)}.")
    return value


def string(owner: str, name: str, value: Any) -> str:
    """A str."""
    if not isinstance(value, str):
        raise TypeError(f"For '{owner}', '{name}' must be a str, but got {shown(value)}.")
    return value


def cell(owner: str, name: str, value: Any) -> nn.Cell:
    """A Cell."""
    if not isinstance(value, nn.Cell):
        raise TypeError(f"For '{owner}', '{name}' must be a mindspore.nn.Cell, but got {shown(value)}.")
    return value
