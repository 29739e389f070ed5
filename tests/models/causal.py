"""Random causal language models, small enough for both modes, with weights large enough for everything to matter."""

import json
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from mindpet.models import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from mindpet.models.loading import save_tensors

WORDS = 31
LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
}
GPT2 = {"vocab_size": WORDS, "n_positions": 200, "n_embd": 16, "n_layer": 2, "n_head": 4}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = ("llama", "llama, tied", "gpt2", "gpt2, untied")


def build(family: str, layers: int = 2, **changes) -> nn.Cell:
    """A network of random numbers that does not train now. One layer compiles in little more than half the time."""
    kind, _, head = family.partition(", ")
    if kind == "llama":
        sizes = {**LLAMA, "num_hidden_layers": layers, "tie_word_embeddings": head == "tied", **changes}
        network = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        sizes = {**GPT2, **NO_DROPOUT, "n_layer": layers, "tie_word_embeddings": head != "untied", **changes}
        network = GPT2LMHeadModel(GPT2Config(**sizes))
    generator = np.random.default_rng(11)
    for parameter in network.get_parameters():
        value = generator.standard_normal(parameter.shape).astype(np.float32) * 0.3
        is_scale = parameter.name.endswith(("norm.weight", "gamma"))
        parameter.set_data(Tensor(1 + value if is_scale else value))
    return network.set_train(False)


def write(directory: Path, family: str, **changes) -> nn.Cell:
    """The same network, and a directory that it loads from."""
    network, kind = build(family, **changes), family.partition(", ")[0]
    sizes = {**(LLAMA if kind == "llama" else GPT2), "tie_word_embeddings": network.tied, **changes}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    save_tensors(network, directory)
    return network


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, WORDS, (rows, length)).astype(np.int32)


def logits(network: nn.Cell, ids, mask=None) -> np.ndarray:
    ids = np.asarray(ids, np.int32)
    mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int32)
    return network(Tensor(ids), Tensor(mask)).asnumpy()


def fill(network: nn.Cell, seed: int = 3) -> nn.Cell:
    """Random numbers in everything that trains, so that a fresh delta changes the outputs."""
    generator = np.random.default_rng(seed)
    for parameter in network.trainable_params():
        parameter.set_data(Tensor(generator.standard_normal(parameter.shape).astype(np.float32) * 0.5))
    return network
