"""Checkpoints of distributed runs: the pre-trained slices and the tuned ones into one network, or cut anew.

Appendix A of the user document does the first with two calls of ``mindspore.load_distributed_checkpoint``, which says
nothing of a parameter that it has not set.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, save_checkpoint

from mindpet import _checks
from mindpet.graph.deltas import DeltaFileError
from mindpet.graph.inject import MARKER, require_in_place
from mindpet.parallel.slices import Layout, RankFiles, read, read_strategy
from mindpet.utils.exceptions import AbsolutePathError, LinkPathError

PathLike = str | Path
_TOO_LARGE = 65520.0  # the least number that float16 rounds to infinity


@dataclass(frozen=True)
class DistributedLoad:
    """What became of each parameter.

    Attributes:
        base: set from the base checkpoints.
        delta: set from the delta checkpoints; they come after the base and win.
        untouched: parameters of the network that neither has. There are none where a base was given.
        ignored: what the files hold and was not used: the optimizer's state, counters, and in a checkpoint of the whole
            tuned network the frozen weights, of which the strategy file of a tuned network says nothing.
    """

    base: tuple[str, ...]
    delta: tuple[str, ...]
    untouched: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        counts = f"{len(self.base)} parameters from the base, {len(self.delta)} from the delta"
        return f"{counts}, {len(self.untouched)} left as they were, {len(self.ignored)} in the files not used"


def load_distributed_delta(
    network: nn.Cell,
    *,
    delta: PathLike | Sequence[PathLike],
    delta_strategy: PathLike | None = None,
    base: PathLike | Sequence[PathLike] | None = None,
    base_strategy: PathLike | None = None,
) -> DistributedLoad:
    """Put what a distributed run has written into a whole network on one device: the base, and the delta on top.

    Everything is checked first: every rank has its file; files belong together (the same parameters; ranks that hold
    the same slice agree to the last bit); each parameter is there, of the right shape, and finite. Then numbers are
    set, in the dtypes of the network. Putting slices together is MindSpore's ``transform_checkpoint_by_rank``, which
    needs room for what it puts together in the directory for temporary files.

    Args:
        network: with the layers of the tuned network. Which of them train does not matter.
        delta: ``.ckpt`` or ``.safetensors`` files of :class:`TrainableParamsCheckPoint`, or of ``ModelCheckpoint`` in a
            tuning run. A list in order of rank, or a directory or pattern with one file a rank, which says the rank: in
            a directory ``rank_3``, in a name with ``rank_3`` or ``rank3``, or as the only number of the name.
        delta_strategy: strategy file of the tuning run; None for one whole checkpoint.
        base: the same of the pre-trained network; None where `network` holds it already.
        base_strategy: strategy file of pre-training; None for one whole checkpoint.

    Returns:
        Which parameters were set, from what.

    Raises:
        TypeError: `network` is not a Cell, a path is neither a str nor a Path.
        ValueError: the deltas of `network` are merged; `base_strategy` without `base`.
        DeltaFileError: files are missing, broken, or do not fit. All problems are in one message, and the network is
            unchanged.

    >>> import tempfile, mindspore
    >>> from mindpet.delta import LoRADense
    >>> trained, fresh = (nn.SequentialCell(LoRADense(8, 4, lora_rank=2, lora_alpha=4)) for _ in "ab")
    >>> file = tempfile.mkdtemp() + "/whole.ckpt"
    >>> mindspore.save_checkpoint(trained, file)
    >>> print(load_distributed_delta(fresh, delta=file))  # one whole checkpoint has no strategy file
    0 parameters from the base, 4 from the delta, 0 left as they were, 0 in the files not used
    """
    owner = "load_distributed_delta"
    require_in_place(owner, network)
    if base is None and base_strategy is not None:
        raise ValueError(f"For '{owner}', 'base_strategy' is given, but no 'base' that it belongs to.")
    parameters = {parameter.name: parameter for parameter in network.get_parameters()}
    parts = [] if base is None else [RankFiles.of(owner, "base", base, base_strategy)]
    parts.append(RankFiles.of(owner, "delta", delta, delta_strategy))
    problems = [problem for part in parts for problem in part.problems]
    problems += [problem for part in parts for problem in _misfits(parameters, part)]
    if all(part.shapes for part in parts):
        problems += _missing(parameters, parts)
    _require(owner, problems)
    chosen = {name: part for part in parts for name in part.shapes if name in parameters}  # the delta wins
    with tempfile.TemporaryDirectory() as scratch:
        values: dict[str, Any] = {}
        for part in parts:
            whole = part.whole(Path(scratch))
            values |= {name: value for name, value in whole.items() if chosen.get(name) is part}
    for name, value in values.items():
        parameters[name].set_data(Tensor(value.astype(parameters[name].dtype)))
    found = {name for part in parts for name in (*part.shapes, *part.ignored)}
    return DistributedLoad(
        base=tuple(name for name in parameters if name in chosen and chosen[name].role == "base"),
        delta=tuple(name for name in parameters if name in chosen and chosen[name].role == "delta"),
        untouched=tuple(name for name in parameters if name not in chosen),
        ignored=tuple(sorted(found - set(chosen))),
    )


def transform_delta_checkpoints(
    delta: PathLike | Sequence[PathLike],
    directory: PathLike,
    *,
    strategy: PathLike | None = None,
    target_strategy: PathLike | None = None,
    prefix: str = "delta",
    format: str = "ckpt",
) -> list[Path]:
    """Cut the checkpoints of a distributed run for another number of devices, or put them together, or cut a whole one.

    Values stay the same, bit for bit, in every dtype. The directory appears when all of it is written, or not at all.

    Args:
        delta: as for :func:`load_distributed_delta`.
        directory: absolute path of a directory that is not there yet, or empty.
        strategy: strategy file of `delta`; None where that is one whole checkpoint.
        target_strategy: strategy file of the devices to cut for; None for one whole checkpoint.
        prefix: how the names of the files begin.
        format: ``ckpt`` or ``safetensors``.

    Returns:
        ``rank_N/<prefix>N.<format>`` in `directory`, in order of rank. What `strategy` says nothing of is left
        out, and so is the state of an optimizer where the target has none.

    Raises:
        TypeError: a path is neither a str nor a Path, `prefix` is not a str.
        ValueError: another format; `directory` is empty, or holds something; `prefix` has a ``/``.
        LinkPathError: `directory` is a symbolic link.
        AbsolutePathError: `directory` is not absolute.
        DeltaFileError: files are missing, broken, or do not fit. All problems are in one message.
    """
    owner = "transform_delta_checkpoints"
    place = _new_directory(owner, directory)
    if format not in ("ckpt", "safetensors"):
        raise ValueError(f"For '{owner}', 'format' must be ckpt or safetensors, but got {_checks.shown(format)}.")
    if "/" in _checks.string(owner, "prefix", prefix):
        raise ValueError(f"For '{owner}', 'prefix' must be a str without '/', but got {_checks.shown(prefix)}.")
    source = RankFiles.of(owner, "delta", delta, strategy)
    problems, target, devices = list(source.problems), None, 1
    if target_strategy is not None:
        try:
            target, devices = read_strategy(str(target_strategy))
            problems += _uncuttable(source.shapes, target)
        except ValueError as error:
            problems.append(f"target: {error}")
    _require(owner, problems)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as scratch:
        finished = Path(scratch) / "finished"
        names = []
        for rank in range(devices):
            names.append(Path(f"rank_{rank}") / f"{prefix}{rank}.{format}")
            (finished / names[-1]).parent.mkdir(parents=True)
            _write(source, rank, target, target_strategy, finished / names[-1], Path(scratch))
        os.replace(finished, place)
    return [place / name for name in names]


def _write(source: RankFiles, rank: int, target: Any, target_strategy: Any, path: Path, scratch: Path) -> None:
    """The file of a rank, through MindSpore as ``.ckpt``: see :meth:`RankFiles._staged`."""
    if source.strategy is None and target is None:
        values = read(source.files[0])
    else:
        between = scratch / f"{rank}.ckpt"
        source.transform(rank, None if target_strategy is None else str(target_strategy), between, scratch)
        values = read(between)
        between.unlink()
    names = [name for name in source.shapes if name in values and (target is None or name in target)]  # of its stage
    save_checkpoint([{"name": name, "data": values[name]} for name in names], str(path), format=path.suffix[1:])
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _misfits(parameters: dict[str, Any], part: RankFiles) -> list[str]:
    """What keeps the files out of the network: names, shapes and numbers."""
    problems = []
    for name, shape in part.shapes.items():
        if name not in parameters:
            # A base may have more: a head that was pre-trained and that the tuned network does not have.
            if part.role == "delta" and not _is_state(name, part.shapes):
                problems.append(f"not in this network: {name}{_checks.near(name, parameters)}")
            continue
        dtype, there = parameters[name].dtype, tuple(parameters[name].shape)
        if there != shape:
            problems.append(f"{name}: the files have shape {shape}, the network {there}")
        if part.largest.get(name, 0.0) >= (_TOO_LARGE if dtype == ms.float16 else float("inf")):
            problems.append(f"{name}: it holds NaN or infinity, or numbers too large for the network's {dtype}")
    return [f"{part.role}: {problem}" for problem in problems]


def _missing(parameters: dict[str, Any], parts: list[RankFiles]) -> list[str]:
    """What no file has of that which must be set: what the delta trains, and with a base everything."""
    tuned = parts[-1]
    states = {name.partition(".")[2] for name in tuned.layouts or ()}  # what the optimizer of the tuning run had
    problems = []
    for name in parameters:
        trained = MARKER in name or (name in states and name in (tuned.layouts or ()))
        if name in tuned.shapes or (not trained and (len(parts) == 1 or name in parts[0].shapes)):
            continue
        holder = next((part.role for part in parts if name in part.ignored), None)
        why = f"the {holder} files have it, but their strategy file says nothing of it" if holder else "no file has it"
        problems.append(f"{name}: {'no delta file has it' if trained and not holder else why}")
    return problems


def _uncuttable(shapes: dict[str, tuple[int, ...]], target: dict[str, Layout]) -> list[str]:
    problems = []
    for name, shape in shapes.items():
        layout = target.get(name)
        if layout is None:
            if not _is_state(name, shapes):
                problems.append(f"target: the strategy file says nothing of {name}{_checks.near(name, target)}")
        elif len(layout.cuts) != len(shape) or any(length % cut for length, cut in zip(shape, layout.cuts)):
            problems.append(f"target: {name}: shape {shape} cannot be cut into {tuple(layout.cuts)} parts")
    return problems


def _is_state(name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether it is an optimizer's: named after a parameter beside it, ``moment1.head.weight``, or ``global_step``."""
    return name.partition(".")[2] in shapes or ("." not in name and shapes[name] in ((), (1,)))


def _require(owner: str, problems: list[str]) -> None:
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise DeltaFileError(f"For '{owner}', the files do not fit:\n  " + "\n  ".join(shown))


def _new_directory(owner: str, directory: Any) -> Path:
    """The rules for the directory of a TrainableParamsCheckPoint, and that nothing is in it."""
    if directory == "" or directory is None:
        raise ValueError(f"For '{owner}', 'directory' must be an absolute path, but got {_checks.shown(directory)}.")
    if not isinstance(directory, (str, Path)):
        raise TypeError(f"For '{owner}', 'directory' must be a str or a Path, but got {_checks.shown(directory)}.")
    path = Path(os.path.normpath(directory))
    if path.is_symlink():
        raise LinkPathError(f"For '{owner}', 'directory' must not be a symbolic link, but {directory} is one.")
    if not path.is_absolute():
        raise AbsolutePathError(f"For '{owner}', 'directory' must be absolute, but got {str(directory)!r}.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"For '{owner}', 'directory' must be new or empty, but {path} is not.")
    return path
