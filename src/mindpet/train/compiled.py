"""Compiled graphs kept between runs: a network that was compiled before starts in a second or two.

MindSpore's own compile cache keeps a graph, but it only looks at source files before it takes one: it would take the
graph of a network with another alpha. So each graph has a directory of its own here, named by everything that it
depends on: the sizes, options, constants and flags of every cell, the operators with their arguments, which cell and
which parameter is where, what trains, the inputs, the source of this package, MindSpore and the kernels. Only networks
of MindSpore's cells and of this package's have a fingerprint.

Graphs are kept where ``MINDPET_COMPILED=1`` asks for it, in ``MINDPET_CACHE`` (``~/.cache/mindpet`` by default).
"""

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import types
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.ops import Primitive

import mindpet
from mindpet import _compat
from mindpet.kernels import build

_log = logging.getLogger("mindpet")
_KEPT = 100  # directories; the one that was not used for longest goes first
_RECORDS = ("mindpet_injections", "mindpet_merged", "mindpet_suspended", "mindpet_deltas", "words")  # compute nothing
_TRUSTED = ("mindspore", "mindpet")  # packages whose cells are told of in full
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, np.generic)


class _NotKnown(Exception):
    """Something that a graph may depend on, and that cannot be told from one run to the next."""


def compile_once(cell: nn.Cell, *inputs: Any) -> bool:
    """Compile the graph of `cell` for these inputs, or take it from an earlier run, unless it is compiled already.

    The parameters that the graph reads must be those of `cell`: a network that is only reached through a function is
    not, and its weights would be zeros.

    Returns:
        Whether an earlier run has left one. (MindSpore compiles anew if it finds it damaged.) False where graphs are
        not kept: without ``MINDPET_COMPILED=1``, in PyNative mode, for a cell with something in it that has no
        fingerprint.
    """
    if os.environ.get("MINDPET_COMPILED") != "1" or not _compat.in_graph_mode() or cell.compile_cache:
        return False
    try:
        place = build.cache_directory() / "graphs" / fingerprint(cell, inputs)
        if place.is_dir():
            os.utime(place)
            with _compat.compile_cache(place):
                cell.compile(*inputs)
            return True
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix="new-", dir=place.parent))
    except (_NotKnown, OSError, build.KernelsUnavailable) as error:
        _log.info("This graph is not kept for later runs: %s", error)
        return False
    try:
        with _compat.compile_cache(beside):
            cell.compile(*inputs)
        beside.rename(place)  # whole, or not at all
    except OSError:  # another process was first
        pass
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _forget_old(place.parent)
    return False


def fingerprint(cell: nn.Cell, inputs: tuple) -> str:
    """A hash of all that the graph of a cell depends on.

    Raises:
        _NotKnown: there is something in it that cannot be told from one run to the next.
    """
    digest = hashlib.sha256()
    facts: list[Any] = [
        ms.__version__,
        _source_of_package(),
        _entry(),
        _compat.device_target(),
        build.why_not() or str(build.library()),
    ]
    facts += [
        os.environ.get("RANK_ID"),
        [_told_input(each) for each in inputs],
        [(p.name, p.shape, p.dtype, p.requires_grad) for p in cell.get_parameters()],
    ]
    paths = {id(inner): path for path, inner in cell.cells_and_names()}
    for path, inner in cell.cells_and_names():
        if not _of(type(inner).__module__, *_TRUSTED):
            raise _NotKnown(f"{type(inner).__name__} at {path!r} is a class of {type(inner).__module__}")
        own = {name: value for name, value in vars(inner).items() if name not in _of_every_cell()}
        flags = (inner.training, inner.get_flags(), _compat.is_recomputed(inner))
        children = {name: paths[id(child)] for name, child in _compat.children(inner).items()}  # shared ones too
        parameters = {name: parameter.name for name, parameter in _compat.own_parameters(inner).items()}
        held = (children, parameters, _compat.buffers_of(inner), _compat.named_primitives(inner))
        facts.append((path, type(inner), flags, own, held))
    for fact in facts:
        digest.update(_told(fact).encode())
    return digest.hexdigest()[:32]


def _told_input(value: Any) -> str:
    return f"{value.shape} {value.dtype}" if isinstance(value, Tensor) else _told(value)


def _told(value: Any, depth: int = 0) -> str:
    """A value as text, the same in every run."""
    if depth > 8:
        raise _NotKnown(f"a {type(value).__name__} too deep to look into")
    if isinstance(value, (*_PLAIN, ms.Type, type(ms.float32))):
        return repr(value)
    if isinstance(value, Parameter):
        return f"Parameter {value.name}"
    if isinstance(value, (Tensor, np.ndarray)):
        array = value.asnumpy() if isinstance(value, Tensor) else value
        return f"{array.shape} {array.dtype} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_told(each, depth + 1) for each in value)})"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_told(each, depth + 1) for each in value))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_told(k, depth + 1)}: {_told(v, depth + 1)}' for k, v in value.items())}}}"
    if isinstance(value, Primitive):
        return f"{type(value).__qualname__} {value.name} {_told(_compat.arguments_of(value), depth + 1)}"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{_told(type(value))} {_told([getattr(value, each.name) for each in fields(value)], depth + 1)}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, nn.Cell):
        raise _NotKnown(f"a {type(value).__name__} is in a list or in an attribute that MindSpore does not know of")
    if _of(type(value).__module__, "mindspore"):
        return f"a {type(value).__qualname__}"
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Cell):
        return f"{type(value.__self__).__qualname__}.{_told(value.__func__, depth + 1)}"
    if isinstance(value, types.FunctionType) and _is_known(value):
        return f"{value.__module__}.{value.__qualname__}"
    raise _NotKnown(f"it holds a {type(value).__module__}.{type(value).__qualname__}")


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


@cache
def _source_of_package() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(mindpet.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _entry() -> str:
    """The script that runs: MindSpore compares its source too, and would compile anew."""
    path = Path(sys.argv[0] or ".")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _forget_old(directory: Path) -> None:
    """Keep the directories that were used last."""
    with suppress(OSError):  # another process renames or removes some beside this one
        kept = sorted((path for path in directory.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for path in kept[:-_KEPT]:
            shutil.rmtree(path, ignore_errors=True)
