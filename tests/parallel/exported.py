"""A training step compiled for each rank, as files that real processes on a CPU can run."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.common.api import _cell_graph_executor as executor
from mindspore.train import mind_ir_pb2

from mindpet.graph import freeze_delta
from mindpet.train.processes import free_port
from tests.parallel.compiler import compile_cell, coordinates, devices

WORLD = b"mccl_world_group"  # the communicator between processes on a CPU


class Step(nn.Cell):
    """Output, gradients of the delta parameters for a given gradient of the output, and a step of Adam.

    The gradient of the output is an input: of a constant the compiler would take an AllReduce at once, with the number
    of devices that the absent communicator makes up.
    """

    def __init__(self, layer):
        super().__init__()
        freeze_delta(layer, layer.delta_method)
        self.layer = layer
        self.optimizer = nn.Adam(layer.trainable_params(), 1e-3)
        self.gradients_of = ops.GradOperation(get_by_list=True, sens_param=True)
        self.trained = self.optimizer.parameters

    def construct(self, x, seed):
        y = self.layer(x)
        gradients = self.gradients_of(self.layer, self.trained)(x, seed)
        return ops.depend(y, self.optimizer(gradients)), gradients


def sliced(value: np.ndarray, layout, rank: int) -> np.ndarray:
    """The slice of a rank, by a device matrix and a tensor map."""
    matrix, axes = layout
    place = coordinates(rank, matrix)
    for axis, number in enumerate(axes):
        if number >= 0:
            dimension = len(matrix) - 1 - number
            value = np.split(value, matrix[dimension], axis)[place[dimension]]
    return np.array(value, order="C")


def export(directory: Path, case: str, make, shard, parts, world: int, x, seed) -> tuple[dict, list]:
    """Compile for each rank and write graphs and slices.

    Args:
        directory: where to.
        case: what to call the files.
        make: gives the same layer each time.
        shard: writes strategies on it.
        parts: into how many parts its output is cut.
        world: how many devices.
        x: input, whole.
        seed: gradient of the output, whole.

    Returns:
        Groups by name, and the layouts of the parameters on each rank.
    """
    groups, layouts = {}, []
    repeated = world // (parts[0] * parts[1])
    for rank in range(world):
        step = Step(make())
        values = {parameter.name: parameter.asnumpy().copy() for parameter in step.get_parameters()}
        with devices(world, rank):
            shard(step.layer)
            phase = compile_cell(step, ms.Tensor(x), ms.Tensor(seed))
            proto = executor._get_func_graph_proto(step, phase, "mind_ir", False)
        layout = {name: each[:2] for name, each in step.parameter_layout_dict.items()}
        model = mind_ir_pb2.ModelProto()
        model.ParseFromString(proto)
        for primitive in model.primitives:
            attributes = {attribute.name: attribute for attribute in primitive.attribute}
            if "group" in attributes:
                name = attributes["group"].s.decode()
                if name.endswith("world_group"):
                    attributes["group"].s = WORLD
                else:
                    groups[name] = [each.ints[0] for each in attributes["group_rank_ids"].values]
        (directory / f"{case}-{rank}.mindir").write_bytes(model.SerializeToString())
        kept = [parameter.name.rpartition(":")[2] for parameter in model.graph.parameter]
        slices = {
            f"parameter:{name}": sliced(values[name], layout[name], rank) if name in layout else values[name]
            for name in kept
        }
        mine = sliced(seed, ([parts[0], parts[1], repeated], [2, 1]), rank)
        np.savez(directory / f"{case}-{rank}.npz", x=x, seed=mine, **slices)
        layouts.append(layout)
    return groups, layouts


def run_processes(directory: Path, world: int, cases: list[str], groups: dict, seconds: int = 150) -> None:
    """The cases on real processes; all of them end here, whatever happens."""
    (directory / "groups.json").write_text(json.dumps(dict(sorted(groups.items()))))
    (directory / "cases.json").write_text(json.dumps(cases))
    run_script(directory, world, [str(Path(__file__).with_name("worker.py")), str(directory)], seconds)


def run_script(directory: Path, world: int, script: list[str], seconds: int) -> None:
    """A script with its arguments on real processes, started by msrun; all of them end here. Logs go to ``log``."""
    binaries = Path(sys.executable).parent
    command = [
        *(sys.executable, str(binaries / "msrun"), f"--worker_num={world}", f"--local_worker_num={world}"),
        *("--master_addr=127.0.0.1", f"--master_port={free_port()}", f"--log_dir={directory / 'log'}", "--join=True"),
        *script,
    ]
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # msrun may end, or hang, before its workers
        process.wait()
    if process.returncode:
        logs = "\n".join(path.read_text()[-2000:] for path in sorted((directory / "log").glob("worker_*.log")))
        raise RuntimeError(f"msrun ended with {process.returncode}:\n{output[-2000:]}\n{logs}")
