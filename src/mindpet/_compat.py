"""The only file that touches what is private or version-bound in MindSpore (2.7 to 2.10)."""

import copy
import gc
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import nn, ops
from mindspore.common import api
from mindspore.common import initializer as _initializer
from mindspore.communication import GlobalComm, get_group_size
from mindspore.nn.layer import activation as _activation
from mindspore.parallel._auto_parallel_context import auto_parallel_context
from mindspore.train import CheckpointConfig
from mindspore.train.callback import _checkpoint
from mindspore.train.callback._checkpoint import CheckpointManager as CheckpointManager
from mindspore.train.checkpoint_pb2 import Checkpoint
from safetensors import safe_open

# Kinds of numbers that MindSpore reads from a .safetensors file.
_SAFETENSORS = {"BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64"}
# Bytes of each kind of number in a checkpoint; a text has as many as it has.
_BYTES = {"Int4": 1, "Int8": 1, "UInt8": 1, "Bool": 1, "Int16": 2, "UInt16": 2, "Float16": 2, "BFloat16": 2}
_BYTES |= {"Int32": 4, "UInt32": 4, "Float32": 4, "Int64": 8, "UInt64": 8, "Float64": 8, "str": 0}

# Whether a graph knows a value, such as a Tensor's shape, when it is compiled. In PyNative mode every value is known.
is_known = ops.isconstant


def device_target() -> str:
    """``CPU``, ``Ascend`` or ``GPU``: where cells built now will run."""
    return ms.get_context("device_target")


def in_graph_mode() -> bool:
    """Whether whole networks are compiled."""
    return ms.get_context("mode") == ms.GRAPH_MODE


def run_jitted_graphs_at_once() -> None:
    """In PyNative mode run a graph of ``ms.jit`` when it is called, unless the user has chosen.

    By default MindSpore puts it into a queue and then waits for the queue in a loop, which takes a core from the graph.
    """
    if not in_graph_mode():
        os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")  # read at each call


def in_parallel_compile_mode() -> bool:
    """Whether operators are cut by their strategies: only these two modes read them."""
    return ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")


def device_count() -> int | None:
    """How many devices the operators of a pipeline stage are cut over; None where that is not known yet."""
    if not in_parallel_compile_mode():
        return None
    if auto_parallel_context().get_device_num_is_set():
        devices = ms.get_auto_parallel_context("device_num")
    elif GlobalComm.INITED:
        devices = get_group_size()
    else:
        return None
    return devices // ms.get_auto_parallel_context("pipeline_stages")


def strategy_of(operator: Any) -> Any:
    """The strategy that is written on an operator, or None."""
    return operator.get_attr_dict().get("in_strategy")


def has_layouts(operator: Any) -> bool:
    """Whether an operator is cut by Layouts, MindSpore's other way to write a strategy."""
    return operator.get_attr_dict().get("in_layout") is not None


def activation_classes() -> dict[str, type[nn.Cell]]:
    """MindSpore's table of activations by name."""
    return dict(_activation._activation)


def initializer_names() -> set[str]:
    """The names that ``initializer`` takes, in lower case."""
    return {name.lower() for name in _initializer._INITIALIZER_ALIAS}


def named_primitives(cell: nn.Cell) -> dict[str, Any]:
    """The operators that a Cell holds itself, by attribute name."""
    return dict(cell._primitives)


def arguments_of(operator: Any) -> dict[str, Any]:
    """What an operator was made with and what was set on it: MindSpore keeps these in four places.

    What it was made with may have been changed since, and a graph takes what it is now.
    """
    made = {name: getattr(operator, name, value) for name, value in vars(operator).get("init_attrs", {}).items()}
    return {**vars(operator).get("attrs", {}), **operator.get_attr_dict(), **made}


def buffers_of(cell: nn.Cell) -> dict[str, Any]:
    """The tensors that a Cell has registered, by name."""
    return dict(getattr(cell, "_buffers", {}) or {})


def primitives_of(cell: nn.Cell) -> list[Any]:
    """The operators that a Cell holds itself, in the order in which it made them."""
    return list(named_primitives(cell).values())


def children(cell: nn.Cell) -> dict[str, nn.Cell]:
    """The Cells directly below this one, by attribute name."""
    return {name: child for name, child in cell._cells.items() if child is not None}


def own_parameters(cell: nn.Cell) -> dict[str, ms.Parameter]:
    """The parameters that this Cell holds itself, by attribute name."""
    return {name: parameter for name, parameter in cell._params.items() if parameter is not None}


@contextmanager
def shown_parameters(cells: list[nn.Cell]) -> Iterator[None]:
    """Within it, those `hidden_parameters` (names) that a Cell has among its attributes are parameters of the Cell."""
    shown = [(cell, name) for cell in cells for name in cell.hidden_parameters if name not in cell._params]
    try:
        for cell, name in shown:
            cell._params[name] = getattr(cell, name)
        yield
    finally:
        for cell, name in shown:
            cell._params.pop(name, None)


def set_child(parent: nn.Cell, name: str, child: nn.Cell) -> None:
    """Put a Cell in the place of another. Plain ``setattr`` would rename the parameters that both share."""
    parent._cells[name] = child
    if "cell_list" in vars(parent):  # SequentialCell runs from this cached copy
        parent.cell_list = list(parent._cells.values())


class GraphCell(nn.Cell):
    """A Cell that is called as a graph again and again.

    Before each call MindSpore writes the name of the graph into every cell below, which takes 10 ms for 30 layers; here
    it does so only when the graph is compiled.
    """

    @property
    def compile_phase(self):
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, value):
        if value in self.compile_cache:
            self._compile_phase = value  # the cells below keep the name of the graph that was compiled last
        else:
            nn.Cell.compile_phase.fset(self, value)


def forget_compiled(network: nn.Cell) -> None:
    """Compile anew at the next call: a graph compiled before a Cell was replaced still runs the old one.

    That holds for the network, for what is in it, for every Cell around it (a loss, a training step), and for functions
    under ``ms.jit``, whose graphs are kept in one place for all.
    """
    kinds = _classes_below(nn.Cell)
    for cell in [each for each in gc.get_objects() if id(type(each)) in kinds]:
        if getattr(cell, "compile_cache", None) and any(inner is network for _, inner in cell.cells_and_names()):
            cell.compile_cache.clear()
    for _, cell in network.cells_and_names():
        cell.compile_cache.clear()
    getattr(api, "ms_compile_cache", set()).clear()


def _classes_below(kind: type) -> set[int]:
    """The ids of a class and of all that derive from it: to look one up is faster than to ask what each object is."""
    return set().union({id(kind)}, *map(_classes_below, kind.__subclasses__()))


def forced_dtype(cell: nn.Cell) -> Any:
    """The dtype that ``to_float`` makes a Cell compute in, or None."""
    flags = cell.get_flags()
    names = {"fp16": ms.float16, "fp32": ms.float32, "bf16": ms.bfloat16}
    return next((dtype for name, dtype in names.items() if flags.get(name)), None)


def has_hooks(cell: nn.Cell) -> bool:
    """Whether somebody watches what goes through this Cell."""
    names = ("_forward_pre_hook", "_forward_hook", "_backward_pre_hook", "_backward_hook", "_cell_backward_hook")
    return any(getattr(cell, name, None) for name in names)


def set_reuse_key(cell: nn.Cell, key: str | None) -> None:
    """Have a graph that is compiled from now on take this Cell for another one with the same key; None for itself."""
    if key is None:
        for name in ("_cell_init_args", "no_inline"):
            vars(cell).pop(name, None)
        return
    cell.no_inline = False
    cell.cell_init_args = f"lazy_inline_{key}"


def has_reuse_key(cell: nn.Cell) -> bool:
    """Whether somebody has given this Cell such a key already, as ``ms.lazy_inline`` does."""
    return hasattr(cell, "_cell_init_args") or "no_inline" in vars(cell)


def is_lazily_inlined(cell: nn.Cell) -> bool:
    """Whether a Cell has such a key from ``ms.lazy_inline`` or :func:`set_reuse_key`."""
    return str(getattr(cell, "_cell_init_args", "")).startswith("lazy_inline")


def copy_recompute(source: nn.Cell, target: nn.Cell) -> None:
    """Let `target` be recomputed in the backward pass if `source` is."""
    target._scope = source._scope


def is_recomputed(cell: nn.Cell) -> bool:
    """Whether a Cell is computed again in the backward pass."""
    return bool(cell._scope and "recompute" in cell._scope)


def set_value(parameter: ms.Parameter, value: ms.Tensor) -> None:
    """Put numbers into a parameter, where everything that was compiled with it finds them.

    In PyNative mode an optimizer is compiled at its first step, and ``set_data`` would give the parameter another place
    in memory than the one that it writes to.
    """
    if in_graph_mode():
        parameter.set_data(value.astype(parameter.dtype))
    else:
        ops.assign(parameter, value.astype(parameter.dtype))


@contextmanager
def evaluating(cell: nn.Cell) -> Iterator[nn.Cell]:
    """Within the block nothing in a Cell trains, so nothing drops; afterwards each part of it is as it was."""
    before = [(inner, inner.training, inner._phase) for _, inner in cell.cells_and_names()]
    try:
        yield cell.set_train(False)
    finally:
        for inner, training, phase in before:
            inner.add_flags(training=training)
            inner._phase = phase


@contextmanager
def pynative_mode() -> Iterator[None]:
    """Within the block every operator runs by itself, for what happens once and is not worth compiling."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=mode)


@contextmanager
def compile_cache(directory: Path) -> Iterator[None]:
    """Within the block a graph that is compiled is kept in a directory, or taken from there."""
    enabled = bool(ms.get_context("enable_compile_cache"))  # None before anybody sets it
    path = ms.get_context("compile_cache_path")
    ms.set_context(enable_compile_cache=True, compile_cache_path=str(directory))
    try:
        yield
    finally:
        ms.set_context(enable_compile_cache=enabled, compile_cache_path=path)


def load_checkpoint(path: Path) -> dict[str, ms.Parameter]:
    """The tensors of a ``.ckpt`` or ``.safetensors`` file.

    Of a tensor that has other bytes than its shape takes, MindSpore copies what lies behind them in memory, or writes
    over it; so a ``.ckpt`` file is held against itself first.

    Raises:
        ValueError: it is missing or broken, or holds a map in the place of a tensor.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == ".ckpt":
            problems = _broken_tensors(path.read_bytes())
        else:
            with safe_open(path, framework="np") as file:  # MindSpore would leave a file open that it cannot read
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            problems = [f"{name} is of the kind {kind}" for name, kind in kinds.items() if kind not in _SAFETENSORS]
        content = {} if problems else ms.load_checkpoint(str(path), format=path.suffix[1:])
    except Exception as error:  # MindSpore, protobuf and safetensors raise a dozen kinds, some of them bare
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if problems:
        raise ValueError(f"{path} is broken: {'; '.join(problems[:5])}")
    return {name: value for name, value in content.items() if isinstance(value, ms.Parameter)}


def _broken_tensors(content: bytes) -> list[str]:
    """Which tensors of a ``.ckpt`` file are none, in words. A large one is in several entries of its name."""
    checkpoint, problems, held = Checkpoint(), [], 0
    checkpoint.ParseFromString(content[:-17] if content[-17:-10] == b"crc_num" else content)
    for entry, after in zip_longest(checkpoint.value, checkpoint.value[1:]):
        kind, shape = entry.tensor.tensor_type, list(entry.tensor.dims)
        held += len(entry.tensor.tensor_content)
        if after is not None and after.tag == entry.tag:
            continue
        if not entry.HasField("tensor") or kind not in _BYTES:
            problems.append(f"{entry.tag} is of the kind {kind or 'map'!r}")
        elif _BYTES[kind]:
            needed = _BYTES[kind] * (1 if shape == [0] else math.prod(shape))  # [0] stands for a scalar
            if min(shape, default=0) < 0 or needed != held:
                problems.append(f"{entry.tag} has {held} bytes, and {needed} are in {kind} of the shape {shape}")
        held = 0
    return problems


def with_saved_network(config: CheckpointConfig, network: nn.Cell) -> CheckpointConfig:
    """The same checkpoint configuration, saving `network`."""
    config = copy.copy(config)
    config._saved_network = network
    return config


def breakpoint_prefix(directory: str, prefix: str) -> str:
    """How MindSpore's name of a checkpoint begins that is saved because of an exception."""
    return _checkpoint._chg_ckpt_file_name_if_same_exist(directory, prefix, True)
