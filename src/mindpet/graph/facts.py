"""What a Cell computes, as text: two Cells of which the same is told compile to the same graph."""

import hashlib
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.ops import Primitive

from mindpet import _compat
from mindpet.delta.prompt_slot import PromptSlot

_RECORDS = ("mindpet_injections", "mindpet_merged", "mindpet_suspended", "mindpet_deltas")  # compute nothing
_TRUSTED = ("mindspore", "mindpet")  # packages whose cells are told of in full
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum)


class NotKnown(Exception):
    """Something that a graph may depend on, and that cannot be told from one run to the next."""


class Facts:
    """Tells what is in a Cell, the same in every run; a parameter by its name.

    Raises:
        NotKnown: there is something in it that cannot be told from one run to the next.
    """

    def of_cell(self, cell: nn.Cell) -> Iterator[str]:
        """Its type, options, constants, flags and operators, and those of each Cell in it."""
        paths = {id(inner): path for path, inner in cell.cells_and_names()}
        for path, inner in cell.cells_and_names():
            if not _of(type(inner).__module__, *_TRUSTED):
                raise NotKnown(f"{type(inner).__name__} at {path!r} is a class of {type(inner).__module__}")
            flags = (inner.training, inner.get_flags(), _compat.is_recomputed(inner))
            if type(inner) is nn.Dropout and (inner.p == 0 or not inner.training):
                yield self.of((path, "drops nothing", flags))  # whatever its seeds
                continue
            hidden = _of_every_cell() | ({"words"} if isinstance(inner, PromptSlot) else set())
            own = {name: value for name, value in vars(inner).items() if name not in hidden}
            children = {name: paths[id(child)] for name, child in _compat.children(inner).items()}  # shared ones too
            held = _compat.own_parameters(inner), _compat.buffers_of(inner), _compat.named_primitives(inner)
            yield self.of((path, type(inner), flags, own, children, held))

    def of_parameter(self, parameter: Parameter) -> str:
        """Which one it is."""
        return f"Parameter {parameter.name}"

    def of_other(self, value: Any, why: str) -> str:
        """Something that is not told of."""
        raise NotKnown(why)

    def of(self, value: Any, depth: int = 0) -> str:
        """A value as text."""
        if depth > 8:
            return self.of_other(value, f"a {type(value).__name__} too deep to look into")
        deeper = depth + 1
        if isinstance(value, np.generic):
            return f"{value.dtype} {value!r}"
        if isinstance(value, (*_PLAIN, ms.Type, type(ms.float32))):
            return repr(value)
        if isinstance(value, Parameter):
            return self.of_parameter(value)
        if isinstance(value, (Tensor, np.ndarray)):
            array = value.asnumpy() if isinstance(value, Tensor) else value
            return f"{array.shape} {array.dtype} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__}({', '.join(self.of(each, deeper) for each in value)})"
        if isinstance(value, (set, frozenset)):
            return f"{{{', '.join(sorted(self.of(each, deeper) for each in value))}}}"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self.of(k, deeper)}: {self.of(v, deeper)}' for k, v in value.items())}}}"
        if isinstance(value, Primitive):
            return f"{type(value).__qualname__} {value.name} {self.of(_compat.arguments_of(value), deeper)}"
        if is_dataclass(value) and not isinstance(value, type):
            return f"{self.of(type(value))} {self.of([getattr(value, each.name) for each in fields(value)], deeper)}"
        if isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, nn.Cell):
            why = f"a {type(value).__name__} is in a list or in an attribute that MindSpore does not know of"
            return self.of_other(value, why)
        return self.of_object(value, deeper)

    def of_object(self, value: Any, depth: int) -> str:
        """Something whose class or name says what it does."""
        if _of(type(value).__module__, "mindspore"):
            return f"a {type(value).__qualname__}"
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Cell):
            return f"{type(value.__self__).__qualname__}.{self.of(value.__func__, depth)}"
        if isinstance(value, types.FunctionType) and _is_known(value):
            return f"{value.__module__}.{value.__qualname__}"
        return self.of_other(value, f"it holds a {type(value).__module__}.{type(value).__qualname__}")


def _is_known(function: types.FunctionType) -> bool:
    """Whether its name says all that it does: none of ours that remembers something."""
    ours = _of(function.__module__, *_TRUSTED) and not function.__closure__ and function.__name__ != "<lambda>"
    return ours or _of(function.__module__, "mindspore")


def _of(module: str, *packages: str) -> bool:
    return module.partition(".")[0] in packages


@cache
def _of_every_cell() -> frozenset[str]:
    """Attributes that every Cell has for MindSpore's own use."""
    starts = ("init_tensor", "cell_list")  # what an nn.Embedding was started with, an nn.SequentialCell's children
    of_compiling = ("arguments_key", "phase", "compile_phase", "current_phase", "sequence_modified")
    return frozenset((*vars(nn.Cell()), *_RECORDS, *starts, *of_compiling, "__parse_method__", "__compile_cell_hook__"))
