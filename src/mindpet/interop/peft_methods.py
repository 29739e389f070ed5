"""The methods whose record says how PEFT writes them: a tensor ``base_model.model.<module>.<part>`` a parameter."""

from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from mindspore import Parameter, nn

from mindpet.delta.method import DeltaConfig, Method, PeftNames, RankedConfig, too_long
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
    unexpected,
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
    if names.selected:
        return _read_selected(method, content, tensors, modules, problems)
    if names.unpack is not None:
        tensors = names.unpack(content, tensors)
    parts, whole, shared = _sorted_out(names, tensors, problems)
    values: dict[str, np.ndarray] = {}
    targets: dict[str, str] = {}  # path here to module
    for module, found in parts.items():
        path, cell = modules.cells.get(module, ("", None))
        if not isinstance(cell, tuple(method.adapt)):
            problems.append(unexpected(module, cell, modules, method.name))
            continue
        targets[path] = module
        for part, value in found.items():
            values[f"{path}.{names.tensors[part]}"] = value.T if part in names.turned else value
    if targets:
        first = next(path for module, (path, _) in modules.cells.items() if targets.get(path) == module)
        values |= {f"{first}.{names.shared[part]}": value for part, value in shared.items()}
    else:
        problems.append(f"there is no tensor of {method.name} in the file")
    if content.get("save_projection") is not False:  # else they are what the seed gives
        problems += [f"missing in the file: {part}" for part in names.shared if part not in shared]
    kept = read_whole(whole, modules, problems, bool(content.get("fan_in_fan_out")))
    values |= kept
    problems += peft_config.promised(content, parts, modules.cells, tuple(method.adapt), method.name)
    problems += missing_whole(content, whole, parts, modules)
    if names.topmost:
        able: list[str] = _able(method, modules)
        count: Any = content.get(names.topmost)
        known = type(count) is int and 0 < count <= len(able)
        meant = able[-count:] if known else list(parts)
        if not known:
            problems.append(f"{names.topmost} is {count!r}, and must be from 1 to {len(able)} for this network")
        problems += [f"missing in the file: {method.name} of {module}" for module in meant if module not in parts]
        problems += [
            f"unexpected in the file: {module} is not one of the topmost {count}"
            for module in parts
            if module in able and module not in meant
        ]
    options = {ours: content[key] for key, ours in names.options.items() if content.get(key) is not None}
    for key, ours in names.modules.items():
        ends = content.get(key)
        options[ours] = tuple(path for path, module in targets.items() if peft_config.ends_with(ends, module))
    for option in ("rank", "alpha") if issubclass(method.config, RankedConfig) else ():
        table = content.get(f"{option}_pattern")
        there = {path: peft_config.at_end(table, module, None) for path, module in targets.items()}
        options[f"{option}_pattern"] = {path: value for path, value in there.items() if value is not None}
    try:
        config = method.config(**options, targets=tuple(targets) or None, modules_to_save=tuple(kept))
    except (TypeError, ValueError) as error:
        problems.append(str(error))
        return None, {}
    problems += too_long(config, tensors)
    return config, values


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
        if path not in values and path.rpartition(".")[2] not in _names(method).shared.values()
    ]


def write_method(
    method: Method, network: nn.Cell, modules: Modules, problems: list[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors of every injected layer."""
    names = _names(method)
    if names.selected:
        return _write_selected(method, modules, problems)
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
    for ours in names.shared.values():
        if len({id(getattr(cell, ours)) for _, cell in adapted.values()}) > 1:
            problems.append(f"{ours} is not one and the same for all layers, as it is in PEFT: inject them in one call")
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
    for key, ours in names.modules.items():
        chosen = [module for module, (path, _) in adapted.items() if getattr(configs[path], ours)]
        content[key] = _ends_of(chosen, content["target_modules"])
        if {m for m in adapted if peft_config.ends_with(content[key], m)} != set(chosen):
            content["target_modules"], content[key] = list(adapted), chosen
    if names.topmost:
        content[names.topmost] = len(adapted)
        if list(adapted) != _able(method, modules)[-len(adapted) :]:
            problems.append(f"PEFT's {names.kind} is in the topmost layers, and here there are others: {list(adapted)}")
    if bias != "none":
        content["bias"] = bias
    for key in names.lacks:
        if key in content and (value := content.pop(key)) is not None:
            problems.append(f"{key} would be {value}, and PEFT's {names.kind} has none")
    for option in ranked:
        here = {module: getattr(configs[path], option) for module, (path, _) in adapted.items()}
        content[f"{option}_pattern"] = peft_config.shortest_pattern(here, getattr(first, option))
    if names.pack is not None:
        try:
            tensors = names.pack(content, tensors)
        except ValueError as error:
            problems.append(str(error))
    return content, tensors


def _able(method: Method, modules: Modules) -> list[str]:
    """The modules that it could be in, in the order of the network."""
    return [module for module, (_, cell) in modules.cells.items() if isinstance(cell, tuple(method.adapt))]


def _names(method: Method) -> PeftNames:
    assert method.peft is not None  # only such methods come here
    return method.peft


def _read_selected(
    method: Method, content: dict[str, Any], tensors: dict[str, np.ndarray], modules: Modules, problems: list[str]
) -> tuple[DeltaConfig | None, dict[str, np.ndarray]]:
    """As :func:`read_method`, for a method that trains parameters of the network: they are in the file whole."""
    mark = f".{_names(method).selected}."
    chosen = {key.removeprefix(_MODEL).replace(mark, "."): value for key, value in tensors.items() if mark in key}
    others = {key: value for key, value in tensors.items() if mark not in key}
    _, whole, _ = _sorted_out(_names(method), others, problems)
    found = {name.rpartition(".")[0] for name in chosen}
    for name, (path, _) in modules.parameters.items():
        if name in chosen and not _trains(method, path):
            problems.append(f"unexpected in the file: {name} is not for {method.name}")
        elif name not in chosen and name.rpartition(".")[0] in found:
            problems.append(f"missing in the file: {name}")
    if not chosen:
        problems.append(f"there is no tensor of {method.name} in the file")
    values, kept = read_whole(chosen, modules, problems), read_whole(whole, modules, problems)
    problems += peft_config.promised(content, found, modules.cells, (nn.Cell,), method.name)
    problems += missing_whole(content, whole, found, modules)
    targets = tuple(dict.fromkeys(path.rpartition(".")[0] for path in values))
    return method.config(targets=targets or None, modules_to_save=tuple(kept)), values | kept


def _write_selected(
    method: Method, modules: Modules, problems: list[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """As :func:`write_method`, for such a method: the modules all of whose own parameters it trains, whole."""
    bias, saved, kept = trained_whole(modules, (), problems)
    others = {name.rpartition(".")[0] for name, (path, _) in modules.parameters.items() if not _trains(method, path)}
    chosen = [module for module in saved if module not in others]
    if bias != "none":
        problems.append(f"biases train beside {method.name}, which PEFT's has no place for")
    tensors = {}
    for name, value in kept.items():
        module, _, last = name.rpartition(".")
        tensors[f"{_MODEL}{module}.{_names(method).selected + '.' if module in chosen else ''}{last}"] = value
    content = {
        "peft_type": _names(method).kind,
        "target_modules": module_targets(chosen, modules),
        "modules_to_save": [module for module in saved if module not in chosen] or None,
    }
    return content, tensors


def _trains(method: Method, path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in method.trainable)


def _ends_of(chosen: list[str], entries: list[str]) -> list[str]:
    """Those of the entries, ends of paths of modules, that mean one of these modules."""
    return [entry for entry in entries if any(peft_config.ends_with([entry], module) for module in chosen)]


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
        elif name.rpartition(".")[2] in names.shared:  # a copy beside a module, which PEFT has of some
            shared.setdefault(name.rpartition(".")[2], value)
        elif part is not None:
            parts.setdefault(name.removesuffix(f".{part}"), {})[part] = value
        else:
            without_marks(name, value, whole)
    return parts, whole, shared


def _delta_parameters(network: nn.Cell) -> dict[str, Parameter]:
    return {p.name: p for p in network.get_parameters() if MARKER in p.name}


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
