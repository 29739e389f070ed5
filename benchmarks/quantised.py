"""Time tuning steps of QLoRA beside LoRA, step by step in turn, and the memory of their weights.

python benchmarks/quantised.py [--rounds 7] [--batch 16] [--length 128] [--json quantised.json]

BERT-base with random weights and its usual dropout, float32, rank 8 on every dense layer of the blocks. LoRA and each
kind of QLoRA is a process of its own with all cores, and waits while another one works. Printed are medians of the time
of a step, its ratio to LoRA's with both times, the bytes of the adapted weights as they are kept, and what the resident
memory of the process grew by from before the network was built until it was injected.
"""

import argparse
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from turns import Side, answer, load_of_machine

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "nf4": {"bits": "nf4"},
    "int8": {"bits": "int8"},
    "nf4-simple": {"bits": "nf4", "double_quantisation": False},
}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def build(kind: str, batch: int, length: int) -> tuple[Any, dict[str, Any]]:
    """A function that makes one step and returns the loss; and the memory of the weights."""
    import mindspore as ms
    from mindspore import Tensor, nn

    import mindpet
    from mindpet import models
    from mindpet.delta.qlora import LINEAR
    from mindpet.train.dropout import DropoutKeys
    from mindpet.train.step import SummedLoss, TrainStep

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(1)
    mindpet.accelerate(nn.SequentialCell(nn.GELU()))  # compiles the kernels
    bert = models.BertConfig()
    targets = ["*.query", "*.key", "*.value", "*.layer.*.dense"]
    assert set(targets) <= set(LINEAR)
    given = {"rank": 8, "targets": targets, "modules_to_save": ("classifier",), **KINDS[kind]}
    before = resident()
    network = models.BertForSequenceClassification(bert)
    for parameter in network.get_parameters():
        parameter.init_data()
    mindpet.inject(network, mindpet.LoRAConfig(**given) if kind == "lora" else mindpet.QLoRAConfig(**given))
    grown = resident() - before
    adapted = {path for one in vars(network)["mindpet_injections"] for path in one.adapted}
    kept = [
        p
        for p in network.get_parameters()
        if p.name.rpartition(".")[0] in adapted and (p.name.endswith(".weight") or "mindpet_base_" in p.name)
    ]
    memory = {"adapted_bytes": sum(p.size * p.itemsize for p in kept), "grown_bytes": grown}
    memory["all_bytes"] = sum(p.size * p.itemsize for p in network.get_parameters())
    network.set_train()
    keys = DropoutKeys(network, 0)
    optimizer = nn.Adam(list(network.trainable_params()), 1e-4)
    step = TrainStep(mindpet.accelerate(SummedLoss(network)), optimizer, 0.0)
    generator = np.random.default_rng(0)
    ids = Tensor(generator.integers(5, 30000, (batch, length)).astype(np.int32))
    ones = Tensor(np.ones((batch, length), np.int32))
    labels = Tensor(generator.integers(0, 2, batch).astype(np.int32))
    count = 0

    def run() -> float:
        nonlocal count
        keys.set_step(count)
        count += 1
        return float(step(ids, ones, ones * 0, labels)[0])

    return run, memory


def measure(kinds: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All kinds in turn."""
    rows: dict[str, Any] = {}
    sides = {}
    for kind in kinds:  # one after the other, or they would compile at the same time
        sizes = "--batch", str(options.batch), "--length", str(options.length)
        sides[kind] = Side(__file__, "--work", kind, *sizes)
        rows[kind] = {"first_step_s": sides[kind].step()["seconds"], "times_ms": []}
        sides[kind].step()  # the second one may still set things up
    for _ in range(options.rounds):
        for kind, side in sides.items():
            told = side.step()
            rows[kind]["times_ms"].append(1000 * told.pop("seconds"))
            rows[kind].update(told)
    for kind, side in sides.items():
        side.end()
        row, base = rows[kind], rows["lora"]
        row["median_ms"] = statistics.median(row["times_ms"])
        pairs = zip(row["times_ms"], base["times_ms"], strict=True)
        row["ratio"] = statistics.median(mine / its for mine, its in pairs)
        row["adapted_ratio"] = row["adapted_bytes"] / base["adapted_bytes"]
    return rows


def main() -> None:
    """Time, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["lora", "nf4", "int8"], choices=list(KINDS), metavar="KIND")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--work", choices=list(KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        run, memory = build(options.work, options.batch, options.length)
        answer(run, lambda: {"resident_bytes": resident(), **memory})
        return
    load = load_of_machine()
    rows = measure(["lora", *(kind for kind in options.kinds if kind != "lora")], options)
    base, mebi = rows["lora"], 2**20
    for kind, row in rows.items():
        print(
            f"{kind}: a step {row['median_ms']:.0f} ms, LoRA {base['median_ms']:.0f} ms, ratio {row['ratio']:.3f}; "
            f"adapted weights {row['adapted_bytes'] / mebi:.1f} MiB, LoRA {base['adapted_bytes'] / mebi:.1f} MiB, "
            f"ratio {row['adapted_ratio']:.4f}; the process grew by {row['grown_bytes'] / mebi:.0f} MiB, LoRA "
            f"{base['grown_bytes'] / mebi:.0f} MiB; peak {row['peak_bytes'] / mebi:.0f} and "
            f"{base['peak_bytes'] / mebi:.0f} MiB; first step {row['first_step_s']:.1f} s"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {"system": platform.platform(), "cores": os.cpu_count(), "load": load}
        settings = {"batch": options.batch, "length": options.length, "rounds": options.rounds}
        options.json.write_text(json.dumps({"rows": rows, "machine": machine, "settings": settings}, indent=2) + "\n")


if __name__ == "__main__":
    main()
