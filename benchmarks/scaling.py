"""Time and memory of a LoRA step as a network and its batch grow, beside what the arithmetic predicts.

python benchmarks/scaling.py [--rounds 5] [--only batch layers] [--json scaling.json] [--picture scaling.png]

Layers have BERT-base's sizes and random weights, float32, in graph mode with all cores. One thing changes at a time:
rows of a batch, tokens of a row, layers, the rank, and how many layers (the last ones) are adapted. Each configuration
is a process of its own. The predicted time is the floating-point work of the step over the rate of the configuration
that all curves share; the predicted memory is that of ``mindpet plan``, from nothing but the sizes.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from turns import Side, answer, load_of_machine


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A configuration; the curves start from its defaults."""

    batch: int = 8
    tokens: int = 128
    layers: int = 4
    rank: int = 8
    adapted: int = 4


HIDDEN, WIDE = 768, 3072
BASE = Sizes()
CURVES = {
    "batch": [Sizes(batch=value) for value in (2, 4, 8, 16, 32)],
    "tokens": [Sizes(tokens=value) for value in (32, 64, 128, 256, 512)],
    "layers": [Sizes(layers=value, adapted=value) for value in (1, 2, 4, 8, 12)],
    "rank": [Sizes(rank=value) for value in (1, 8, 32, 128)],
    "adapted": [Sizes(adapted=value) for value in (1, 2, 3, 4)],
}


def work(sizes: Sizes) -> float:
    """Floating-point operations of a step: products forward, of gradients of inputs, and of A and B."""
    rows = sizes.batch * sizes.tokens
    layer = 2 * rows * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * WIDE) + 4 * rows * sizes.tokens * HIDDEN  # and attention
    branch = 2 * 2 * rows * sizes.rank * 2 * HIDDEN  # queries and values: x A^T, h B^T
    lowest = sizes.layers - sizes.adapted  # no gradient goes below it; into it only queries, keys and values
    into_lowest = 2 * rows * 3 * HIDDEN * HIDDEN  # the gradient of its input, which nobody needs
    backward = (sizes.layers - lowest) * (layer + 4 * rows * sizes.tokens * HIDDEN) - into_lowest
    return sizes.layers * layer + backward + 3 * sizes.adapted * branch


def targets_of(sizes: Sizes) -> list[str]:
    """Queries and values of the last layers."""
    chosen = range(sizes.layers - sizes.adapted, sizes.layers)
    return [f"*.layer.{layer}.*.{name}" for layer in chosen for name in ("query", "value")]


def build(sizes: Sizes) -> Callable[[], float]:
    """A function that makes one step and returns the loss."""
    import mindspore as ms
    from mindspore import Tensor, nn

    import mindpet
    from mindpet import models
    from mindpet.train.compiled import compile_once
    from mindpet.train.step import SummedLoss, TrainStep

    ms.set_context(mode=ms.GRAPH_MODE)
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = models.BertConfig(num_hidden_layers=sizes.layers, **drops)
    network = models.BertForSequenceClassification(config)
    lora = mindpet.LoRAConfig(rank=sizes.rank, targets=targets_of(sizes), modules_to_save=("classifier",))
    mindpet.inject(network, lora)
    network.set_train()
    step = TrainStep(mindpet.accelerate(SummedLoss(network)), nn.Adam(list(network.trainable_params()), 1e-4), 0.0)
    shape = sizes.batch, sizes.tokens
    ids = Tensor(np.random.default_rng(0).integers(5, 30000, shape).astype(np.int32))
    ones = Tensor(np.ones(shape, np.int32))
    columns = ids, ones, ones * 0, Tensor(np.zeros(sizes.batch, np.int32))

    def run() -> float:
        compile_once(step, *columns)
        return float(step(*columns)[0])

    return run


def planned(sizes: Sizes) -> float:
    """MiB of the process, as ``mindpet plan`` says."""
    from mindpet.train.plan import plan
    from mindpet.train.presets import preset

    content = {**preset("bert-base-uncased"), "num_hidden_layers": sizes.layers}
    options = {"rank": sizes.rank, "targets": targets_of(sizes)}
    return plan(content, "lora", options, batch=sizes.batch, seq=sizes.tokens).process_memory / 2**20


def measure(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """One configuration."""
    side = Side(__file__, "--work", json.dumps(dataclasses.asdict(sizes)))
    side.step()
    side.step()
    told = [side.step() for _ in range(rounds)]
    side.end()
    taken = [1000 * each["seconds"] for each in told]
    return {"ms": statistics.median(taken), "times_ms": taken, "mib": told[-1]["peak_bytes"] / 2**20}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Each curve: measured points over the predicted line, time above memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["curve"] for row in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(2.6 * len(names), 5), layout="constrained", squeeze=False)
    for index, name in enumerate(names):
        curve = [row for row in rows if row["curve"] == name]
        x = [row["value"] for row in curve]
        for place, key, unit in ((axes[0][index], "ms", "ms a step"), (axes[1][index], "mib", "peak memory, MiB")):
            place.plot(x, [row[f"predicted_{key}"] for row in curve], color="grey", label="arithmetic")
            place.plot(x, [row[key] for row in curve], "o", label="measured")
            place.set_ylim(0, 1.08 * max(row[end + key] for row in curve for end in ("", "predicted_")))
            place.set_xlabel({"adapted": "adapted layers of 4"}.get(name, name))
            if index == 0:
                place.set_ylabel(unit)
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Time, print, and write JSON and the picture if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(CURVES), choices=list(CURVES), metavar="CURVE")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        answer(build(Sizes(**json.loads(options.work))))
        return
    load = load_of_machine()
    measured = {BASE: measure(BASE, options.rounds)}
    rate = work(BASE) / measured[BASE]["ms"]
    rows = []
    for name in options.only:
        for sizes in CURVES[name]:
            if sizes not in measured:
                measured[sizes] = measure(sizes, options.rounds)
            predicted = {"predicted_ms": work(sizes) / rate, "predicted_mib": planned(sizes)}
            row = {"curve": name, "value": getattr(sizes, name), **measured[sizes], **predicted}
            rows.append(row)
            print(
                "{curve:8} {value:4}: {ms:6.0f} ms, arithmetic {predicted_ms:6.0f}; {mib:5.0f} MiB, "
                "plan {predicted_mib:5.0f}".format(**row),
                flush=True,
            )
    if options.picture:
        draw(rows, options.picture)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {"system": platform.platform(), "cores": os.cpu_count(), "load": load}
        options.json.write_text(json.dumps({"rows": rows, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
