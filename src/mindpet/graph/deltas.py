"""A tuned network's deltas: as directories, and several of them on one network.

``delta.safetensors`` has the numbers and, in its metadata, what to inject and what the base network looked like;
``delta.json`` repeats the latter for people and tools.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet import _checks, _compat, _files, _near
from mindpet.delta.blockwise import digest_of
from mindpet.delta.method import DeltaConfig, too_long
from mindpet.delta.registry import method_named, method_of
from mindpet.graph.inject import (
    MARKER,
    Injection,
    eject,
    injections,
    let_go,
    put_in,
    quantised_cells,
    require_in_place,
)

FORMAT = 1
OURS = "mindpet_"  # in the names of all parameters that are no part of the base
_RECORD = "mindpet_deltas"  # the attribute of a network that holds the deltas loaded by name
_PARTS: dict[str, Callable[[Any], bool]] = {  # of a description, and what each must be
    "methods": lambda value: isinstance(value, list) and all(isinstance(entry, dict) for entry in value),
    "parameters": lambda value: value is None or _is_names(value),
    "quantised": lambda value: value is None or _is_names(value),
    "base": lambda value: value is None or (isinstance(value, dict) and all(map(_is_shape, value.values()))),
}
_OLDER = {"mindpet_delta_lora_A": "mindpet_delta_lora_a", "mindpet_delta_lora_B": "mindpet_delta_lora_b"}


class DeltaFileError(ValueError):
    """A delta directory is missing, broken, or does not fit the network."""


def save_delta(network: nn.Cell, directory: str | Path, hash_weights: bool = False) -> None:
    """Write the parameters of what was injected, and what else trains, and how to inject them again.

    Args:
        network: with its delta, not merged.
        directory: made if it is missing.
        hash_weights: also keep a hash of the base weights, so that loading notices a base of the same shape but with
            other numbers. It takes about a second for each gigabyte.

    Raises:
        TypeError: `network` is not a Cell.
        ValueError: nothing in it trains; its delta is merged.
    """
    require_in_place("save_delta", network)
    tensors = {parameter.name: parameter.asnumpy() for parameter in delta_parameters(network)}
    if not tensors:
        raise ValueError("Nothing in this network trains, so there is no delta to save.")
    methods = []
    for one in injections(network):
        entry = {"method": method_of(one.config).name, **dataclasses.asdict(one.config.stored())}
        methods.append({**entry, "targets": list(one.adapted), "exclude": [], "layers": None} if one.adapted else entry)
    base, quantised = _base_of(network), quantised_cells(network)
    digests = {name: cell.base_digest for name, cell in quantised.items()}
    description = {
        "format": FORMAT,
        "methods": methods,
        "parameters": sorted(tensors),
        "base": {name: list(shape) for name, shape in _shapes_of(base, quantised).items()},
        "base_hash": _hash_of(base, digests) if hash_weights else None,
    }
    if quantised:
        description["quantised"] = sorted(quantised)
    write_delta(directory, description, tensors)


def delta_parameters(network: nn.Cell) -> list[Parameter]:
    """What makes up the delta of a network: what was injected, frozen or not, and whatever else trains."""
    whole = {id(parameter) for one in injections(network) for parameter, _ in one.values}
    return [p for p in network.get_parameters() if p.requires_grad or id(p) in whole or MARKER in p.name]


def write_delta(directory: str | Path, description: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """The two files of a delta, each whole. The first has everything; ``delta.json`` is a copy for people and tools."""
    _files.write_tensors(Path(directory) / "delta.safetensors", tensors, {"delta": json.dumps(description)})
    _files.write_json(Path(directory) / "delta.json", description)


def read_delta(directory: str | Path) -> tuple[dict[str, Any], list[DeltaConfig], dict[str, np.ndarray]]:
    """(description, configurations, tensors) of a delta directory.

    Raises:
        DeltaFileError: a file is missing or broken.
    """
    path = Path(directory) / "delta.safetensors"
    if not os.path.isfile(path):
        inner = _files.delta_of_a_run(directory)
        hint = f"; there is one in {inner}" if inner else _near.beside(Path(directory))
        raise DeltaFileError(f"There is no file {path}{hint}.")
    tensors, metadata = _files.read_tensors(path, DeltaFileError)
    try:
        description = _files.parse_json(metadata["delta"])
        known = description["format"]
        wrong = [key for key, fits in _PARTS.items() if not fits(description.get(key))]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DeltaFileError(f"{path} is not a delta: its metadata has no usable description ({error}).") from error
    if known != FORMAT:
        shown = _checks.shown(known) if type(known) is not int else known
        raise DeltaFileError(f"{path} is a delta of format {shown}, and this version reads format {FORMAT}.")
    if wrong:
        shown = ", ".join(f"{key} is {_checks.shown(description.get(key))}" for key in wrong)
        raise DeltaFileError(f"{path} is not a delta: its metadata has no usable description ({shown}).")
    differ = sorted(set(description.get("parameters") or tensors) ^ set(tensors))
    if differ:
        raise DeltaFileError(f"{path} does not hold what it says: {', '.join(differ[:5])}.")
    configs = [_config_of(dict(entry), path) for entry in description["methods"]]
    problems = [problem for config in configs for problem in too_long(config, tensors)]
    if problems:
        raise DeltaFileError(f"{path} is broken: {'; '.join(problems)}.")
    return description, configs, tensors


def load_delta(network: nn.Cell, directory: str | Path, name: str = "default") -> nn.Cell:
    """Put a saved delta into a network: inject what the directory says, unless that is done, and set the numbers.

    Several deltas may be loaded under several names; the last one loaded is in force until :func:`use` says otherwise.
    A LoRA of a lower rank than the network's, or of another alpha, is fitted in exactly.

    Args:
        network: the network that the delta was trained on.
        directory: what :func:`save_delta` wrote; or one ``.ckpt`` or ``.safetensors`` file of trainable parameters, as
            :class:`TrainableParamsCheckPoint` and MindPet 1.0.4 write them, for a network that has the layers already.
        name: how to call it later.

    Returns:
        The same network.

    Raises:
        TypeError: `network` is not a Cell.
        DeltaFileError: a file is missing or broken; the base is another one; names or shapes do not fit. All problems
            are in one message, and the network is unchanged.
    """
    require_in_place("load_delta", network)
    _checks.string("load_delta", "name", name)
    directory = Path(directory)
    if directory.suffix in (".ckpt", ".safetensors"):
        tensors = _read_checkpoint(directory)
        _require(_misfits(network, tensors, complete=False), directory)
        return _keep(network, name, tensors)
    description, configs, tensors = read_delta(directory)
    _require(_other_base(network, description), directory)
    present = injections(network)
    if not present:
        try:
            for config in configs:
                put_in(network, config)
        except (ValueError, TypeError) as error:
            if injections(network):
                eject(network)
            raise DeltaFileError(f"The delta in {directory} cannot be injected into this network: {error}") from error
    elif sorted(type(one.config).__name__ for one in present) != sorted(type(config).__name__ for config in configs):
        names = [
            " and ".join(method_of(c).name for c in group) or "none"
            for group in (configs, [one.config for one in present])
        ]
        raise DeltaFileError(f"The delta in {directory} is of {names[0]}, the network has {names[1]}.")
    else:
        try:
            for one, there in _paired(injections(network), configs):
                mine = {n: v for n, v in tensors.items() if n.startswith(tuple(f"{path}." for path in one.adapted))}
                tensors = {**tensors, **method_of(there).fit(one.config, there, mine)}
        except ValueError as error:
            raise DeltaFileError(f"The delta in {directory} does not fit this network: {error}.") from error
    own = {parameter.name for parameter in delta_parameters(network)}
    misfits = _misfits(network, tensors, complete=bool(configs))
    if configs:
        known = {parameter.name for parameter in network.get_parameters()}
        misfits += [f"not part of this network's delta: {n}" for n in tensors if n in known and n not in own]
    if misfits and not present and injections(network):
        eject(network)
    _require(misfits, directory)
    let_go(network)  # not before: now it stays in
    return _keep(network, name, tensors)


def use(network: nn.Cell, name: str) -> nn.Cell:
    """Put the delta of that name in force. What was trained under the present name is kept for the way back.

    Nothing is compiled anew: only numbers change.

    Raises:
        ValueError: no delta of that name was loaded.
    """
    require_in_place("use", network)
    deltas = loaded_deltas(network)
    if name not in deltas:
        raise ValueError(
            f"No delta is called {name!r}: there are {', '.join(deltas) or 'none'}{_checks.near(name, deltas)}."
        )
    return _keep(network, name, deltas[name])


def loaded_deltas(network: nn.Cell) -> dict[str, dict[str, np.ndarray]]:
    """The deltas loaded by name, the present one with the numbers that it has now."""
    record = vars(network).get(_RECORD, {"all": {}, "current": None})
    deltas = dict(record["all"])
    if record["current"] is not None:
        deltas[record["current"]] = {p.name: p.asnumpy().copy() for p in delta_parameters(network)}
    return deltas


def _keep(network: nn.Cell, name: str, tensors: dict[str, np.ndarray]) -> nn.Cell:
    """Remember the present numbers under the present name, then set `tensors` under `name`."""
    vars(network)[_RECORD] = {"all": {**loaded_deltas(network), name: tensors}, "current": name}
    parameters = {parameter.name: parameter for parameter in network.get_parameters()}
    for parameter_name, value in tensors.items():
        parameter = parameters[parameter_name]
        _compat.set_value(parameter, Tensor(np.ascontiguousarray(value)))
    return network


def _misfits(network: nn.Cell, tensors: dict[str, np.ndarray], complete: bool) -> list[str]:
    parameters = {parameter.name: parameter for parameter in network.get_parameters()}
    problems = [
        f"not in this network: {name}{_checks.near(name, parameters)}" for name in tensors if name not in parameters
    ]
    problems += [
        f"{name}: the file has shape {value.shape}, the network {tuple(parameters[name].shape)}"
        for name, value in tensors.items()
        if name in parameters and tuple(parameters[name].shape) != value.shape
    ]
    problems += [
        f"{name}: it holds NaN or infinity, or numbers too large for the network's {parameters[name].dtype}"
        for name, value in tensors.items()
        if name in parameters and not _representable(value, parameters[name].asnumpy().dtype)
    ]
    if complete:
        problems += [f"not in the file: {p.name}" for p in delta_parameters(network) if p.name not in tensors]
    return problems


def _representable(value: np.ndarray, dtype: Any) -> bool:
    if not np.issubdtype(value.dtype, np.floating) or not np.issubdtype(dtype, np.floating):
        return True
    with np.errstate(over="ignore"):
        return bool(np.isfinite(value.astype(dtype)).all())


def _paired(present: list[Injection], configs: list[DeltaConfig]) -> list[tuple[Injection, DeltaConfig]]:
    """Each injection with the saved configuration of the same cells, or else with the next one of its method."""
    left, pairs = list(configs), []
    for one in present:
        same = [each for each in left if type(each) is type(one.config)]
        exact = [each for each in same if each.targets and set(each.targets) == set(one.adapted)]
        chosen = (exact or same)[0]
        left = [each for each in left if each is not chosen]
        pairs.append((one, chosen))
    return pairs


def _other_base(network: nn.Cell, description: dict[str, Any]) -> list[str]:
    """How the base of this network differs from the one that the delta was trained on."""
    recorded = description.get("base")
    if not isinstance(recorded, dict):
        return []
    trained = set(description.get("parameters") or ())
    base = {p.name: p for p in network.get_parameters() if OURS not in p.name and p.name not in trained}
    cells = quantised_cells(network)
    here = {name: list(shape) for name, shape in _shapes_of(base, cells).items()}
    if recorded and here and not recorded.keys() & here.keys():
        return [
            f"it was trained on another network, which had {len(recorded)} weights ({next(iter(recorded))}, ...); this "
            f"{type(network).__name__} has {len(here)} ({next(iter(here))}, ...), none of the same name"
        ]
    problems = [f"the base it was trained on had {name}" for name in recorded if name not in here]
    problems += [f"the base it was trained on had no {name}" for name in here if name not in recorded]
    problems += [
        f"{name}: the base it was trained on had shape {tuple(recorded[name])}, this one {tuple(shape)}"
        for name, shape in here.items()
        if name in recorded and recorded[name] != shape
    ]
    quantised = description.get("quantised") or ()
    if not problems and description.get("base_hash") and set(cells) <= set(quantised):  # else they cannot be compared
        digests = {name: cell.base_digest for name, cell in cells.items()}
        for name in quantised:
            if name in base:  # it is not quantised here, or not yet
                digests[name] = digest_of(base[name].asnumpy())
        present = {name: parameter for name, parameter in base.items() if name in recorded and name not in digests}
        if _hash_of(present, digests) != description["base_hash"]:
            problems.append("the base has the same shapes but other weights than the one it was trained on")
    return problems


def _base_of(network: nn.Cell) -> dict[str, Parameter]:
    delta = {id(parameter) for parameter in delta_parameters(network)}
    return {p.name: p for p in network.get_parameters() if id(p) not in delta and OURS not in p.name}


def _shapes_of(base: dict[str, Parameter], quantised: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of all weights of the base, those that are quantised among them."""
    return {name: tuple(p.shape) for name, p in base.items()} | {n: cell.base_shape for n, cell in quantised.items()}


def _hash_of(parameters: dict[str, Parameter], digests: dict[str, str]) -> str:
    """Of the weights of a base; of those that are quantised, the digests of what they were."""
    digest = hashlib.sha256()
    for name in sorted([*parameters, *digests]):
        digest.update(name.encode())
        known = digests.get(name)
        digest.update(known.encode() if known else np.ascontiguousarray(parameters[name].asnumpy()).tobytes())
    return digest.hexdigest()


def _require(problems: list[str], source: Path) -> None:
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise DeltaFileError(f"The delta in {source} does not fit this network:\n  " + "\n  ".join(shown))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(length) is int for length in value)


def _config_of(entry: dict[str, Any], path: Path) -> DeltaConfig:
    try:
        return method_named(entry.pop("method", "")).config(**entry)
    except (TypeError, ValueError) as error:
        raise DeltaFileError(f"{path}: {error}") from error


def _read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Tensors by the names that they have here: in a bare LoRADense MindPet 1.0.4 ended them in ``_A`` and ``_B``."""
    try:
        parameters = _compat.load_checkpoint(path)
    except ValueError as error:
        raise DeltaFileError(f"{str(error)[0].upper()}{str(error)[1:].rstrip('.')}.") from error
    counters = ("epoch_num", "step_num")
    return {_OLDER.get(name, name): value.asnumpy() for name, value in parameters.items() if name not in counters}
