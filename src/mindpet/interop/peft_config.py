"""What the ``adapter_config.json`` of Hugging Face PEFT says: which keys change the outputs, which modules it names.

Modules go by their Hugging Face paths, without the ``base_model.model.`` that PEFT writes before them in tensor names.
"""

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mindpet import _checks
from mindpet.delta.registry import METHODS
from mindpet.interop.patterns import is_slow

_log = logging.getLogger("mindpet")

# Read elsewhere, or of interest only to who starts, trains or cuts up the network: a trained adapter computes the same.
_COMMON = """
    auto_mapping base_model_name_or_path inference_mode modules_to_save peft_type peft_version revision task_type
"""
_LORA = """
    alpha_pattern bias corda_config eva_config exclude_modules fan_in_fan_out layers_pattern layers_to_transform
    loftq_config lora_alpha lora_dropout lora_ga_config megatron_config megatron_core merge_weights qalora_group_size r
    rank_pattern runtime_config target_modules use_dora use_rslora velora_config
"""
_PREFIX = """
    encoder_hidden_size init_weights num_attention_heads num_layers num_virtual_tokens prefix_projection token_dim
"""
_PROMPT = """
    encoder_dropout encoder_hidden_size encoder_num_layers encoder_reparameterization_type init_weights
    num_attention_heads num_layers num_ranks num_tasks num_virtual_tokens prompt_tuning_init
    prompt_tuning_init_state_dict_path prompt_tuning_init_task prompt_tuning_init_text token_dim tokenizer_kwargs
    tokenizer_name_or_path
"""
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
_TARGETS = """
    alpha_pattern bias exclude_modules fan_in_fan_out layers_pattern layers_to_transform rank_pattern target_modules
"""
_FREE = set((_COMMON + _TARGETS).split())
_FREE_OF = {"LORA": set((_COMMON + _LORA).split()), "PREFIX_TUNING": set((_COMMON + _PREFIX).split())}
_FREE_OF |= {kind: set((_COMMON + _PROMPT).split()) for kind in PROMPTS}
_BEFORE_TOKENS = ("PREFIX_TUNING", *PROMPTS)  # virtual ones, of a network and not of its modules
# Another computation unless the value is empty or false: what it would be.
_REFUSED_OF = {
    "LORA": {
        "alora_invocation_tokens": "Activated LoRA, which starts at an invocation token",
        "arrow_config": "routing between several adapters",
        "enable_lora": "LoRA on parts of a fused weight",
        "ensure_weight_tying": "one adapter for weights that are tied",
        "kasa_config": "KaSA, with a diagonal between A and B and a truncated base weight",
        "layer_replication": "a base network with repeated layers",
        "lora_bias": "a bias on B",
        "monteclora_config": "MonteCLoRA, which samples A and B",
        "target_parameters": "LoRA on parameters that belong to no linear module",
        "trainable_token_indices": "single trained rows of an embedding",
        "use_bdlora": "block-diagonal A and B",
        "use_qalora": "QALoRA, which pools the inputs in groups",
    },
    "PREFIX_TUNING": {},
}
_END = r"(.*\.)?({})$"  # how a table's key is matched with the path of a module
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # init_lora_weights that leave the base weight alone


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """What in a configuration cannot be honoured, one line each; harmless keys that are not known are logged.

    >>> config_problems({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "lora_bias": True})
    ['lora_bias is True: that is a bias on B, and is not here']
    """
    kind = config.get("peft_type")
    names = {one.peft.kind: one.peft for one in METHODS.values() if one.peft is not None}
    if not isinstance(kind, str) or kind not in {*_FREE_OF, *names}:
        return [f"peft_type is {_checks.shown(kind)}, but only {', '.join([*_FREE_OF, *names])} are read here"]
    problems, refused = [], _REFUSED_OF.get(kind, {})
    own = names.get(kind)
    free = _FREE_OF[kind] if own is None else {*_FREE, *own.options, *own.free, *own.modules, own.topmost}
    for key, value in config.items():
        if key in free:
            if own is not None and key in own.free and key.endswith("_dropout") and value:
                _log.warning("%s is %s there; there is none here, so that training goes on without it", key, value)
            continue
        if own is not None and key in own.fixed:
            if value not in (own.fixed[key], None, *own.alike.get(key, ())):
                problems.append(f"{key} is {_short(value)}, and only {own.fixed[key]!r} is here")
            continue
        if key == "init_lora_weights" and kind == "LORA":
            if value not in _STARTS:
                problems.append(
                    f"{key} is {_short(value)}: the adapter belongs to a base weight changed at the start, which is "
                    "not in the directory; PEFT converts it (save_pretrained, path_initial_model_for_weight_conversion)"
                )
        elif key == "num_transformer_submodules" and kind in _BEFORE_TOKENS:
            if value not in (None, 1):
                problems.append(f"{key} is {value!r}: virtual tokens for encoder and decoder are not here")
        elif key in refused:
            if value:
                problems.append(f"{key} is {_short(value)}: that is {refused[key]}, and is not here")
        elif value is None or value is False or value in ("", [], {}):
            _log.warning("adapter_config.json has the unknown key %r, without effect: its value is %r", key, value)
        else:
            problems.append(f"{key} is unknown here, so its value {_checks.shown(value)} may change the outputs")
    if kind == "LORA":
        problems += [f"{key} is missing" for key in ("r", "lora_alpha") if config.get(key) is None]
    lists = ("modules_to_save", "target_modules", "exclude_modules", "layers_pattern", *(own.modules if own else ()))
    problems += _list_problems(config, lists)
    if kind not in _BEFORE_TOKENS:
        problems += _target_problems(config)
    return problems or _pattern_problems(config, own.modules if own else ())


def _short(value: Any) -> str:
    return _checks.shown(value).rpartition(" (")[0]


def _target_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("bias", "none") is None or bias_of(config) not in ("none", "lora_only", "all"):
        problems.append(f"bias must be 'none', 'lora_only' or 'all', but is {_checks.shown(config['bias'])}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            problems.append(f"{key} must be an object, but is {_checks.shown(config[key])}")
    return problems


def _list_problems(config: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    problems = []
    for key in keys:
        value = [] if config.get(key) is None else config[key]
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            problems.append(f"{key} must be a string or a list of strings, but is {_checks.shown(value)}")
    return problems


def _pattern_problems(config: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Whether the regular expressions are some, as they are put together: in the tables, and where lists may be."""
    tables = [key for name in ("rank_pattern", "alpha_pattern") for key in config.get(name) or ()]
    whole = [value for key in ("target_modules", "exclude_modules", *keys) if isinstance(value := config.get(key), str)]
    problems = []
    for given, pattern in [
        *((key, _END.format(key)) for key in tables),
        *((value, value) for value in whole),
        (config.get("layers_pattern"), _layer_pattern(config)),
    ]:
        try:
            re.compile(pattern)
            slow = given not in _only_checked(config) and is_slow(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"{given!r} is not a regular expression: {error}")
            continue
        if slow:
            problems.append(
                f"{given!r} is a regular expression that could take very long: write out what it stands for"
            )
    return problems


def _only_checked(config: Mapping[str, Any]) -> list[str]:
    """The regular expressions that serve to compare the file with: where they could take long, it is not compared."""
    return [value for key in ("target_modules", "exclude_modules") if isinstance(value := config.get(key), str)]


def _layer_pattern(config: Mapping[str, Any]) -> str:
    return rf".*\.(?:{'|'.join(_list(config.get('layers_pattern'))) or '[^.]*'})\.(\d+)\."


def at_end(table: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The entry of ``rank_pattern`` or ``alpha_pattern`` for a module.

    A key is a regular expression for the whole path or for an end of it that begins after a dot. The first that
    matches counts.

    >>> at_end({"query": 4, "layer.0": 2}, "layer.0.query", 8), at_end({"layer.0": 2}, "layer.0.query", 8)
    (4, 8)
    """
    return next((value for key, value in (table or {}).items() if re.match(_END.format(key), path)), default)


def named_modules(config: Mapping[str, Any], paths: Iterable[str]) -> set[str] | None:
    """Those of the paths that ``target_modules`` means, or None where it does not name them (``all-linear``).

    A string is a regular expression for a whole path. An entry of a list is a path, or an end of one that begins after
    a dot; with a list, ``layers_to_transform`` keeps the layers of these numbers. ``exclude_modules`` is read as
    ``target_modules`` is.

    >>> paths = ["layer.0.query", "layer.1.query", "layer.1.key"]
    >>> sorted(named_modules({"target_modules": ["query"], "layers_to_transform": [1]}, (f"a.{p}" for p in paths)))
    ['a.layer.1.query']
    """
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return None
    if any(map(is_slow, _only_checked(config))):
        _log.warning("target_modules could take very long to match, so it is not compared with the file's modules.")
        return None
    found = {path for path in paths if _names(targets, path) and not _names(config.get("exclude_modules"), path)}
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str):
        return found
    pattern = re.compile(_layer_pattern(config))
    numbers = {path: pattern.match(path) for path in found}
    return {path for path, number in numbers.items() if number and int(number[pattern.groups]) in _list(layers)}


def promised(
    config: Mapping[str, Any],
    found: Collection[str],
    cells: Mapping[str, tuple[str, Any]],
    kinds: tuple[type, ...],
    method: str,
) -> list[str]:
    """The modules that a configuration targets and the file does not hold; the reverse is only logged."""
    able = {
        module for module, (_, cell) in cells.items() if isinstance(cell, kinds) and not saved_whole(config, module)
    }
    named = named_modules(config, able)
    if named is None:
        return []
    extra = sorted(set(found) & able - named)
    if extra:
        _log.warning("target_modules does not mean these modules, which the file has tensors for: %s", ", ".join(extra))
    return [f"missing in the file: {method} of {module}" for module in cells if module in named - set(found)]


def bias_of(config: Mapping[str, Any]) -> Any:
    """Which biases train: ``none``, ``all``, or ``lora_only``, for which each method has a name of its own.

    >>> bias_of({}), bias_of({"bias": None}), bias_of({"bias": "hra_only"})
    ('none', 'none', 'lora_only')
    """
    bias = config.get("bias") or "none"
    return "lora_only" if isinstance(bias, str) and bias.endswith("_only") else bias


def ends_with(entries: str | list[str] | None, path: str) -> bool:
    """Whether a further list of modules means this one: by an end of its path, at a dot or not; a string is a regular
    expression for the whole of it.
    """
    if isinstance(entries, str):
        return re.fullmatch(entries, path) is not None
    return any(path.endswith(entry) for entry in entries or ())


def saved_whole(config: Mapping[str, Any], path: str) -> bool:
    """Whether ``modules_to_save`` means this module: the end of its path, at a dot or not."""
    return any(path.endswith(entry) for entry in _list(config.get("modules_to_save")))


def shortest_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The smallest table from which :func:`at_end` reads these values, in whatever order: PEFT sorts it.

    >>> shortest_pattern({"a.query": 4, "b.query": 4, "b.key": 8}, 8)
    {'query': 4}
    """
    last = {path.rpartition(".")[2]: value for path, value in values.items()}
    for table in (last, values):
        short = {key: value for key, value in table.items() if value != default}
        if all(_meant(short, path, default) == {value} for path, value in values.items()):
            return short
    return {f"^{re.escape(path)}": value for path, value in values.items() if value != default}


def _meant(table: Mapping[str, Any], path: str, default: Any) -> set[Any]:
    return {at_end({key: value}, path, value) for key, value in table.items() if at_end({key: True}, path, False)} or {
        default
    }


def _names(patterns: str | list[str] | None, path: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == entry or path.endswith(f".{entry}") for entry in patterns or ())


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
