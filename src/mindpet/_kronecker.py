"""Into which sizes LoKr factorises a weight. Nothing here imports MindSpore."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Factors:
    """The two factors of a Kronecker product of shape ``(out, in)``.

    Attributes:
        left: shape of the first.
        right: shape of the second.
        left_rank: rank of the product that the first is made of, None where it is there as it is.
        right_rank: the same of the second.
    """

    left: tuple[int, int]
    right: tuple[int, int]
    left_rank: int | None
    right_rank: int | None

    @property
    def size(self) -> int:
        """How many numbers they are together."""
        pairs = ((self.left, self.left_rank), (self.right, self.right_rank))
        return sum(math.prod(shape) if rank is None else rank * sum(shape) for shape, rank in pairs)


def factors(out: int, into: int, rank: int, decompose_both: bool, decompose_factor: int) -> Factors:
    """The shapes for a weight ``(out, into)``, and which of the two have a low rank.

    >>> factors(768, 3072, 8, False, -1)
    Factors(left=(24, 48), right=(32, 64), left_rank=None, right_rank=8)
    >>> factors(768, 3072, 8, False, -1).size
    1920
    """
    (left_out, right_out), (left_in, right_in) = (_two(size, decompose_factor) for size in (out, into))
    left, right = (left_out, left_in), (right_out, right_in)
    low_left, low_right = (rank < max(shape) / 2 for shape in (left, right))
    return Factors(left, right, rank if decompose_both and low_left else None, rank if low_right else None)


def _two(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two: of `factor` if that divides it, else of the largest divisor that is at most `factor`
    and at most the square root.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = next(divisor for divisor in range(bound, 0, -1) if size % divisor == 0)
    return first, size // first
