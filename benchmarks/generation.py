"""Time the generation of text beside transformers: SmolLM2-135M, one prompt, the likeliest token each time.

python benchmarks/generation.py [--model smollm2.gguf] [--rounds 7] [--prompt 32] [--tokens 64] [--json generation.json]

Each side is a process of its own with all cores and keeps keys and values; a round is a whole continuation of the
prompt by one and then by the other. Weights are the same for both, float32: those of the GGUF file, or random ones; the
two must say the same tokens. Needs torch and transformers.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from against_peft import SMOLLM2
from turns import Side, answer, load_of_machine


def weights(model: str | None, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """By the names of Hugging Face: those of a file, or random ones."""
    if model:
        from mindpet.models import open_pretrained

        return {name: value for name, value in open_pretrained(model).tensors().items() if name in shapes}
    generator = np.random.default_rng(0)
    return {
        name: np.ones(shape, np.float32) if "norm" in name else generator.normal(0, 0.05, shape).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def ours(model: str | None, prompt: list[int], tokens: int) -> Callable[[], list[int]]:
    """A function that continues the prompt."""
    import mindspore as ms
    from mindspore import Tensor

    import mindpet
    from mindpet import models

    ms.set_context(mode=ms.GRAPH_MODE)
    network = models.LlamaForCausalLM(models.LlamaConfig.from_content({"model_type": "llama", **SMOLLM2}, "SmolLM2"))
    named = {each.name.replace("embedding_table", "weight"): each for each in network.get_parameters()}
    for name, value in weights(model, {name: each.shape for name, each in named.items()}).items():
        named[name].set_data(Tensor(value))
    mindpet.accelerate(network)  # as `mindpet infer` does
    return lambda: list(models.generate(network, prompt, max_tokens=tokens))


def theirs(path: str | None, prompt: list[int], tokens: int) -> Callable[[], list[int]]:
    """A function that continues the prompt."""
    import torch
    import transformers

    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2)).eval()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights(path, {name: tuple(each.shape) for name, each in named.items()}).items():
            named[name].copy_(torch.tensor(value))
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def run() -> list[int]:
        with torch.no_grad():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()

    return run


def main() -> None:
    """Time, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 7), ("prompt", 32), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default=None, help="a GGUF file of SmolLM2-135M; random weights without")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--work", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        prompt = np.random.default_rng(1).integers(5, 30000, options.prompt).tolist()
        said: list[int] = []

        def run() -> float:
            said[:] = work()
            return 0.0

        work = {"ours": ours, "theirs": theirs}[options.work](options.model, prompt, options.tokens)
        answer(run, lambda: {"tokens": said})
        return
    load_of_machine()
    sizes: tuple[str, ...] = "--prompt", str(options.prompt), "--tokens", str(options.tokens)
    sizes += ("--model", options.model) if options.model else ()
    sides = {name: Side(__file__, "--work", name, *sizes) for name in ("ours", "theirs")}
    first = {name: side.step() for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            told = side.step()
            times[name].append(told["seconds"])
    for side in sides.values():
        side.end()
    rates = {name: options.tokens / statistics.median(taken) for name, taken in times.items()}
    ratio = statistics.median(their / our for our, their in zip(*times.values(), strict=True))
    same = first["ours"]["tokens"] == first["theirs"]["tokens"]
    print(
        f"generation: {rates['ours']:.1f} tokens a second, transformers {rates['theirs']:.1f}, ratio {ratio:.2f}; first"
        f" continuation {first['ours']['seconds']:.1f} and {first['theirs']['seconds']:.1f} s; the same tokens: {same}"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"rates": rates, "ratio": ratio, "seconds": times, "same": same}) + "\n")


if __name__ == "__main__":
    main()
