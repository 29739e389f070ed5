"""What a tuning method is: a record that everything else reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mindspore import nn


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """What every method's configuration has.

    Attributes:
        targets: patterns (``fnmatch``) on the paths of the cells to adapt, or ``"all-linear"``; None takes the
            method's usual ones for the networks in `mindpet.models`.
        exclude: patterns on the paths of cells to leave alone although `targets` matches them.
        modules_to_save: patterns on the paths of cells, a new head for instance, that are trained and saved whole.
    """

    targets: tuple[str, ...] | str | None = None
    exclude: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One tuning method.

    Attributes:
        name: how the user calls it.
        config: the class of its configuration.
        trainable: patterns on parameter paths, what it trains.
        paper: author, year, title, where.
        adapt: for each type of Cell that it adapts, what makes the adapted Cell: ``make(cell, config)``. Empty when
            it only selects parameters.
        targets: the usual targets in the networks of `mindpet.models`.
        learning_rate: a sensible one to begin with, for Adam.
        aliases: other names that it is known by.
    """

    name: str
    config: type[DeltaConfig]
    trainable: tuple[str, ...]
    paper: str
    adapt: Mapping[type[nn.Cell], Callable[[Any, Any], nn.Cell]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    learning_rate: float = 1e-3
    aliases: tuple[str, ...] = ()
