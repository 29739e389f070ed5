"""The numbers that torch draws on a CPU from a seed, without torch: PEFT's files hold the seed and not the numbers.

torch's generator is the Mersenne Twister that NumPy's `RandomState` is, started in the same way.
"""

import math

import numpy as np


class TorchRandom:
    """What ``torch.Generator().manual_seed(seed)`` draws, call after call.

    >>> TorchRandom(777).permutation(64, 5)
    array([39, 63, 11, 47,  0])
    """

    def __init__(self, seed: int):
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)

    def _words(self, count: int) -> np.ndarray:
        return self._twister.randint(0, 2**32, count, np.uint32)

    def permutation(self, size: int, count: int) -> np.ndarray:
        """The first `count` entries of ``torch.randperm(size)``.

        Raises:
            ValueError: `size` is so large that torch draws in another way.
        """
        if size >= 0xFFFFFFFF // 20:
            raise ValueError(f"'size' must be less than {0xFFFFFFFF // 20}, but got {size}.")
        moved: dict[int, int] = {}  # what exchanges have put at a position; at all others is the position itself
        first = []
        for at, draw in enumerate(self._words(count).tolist()):
            other = at + draw % (size - at)
            first.append(moved.get(other, other))
            moved[other] = moved.get(at, at)
        return np.array(first, np.int64)

    def uniform(self, shape: tuple[int, ...], low: float, high: float, bfloat16: bool = False) -> np.ndarray:
        """``torch.empty(shape).uniform_(low, high)`` in float32, or what it is in bfloat16, widened."""
        bounds = np.array([low, high], np.float32)
        unit = (self._words(math.prod(shape)) & 0xFFFFFF) / 2**24  # 24 bits, in float64: torch rounds once, at the end
        values = unit * float(bounds[1] - bounds[0]) + float(bounds[0])
        values = values.astype(np.float32).reshape(shape)
        if bfloat16:
            values = rounded_to_bfloat16(values)
            first, last = rounded_to_bfloat16(bounds)
            values[values == last] = first  # the upper bound is not in it
        return values


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 rounded to the nearest of the numbers that bfloat16 has, ties to even: as float32.

    >>> rounded_to_bfloat16(np.array([1.0, 1.005, -0.3], np.float32)).tolist()
    [1.0, 1.0078125, -0.30078125]
    """
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
