"""A network by Hugging Face's names, and the parameters of it that an adapter of PEFT holds whole."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Parameter, nn
from mindspore import dtype as mstype

from mindpet import _checks, _compat
from mindpet.graph.inject import MARKER
from mindpet.graph.targets import cells_by_path
from mindpet.interop.peft_config import bias_of, named_modules, saved_whole
from mindpet.models.loading import hugging_face_name, is_transposed

Names = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True)
class Modules:
    """A network by Hugging Face's names.

    Attributes:
        cells: module path to (path here, Cell).
        parameters: tensor name to (path here, Parameter), without those that a method added.
        transposed: names of tensors that are ``(in, out)`` there, where the network says so.
    """

    cells: dict[str, tuple[str, nn.Cell]]
    parameters: dict[str, tuple[str, Parameter]]
    transposed: frozenset[str]

    @classmethod
    def of(cls, network: nn.Cell, names: Names | None) -> "Modules":
        cells: dict[str, tuple[str, nn.Cell]] = {}
        parameters: dict[str, tuple[str, Parameter]] = {}
        for path, cell in {"": network, **cells_by_path(network)}.items():
            if MARKER in path:
                continue
            module = _renamed(path, names)
            if module in cells:
                raise ValueError(f"'names' calls both {cells[module][0]!r} and {path!r} {module!r}.")
            cells[module] = (path, cell)
            for name, parameter in _compat.own_parameters(cell).items():
                if MARKER not in name:
                    tensor = hugging_face_name(f".{name}")[1:]
                    parameters[f"{module}.{tensor}".strip(".")] = (f"{path}.{name}".strip("."), parameter)
        transposed = frozenset(name for name, (path, _) in parameters.items() if is_transposed(network, path))
        return cls(cells, parameters, transposed)


def _renamed(path: str, names: Names | None) -> str:
    """The Hugging Face path of a cell; an entry of a mapping also holds for what lies below it."""
    if names is None or not path:
        return path
    if not isinstance(names, Mapping):
        return _checks.string("names", f"names({path!r})", names(path))
    head, tail = path, ""
    while head and head not in names:
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return f"{names[head]}{tail}" if head else path


def shape_there(cell: nn.Cell, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a parameter of this cell has in torch: kernels of Conv1d have an axis of 1 more here."""
    return (*shape[:2], *shape[3:]) if isinstance(cell, nn.Conv1d) and len(shape) == 4 else tuple(shape)


def as_array(cell: nn.Cell, parameter: Parameter) -> np.ndarray:
    """The numbers in torch's shape; bfloat16 is widened to float32, which NumPy has."""
    value = parameter.astype(mstype.float32) if parameter.dtype == mstype.bfloat16 else parameter
    return value.asnumpy().reshape(shape_there(cell, parameter.shape))


def fits(name: str, value: np.ndarray, shape: tuple[int, ...], dtype: Any, problems: list[str]) -> bool:
    """Whether a tensor has that shape and stays finite in that dtype."""
    if value.shape != tuple(shape):
        problems.append(f"misshaped: {name} is {value.shape} in the file, {tuple(shape)} here")
        return False
    with np.errstate(over="ignore"):
        held = value.astype(np.float16 if dtype == mstype.float16 else np.float32)
    if not np.isfinite(held).all():
        problems.append(f"{name} holds NaN or infinity" + (" in float16" if dtype == mstype.float16 else ""))
    return True


def without_marks(name: str, value: np.ndarray, whole: dict[str, np.ndarray]) -> None:
    """Put a tensor of the base model into `whole` under the name that it has without PEFT's wrappers."""
    if ".modules_to_save." in name:  # with bias="all" a saved head is there under its other names as well
        whole.setdefault(name.replace(".modules_to_save.", "."), value)
    elif ".original_module." not in name:
        whole[name.replace(".base_layer.", ".")] = value


def module_targets(adapted: list[str], modules: Modules) -> list[str]:
    """The last names, if they mean these modules and no other, else the whole paths."""
    last = sorted({module.rpartition(".")[2] for module in adapted})
    return last if named_modules({"target_modules": last}, modules.cells) == set(adapted) else adapted


def read_whole(
    whole: dict[str, np.ndarray], modules: Modules, problems: list[str], fan_in_fan_out: bool = False
) -> dict[str, np.ndarray]:
    """The values of parameters of the base network, by their paths here."""
    values = {}
    for name, value in whole.items():
        if name not in modules.parameters:
            problems.append(f"unexpected in the file: {name}{_checks.near(name, modules.parameters)}")
            continue
        path, parameter = modules.parameters[name]
        cell = modules.cells[name.rpartition(".")[0]][1]
        shape, turned = shape_there(cell, parameter.shape), name in modules.transposed
        if not fits(name, value, shape[::-1] if turned else shape, parameter.dtype, problems):
            continue
        known = modules.transposed or not fan_in_fan_out
        if not known and value.ndim == 2 and value.shape[0] == value.shape[1]:
            problems.append(f"{name} is square, and with fan_in_fan_out it may be transposed or not")
        values[path] = value.T if turned else value
    return values


def unexpected(module: str, cell: nn.Cell | None, modules: Modules, method: str) -> str:
    """The problem of tensors for a module that is not there, or that the method does not adapt."""
    if cell is None:
        return f"unexpected in the file: {module} is no module of this network{_checks.near(module, modules.cells)}"
    return f"unexpected in the file: {module} is a {type(cell).__name__}, not for {method}"


def missing_whole(
    content: Mapping[str, Any], whole: Collection[str], adapted: Collection[str], modules: Modules
) -> list[str]:
    """The parameters that ``modules_to_save`` and ``bias`` announce and the file does not hold."""
    saved = {module for module in modules.cells if saved_whole(content, module)}
    which, missing = bias_of(content), []
    for name in modules.parameters:
        module = name.rpartition(".")[0]
        below = module not in adapted and any(f"{module}.".startswith(f"{one}.") for one in saved)
        bias = which == "all" or (which == "lora_only" and module in adapted)
        if name not in whole and (below or (bias and _is_bias(name))):
            missing.append(f"missing in the file: {name}")
    return missing


def trained_whole(
    modules: Modules, adapted: Collection[str], problems: list[str]
) -> tuple[str, list[str], dict[str, np.ndarray]]:
    """What trains without being a delta: PEFT's ``bias``, its ``modules_to_save``, and the tensors to write.

    A module of which anything but the bias trains is saved whole. PEFT saves all biases, or those of adapted modules.
    """
    owned: dict[str, set[str]] = {}
    for name in modules.parameters:
        owned.setdefault(name.rpartition(".")[0], set()).add(name)
    saved: list[str] = []
    biases: set[str] = set()
    for module, names in owned.items():
        trains = {name for name in names if modules.parameters[name][1].requires_grad}
        others = {name for name in trains if not _is_bias(name)}
        if module in adapted:
            problems += [f"{name} trains beside its LoRA: freeze it (mindpet.graph.freeze_delta)" for name in others]
            biases |= trains
        elif others or (trains and trains == names):
            saved.append(module)
        else:
            biases |= trains
    if "" in saved:
        problems.append(f"{', '.join(sorted(owned['']))} belongs to no module, and PEFT saves modules")
    owners = {name.rpartition(".")[0] for name in biases}
    bias = "none" if not biases else "lora_only" if owners <= set(adapted) else "all"
    kept = {name for module in saved for name in owned[module]}
    kept |= {
        name
        for name in modules.parameters
        if _is_bias(name) and (bias == "all" or (bias == "lora_only" and name.rpartition(".")[0] in adapted))
    }
    cells = {name: modules.cells[name.rpartition(".")[0]][1] for name in kept}
    values = {name: as_array(cells[name], modules.parameters[name][1]) for name in kept}
    return bias, saved, {name: value.T if name in modules.transposed else value for name, value in values.items()}


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"
