"""Put a method into a network that nobody edits."""

from mindspore import nn

from mindpet import _checks, _compat
from mindpet.delta.method import DeltaConfig
from mindpet.delta.registry import METHODS, method_of
from mindpet.graph.freeze_utils import parameters_below, train_only
from mindpet.graph.targets import cells_by_path, find_targets

_RECORD = "mindpet_injected"  # the attribute of a network that remembers what was injected


def replace_cell(root: nn.Cell, path: str, new: nn.Cell) -> None:
    """Put `new` at `path`. Its parameters are named by their paths, those that it shares keep their names.

    Raises:
        KeyError: there is no Cell at that path.
    """
    cells = {"": root, **cells_by_path(root)}
    if path not in cells or not path:
        raise KeyError(f"There is no cell at {path!r}{_checks.near(path, cells)}.")
    parent, _, name = path.rpartition(".")
    shared = {id(parameter) for parameter in cells[path].get_parameters()}
    _compat.set_child(cells[parent], name, new)
    _compat.forget_compiled(root)
    for parameter_path, parameter in new.parameters_and_names(path):
        if id(parameter) not in shared:
            parameter.name = parameter_path


def inject(network: nn.Cell, config: DeltaConfig) -> nn.Cell:
    """Adapt the targeted cells in place and freeze everything else.

    The weights of the network are shared, not copied, and its base checkpoints still load.

    Args:
        network: the network to tune.
        config: a method's configuration, for instance ``LoRAConfig(rank=8, targets=["*.query"])``.

    Returns:
        The same network.

    Raises:
        TypeError: `network` is not a Cell, `config` is not a method's configuration.
        ValueError: a target matches nothing, a target is adapted already, no targets are given for a network that the
            method's usual ones do not fit, nothing is left to train.

    >>> from mindpet.delta import LoRAConfig
    >>> network = inject(nn.SequentialCell(nn.Dense(4, 4)), LoRAConfig(rank=2, targets=["*"]))
    >>> [parameter.name for parameter in network.trainable_params()]
    ['0.mindpet_delta_lora_a', '0.mindpet_delta_lora_b']
    """
    _checks.cell("inject", "network", network)
    method = method_of(config)
    parameters_below(network, config.modules_to_save)  # a miss is found before anything changes
    if method.adapt:
        kinds = tuple(method.adapt)
        report = find_targets(network, config.targets or method.targets, kinds, config.exclude).require_all()
        replacements: dict[str, nn.Cell] = {}
        made: dict[int, nn.Cell] = {}  # a Cell that two paths share stays one Cell
        for path, cell in report.matched.items():
            if is_adapted(cell):
                raise ValueError(f"The cell at {path!r} is a {type(cell).__name__} already: eject it first.")
            make = next(make for kind, make in method.adapt.items() if isinstance(cell, kind))
            if id(cell) not in made:
                made[id(cell)] = make(cell, config)
            replacements[path] = made[id(cell)]
        for path, new in replacements.items():
            replace_cell(network, path, new)
    train_only(network, [method], config.modules_to_save, include_norm=getattr(config, "include_norm", False))
    vars(network)[_RECORD] = [*injected(network), config]
    return network


def injected(network: nn.Cell) -> list[DeltaConfig]:
    """The configurations that :func:`inject` was called with on this network, in order."""
    return list(vars(network).get(_RECORD, ()))


def is_adapted(cell: nn.Cell) -> bool:
    """Whether a method has put trainable parameters of its own into this Cell."""
    markers = tuple(pattern.strip("*") for method in METHODS.values() if method.adapt for pattern in method.trainable)
    return any(marker in name for name, _ in cell.parameters_and_names() for marker in markers)
