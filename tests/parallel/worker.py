"""One of several processes: runs the graphs that were compiled for its rank, on its slices. Started by msrun.

In the directory named on the command line, ``groups.json`` holds the communication groups, and for each case
``CASE-RANK.mindir`` the graph and ``CASE-RANK.npz`` its inputs and parameters; ``CASE-RANK.out.npz`` is written.
"""

import json
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.communication import create_group, get_rank, init

STEPS = 3


def run(directory: Path, case: str, rank: int) -> None:
    """A few training steps; what the last one gave and what the parameters are then."""
    values = dict(np.load(directory / f"{case}-{rank}.npz"))
    parameters = {
        name.removeprefix("parameter:"): ms.Parameter(ms.Tensor(value), name=name.removeprefix("parameter:"))
        for name, value in values.items()
        if name.startswith("parameter:")
    }
    cell = nn.GraphCell(ms.load(str(directory / f"{case}-{rank}.mindir")), params_init=parameters)
    written = {}
    for step in range(STEPS):
        y, gradients = cell(ms.Tensor(values["x"]), ms.Tensor(values["seed"]))
        if step == 0:
            written["y"] = y.asnumpy()
            written |= {f"gradient:{index}": each.asnumpy() for index, each in enumerate(gradients)}
    written |= {f"parameter:{parameter.name}": parameter.asnumpy() for parameter in cell.get_parameters()}
    np.savez(directory / f"{case}-{rank}.out.npz", **written)


def main() -> None:
    """Every case, one after the other."""
    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    init("mccl")
    directory, rank = Path(sys.argv[1]), get_rank()
    groups = json.loads((directory / "groups.json").read_text())
    for name, ranks in groups.items():
        if rank in ranks:
            create_group(name, ranks)
    for case in json.loads((directory / "cases.json").read_text()):
        run(directory, case, rank)


if __name__ == "__main__":
    main()
