"""Choose what trains: by method, by name, or from a file."""

import difflib
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mindspore import Parameter, nn
from mindspore import dtype as mstype

from mindpet import _checks, _compat, _yaml
from mindpet._paths import forms_below
from mindpet.delta.method import Method
from mindpet.delta.registry import METHODS, method_named
from mindpet.utils.exceptions import ModelConfigFreezeInfoError, ReadYamlFileError

_log = logging.getLogger("mindpet")
# A table of indices belongs to its method by name, but cannot train: MindFormers' P-tuning v2 keeps one as a parameter.
_WITHOUT_GRADIENT = (*mstype.int_type, *mstype.uint_type, mstype.bool_)


def freeze_modules(model: nn.Cell, include: list[str] | None = None, exclude: list[str] | None = None) -> None:
    """Freeze the parameters that `include` matches, make those trainable that `exclude` matches.

    A parameter that both match, or neither, stays as it is.

    Args:
        model: any Cell.
        include: ``fnmatch`` patterns on whole parameter paths; one without ``*`` is an exact name.
        exclude: the same, for what is to train.

    Raises:
        TypeError: `model` is not a Cell; a list is not a non-empty list of str.
        ValueError: both lists are None.

    >>> network = nn.SequentialCell(nn.Dense(2, 2))
    >>> freeze_modules(network, include=["*weight"])
    >>> [parameter.name for parameter in network.trainable_params()]
    ['0.bias']
    """
    _checks.cell("freeze_modules", "model", model)
    _check_lists("freeze_modules", include, exclude)
    if include is None and exclude is None:
        raise ValueError("For 'freeze_modules', 'include' and 'exclude' cannot both be None.")
    _apply(names_of_parameters(model), include or (), exclude or ())


def freeze_delta(
    model: nn.Cell,
    mode: str | Sequence[str],
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    include_norm: bool = False,
) -> None:
    """Freeze everything except the parameters of one method, or of several; then apply the two lists.

    A second call replaces the first.

    Args:
        model: a network that holds the method's layers.
        mode: ``lora``, ``prefix`` (or ``prefixtuning``), ``adapter``, ``low_rank_adapter``, ``bitfit`` or
            ``ptuning2``, in any case, or a list of them.
        include: patterns of parameters to freeze as well, as in :func:`freeze_modules`.
        exclude: patterns of parameters that train as well, a new head for instance.
        include_norm: with ``bitfit``, whether LayerNorm's ``beta`` counts as a bias, as in the paper.

    Raises:
        TypeError: `model` is not a Cell, `mode` is neither a str nor a list of them, a list is not as it must be.
        ValueError: an unknown mode; a mode that matches no parameter of this network.

    >>> network = nn.SequentialCell(nn.Dense(2, 2))
    >>> freeze_delta(network, "bitfit")
    >>> [parameter.name for parameter in network.trainable_params()]
    ['0.bias']
    """
    _checks.cell("freeze_delta", "model", model)
    _checks.boolean("freeze_delta", "include_norm", include_norm)
    modes = [mode] if isinstance(mode, str) else mode
    if not isinstance(modes, (list, tuple)) or not modes or not all(isinstance(entry, str) for entry in modes):
        raise TypeError(f"For 'freeze_delta', 'mode' must be a str or a list of str, but got {_checks.shown(mode)}.")
    _check_lists("freeze_delta", include, exclude)
    train_only(model, [method_named(entry) for entry in modes], include_norm=include_norm)
    if include or exclude:
        _apply(names_of_parameters(model), include or (), exclude or ())


def freeze_from_config(model: nn.Cell, config_path: str) -> None:
    """:func:`freeze_modules` with the lists from a YAML file.

    The file has one key, ``freeze``, that holds ``include`` and/or ``exclude``.

    Raises:
        TypeError: `model` is not a Cell, `config_path` is not a str, a list is not a list of str.
        ValueError: `config_path` is empty; both lists are empty.
        ReadYamlFileError: the file is missing, a symbolic link, not readable, not YAML.
        ModelConfigFreezeInfoError: the file has no content, no ``freeze``, one that is not a mapping, or other keys.
    """
    _checks.cell("freeze_from_config", "model", model)
    _checks.string("freeze_from_config", "config_path", config_path)
    if not config_path:
        raise ValueError("For 'freeze_from_config', 'config_path' must be the path of a YAML file, but is empty.")
    content = _read_yaml(config_path)
    if content is None:
        raise ModelConfigFreezeInfoError(f"{config_path} has no content: it needs a key 'freeze'.")
    if not isinstance(content, dict) or "freeze" not in content:
        raise ModelConfigFreezeInfoError(f"{config_path} needs a key 'freeze', but holds {_checks.shown(content)}.")
    lists = content["freeze"]
    if not isinstance(lists, dict):
        raise ModelConfigFreezeInfoError(
            f"In {config_path}, 'freeze' must be a mapping with 'include' and/or 'exclude', "
            f"but is {_checks.shown(lists)}."
        )
    unknown = [str(key) for key in lists if key not in ("include", "exclude")]
    unknown += [str(key) for key in content if key != "freeze"]
    if unknown:
        hints = "".join(_checks.near(key, ("freeze", "include", "exclude")) for key in unknown)
        raise ModelConfigFreezeInfoError(
            f"{config_path} may hold 'freeze' with 'include' and 'exclude' only, but has {', '.join(unknown)}{hints}."
        )
    include, exclude = lists.get("include"), lists.get("exclude")
    if not include and not exclude:
        raise ValueError(f"In {config_path}, 'include' and 'exclude' are both empty.")
    freeze_modules(model, include or None, exclude or None)


def train_only(
    model: nn.Cell,
    methods: Sequence[Method],
    also: Sequence[str] = (),
    include_norm: bool = False,
    parameters: Collection[int] = (),
) -> None:
    """Leave trainable what `methods` train, what lies below the cells that `also` matches, and the parameters of the
    ids `parameters`; freeze the rest.

    Raises:
        ValueError: a method, or an entry of `also`, matches nothing here. Nothing is changed then.
    """
    names = names_of_parameters(model)
    chosen: set[int] = set(parameters)
    for method in methods:
        ids = {id(parameter) for parameter, known in names if _matches(known, method.trainable)}
        if include_norm:
            norms = [cell for _, cell in model.cells_and_names() if isinstance(cell, nn.LayerNorm)]
            ids |= {id(getattr(cell, name)) for cell in norms for name in method.norm_trainable}
        if not ids:
            raise _checks.NothingFitsError(
                f"No parameter of this {type(model).__name__} belongs to the method '{method.name}' (none has a name "
                f"like {' or '.join(method.trainable)}), so everything would be frozen. {_what_is_there(names)}"
            )
        chosen |= ids
    chosen |= parameters_below(model, also)
    for parameter, _ in names:
        parameter.requires_grad = id(parameter) in chosen and parameter.dtype not in _WITHOUT_GRADIENT


def parameters_below(model: nn.Cell, patterns: Sequence[str]) -> set[int]:
    """The ids of the parameters below the cells that `patterns` match.

    Raises:
        ValueError: a pattern matches nothing.
    """
    names = names_of_parameters(model)
    found: set[int] = set()
    for pattern in patterns:
        ids = {id(p) for p, known in names if _matches(known, forms_below(pattern))}
        if not ids:
            parts = {part for _, known in names for name in known for part in (name, *name.split("."))}
            raise ValueError(f"No parameter lies below {pattern!r}{_checks.near(pattern, parts)}.")
        found |= ids
    return found


def names_of_parameters(model: nn.Cell) -> list[tuple[Parameter, set[str]]]:
    """Each parameter once, with every name that it is known by: its own, and its path, or paths where it is shared."""
    parameters: dict[int, Parameter] = {}
    names: dict[int, set[str]] = {}

    def walk(cell: nn.Cell, prefix: str) -> None:
        for name, parameter in _compat.own_parameters(cell).items():
            parameters[id(parameter)] = parameter
            names.setdefault(id(parameter), {parameter.name}).add(prefix + name)
        for name, child in _compat.children(cell).items():
            walk(child, f"{prefix}{name}.")

    walk(model, "")
    for path, parameter in model.parameters_and_names():  # also those kept in tuples and lists
        if id(parameter) not in parameters:
            parameters[id(parameter)], names[id(parameter)] = parameter, {parameter.name, path}
    return [(parameters[key], names[key]) for key in parameters]


def _matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(_match(name, pattern) for name in names for pattern in patterns)


def _match(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) if "*" in pattern else name == pattern


def _apply(names: list[tuple[Parameter, set[str]]], include: Sequence[str], exclude: Sequence[str]) -> None:
    for pattern in (*include, *exclude):
        if not any(_matches(known, [pattern]) for _, known in names):
            every = sorted({name for _, known in names for name in known})
            close = difflib.get_close_matches(pattern.strip("*"), every, n=3, cutoff=0.4)
            _log.warning("The pattern %r matches no parameter%s", pattern, f"; near it: {close}" if close else ".")
    for parameter, known in names:
        frozen, trained = _matches(known, include), _matches(known, exclude)
        if frozen != trained:
            parameter.requires_grad = trained


def _check_lists(owner: str, include: Any, exclude: Any) -> None:
    for name, value in (("include", include), ("exclude", exclude)):
        if value is None:
            continue
        if not isinstance(value, list) or not value:
            raise TypeError(f"For '{owner}', '{name}' must be a non-empty list of str, but got {_checks.shown(value)}.")
        wrong = [entry for entry in value if not isinstance(entry, str)]
        if wrong:
            raise TypeError(
                f"For '{owner}', every entry of '{name}' must be a str, but got {', '.join(map(_checks.shown, wrong))}."
            )


def _what_is_there(names: list[tuple[Parameter, set[str]]]) -> str:
    there = [method.name for method in METHODS.values() if any(_matches(known, method.trainable) for _, known in names)]
    return f"This network has parameters of: {', '.join(there)}." if there else "It has none of any method."


def _read_yaml(path: str) -> Any:
    if os.path.islink(os.path.normpath(path)):
        raise ReadYamlFileError(f"{path} is a symbolic link, which is refused: give the file itself.")
    if not os.path.isfile(path):
        raise ReadYamlFileError(f"There is no file {path}.")
    return _yaml.read(path, ReadYamlFileError)
