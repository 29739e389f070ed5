"""Fold a delta into the weights beside it, and take it out again."""

from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet import _checks, _compat
from mindpet.graph.inject import (
    MERGED,
    SUSPENDED,
    forget_injections,
    injections,
    owners,
    replace_cells,
    require_in_place,
)
from mindpet.graph.targets import cells_by_path


@dataclass(frozen=True)
class Merged:
    """A cell whose delta is folded in.

    Attributes:
        adapted: the Cell with the delta, not in the network now.
        base: the parameters that hold sums now, its weight and its bias, and what they held before, bit for bit.
    """

    adapted: nn.Cell
    base: list[tuple[Parameter, np.ndarray]]


def merge(network: nn.Cell) -> nn.Cell:
    """Add every delta to the weight that it goes with and put plain cells in the place of the adapted ones.

    The outputs stay, up to rounding; a forward pass costs what it did before the injection. The base weights of the
    merged cells are kept beside the network for :func:`unmerge`.

    Returns:
        The same network.

    Raises:
        TypeError: `network` is not a Cell.
        ValueError: nothing to merge; a delta that is no matrix added to a weight (adapters, prefixes); a weight that
            other cells or a tied head use as well; a sum with NaN or infinity. All are named, and nothing is changed.
    """
    require_in_place("merge", network)
    adapted = _adapted_cells(network)
    problems = [
        f"{path}: {cell.delta_method} is more than a matrix added to a weight and cannot merge"
        for path, cell in adapted.items()
        if not hasattr(cell, "delta_weight")
    ]
    if not adapted:
        raise ValueError(f"Nothing in this {type(network).__name__} can be merged: no cell of it is adapted.")
    users = owners(network)
    known = {path: cell for one in injections(network) for path, cell in one.originals.items()}
    tied = [cell.tied_table for _, cell in network.cells_and_names() if hasattr(cell, "tied_table")]
    sums: dict[int, np.ndarray] = {}
    for path, cell in adapted.items():
        for base, delta in _parts(cell):
            if users[id(base)] > 1:
                what = "bias" if base is getattr(cell, "bias", None) else "weight"
                problems.append(f"{path}: other cells use its {what} {base.name} too, and would change with it")
                continue
            if any(base is table for table in tied) and not hasattr(cell, "table"):
                problems.append(f"{path}: the head multiplies with its table {base.name} too, and would change with it")
                continue
            quantised = base is cell.base_weight and hasattr(cell, "base_value")
            value = cell.base_value() if quantised else base.asnumpy()
            total = value.astype(np.float32) + delta.asnumpy().astype(np.float32)
            with np.errstate(over="ignore"):
                sums[id(base)] = total.astype(base.asnumpy().dtype)
            if not np.isfinite(sums[id(base)]).all():
                problems.append(f"{path}: the sum would hold NaN or infinity")
    if problems:
        raise ValueError("Nothing was merged:\n  " + "\n  ".join(problems))
    merged, plain = {}, {}
    for path, cell in adapted.items():
        merged[path] = Merged(cell, [(base, base.asnumpy().copy()) for base, _ in _parts(cell)])
        plain[path] = known[path] if path in known else cell.plain()  # by hand, only dense layers are made
        _compat.copy_recompute(cell, plain[path])
    for one in merged.values():
        for parameter, _ in one.base:
            parameter.set_data(Tensor(sums[id(parameter)]), slice_shape=True)  # a quantised weight is empty until now
    replace_cells(network, plain)
    vars(network)[MERGED] = merged
    return network


def unmerge(network: nn.Cell) -> nn.Cell:
    """Undo :func:`merge`: the base weights bit for bit, and the adapted cells with their deltas.

    Returns:
        The same network.

    Raises:
        ValueError: nothing was merged.
    """
    _checks.cell("unmerge", "network", network)
    if vars(network).get(SUSPENDED):
        raise ValueError("For 'unmerge', leave the block that holds the adapted cells out of the network first.")
    merged = merged_cells(network)
    if not merged:
        raise ValueError(f"Nothing in this {type(network).__name__} is merged.")
    for one in merged.values():
        for parameter, value in one.base:
            parameter.set_data(Tensor(value), slice_shape=True)
    replace_cells(network, {path: one.adapted for path, one in merged.items()})
    vars(network).pop(MERGED)
    return network


def merge_and_eject(network: nn.Cell) -> nn.Cell:
    """:func:`merge`, and forget that there was a delta: the plain network with the new weights, for good.

    What trains afterwards is what trained before the injection.

    Returns:
        The same network.

    Raises:
        ValueError: as :func:`merge`.
    """
    merge(network)
    vars(network).pop(MERGED)
    forget_injections(network)
    return network


def merged_cells(network: nn.Cell) -> dict[str, Merged]:
    """What is merged now, by path."""
    return dict(vars(network).get(MERGED, {}))


def _adapted_cells(network: nn.Cell) -> dict[str, nn.Cell]:
    """The outermost cells that belong to a method."""
    found: dict[str, nn.Cell] = {}
    for path, cell in cells_by_path(network).items():
        if hasattr(cell, "delta_method") and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = cell
    return found


def _parts(cell: nn.Cell) -> list[tuple[Parameter, Tensor]]:
    """The parameters of the base that a delta is added to, and what is added: to the weight, and maybe to the bias."""
    if not hasattr(cell, "delta_weight"):
        return []
    bias = cell.delta_bias() if hasattr(cell, "delta_bias") else None
    return [(cell.base_weight, cell.delta_weight()), *([] if bias is None else [(cell.bias, bias)])]
