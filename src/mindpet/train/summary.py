"""What a method would train in a network of given sizes, and what memory that takes: arithmetic, no weights.

It counts what :func:`mindpet.inject` would build; the tests compare the two. Nothing here imports MindSpore, so an
answer takes no longer than the import of Python's own modules.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mindpet._near import near
from mindpet._paths import forms_below, in_layers
from mindpet.train.counters import COUNTERS, Counter, method_key
from mindpet.train.presets import DTYPES, CellSizes, NetworkSizes, network_sizes, preset

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1}  # kept for each trained number, in float32; sgd has momentum


@dataclass(frozen=True)
class Summary:
    """What would train, and the memory that does not depend on the batch.

    Attributes:
        network: its name, or its ``model_type``.
        method: its name.
        adapted: paths of the cells that the method adapts.
        base: parameters of the network without its head.
        head: parameters of the head.
        added: parameters that the method adds.
        trained: parameters that train: added ones that are not frozen, the head, and those of the base that do.
        dtype: of all weights that are not quantised.
        optimizer: ``adam``, ``adamw`` or ``sgd`` with momentum.
        saved: bytes that quantisation saves.
    """

    network: str
    method: str
    adapted: tuple[str, ...]
    base: int
    head: int
    added: int
    trained: int
    dtype: str
    optimizer: str
    saved: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return self.base + self.head + self.added

    @property
    def delta(self) -> int:
        """What the method trains, without the head."""
        return self.trained - self.head

    @property
    def share(self) -> float:
        """(delta + head) / all parameters, as in the user document's tables."""
        return self.trained / self.total

    @property
    def share_of_base(self) -> float:
        """Of the delta in the base network: how the user document counts the adapter's."""
        return self.delta / self.base

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return self.total * ITEM_SIZES[self.dtype] - self.saved

    @property
    def gradient_bytes(self) -> int:
        """Gradients of what trains, in the dtype of the weights."""
        return self.trained * ITEM_SIZES[self.dtype]

    @property
    def optimizer_bytes(self) -> int:
        """Moments of what trains, in float32."""
        return self.trained * MOMENTS[self.optimizer] * 4

    @property
    def static_bytes(self) -> int:
        """Weights and optimizer state: the user document's static memory."""
        return self.weight_bytes + self.optimizer_bytes

    @property
    def full_static_bytes(self) -> int:
        """The same, were everything trained."""
        return (self.base + self.head) * (ITEM_SIZES[self.dtype] + MOMENTS[self.optimizer] * 4)


def summarise(
    network: str | Mapping[str, Any],
    method: str = "lora",
    options: Mapping[str, Any] | None = None,
    *,
    optimizer: str = "adam",
    dtype: str | None = None,
    labels: int = 2,
) -> Summary:
    """Count what a method would train in a network that is not there.

    Args:
        network: a name of `mindpet.train.presets.PRESETS`, or the content of a ``config.json``.
        method: as in a run file, ``full`` among them.
        options: the method's own, as in a run file: ``{"rank": 4, "targets": ["*.query"]}``.
        optimizer: ``adam``, ``adamw``, or ``sgd`` with momentum.
        dtype: of the weights; the network's usual one when None, which is float32 but for ``glm2-6b``.
        labels: classes of the head of a BERT; 0 for none.

    Raises:
        ValueError: an unknown network, method, option, optimizer or dtype; a wrong value; a target that matches
            nothing.

    >>> summary = summarise("bert-base-chinese", "lora", {"rank": 8}, labels=15)
    >>> summary.delta, round(100 * summary.share, 2)
    (294912, 0.3)
    """
    content = preset(network) if isinstance(network, str) else network
    sizes = network_sizes(content, labels)
    name = network if isinstance(network, str) else str(content["model_type"])
    dtype = dtype or DTYPES.get(name, "float32")
    _one_of("dtype", dtype, ITEM_SIZES)
    _one_of("optimizer", optimizer, MOMENTS)
    method = method_key(method)
    _one_of("method", method, [*COUNTERS, "full"])
    given = _checked(method, options or {})
    parameters = {path: size for cell in sizes.cells for path, size in cell.parameters().items()}
    head = sum(size for path, size in parameters.items() if path.startswith(tuple(f"{one}." for one in sizes.heads)))
    adapted: tuple[str, ...] = ()
    saved = 0
    if method == "full":
        added, frozen, trained = 0, 0, set(parameters)
    else:
        counter = COUNTERS[method]
        selected = selected_parameters(sizes, counter, given)
        if not counter.adapts and not selected:
            raise ValueError(f"{name} has no bias, or whatever else '{method}' trains.")
        whole = _saved_whole(sizes, given)
        cells = _targeted(sizes, counter, given, whole)
        adapted = tuple(cell.path for cell in cells)
        beside = {f"{path}.{name}" for path in adapted for name in counter.beside(given)}
        trained = whole | selected | (beside & set(parameters))
        at = [(cell, {**given, "rank": _rank_at(cell.path, given)}) for cell in cells]
        added = sum(counter.added(*each) for each in at)
        frozen = sum(counter.frozen(*each) for each in at)
        shared = counter.shared(cells, given)
        if counter.kept is not None:
            whole_bytes = sum(math.prod(cell.shapes["weight"]) for cell in cells) * ITEM_SIZES[dtype]
            saved = whole_bytes - sum(counter.kept(cell, given) for cell in cells)
        added, frozen = added + shared, frozen + (0 if counter.shared_trains else shared)
    count = added - frozen + sum(parameters[path] for path in trained)
    base = sum(parameters.values()) - head
    return Summary(name, method, adapted, base, head, added, count, dtype, optimizer, saved)


_SHARED: dict[str, Any] = {"targets": None, "exclude": (), "layers": None, "modules_to_save": ()}


def _checked(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options that counting reads, defaults filled in."""
    counter = COUNTERS.get(method, Counter({}))
    known = {**counter.options, **(_SHARED if method != "full" else {})}
    wrong = [
        f"'{method}' has no option '{name}'{near(name, [*known, *counter.others])}"
        for name in options
        if name not in known and name not in counter.others
    ]
    for name, default in counter.options.items():
        value = options.get(name, default)
        if isinstance(default, tuple) and isinstance(value, list):
            continue
        if default is not None and type(value) is not type(default):
            wrong.append(f"'{name}' must be of the kind of {default!r}, but is {value!r}")
        elif type(default) is int and value <= 0 < default:
            wrong.append(f"'{name}' must be a positive int, but is {value!r}")
    ranks = options.get("rank_pattern", {})
    for pattern, rank in ranks.items() if isinstance(ranks, dict) else ():
        if type(rank) is not int or rank <= 0:
            wrong.append(f"the rank of '{pattern}' must be a positive int, but is {rank!r}")
    for name, kind in (("targets", str), ("exclude", str), ("modules_to_save", str), ("layers", int)):
        value = options.get(name) or ()
        entries = [value] if isinstance(value, (str, int)) else value
        if not isinstance(entries, (list, tuple)) or any(type(entry) is not kind for entry in entries):
            what = "numbers" if kind is int else "patterns"
            wrong.append(f"'{name}' must be {what}, but is {value!r}")
    if isinstance(options.get("targets"), (list, tuple)) and not options["targets"]:
        wrong.append("'targets' must name a cell at least; leave it out for the method's usual ones")
    if wrong:
        raise ValueError("; ".join(wrong) + ".")
    given = {**known, **options}
    for name in _SHARED:
        if isinstance(given.get(name), (str, int)) and given[name] != "all-linear":
            given[name] = (given[name],)
    return given


def _targeted(sizes: NetworkSizes, counter: Counter, given: dict[str, Any], whole: set[str]) -> list[CellSizes]:
    """The cells that would be adapted.

    Raises:
        ValueError: patterns that match nothing.
    """
    if not counter.adapts:
        return []
    candidates = [cell for cell in sizes.cells if cell.kind in counter.adapts]
    everything = given["targets"] == "all-linear"
    patterns = ("all-linear",) if everything else tuple(given["targets"] or counter.targets[sizes.family])
    hits = {
        pattern: [cell.path for cell in candidates if _means(pattern, cell)]
        for pattern in (*patterns, *given["exclude"])
    }
    chosen = {path for pattern in patterns for path in hits[pattern]}
    left = {path for pattern in given["exclude"] for path in hits[pattern]}
    cells = [
        cell
        for cell in candidates
        if cell.path in chosen - left
        and in_layers(cell.path, given["layers"])
        and not (everything and whole & set(cell.parameters()))
    ]
    paths = [cell.path for cell in cells]
    misses = [pattern for pattern, found in hits.items() if not found]
    misses += [one for one in given.get("rank_pattern", ()) if not any(fnmatchcase(path, one) for path in paths)]
    if misses or not cells:
        ends = {path.rpartition(".")[2] for path in (cell.path for cell in candidates)}
        listed = "; ".join(f"{one!r}{near(one.strip('*').rpartition('.')[2], ends)}" for one in misses or patterns)
        raise ValueError(f"These patterns match no cell that the method can adapt: {listed}.")
    top = given.get("top_layers")
    if top is not None and (type(top) is not int or not 0 < top <= len(cells)):
        raise ValueError(f"'top_layers' must be from 1 to {len(cells)}, but is {top!r}.")
    return cells[-top:] if top else cells


def selected_parameters(sizes: NetworkSizes, counter: Counter, given: dict[str, Any]) -> set[str]:
    """Paths of the network's own parameters that a method selects, where its options limit it to some cells: there."""
    targets = () if counter.adapts else given["targets"] or ()
    patterns = ("all-linear",) if targets == "all-linear" else targets
    return {
        path
        for cell in sizes.cells
        if not patterns or any(_means(pattern, cell) for pattern in patterns)
        if counter.adapts
        or (in_layers(cell.path, given["layers"]) and not any(_means(one, cell) for one in given["exclude"]))
        for path in cell.parameters()
        if counter.trains(path, given)
    }


def _means(pattern: str, cell: CellSizes) -> bool:
    return cell.kind == "dense" if pattern == "all-linear" else fnmatchcase(cell.path, pattern)


def _rank_at(path: str, given: dict[str, Any]) -> int:
    patterns = given.get("rank_pattern", {})
    return next((rank for pattern, rank in patterns.items() if fnmatchcase(path, pattern)), given.get("rank", 0))


def _saved_whole(sizes: NetworkSizes, given: dict[str, Any]) -> set[str]:
    """Paths of the parameters of the head, and of what ``modules_to_save`` names."""
    parameters = [path for cell in sizes.cells for path in cell.parameters()]
    found: set[str] = set()
    for pattern in dict.fromkeys((*given["modules_to_save"], *sizes.heads)):
        below = {path for path in parameters if any(fnmatchcase(path, form) for form in forms_below(pattern))}
        if not below:
            parts = {part for path in parameters for part in path.split(".")}
            raise ValueError(f"No parameter lies below {pattern!r}{near(pattern, parts)}.")
        found |= below
    return found


def _one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"'{name}' must be one of {', '.join(known)}, but is {value!r}{near(value, known)}.")
