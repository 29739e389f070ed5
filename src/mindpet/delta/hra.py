"""HRA: Householder reflection adaptation. Yuan, Liu, Xu 2024, arXiv:2405.17484, section 3.

::

    x ── H_r ── ... ── H_1 ── W (frozen) ── + b ── σ ── y        H_i = I - 2 u_i u_i^T / |u_i|^2
"""

import math
from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Uniform, initializer

from mindpet import _checks
from mindpet.delta.dense import ChangedInputDense
from mindpet.delta.method import ATTENTION, DeltaConfig, Method, PeftNames


@dataclass(frozen=True, kw_only=True)
class HRAConfig(DeltaConfig):
    """HRA on every targeted dense layer.

    Attributes:
        rank: r, how many reflections; even without `gram_schmidt`.
        gram_schmidt: make the vectors orthogonal first: R is then I - 2 Q Q^T, and never the identity.
    """

    rank: int = 8
    gram_schmidt: bool = False

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.positive_int(owner, "rank", self.rank)
        _checks.boolean(owner, "gram_schmidt", self.gram_schmidt)


class HRADense(ChangedInputDense):
    r"""A dense layer whose weight is multiplied by r trained reflections.

    .. math:: y = \sigma(x H_r \cdots H_1 W^T + b), \qquad H_i = I - 2 u_i u_i^T / |u_i|^2

    Shapes: x ``(..., in)``, W ``(out, in)``, U = (u_1 ... u_r) ``(in, rank)``, y ``(..., out)``. Of the columns of U
    each even one starts as the odd one before it: two equal reflections are none, so with an even rank the layer
    starts as the dense layer it replaces. The product is kept as I - P Q^T, with the unit vectors in Q and
    ``P = Q (I / 2 + the part of Q^T Q above its diagonal)^-1``, so that a row of the input costs two thin products; of
    orthogonal vectors P is 2 Q, and of others with the same span ``2 Q (Q^T Q)^-1``. Cost: ``rank * in`` parameters,
    ``(4 * rank + 1) * in`` floating-point operations a row and, of a rank above 1,
    ``(4 * rank + 3) * rank * in + (2 * rank + 2 - gram_schmidt) * rank**2 + rank`` a call.

    >>> from mindspore import ops
    >>> layer = HRADense.from_dense(nn.Dense(6, 4), HRAConfig(rank=2))
    >>> layer(ops.ones((3, 5, 6))).shape
    (3, 5, 4)
    """

    delta_method = "hra"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: HRAConfig) -> "HRADense":
        """The same dense layer, weight and bias shared, with new reflections in the dtype of its weight."""
        layer = cls.borrow(dense)
        layer.rank, layer.gram_schmidt = config.rank, config.gram_schmidt
        if config.gram_schmidt and config.rank > dense.in_channels:
            raise ValueError(
                f"For 'HRAConfig', with 'gram_schmidt' 'rank' must be at most {dense.in_channels}, the size of the "
                f"input, but got {config.rank}."
            )
        layer.above = Tensor(np.triu(np.ones((config.rank, config.rank), np.float32), 1))
        layer.half = Tensor(0.5 * np.eye(config.rank, dtype=np.float32))
        pairs = config.rank % 2 == 0 and not config.gram_schmidt
        columns = config.rank // 2 if pairs else config.rank
        bound = 1 / math.sqrt(columns)  # PEFT's: it takes the columns for the size of the input
        start = initializer(Uniform(bound), (dense.in_channels, columns), mstype.float32).init_data().asnumpy()
        start = Tensor(np.repeat(start, 2, axis=1) if pairs else start, dense.weight.dtype)
        layer.mindpet_delta_hra_u = Parameter(start, name="mindpet_delta_hra_u")
        return layer

    def thin_factors(self):
        """P and Q of R^T = H_1 ... H_r = I - P Q^T, in float32: (in, rank) each."""
        columns = self.mindpet_delta_hra_u.astype(mstype.float32)
        unit = columns / ops.sqrt(ops.square(columns).sum(0, keepdims=True))  # Q
        if self.rank == 1:  # MindSpore inverts no single number
            return 2 * unit, unit
        products = unit.T @ unit  # (rank, rank)
        if self.gram_schmidt:
            return unit @ (2 * ops.inverse(products)), unit
        return unit @ ops.inverse(products * self.above + self.half), unit

    def changed_input(self, rows):
        """The product x H_r ... H_1 = x - x Q P^T: (rows, in) -> (rows, in)."""
        thin, unit = self.thin_factors()
        return rows - (rows @ unit.astype(rows.dtype)) @ thin.T.astype(rows.dtype)


METHOD = Method(
    name="hra",
    config=HRAConfig,
    trainable=("*mindpet_delta_hra*",),
    paper="Yuan et al. 2024, Bridging The Gap between Low-rank and Orthogonal Adaptation, arXiv:2405.17484",
    adapt={nn.Dense: HRADense.from_dense},
    targets=ATTENTION,
    learning_rate=0.001,
    peft=PeftNames(
        "HRA",
        tensors={"hra_u": "mindpet_delta_hra_u"},
        options={"r": "rank", "apply_GS": "gram_schmidt"},
        free=("init_weights",),
    ),
)
