"""Weights in Hugging Face's layout, read without torch: ``config.json`` and safetensors files in one directory."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet import _checks, _files


class PretrainedFilesError(ValueError):
    """A directory of pre-trained weights is missing something, broken, or of another network."""


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor.

    Attributes:
        loaded: names of parameters that got their value.
        missing: parameters that the files have no tensor for.
        unexpected: tensors that the network has no parameter for.
        misshaped: parameter name to (shape in the file, shape in the network).
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        lines += [f"  missing in the files: {name}" for name in self.missing]
        lines += [f"  unexpected in the files: {name}" for name in self.unexpected]
        lines += [
            f"  misshaped: {name} is {there} in the files, {here} here"
            for name, (there, here) in self.misshaped.items()
        ]
        return "\n".join(lines)


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` lists.

    bfloat16 is widened to float32, which NumPy has.

    Raises:
        PretrainedFilesError: no such file, or one that cannot be read.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        content = _files.read_json(index, PretrainedFilesError)
        table = content.get("weight_map", {}) if isinstance(content, dict) else None
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise PretrainedFilesError(
                f"{index} must hold an object whose 'weight_map' names a file for each tensor, "
                f"but has {_checks.shown(content if table is None else table)}."
            )
        names = sorted(set(table.values()))
        if any(Path(name).name != name for name in names):
            raise PretrainedFilesError(f"{index} names a file outside its directory.")
    else:
        names = ["model.safetensors"]
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        if not os.path.isfile(directory / name):
            there = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
            hint = (
                "; pickled weights (.bin) are not read: save them as safetensors"
                if "pytorch_model.bin" in there
                else ""
            )
            raise PretrainedFilesError(
                f"There is no {name} in {directory} (it has: {', '.join(there) or 'nothing'}){hint}."
            )
        tensors.update(read_safetensors(directory / name))
    return tensors


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one file; bfloat16 is widened to float32, which NumPy has.

    Raises:
        PretrainedFilesError: it cannot be read.
    """
    from safetensors import SafetensorError, deserialize
    from safetensors.numpy import load_file

    try:
        try:
            return load_file(path)
        except (KeyError, TypeError, ValueError, AttributeError):  # bfloat16: NumPy has no such dtype
            tensors = {}
            for name, entry in deserialize(path.read_bytes()):
                if entry["dtype"] == "BF16":
                    wide = np.frombuffer(entry["data"], np.uint16).astype(np.uint32) << 16
                    tensors[name] = wide.view(np.float32).reshape(entry["shape"])
                else:
                    kind = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "U8": "u1", "BOOL": "?"}
                    tensors[name] = np.frombuffer(entry["data"], kind[entry["dtype"]]).reshape(entry["shape"])
            return tensors
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise PretrainedFilesError(f"{path} cannot be read as safetensors: {error}") from error


def hugging_face_name(name: str) -> str:
    """The tensor that holds a parameter: LayerNorm's and embeddings' have other names there.

    >>> hugging_face_name("bert.embeddings.LayerNorm.gamma")
    'bert.embeddings.LayerNorm.weight'
    """
    for here, there in ((".gamma", ".weight"), (".beta", ".bias"), (".embedding_table", ".weight")):
        if name.endswith(here):
            return name[: -len(here)] + there
    return name


@dataclass(frozen=True)
class Outline:
    """What the sizes in a configuration mean for the files.

    Attributes:
        layer: the beginning of the names of a layer's tensors, without its number: ``"model.layers."``.
        layers: how many there are.
        shapes: those of tensors, as the files have them, among which every other size is.
    """

    layer: str
    layers: int
    shapes: Mapping[str, tuple[int, ...]]


def require_outline(owner: str, outline: Outline, tensors: dict[str, np.ndarray], prefix: str) -> None:
    """Hold sizes against the files before a network is built of them, since absurd ones take all memory or time.

    Args:
        owner: the network, for the message.
        outline: what its configuration says.
        tensors: by Hugging Face's names.
        prefix: as for :func:`load_tensors`.

    Raises:
        PretrainedFilesError: a tensor or a layer is missing, or a shape differs.
    """
    bare, report = _is_bare(tensors, prefix), LoadReport()
    for name, shape in outline.shapes.items():
        own = name.removeprefix(prefix) if bare else name
        if own not in tensors:
            report.missing.append(name)
        elif tensors[own].shape != shape:
            report.misshaped[name] = (tensors[own].shape, shape)
    begin = outline.layer.removeprefix(prefix) if bare else outline.layer
    found = [match for name in tensors if (match := re.match(rf"{re.escape(begin)}(\d+)(\..*)", name))]
    there = {match[1] for match in found}  # texts, since a number of absurd length is none
    first = next((number for number in range(outline.layers) if str(number) not in there), None)
    if first is not None:
        parts = [match[2] for match in found if match[1] == "0"] or [""]
        report.missing.extend(f"{outline.layer}{first}{part}" for part in parts)
        report.missing.append(f"layers: {outline.layers} are expected, {len(there)} are there")
    if report.missing or report.misshaped:
        hints = "".join(_checks.near(name, tensors) for name in report.missing[:1])
        raise PretrainedFilesError(f"The files do not fit a {owner}{hints}\n{report}")


def overlaps(places: Iterable[tuple[str, int, int]]) -> list[str]:
    """Which of (name, offset, bytes) begin before the one ahead of them ends, in words.

    Tensors that share their bytes make a small file a large network.

    >>> overlaps([("b", 6, 4), ("a", 0, 8), ("c", 10, 1)])
    ['b at 6 begins within a, which ends at 8']
    """
    ordered = sorted(((offset, size, name) for name, offset, size in places if size), key=lambda place: place[:2])
    return [
        f"{name} at {offset} begins within {before}, which ends at {start + size}"
        for (start, size, before), (offset, _, name) in pairwise(ordered)
        if offset < start + size
    ]


def _is_bare(tensors: Iterable[str], prefix: str) -> bool:
    """Whether all tensors leave out the prefix, as those of an encoder without a head do."""
    return not any(name.startswith(prefix) for name in tensors)


def load_tensors(
    network: nn.Cell, tensors: dict[str, np.ndarray], prefix: str, optional: tuple[str, ...] = ()
) -> LoadReport:
    """Set the parameters of `network` by name; tensors may leave out `prefix`, as a bare encoder's do.

    Args:
        network: whose parameters are named by their paths. What its `transposed` patterns mean, if it has any, is
            ``(in, out)`` in the files.
        tensors: by Hugging Face's names.
        prefix: with its dot, for instance ``"bert."``.
        optional: beginnings of names that may be missing: a new head.

    Raises:
        PretrainedFilesError: a parameter that is not optional is missing, or a shape differs. Nothing is set then.
    """
    bare = _is_bare(tensors, prefix)
    values, report, used = {}, LoadReport(), set()
    for parameter in network.get_parameters():
        wanted = hugging_face_name(parameter.name)
        name = wanted[len(prefix) :] if bare and wanted.startswith(prefix) else wanted
        if name not in tensors:
            report.missing.append(parameter.name)
            continue
        used.add(name)
        shape = shape_in_files(network, parameter)
        if tensors[name].shape != shape:
            report.misshaped[parameter.name] = (tensors[name].shape, shape)
            continue
        values[parameter.name] = tensors[name].T if is_transposed(network, parameter.name) else tensors[name]
        report.loaded.append(parameter.name)
    report.unexpected.extend(name for name in tensors if name not in used and not name.endswith("position_ids"))
    needed = [name for name in report.missing if not name.startswith(optional)] if optional else report.missing
    wrong = [name for name in report.misshaped if not (optional and name.startswith(optional))]
    if needed or wrong:
        hints = "".join(_checks.near(hugging_face_name(name), tensors) for name in needed[:1])
        raise PretrainedFilesError(f"The files do not fit a {type(network).__name__}{hints}\n{report}")
    for parameter in network.get_parameters():
        if parameter.name in values:
            value = Tensor(np.ascontiguousarray(values[parameter.name]))
            parameter.set_data(value.astype(parameter.dtype))
    return report


def is_transposed(network: nn.Cell, name: str) -> bool:
    """Whether Hugging Face's files hold this parameter as ``(in, out)``: the network has patterns `transposed`."""
    return any(fnmatchcase(name, pattern) for pattern in getattr(network, "transposed", ()))


def shape_in_files(network: nn.Cell, parameter: Parameter) -> tuple[int, ...]:
    """The shape of a parameter there."""
    shape = tuple(parameter.shape)
    return shape[::-1] if is_transposed(network, parameter.name) else shape


def save_tensors(network: nn.Cell, directory: Path) -> None:
    """Write the parameters of `network` as ``model.safetensors`` under Hugging Face's names, in its orientation."""
    tensors = {}
    for parameter in network.get_parameters():
        value = parameter.asnumpy()
        tensors[hugging_face_name(parameter.name)] = value.T if is_transposed(network, parameter.name) else value
    _files.write_tensors(Path(directory) / "model.safetensors", tensors, {"format": "pt"})
