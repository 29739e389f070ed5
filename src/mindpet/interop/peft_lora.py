"""LoRA, DoRA and LoRA-FA in PEFT's format: tensors ``base_model.model.<module>.<part>``.

The parts are ``lora_A.weight`` (rank, in) and ``lora_B.weight`` (out, rank), for a convolution (rank, in, kernel) and
(out, rank, 1), for an embedding ``lora_embedding_A`` (rank, vocabulary) and ``lora_embedding_B`` (dim, rank). The
branch is scaled by ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``. With ``use_dora`` there is
``lora_magnitude_vector`` (out,) as well. LoRA-FA is a way to train a LoRA and written as one. LoRA that started at a
part of the weight is written as one of twice the rank, which computes the same.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from mindspore import Parameter, nn

from mindpet.delta.dora import METHOD as DORA
from mindpet.delta.dora import DoRAConfig
from mindpet.delta.lora import METHOD as LORA
from mindpet.delta.lora import LoRAConfig, LoRAStartDense
from mindpet.delta.method import DeltaConfig, Method
from mindpet.delta.qlora import QLoRAConfig
from mindpet.graph.inject import injections
from mindpet.interop import peft_config
from mindpet.interop.peft_modules import (
    Modules,
    as_array,
    fits,
    missing_whole,
    module_targets,
    read_whole,
    shape_there,
    trained_whole,
    unexpected,
    without_marks,
)

_log = logging.getLogger("mindpet")
WRITTEN = ("lora", "lora_fa", "qlora", "dora")
_LORA_PREFIX = "base_model.model."
_LORA_TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
)


def read_lora(
    content: dict[str, Any], tensors: dict[str, np.ndarray], modules: Modules, problems: list[str]
) -> tuple[DeltaConfig | None, dict[str, np.ndarray]]:
    """The configuration, and the value of every parameter by its path after the injection."""
    method, called = (DORA, "DoRA") if content.get("use_dora") else (LORA, "LoRA")
    pairs, whole = _sorted_out(tensors, problems)
    values: dict[str, np.ndarray] = {}
    ranks, alphas = {}, {}
    for module, parts in pairs.items():
        path, cell = modules.cells.get(module, ("", None))
        if not isinstance(cell, tuple(method.adapt)):
            only = ", which adapts dense layers" if method is DORA else ""
            problems.append(unexpected(module, cell, modules, called + only))
            continue
        ranks[path] = peft_config.at_end(content.get("rank_pattern"), module, content["r"])
        alphas[path] = peft_config.at_end(content.get("alpha_pattern"), module, content["lora_alpha"])
        shapes = _lora_shapes(cell, ranks[path], method)
        problems += [f"unexpected in the file: {module}.{part}" for part in parts if part not in shapes]
        for part, (here, shape) in shapes.items():
            if part not in parts:
                problems.append(f"missing in the file: {module}.{part}")
            elif fits(f"{module}.{part}", parts[part], shape, _base_weight(cell).dtype, problems):
                values[f"{path}.{here}"] = parts[part]
    kept = read_whole(whole, modules, problems, bool(content.get("fan_in_fan_out")))
    for module in pairs:  # PEFT writes the frozen table of an adapted embedding as well
        path, parameter = modules.parameters.get(f"{module}.weight", ("", None))
        if path in kept and np.array_equal(kept[path], parameter.asnumpy()):
            del kept[path]
    values.update(kept)
    problems += peft_config.promised(content, pairs, modules.cells, tuple(method.adapt), called)
    problems += missing_whole(content, whole, pairs, modules)
    if not pairs:
        problems.append(f"there is no {called} tensor in the file")
    bias = peft_config.bias_of(content)
    kind: type[LoRAConfig] = DoRAConfig if method is DORA else LoRAConfig
    try:
        return kind(
            rank=content["r"],
            alpha=content["lora_alpha"],
            dropout=content.get("lora_dropout") or 0.0,
            rank_stabilised=bool(content.get("use_rslora")),
            rank_pattern={path: rank for path, rank in ranks.items() if rank != content["r"]},
            alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != content["lora_alpha"]},
            targets=tuple(ranks) or None,  # of no tensor at all the problems tell
            bias=bias,
            modules_to_save=tuple(path for path in kept if not _trains_as_bias(path, bias, ranks)),
        ), values
    except (TypeError, ValueError) as error:
        problems.append(str(error))
        return None, {}


def _sorted_out(
    tensors: dict[str, np.ndarray], problems: list[str]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """LoRA's tensors by module and part, the others by the name that they have in the base model."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        name = key.removeprefix(_LORA_PREFIX)
        if name == key:
            problems.append(f"unexpected in the file: {key}")
        elif match := _LORA_TENSOR.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["part"]] = value
        else:
            without_marks(name, value, whole)
    return pairs, whole


def _trains_as_bias(path: str, bias: str, adapted: Collection[str]) -> bool:
    cell, _, last = path.rpartition(".")
    return last in ("bias", "beta") and (bias == "all" or (bias == "lora_only" and cell in adapted))


def _base_weight(cell: nn.Cell) -> Parameter:
    return cell.embedding_table if isinstance(cell, nn.Embedding) else cell.weight


def _lora_shapes(cell: nn.Cell, rank: int, method: Method) -> dict[str, tuple[str, tuple[int, ...]]]:
    """PEFT's name of each LoRA tensor of a cell to the parameter's name here and the shape there."""
    first, second, *kernel = shape_there(cell, _base_weight(cell).shape)
    if isinstance(cell, nn.Embedding):  # the table is (vocabulary, dim)
        return {
            "lora_embedding_A": ("mindpet_delta_lora_a", (rank, first)),
            "lora_embedding_B": ("mindpet_delta_lora_b", (second, rank)),
        }
    name = f"mindpet_delta_{method.name}"
    return {
        "lora_A.weight": (f"{name}_a", (rank, second, *kernel)),
        "lora_B.weight": (f"{name}_b", (first, rank, *(1 for _ in kernel))),
        **({"lora_magnitude_vector": (f"{name}_magnitude", (first,))} if method is DORA else {}),
    }


def _lora_tensors(cell: nn.Cell) -> dict[str, np.ndarray]:
    """PEFT's name of each LoRA tensor of an adapted cell to its numbers."""
    dense = isinstance(cell, nn.Dense)
    a, b = cell.factors() if dense else (cell.mindpet_delta_lora_a, cell.mindpet_delta_lora_b)
    names = "lora_embedding_A lora_embedding_B" if isinstance(cell, nn.Embedding) else "lora_A.weight lora_B.weight"
    tensors = dict(zip(names.split(), (a, b)))
    if cell.delta_method == "dora":
        tensors["lora_magnitude_vector"] = cell.mindpet_delta_dora_magnitude
    return {part: as_array(cell, value) for part, value in tensors.items()}


def _as_written(cell: nn.Cell, config: LoRAConfig) -> LoRAConfig:
    """The configuration of the branch that stands in the file: of twice the rank and the same scale, where A0 and B0
    go into it.
    """
    if not isinstance(cell, LoRAStartDense):
        return config
    more = math.sqrt(2) if config.rank_stabilised else 2
    return replace(config, rank=2 * config.rank, alpha=more * config.alpha, start="kaiming")


def _say_what_is_quantised(configs: Collection[LoRAConfig], problems: list[str]) -> None:
    """Beside which weights a QLoRA computes there what it does here: the file has none."""
    quantised = [config for config in configs if isinstance(config, QLoRAConfig)]
    turns = max((config.loftq_iterations for config in quantised), default=0)
    if turns > 1:
        problems.append(
            f"with loftq_iterations={turns} its weights are quantised after the branch was taken off them, and so are "
            "in no file that PEFT could load: merge it, or tune with one turn"
        )
    for bits, size, double in {(one.bits, one.block_size, one.double_quantisation) for one in quantised}:
        if bits == "nf4" and size == 64:
            _log.warning(
                "PEFT computes the same beside a base in BitsAndBytesConfig(load_in_4bit=True, "
                "bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=%s).",
                double,
            )
        else:
            _log.warning(
                "bitsandbytes has no weights of bits=%r in blocks of %d: in PEFT the outputs differ by what "
                "quantisation loses.",
                bits,
                size,
            )


def write_lora(network: nn.Cell, modules: Modules, problems: list[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors of every LoRA layer, injected or placed by hand."""
    injected = {
        path: one.config.at(path)
        for one in injections(network)
        for path in one.adapted
        if isinstance(one.config, LoRAConfig)
    }
    adapted = {m: at for m, at in modules.cells.items() if getattr(at[1], "delta_method", None) in WRITTEN}
    configs = {
        module: _as_written(cell, injected.get(path) or LoRAConfig(rank=cell.lora_rank, alpha=cell.lora_alpha))
        for module, (path, cell) in adapted.items()
    }
    _say_what_is_quantised(configs.values(), problems)
    bias, saved, kept = trained_whole(modules, adapted, problems)
    tensors = {
        f"{_LORA_PREFIX}{module}.{part}": value
        for module, (_, cell) in adapted.items()
        for part, value in _lora_tensors(cell).items()
    }
    for name, value in kept.items():
        module, _, last = name.rpartition(".")
        tensors[f"{_LORA_PREFIX}{module}{'.base_layer' if module in adapted else ''}.{last}"] = value
    stabilised = all(config.rank_stabilised for config in configs.values())
    ranks = {module: config.rank for module, config in configs.items()}
    alphas = {module: config.alpha if stabilised else config.scaled_alpha for module, config in configs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(config.dropout for config in configs.values()),
        "target_modules": module_targets(list(adapted), modules),
        "rank_pattern": peft_config.shortest_pattern(ranks, rank),
        "alpha_pattern": peft_config.shortest_pattern(alphas, alpha),
        "modules_to_save": saved or None,
        "bias": bias,
        "use_rslora": stabilised,
        "use_dora": any(cell.delta_method == "dora" for _, cell in adapted.values()),
        "fan_in_fan_out": any(f"{module}.weight" in modules.transposed for module in adapted),
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }, tensors
