"""BOFT: orthogonal fine-tuning by butterfly factorisation. Liu et al. 2023, arXiv:2311.06243, section 4.

::

    x ── B_m ── ... ── B_1 ── W (frozen) ── ∘ s ── + b ── σ ── y        B_i = P_i diag(R_i1 ... R_ik) P_i^T
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet import _checks
from mindpet.delta.dense import ChangedInputDense
from mindpet.delta.method import ATTENTION, Method, PeftNames
from mindpet.delta.oft import BlockConfig, inverse_cayley, turn_blocks


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(BlockConfig):
    """BOFT on every targeted dense layer.

    Attributes:
        butterfly_factors: m. Factor i turns coordinates together that are 2^(i-1) half blocks apart: with m factors
            each output coordinate sees ``block_size * 2 ** (m - 1)`` of the input.
    """

    usual_block_size: ClassVar[int] = 4
    butterfly_factors: int = 1

    def __post_init__(self):
        super().__post_init__()
        _checks.positive_int(type(self).__name__, "butterfly_factors", self.butterfly_factors)


def butterfly(size: int, block: int, factor: int) -> np.ndarray:
    """The order in which factor 0, 1, ... takes the coordinates: those of even half blocks, then those of odd ones.

    Groups of ``block * 2 ** factor`` coordinates are ordered each by itself.

    >>> butterfly(8, 2, 1).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = np.arange(size).reshape(-1, 2**factor, 2, block // 2)  # (groups, pairs of half blocks, 2, half block)
    return halves.transpose(0, 2, 1, 3).reshape(-1)


class BOFTDense(ChangedInputDense):
    r"""A dense layer whose input is turned by a product of permuted block rotations, and whose outputs are scaled.

    .. math:: y = \sigma(s \circ (x B_m \cdots B_1 W^T) + b), \quad B_i = P_i\, \mathrm{diag}(R_{i1} \dots R_{ik}) P_i^T

    Shapes: x ``(..., in)``, W ``(out, in)``, R ``(factors, blocks, size, size)``, s ``(out, 1)``, y ``(..., out)``.
    Each R is the Cayley transform ``(I - Q)(I + Q)^-1`` of Q = (A - A^T) / 2 with A trained. A starts at zero and s at
    one, so the layer starts as the dense layer it replaces. Cost:
    ``butterfly_factors * in * size + out`` parameters, ``2 * butterfly_factors * in * size + out`` floating-point
    operations a row and ``butterfly_factors * in * size * (2 * size + 5)`` a call.

    >>> from mindspore import ops
    >>> layer = BOFTDense.from_dense(nn.Dense(8, 4), BOFTConfig(block_size=2, butterfly_factors=2))
    >>> layer(ops.ones((3, 5, 8))).shape
    (3, 5, 4)
    """

    delta_method = "boft"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: BOFTConfig) -> "BOFTDense":
        """The same dense layer, weight and bias shared, with new rotations in the dtype of its weight."""
        layer = cls.borrow(dense)
        inputs, factors = dense.in_channels, config.butterfly_factors
        blocks, size = config.blocks_of(inputs)
        if factors > 1 and (size % 2 or blocks % 2 ** (factors - 1)):
            raise ValueError(
                f"For 'BOFTConfig', {factors} 'butterfly_factors' need blocks of an even size, and "
                f"{2 ** (factors - 1)} of them or a multiple, but {inputs} inputs have {blocks} of size {size}."
            )
        layer.factors, layer.size = factors, size
        layer.add_delta("mindpet_delta_boft_r", "zeros", factors, blocks, size, size)
        layer.add_delta("mindpet_delta_boft_s", "ones", dense.out_channels, 1)
        orders = [butterfly(inputs, size, factor) if factor else np.arange(inputs) for factor in range(factors)]
        layer.there = Tensor(np.array([np.argsort(order) for order in orders]), mstype.int32)  # (factors, in)
        layer.back = Tensor(np.array(orders), mstype.int32)
        return layer

    def changed_input(self, rows):
        """The product x B_m ... B_1: (rows, in) -> (rows, in)."""
        data = self.mindpet_delta_boft_r.astype(mstype.float32).reshape((-1, self.size, self.size))
        turns = inverse_cayley((data - data.swapaxes(1, 2)) / 2).astype(rows.dtype)
        turns = turns.reshape((self.factors, -1, self.size, self.size))
        for factor in range(self.factors - 1, 0, -1):
            rows = ops.gather(rows, self.there[factor], 1)  # x P
            rows = ops.gather(turn_blocks(rows, turns[factor]), self.back[factor], 1)  # ... P^T
        return turn_blocks(rows, turns[0])  # P_1 is the identity

    def construct(self, x):
        rows = self.matmul(self.changed_input(self.rows_of(x)), self.cast(self.weight, self.compute_dtype))
        rows = rows * self.cast(self.reshape(self.mindpet_delta_boft_s, (-1,)), self.compute_dtype)  # (rows, out)
        return self.shaped_like(self.activated(self.biased(rows)), x)

    def delta_weight(self) -> Tensor:
        """What is added to W: s ∘ (W B_1^T ... B_m^T) - W, in float32."""
        weight = self.weight.astype(mstype.float32)
        return self.mindpet_delta_boft_s.astype(mstype.float32) * (weight + super().delta_weight()) - weight


def _unpack(content: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """With the number of factors that the file has: PEFT makes one where it has no kernel for more."""
    factors = {len(value) for name, value in tensors.items() if name.endswith("boft_R") and value.ndim}
    if len(factors) == 1:
        content["boft_n_butterfly_factor"] = factors.pop()
    return tensors


METHOD = Method(
    name="boft",
    config=BOFTConfig,
    trainable=("*mindpet_delta_boft*",),
    paper="Liu et al. 2023, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv:2311.06243",
    adapt={nn.Dense: BOFTDense.from_dense},
    targets=ATTENTION,
    learning_rate=0.001,
    peft=PeftNames(
        "BOFT",
        tensors={"boft_R": "mindpet_delta_boft_r", "boft_s": "mindpet_delta_boft_s"},
        options={
            "boft_block_size": "block_size",
            "boft_block_num": "blocks",
            "boft_n_butterfly_factor": "butterfly_factors",
        },
        free=("boft_dropout", "init_weights"),
        unpack=_unpack,
    ),
)
