"""A tuned network's delta as a directory: ``delta.json`` says what to inject, ``delta.safetensors`` has the numbers."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, load_checkpoint, nn

from mindpet import _checks, _files
from mindpet.delta.method import DeltaConfig
from mindpet.delta.registry import method_named, method_of
from mindpet.graph.inject import inject, injections
from mindpet.graph.merge import merged_cells

FORMAT = 1


class DeltaFileError(ValueError):
    """A delta directory is missing, broken, or does not fit the network."""


def save_delta(network: nn.Cell, directory: str | Path) -> None:
    """Write the trainable parameters, and how to inject them again.

    Both files appear whole; ``delta.json`` comes last, so a directory that has it is complete.

    Raises:
        TypeError: `network` is not a Cell.
        ValueError: nothing in it trains.
    """
    _checks.cell("save_delta", "network", network)
    if merged_cells(network):
        raise ValueError("The deltas of this network are merged into its weights: unmerge them to save them.")
    tensors = {parameter.name: parameter.asnumpy() for parameter in network.trainable_params()}
    if not tensors:
        raise ValueError("Nothing in this network trains, so there is no delta to save.")
    directory = Path(directory)
    configs = [
        {"method": method_of(config).name, **dataclasses.asdict(config)}
        for config in (one.config for one in injections(network))
    ]
    _files.write_tensors(directory / "delta.safetensors", tensors, {"format": "ms"})
    _files.write_json(directory / "delta.json", {"format": FORMAT, "methods": configs, "parameters": sorted(tensors)})


def load_delta(network: nn.Cell, directory: str | Path) -> nn.Cell:
    """Put a saved delta into a network: inject what the directory says, unless that is done, and set the numbers.

    Args:
        network: the network that the delta was trained on.
        directory: what :func:`save_delta` wrote; or one ``.ckpt`` or ``.safetensors`` file of trainable parameters, as
            :class:`TrainableParamsCheckPoint` and MindPet 1.0.4 write them, for a network that has the layers already.

    Returns:
        The same network.

    Raises:
        TypeError: `network` is not a Cell.
        DeltaFileError: a file is missing or broken; names or shapes do not fit, all of them in one message.
    """
    _checks.cell("load_delta", "network", network)
    directory = Path(directory)
    if directory.suffix in (".ckpt", ".safetensors"):
        return _set_parameters(network, _read_checkpoint(directory), directory)
    description = _files.read_json(directory / "delta.json", DeltaFileError)
    tensors = _read_tensors(directory / "delta.safetensors")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise DeltaFileError(f"{directory / 'delta.json'} is not a delta of format {FORMAT}.")
    if not injections(network):
        for entry in description.get("methods", ()):
            inject(network, _config_of(dict(entry), directory))
    return _set_parameters(network, tensors, directory)


def _set_parameters(network: nn.Cell, tensors: dict[str, np.ndarray], source: Path) -> nn.Cell:
    parameters = {parameter.name: parameter for parameter in network.get_parameters()}
    problems = [f"not in this network: {name}" for name in tensors if name not in parameters]
    problems += [
        f"{name}: the file has shape {tensors[name].shape}, the network {tuple(parameters[name].shape)}"
        for name in tensors
        if name in parameters and tuple(parameters[name].shape) != tensors[name].shape
    ]
    problems += [
        f"not in the file: {parameter.name}"
        for parameter in network.trainable_params()
        if injections(network) and parameter.name not in tensors
    ]
    if problems:
        raise DeltaFileError(f"The delta in {source} does not fit this network:\n  " + "\n  ".join(problems))
    for name, value in tensors.items():
        parameters[name].set_data(Tensor(value).astype(parameters[name].dtype))
    return network


def _config_of(entry: dict[str, Any], directory: Path) -> DeltaConfig:
    try:
        config = method_named(entry.pop("method", "")).config
        return config(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
    except (TypeError, ValueError) as error:
        raise DeltaFileError(f"{directory / 'delta.json'}: {error}") from error


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise DeltaFileError(f"There is no file {path}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DeltaFileError(f"{path} cannot be read as safetensors: {error}") from error


def _read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Tensors by the names that they have here: in a bare LoRADense MindPet 1.0.4 ended them in ``_A`` and ``_B``."""
    if not path.is_file():
        raise DeltaFileError(f"There is no file {path}.")
    try:
        parameters = load_checkpoint(str(path), format=path.suffix[1:])
    except (ValueError, TypeError, RuntimeError) as error:
        raise DeltaFileError(f"{path} cannot be read as a checkpoint: {error}") from error
    older = {"mindpet_delta_lora_A": "mindpet_delta_lora_a", "mindpet_delta_lora_B": "mindpet_delta_lora_b"}
    return {
        older.get(name, name): value.asnumpy()
        for name, value in parameters.items()
        if name not in ("epoch_num", "step_num")
    }
