r"""Dropout that can be resumed: its masks are a function of (seed, step), not of a generator's hidden state.

MindSpore's dropout kernels keep their generator inside the compiled graph, where no checkpoint reaches it, so a resumed
run would see other masks than an uninterrupted one. Here entry (r, c) of a mask at step t is kept when the 32-bit word

.. math:: s_{rc} = (a_t\, h_r)\, g_c + b_t \mod 2^{32}

is at or above the threshold: multiply-add hashing (Dietzfelbinger 1996, section 3) of fixed random odd words h and g,
with a fresh odd multiplier a_t and a fresh b_t for every layer and step. Entries of a mask are pairwise independent but
for the last bits of the words, which a threshold does not see.
"""

from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, jit, nn, ops
from mindspore import dtype as mstype

from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.delta.prompt_slot import PromptSlot
from mindpet.graph.inject import replace_cells
from mindpet.graph.targets import cells_by_path
from mindpet.kernels import build, operators
from mindpet.parallel.group import ALONE, Group

_POOL = 1 << 20  # words, for rows from its start and for columns from its end


class ResumableDropout(nn.Cell):
    """Dropout whose mask at each step follows from one row of `keys`.

    Process `rank` of several, with `part` of the `whole` rows of a batch, has its part of the mask of the whole batch.
    """

    def __init__(self, p: float, words: Parameter, keys: Parameter, site: int, rank: int, part: int, whole: int):
        super().__init__(auto_prefix=False)
        self.rank, self.part, self.whole = rank, part, whole
        self.words, self.keys = words, keys
        # A parameter, for what differs from layer to layer must not be a constant of the graph: see blocks.py
        self.site = Parameter(Tensor(site, mstype.int32), name=f"mindpet_dropout_site_{site}", requires_grad=False)
        threshold = int(-(2**31) + p * 2**32)
        self.threshold = Tensor(threshold, mstype.int32)
        self.settings = Tensor([threshold, rank], mstype.int32)  # for the kernel of attention, which drops by itself
        self.p, self.scale = p, 1.0 / (1.0 - p)
        self.fast = operators.Dropout(self.scale) if build.available() else None

    def construct(self, x):
        if not self.training:
            return x
        if (
            self.fast is not None
            and x.dtype == mstype.float32
            and self.has_words_for(x.size // x.shape[-1], x.shape[-1])
        ):
            return self.fast(x, self.words, self.keys_now())
        place = self.rank, self.part, self.whole
        return x * _kept(self.words, self.key_now(), self.threshold, self.scale, x.shape, place).astype(x.dtype)

    def key_now(self):
        """This step's two keys."""
        return ops.gather(self.keys, self.site, 0)

    def keys_now(self):
        """What the kernels make this step's mask from, beside the words: two keys, the threshold, the rank."""
        return ops.concat((self.key_now(), self.settings))

    def has_words_for(self, rows, columns):
        """Whether a mask of that size has a word for each row, those of the other processes too, and each column."""
        return rows * self.whole <= _POOL // 2 * self.part and columns <= _POOL // 2


@jit  # one call rather than eight in PyNative mode; graph mode compiles it in
def _kept(words, key, threshold, scale, shape, place):
    """What to multiply an input of that shape by: 0, or 1 / (1 - p)."""
    rank, part, whole = place
    columns = shape[-1]
    rows = 1
    for size in shape[:-1]:
        rows = rows * size
    count = rows * columns
    begin = rank * rows  # in the rows of the whole batch
    skipped = 0
    if rows * whole > _POOL // 2 * part or columns > _POOL // 2:  # any other shape of the same size will do
        begin = rank * count // 4096
        skipped = rank * count - begin * 4096
        columns = 4096
        rows = (skipped + count + columns - 1) // columns
    row_words = (words[begin : begin + rows] * key[0]).reshape((rows, 1))
    word = row_words * words[_POOL - columns :] + key[1]  # (rows, columns)
    kept = ops.greater_equal(word, threshold).astype(mstype.float32) * scale
    if rows * columns != count:
        kept = kept.reshape((-1,))[skipped : skipped + count]
    return kept.reshape(shape)


class DropoutKeys:
    """All resumable dropouts of a network, and the setting of their keys for a step.

    Args:
        network: its dropouts are replaced.
        seed: of all masks.
        batch_size: rows of a batch, those of all processes of `group` together.
        group: each of its processes drops in its rows what one process alone would.
    """

    def __init__(self, network: nn.Cell, seed: int, batch_size: int = 1, group: Group = ALONE):
        sites = dropouts(network)
        slots = [path for path, cell in cells_by_path(network).items() if isinstance(cell, (PrefixSlot, PromptSlot))]
        shared_by_all = [f"{path}." for path in slots]
        part = group.part_of(batch_size)
        self.seed, self.count = seed, len(sites)
        if not sites:
            return
        generator = np.random.default_rng([seed, 0])
        words = generator.integers(-(2**31), 2**31, _POOL, dtype=np.int64).astype(np.int32) | 1
        shared = Parameter(Tensor(words), name="mindpet_dropout_words", requires_grad=False)
        self.keys = Parameter(Tensor(self._words_for(0)), name="mindpet_dropout_keys", requires_grad=False)
        replacements = {}
        for site, (path, cell) in enumerate(sites.items()):
            # a prefix and virtual tokens belong to no sample
            place = (0, 1, 1) if path.startswith(tuple(shared_by_all)) else (group.rank, part, batch_size)
            replacements[path] = ResumableDropout(_probability(cell), shared, self.keys, site, *place)
        replace_cells(network, replacements)
        for cell in cells_by_path(network).values():
            if hasattr(cell, "resumable"):  # attention by a kernel, which drops by itself
                cell.resumable = isinstance(cell.original.dropout, ResumableDropout)
        shared.name, self.keys.name = "mindpet_dropout_words", "mindpet_dropout_keys"
        for site, dropout in enumerate(replacements.values()):
            dropout.site.name = f"mindpet_dropout_site_{site}"

    def set_step(self, step: int) -> None:
        """Give every dropout the masks of this step."""
        if self.count:
            self.keys.set_data(Tensor(self._words_for(step)))

    def _words_for(self, step: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, step, 1])
        words = generator.integers(-(2**31), 2**31, (self.count, 2), dtype=np.int64).astype(np.int32)
        words[:, 0] |= 1
        return words


def dropouts(network: nn.Cell) -> dict[str, nn.Cell]:
    """The layers of dropout that drop anything, by path."""
    return {
        path: cell
        for path, cell in cells_by_path(network).items()
        if type(cell) is nn.Dropout and _probability(cell) > 0
    }


def _probability(cell: Any) -> float:
    return cell.p if cell.p is not None else 1.0 - cell.keep_prob
