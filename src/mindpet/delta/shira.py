"""SHiRA: sparse high-rank adapters. Bhardwaj et al. 2024, arXiv:2406.13175.

::

    x ── W + (trained values at few places, 0 elsewhere) ── + b ── σ ── y

A sparse matrix is of high rank with as many numbers as LoRA has.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet import _checks
from mindpet.delta.dense import ReweightedDense
from mindpet.delta.method import ATTENTION, DeltaConfig, Method, PeftNames


@dataclass(frozen=True, kw_only=True)
class SHiRAConfig(DeltaConfig):
    """SHiRA on every targeted dense layer.

    Attributes:
        rank: as many entries of a weight train as LoRA of this rank has parameters; no bound on the delta's rank.
        mask: which entries: ``random`` ones, or those of the largest ``magnitude``.
        seed: of random masks, the same for all layers of a size; None takes another mask for each layer, from NumPy's
            own random numbers, which ``mindspore.set_seed`` sets. The places are saved with the delta.
    """

    rank: int = 32
    mask: Literal["random", "magnitude"] = "random"
    seed: int | None = None

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.positive_int(owner, "rank", self.rank)
        if self.mask not in ("random", "magnitude"):
            raise ValueError(f"For '{owner}', 'mask' must be 'random' or 'magnitude', but got {self.mask!r}.")
        if self.seed is not None:
            _checks.int_from_zero(owner, "seed", self.seed)


class SHiRADense(ReweightedDense):
    r"""A dense layer of whose weight some entries train.

    .. math:: y = \sigma\bigl(x (W + S)^T + b\bigr), \quad S_{p_i q_i} = v_i

    Shapes: x ``(..., in)``, W and S ``(out, in)``, v ``(entries,)``, places ``(entries, 2)``, y ``(..., out)``. v
    starts at zero, so the layer starts as the dense layer it replaces. Cost: ``rank * (in + out)`` parameters, as many
    pairs of numbers that say where they are, and ``in * out`` floating-point operations a call, however many rows
    there are.

    >>> layer = SHiRADense.from_dense(nn.Dense(6, 4), SHiRAConfig(rank=1))
    >>> layer(ops.ones((3, 5, 6))).shape, layer.mindpet_delta_shira_places.shape
    ((3, 5, 4), (10, 2))
    """

    delta_method = "shira"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: SHiRAConfig) -> "SHiRADense":
        """The same dense layer, weight and bias shared, with new values in the dtype of its weight."""
        layer = cls.borrow(dense)
        count, entries = config.rank * (dense.in_channels + dense.out_channels), dense.in_channels * dense.out_channels
        if count > entries:
            raise ValueError(
                f"For 'SHiRAConfig', 'rank' must leave at most {entries} values, the entries of a weight of shape "
                f"{dense.weight.shape}, but got {config.rank}, which makes {count}."
            )
        layer.add_delta("mindpet_delta_shira_values", "zeros", count)
        where = Tensor(places(dense, count, config))
        layer.mindpet_delta_shira_places = Parameter(where, name="mindpet_delta_shira_places", requires_grad=False)
        return layer

    def changed_weight(self, weight):
        """W + S: (out, in) -> (out, in)."""
        values = self.mindpet_delta_shira_values.astype(weight.dtype)
        return weight + ops.scatter_nd(self.mindpet_delta_shira_places, values, weight.shape)


def places(dense: nn.Dense, count: int, config: SHiRAConfig) -> np.ndarray:
    """Row and column of each value, row by row: (count, 2)."""
    into = dense.in_channels
    if config.mask == "magnitude":
        found = np.argpartition(-np.abs(dense.weight.asnumpy()), count - 1, axis=None)[:count]
    else:
        seed = np.random.randint(2**32, dtype=np.uint32) if config.seed is None else config.seed
        found = np.random.default_rng(seed).choice(into * dense.out_channels, count, replace=False, shuffle=False)
    found = np.sort(found)
    return np.stack([found // into, found % into], axis=1).astype(np.int32)


METHOD = Method(
    name="shira",
    config=SHiRAConfig,
    trainable=("*mindpet_delta_shira_values",),
    paper="Bhardwaj et al. 2024, Sparse High Rank Adapters, arXiv:2406.13175",
    adapt={nn.Dense: SHiRADense.from_dense},
    targets=ATTENTION,
    learning_rate=0.001,
    peft=PeftNames(
        "SHIRA",
        tensors={
            "shira_weight": "mindpet_delta_shira_values",
            "shira_indices": "mindpet_delta_shira_places",
        },
        options={"r": "rank"},
        free=("mask_type", "random_seed", "init_weights"),
        turned=("shira_indices",),
    ),
)
