"""Which cells of a network a list of patterns means: a pure function that reports, and changes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mindspore import nn

from mindpet import _checks, _compat
from mindpet._paths import in_layers, layer_of


@dataclass(frozen=True)
class TargetReport:
    """What patterns matched.

    Attributes:
        matched: path to Cell, in the order of the network.
        misses: each pattern that matched nothing, with what it may have meant, or why not.
    """

    matched: dict[str, nn.Cell]
    misses: dict[str, str]

    def require_all(self) -> "TargetReport":
        """This report, if every pattern matched.

        Raises:
            NothingFitsError: a ValueError: a pattern matched nothing; the message shows near names for each.
        """
        if self.misses:
            lines = [f"  {pattern!r}" + (f"; {hint}" if hint else "") for pattern, hint in self.misses.items()]
            listed = "\n".join(lines)
            raise _checks.NothingFitsError(f"These targets match no cell that the method can adapt:\n{listed}")
        return self


def cells_by_path(network: nn.Cell) -> dict[str, nn.Cell]:
    """Every Cell below `network` by its path, a shared Cell under each of its paths."""
    found: dict[str, nn.Cell] = {}

    def walk(cell: nn.Cell, prefix: str) -> None:
        for name, child in _compat.children(cell).items():
            path = f"{prefix}{name}"
            found[path] = child
            walk(child, path + ".")

    walk(network, "")
    return found


def find_targets(
    network: nn.Cell,
    patterns: Sequence[str | type] | str,
    kinds: tuple[type[nn.Cell], ...] = (nn.Cell,),
    exclude: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    linear: tuple[type[nn.Cell], ...] = (nn.Dense,),
    need_all: bool = True,
) -> TargetReport:
    """The cells of those kinds that a pattern means.

    Args:
        network: any Cell.
        patterns: ``fnmatch`` patterns on whole paths, types of Cells, or ``"all-linear"``.
        kinds: types that can be adapted at all. What a method has put in is never matched.
        exclude: patterns of paths to leave alone.
        layers: numbers of layers: the first number in a path must be among them.
        linear: the types that ``"all-linear"`` means.
        need_all: whether every pattern must match something, or one of them.

    >>> network = nn.SequentialCell(nn.Dense(2, 2), nn.ReLU())
    >>> list(find_targets(network, ["*"], (nn.Dense,)).matched)
    ['0']
    """
    everything = {path: cell for path, cell in cells_by_path(network).items() if "mindpet_delta_" not in path}
    candidates = {path: cell for path, cell in everything.items() if isinstance(cell, kinds)}
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    hits = {}
    for pattern in wanted:
        meant = linear if pattern == "all-linear" else pattern
        hits[pattern] = [path for path, cell in candidates.items() if _means(meant, path, cell)]
    chosen = {path for paths in hits.values() for path in paths}
    matched = {
        path: cell
        for path, cell in candidates.items()
        if path in chosen and not any(fnmatchcase(path, pattern) for pattern in exclude) and in_layers(path, layers)
    }
    misses = {
        str(pattern): _others(pattern, everything, kinds) or near_hint(str(pattern), candidates)
        for pattern, paths in hits.items()
        if not paths
    }
    if not need_all and any(hits.values()):
        misses = {}
    if not matched and not misses:
        misses = {str(pattern): _left_out(paths, layers) for pattern, paths in hits.items() if paths}
    return TargetReport(matched, misses)


def _means(pattern: str | type | tuple, path: str, cell: nn.Cell) -> bool:
    return fnmatchcase(path, pattern) if isinstance(pattern, str) else isinstance(cell, pattern)


def _others(pattern: str | type, everything: dict[str, nn.Cell], kinds: tuple[type[nn.Cell], ...]) -> str:
    """What cells a pattern means that are of a kind that cannot be adapted."""
    if pattern == "all-linear":
        return ""
    able = ", ".join(kind.__name__ for kind in kinds)
    found = [f"{path} ({type(cell).__name__})" for path, cell in everything.items() if _means(pattern, path, cell)]
    more = f" and {len(found) - 1} more" if found[1:] else ""
    return f"it matches {found[0]}{more}, and the method adapts {able}" if found else ""


def _left_out(paths: list[str], layers: Sequence[int] | None) -> str:
    """Why nothing is left of what a pattern matched."""
    if layers is None or any(in_layers(path, layers) for path in paths):
        return "all of them are excluded or in other layers"
    numbers = sorted({number for number in map(layer_of, paths) if number is not None})
    if not numbers:
        return f"it matches {paths[0]}, which is in no layer"
    there = f"layers {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"layer {numbers[0]}"
    return f"it matches cells in {there}, none in {', '.join(map(str, layers))}"


def near_hint(pattern: str, paths: Sequence[str] | dict) -> str:
    """What a pattern may have meant: the end of paths, or up to three paths with last names like its own."""
    ends = [path for path in paths if fnmatchcase(path, f"*.{pattern}")]
    if ends:
        more = f" and {len(ends) - 1} more" if ends[1:] else ""
        return f"a pattern is for whole paths: '*.{pattern}' matches {ends[0]}{more}"
    if _checks.near_names(pattern, ["all-linear"]):
        return "did you mean 'all-linear'?"
    tail = pattern.replace("*", "").strip(".").split(".")[-1]
    tails: dict[str, str] = {}
    for path in paths:
        tails.setdefault(path.split(".")[-1], path)
    found = [tails[name] for name in _checks.near_names(tail, tails)]
    return f"near it: {', '.join(found)}" if found else ""
