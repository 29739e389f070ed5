"""How many parameters each method adds, as a formula of the sizes of a cell. Nothing here imports MindSpore.

The defaults and usual targets are those of the methods' records in `mindpet.delta`; the tests hold the two together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from mindpet._kronecker import factors
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
        frozen: those of them that do not train.
        shared: parameters that all adapted cells have in common.
        shared_trains: whether these train.
        trains: whether a parameter of the network itself trains.
        beside: names of an adapted cell's own parameters that train as well.
        kept: bytes that the weight of an adapted cell takes, if not those of its dtype.
    """

    options: dict[str, Any]
    others: tuple[str, ...] = ()
    adapts: tuple[str, ...] = ()
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    added: Callable[[CellSizes, dict[str, Any]], int] = lambda cell, given: 0
    frozen: Callable[[CellSizes, dict[str, Any]], int] = lambda cell, given: 0
    shared: Callable[[Sequence[CellSizes], dict[str, Any]], int] = lambda cells, given: 0
    shared_trains: bool = False
    trains: Callable[[str, dict[str, Any]], bool] = lambda path, given: False
    beside: Callable[[dict[str, Any]], tuple[str, ...]] = lambda given: ()
    kept: Callable[[CellSizes, dict[str, Any]], int] | None = None


def _lora(cell: CellSizes, given: dict[str, Any]) -> int:
    """A (rank, in) and B (out, rank); for an embedding (rank, vocabulary) and (dim, rank)."""
    table = cell.shapes["weight" if cell.kind == "dense" else "embedding_table"]
    return given["rank"] * sum(table) + _lora_frozen(cell, given)


def _lora_frozen(cell: CellSizes, given: dict[str, Any]) -> int:
    """A and B as they started, where the weight is what they started from."""
    if given["start"] not in ("pissa", "olora"):
        return 0
    if cell.kind != "dense":
        raise ValueError(f"'start' {given['start']!r} is for dense layers, and {cell.path} is none.")
    return given["rank"] * sum(cell.shapes["weight"])


def _qlora_kept(cell: CellSizes, given: dict[str, Any]) -> int:
    """Codes, and the largest values of blocks in float32, or in bytes, whole groups of 256 with a scale each."""
    out, into = cell.shapes["weight"]
    blocks = -(-out * into // given["block_size"])
    groups = -(-blocks // 256)
    codes = blocks * given["block_size"] // (2 if given["bits"] == "nf4" else 1)
    return codes + 4 + ((256 + 4) * groups if given["double_quantisation"] else 4 * blocks + 4)


def _lora_bias(path: str, given: dict[str, Any]) -> bool:
    return given["bias"] == "all" and path.endswith(("bias", ".beta"))


def _lora_beside(given: dict[str, Any]) -> tuple[str, ...]:
    return ("bias",) if given["bias"] == "lora_only" else ()


def _dora(cell: CellSizes, given: dict[str, Any]) -> int:
    """LoRA, and a length for each row of the weight."""
    return given["rank"] * sum(cell.shapes["weight"]) + cell.shapes["weight"][0]


def _lora_fa(cell: CellSizes, given: dict[str, Any]) -> int:
    return given["rank"] * sum(cell.shapes["weight"])


def _lora_fa_frozen(cell: CellSizes, given: dict[str, Any]) -> int:
    """A."""
    return given["rank"] * cell.shapes["weight"][1]


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


_FEEDFORWARD = {
    "bert": ("*[0-9].output.dense",),
    "gpt2": ("*.mlp.c_proj",),
    "llama": ("*.mlp.down_proj",),
    "chatglm": ("*.dense_4h_to_h",),
}


def _ia3(cell: CellSizes, given: dict[str, Any]) -> int:
    """A factor for each input of a feed-forward layer, for each output of another."""
    chosen = given["feedforward"]
    if chosen is None:
        chosen = [pattern for patterns in _FEEDFORWARD.values() for pattern in patterns]
    on_input = any(fnmatchcase(cell.path, pattern) for pattern in ([chosen] if isinstance(chosen, str) else chosen))
    return cell.shapes["weight"][1 if on_input else 0]


def _parallel_adapter(cell: CellSizes, given: dict[str, Any]) -> int:
    """Two dense layers with biases, from the input to the bottleneck and on to the output."""
    (out, inputs), size = cell.shapes["weight"], given["size"]
    return size * (inputs + out) + size + out


def _mam(cell: CellSizes, given: dict[str, Any]) -> int:
    """A prefix in the slot, an adapter beside each dense layer."""
    return _prefix(cell, given) if cell.kind == "slot" else _parallel_adapter(cell, given)


def _adapter_fusion(cell: CellSizes, given: dict[str, Any]) -> int:
    """The adapters, query with a bias, key, and maybe value."""
    hidden = cell.shapes["weight"][0]
    return _fused(cell, given) + (3 if given["value"] else 2) * hidden**2 + hidden


def _fused(cell: CellSizes, given: dict[str, Any]) -> int:
    return given["adapters"] * _adapter(cell, given)


def _compacter(cell: CellSizes, given: dict[str, Any]) -> int:
    """Two hypercomplex layers with biases; A besides, where it is not shared."""
    hidden, size, n = cell.shapes["weight"][0], given["size"], given["phm_dim"]
    for name, value in (("size", size), (f"the size of {cell.path}", hidden)):
        if value % n:
            raise ValueError(f"'{name}' must be a multiple of 'phm_dim' ({n}), but is {value}.")
    matrices = given["rank"] * (hidden + size) if given["low_rank"] else hidden * size // n
    return 2 * matrices + hidden + size + (0 if given["shared"] else 2 * n**3)


def _compacter_shared(cells: Sequence[CellSizes], given: dict[str, Any]) -> int:
    """A."""
    return given["phm_dim"] ** 3 if given["shared"] else 0


def _prompt_tuning(cell: CellSizes, given: dict[str, Any]) -> int:
    """A table."""
    return given["tokens"] * cell.slot[1]


def _p_tuning(cell: CellSizes, given: dict[str, Any]) -> int:
    """A table, and three dense layers, or an LSTM in both directions and two."""
    hidden = cell.slot[1]
    inner = given["encoder_hidden"] or hidden
    table = given["tokens"] * hidden
    if given["encoder"] == "mlp":
        return table + inner * (hidden + 1) + inner * (inner + 1) + hidden * (inner + 1)
    inputs = [hidden, *[2 * inner] * (given["encoder_layers"] - 1)]
    lstm = sum(2 * 4 * inner * (size + inner + 2) for size in inputs)
    return table + lstm + 2 * inner * (2 * inner + 1) + hidden * (2 * inner + 1)


def _multitask_prompt_tuning(cell: CellSizes, given: dict[str, Any]) -> int:
    """A table, and for each task two low-rank matrices."""
    tokens, hidden = given["tokens"], cell.slot[1]
    return tokens * hidden + given["num_tasks"] * given["rank"] * (tokens + hidden)


def _adaption_prompt(cell: CellSizes, given: dict[str, Any]) -> int:
    """A table and a gate."""
    return given["tokens"] * cell.slot[1] + 1


def _vera(cell: CellSizes, given: dict[str, Any]) -> int:
    """Two vectors; the matrices are shared and do not train."""
    return given["rank"] + cell.shapes["weight"][0]


def _vera_shared(cells: Sequence[CellSizes], given: dict[str, Any]) -> int:
    """A for the widest input and B for the widest output."""
    return given["rank"] * sum(max(sizes) for sizes in zip(*(cell.shapes["weight"] for cell in cells)))


def _blocks(cell: CellSizes, given: dict[str, Any], usual: int) -> tuple[int, int]:
    """How many blocks the input of a cell has, and their size."""
    inputs = cell.shapes["weight"][1]
    number = given["blocks"] or given["block_size"] or usual
    if not isinstance(number, int) or number <= 0 or inputs % number:
        raise ValueError(f"The blocks must divide {inputs}, the size of the input of {cell.path}, but got {number!r}.")
    return (number, inputs // number) if given["blocks"] else (inputs // number, number)


def _oft(cell: CellSizes, given: dict[str, Any]) -> int:
    """The entries above the diagonal of each block."""
    blocks, size = _blocks(cell, given, 32)
    return (1 if given["block_share"] else blocks) * (size * (size - 1) // 2)


def _boft(cell: CellSizes, given: dict[str, Any]) -> int:
    """The blocks of every factor, and a scale for each output."""
    blocks, size = _blocks(cell, given, 4)
    return given["butterfly_factors"] * blocks * size**2 + cell.shapes["weight"][0]


def _hra(cell: CellSizes, given: dict[str, Any]) -> int:
    """A vector of the input's size for each reflection."""
    return given["rank"] * cell.shapes["weight"][1]


def _miss(cell: CellSizes, given: dict[str, Any]) -> int:
    """A block of rank rows for the outputs."""
    outputs, inputs = cell.shapes["weight"]
    if given["rank"] > inputs:
        raise ValueError(f"'rank' must be at most {inputs}, the input's size of {cell.path}, but got {given['rank']}.")
    return given["rank"] * outputs


def _lokr(cell: CellSizes, given: dict[str, Any]) -> int:
    """The two factors of a Kronecker product."""
    out, into = cell.shapes["weight"]
    if given["decompose_factor"] < 1 and given["decompose_factor"] != -1:
        raise ValueError(f"'decompose_factor' must be a positive int or -1, but is {given['decompose_factor']}.")
    return factors(out, into, given["rank"], given["decompose_both"], given["decompose_factor"]).size


def _tokens(cell: CellSizes, given: dict[str, Any]) -> int:
    """The rows that train."""
    rows, size = cell.shapes["embedding_table"]
    indices = given["token_indices"]
    numbers = all(type(one) is int and 0 <= one < rows for one in indices)
    if not indices or len(set(indices)) < len(indices) or not numbers:
        raise ValueError(f"'token_indices' must be different numbers below {rows}, one at least, but got {indices!r}.")
    return len(indices) * size


def _fourierft(cell: CellSizes, given: dict[str, Any]) -> int:
    """Coefficients, at most as many as the weight has entries."""
    out, into = cell.shapes["weight"]
    if given["frequencies"] > out * into:
        raise ValueError(
            f"'frequencies' must be at most {out * into}, the entries of {cell.path}, but got {given['frequencies']}."
        )
    return given["frequencies"]


def _randlora(cell: CellSizes, given: dict[str, Any]) -> int:
    """The diagonals of as many bases as full rank takes."""
    small, rank = min(cell.shapes["weight"]), given["rank"]
    return -(-small // rank) * (rank + small)


def _randlora_shared(cells: Sequence[CellSizes], given: dict[str, Any]) -> int:
    """A for the largest smaller side and the Bs for the largest side."""
    small, large = sorted(max(sizes) for sizes in zip(*(cell.shapes["weight"] for cell in cells)))
    return given["rank"] * (small + large * -(-small // given["rank"]))


def _shira(cell: CellSizes, given: dict[str, Any]) -> int:
    """Values, as many as LoRA has parameters, and two numbers for the place of each."""
    out, into = cell.shapes["weight"]
    if given["rank"] * (out + into) > out * into:
        raise ValueError(f"'rank' makes more values than {cell.path} has entries, but got {given['rank']}.")
    return 3 * given["rank"] * (out + into)


def _shira_frozen(cell: CellSizes, given: dict[str, Any]) -> int:
    return 2 * given["rank"] * sum(cell.shapes["weight"])


def _adalora(cell: CellSizes, given: dict[str, Any]) -> int:
    """A (r, in), B (out, r) and r singular values, with r as in the beginning."""
    return given["initial_rank"] * (sum(cell.shapes["weight"]) + 1)


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
_KEYS_AND_VALUES = {
    "bert": ("*.key", "*.value"),
    "gpt2": ("*.c_attn",),
    "llama": ("*.k_proj", "*.v_proj"),
    "chatglm": ("*.query_key_value",),
}
_LINEAR = {
    "bert": ("*.query", "*.key", "*.value", "*.layer.*.dense"),
    "gpt2": ("*.c_attn", "*.c_proj", "*.c_fc"),
    "llama": ("*_proj",),
    "chatglm": ("*.query_key_value", "*.self_attention.dense", "*.dense_h_to_4h", "*.dense_4h_to_h"),
}
_SLOT = dict.fromkeys(_ATTENTION, ("*prefix",))
_PROMPTS = dict.fromkeys(_ATTENTION, ("*prompts",))
COUNTERS = {
    "lora": Counter(
        {"rank": 8, "rank_pattern": {}, "start": "kaiming", "bias": "none"},
        ("alpha", "dropout", "rank_stabilised", "alpha_pattern"),
        ("dense", "embedding"),
        _ATTENTION,
        _lora,
        frozen=_lora_frozen,
        trains=_lora_bias,
        beside=_lora_beside,
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
    "ia3": Counter(
        {"feedforward": None},
        adapts=("dense",),
        targets={family: (*_KEYS_AND_VALUES[family], *_FEEDFORWARD[family]) for family in _FEEDFORWARD},
        added=_ia3,
    ),
    "parallel_adapter": Counter({"size": 64}, ("scale", "non_linearity"), ("dense",), _FEEDFORWARD, _parallel_adapter),
    "mam": Counter(
        {"tokens": 30, "embed_dim": 128, "mid_dim": 256, "projection": True, "size": 64},
        ("dropout", "scale", "non_linearity"),
        ("slot", "dense"),
        {family: (*_SLOT[family], *_FEEDFORWARD[family]) for family in _SLOT},
        _mam,
    ),
    "adapter_fusion": Counter(
        {"adapters": 2, "size": 64, "value": True},
        ("non_linearity",),
        ("dense",),
        _FEEDFORWARD,
        _adapter_fusion,
        _fused,
    ),
    "compacter": Counter(
        {"size": 24, "phm_dim": 4, "rank": 1, "low_rank": True, "shared": True},
        ("non_linearity",),
        ("dense",),
        _AFTER_BLOCKS,
        _compacter,
        shared=_compacter_shared,
        shared_trains=True,
    ),
    "prompt_tuning": Counter({"tokens": 20}, ("start",), ("prompts",), _PROMPTS, _prompt_tuning),
    "p_tuning": Counter(
        {"tokens": 20, "encoder": "mlp", "encoder_hidden": None, "encoder_layers": 2},
        ("dropout",),
        ("prompts",),
        _PROMPTS,
        _p_tuning,
    ),
    "multitask_prompt_tuning": Counter(
        {"tokens": 20, "rank": 1, "num_tasks": 1}, ("task",), ("prompts",), _PROMPTS, _multitask_prompt_tuning
    ),
    "adaption_prompt": Counter(
        {"tokens": 10, "top_layers": None},
        adapts=("adaption",),
        targets=dict.fromkeys(_ATTENTION, ("*.adaption",)),
        added=_adaption_prompt,
    ),
    "vera": Counter(
        {"rank": 256}, ("dropout", "d_initial", "seed"), ("dense",), _ATTENTION, _vera, shared=_vera_shared
    ),
    "hra": Counter({"rank": 8}, ("gram_schmidt",), ("dense",), _ATTENTION, _hra),
    "oft": Counter(
        {"block_size": None, "blocks": None, "block_share": False},
        ("cayley_neumann", "terms"),
        ("dense",),
        _ATTENTION,
        _oft,
    ),
    "boft": Counter({"block_size": None, "blocks": None, "butterfly_factors": 1}, (), ("dense",), _ATTENTION, _boft),
    "miss": Counter({"rank": 64}, ("dropout",), ("dense",), _ATTENTION, _miss),
    "lokr": Counter(
        {"rank": 8, "rank_pattern": {}, "decompose_both": False, "decompose_factor": -1},
        ("alpha", "alpha_pattern"),
        ("dense",),
        _ATTENTION,
        _lokr,
    ),
    "ln_tuning": Counter({}, trains=lambda path, given: path.endswith((".gamma", ".beta", "norm.weight"))),
    "trainable_tokens": Counter(
        {"token_indices": ()},
        adapts=("embedding",),
        targets={
            "bert": ("*.word_embeddings",),
            "gpt2": ("*.wte",),
            "llama": ("*.embed_tokens",),
            "chatglm": ("*.word_embeddings",),
        },
        added=_tokens,
    ),
    "fourierft": Counter(
        {"frequencies": 1000}, ("scaling", "seed", "start_at_zero"), ("dense",), _ATTENTION, _fourierft
    ),
    "randlora": Counter(
        {"rank": 32},
        ("alpha", "seed", "sparse", "very_sparse"),
        ("dense",),
        _ATTENTION,
        _randlora,
        shared=_randlora_shared,
    ),
    "shira": Counter({"rank": 32}, ("mask", "seed"), ("dense",), _ATTENTION, _shira, _shira_frozen),
    "adalora": Counter(
        {"initial_rank": 12},
        ("rank", "alpha", "dropout", "initial_steps", "final_steps", "interval", "beta1", "beta2", "orthogonality"),
        ("dense",),
        _ATTENTION,
        _adalora,
    ),
    "bitfit": Counter({"include_norm": False}, trains=_bitfit),
}
COUNTERS["dora"] = replace(COUNTERS["lora"], adapts=("dense",), added=_dora)
COUNTERS["qlora"] = replace(
    COUNTERS["lora"],
    options={**COUNTERS["lora"].options, "bits": "nf4", "block_size": 64, "double_quantisation": True},
    others=(*COUNTERS["lora"].others, "loftq_iterations"),
    adapts=("dense",),
    targets=_LINEAR,
    kept=_qlora_kept,
)
COUNTERS["lora_fa"] = replace(COUNTERS["lora"], adapts=("dense",), added=_lora_fa, frozen=_lora_fa_frozen)
COUNTERS["lora_plus"] = replace(COUNTERS["lora"], others=(*COUNTERS["lora"].others, "ratio"))
ALIASES = {"prefixtuning": "prefix", "llama_adapter": "adaption_prompt"}


def method_key(name: str) -> str:
    """The name under which a method is listed here, whatever it is called in a run file.

    >>> method_key("LoRA"), method_key("PrefixTuning")
    ('lora', 'prefix')
    """
    return ALIASES.get(name.lower(), name.lower())
