"""OFT: orthogonal fine-tuning. Qiu et al. 2023, arXiv:2306.07280, section 3.2.

With the input turned instead of the weight, and the series in place of the inverse: Qiu et al. 2025, OFTv2,
arXiv:2506.19847, section 4.

::

    x ── R = diag(R_1 ... R_k) ── W (frozen) ── + b ── σ ── y        R_i = (I - Q_i)(I + Q_i)^-1,  Q_i^T = -Q_i

The series is that of (I + Q_i)(I - Q_i)^-1, the transpose of the above, as in PEFT: the same Q turns the other way.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet import _checks
from mindpet.delta.dense import ChangedInputDense
from mindpet.delta.method import ATTENTION, DeltaConfig, Method, PeftNames


@dataclass(frozen=True, kw_only=True)
class BlockConfig(DeltaConfig):
    """What the methods have that turn the input block by block.

    Attributes:
        block_size: size of each rotation, which divides the size of the input. None, or 0, where `blocks` is given,
            and the method's usual one if neither is.
        blocks: how many rotations instead.
    """

    usual_block_size: ClassVar[int]
    block_size: int | None = None
    blocks: int | None = None

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        for name in ("block_size", "blocks"):
            value = getattr(self, name)
            object.__setattr__(self, name, _checks.positive_int(owner, name, value) if value else 0)
        if self.block_size and self.blocks:
            raise ValueError(
                f"For '{owner}', 'block_size' and 'blocks' cannot both be given, since one follows from the other, but "
                f"got {self.block_size} and {self.blocks}."
            )
        if not self.block_size and not self.blocks:
            object.__setattr__(self, "block_size", self.usual_block_size)

    def blocks_of(self, size: int) -> tuple[int, int]:
        """How many blocks an input of that size has, and their size.

        Raises:
            ValueError: it cannot be cut so.
        """
        name, given = ("block_size", self.block_size) if self.block_size else ("blocks", self.blocks or 1)
        _checks.divisor(type(self).__name__, name, given, size, "the size of the input")
        if given == (1 if self.block_size else size):
            raise ValueError(
                f"For '{type(self).__name__}', blocks of size 1 have no rotation: give larger ones than {name}={given}."
            )
        return (size // given, given) if self.block_size else (given, size // given)


@dataclass(frozen=True, kw_only=True)
class OFTConfig(BlockConfig):
    """OFT on every targeted dense layer.

    Attributes:
        block_share: the same rotation in all blocks of a layer.
        cayley_neumann: a series in place of the inverse: faster, orthogonal only about Q = 0, and the other way round.
        terms: how many of them, the identity included; 4 at least.
    """

    usual_block_size: ClassVar[int] = 32
    block_share: bool = False
    cayley_neumann: bool = True
    terms: int = 5

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.boolean(owner, "block_share", self.block_share)
        _checks.boolean(owner, "cayley_neumann", self.cayley_neumann)
        if _checks.positive_int(owner, "terms", self.terms) < 4:
            raise ValueError(f"For '{owner}', 'terms' must be at least 4, but got {_checks.shown(self.terms)}.")


def inverse_cayley(skew):
    """(I - Q)(I + Q)^-1 = 2 (I + Q)^-1 - I of each block: (blocks, size, size)."""
    unit = ops.eye(skew.shape[-1], skew.shape[-1], skew.dtype)
    return 2 * ops.inverse(unit + skew) - unit


def turn_blocks(rows, turns):
    """Each block of a row times its matrix: (rows, in), (blocks, size, size) -> (rows, in).

    Where there is one matrix, it is that of all blocks.
    """
    if turns.shape[0] == 1:
        return (rows.reshape((-1, turns.shape[-1])) @ turns[0]).reshape(rows.shape)
    parts = rows.reshape((-1, turns.shape[0], turns.shape[-1])).transpose((1, 0, 2))  # (blocks, rows, size)
    return ops.bmm(parts, turns).transpose((1, 0, 2)).reshape(rows.shape)


class OFTDense(ChangedInputDense):
    r"""A dense layer whose input is turned, block by block, by trained rotations.

    .. math:: y = \sigma(x R W^T + b), \qquad R = \mathrm{diag}(R_1 \dots R_k), \qquad R_i = (I - Q_i)(I + Q_i)^{-1}

    Shapes: x ``(..., in)``, W ``(out, in)``, Q_i ``(size, size)`` and skew-symmetric, kept as its entries above the
    diagonal, ``(blocks, size (size - 1) / 2)``, y ``(..., out)``. That is R_i without `cayley_neumann`. With it, and t
    terms, R_i is ``I + 2 Q + 2 Q^2 + ... + 2 Q^(t-2) + Q^(t-1)``, about ``(I + Q)(I - Q)^-1``: a rotation the other
    way, so that Q of one are not for the other. Q starts at zero and R at the identity, so the layer starts as the
    dense layer it replaces. Cost:
    ``(1 if block_share else blocks or in // block_size) * size * (size - 1) // 2`` parameters,
    ``2 * in * size`` floating-point operations a row and, with k different blocks,
    ``((2 * size + 2) * (terms - 2) + 2 if cayley_neumann else 2 * size + 4) * k * size**2`` a call.

    >>> from mindspore import ops
    >>> layer = OFTDense.from_dense(nn.Dense(6, 4), OFTConfig(block_size=3))
    >>> layer(ops.ones((3, 5, 6))).shape
    (3, 5, 4)
    """

    delta_method = "oft"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: OFTConfig) -> "OFTDense":
        """The same dense layer, weight and bias shared, with new rotations in the dtype of its weight."""
        layer = cls.borrow(dense)
        blocks, size = config.blocks_of(dense.in_channels)
        entries = size * (size - 1) // 2
        layer.size, layer.terms = size, config.terms if config.cayley_neumann else 0
        layer.add_delta("mindpet_delta_oft_q", "zeros", 1 if config.block_share else blocks, entries)
        place = np.zeros((size, size), np.int32)  # of each entry of Q above the diagonal, row by row
        place[np.triu_indices(size, 1)] = np.arange(entries)
        layer.place = Tensor((place + place.T).reshape(-1))
        layer.sign = Tensor(np.sign(np.arange(size)[None, :] - np.arange(size)[:, None]), mstype.float32)
        return layer

    def rotations(self):
        """R_i in float32: (blocks, size, size), or (1, size, size) where they share one."""
        entries = ops.gather(self.mindpet_delta_oft_q.astype(mstype.float32), self.place, 1)  # (blocks, size * size)
        skew = entries.reshape((-1, self.size, self.size)) * self.sign  # Q
        if self.terms == 0:
            return inverse_cayley(skew)
        power = skew
        total = ops.eye(self.size, self.size, mstype.float32) + 2 * skew
        for _ in range(self.terms - 3):
            power = ops.bmm(power, skew)
            total = total + 2 * power
        return total + ops.bmm(power, skew)

    def changed_input(self, rows):
        """The product x R: (rows, in) -> (rows, in)."""
        return turn_blocks(rows, self.rotations().astype(rows.dtype))


def _unpack(content: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """With the size of blocks that the file has: PEFT takes one near it where the one that is given does not divide."""
    entries = {value.shape[-1] for name, value in tensors.items() if name.endswith("oft_R.weight") and value.ndim}
    size = (1 + math.isqrt(1 + 8 * entries.pop())) // 2 if len(entries) == 1 else 0
    if size and content.get("oft_block_size"):
        content["oft_block_size"] = size
    if content.get("num_cayley_neumann_terms") == 3:  # which computes four there
        content["num_cayley_neumann_terms"] = 4
    return tensors


METHOD = Method(
    name="oft",
    config=OFTConfig,
    trainable=("*mindpet_delta_oft*",),
    paper="Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv:2306.07280",
    adapt={nn.Dense: OFTDense.from_dense},
    targets=ATTENTION,
    learning_rate=0.001,
    peft=PeftNames(
        "OFT",
        tensors={"oft_R.weight": "mindpet_delta_oft_q"},
        options={
            "r": "blocks",
            "oft_block_size": "block_size",
            "block_share": "block_share",
            "use_cayley_neumann": "cayley_neumann",
            "num_cayley_neumann_terms": "terms",
        },
        fixed={"coft": False},
        free=("eps", "init_weights", "module_dropout"),
        unpack=_unpack,
    ),
)
