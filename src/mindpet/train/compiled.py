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
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

import mindpet
from mindpet import _compat
from mindpet.graph.blocks import first_call
from mindpet.graph.facts import Facts, NotKnown
from mindpet.kernels import build

_log = logging.getLogger("mindpet")
_KEPT = 100  # directories; the one that was not used for longest goes first


def compile_once(cell: nn.Cell, *inputs: Any) -> bool:
    """Compile the graph of `cell` for these inputs, or take it from an earlier run, unless it is compiled already.

    The parameters that the graph reads must be those of `cell`: a network that is only reached through a function is
    not, and its weights would be zeros.

    Returns:
        Whether an earlier run has left one. (MindSpore compiles anew if it finds it damaged.) False where graphs are
        not kept: without ``MINDPET_COMPILED=1``, in PyNative mode, for a cell with something in it that has no
        fingerprint.
    """
    call = tuple((each.shape, str(each.dtype)) if isinstance(each, Tensor) else None for each in inputs)
    with first_call(cell, call) as first:
        return first and _compile(cell, inputs)


def _compile(cell: nn.Cell, inputs: tuple) -> bool:
    """Compile; whether the graph was there already."""
    if os.environ.get("MINDPET_COMPILED") != "1":
        cell.compile(*inputs)
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
    except (NotKnown, OSError, build.KernelsUnavailable) as error:
        _log.info("This graph is not kept for later runs: %s", error)
        cell.compile(*inputs)
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
        NotKnown: there is something in it that cannot be told from one run to the next.
    """
    digest = hashlib.sha256()
    facts = Facts()
    around: list[Any] = [
        ms.__version__,
        _source_of_package(),
        _entry(),
        _compat.device_target(),
        build.why_not() or str(build.library()),
        os.environ.get("RANK_ID"),
        [(each.shape, each.dtype) if isinstance(each, Tensor) else each for each in inputs],
        [(p.name, p.shape, p.dtype, p.requires_grad) for p in cell.get_parameters()],
    ]
    for fact in (facts.of(around), *facts.of_cell(cell)):
        digest.update(fact.encode())
    return digest.hexdigest()[:32]


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
