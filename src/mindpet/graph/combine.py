"""One delta made of several, as files: no network is needed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindpet import _checks
from mindpet.delta.lora import LoRAConfig
from mindpet.delta.qlora import QLoRAConfig
from mindpet.delta.registry import method_of
from mindpet.graph.deltas import DeltaFileError, read_delta, write_delta

_A, _B = ".mindpet_delta_lora_a", ".mindpet_delta_lora_b"
_A0, _B0 = ".mindpet_delta_start_lora_a", ".mindpet_delta_start_lora_b"
METHODS = ("linear", "concatenation", "svd", "ties", "dare")


def combine(
    sources: Sequence[str | Path],
    target: str | Path,
    method: str = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> None:
    r"""Write a LoRA delta that does what several do together.

    With :math:`\Delta_i = s_i B_i A_i`, s the scale ``alpha / rank``, and w the weights, the new delta is

    - ``concatenation``: exactly :math:`\sum_i w_i \Delta_i`; its rank is the sum of the ranks;
    - ``svd``: the matrix of rank `rank` that is nearest to that sum;
    - ``linear``: :math:`(\sum_i \sqrt{w_i s_i} B_i)(\sum_i \sqrt{w_i s_i} A_i)`, for equal ranks: cheap, not the sum;
    - ``ties``: of each Δ the share `density` with the largest entries; for each entry the sign that weighs more, and
      the sum of the Δs that agree with it, times all weights over theirs (Yadav et al. 2023, arXiv:2306.01708,
      section 3); then the nearest matrix of rank `rank`;
    - ``dare``: of each Δ a random share `density`, divided by it (Yu et al. 2023, arXiv:2311.03099, section 3.1); their
      weighted sum; then the nearest matrix of rank `rank`.

    What the deltas saved whole, heads for instance, becomes the weighted mean.

    Args:
        sources: directories that ``save_delta`` wrote, of LoRA on the same dense layers of the same base.
        target: directory to write.
        method: one of the above.
        weights: one for each source; equal shares of 1 when None.
        rank: of the new delta, for ``svd``, ``ties`` and ``dare``; the largest of the sources' when None.
        density: share of the entries to keep, for ``ties`` and ``dare``.
        seed: of ``dare``.

    Raises:
        DeltaFileError: a source is broken, is not of LoRA alone, adapts other layers than the first, or belongs to
            weights that were quantised otherwise.
        ValueError: an unknown method, weights that do not go with the sources, a negative weight for ``linear``, ranks
            that differ for ``linear``, a density outside (0, 1].
    """
    if method not in METHODS:
        raise ValueError(
            f"'method' must be one of {', '.join(METHODS)}, but got {method!r}{_checks.near(method, METHODS)}."
        )
    if not sources:
        raise ValueError("There must be at least one source.")
    shares = [1.0 / len(sources)] * len(sources) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(sources):
        raise ValueError(f"There are {len(sources)} sources and {len(shares)} weights.")
    if method == "linear" and min(shares) < 0:
        raise ValueError("'linear' takes the square root of the weights, so none may be negative.")
    if not np.isfinite(shares).all() or abs(sum(shares)) < 1e-12:
        raise ValueError(f"The weights must be finite and not sum to 0, but are {shares}.")
    if rank is not None:
        _checks.positive_int("combine", "rank", rank)
    if not 0 < density <= 1:
        raise ValueError(f"'density' must be in (0, 1], but got {density}.")
    read = [_lora(source) for source in sources]
    description, first, tensors = read[0]
    for source, (about, config, others) in zip(sources[1:], read[1:]):
        _require_same_weights(first, config, f"{source} does not go with {sources[0]}")
        if any(about.get(key) != description.get(key) for key in ("base", "base_hash")):
            raise DeltaFileError(f"{source} is of another base network than {sources[0]}.")
        if others.keys() != tensors.keys():
            raise DeltaFileError(f"{source} adapts other layers than {sources[0]}.")
    generator = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for name in tensors:
        if name.endswith(_B):
            continue
        if not name.endswith(_A):
            made[name] = _mean([each[name] for _, _, each in read], shares, name)
            continue
        path = name.removesuffix(_A)
        triples = [(_scale(config, path), each[path + _A], each[path + _B]) for _, config, each in read]
        a, b = _join(triples, shares, method, rank, density, generator, path)
        made[path + _A], made[path + _B], ranks[path] = a.astype(np.float32), b.astype(np.float32), len(a)
    widest = max(ranks.values())
    pattern = {path: size for path, size in ranks.items() if size != widest}
    config = dataclasses.replace(  # the scale is in the numbers already, and a start too
        first,
        rank=widest,
        alpha=widest,
        rank_stabilised=False,
        start="kaiming",
        rank_pattern=pattern,
        alpha_pattern=pattern,
    )
    _require_same_weights(config, first, "The new delta would be of another rank")
    about = {**description, "parameters": sorted(made)}
    write_delta(target, {**about, "methods": [{"method": method_of(config).name, **dataclasses.asdict(config)}]}, made)


def _lora(source: str | Path) -> tuple[dict[str, Any], LoRAConfig, dict[str, np.ndarray]]:
    description, configs, tensors = read_delta(source)
    if len(configs) != 1 or not isinstance(configs[0], LoRAConfig):
        raise DeltaFileError(f"{source} is not a delta of LoRA alone.")
    if not any(name.endswith(_A) for name in tensors):
        raise DeltaFileError(f"{source} is of {method_of(configs[0]).name}: only LoRA is combined.")
    if any(name.endswith(_A) and tensors[name].ndim != 2 for name in tensors):
        raise DeltaFileError(f"{source} adapts convolutions, which are not combined.")
    for name in [name for name in tensors if name.endswith(_A0)]:  # it moved away from A0 and B0: a plain one of 2 r
        path = name.removesuffix(_A0)
        tensors[path + _A] = np.concatenate([tensors[path + _A], tensors.pop(name)])
        tensors[path + _B] = np.concatenate([tensors[path + _B], tensors.pop(path + _B0)], axis=1)
    return description, configs[0], tensors


def _require_same_weights(here: LoRAConfig, there: LoRAConfig, otherwise: str) -> None:
    """Deltas of quantised weights belong to those."""
    if not (isinstance(here, QLoRAConfig) and isinstance(there, QLoRAConfig)):
        if isinstance(here, QLoRAConfig) or isinstance(there, QLoRAConfig):
            raise DeltaFileError(f"{otherwise}: only one of them is of quantised weights.")
        return
    try:
        method_of(here).fit(here, there, {})
    except ValueError as error:
        raise DeltaFileError(f"{otherwise}: {error}.") from error


def _scale(config: LoRAConfig, path: str) -> float:
    here = config.at(path)
    return here.scaled_alpha / here.rank


def _mean(values: list[np.ndarray], shares: list[float], name: str) -> np.ndarray:
    if len({value.shape for value in values}) > 1:
        raise DeltaFileError(f"{name} has another shape in each source.")
    total = np.tensordot(shares, np.stack(values).astype(np.float64), 1)
    return (total / sum(shares)).astype(values[0].dtype)


def _join(
    triples: list[tuple[float, np.ndarray, np.ndarray]],
    shares: list[float],
    method: str,
    rank: int | None,
    density: float,
    generator: np.random.Generator,
    path: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) with scale 1 for one layer, from (scale, A, B) of each source."""
    if method == "concatenation":
        a = np.concatenate([each for _, each, _ in triples])
        return a, np.concatenate([share * scale * b for share, (scale, _, b) in zip(shares, triples)], axis=1)
    if method == "linear":
        if len({a.shape for _, a, _ in triples}) > 1:
            raise ValueError(f"{path} has another rank in each source: 'linear' needs equal ones, 'svd' does not.")
        roots = [np.sqrt(share * abs(scale)) for share, (scale, _, _) in zip(shares, triples)]
        signs = [np.sign(scale) for scale, _, _ in triples]
        a = np.tensordot(roots, np.stack([each for _, each, _ in triples]), 1)
        return a, np.tensordot(np.multiply(roots, signs), np.stack([b for _, _, b in triples]), 1)
    deltas = [scale * (b.astype(np.float64) @ a.astype(np.float64)) for scale, a, b in triples]
    if method == "ties":
        total = _ties(deltas, shares, density)
    else:
        if method == "dare":
            deltas = [delta * (generator.random(delta.shape) < density) / density for delta in deltas]
        total = np.tensordot(shares, np.stack(deltas), 1)
    return _nearest(total, min(rank or max(len(a) for _, a, _ in triples), *total.shape))


def _ties(deltas: list[np.ndarray], shares: list[float], density: float) -> np.ndarray:
    """Trim, elect a sign for each entry, and add up what agrees with it."""
    trimmed = []
    for delta in deltas:
        kept = max(1, round(density * delta.size))
        threshold = np.partition(np.abs(delta), delta.size - kept, axis=None)[delta.size - kept]
        trimmed.append(np.where(np.abs(delta) >= threshold, delta, 0.0))
    weighted = np.stack([share * delta for share, delta in zip(shares, trimmed)])
    sign = np.sign(weighted.sum(0))
    agrees = np.sign(weighted) == sign
    amount = np.abs(np.array(shares))[:, None, None]
    mine = (agrees * amount).sum(0)
    return np.where(mine > 0, (weighted * agrees).sum(0) / np.maximum(mine, 1e-12) * amount.sum(), 0.0)


def _nearest(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) of that rank with B A nearest to `matrix` (Eckart and Young 1936), the singular values shared out."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values[:rank])
    return root[:, None] * right[:rank], left[:, :rank] * root
