"""Networks as lists of sizes: known ones by name, others by the content of their ``config.json``. No weights.

Paths are those of our networks (and of Hugging Face's), so the patterns of a run file mean the same cells here. Nothing
here imports MindSpore.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mindpet._near import near


@dataclass(frozen=True)
class CellSizes:
    """One cell, as far as counting needs it.

    Attributes:
        path: where it is.
        kind: ``dense``, ``embedding``, ``norm`` (LayerNorm), ``rms_norm``, ``slot``, where a prefix may go,
            ``prompts``, where virtual tokens may go, or ``adaption``, where a prompt beside attention may.
        shapes: parameter name to shape; the last three have none.
        slot: layers, and size of all keys of a layer together, of a slot; 1 and the size of an embedding, of the other
            two.
    """

    path: str
    kind: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    slot: tuple[int, int] = (0, 0)

    def parameters(self) -> dict[str, int]:
        """Path of each parameter to its size."""
        return {f"{self.path}.{name}": math.prod(shape) for name, shape in self.shapes.items()}


@dataclass(frozen=True)
class NetworkSizes:
    """A network.

    Attributes:
        family: ``bert``, ``gpt2``, ``llama`` or ``chatglm``: whose usual targets fit.
        cells: in the network's order.
        heads: paths of the cells of the task's head, which train whole.
    """

    family: str
    cells: list[CellSizes]
    heads: tuple[str, ...] = ()


def preset(name: str) -> dict[str, Any]:
    """The ``config.json`` of a network known by that name, as far as sizes go.

    Raises:
        ValueError: unknown; the message names the known ones.

    >>> preset("bert-base-chinese")["vocab_size"]
    21128
    """
    if name not in PRESETS:
        raise ValueError(f"There is no network {name!r}: the known ones are {', '.join(PRESETS)}{near(name, PRESETS)}.")
    return dict(PRESETS[name])


def network_sizes(content: Mapping[str, Any], labels: int = 2) -> NetworkSizes:
    """The cells of the network that a ``config.json`` describes.

    Args:
        content: with ``model_type``.
        labels: classes of the head of a ``bert``; 0 for none.

    Raises:
        ValueError: no object; another ``model_type``, a size that is missing or not a positive int, all in one
            message.

    >>> [cell.path for cell in network_sizes(preset("gpt2")).cells[:3]]
    ['transformer.wte', 'transformer.wpe', 'transformer.h.0.ln_1']
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"The content of a config.json must be an object, but is {content!r}.")
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ValueError(f"'model_type' must be one of {', '.join(_FAMILIES)}, but got {kind!r}.")
    family, needed, cells_of = _FAMILIES[kind]
    wrong = [
        f"'{name}' is {content[name]!r}" if name in content else f"'{name}' is missing"
        for name in (*needed, *(name for name in _OPTIONAL if content.get(name) is not None))
        if type(content.get(name)) is not int or content[name] <= 0
    ]
    hidden, heads = (needed[1], needed[3]) if family != "chatglm" else ("kv_channels", "kv_channels")
    if not wrong and not content.get("head_dim") and content[hidden] % content[heads]:
        wrong.append(f"'{hidden}' ({content[hidden]}) is not a multiple of '{heads}' ({content[heads]})")
    if type(labels) is not int or labels < 0:
        wrong.append(f"'labels' is {labels!r}")
    if wrong:
        raise ValueError(f"The sizes of a {kind} must be positive ints, but {', '.join(wrong)}.")
    cells = cells_of(content)
    if family != "bert" or not labels:
        return NetworkSizes(family, cells)
    return NetworkSizes(family, [*cells, _dense("classifier", content["hidden_size"], labels)], ("classifier",))


def _dense(path: str, inputs: int, outputs: int, has_bias: bool = True) -> CellSizes:
    return CellSizes(path, "dense", {"weight": (outputs, inputs), **({"bias": (outputs,)} if has_bias else {})})


def _embedding(path: str, rows: int, size: int) -> CellSizes:
    return CellSizes(path, "embedding", {"embedding_table": (rows, size)})


def _norm(path: str, size: int) -> CellSizes:
    return CellSizes(path, "norm", {"gamma": (size,), "beta": (size,)})


def _rms_norm(path: str, size: int) -> CellSizes:
    return CellSizes(path, "rms_norm", {"weight": (size,)})


def _slot(path: str, layers: int, width: int) -> CellSizes:
    return CellSizes(path, "slot", slot=(layers, width))


def _place(path: str, hidden: int) -> CellSizes:
    """Of prompts or of an adaption prompt: its name says which."""
    return CellSizes(path, path.rpartition(".")[2], slot=(1, hidden))


def _bert(sizes: Mapping[str, Any]) -> list[CellSizes]:
    hidden, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    at = "bert.embeddings"
    cells = [
        _embedding(f"{at}.word_embeddings", sizes["vocab_size"], hidden),
        _embedding(f"{at}.position_embeddings", sizes.get("max_position_embeddings", 512), hidden),
        _embedding(f"{at}.token_type_embeddings", sizes.get("type_vocab_size", 2), hidden),
        _norm(f"{at}.LayerNorm", hidden),
    ]
    for layer in range(layers):
        at = f"bert.encoder.layer.{layer}"
        cells += [_dense(f"{at}.attention.self.{name}", hidden, hidden) for name in ("query", "key", "value")]
        cells.append(_place(f"{at}.attention.self.adaption", hidden))
        cells += [
            _dense(f"{at}.attention.output.dense", hidden, hidden),
            _norm(f"{at}.attention.output.LayerNorm", hidden),
        ]
        cells += [_dense(f"{at}.intermediate.dense", hidden, inner), _dense(f"{at}.output.dense", inner, hidden)]
        cells.append(_norm(f"{at}.output.LayerNorm", hidden))
    cells += [_slot("bert.encoder.prefix", layers, hidden), _dense("bert.pooler.dense", hidden, hidden)]
    return [*cells, _place("bert.prompts", hidden)]


def _gpt2(sizes: Mapping[str, Any]) -> list[CellSizes]:
    hidden, layers = sizes["n_embd"], sizes["n_layer"]
    inner = sizes.get("n_inner") or 4 * hidden
    cells = [_embedding("transformer.wte", sizes["vocab_size"], hidden)]
    cells.append(_embedding("transformer.wpe", sizes.get("n_positions", 1024), hidden))
    for layer in range(layers):
        at = f"transformer.h.{layer}"
        cells += [_norm(f"{at}.ln_1", hidden), _dense(f"{at}.attn.c_attn", hidden, 3 * hidden)]
        cells += [_dense(f"{at}.attn.c_proj", hidden, hidden), _place(f"{at}.attn.adaption", hidden)]
        cells.append(_norm(f"{at}.ln_2", hidden))
        cells += [_dense(f"{at}.mlp.c_fc", hidden, inner), _dense(f"{at}.mlp.c_proj", inner, hidden)]
    cells += [_norm("transformer.ln_f", hidden), _slot("transformer.prefix", layers, hidden)]
    cells.append(_place("transformer.prompts", hidden))
    tied = sizes.get("tie_word_embeddings", True)
    return cells if tied else [*cells, _dense("lm_head", hidden, sizes["vocab_size"], False)]


def _llama(sizes: Mapping[str, Any]) -> list[CellSizes]:
    hidden, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    heads = sizes["num_attention_heads"]
    size = sizes.get("head_dim") or hidden // heads
    keys = (sizes.get("num_key_value_heads") or heads) * size
    all_biased = bool(sizes.get("attention_bias"))
    biased = all_biased or sizes["model_type"] == "qwen2"  # queries, keys and values, not the output
    wide = bool(sizes.get("mlp_bias"))
    cells = [_embedding("model.embed_tokens", sizes["vocab_size"], hidden)]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        cells += [
            _dense(f"{at}.self_attn.q_proj", hidden, heads * size, biased),
            _dense(f"{at}.self_attn.k_proj", hidden, keys, biased),
            _dense(f"{at}.self_attn.v_proj", hidden, keys, biased),
            _dense(f"{at}.self_attn.o_proj", heads * size, hidden, all_biased),
            _place(f"{at}.self_attn.adaption", hidden),
            _dense(f"{at}.mlp.gate_proj", hidden, inner, wide),
            _dense(f"{at}.mlp.up_proj", hidden, inner, wide),
            _dense(f"{at}.mlp.down_proj", inner, hidden, wide),
            _rms_norm(f"{at}.input_layernorm", hidden),
            _rms_norm(f"{at}.post_attention_layernorm", hidden),
        ]
    cells += [_rms_norm("model.norm", hidden), _slot("model.prefix", layers, keys)]
    cells.append(_place("model.prompts", hidden))
    return (
        cells if sizes.get("tie_word_embeddings") else [*cells, _dense("lm_head", hidden, sizes["vocab_size"], False)]
    )


def _chatglm(sizes: Mapping[str, Any]) -> list[CellSizes]:
    """ChatGLM2: queries, keys and values in one layer, the two halves of SwiGLU in another."""
    hidden, inner, layers = sizes["hidden_size"], sizes["ffn_hidden_size"], sizes["num_layers"]
    keys = sizes["multi_query_group_num"] * sizes["kv_channels"]
    cells = [_embedding("transformer.embedding.word_embeddings", sizes["padded_vocab_size"], hidden)]
    for layer in range(layers):
        at = f"transformer.encoder.layers.{layer}"
        cells += [
            _rms_norm(f"{at}.input_layernorm", hidden),
            _dense(f"{at}.self_attention.query_key_value", hidden, hidden + 2 * keys, bool(sizes.get("add_qkv_bias"))),
            _dense(f"{at}.self_attention.dense", hidden, hidden, False),
            _place(f"{at}.self_attention.adaption", hidden),
            _rms_norm(f"{at}.post_attention_layernorm", hidden),
            _dense(f"{at}.mlp.dense_h_to_4h", hidden, 2 * inner, False),
            _dense(f"{at}.mlp.dense_4h_to_h", inner, hidden, False),
        ]
    cells += [_rms_norm("transformer.encoder.final_layernorm", hidden), _slot("transformer.prefix", layers, keys)]
    cells.append(_place("transformer.prompts", hidden))
    return [*cells, _dense("transformer.output_layer", hidden, sizes["padded_vocab_size"], False)]


_USUAL = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_OPTIONAL = ("max_position_embeddings", "type_vocab_size", "n_positions", "n_inner", "head_dim", "num_key_value_heads")
# model_type to family, sizes that it must have, and its cells
_FAMILIES: dict[str, tuple[str, tuple[str, ...], Callable[[Mapping[str, Any]], list[CellSizes]]]] = {
    "bert": ("bert", _USUAL, _bert),
    "gpt2": ("gpt2", ("vocab_size", "n_embd", "n_layer", "n_head"), _gpt2),
    "llama": ("llama", _USUAL, _llama),
    "qwen2": ("llama", _USUAL, _llama),
    "chatglm": (
        "chatglm",
        ("padded_vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "multi_query_group_num", "kv_channels"),
        _chatglm,
    ),
}


def _sizes(kind: str, vocabulary: int, hidden: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **dict(zip(_USUAL, (vocabulary, hidden, layers, heads, inner))), **more}


def _gpt2_sizes(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "vocab_size": 50257, "n_embd": hidden, "n_layer": layers, "n_head": heads}


PRESETS: dict[str, dict[str, Any]] = {
    "bert-base-chinese": _sizes("bert", 21128, 768, 12, 12, 3072),
    "bert-base-uncased": _sizes("bert", 30522, 768, 12, 12, 3072),
    "minilm": _sizes("bert", 30522, 384, 6, 12, 1536),
    "multilingual-e5-small": _sizes("bert", 250037, 384, 12, 12, 1536),
    "gpt2": _gpt2_sizes(768, 12, 12),
    "gpt2-medium": _gpt2_sizes(1024, 24, 16),
    "gpt2-large": _gpt2_sizes(1280, 36, 20),
    "gpt2-xl": _gpt2_sizes(1600, 48, 25),
    "llama-7b": _sizes("llama", 32000, 4096, 32, 32, 11008),
    "llama-13b": _sizes("llama", 32000, 5120, 40, 40, 13824),
    "llama-70b": _sizes("llama", 32000, 8192, 80, 64, 28672, num_key_value_heads=8),
    "llama3-8b": _sizes("llama", 128256, 4096, 32, 32, 14336, num_key_value_heads=8),
    "llama3-70b": _sizes("llama", 128256, 8192, 80, 64, 28672, num_key_value_heads=8),
    "smollm2-135m": _sizes("llama", 49152, 576, 30, 9, 1536, num_key_value_heads=3, tie_word_embeddings=True),
    "smollm2-360m": _sizes("llama", 49152, 960, 32, 15, 2560, num_key_value_heads=5, tie_word_embeddings=True),
    "smollm2-1.7b": _sizes("llama", 49152, 2048, 24, 32, 8192, num_key_value_heads=32, tie_word_embeddings=True),
    "qwen2.5-0.5b": _sizes("qwen2", 151936, 896, 24, 14, 4864, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2.5-7b": _sizes("qwen2", 152064, 3584, 28, 28, 18944, num_key_value_heads=4),
    "glm2-6b": {
        "model_type": "chatglm",
        "padded_vocab_size": 65024,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "num_layers": 28,
        "num_attention_heads": 32,
        "multi_query_group_num": 2,
        "kv_channels": 128,
        "add_qkv_bias": True,
    },
}
DTYPES = {"glm2-6b": "float16"}  # of weights, where it is not float32
