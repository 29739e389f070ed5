"""LLaMA in a GGUF file: sizes, weights in float32 and tokenizer, under Hugging Face's names.

The rows of the query and key projections are stored in the order of interleaved rotary positions; the networks here
turn halves, as Hugging Face's do, so they are put back.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindpet import _checks
from mindpet.models.loading import PretrainedFilesError, overlaps

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAGIC = b"GGUF"
_SPECIAL, _ADDED = 3, 4  # token types
# what parsing and dequantising a broken file raises
_BROKEN = (ValueError, TypeError, KeyError, IndexError, ArithmeticError, OSError, MemoryError, RecursionError)
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is in the file."""

    kind: int
    shape: tuple[int, ...]  # of what is stored: rows of bytes for a quantised tensor
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _File:
    """The head of a file: what it says of the model, and where the tensors are."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, _Stored]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """A value of the metadata.

        Raises:
            PretrainedFilesError: it is missing and has no default, or is of another type.
        """
        value = self.metadata.get(key, default)
        if value is ...:
            raise PretrainedFilesError(f"{self.path} says nothing of {key!r}{_checks.near(key, self.metadata)}.")
        if value is not default and (isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind)):
            raise PretrainedFilesError(f"{self.path}: {key!r} has an unusable value, {_checks.shown(value)}.")
        return value


def gguf_config(path: str | Path) -> dict[str, Any]:
    """The sizes, as the ``config.json`` that Hugging Face has for this network.

    Raises:
        PretrainedFilesError: not such a file, a broken one, or a network that is not here.
    """
    file = _open(path)
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise PretrainedFilesError(f"{path} holds a {architecture!r}; of GGUF files only 'llama' is read.")
    heads = file.get("llama.attention.head_count", int)
    hidden = file.get("llama.embedding_length", int)
    if heads < 1:
        raise PretrainedFilesError(f"{path}: llama.attention.head_count is {heads}, but must be positive.")
    head_dim = file.get("llama.attention.key_length", int, hidden // heads)
    for key, plain in {
        "llama.rope.scaling.type": "none",
        "llama.rope.dimension_count": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.expert_count": 0,
    }.items():
        if file.metadata.get(key, plain) != plain:
            shown = _checks.shown(file.metadata[key])
            raise PretrainedFilesError(f"{path}: {key} is {shown}, which is not supported, only {plain!r} is.")
    if "token_embd.weight" not in file.tensors:
        raise PretrainedFilesError(f"{path} has no tensor 'token_embd.weight'.")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.get("llama.feed_forward_length", int),
        "num_hidden_layers": file.get("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("llama.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.get("llama.context_length", int),
        "rms_norm_eps": _short(file.get("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _short(file.get("llama.rope.freq_base", float, 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    for here, there in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        number = file.get(f"tokenizer.ggml.{there}_token_id", int, None)
        if number is not None:
            config[f"{here}_token_id"] = number
    return config


def gguf_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Every weight in float32, under the names and in the orientation of Hugging Face's ``LlamaForCausalLM``.

    Raises:
        PretrainedFilesError: not such a file, a broken one, tensors that a LLaMA here does not have.
    """
    from gguf import GGMLQuantizationType, dequantize

    config, file = gguf_config(path), _open(path)
    names = {name: _hugging_face(name) for name in file.tensors}
    unknown = [name for name, there in names.items() if there is None]
    if unknown:
        raise PretrainedFilesError(f"{path} has tensors that are not supported: {', '.join(unknown)}.")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    data, tensors = np.memmap(path, mode="r"), {}
    for name, stored in file.tensors.items():
        try:
            raw = data[stored.offset : stored.offset + stored.nbytes]
            value = dequantize(raw.view(stored.dtype).reshape(stored.shape), GGMLQuantizationType(stored.kind))
            value = np.ascontiguousarray(value, np.float32)
            count = next((heads[part] for part in heads if f".{part}." in name), None)
            tensors[str(names[name])] = value if count is None else _halves(value, count)
        except (*_BROKEN, NotImplementedError) as error:
            raise PretrainedFilesError(f"{path}: the tensor {name!r} cannot be read: {error}") from error
    return tensors


def gguf_tokenizer(path: str | Path) -> "Tokenizer":
    """The byte-level BPE of the file; its special tokens are those of the type 3.

    Raises:
        PretrainedFilesError: not such a file, a broken one, another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    file = _open(path)
    kind, before = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str, "gpt-2")
    level = pre_tokenizers.ByteLevel(add_prefix_space=bool(file.get("tokenizer.ggml.add_space_prefix", bool, False)))
    splits: dict[str, Callable[[], Any]] = {
        "gpt-2": lambda: level,
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]),
    }
    if kind != "gpt2" or before not in splits:
        known = " or ".join(splits)
        raise PretrainedFilesError(f"{path} has a tokenizer {kind!r} with {before!r}; read are 'gpt2' with {known}.")
    words = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", list, [1] * len(words))
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", list)]
    if len(set(words)) != len(words) or len(types) != len(words):
        raise PretrainedFilesError(
            f"{path}: {len(words)} tokens, {len(set(words))} of them different, {len(types)} types."
        )
    try:
        tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    except Exception as error:  # the library raises bare Exception
        raise PretrainedFilesError(f"{path}: its tokenizer is broken: {error}") from error
    tokenizer.pre_tokenizer, tokenizer.decoder = splits[before](), decoders.ByteLevel()
    for word, kind_of_word in zip(words, types):
        if kind_of_word in (_SPECIAL, _ADDED):
            tokenizer.add_tokens([AddedToken(word, special=kind_of_word == _SPECIAL, normalized=False)])
    first = file.get("tokenizer.ggml.bos_token_id", int, None)
    if file.get("tokenizer.ggml.add_bos_token", bool, False) and first is not None:
        if not 0 <= first < len(words):
            raise PretrainedFilesError(f"{path}: its first token is number {first} of {len(words)}.")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{words[first]} $A",
            pair=f"{words[first]} $A {words[first]}:1 $B:1",
            special_tokens=[(words[first], first)],
        )
    return tokenizer


def gguf_chat_template(path: str | Path) -> str | None:
    """The Jinja text, if there is one."""
    return _open(path).get("tokenizer.chat_template", str, None)


def _hugging_face(name: str) -> str | None:
    """The name of a tensor there.

    >>> _hugging_face("blk.3.attn_q.weight"), _hugging_face("rope_freqs.weight")
    ('model.layers.3.self_attn.q_proj.weight', None)
    """
    stem, _, last = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in _LAYER:
        return f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{last}"
    return f"{_TOP[stem]}.{last}" if stem in _TOP else None


def _halves(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from interleaved pairs (0, 1, 2, 3) to halves (0, 2, 1, 3)."""
    return value.reshape(heads, len(value) // heads // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)


def _short(value: float) -> float:
    """1e-05 rather than what float32 makes of it."""
    return float(str(np.float32(value)))


def _open(path: str | Path) -> _File:
    try:
        path = Path(path).resolve()
        stat = path.stat()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in its name; links in a circle
        raise PretrainedFilesError(f"{path} cannot be read: {error}") from error
    return _parsed(path, stat.st_mtime_ns, stat.st_size)


def _bounded(reader: type) -> type:
    """A reader that stops where the file does; the library's own goes on, as often as a number in the file says."""

    class Bounded(reader):
        @property
        def data(self) -> np.ndarray:
            return self._bytes

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._bytes = mapped.view(np.ndarray)  # of which a piece is made in a quarter of the time

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
            kind, begin = np.dtype(dtype), int(offset)
            end = begin + kind.itemsize * int(count)
            if end > len(self._bytes):
                raise ValueError(f"it has {len(self._bytes)} bytes, and what byte {begin} begins needs {end}")
            return self._bytes[begin:end].view(kind.newbyteorder(override_order or self.byte_order))

    return Bounded


@lru_cache(maxsize=2)  # parsing a vocabulary takes seconds
def _parsed(path: Path, changed: int, size: int) -> _File:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("Reading GGUF files needs the package gguf: pip install 'mindpet[text]'.") from error
    try:
        reader = _bounded(GGUFReader)(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            tensor.name: _Stored(int(tensor.tensor_type), tensor.data.shape, tensor.data.dtype, int(tensor.data_offset))
            for tensor in reader.tensors
        }
    except _BROKEN as error:
        raise PretrainedFilesError(f"{path} cannot be read as GGUF, or ends too early: {error}") from error
    shared = overlaps((name, stored.offset, stored.nbytes) for name, stored in tensors.items())
    if shared:
        raise PretrainedFilesError(f"{path} has tensors that overlap: {'; '.join(shared)}.")
    return _File(path, metadata, tensors)
