"""How many parameters each method adds, as a formula of the sizes of a cell. Nothing here imports MindSpore.

The defaults and usual targets are those of the methods' records in `mindpet.delta`; the tests hold the two together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mindpet.train.presets import CellSizes


@dataclass(frozen=True)
class Counter:
    """How to count for one method.

    Attributes:
        options: name to default, of those that the count depends on.
        others: names of those that it does not depend on.
        adapts: kinds of cells.
        targets: family to usual targets.
        added: parameters that it adds at a cell.
        trains: whether a parameter of the network itself trains.
    """

    options: dict[str, Any]
    others: tuple[str, ...] = ()
    adapts: tuple[str, ...] = ()
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    added: Callable[[CellSizes, dict[str, Any]], int] = lambda cell, given: 0
    trains: Callable[[str, dict[str, Any]], bool] = lambda path, given: False


def _lora(cell: CellSizes, given: dict[str, Any]) -> int:
    """A (rank, in) and B (out, rank); for an embedding (rank, vocabulary) and (dim, rank)."""
    table = cell.shapes["weight" if cell.kind == "dense" else "embedding_table"]
    return given["rank"] * sum(table)


def _adapter(cell: CellSizes, given: dict[str, Any]) -> int:
    """Two dense layers with biases between the output's size and the bottleneck's."""
    hidden, size = cell.shapes["weight"][0], given["size"]
    return 2 * hidden * size + hidden + size


def _low_rank_adapter(cell: CellSizes, given: dict[str, Any]) -> int:
    """The same with each weight as two thin ones."""
    hidden, factor = cell.shapes["weight"][0], given["reduction_factor"]
    if factor > hidden:
        raise ValueError(f"'reduction_factor' must be at most {hidden}, the size of {cell.path}, but got {factor}.")
    width = hidden // factor
    return 2 * given["rank"] * (hidden + width) + hidden + width


def _prefix(cell: CellSizes, given: dict[str, Any]) -> int:
    """For each layer an embedding and a two-layer network to a key and a value, or these themselves."""
    (layers, width), embed, mid = cell.slot, given["embed_dim"], given["mid_dim"]
    if not given["projection"]:
        return layers * given["tokens"] * 2 * width
    return layers * (given["tokens"] * embed + (embed * mid + mid) + (mid * 2 * width + 2 * width))


def _ptuning2(cell: CellSizes, given: dict[str, Any]) -> int:
    """One table for all layers, or an embedding and a two-layer network that gives it."""
    (layers, width), tokens, mid = cell.slot, given["tokens"], given["projection_dim"]
    table = layers * 2 * width
    if not given["projection"]:
        return tokens * table
    return tokens * width + (width * mid + mid) + (mid * table + table)


def _loha(cell: CellSizes, given: dict[str, Any]) -> int:
    """Two pairs of low-rank matrices."""
    return 2 * given["rank"] * sum(cell.shapes["weight"])


def _bitfit(path: str, given: dict[str, Any]) -> bool:
    return path.endswith("bias") or (given["include_norm"] and path.endswith(".beta"))


_AFTER_BLOCKS = {
    "bert": ("*.attention.output.dense", "*.layer.*.output.dense"),
    "gpt2": ("*.attn.c_proj", "*.mlp.c_proj"),
    "llama": ("*.self_attn.o_proj", "*.mlp.down_proj"),
    "chatglm": ("*.self_attention.dense", "*.dense_4h_to_h"),
}
_ATTENTION = {
    "bert": ("*.query", "*.value"),
    "gpt2": ("*.c_attn",),
    "llama": ("*.q_proj", "*.v_proj"),
    "chatglm": ("*.query_key_value",),
}
_SLOT = dict.fromkeys(_ATTENTION, ("*prefix",))
COUNTERS = {
    "lora": Counter(
        {"rank": 8, "rank_pattern": {}},
        ("alpha", "dropout", "rank_stabilised", "alpha_pattern"),
        ("dense", "embedding"),
        _ATTENTION,
        _lora,
    ),
    "adapter": Counter({"size": 64}, ("non_linearity",), ("dense",), _AFTER_BLOCKS, _adapter),
    "low_rank_adapter": Counter(
        {"reduction_factor": 32, "rank": 1}, ("non_linearity",), ("dense",), _AFTER_BLOCKS, _low_rank_adapter
    ),
    "prefix": Counter(
        {"tokens": 20, "embed_dim": 128, "mid_dim": 256, "projection": True},
        ("dropout",),
        ("slot",),
        _SLOT,
        _prefix,
    ),
    "ptuning2": Counter(
        {"tokens": 20, "projection": False, "projection_dim": 128}, ("dropout",), ("slot",), _SLOT, _ptuning2
    ),
    "loha": Counter({"rank": 8, "rank_pattern": {}}, ("alpha", "alpha_pattern"), ("dense",), _ATTENTION, _loha),
    "bitfit": Counter({"include_norm": False}, trains=_bitfit),
}
ALIASES = {"prefixtuning": "prefix"}


def method_key(name: str) -> str:
    """The name under which a method is listed here, whatever it is called in a run file.

    >>> method_key("LoRA"), method_key("PrefixTuning")
    ('lora', 'prefix')
    """
    return ALIASES.get(name.lower(), name.lower())
