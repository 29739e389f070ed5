"""Put a method into a network that nobody edits, and take it out again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet import _checks, _compat
from mindpet.delta.method import DeltaConfig
from mindpet.delta.registry import method_of
from mindpet.graph.freeze_utils import parameters_below, train_only
from mindpet.graph.targets import TargetReport, cells_by_path, find_targets, near_paths

# attributes of a network
_RECORD = "mindpet_injections"  # what was injected
MERGED = "mindpet_merged"  # what is folded into weights now
SUSPENDED = "mindpet_suspended"  # what holds the adapted cells out of the network now
MARKER = "mindpet_delta_"  # in the name of every parameter that a method adds


@dataclass
class Injection:
    """What one call of :func:`inject` did, so that it can be undone.

    Attributes:
        config: what it was called with.
        originals: path to the Cell that was there.
        adapted: path to the Cell that took its place.
        trainable: whether each parameter trained before.
        values: what parameters that were there before, and train now, held: heads, biases.
    """

    config: DeltaConfig
    originals: dict[str, nn.Cell] = field(default_factory=dict)
    adapted: dict[str, nn.Cell] = field(default_factory=dict)
    trainable: list[tuple[Parameter, bool]] = field(default_factory=list)
    values: list[tuple[Parameter, np.ndarray]] = field(default_factory=list)


def replace_cell(root: nn.Cell, path: str, new: nn.Cell) -> None:
    """Put `new` at `path`. Its parameters are named by their paths, those that it shares keep their names.

    Raises:
        KeyError: there is no Cell at that path.
    """
    replace_cells(root, {path: new})


def replace_cells(root: nn.Cell, replacements: dict[str, nn.Cell]) -> None:
    """:func:`replace_cell` for many paths, with one walk through the network."""
    cells = {"": root, **cells_by_path(root)}
    missing = [path for path in replacements if not path or path not in cells]
    if missing:
        raise KeyError(f"There is no cell at {missing[0]!r}{_checks.near(missing[0], cells)}.")
    named: set[int] = set()
    for path, new in replacements.items():
        parent, _, name = path.rpartition(".")
        named |= {id(parameter) for parameter in cells[path].get_parameters()}  # shared ones keep their names
        new.set_train(cells[path].training)
        _compat.set_child(cells[parent], name, new)
        for parameter_path, parameter in new.parameters_and_names(path):
            if id(parameter) not in named:
                parameter.name = parameter_path
                named.add(id(parameter))
    _compat.forget_compiled(root)


def require_in_place(owner: str, network: nn.Cell) -> None:
    """Whether the adapted cells are in the network now, so that it can be changed, saved or switched.

    Raises:
        ValueError: they are merged, or a ``with`` block of disable or MixedDeltas holds them out.
    """
    _checks.cell(owner, "network", network)
    if vars(network).get(MERGED):
        raise ValueError(f"For '{owner}', the deltas of this {type(network).__name__} are merged: unmerge them first.")
    holder = vars(network).get(SUSPENDED)
    if holder:
        raise ValueError(
            f"For '{owner}', leave the block of {holder} first: it holds the adapted cells out of the network."
        )


def target_report(network: nn.Cell, config: DeltaConfig) -> TargetReport:
    """What :func:`inject` would adapt: a dry run.

    >>> from mindpet.delta import LoRAConfig
    >>> list(target_report(nn.SequentialCell(nn.Dense(4, 4)), LoRAConfig(targets=["*"])).matched)
    ['0']
    """
    method = method_of(config)
    if not method.adapt:
        return TargetReport({}, {})
    kinds = tuple(method.adapt)
    given = config.targets is not None  # a method's usual targets are those of several kinds of networks
    patterns = config.targets if config.targets is not None else method.targets
    report = find_targets(network, patterns, kinds, config.exclude, config.layers, method.linear, need_all=given)
    matched = report.matched
    if config.targets == "all-linear":  # what is trained whole is not adapted as well
        whole = parameters_below(network, config.modules_to_save)
        matched = {
            path: cell for path, cell in matched.items() if not any(id(p) in whole for p in cell.get_parameters())
        }
    candidates = [path for path, cell in cells_by_path(network).items() if isinstance(cell, kinds)]
    misses = dict(report.misses)
    for pattern in config.exclude:
        if not any(fnmatchcase(path, pattern) for path in candidates):
            misses[pattern] = near_paths(pattern, candidates)
    for pattern in config.patterns():
        if not any(fnmatchcase(path, pattern) for path in matched):
            misses[pattern] = near_paths(pattern, list(matched))
    return TargetReport(matched, misses)


def inject(network: nn.Cell, config: DeltaConfig) -> nn.Cell:
    """Adapt the targeted cells in place and freeze everything else.

    The weights of the network are shared, not copied, and its base checkpoints still load. A second call adds another
    method; what the first one trains goes on training.

    Args:
        network: the network to tune.
        config: a method's configuration, for instance ``LoRAConfig(rank=8, targets=["*.query"])``.

    Returns:
        The same network.

    Raises:
        TypeError: `network` is not a Cell, `config` is not a method's configuration.
        ValueError: a target matches nothing, a target is adapted already, no targets are given for a network that the
            method's usual ones do not fit, nothing is left to train. The network is unchanged then.

    >>> from mindpet.delta import LoRAConfig
    >>> network = inject(nn.SequentialCell(nn.Dense(4, 4)), LoRAConfig(rank=2, targets=["*"]))
    >>> [parameter.name for parameter in network.trainable_params()]
    ['0.mindpet_delta_lora_a', '0.mindpet_delta_lora_b']
    """
    require_in_place("inject", network)
    method = method_of(config)
    parameters_below(network, config.modules_to_save)  # a miss is found before anything changes
    before = [(parameter, parameter.requires_grad) for parameter in network.get_parameters()]
    injection = Injection(config, trainable=before)
    made: dict[int, nn.Cell] = {}  # a Cell that two paths share stays one Cell
    matched = target_report(network, config).require_all().matched
    for path, cell in matched.items():
        if is_adapted(cell):
            raise ValueError(f"The cell at {path!r} is a {type(cell).__name__} already: eject it first.")
    shared = (method.share(list(matched.values()), config),) if method.share else ()
    for path, cell in matched.items():
        make = next(make for kind, make in method.adapt.items() if isinstance(cell, kind))
        if id(cell) not in made:
            made[id(cell)] = make(cell, config.at(path), *shared)
            _compat.copy_recompute(cell, made[id(cell)])
        injection.originals[path], injection.adapted[path] = cell, made[id(cell)]
    replace_cells(network, injection.adapted)
    everything = [*injections(network), injection]
    try:
        _choose_trainable(network, everything)
    except ValueError:
        replace_cells(network, injection.originals)
        raise
    old = {id(parameter) for parameter, _ in before}
    injection.values = [
        (p, p.asnumpy().copy()) for p in network.trainable_params() if id(p) in old and MARKER not in p.name
    ]
    vars(network)[_RECORD] = everything
    return network


def eject(network: nn.Cell) -> nn.Cell:
    """Take out everything that :func:`inject` put in: cells, values of heads and biases, what trains.

    Returns:
        The same network, as it was before the first call.

    Raises:
        ValueError: nothing was injected.
    """
    require_in_place("eject", network)
    if not injections(network):
        raise ValueError(f"Nothing was injected into this {type(network).__name__}.")
    for injection in reversed(injections(network)):
        replace_cells(network, injection.originals)
        for parameter, value in injection.values:
            parameter.set_data(Tensor(value))
    forget_injections(network)
    return network


@contextmanager
def disable(network: nn.Cell) -> Iterator[nn.Cell]:
    """Within the block the network computes what it did before anything was injected.

    In graph mode the first call inside the block, and the first after it, compile.

    >>> from mindspore import ops
    >>> from mindpet.delta import LoRAConfig
    >>> network = inject(nn.SequentialCell(nn.Dense(4, 4)), LoRAConfig(rank=2, targets=["*"]))
    >>> with disable(network):
    ...     print(type(network[0]).__name__)
    Dense
    """
    require_in_place("disable", network)
    everything = injections(network)
    tuned = [(parameter, parameter.asnumpy().copy()) for one in everything for parameter, _ in one.values]
    for injection in reversed(everything):
        replace_cells(network, injection.originals)
        for parameter, value in injection.values:
            parameter.set_data(Tensor(value))
    vars(network)[SUSPENDED] = "disable"
    try:
        yield network
    finally:
        vars(network).pop(SUSPENDED)
        for injection in everything:
            replace_cells(network, injection.adapted)
        for parameter, value in tuned:
            parameter.set_data(Tensor(value))


def injections(network: nn.Cell) -> list[Injection]:
    """What was injected into this network, in order."""
    return list(vars(network).get(_RECORD, ()))


def forget_injections(network: nn.Cell) -> None:
    """Keep the cells as they are and remember nothing of how they came about; what trains is what trained before."""
    for injection in reversed(injections(network)):
        for parameter, flag in injection.trainable:
            parameter.requires_grad = flag
    vars(network).pop(_RECORD, None)
    vars(network).pop("mindpet_deltas", None)


def is_adapted(cell: nn.Cell) -> bool:
    """Whether a method has put trainable parameters of its own into this Cell."""
    return any(MARKER in name for name, _ in cell.parameters_and_names())


def _choose_trainable(network: nn.Cell, everything: list[Injection]) -> None:
    configs = [injection.config for injection in everything]
    train_only(
        network,
        [method_of(config) for config in configs],
        tuple(dict.fromkeys(pattern for config in configs for pattern in config.modules_to_save)),
        include_norm=any(getattr(config, "include_norm", False) for config in configs),
    )
