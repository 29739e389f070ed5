"""Files with one slice of each parameter a rank: which file is whose, how slices lie, and whether they belong together.

A strategy file says of each parameter over which devices (``device matrix``) which of its axes are cut (``tensor map``:
counted from the last axis of the matrix, -1 for an axis that is whole), and whether the optimizer has cut its first
axis further. MindSpore writes it with ``strategy_ckpt_config``, by default for trainable parameters alone.
"""

import hashlib
import math
import re
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, save_checkpoint
from mindspore.parallel import build_searched_strategy, rank_list_for_transform, transform_checkpoint_by_rank

from mindpet import _checks, _compat

SUFFIXES = (".ckpt", ".safetensors")
_COUNTERS = ("epoch_num", "step_num")  # what CheckpointConfig(append_info=...) adds
_OTHER_MOMENT = "these files are not of one moment of one run"
_MANY = 1 << 24  # more devices than there are anywhere
_STAGED_NAME = re.compile(r"(?s)(?:(\d+)-)?(.*)")  # merge_pipeline_strategys writes the stage before the name


@dataclass(frozen=True)
class Layout:
    """How a parameter lies on the devices of its pipeline stage.

    Attributes:
        devices: the device matrix.
        axes: for each axis of the parameter the axes of the matrix that cut it.
        step: ranks from one part of the optimizer's cut to the next.
        parts: into how many parts the optimizer cuts the first axis further; 0 or 1 where it does not.
    """

    devices: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    step: int = 0
    parts: int = 0

    @property
    def ranks(self) -> int:
        """How many devices a pipeline stage has."""
        return int(np.prod(self.devices))

    @property
    def cuts(self) -> list[int]:
        """Into how many parts each axis is cut."""
        cuts = [int(np.prod([self.devices[axis] for axis in axes], dtype=int)) for axes in self.axes]
        return [cuts[0] * max(self.parts, 1), *cuts[1:]] if cuts else []

    def slice_of(self, rank: int) -> tuple[int, ...]:
        """Which slice a rank has: the same for two ranks that hold the same numbers."""
        rank %= self.ranks
        place = np.unravel_index(rank, self.devices)
        part = rank // self.step % self.parts if self.parts > 1 else 0
        return (*(int(place[axis]) for axes in self.axes for axis in axes), part)


def read_strategy(path: str) -> tuple[dict[str, Layout], int]:
    """How each parameter lies, by name, and how many ranks the strategy file is for.

    Raises:
        ValueError: the file is missing, unreadable or empty.
    """
    try:
        strategy = build_searched_strategy(path)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"the strategy file {path} cannot be read: {error}") from error
    layouts: dict[str, Layout] = {}
    stages = set()
    for key, stored in (strategy or {}).items():
        stage, name = _STAGED_NAME.fullmatch(key).groups()  # type: ignore[union-attr]
        layout = _layout(stored)
        if layout is None:
            raise ValueError(f"the strategy file {path} is broken: {key!a} cannot lie on devices as it says")
        layouts.setdefault(name, layout)
        stages.add(stage)
    if not layouts:
        raise ValueError(f"the strategy file {path} holds no parameter")
    return layouts, next(iter(layouts.values())).ranks * len(stages)


def _layout(stored: Any) -> Layout | None:
    """How one parameter lies, or None where what is stored of it is impossible."""
    devices = tuple(stored.dev_matrix[0].dim) if len(stored.dev_matrix) else ()
    maps = [tuple(each.dim) for each in stored.tensor_map]
    maps = [each for each in maps if each] if len(maps) > 1 else [(number,) for each in maps for number in each]
    axes = tuple(tuple(len(devices) - 1 - number for number in each if number >= 0) for each in maps)
    step, parts = int(stored.opt_weight_shard_step), int(stored.opt_weight_shard_size)
    possible = len(devices) > 0 and all(0 < length < _MANY for length in devices) and math.prod(devices) < _MANY
    possible = possible and all(axis >= 0 for each in axes for axis in each) and (parts <= 1 or step > 0)
    return Layout(devices, axes, step, parts) if possible else None


@dataclass
class RankFiles:
    """Checkpoints of one moment, a file a rank.

    Attributes:
        role: how messages call them.
        files: by rank.
        strategy: path of their strategy file, None for one whole checkpoint.
        layouts: what that says.
        shapes: of each parameter that can be put together, as a whole.
        ignored: what the files hold beside: the strategy file says nothing of it.
        largest: the largest absolute value in each, infinity where there is a NaN.
        problems: all that is wrong.
    """

    role: str
    files: dict[int, Path]
    strategy: str | None
    layouts: dict[str, Layout] | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, owner: str, role: str, given: Any, strategy: Any) -> "RankFiles":
        """Find the files, read them once, and note what does not fit."""
        path = None if strategy is None else str(_path(owner, "a strategy file", strategy))
        files, problems = find(owner, role, given)
        found = cls(role, files, path)
        found.problems = [f"{role}: {problem}" for problem in (*problems, *(found._read() if files else ()))]
        return found

    def _read(self) -> list[str]:
        devices, problems, contents = 1, [], {}
        try:
            if self.strategy:
                self.layouts, devices = read_strategy(self.strategy)
        except ValueError as error:
            return [str(error)]
        missing, more = [r for r in range(devices) if r not in self.files], [r for r in self.files if r >= devices]
        for ranks, what in ((missing, "there is no file of"), (more, "there is a file of")):
            if ranks:
                shown = ", ".join(map(str, ranks[:20])) + (f" and {len(ranks) - 20} more" if len(ranks) > 20 else "")
                says = f"the strategy file is for {devices} devices" if self.strategy else "there is no strategy file"
                problems.append(f"{says}, and {what} rank {shown}")
        for rank, path in sorted(self.files.items()):
            try:
                contents[rank] = {name: self._seen(name, value) for name, value in read(path).items()}
            except ValueError as error:
                problems.append(str(error))
        problems += self._together(contents)
        if contents and not self.shapes and not problems:
            problems.append(f"the strategy file names none of {', '.join(self.ignored[:5]) or 'nothing'}")
        return problems

    def _seen(self, name: str, value: Parameter) -> tuple[tuple[int, ...], str]:
        """Shape and digest of a slice; its values are not kept."""
        array = as_array(value)
        if np.issubdtype(array.dtype, np.floating):
            largest = float(np.abs(array).max(initial=0))
            self.largest[name] = max(self.largest.get(name, 0.0), largest if np.isfinite(largest) else np.inf)
        return tuple(value.shape), hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()

    def _together(self, contents: dict[int, dict[str, tuple]]) -> list[str]:
        """What keeps slices from being those of one whole."""
        problems = []
        for name in sorted({name for content in contents.values() for name in content}):
            has = {rank: content[name] for rank, content in contents.items() if name in content}
            layout = self.layouts.get(name) if self.layouts is not None else None
            if layout is not None:
                problems += [f"{name}: {problem}" for problem in self._slices(name, layout, has, list(contents))]
            elif self.layouts is None and name not in _COUNTERS:
                self.shapes[name] = has[min(has)][0]
            else:
                self.ignored.append(name)
                if name in _COUNTERS and len(set(has.values())) > 1:
                    problems.append(f"{name} differs from rank to rank: {_OTHER_MOMENT}")
        return problems

    def _slices(self, name: str, layout: Layout, has: dict[int, tuple], ranks: list[int]) -> list[str]:
        """What is wrong with the slices of one parameter; its whole shape is noted where they have one."""
        problems = []
        stages = {rank // layout.ranks for rank in has}
        without = [rank for rank in ranks if rank // layout.ranks in stages and rank not in has]
        if without:
            problems.append(f"rank {', '.join(map(str, without))} has no slice of it")
        shapes = {shape for shape, _ in has.values()}
        if len(shapes) > 1 or len(next(iter(shapes))) != len(layout.axes):
            shown = ", ".join(f"{shape} on rank {rank}" for rank, (shape, _) in has.items())
            return [*problems, f"the slices do not fit the strategy file: {shown}"]
        self.shapes[name] = tuple(length * cut for length, cut in zip(next(iter(shapes)), layout.cuts))
        first: dict[tuple[int, ...], int] = {}
        for rank, (_, digest) in has.items():
            other = first.setdefault(layout.slice_of(rank), rank)
            if has[other][1] != digest:
                problems.append(f"ranks {other} and {rank} have other numbers in the same slice: {_OTHER_MOMENT}")
                break
        return problems

    def whole(self, directory: Path) -> dict[str, Parameter]:
        """Each parameter put together; files that MindSpore needs for that go to `directory`."""
        if self.strategy is None:
            return read(self.files[0])
        target = directory / f"{self.role}.ckpt"
        self.transform(0, None, target, directory)
        return read(target)

    def transform(self, rank: int, target_strategy: str | None, target: Path, directory: Path) -> None:
        """Write what `rank` holds under another strategy."""
        ranks = rank_list_for_transform(rank, self.strategy, target_strategy)
        files = {each: str(self._staged(each, directory)) for each in {*ranks, rank % len(self.files)}}
        transform_checkpoint_by_rank(rank, files, str(target), self.strategy, target_strategy)

    def _staged(self, rank: int, directory: Path) -> Path:
        """The file of a rank, or a copy as MindSpore can transform it.

        MindSpore 2.10 passes on what the strategy file does not name, the slice of some rank for the whole; it takes
        ``.ckpt`` alone by rank, and what it does take of ``.safetensors``, as a directory, it writes as safetensors
        with the numbers of every slice mixed up that is cut along another axis than the first.
        """
        path, copy = self.files[rank], directory / f"{self.role}-{rank}.ckpt"
        if path.suffix == ".ckpt" and not self.ignored:
            return path
        if not copy.exists():
            kept = [{"name": name, "data": value} for name, value in read(path).items() if name in self.shapes]
            save_checkpoint(kept, str(copy))
        return copy


def read(path: Path) -> dict[str, Parameter]:
    """A checkpoint of either format.

    Raises:
        ValueError: it is missing or broken.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends neither in .ckpt nor in .safetensors")
    return _compat.load_checkpoint(path)


def as_array(value: Tensor) -> np.ndarray:
    """As NumPy has it, which knows no bfloat16: that is widened, exactly."""
    return (value.astype(ms.float32) if value.dtype == ms.bfloat16 else value).asnumpy()


def find(owner: str, role: str, given: Any) -> tuple[dict[int, Path], list[str]]:
    """Files by rank, and what is wrong with them: of a list in order of rank, a directory, a pattern or one file."""
    if isinstance(given, (list, tuple)):
        return _listed([_path(owner, role, each) for each in given])
    path = _path(owner, role, given)
    if path.is_dir():
        found = [each for each in path.glob("rank_*/*") if each.suffix in SUFFIXES]
        found = found or [each for each in path.iterdir() if each.suffix in SUFFIXES]
    elif has_magic(str(path)) and not path.exists():
        found = [Path(each) for each in glob(str(path))]
    else:
        return {0: path}, []
    if not found:
        return {}, [f"there is no .ckpt or .safetensors file in {path}" if path.is_dir() else f"no file matches {path}"]
    return _by_rank(sorted(found), path)


def _listed(paths: list[Path]) -> tuple[dict[int, Path], list[str]]:
    """In order of rank, which a sorted list is not: ``rank_10`` is before ``rank_2``. Paths may say their rank."""
    said = [_rank_in_words(path) for path in paths]
    problems = [] if paths else ["the list of files is empty"]
    if None not in said and set(said) == set(range(len(paths))):
        problems += [
            f"{path} is at place {place} of the list" for place, path in enumerate(paths) if said[place] != place
        ]
    if len({path.resolve() for path in paths}) < len(paths):
        problems.append("the list has a file twice")
    return dict(enumerate(paths)), problems


def _by_rank(found: list[Path], given: Path) -> tuple[dict[int, Path], list[str]]:
    by_rank: dict[int, list[Path]] = {}
    for path in found:
        rank, numbers = _rank_in_words(path), re.findall(r"\d+", path.stem)
        if rank is None and len(found) > 1 and len(numbers) != 1:
            return {}, [f"the name of {path} does not say whose rank it is: give a list in order of rank"]
        by_rank.setdefault(rank if rank is not None else int(numbers[0]) if len(found) > 1 else 0, []).append(path)
    for rank, paths in by_rank.items():
        if len(paths) > 1:
            one = f"a pattern that matches one, such as {given}/rank_*/{paths[-1].name}" if given.is_dir() else "a list"
            return {}, [f"rank {rank} has several files ({', '.join(path.name for path in paths)}): give {one}"]
    return {rank: paths[0] for rank, paths in sorted(by_rank.items())}, []


def _rank_in_words(path: Path) -> int | None:
    """The rank that a path says outright: in the directory ``rank_3``, or in the name of the file."""
    match = re.fullmatch(r"rank_(\d+)", path.parent.name) or re.search(r"rank_?(\d+)", path.name)
    return int(match[1]) if match else None


def _path(owner: str, name: str, value: Any) -> Path:
    if not isinstance(value, (str, Path)):
        raise TypeError(f"For '{owner}', '{name}' must be a path, or a list of paths, but got {_checks.shown(value)}.")
    return Path(value)
