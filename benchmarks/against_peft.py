"""Time tuning steps beside Hugging Face PEFT, and MindSpore's own operators, on the same machine, step by step in turn.

python benchmarks/against_peft.py [--cases bert-lora bert-full] [--rounds 5] [--plain] [--json J] [--picture P]

Each side is a process of its own with all cores, and waits while another one works: a step here, a step there, so that
whatever else the machine does hits all alike. Medians with the quartiles around them, their ratio, the time of the
first step (with compilation) and the peak of resident memory are printed. With --plain there is a third side, the same
network in graph mode without our kernels. Needs torch, transformers and peft.

Networks have the sizes of BERT-base and SmolLM2-135M and random weights, dropout as their configurations have it, in
float32.
"""

import argparse
import json
import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from turns import Side, answer, load_of_machine

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
TOKENS, BOTTLENECK, RANK, ALPHA = 20, 64, 8, 16
TITLES = {"bert": "BERT-base", "smollm2": "SmolLM2-135M"}
SHAPES = {"bert": (16, 128), "smollm2": (4, 128)}
CASES = {
    **{f"bert-{method}": ("bert", method) for method in ("lora", "adapter", "prefix", "bitfit", "full")},
    **{f"smollm2-{method}": ("smollm2", method) for method in ("lora", "full")},
}


def inputs(network: str) -> dict[str, np.ndarray]:
    """One batch, the same for both sides."""
    generator, shape = np.random.default_rng(0), SHAPES[network]
    ids = generator.integers(5, 30000, shape).astype(np.int32)
    labels = generator.integers(0, 2, shape[0]).astype(np.int32) if network == "bert" else ids
    return {"ids": ids, "labels": labels}


def ours(network: str, method: str) -> Any:
    """A function that makes one step and returns the loss."""
    import mindspore as ms
    from mindspore import Tensor, nn

    import mindpet
    from mindpet import models
    from mindpet.train.compiled import compile_once
    from mindpet.train.dropout import DropoutKeys
    from mindpet.train.step import SummedLoss, TrainStep

    ms.set_context(mode=ms.GRAPH_MODE)
    data = inputs(network)
    if network == "bert":
        cell = models.BertForSequenceClassification(models.BertConfig())
        head: tuple[str, ...] = ("classifier",)
    else:
        cell = models.LlamaForCausalLM(models.LlamaConfig.from_content({"model_type": "llama", **SMOLLM2}, "SmolLM2"))
        head = ()
    attention = ["*.query", "*.value"] if network == "bert" else ["*.q_proj", "*.v_proj"]
    config = {
        "lora": lambda: mindpet.LoRAConfig(rank=RANK, alpha=ALPHA, targets=attention, modules_to_save=head),
        "adapter": lambda: mindpet.AdapterConfig(size=BOTTLENECK, modules_to_save=head),
        "prefix": lambda: mindpet.PrefixConfig(tokens=TOKENS, projection=False, modules_to_save=head),
        "bitfit": lambda: mindpet.BitFitConfig(modules_to_save=head),
    }.get(method)
    if config:
        mindpet.inject(cell, config())
    cell.set_train()
    keys = DropoutKeys(cell, 0)
    optimizer = nn.Adam(list(cell.trainable_params()), 1e-4)
    step = TrainStep(mindpet.accelerate(SummedLoss(cell)), optimizer, 0.0)
    ids, labels = Tensor(data["ids"]), Tensor(data["labels"])
    ones = Tensor(np.ones_like(data["ids"]))
    columns: Any = (ids, ones, ones * 0, labels) if network == "bert" else None
    if columns is None:  # each position learns the next token
        following = np.concatenate([data["ids"][:, 1:], np.full((len(data["ids"]), 1), -100, np.int32)], 1)
        columns = ids, ones, Tensor(following)
    count = 0

    def run() -> float:
        nonlocal count
        keys.set_step(count)
        count += 1
        compile_once(step, *columns)  # kept for another run where MINDPET_COMPILED=1 asks for it
        return float(step(*columns)[0])

    return run


def theirs(network: str, method: str) -> Any:
    """A function that makes one step and returns the loss."""
    import peft
    import torch
    import transformers

    data = inputs(network)
    if network == "bert":
        model: Any = transformers.BertForSequenceClassification(transformers.BertConfig())
        targets = ["query", "value"]
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2))
        targets = ["q_proj", "v_proj"]
    if method == "lora":
        task = "SEQ_CLS" if network == "bert" else "CAUSAL_LM"
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type=task)
        model = peft.get_peft_model(model, config)
    elif method == "prefix":
        bridge_prefix(model)
        model = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="SEQ_CLS"))
    elif method != "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("classifier") or (method == "bitfit" and name.endswith("bias"))
    if method == "adapter":
        add_adapters(model)
    model.train()
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], 1e-4)
    batch = {"input_ids": torch.tensor(data["ids"]).long(), "labels": torch.tensor(data["labels"]).long()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])

    def run() -> float:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def bridge_prefix(model: Any) -> None:
    """PEFT 0.21 hands a prefix over under a name that newer transformers have changed."""
    import inspect

    backbone = model.bert.forward
    if "past_key_values" not in inspect.signature(backbone).parameters:
        model.bert.forward = lambda *given, past_key_values=None, **more: backbone(
            *given, cache=past_key_values, **more
        )
        model.bert.forward.__signature__ = inspect.Signature(
            [inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY)]
        )


def add_adapters(model: Any) -> None:
    """PEFT has no bottleneck adapters: Houlsby's, behind each dense layer that ends a sublayer, as ours are."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self, dense: Any):
            super().__init__()
            self.dense = dense
            self.down = torch.nn.Linear(dense.out_features, BOTTLENECK)
            self.up = torch.nn.Linear(BOTTLENECK, dense.out_features)
            self.activation = torch.nn.GELU()

        def forward(self, x: Any) -> Any:
            y = self.dense(x)
            return y + self.up(self.activation(self.down(y)))

    for layer in model.bert.encoder.layer:
        layer.attention.output.dense = Adapted(layer.attention.output.dense)
        layer.output.dense = Adapted(layer.output.dense)


def measure(case: str, rounds: int, plain: bool) -> dict[str, Any]:
    """The sides of one case, in turn."""
    names = ("ours", "theirs", "plain") if plain else ("ours", "theirs")
    sides = {name: Side(__file__, "--work", name, "--cases", case) for name in names}
    row: dict[str, Any] = {}
    for name, side in sides.items():
        first = side.step()
        row[name] = {"first_step_s": first["seconds"], "first_loss": first["loss"], "times_ms": []}
        side.step()  # the second one may still set things up
    for _ in range(rounds):
        for name, side in sides.items():
            told = side.step()
            row[name]["times_ms"].append(1000 * told["seconds"])
            row[name]["peak_mib"] = told["peak_bytes"] / 2**20
    for name, side in sides.items():
        side.end()
        row[name]["quartiles_ms"] = np.percentile(row[name]["times_ms"], (25, 50, 75)).tolist()
        row[name]["median_ms"] = row[name]["quartiles_ms"][1]
    row["ratio"], row["memory_ratio"] = ratios(row["ours"], row["theirs"])
    return row


def ratios(mine: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Of the time of a step, round by round, and of the peak memory."""
    times = (one / two for one, two in zip(mine["times_ms"], other["times_ms"], strict=True))
    return statistics.median(times), mine["peak_mib"] / other["peak_mib"]


def shown(side: dict[str, Any]) -> str:
    """The median of its steps, and the quartiles."""
    low, median, high = side["quartiles_ms"]
    return f"{median:.0f} ms ({low:.0f} to {high:.0f})"


def draw(rows: dict[str, Any], path: Path) -> None:
    """Bars of time and of memory as a share of PEFT's: ours, and MindSpore's own operators where they were timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"ours": "mindpet", "plain": "MindSpore's own operators"}
    sides = [side for side in names if all(side in row for row in rows.values())]
    places, height = np.arange(len(rows)), 0.8 / len(sides)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.6 * len(rows) + 1.4), sharey=True, layout="constrained")
    for which, (axis, title) in enumerate(zip(axes, ("time of a step", "peak memory"), strict=True)):
        for index, side in enumerate(sides):
            values = [ratios(row[side], row["theirs"])[which] for row in rows.values()]
            shift = (index - (len(sides) - 1) / 2) * height
            bars = axis.barh(places + shift, values, height, label=names[side], zorder=2)
            axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, bbox=paper)
        axis.axvline(1.0, color="black", linewidth=1, zorder=1)
        axis.set_title(title)
        axis.margins(x=0.14)
    axes[0].set_yticks(places, [f"{TITLES[CASES[case][0]]}, {CASES[case][1]}" for case in rows])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(sides))
    figure.supxlabel("as a share of torch with PEFT, the line at 1; less is better")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Time, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument("--plain", action="store_true", help="time MindSpore's own operators too")
    parser.add_argument("--work", choices=("ours", "theirs", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        if options.work == "plain":
            os.environ["MINDPET_KERNELS"] = "0"
        answer((theirs if options.work == "theirs" else ours)(*CASES[options.cases[0]]))
        return
    load = load_of_machine()
    print(
        "Medians of a step (and quartiles); ratios are ours to the other's: less than 1 is faster, or smaller.",
        flush=True,
    )
    rows = {}
    for case in options.cases:
        rows[case] = row = measure(case, options.rounds, options.plain)
        mine, yours = row["ours"], row["theirs"]
        print(
            f"{case}: {shown(mine)}, PEFT {shown(yours)}, ratio {row['ratio']:.2f}; peak memory "
            f"{mine['peak_mib']:.0f} and {yours['peak_mib']:.0f} MiB, ratio {row['memory_ratio']:.2f}; first step "
            f"{mine['first_step_s']:.1f} and {yours['first_step_s']:.1f} s",
            flush=True,
        )
        if options.plain:
            time, memory = ratios(mine, row["plain"])
            peak = f"{row['plain']['peak_mib']:.0f} MiB, ratio {memory:.2f}"
            print(f"    without our kernels {shown(row['plain'])}, ratio {time:.2f}; peak {peak}", flush=True)
    if options.picture:
        draw(rows, options.picture)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in ("mindspore", "torch", "transformers", "peft", "numpy")}
        machine = {"system": platform.platform(), "cores": os.cpu_count(), "load": load}
        content = {"rows": rows, "versions": versions, "machine": machine}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
