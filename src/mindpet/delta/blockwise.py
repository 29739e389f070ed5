"""Weights kept as codes of 4 or 8 bits. Blockwise quantisation: Dettmers et al. 2022, arXiv:2110.02861, section 2.1.

A weight is cut into blocks as it lies in memory, over the ends of its rows. Each block is divided by its largest
absolute value, and each entry of it becomes the number of the nearest of a few levels in [-1, 1]:

- ``nf4``: 16 levels, as many as fit in half a byte, at quantiles of a normal distribution: Dettmers et al. 2023, QLoRA,
  arXiv:2305.14314, section 3 and appendix E;
- ``int8``: 255 levels at equal distances.

With double quantisation (QLoRA, section 3) the largest values of the blocks are codes of 8 bits themselves: less their
mean, in groups of 256, on levels that are dense around zero (arXiv:2110.02861, section 1.3).

The codes and the scales of ``nf4`` are those of the library bitsandbytes, laid out in the same way. (Where a scale lies
in the middle between two levels, that takes the other one on a CPU sometimes.)
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

GROUP = 256  # blocks whose largest values are quantised together
_AT_ONCE = 1 << 12  # blocks, so that what is needed in between stays small


def _dynamic() -> np.ndarray:
    """0, 1, and for each power of ten from -6 to 0 twice as many levels as for the one below, on both sides of zero."""
    found = [0.0, 1.0]
    for exponent in range(7):
        bounds = np.linspace(0.1, 1.0, 2**exponent + 1)
        middles = (bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (exponent - 6)
        found += [*middles, *-middles]
    return np.sort(found).astype(np.float32)


DYNAMIC = _dynamic()  # (256,)
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
LEVELS = {"nf4": np.array(_NF4, np.float32), "int8": (np.arange(-127, 128) / 127).astype(np.float32)}


@dataclass(frozen=True)
class Form:
    """How a weight is kept.

    Attributes:
        shape: of the weight, (out, in).
        bits: ``nf4`` or ``int8``.
        block_size: entries of a block; even.
        double: whether the largest values of the blocks are codes, too.
    """

    shape: tuple[int, int]
    bits: str
    block_size: int
    double: bool

    @property
    def blocks(self) -> int:
        """How many there are; the last one may be partly filled."""
        return -(-self.shape[0] * self.shape[1] // self.block_size)

    @property
    def table(self) -> np.ndarray:
        """The levels that a byte stands for: (256, 2) for ``nf4``, the first one in the high half, else (256, 1)."""
        levels = LEVELS[self.bits]
        if self.bits == "nf4":
            return np.stack([levels.repeat(16), np.tile(levels, 16)], 1)
        return np.pad(levels, (0, 1), "edge")[:, None]  # so that any byte has a level


@dataclass(frozen=True)
class Codes:
    """A quantised weight.

    Attributes:
        codes: bytes, two entries of ``nf4`` in each; zeros fill up the last block.
        absmax: the largest value of each block, float32; with double quantisation uint8, in whole groups.
        scales: of each group of `absmax`; with simple quantisation one number without meaning.
        offset: the mean of the largest values, one number.
    """

    codes: np.ndarray
    absmax: np.ndarray
    scales: np.ndarray
    offset: np.ndarray


def quantise(weight: np.ndarray, form: Form) -> Codes:
    """The codes of a weight.

    Raises:
        ValueError: it holds NaN or infinity.

    >>> form = Form((2, 3), "int8", 4, False)
    >>> codes = quantise(np.array([[0, 1, -2], [4, 5, 10]]), form)
    >>> codes.absmax, dequantise(codes, form).round(1)
    (array([ 4., 10.], dtype=float32), array([[ 0.,  1., -2.], [ 4.,  5., 10.]], dtype=float32))
    """
    flat = np.ascontiguousarray(weight).reshape(-1)
    codes = np.empty(form.blocks * form.block_size, np.uint8)
    absmax = np.empty(form.blocks, np.float32)
    step = _AT_ONCE * form.block_size
    for first in range(0, flat.size, step):
        part = flat[first : first + step].astype(np.float32)
        part = np.pad(part, (0, -part.size % form.block_size)).reshape(-1, form.block_size)
        if not np.isfinite(part).all():
            raise ValueError("a weight with NaN or infinity cannot be quantised")
        largest = np.abs(part).max(1)
        scaled = part / np.where(largest == 0, np.float32(1), largest)[:, None]
        codes[first : first + part.size] = _nearest(scaled.reshape(-1), LEVELS[form.bits])
        absmax[first // form.block_size :][: largest.size] = largest
    if form.bits == "nf4":
        codes = np.bitwise_or(np.left_shift(codes[::2], np.uint8(4)), codes[1::2], dtype=np.uint8)
    if not form.double:
        return Codes(codes, absmax, np.ones(1, np.float32), np.zeros(1, np.float32))
    offset = absmax.mean(dtype=np.float32)
    groups = np.pad(absmax - offset, (0, -absmax.size % GROUP)).reshape(-1, GROUP)
    scales = np.abs(groups).max(1)
    scaled = groups / np.where(scales == 0, np.float32(1), scales)[:, None]
    return Codes(codes, _nearest(scaled.reshape(-1), DYNAMIC), scales, np.array([offset], np.float32))


def dequantise(codes: Codes, form: Form) -> np.ndarray:
    """The weight that codes stand for, float32: bit for bit what :class:`QuantisedProduct` multiplies with."""
    absmax = codes.absmax
    if form.double:
        absmax = (DYNAMIC[absmax].reshape(-1, GROUP) * codes.scales[:, None] + codes.offset).reshape(-1)[: form.blocks]
    whole = form.table[codes.codes].reshape(-1, form.block_size)
    whole *= absmax[:, None]
    return whole.reshape(-1)[: form.shape[0] * form.shape[1]].reshape(form.shape)


def digest_of(weight: np.ndarray) -> str:
    """What tells one weight from another when it is not there any more."""
    return hashlib.sha256(np.ascontiguousarray(weight).tobytes()).hexdigest()


def _nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The number of the level nearest to each value; the lower one of two."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, values).astype(np.uint8)


class QuantisedProduct(nn.Cell):
    """x W^T of a weight that is kept as codes. The weight is made anew in every call, and again for the gradient of x.

    Shapes: x ``(rows, in)``, the codes as in :class:`Codes`, y ``(rows, out)``. No gradient goes to the codes.
    """

    mindpet_kernel = "quantised_product"  # what mindpet.kernels.accelerate replaces it by

    def __init__(self, form: Form):
        super().__init__(auto_prefix=False)
        self.form = form
        self.block_size, self.blocks, self.shape = form.block_size, form.blocks, form.shape
        self.entries = form.shape[0] * form.shape[1]
        self.table, self.dynamic = Tensor(form.table), Tensor(DYNAMIC)
        self.forward, self.backward = ops.MatMul(transpose_b=True), ops.MatMul()

    def weight(self, codes, absmax, scales, offset):
        """The weight, float32: (out, in)."""
        if absmax.dtype == mstype.uint8:
            groups = ops.gather(self.dynamic, absmax.astype(mstype.int32), 0).reshape((-1, GROUP))
            absmax = (groups * scales.reshape((-1, 1)) + offset).reshape((-1,))[: self.blocks]  # (blocks,)
        levels = ops.gather(self.table, codes.astype(mstype.int32), 0).reshape((-1, self.block_size))
        whole = (levels * absmax.reshape((-1, 1))).reshape((-1,))  # (blocks * block_size,)
        return whole[: self.entries].reshape(self.shape)

    def construct(self, x, codes, absmax, scales, offset):
        return self.forward(x, self.weight(codes, absmax, scales, offset).astype(x.dtype))

    def bprop(self, x, codes, absmax, scales, offset, out, dout):
        codes_then = ops.depend(codes, dout)  # not before: or the forward pass would keep its weight until then
        slope = self.backward(dout, self.weight(codes_then, absmax, scales, offset).astype(dout.dtype))
        rest = ops.zeros_like(codes), ops.zeros_like(absmax), ops.zeros_like(scales), ops.zeros_like(offset)
        return slope, *rest
