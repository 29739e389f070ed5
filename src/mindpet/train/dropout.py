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

from mindpet.graph.inject import replace_cell
from mindpet.graph.targets import cells_by_path

_POOL = 1 << 20  # words, for rows from its start and for columns from its end


class ResumableDropout(nn.Cell):
    """Dropout whose mask at each step follows from one row of `keys`."""

    def __init__(self, p: float, words: Parameter, keys: Parameter, site: int):
        super().__init__(auto_prefix=False)
        self.words, self.keys = words, keys
        self.site = site
        self.threshold = Tensor(int(-(2**31) + p * 2**32), mstype.int32)
        self.scale = 1.0 / (1.0 - p)

    def construct(self, x):
        if not self.training:
            return x
        return x * _kept(self.words, self.keys[self.site], self.threshold, self.scale, x.shape).astype(x.dtype)


@jit  # one call rather than eight in PyNative mode; graph mode compiles it in
def _kept(words, key, threshold, scale, shape):
    """What to multiply an input of that shape by: 0, or 1 / (1 - p)."""
    columns = shape[-1]
    rows = 1
    for size in shape[:-1]:
        rows = rows * size
    count = rows * columns
    if rows > _POOL // 2 or columns > _POOL // 2:  # any other shape of the same size will do
        columns = 4096
        rows = (count + columns - 1) // columns
    row_words = (words[:rows] * key[0]).reshape((rows, 1))
    word = row_words * words[_POOL - columns :] + key[1]  # (rows, columns)
    kept = ops.greater_equal(word, threshold).astype(mstype.float32) * scale
    if rows * columns != count:
        kept = kept.reshape((-1,))[:count]
    return kept.reshape(shape)


class DropoutKeys:
    """All resumable dropouts of a network, and the setting of their keys for a step."""

    def __init__(self, network: nn.Cell, seed: int):
        sites = dropouts(network)
        self.seed, self.count = seed, len(sites)
        if not sites:
            return
        generator = np.random.default_rng([seed, 0])
        words = generator.integers(-(2**31), 2**31, _POOL, dtype=np.int64).astype(np.int32) | 1
        shared = Parameter(Tensor(words), name="mindpet_dropout_words", requires_grad=False)
        self.keys = Parameter(Tensor(self._words_for(0)), name="mindpet_dropout_keys", requires_grad=False)
        for site, (path, cell) in enumerate(sites.items()):
            new = ResumableDropout(_probability(cell), shared, self.keys, site)
            new.set_train(cell.training)
            replace_cell(network, path, new)
        shared.name, self.keys.name = "mindpet_dropout_words", "mindpet_dropout_keys"

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
