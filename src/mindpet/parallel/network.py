"""Cutting every adapted layer of a network at once."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from mindspore import nn

from mindpet import _checks, _compat
from mindpet.delta.ptuning2 import PrefixEncoder, PTuning2
from mindpet.delta.strategy import input_axes, operator_of, require_fitting
from mindpet.parallel.config import ParallelConfig, strategies, strategies_of_parts


def shard_like(
    network: nn.Cell, config: ParallelConfig | Mapping[str, ParallelConfig] | None = None
) -> dict[str, dict[str, Any]]:
    """Cut each adapted layer of `network` as its frozen dense layer is cut, or as `config` says.

    A dense layer keeps its strategies when a method adapts it. Where its matrix product has one, it is followed: the
    operators that the method has added are cut to match. Where it has none, `config` says how to cut both.

    Args:
        network: with layers of LoRA, of adapters or of low-rank adapters, a PrefixEncoder, or one of these itself.
        config: for every layer whose matrix product has no strategy, or by patterns of paths, the first that matches:
            ``{"*.query": ParallelConfig(model_parallel=8), "*.output.dense": ParallelConfig(model_parallel=8,
            cut="columns")}``.

    Returns:
        Path to what its ``shard`` was called with, for each layer that was cut. What is not in it has no strategies to
        be given (embeddings, convolutions, a PTuning2 in its slot, dense layers that are not adapted).

    Raises:
        TypeError: `network` is not a Cell, `config` is neither of the two.
        ValueError: nothing to cut; a layer that nothing says how to cut; a pattern that matches none; sizes that cannot
            be cut so. Nothing is written then.

    >>> import mindpet
    >>> network = nn.SequentialCell(nn.Dense(8, 16), nn.Dense(16, 4))
    >>> _ = network[0].matmul.shard(((2, 1), (4, 1)))
    >>> mindpet.inject(network, mindpet.LoRAConfig(rank=2, targets=["0"])) is network
    True
    >>> shard_like(network)["0"]["strategy_lora_b_matmul"]
    ((2, 1), (4, 1))
    """
    _checks.cell("shard_like", "network", network)
    by_pattern = _by_pattern(config)
    layers = dict(_layers(network, ""))
    if not layers:
        raise _checks.NothingFitsError(
            f"For 'shard_like', this {type(network).__name__} has no layer that takes strategies: inject a method "
            "that adapts dense layers first."
        )
    for pattern in by_pattern:
        if not any(fnmatchcase(path, pattern) for path in layers):
            raise ValueError(
                f"For 'shard_like', no layer matches {pattern!r}; the layers are {', '.join(layers)}"
                f"{_checks.near(pattern, layers)}."
            )
    problems, given = [], {}
    for path, layer in layers.items():
        name = f"{path} ({type(layer).__name__})" if path else type(layer).__name__
        try:
            given[path] = _strategies(layer, path, name, by_pattern)
        except ValueError as problem:
            problems.append(str(problem))
    if problems:
        raise ValueError("\n".join(problems))
    for path, arguments in given.items():
        layers[path].shard(**arguments)
    return given


def _by_pattern(config: Any) -> dict[str, ParallelConfig]:
    by_pattern = {"*": config} if isinstance(config, ParallelConfig) else config
    if by_pattern is None:
        return {}
    if not isinstance(by_pattern, Mapping) or not all(isinstance(each, ParallelConfig) for each in by_pattern.values()):
        raise TypeError(
            "For 'shard_like', 'config' must be a ParallelConfig or a mapping of patterns to them, "
            f"but got {_checks.shown(config)}."
        )
    return dict(by_pattern)


def _layers(cell: nn.Cell, path: str) -> Iterator[tuple[str, Any]]:
    """Paths and layers that take strategies, the outermost ones alone: an AdapterDense, not the adapter in it."""
    if hasattr(type(cell), "sharded") or isinstance(cell, PrefixEncoder):
        yield path, cell
    elif not isinstance(cell, PTuning2):
        for name, child in _compat.children(cell).items():
            yield from _layers(child, f"{path}.{name}" if path else name)


def _strategies(layer: Any, path: str, name: str, by_pattern: Mapping[str, ParallelConfig]) -> dict[str, Any]:
    parts = None if isinstance(layer, PrefixEncoder) else _parts_of_base(layer, name)
    config = next((config for pattern, config in by_pattern.items() if fnmatchcase(path, pattern)), None)
    if parts is not None:
        given = strategies_of_parts(layer, parts)
    elif config is not None:
        given = strategies(layer, config)
    else:
        raise ValueError(
            f"For 'shard_like', nothing says how to cut {name}: its matrix product has no strategy and no "
            "ParallelConfig is for it."
        )
    if isinstance(layer, PrefixEncoder):
        layer.require_cut(**given)
    else:
        require_fitting(name, layer, given)
    return given


def _parts_of_base(layer: Any, name: str) -> dict[str, int] | None:
    """Into how many parts the frozen matrix product cuts each axis; None if it says nothing, or there is none."""
    argument = next((argument for argument, entry in layer.sharded.items() if entry.path == "matmul"), None)
    if argument is None:
        return None
    product = operator_of(layer, layer.sharded[argument])
    if _compat.has_layouts(product):
        raise ValueError(f"For 'shard_like', the matrix product of {name} has Layouts: call its shard yourself.")
    base = _compat.strategy_of(product)
    if base is None:
        return None
    require_fitting(name, layer, {argument: base})
    axes = input_axes(product, layer.sharded[argument])
    return {axis: parts for names, cuts in zip(axes, base) for axis, parts in zip(names, cuts)}
