"""Time one LoRADense, forward and backward, beside the frozen nn.Dense that it adapts, call by call in turn.

python benchmarks/layer.py [--rows 2048] [--size 768] [--rank 8] [--rounds 41]

Both are compiled, in float32 and with the CPU kernels; the backward pass gives the gradient of the input, and of A and
B where they are. The floating-point work of the two is printed beside the times.
"""

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from turns import load_of_machine

import mindpet


class Passed(nn.Cell):
    """A sum whose gradients need both passes of a layer; the input is a Parameter so that it gets one."""

    def __init__(self, layer: nn.Cell, x: np.ndarray):
        super().__init__(auto_prefix=False)
        self.layer, self.x = layer, Parameter(Tensor(x), name="x")

    def construct(self, probe):
        return (self.layer(self.x) * probe).sum()


class Passes(nn.Cell):
    """Value and gradients in one graph."""

    def __init__(self, passed: Passed, weights: Any):
        super().__init__(auto_prefix=False)
        self.passed = passed
        self.gradient = ops.value_and_grad(passed, None, weights)

    def construct(self, probe):
        return self.gradient(probe)


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 2048), ("size", 768), ("rank", 8), ("rounds", 41)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    load_of_machine()
    generator = np.random.default_rng(0)
    x, probe = (generator.standard_normal((options.rows, options.size), np.float32) for _ in range(2))
    cells = {}
    for name in ("nn.Dense", "LoRADense"):
        network = nn.SequentialCell(nn.Dense(options.size, options.size))
        if name == "LoRADense":
            mindpet.inject(network, mindpet.LoRAConfig(rank=options.rank, targets=["0"]))
        else:
            for parameter in network.get_parameters():
                parameter.requires_grad = False
        passed = Passed(mindpet.accelerate(network), x)
        cells[name] = Passes(passed, ms.ParameterTuple([passed.x, *network.trainable_params()]))
    times: dict[str, list[float]] = {name: [] for name in cells}
    for _ in range(options.rounds):
        for name, cell in cells.items():
            begun = time.perf_counter()
            cell(Tensor(probe))[0].asnumpy()
            times[name].append(1000 * (time.perf_counter() - begun))
    medians = {name: statistics.median(taken[2:]) for name, taken in times.items()}
    ratio = statistics.median(lora / dense for dense, lora in list(zip(*times.values(), strict=True))[2:])
    products = 2 * options.rows * options.size
    work = 1 + products * options.rank * 6 / (2 * products * options.size)  # A and B: forward, and two gradients each
    print(
        f"nn.Dense {medians['nn.Dense']:.2f} ms, LoRADense {medians['LoRADense']:.2f} ms, ratio {ratio:.3f}; "
        f"floating-point work {work:.3f}"
    )


if __name__ == "__main__":
    main()
