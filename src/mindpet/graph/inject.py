"""Put a method into a network that nobody edits, and take it out again."""

import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet import _checks, _compat
from mindpet.delta.lora import LoRAConfig
from mindpet.delta.method import DeltaConfig
from mindpet.delta.registry import method_of
from mindpet.graph.freeze_utils import names_of_parameters, parameters_below, train_only
from mindpet.graph.targets import TargetReport, cells_by_path, find_targets, near_hint

_log = logging.getLogger("mindpet")
# attributes of a network
_RECORD = "mindpet_injections"  # what was injected
MERGED = "mindpet_merged"  # what is folded into weights now
SUSPENDED = "mindpet_suspended"  # what holds the adapted cells out of the network now
MARKER = "mindpet_delta_"  # in the name of every parameter that a method adds
QUANTISED = "mindpet_base_"  # in the name of every parameter that a quantised weight is kept in


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
    matched = report.matched if report.misses else config.narrowed(report.matched)
    if config.targets == "all-linear":  # what is trained whole is not adapted as well
        whole = parameters_below(network, config.modules_to_save)
        idle = [f"{path}." for path in getattr(network, "mindpet_idle", ())]  # cells that it never calls
        matched = {
            path: cell
            for path, cell in matched.items()
            if not any(id(p) in whole for p in cell.get_parameters()) and not path.startswith(tuple(idle))
        }
    candidates = [path for path, cell in cells_by_path(network).items() if isinstance(cell, kinds)]
    misses = dict(report.misses)
    for pattern in config.exclude:
        if not any(fnmatchcase(path, pattern) for path in candidates):
            misses[pattern] = _said(near_hint(pattern, candidates), "exclude")
    for pattern, option in config.patterns().items():
        if not any(fnmatchcase(path, pattern) for path in matched):
            misses[pattern] = _said(near_hint(pattern, list(matched)), option)
    return TargetReport(matched, misses)


def _require_usual(network: nn.Cell, config: DeltaConfig) -> None:
    """Whether a method's usual targets, if they are meant, are cells of this network; else which ones there are."""
    method = method_of(config)
    kinds = tuple(method.adapt)
    if config.targets is not None or not kinds or find_targets(network, method.targets, kinds).matched:
        return
    able = [path for path, cell in cells_by_path(network).items() if isinstance(cell, kinds) and MARKER not in path]
    listed = ", ".join(able[:8]) + (f" and {len(able) - 8} more" if able[8:] else "")
    raise _checks.NothingFitsError(
        f"No 'targets' are given, and the usual ones of '{method.name}' match no cell here: "
        f"{', '.join(map(repr, method.targets))}. It adapts cells of the kind "
        f"{' or '.join(kind.__name__ for kind in kinds)}; "
        + (f"give some of these as targets: {listed}." if able else "this network has none.")
    )


def _said(hint: str, option: str) -> str:
    """What a pattern may have meant, and of which option it is, if that is not `targets`."""
    return "; ".join(part for part in (f"of '{option}'" if option else "", hint) if part)


def inject(network: nn.Cell, config: DeltaConfig) -> nn.Cell:
    """Adapt the targeted cells in place and freeze everything else.

    The weights of the network are shared, not copied, and its base checkpoints still load. (A method that quantises
    weights replaces them for good: load the base first.) A second call adds another method; what the first one trains
    goes on training.

    Args:
        network: the network to tune.
        config: a method's configuration, for instance ``LoRAConfig(rank=8, targets=["*.query"])``.

    Returns:
        The same network.

    Raises:
        TypeError: `network` is not a Cell, `config` is not a method's configuration.
        ValueError: a target matches nothing, a target is adapted already, no targets are given for a network that the
            method's usual ones do not fit, nothing is left to train; a weight that is to be quantised is used by other
            cells or is in `modules_to_save`, too. The network is unchanged then.

    >>> from mindpet.delta import LoRAConfig
    >>> network = inject(nn.SequentialCell(nn.Dense(4, 4)), LoRAConfig(rank=2, targets=["*"]))
    >>> [parameter.name for parameter in network.trainable_params()]
    ['0.mindpet_delta_lora_a', '0.mindpet_delta_lora_b']
    """
    put_in(network, config)
    let_go(network)
    return network


def put_in(network: nn.Cell, config: DeltaConfig) -> None:
    """:func:`inject`, but weights that have been quantised are still there: :func:`eject` undoes it exactly."""
    require_in_place("inject", network)
    method = method_of(config)
    whole = parameters_below(network, config.modules_to_save)  # a miss is found before anything changes
    before = [(parameter, parameter.requires_grad) for parameter in network.get_parameters()]
    injection = Injection(config, trainable=before)
    made: dict[int, nn.Cell] = {}  # a Cell that two paths share stays one Cell
    report = target_report(network, config)
    if report.misses:
        _require_usual(network, config)
    matched = report.require_all().matched
    for path, cell in matched.items():
        if is_adapted(cell):
            raise ValueError(f"The cell at {path!r} is a {type(cell).__name__} already: eject it first.")
    _warn_of_ranks(matched, config)
    shared = (method.share(list(matched.values()), config),) if method.share else ()
    for path, cell in matched.items():
        make = next(make for kind, make in method.adapt.items() if isinstance(cell, kind))
        if id(cell) not in made:
            made[id(cell)] = make(cell, config.at(path), *shared)
            _compat.copy_recompute(cell, made[id(cell)])
        injection.originals[path], injection.adapted[path] = cell, made[id(cell)]
    users = owners(network)
    for path, cell in injection.adapted.items():
        if hasattr(cell, "let_go") and (users[id(cell.base_weight)] > 1 or id(cell.base_weight) in whole):
            why = "other cells use it, too" if users[id(cell.base_weight)] > 1 else "'modules_to_save' trains it"
            raise ValueError(f"The weight of the cell at {path!r} cannot be quantised, since {why}: exclude the cell.")
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


def _warn_of_ranks(matched: dict[str, nn.Cell], config: DeltaConfig) -> None:
    """A LoRA of more ranks than its weight can have is no error, and rarely meant. (LoKr's means a whole factor.)"""
    if not isinstance(config, LoRAConfig):
        return
    for path, cell in matched.items():
        weight = getattr(cell, "embedding_table" if isinstance(cell, nn.Embedding) else "weight", None)
        if isinstance(weight, Parameter):
            rank, most = config.at(path).rank, min(weight.shape[0], math.prod(weight.shape[1:]))
            if rank > most:
                _log.warning("A rank of %d is more than the weight of %r has: %d at most.", rank, path, most)
                return


def let_go(network: nn.Cell) -> None:
    """Free the memory of weights that adapted cells keep in another form."""
    for cell in quantised_cells(network).values():
        cell.let_go()


def quantised_cells(network: nn.Cell) -> dict[str, Any]:
    """The adapted cells that keep a weight in another form, by the name of the weight."""
    adapted = [cell for injection in injections(network) for cell in injection.adapted.values()]
    return {cell.base_weight.name: cell for cell in adapted if hasattr(cell, "let_go")}


def count_parameters(network: nn.Cell) -> int:
    """How many numbers a network has; a quantised weight counts as the weight that it stands for."""
    own = sum(parameter.size for parameter in network.get_parameters() if QUANTISED not in parameter.name)
    cells = {id(cell): cell for _, cell in network.cells_and_names()}
    return own + sum(math.prod(cell.base_shape) for cell in cells.values() if hasattr(cell, "base_shape"))


def eject(network: nn.Cell) -> nn.Cell:
    """Take out everything that :func:`inject` put in: cells, values of heads and biases, what trains.

    Returns:
        The same network, as it was before the first call; but weights that were quantised have the values that
        quantisation left them.

    Raises:
        ValueError: nothing was injected.
    """
    require_in_place("eject", network)
    if not injections(network):
        raise ValueError(f"Nothing was injected into this {type(network).__name__}.")
    for cell in quantised_cells(network).values():
        cell.take_back()
    for injection in reversed(injections(network)):
        replace_cells(network, injection.originals)
        for parameter, value in injection.values:
            parameter.set_data(Tensor(value))
    forget_injections(network)
    return network


@contextmanager
def disable(network: nn.Cell) -> Iterator[nn.Cell]:
    """Within the block the network computes what it did before anything was injected.

    In graph mode the first call inside the block, and the first after it, compile. Weights that were quantised are
    there again within the block, with the values that quantisation left them.

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
    for cell in quantised_cells(network).values():
        cell.take_back()
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
        let_go(network)
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


def owners(network: nn.Cell) -> Counter:
    """How many cells hold each parameter themselves."""
    cells = {id(cell): cell for cell in (network, *cells_by_path(network).values())}
    return Counter(id(p) for cell in cells.values() for p in _compat.own_parameters(cell).values())


def is_adapted(cell: nn.Cell) -> bool:
    """Whether a method has put trainable parameters of its own into this Cell."""
    return any(MARKER in name for name, _ in cell.parameters_and_names())


def _choose_trainable(network: nn.Cell, everything: list[Injection]) -> None:
    configs = [injection.config for injection in everything]
    selected = [ids for config in configs if (ids := _selected(network, config)) is not None]
    train_only(
        network,
        [method_of(config) for config in configs if not _selects_some(config)],
        tuple(dict.fromkeys(pattern for config in configs for pattern in config.modules_to_save)),
        include_norm=any(getattr(config, "include_norm", False) for config in configs),
        parameters=set().union(*selected, *(_biases(network, injection) for injection in everything)),
    )


def _selects_some(config: DeltaConfig) -> bool:
    """Whether a method that only selects parameters is to do so in some cells alone."""
    limited = config.targets is not None or config.exclude or config.layers is not None
    return not method_of(config).adapt and bool(limited)


def _selected(network: nn.Cell, config: DeltaConfig) -> set[int] | None:
    """What such a method selects: the parameters of the cells that it is limited to."""
    if not _selects_some(config):
        return None
    method = method_of(config)
    patterns = config.targets if config.targets is not None else ["*"]
    report = find_targets(network, patterns, (nn.Cell,), config.exclude, config.layers, method.linear)
    cells = list(report.require_all().matched.values())
    own = {id(p) for cell in cells for p in _compat.own_parameters(cell).values()}
    found = {
        id(parameter)
        for parameter, known in names_of_parameters(network)
        if id(parameter) in own and any(fnmatchcase(name, one) for name in known for one in method.trainable)
    }
    if getattr(config, "include_norm", False):
        norms = [cell for cell in cells if isinstance(cell, nn.LayerNorm)]
        found |= {id(getattr(cell, name)) for cell in norms for name in method.norm_trainable}
    if not found:
        raise _checks.NothingFitsError(
            f"None of the cells that 'targets', 'exclude' and 'layers' leave has a parameter of the method "
            f"'{method.name}' (none has a name like {' or '.join(method.trainable)})."
        )
    return found


def _biases(network: nn.Cell, injection: Injection) -> set[int]:
    """The biases that train beside the method: what the `bias` of its configuration says, if it has one."""
    which = getattr(injection.config, "bias", "none")
    if which == "lora_only":
        biases = [getattr(cell, "bias", None) for cell in injection.adapted.values()]
        return {id(bias) for bias in biases if isinstance(bias, Parameter)}
    names = names_of_parameters(network) if which == "all" else []
    return {  # beta is the bias of a norm
        id(parameter)
        for parameter, known in names
        if any(name.rpartition(".")[2] in ("bias", "beta") and MARKER not in name for name in known)
    }
