"""MindSpore's parallel compiler for any number of devices, in this process, without one. For these tests only."""

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore._c_expression import AutoParallelContext
from mindspore.common.api import _cell_graph_executor as executor
from mindspore.ops.operations import comm_ops

from mindpet import _compat
from mindpet.graph import freeze_delta
from tests.parallel import device_name

_numbers = count()
_MOVING = ("AllGather", "ReduceScatter", "AlltoAll", "AllToAll")
# What the compiler or Python puts between the operators that are given strategies.
_BETWEEN = {
    *("Load", "Cast", "Reshape", "Depend", "UpdateState", "MakeTuple", "TupleGetItem", "Return", "_MirrorOperator"),
    *("_VirtualDiv", "_VirtualDataset", "_GetTensorSlice", "AllReduce", "AllGather", "ReduceScatter", "RealDiv"),
    *("StridedSlice", "Split", "Concat", "Shape"),
}


@contextmanager
def devices(number: int, rank: int = 0, target: str = "Ascend"):
    """Within the block, networks are compiled for `number` devices as `rank` sees them. Nothing runs."""

    def group_size(group=None):  # the compiler calls a group "<size>-<hash>"
        match = re.fullmatch(r"(\d+)-\d+", str(group))
        return int(match[1]) if match else number

    saved, environment = (comm_ops.get_group_size, comm_ops.get_rank), os.environ.get("MS_DEV_PRECOMPILE_ONLY")
    os.environ["MS_DEV_PRECOMPILE_ONLY"] = "1"
    ms.reset_auto_parallel_context()
    ms.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel", dataset_strategy="full_batch", device_num=number, global_rank=rank
    )
    AutoParallelContext.get_instance().set_hccl_test_avaible(True)  # refused before the number of devices is set
    comm_ops.get_group_size, comm_ops.get_rank = group_size, lambda group=None: rank % group_size(group)
    device_name.write(target)
    try:
        yield
    finally:
        device_name.write("CPU")
        comm_ops.get_group_size, comm_ops.get_rank = saved
        AutoParallelContext.get_instance().set_hccl_test_avaible(False)
        ms.reset_auto_parallel_context()
        os.environ.pop("MS_DEV_PRECOMPILE_ONLY")
        if environment is not None:
            os.environ["MS_DEV_PRECOMPILE_ONLY"] = environment


class Objective(nn.Cell):
    """Mean of squares of what a layer gives, cut as that is."""

    def __init__(self, layer, parts):
        super().__init__()
        self.layer = layer
        self.square = ops.Square().shard((parts,))
        self.mean = ops.ReduceMean().shard((parts,))

    def construct(self, x):
        return self.mean(self.square(self.layer(x)))


class EncoderObjective(nn.Cell):
    """The same of all that a PrefixEncoder gives for a batch, each times the input."""

    def __init__(self, layer, parts):
        super().__init__()
        self.layer = layer
        self.batch_axis = layer.out_perm.index(0)
        self.mul = ops.Mul().shard((parts, parts))
        self.add = ops.Add().shard((parts, parts))
        self.mean = ops.ReduceMean().shard((parts,))

    def construct(self, x):
        total = x
        for each in self.layer(x.shape[self.batch_axis], ms.float32):
            total = self.add(total, self.mul(each, x))
        return self.mean(total)


@dataclass
class Compiled:
    """What the compiler made of a training step.

    Attributes:
        strategies: in the layer, what kind of operator has which strategy, as the compiler took it, in its order.
        given: the arguments of ``shard``, by the marks on the operators in the graph.
        bare: operators of the layer that nobody has given a strategy.
        moved: what moves parts between devices because one operator is cut unlike the next.
        slices: shape of each parameter's slice.
        reduced: over which ranks the gradient of each parameter is reduced, for those that are.
        layouts: device matrix and tensor map of each parameter.
        updated: the parameters that the optimizer writes.
    """

    strategies: list[tuple[str, tuple]]
    given: dict[str, list[tuple[str, str]]]
    bare: list[str]
    moved: list[str]
    slices: dict[str, tuple[int, ...]]
    reduced: dict[str, list[int]]
    layouts: dict[str, tuple[list[int], list[int]]]
    updated: list[str]


def tuples(value):
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def text(strategy) -> str:
    """As the compiler prints it: without the comma of a tuple of one."""
    return str(strategy).replace(",)", ")")


def mark(layer) -> None:
    """Write on each operator of the layer for which argument it is, so that the graph shows it."""
    for argument, entry in layer.sharded.items():
        operator = layer
        for name in entry.path.split("."):
            operator = getattr(operator, name, None)
        for each in _compat.primitives_of(operator) if isinstance(operator, nn.Cell) else [operator]:
            if each is not None:
                each.add_prim_attr("argument", argument)


def training_step(layer, parts) -> nn.Cell:
    """The delta parameters trained by Adam, everything else frozen."""
    freeze_delta(layer, layer.delta_method)
    objective = (EncoderObjective if layer.delta_method == "ptuning2" else Objective)(layer, parts)
    return nn.TrainOneStepCell(objective, nn.Adam(objective.trainable_params(), 1e-3))


def compile_cell(cell, *inputs) -> str:
    """The phase under which the compiler keeps the graph."""
    cell.set_train()
    return executor.compile(cell, *inputs, phase=f"parallel{next(_numbers)}")[0]


def compile_layer(layer, shape, parts, world) -> Compiled:
    """Compile a training step of a layer, within a block of :func:`devices`.

    Args:
        layer: with its strategies.
        shape: of its input.
        parts: into how many parts the output is cut.
        world: the number of devices.
    """
    if hasattr(layer, "sharded"):
        mark(layer)
    step = training_step(layer, parts)
    phase = compile_cell(step, ms.Tensor(np.ones(shape, np.float32)))
    taken = executor._graph_executor.get_strategy(phase)
    info = executor._graph_executor.get_parallel_graph_info(phase)
    nodes = [(graph, name, node) for graph, content in info.items() for name, node in content.items()]
    forward = next(graph for graph, name, node in nodes if name.startswith("ReduceMean"))
    kind = {name: name.rsplit("-", 1)[0] for _, name, _ in nodes}
    given, bare, reduced, updated = {}, [], {}, []
    for graph, name, node in nodes:
        attributes = node["attrs"]
        if "argument" in attributes:
            given.setdefault(attributes["argument"], []).append((kind[name], attributes.get("in_strategy")))
        elif graph == forward and kind[name] not in _BETWEEN and "in_strategy" not in attributes:
            bare.append(name)
        if kind[name] == "_MirrorOperator":
            ranks = attributes["group_ranks"]
            ranks = range(world) if ranks == "WORLD_GROUP" else map(int, ranks.split("-"))
            reduced[attributes["mirror_user_id"].removeprefix("layer.")] = list(ranks)
        if kind[name] == "Adam":
            updated.append(node["inputs"][0].removeprefix("layer."))
    layouts = {name.removeprefix("layer."): layout for name, layout in step.parameter_layout_dict.items()}
    return Compiled(
        strategies=sorted(
            (re.sub(r"-op\d+$", "", name.rsplit("/", 1)[-1]), tuples(strategy))
            for name, strategy in taken.items()
            if "/layer-" in name
        ),
        given=given,
        bare=bare,
        moved=[name for _, name, _ in nodes if kind[name] in _MOVING],
        slices={name: tuple(layout[2]) for name, layout in layouts.items()},
        reduced=reduced,
        layouts={name: (layout[0], layout[1]) for name, layout in layouts.items()},
        updated=updated,
    )


def coordinates(rank: int, matrix: list[int]) -> tuple[int, ...]:
    """Where a rank is in the matrix of devices."""
    return tuple(int(each) for each in np.unravel_index(rank, matrix))


def slice_number(rank: int, layout) -> tuple[int, ...]:
    """Which slice of a parameter a rank holds; ranks with the same one must add their gradients up."""
    matrix, axes = layout
    place = coordinates(rank, matrix)
    return tuple(place[len(matrix) - 1 - axis] for axis in axes if axis >= 0)


def assert_reduced_over_ranks_with_the_same_slice(compiled, layer, world, rank):
    """Delta parameters are trained and added up where they are the same; frozen ones have no part in it."""
    deltas = {parameter.name.removeprefix("layer.") for parameter in layer.trainable_params()}
    assert deltas
    assert all("mindpet_delta" in name for name in deltas)
    assert set(compiled.updated) == deltas
    expected = {}
    for name in deltas:
        layout = compiled.layouts[name]
        same = [other for other in range(world) if slice_number(other, layout) == slice_number(rank, layout)]
        if len(same) > 1:
            expected[name] = same
    assert compiled.reduced == expected
