"""What a tuning method is: a record that everything else reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mindspore import nn


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """What every method's configuration has.

    Attributes:
        targets: patterns (``fnmatch``) on the paths of the cells to adapt, or ``"all-linear"``; None takes the
            method's usual ones for the networks in `mindpet.models`. An entry may be a type of Cell instead.
        exclude: patterns on the paths of cells to leave alone although `targets` matches them.
        layers: numbers of the layers to adapt (the first number in a path), or None for all.
        modules_to_save: patterns on the paths of cells, a new head for instance, that are trained and saved whole.
    """

    targets: Sequence[str | type] | str | None = None
    exclude: Sequence[str] = ()
    layers: Sequence[int] | None = None
    modules_to_save: Sequence[str] = ()

    def at(self, path: str) -> "DeltaConfig":
        """What holds for the cell at `path`; methods with patterns of their own override this."""
        return self


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
        linear: those of the types that ``"all-linear"`` means.
        targets: the usual targets in the networks of `mindpet.models`.
        learning_rate: a sensible one to begin with, for Adam.
        aliases: other names that it is known by.
    """

    name: str
    config: type[DeltaConfig]
    trainable: tuple[str, ...]
    paper: str
    adapt: Mapping[type[nn.Cell], Callable[[Any, Any], nn.Cell]] = field(default_factory=dict)
    linear: tuple[type[nn.Cell], ...] = (nn.Dense,)
    targets: tuple[str, ...] = ()
    learning_rate: float = 1e-3
    aliases: tuple[str, ...] = ()
