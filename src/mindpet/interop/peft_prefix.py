"""Prefix tuning in PEFT's format, which is P-tuning v2 too: one tensor ``prompt_embeddings``.

It is (tokens, layers * 2 * hidden), and as (tokens, layers * 2, heads, head_dim) it has each layer's key, then its
value. Modules that are trained whole are ``base_model.<module>``. Of a projection only the output is saved.
"""

import logging
from typing import Any

import numpy as np
from mindspore import dtype as mstype

from mindpet import _compat
from mindpet.delta.method import DeltaConfig
from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.delta.ptuning2 import PTuning2Config
from mindpet.interop.peft_modules import Modules, fits, missing_whole, read_whole, trained_whole

_log = logging.getLogger("mindpet")
_PREFIX_PREFIX = "base_model."
_PROMPTS = "prompt_embeddings"


def read_prefix(
    content: dict[str, Any], tensors: dict[str, np.ndarray], modules: Modules, problems: list[str]
) -> tuple[DeltaConfig | None, dict[str, np.ndarray]]:
    """As :func:`~mindpet.interop.peft_lora.read_lora`. The table has the layout of P-tuning v2's here."""
    whole = {name.removeprefix(_PREFIX_PREFIX): value for name, value in tensors.items() if name != _PROMPTS}
    values = read_whole(whole, modules, problems)
    problems += missing_whole(content, whole, (), modules)
    slots = [(path, cell) for path, cell in modules.cells.values() if isinstance(cell, PrefixSlot)]
    if len(slots) != 1:
        problems.append(f"this network has {len(slots)} cells PrefixSlot to put a prefix into, and must have one")
        return None, {}
    path, slot = slots[0]
    sizes = {"num_layers": slot.num_layers, "num_attention_heads": slot.num_heads}
    sizes["token_dim"] = slot.num_heads * slot.head_dim
    problems += [
        f"{key} is {content[key]} in the configuration, {size} here"
        for key, size in sizes.items()
        if content.get(key) not in (None, size)
    ]
    tokens: Any = content.get("num_virtual_tokens")
    try:
        config = PTuning2Config(tokens=tokens, targets=[path], modules_to_save=tuple(values))
    except (TypeError, ValueError) as error:
        problems.append(f"num_virtual_tokens: {error}")
        return None, {}
    shape = (config.tokens, slot.num_layers * 2 * slot.num_heads * slot.head_dim)
    if _PROMPTS not in tensors:
        problems.append(f"missing in the file: {_PROMPTS}")
    elif fits(_PROMPTS, tensors[_PROMPTS], shape, mstype.float32, problems):
        values[f"{path}.encoder.mindpet_delta_ptuning2_embedding"] = tensors[_PROMPTS]
    if content.get("prefix_projection"):
        _log.warning("The file has what came out of a projection, so training cannot go on through the projection.")
    return config, values


def write_prefix(modules: Modules, problems: list[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration, and the prompts as one table, whatever they come out of."""
    slots = [
        cell for _, cell in modules.cells.values() if isinstance(cell, PrefixSlot) and hasattr(cell, "delta_method")
    ]
    if len(slots) != 1:
        problems.append(f"PEFT has one prefix, but this network has {len(slots)}")
        return {}, {}
    slot = slots[0]
    bias, saved, kept = trained_whole(modules, (), problems)
    if bias != "none":
        problems.append("biases train beside the prefix, and PEFT saves none with it")
    with _compat.evaluating(slot):
        prompts = [part.asnumpy() for pair in slot() for part in pair]  # (tokens, heads, head_dim) each
    table = np.stack(prompts, axis=1)  # (tokens, layers * 2, heads, head_dim)
    tensors = {_PROMPTS: table.reshape((table.shape[0], -1))}
    tensors |= {f"{_PREFIX_PREFIX}{name}": value for name, value in kept.items()}
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": table.shape[0],
        "num_layers": slot.num_layers,
        "num_attention_heads": slot.num_heads,
        "token_dim": slot.num_heads * slot.head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": slot.num_heads * slot.head_dim,
        "modules_to_save": saved or None,
    }, tensors
