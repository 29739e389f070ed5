"""What is where in a file of the kind ``E5S1``, checked before anything big is read.

All numbers are little-endian, and one part follows the other::

    magic "E5S1", version 1
    sizes        hidden, layers, heads, feed-forward, vocabulary, positions, token types, epsilon, block size
    pieces       count, ids of <s> </s> <pad> <unk>, bytes of text; then offsets (count + 1), scores (count), the text
    characters   count, bytes; then for each: code point, how many it becomes, what it becomes
    tensors      count; then for each: name, kind (0 float32, 1 four-bit), elements, offset in the file, bytes
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindpet.models.loading import PretrainedFilesError, overlaps

MAGIC = b"E5S1"
BLOCK = np.dtype([("scale", "<f2"), ("halves", "u1", 16)])  # 32 weights
# parts of a layer in the file and in the network, each with a weight and a bias
_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


@dataclass(frozen=True)
class Sizes:
    """The head of the file, in its order."""

    hidden: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    types: int
    epsilon: float
    block: int

    def problems(self) -> list[str]:
        """What cannot be right about them."""
        wrong = [f"{name} is {value}" for name, value in vars(self).items() if not (0 < value < math.inf)]
        if self.block != 32:
            wrong.append(f"blocks are of {self.block} weights, not of 32")
        if not wrong and (self.hidden % 32 or self.inner % 32 or self.hidden % self.heads):
            wrong.append(f"hidden {self.hidden} and {self.inner} must be multiples of 32, and of {self.heads} heads")
        return wrong


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and its name and shape in the network."""

    name: str
    shape: tuple[int, ...]
    four_bit: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""
        return math.prod(self.shape) // 32 * BLOCK.itemsize if self.four_bit else math.prod(self.shape) * 4


@dataclass(frozen=True)
class File:
    """The parts of the file, checked: arrays are views on it."""

    data: np.ndarray
    sizes: Sizes
    special: dict[str, int]
    offsets: np.ndarray
    scores: np.ndarray
    text: bytes
    characters: dict[str, str]
    tensors: list[Stored]


class _Reader:
    """Takes one part after the other."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, data, 0

    def take(self, size: int) -> np.ndarray:
        """The next bytes."""
        end = self.at + size
        if size < 0 or end > len(self.data):
            raise PretrainedFilesError(
                f"{self.path} is cut off or broken: it has {len(self.data)} bytes, and what byte {self.at} begins "
                f"needs {end}."
            )
        taken, self.at = self.data[self.at : end], end
        return taken

    def numbers(self, layout: str) -> tuple:
        """Numbers, as `struct` spells them."""
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")).tobytes())


def read_layout(path: str | Path) -> File:
    """The file, mapped and not yet read, with everything about its sizes checked."""
    path = Path(path)
    try:
        with open(path, "rb") as opened:
            magic = opened.read(4)
        if magic != MAGIC:
            raise PretrainedFilesError(f"{path} begins with {magic!r}, not with {MAGIC!r}: it is not such a file.")
        reader = _Reader(path, np.asarray(np.memmap(path, np.uint8, "r")))
    except OSError as error:
        raise PretrainedFilesError(f"{path} cannot be read: {error}") from error
    reader.take(4)
    (version,) = reader.numbers("I")
    if version != 1:
        raise PretrainedFilesError(f"{path} is of version {version}; version 1 can be read.")
    sizes = Sizes(*reader.numbers("7ifi"))
    if sizes.problems():
        raise PretrainedFilesError(f"{path} has impossible sizes: {'; '.join(sizes.problems())}.")
    special, offsets, scores, text = _pieces(reader, sizes)
    characters = _characters(reader)
    return File(reader.data, sizes, special, offsets, scores, text, characters, _directory(reader, sizes))


def _pieces(reader: _Reader, sizes: Sizes) -> tuple[dict[str, int], np.ndarray, np.ndarray, bytes]:
    count, start, end, padding, unknown = reader.numbers("5i")
    (length,) = reader.numbers("Q")
    special = {"<s>": start, "<pad>": padding, "</s>": end, "<unk>": unknown}
    if not 0 < count <= sizes.vocabulary or not all(0 <= index < count for index in special.values()):
        raise PretrainedFilesError(
            f"{reader.path} has {count} pieces for a vocabulary of {sizes.vocabulary}, with the special ones at "
            f"{special}."
        )
    offsets = np.frombuffer(reader.take(4 * (count + 1)), "<u4").astype(np.int64)
    scores = np.frombuffer(reader.take(4 * count), "<f4")
    text = reader.take(length).tobytes()
    if offsets[0] != 0 or offsets[-1] != length or (np.diff(offsets) < 0).any() or not np.isfinite(scores).all():
        raise PretrainedFilesError(f"{reader.path} has a broken vocabulary: its {count} pieces do not add up.")
    return special, offsets, scores, text


def _characters(reader: _Reader) -> dict[str, str]:
    """What each character that is not left alone becomes."""
    count, length = reader.numbers("iI")
    end, found = reader.at + length, {}
    try:
        for _ in range(count):
            point, size = reader.numbers("IB")
            character, becomes = chr(point), "".join(map(chr, reader.numbers(f"{size}I")))
            (character + becomes).encode()  # halves of surrogate pairs are no characters
            found[character] = becomes
            if reader.at > end:
                break
    except (ValueError, OverflowError) as error:
        if isinstance(error, PretrainedFilesError):
            raise
        raise PretrainedFilesError(f"{reader.path} has a broken table of characters: {error}") from error
    if reader.at != end:
        raise PretrainedFilesError(f"{reader.path} has a broken table of characters: {length} bytes do not add up.")
    return found


def _directory(reader: _Reader, sizes: Sizes) -> list[Stored]:
    """Where each tensor of a network of those sizes lies; all that is wrong in one report."""
    (count,) = reader.numbers("i")
    if count != 5 + 16 * sizes.layers:
        raise PretrainedFilesError(
            f"{reader.path} has {count} tensors; with {sizes.layers} layers it must have {5 + 16 * sizes.layers}."
        )
    there = {}
    for _ in range(count):
        (length,) = reader.numbers("H")
        name = reader.take(length).tobytes().decode("ascii", "replace")
        there[name] = reader.numbers("BIQQ")
    tensors, problems = [], []
    for own, (name, shape) in _expected(sizes).items():
        four_bit = len(shape) == 2 and own not in ("emb.pos", "emb.type")
        if own not in there:
            problems.append(f"{own} is missing")
            continue
        kind, elements, offset, nbytes = there[own]
        stored = Stored(name, shape, four_bit, offset)
        if (kind, elements, nbytes) != (int(four_bit), math.prod(shape), stored.nbytes):
            problems.append(
                f"{own} has {elements} elements in {nbytes} bytes, of kind {kind}; {math.prod(shape)} in "
                f"{stored.nbytes}, of kind {int(four_bit)}, are expected"
            )
        elif offset < reader.at or offset + nbytes > len(reader.data):
            problems.append(f"{own} lies at {offset} to {offset + nbytes}, and the file has {len(reader.data)} bytes")
        tensors.append(stored)
    own_names = {name: own for own, (name, _) in _expected(sizes).items()}
    problems += overlaps((own_names[stored.name], stored.offset, stored.nbytes) for stored in tensors)
    if problems:
        raise PretrainedFilesError(f"{reader.path} is cut off or broken:\n  " + "\n  ".join(problems))
    return tensors


def _expected(sizes: Sizes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the file to name and shape in the network."""
    hidden, inner = sizes.hidden, sizes.inner
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        "emb.word": ("embeddings.word_embeddings.weight", (sizes.vocabulary, hidden)),
        "emb.pos": ("embeddings.position_embeddings.weight", (sizes.positions, hidden)),
        "emb.type": ("embeddings.token_type_embeddings.weight", (sizes.types, hidden)),
        "emb.ln.w": ("embeddings.LayerNorm.weight", (hidden,)),
        "emb.ln.b": ("embeddings.LayerNorm.bias", (hidden,)),
    }
    for layer in range(sizes.layers):
        for own, theirs in _PARTS.items():
            rows, columns = (inner if own == "fi" else hidden), (inner if own == "fo" else hidden)
            weight = (hidden,) if theirs.endswith("LayerNorm") else (rows, columns)
            table[f"l{layer}.{own}.w"] = (f"encoder.layer.{layer}.{theirs}.weight", weight)
            table[f"l{layer}.{own}.b"] = (f"encoder.layer.{layer}.{theirs}.bias", (rows,))
    return table
