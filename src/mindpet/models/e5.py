r"""multilingual-e5-small in one file of four-bit weights (magic ``E5S1``), read as a BERT with its own tokenizer.

Wang et al. 2024, Multilingual E5 Text Embeddings, arXiv:2402.05672: a BERT of 12 layers with the SentencePiece
vocabulary of XLM-R. The file is laid out as `mindpet.models.e5_format` says. Thirty-two weights of a row are one block
of 18 bytes, a float16 scale d and 16 bytes q: the low halves are the first sixteen weights, the high halves the others.

.. math:: w_j = d\,\bigl((q_j \bmod 16) - 8\bigr), \qquad w_{j+16} = d\,\bigl(\lfloor q_j / 16 \rfloor - 8\bigr)
"""

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindpet.models.e5_format import BLOCK, read_layout
from mindpet.models.loading import PretrainedFilesError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

_ROWS_AT_ONCE = 8192  # bounds what dequantisation needs beside its result
_FULLWIDTH_TILDE, _UNUSED = "\uff5e", "\ufdd0"  # SentencePiece keeps the one as it is; the other never is a character


def e5_config(path: str | Path) -> dict[str, Any]:
    """The sizes, as the ``config.json`` that Hugging Face has for this network.

    Raises:
        PretrainedFilesError: not such a file, or a broken one.
    """
    file = read_layout(path)
    sizes = file.sizes
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.inner,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": sizes.positions,
        "type_vocab_size": sizes.types,
        "initializer_range": 0.02,
        "layer_norm_eps": float(str(np.float32(sizes.epsilon))),  # 1e-12, not what float32 makes of it
        "position_embedding_type": "absolute",
        "bos_token_id": file.special["<s>"],
        "eos_token_id": file.special["</s>"],
        "pad_token_id": file.special["<pad>"],
    }


def e5_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Every weight in float32, under the names of Hugging Face's ``BertModel``. There is no pooler.

    Raises:
        PretrainedFilesError: not such a file, or a broken one; nothing big is allocated before that is known.
    """
    file = read_layout(path)
    tensors = {}
    for stored in file.tensors:
        raw = file.data[stored.offset : stored.offset + stored.nbytes]
        tensors[stored.name] = _dequantise(raw, stored.shape) if stored.four_bit else _floats(raw, stored.shape)
    return tensors


def e5_tokenizer(path: str | Path) -> "Tokenizer":
    """XLM-R's tokenizer: SentencePiece's normalisation, the pieces of the file, ``<s> text </s>``.

    The file keeps what becomes of single characters; sequences (e and an accent) compose as NFKC says, which is what
    SentencePiece does.

    Raises:
        PretrainedFilesError: not such a file, or a broken one.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    file = read_layout(path)
    try:
        pieces = [file.text[start:end].decode() for start, end in zip(file.offsets[:-1], file.offsets[1:])]
    except UnicodeDecodeError as error:
        raise PretrainedFilesError(f"{path}: a piece of the vocabulary is not UTF-8: {error}") from error
    wrong = [f"{name} at {at}, where {pieces[at]!r} is" for name, at in file.special.items() if pieces[at] != name]
    if wrong:
        raise PretrainedFilesError(f"{path} has special pieces in the wrong place: {', '.join(wrong)}.")
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, file.scores.tolist())), file.special["<unk>"], False))
    tokenizer.normalizer = _normalizer(file.characters)
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(name, file.special[name]) for name in ("<s>", "</s>")],
    )
    tokenizer.add_special_tokens(list(file.special))
    if "<mask>" in pieces[-1:]:
        tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.enable_padding(pad_id=file.special["<pad>"], pad_token="<pad>")
    return tokenizer


def _floats(raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(raw, "<f4").reshape(shape).astype(np.float32)


def _dequantise(raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The equation above, a few thousand rows at once: (rows, columns)."""
    rows, columns = shape
    blocks = np.frombuffer(raw, BLOCK).reshape(rows, columns // 32)
    weights = np.empty((rows, columns // 32, 32), np.float32)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part, out = blocks[start : start + _ROWS_AT_ONCE], weights[start : start + _ROWS_AT_ONCE]
        out[..., :16] = part["halves"] & 15
        out[..., 16:] = part["halves"] >> 4
        out -= 8
        out *= part["scale"].astype(np.float32)[..., None]
    return weights.reshape(shape)


def _normalizer(characters: dict[str, str]) -> "Normalizer":
    """NFKC, with what SentencePiece adds to it: characters that vanish or become a space, and one that stays."""
    from tokenizers import Regex, normalizers

    steps: list[Normalizer] = []
    for becomes in ("", " "):
        members = "".join(f"\\x{{{ord(one):x}}}" for one, to in characters.items() if to == becomes)
        if members:
            steps.append(normalizers.Replace(Regex(f"[{members}]"), becomes))
    for one, becomes in characters.items():
        if becomes not in ("", " ") and unicodedata.normalize("NFKC", one) != becomes:
            steps.append(normalizers.Replace(one, becomes))
    kept = _FULLWIDTH_TILDE not in characters
    steps += [normalizers.Replace(_FULLWIDTH_TILDE, _UNUSED)] if kept else []
    steps.append(normalizers.NFKC())
    steps += [normalizers.Replace(_UNUSED, _FULLWIDTH_TILDE)] if kept else []
    return normalizers.Sequence(steps)
