"""The methods whose record says how PEFT writes them: a tensor ``base_model.model.<module>.<part>`` a parameter."""

from typing import Any

import numpy as np
from mindspore import Parameter, nn

from mindpet import _checks
from mindpet.delta.method import DeltaConfig, Method, PeftNames, RankedConfig
from mindpet.delta.registry import METHODS
from mindpet.graph.inject import MARKER, injections
from mindpet.interop import peft_config
from mindpet.interop.peft_modules import (
    Modules,
    as_array,
    fits,
    missing_whole,
    module_targets,
    read_whole,
    trained_whole,
    without_marks,
)

_MODEL = "base_model.model."
_SHARED = "base_model."


def method_of_kind(kind: str) -> Method | None:
    """The method that a ``peft_type`` means, of those whose record says how it is written."""
    return next((one for one in METHODS.values() if one.peft is not None and one.peft.kind == kind), None)


def read_method(
    method: Method, content: dict[str, Any], tensors: dict[str, np.ndarray], modules: Modules, problems: list[str]
) -> tuple[DeltaConfig | None, dict[str, np.ndarray]]:
    """The configuration, and the value of every parameter by its path after the injection.

    Which parameters there are, and their shapes, shows when it is injected.
    """
    names = _names(method)
    parts, whole, shared = _sorted_out(names, tensors, problems)
    values: dict[str, np.ndarray] = {}
    targets: dict[str, str] = {}  # path here to module
    for module, found in parts.items():
        path, cell = modules.cells.get(module, ("", None))
        if not isinstance(cell, tuple(method.adapt)):
            what = "no module of this network" if cell is None else f"a {type(cell).__name__}, not for {method.name}"
            problems.append(f"unexpected in the file: {module} is {what}{_checks.near(module, modules.cells)}")
            continue
        targets[path] = module
        for part, value in found.items():
            values[f"{path}.{names.tensors[part]}"] = value.T if part in names.turned else value
    if targets:
        values |= {f"{next(iter(targets))}.{names.shared[part]}": value for part, value in shared.items()}
    else:
        problems.append(f"there is no tensor of {method.name} in the file")
    kept = read_whole(whole, modules, problems, bool(content.get("fan_in_fan_out")))
    values |= kept
    problems += peft_config.promised(content, parts, modules.cells, tuple(method.adapt), method.name)
    problems += missing_whole(content, whole, parts, modules)
    options = {ours: content[key] for key, ours in names.options.items() if content.get(key) is not None}
    for option in ("rank", "alpha") if issubclass(method.config, RankedConfig) else ():
        table = content.get(f"{option}_pattern")
        there = {path: peft_config.at_end(table, module, None) for path, module in targets.items()}
        options[f"{option}_pattern"] = {path: value for path, value in there.items() if value is not None}
    try:
        return method.config(**options, targets=tuple(targets) or None, modules_to_save=tuple(kept)), values
    except (TypeError, ValueError) as error:
        problems.append(str(error))
        return None, {}


def misfits(network: nn.Cell, method: Method, values: dict[str, np.ndarray]) -> list[str]:
    """What the file has and the injected network has not, the reverse, and shapes that differ.

    Values take the shape of their parameters where they differ in axes of size 1 alone.
    """
    problems: list[str] = []
    names = {ours: theirs for theirs, ours in (*_names(method).tensors.items(), *_names(method).shared.items())}
    parameters = _delta_parameters(network)
    for path in [path for path in values if MARKER in path]:
        last = names[path.rpartition(".")[2]]
        if path not in parameters:
            problems.append(f"unexpected in the file: {last} of {path.rpartition('.')[0]}")
            continue
        parameter = parameters[path]
        if _squeezed(values[path].shape) == _squeezed(parameter.shape):
            values[path] = values[path].reshape(parameter.shape)
        fits(f"{last} of {path.rpartition('.')[0]}", values[path], parameter.shape, parameter.dtype, problems)
    return problems + [
        f"missing in the file: {names.get(path.rpartition('.')[2], path)} of {path.rpartition('.')[0]}"
        for path in parameters
        if path not in values
    ]


def write_method(
    method: Method, network: nn.Cell, modules: Modules, problems: list[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors of every injected layer."""
    names = _names(method)
    own = [one for one in injections(network) if isinstance(one.config, method.config)]
    configs = {path: one.config.at(path) for one in own for path in one.adapted}
    adapted = {m: at for m, at in modules.cells.items() if getattr(at[1], "delta_method", None) == method.name}
    by_hand = [path for path, _ in adapted.values() if path not in configs]
    if by_hand:
        problems.append(f"{', '.join(by_hand)}: placed by hand, so the options of {method.name} are not known")
        return {}, {}
    bias, saved, kept = trained_whole(modules, adapted, problems)
    tensors: dict[str, np.ndarray] = {}
    for module, (_, cell) in adapted.items():
        for part, ours in names.tensors.items():
            if getattr(cell, ours, None) is not None:
                value = as_array(cell, getattr(cell, ours))
                tensors[f"{_MODEL}{module}.{part}"] = value.T if part in names.turned else value
        for part, ours in names.shared.items():
            tensors.setdefault(f"{_SHARED}{part}", as_array(cell, getattr(cell, ours)))
    for name, value in kept.items():
        module, _, last = name.rpartition(".")
        tensors[f"{_MODEL}{module}{'.base_layer' if module in adapted else ''}.{last}"] = value
    first = own[0].config
    ranked = ("rank", "alpha") if isinstance(first, RankedConfig) else ()
    for ours in names.options.values():
        values = {getattr(one.config, ours) for one in own}
        if len(values) > 1 and ours not in ranked:
            problems.append(f"{ours} is {' and '.join(map(repr, values))}, and PEFT has one for all modules")
    content: dict[str, Any] = {
        "peft_type": names.kind,
        **{key: getattr(first, ours) for key, ours in names.options.items()},
        **names.fixed,
        "target_modules": module_targets(list(adapted), modules),
        "modules_to_save": saved or None,
    }
    if bias != "none":
        content["bias"] = bias
    for option in ranked:
        here = {module: getattr(configs[path], option) for module, (path, _) in adapted.items()}
        content[f"{option}_pattern"] = peft_config.shortest_pattern(here, getattr(first, option))
    return content, tensors


def _names(method: Method) -> PeftNames:
    assert method.peft is not None  # only such methods come here
    return method.peft


def _sorted_out(
    names: PeftNames, tensors: dict[str, np.ndarray], problems: list[str]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The method's tensors by module and part, the base model's by name there, and those that modules share."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    shared: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        name = key.removeprefix(_MODEL)
        part = next((part for part in names.tensors if name.endswith(f".{part}")), None)
        if key.removeprefix(_SHARED) in names.shared:
            shared[key.removeprefix(_SHARED)] = value
        elif name == key:
            problems.append(f"unexpected in the file: {key}")
        elif part is not None:
            parts.setdefault(name.removesuffix(f".{part}"), {})[part] = value
        else:
            without_marks(name, value, whole)
    return parts, whole, shared


def _delta_parameters(network: nn.Cell) -> dict[str, Parameter]:
    return {p.name: p for p in network.get_parameters() if MARKER in p.name}


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
