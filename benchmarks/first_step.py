"""Time the first step of LoRA on BERT-base: compiled for the first time, and compiled by an earlier run.

python benchmarks/first_step.py [--batch 16] [--length 128]

Each is a process of its own, with an empty cache directory for the graphs at first and the same one again then. The
time is that of one call, compilation and computing together; a later step is printed beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")


def main() -> None:
    """Run both, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.batch, options.length)))
        return
    from mindpet.kernels import build

    with tempfile.TemporaryDirectory() as place:
        if build.available():  # the kernels are there already
            (Path(place) / build.library().name).symlink_to(build.library())
        environment = {**os.environ, "MINDPET_CACHE": place, "MINDPET_COMPILED": "1"}
        for name in ("compiled", "compiled before"):
            command = [sys.executable, __file__, "--work", f"--batch={options.batch}", f"--length={options.length}"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            first, later, loss = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: first step {first:.1f} s, a later one {later:.1f} s, first loss {loss:.6f}")


def work(batch: int, length: int) -> tuple[float, float, float]:
    """Seconds of the first step and of the third, and the first loss."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn

    import mindpet
    from mindpet.models import BertConfig, BertForSequenceClassification
    from mindpet.train.compiled import compile_once
    from mindpet.train.dropout import DropoutKeys
    from mindpet.train.step import SummedLoss, TrainStep

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(1)
    network = BertForSequenceClassification(BertConfig())
    mindpet.inject(network, mindpet.LoRAConfig(modules_to_save=("classifier",)))
    network.set_train()
    keys = DropoutKeys(network, 0)
    optimizer = nn.Adam(list(network.trainable_params()), 1e-4)
    step = TrainStep(mindpet.accelerate(SummedLoss(network)), optimizer, 0.0)
    generator = np.random.default_rng(0)
    ids = Tensor(generator.integers(5, 20000, (batch, length)).astype(np.int32))
    ones, labels = Tensor(np.ones((batch, length), np.int32)), Tensor(generator.integers(0, 2, batch).astype(np.int32))
    seconds, losses = [], []
    for index in range(3):
        keys.set_step(index)
        begun = time.perf_counter()
        if index == 0:
            compile_once(step, ids, ones, ones * 0, labels)
        losses.append(float(step(ids, ones, ones * 0, labels)[0]))
        seconds.append(time.perf_counter() - begun)
    return seconds[0], seconds[2], losses[0]


if __name__ == "__main__":
    main()
