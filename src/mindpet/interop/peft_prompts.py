"""Prompt tuning, P-tuning and multitask prompt tuning in PEFT's format: a table ``prompt_embeddings`` and little more.

The table is (tokens, hidden). Of P-tuning PEFT saves what comes out of its encoder, so that its table is one of prompt
tuning. A multitask prompt has, besides, ``prefix_task_cols`` (tasks, tokens, ranks) and ``prefix_task_rows`` (tasks,
ranks, hidden). Modules that are trained whole are ``base_model.<module>``.
"""

import logging
from typing import Any

import numpy as np
from mindspore import dtype as mstype
from mindspore import nn

from mindpet import _compat
from mindpet.delta.method import DeltaConfig
from mindpet.delta.multitask_prompt_tuning import MultitaskPromptTuning, MultitaskPromptTuningConfig
from mindpet.delta.p_tuning import PTuning
from mindpet.delta.prompt_slot import PromptSlot
from mindpet.delta.prompt_tuning import PromptTuning, PromptTuningConfig
from mindpet.interop.peft_config import PROMPTS
from mindpet.interop.peft_modules import Modules, as_array, fits, missing_whole, read_whole, trained_whole

_log = logging.getLogger("mindpet")
_MODEL = "base_model."
_TABLE, _COLUMNS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
_SHARED, _U, _V = (f"mindpet_delta_multitask_prompt_tuning_{name}" for name in ("table", "u", "v"))
KINDS: dict[str, Any] = dict(zip(PROMPTS, (PromptTuning, PTuning, MultitaskPromptTuning), strict=True))


def read_prompts(
    content: dict[str, Any], tensors: dict[str, np.ndarray], modules: Modules, problems: list[str]
) -> tuple[DeltaConfig | None, dict[str, np.ndarray]]:
    """As :func:`~mindpet.interop.peft_lora.read_lora`. A multitask prompt runs its first task."""
    several = content["peft_type"] == "MULTITASK_PROMPT_TUNING"
    own = (_TABLE, _COLUMNS, _ROWS) if several else (_TABLE,)
    whole = {name.removeprefix(_MODEL): value for name, value in tensors.items() if name not in own}
    values = read_whole(whole, modules, problems)
    problems += missing_whole(content, whole, (), modules)
    slots = [(path, cell) for path, cell in modules.cells.values() if isinstance(cell, PromptSlot)]
    if len(slots) != 1:
        problems.append(f"this network has {len(slots)} cells PromptSlot to put virtual tokens into, and must have one")
        return None, {}
    path, hidden = slots[0][0], slots[0][1].hidden_size
    if content.get("token_dim") not in (None, hidden):
        problems.append(f"token_dim is {content['token_dim']} in the configuration, {hidden} here")
    given: dict[str, Any] = {"tokens": content.get("num_virtual_tokens"), "targets": [path]}
    kind: type[DeltaConfig] = PromptTuningConfig
    if several:
        kind = MultitaskPromptTuningConfig
        given |= {"rank": content.get("num_ranks", 1), "num_tasks": content.get("num_tasks", 1)}
    else:
        given["start"] = "random"
    try:
        config: Any = kind(**given, modules_to_save=tuple(values))
    except (TypeError, ValueError) as error:
        problems.append(f"num_virtual_tokens, num_ranks and num_tasks: {error}")
        return None, {}
    table = _SHARED if several else "mindpet_delta_prompt_tuning_table"
    places: dict[str, tuple[str, tuple[int, ...]]] = {_TABLE: (table, (config.tokens, hidden))}
    if several:
        places[_COLUMNS] = _U, (config.num_tasks, config.tokens, config.rank)
        places[_ROWS] = _V, (config.num_tasks, config.rank, hidden)
    for name, (ours, shape) in places.items():
        if name not in tensors:
            problems.append(f"missing in the file: {name}")
        elif fits(name, tensors[name], shape, mstype.float32, problems):
            values[f"{path}.{ours}"] = tensors[name]
    if content["peft_type"] == "P_TUNING":
        _log.warning("The file has what came out of an encoder, so training cannot go on through the encoder.")
    return config, values


def write_prompts(modules: Modules, problems: list[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration, and the virtual tokens as one table, whatever they come out of."""
    slots = [cell for _, cell in modules.cells.values() if isinstance(cell, PromptSlot) and cell.tokens]
    if len(slots) != 1:
        problems.append(f"PEFT has one prompt, but this network has {len(slots)}")
        return {}, {}
    slot = slots[0]
    bias, saved, kept = trained_whole(modules, (), problems)
    if bias != "none":
        problems.append("biases train beside the prompt, and PEFT saves none with it")
    content: dict[str, Any] = {
        "peft_type": next(kind for kind, filled in KINDS.items() if isinstance(slot, filled)),
        "num_virtual_tokens": slot.tokens,
        "token_dim": slot.hidden_size,
        "num_transformer_submodules": 1,
        "modules_to_save": saved or None,
    }
    if isinstance(slot, MultitaskPromptTuning):
        table, u, v = (as_array(slot, getattr(slot, name)) for name in (_SHARED, _U, _V))
        tensors = {_TABLE: table, _COLUMNS: u, _ROWS: v}
        content |= {"num_tasks": u.shape[0], "num_ranks": u.shape[2]}
    else:
        tensors = {_TABLE: _without_dropout(slot)}
    if isinstance(slot, PTuning):
        content["encoder_reparameterization_type"] = slot.encoder.upper()
        content |= {"encoder_hidden_size": slot.encoder_hidden, "encoder_num_layers": slot.encoder_layers}
        content["encoder_dropout"] = slot.encoder_dropout
    return content, tensors | {f"{_MODEL}{name}": value for name, value in kept.items()}


def _without_dropout(slot: nn.Cell) -> np.ndarray:
    with _compat.evaluating(slot):
        return slot().asnumpy()
