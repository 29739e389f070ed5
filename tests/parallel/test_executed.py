"""Strategies that run: on two and on four processes a cut layer gives, and learns, what it does whole on one.

The graphs are those of the parallel compiler, exported, with the group of all devices renamed to the one that processes
on a CPU have. Every communication in them is real.
"""

import mindspore as ms
import numpy as np
import pytest

from mindpet.delta import AdapterDense, LoRADense
from mindpet.parallel import ParallelConfig, strategies
from tests.parallel.exported import Step, export, run_processes, sliced
from tests.parallel.layers import PLAIN, output_parts
from tests.parallel.worker import STEPS

pytestmark = pytest.mark.slow

IN, OUT, ROWS = 12, 16, 8
KINDS = {
    "LoRADense": lambda: LoRADense(IN, OUT, 2, 4, activation="gelu", **PLAIN),
    "AdapterDense": lambda: AdapterDense(IN, OUT, bottleneck_size=6, activation="tanh", **PLAIN),
}
CUTS = {
    2: {
        "data": ParallelConfig(data_parallel=2),
        "rows": ParallelConfig(model_parallel=2),
        "columns": ParallelConfig(model_parallel=2, cut="columns"),
    },
    4: {
        "data-rows": ParallelConfig(data_parallel=2, model_parallel=2),
        "data-columns": ParallelConfig(data_parallel=2, model_parallel=2, cut="columns"),
    },
}


def make(kind):
    """Every parameter random, B and biases too, and the same each time."""
    layer, rng = KINDS[kind](), np.random.default_rng(11)
    for parameter in layer.get_parameters():
        parameter.set_data(ms.Tensor(rng.normal(scale=0.4, size=parameter.shape), ms.float32))
    return layer


def on_one_process(kind, x, seed):
    """Output and gradients of the first step, and all parameters after the last."""
    step = Step(make(kind)).set_train()
    first = None
    for _ in range(STEPS):
        y, gradients = step(ms.Tensor(x), ms.Tensor(seed))
        first = first or (y.asnumpy(), [each.asnumpy() for each in gradients])
    names = [parameter.name for parameter in step.trained]
    return *first, names, {parameter.name: parameter.asnumpy() for parameter in step.get_parameters()}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_processes_together_are_one(compiler, world, tmp_path, rng):
    x = rng.normal(size=(ROWS, IN)).astype(np.float32)
    seed = rng.normal(scale=0.1, size=(ROWS, OUT)).astype(np.float32)
    cases, groups, layouts = {}, {}, {}
    for kind in KINDS:
        for cut, config in CUTS[world].items():
            case = f"{kind}-{cut}"
            cases[case] = (kind, config)
            new, layouts[case] = export(
                tmp_path,
                case,
                lambda kind=kind: make(kind),
                lambda layer, config=config: layer.shard(**strategies(layer, config)),
                output_parts(config),
                world,
                x,
                seed,
            )
            groups |= new
    run_processes(tmp_path, world, list(cases), groups)
    for case, (kind, config) in cases.items():
        y, gradients, names, parameters = on_one_process(kind, x, seed)
        parts, largest = output_parts(config), {"y": 0.0, "gradients": 0.0, "parameters": 0.0}
        for rank in range(world):
            got = dict(np.load(tmp_path / f"{case}-{rank}.out.npz"))
            layout = layouts[case][rank]
            mine = sliced(y, ([*parts, world // (parts[0] * parts[1])], [2, 1]), rank)
            pairs = [("y", mine, got["y"])]
            pairs += [
                ("gradients", sliced(gradient, layout[name], rank), got[f"gradient:{index}"])
                for index, (name, gradient) in enumerate(zip(names, gradients, strict=True))
            ]
            pairs += [
                ("parameters", sliced(value, layout[name], rank) if name in layout else value, got[f"parameter:{name}"])
                for name, value in parameters.items()
                if f"parameter:{name}" in got
            ]
            assert sum(what == "parameters" for what, _, _ in pairs) > 3 * len(names)  # values and two moments each
            for what, expected, given in pairs:
                np.testing.assert_allclose(
                    given, expected, atol=1e-6, rtol=1e-6, err_msg=f"{case}, {what}, rank {rank}"
                )
                largest[what] = max(largest[what], float(np.abs(given - expected).max()))
        print(f"{world} processes, {case}: largest differences {largest}")
