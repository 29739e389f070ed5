"""What :func:`mindpet.kernels.accelerate` puts in the place of Cells: kernels for float32, else MindSpore's operators.

They take the original's parameters, under the same names, and its arguments.
"""

from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet import _compat
from mindpet.delta.dense import share_dense
from mindpet.kernels import operators

_WORTHWHILE = 1 << 20  # multiplications of a product below which MindSpore's operator does as well
_ROWS = 48  # below which packing the weight costs too much


class Fast:
    """A Cell with a kernel for some inputs and MindSpore's operators for the rest."""

    # Flags that `to_float` sets: in PyNative mode it casts what goes into operators, not what goes into Cells.
    fp16 = bf16 = False

    def takes(self, x):
        """Whether the kernel can take this Tensor; a graph must know its shape when it is compiled."""
        return x.dtype == mstype.float32 and _compat.is_known(x.shape) and not (self.fp16 or self.bf16)


class FastGELU(Fast, nn.GELU):
    """GELU, exact or in its tanh form."""

    def __init__(self, original: nn.GELU):
        tanh = original.approximate == "tanh"
        super().__init__(tanh)
        self.fast = operators.TanhGELU() if tanh else operators.GELU()

    def construct(self, x):
        if self.takes(x):
            return self.fast(x)
        return ops.gelu(x, approximate=self.approximate)


class FastGELUTanh(Fast, nn.Cell):
    """GELU in its tanh form: `construct` takes (x)."""

    def __init__(self, original: nn.Cell):
        super().__init__(auto_prefix=False)
        self.fast, self.original = operators.TanhGELU(), original

    def construct(self, x):
        if self.takes(x):
            return self.fast(x)
        return self.original(x)


class FastLayerNorm(Fast, nn.LayerNorm):
    """LayerNorm over the last axis, with the original's gamma and beta."""

    def __init__(self, original: nn.LayerNorm):
        nn.Cell.__init__(self)
        for name in ("normalized_shape", "begin_norm_axis", "begin_params_axis", "epsilon", "layer_norm"):
            setattr(self, name, getattr(original, name))
        self.gamma, self.beta = original.gamma, original.beta
        self.fast = operators.LayerNorm(original.epsilon)

    def construct(self, x):
        if self.takes(x) and x.shape[-1:] == self.gamma.shape:
            return self.fast(x, self.gamma, self.beta)
        y, _, _ = self.layer_norm(x, self.gamma.astype(x.dtype), self.beta.astype(x.dtype))
        return y


def is_mask_of(mask, scores):
    """Whether a mask of that shape broadcasts to scores of this one, which stay as they are."""
    fits = len(scores) == 4 and len(mask) == 4 and mask[3] == scores[3]
    for axis in range(3):
        fits = fits and mask[axis] in (1, scores[axis])
    return fits


class FastMaskedSoftmax(Fast, nn.Cell):
    """Softmax of ``scores + mask``: `construct` takes (scores, mask), both of four axes."""

    def __init__(self, original: nn.Cell):
        super().__init__()
        self.fast = operators.MaskedSoftmax()
        self.softmax = ops.Softmax(axis=-1)

    def construct(self, scores, mask):
        if self.takes(scores) and self.takes(mask) and is_mask_of(mask.shape, scores.shape):
            return self.fast(scores, mask)
        return self.softmax(scores + ops.stop_gradient(mask))


class _FastProduct(Fast, nn.Cell):
    """What the products of dense layers share: they take what is large enough."""

    def multiplies(self, x, weight):
        """Whether the kernel can take these rows (rows, in) and this weight (out, in), and is faster."""
        known = self.takes(x) and self.takes(weight) and len(x.shape) == 2
        return known and x.shape[0] >= _ROWS and x.shape[0] * weight.size >= _WORTHWHILE


class FastMatMul(_FastProduct):
    """The product of a dense layer, ``x W^T``, in the place of its operator."""

    transpose_a, transpose_b = False, True

    def __init__(self, original: ops.MatMul):
        super().__init__(auto_prefix=False)
        self.fast, self.original = operators.Product(), original
        self.packed: Any = None  # the same of its only weight for a few rows: see mindpet.kernels.packing
        self.uses_packed = False

    def construct(self, x, weight):
        if self.multiplies(x, weight):
            return self.fast(x, weight)
        if self.uses_packed and self.takes(x) and len(x.shape) == 2 and x.shape[0] <= operators.FEW:
            return self.packed(x, weight)
        return self.original(x, weight)


class FastBiasedProduct(_FastProduct):
    """The product of a dense layer and its bias at once, ``x W^T + b``, for what it `multiplies`."""

    def __init__(self):
        super().__init__()
        self.fast = operators.BiasedProduct()

    def construct(self, x, weight, bias):
        return self.fast(x, weight, bias)


class FastDense(nn.Dense):
    """A dense layer whose product and bias are computed at once."""

    plain_dense = True  # see mindpet.delta.dense

    def __init__(self, original: nn.Dense):
        share_dense(original, self)
        self.fused_product = FastBiasedProduct()

    def construct(self, x):
        rows = x if x.ndim == 2 else self.reshape(x, (-1, x.shape[-1]))
        if self.fused_product.multiplies(rows, self.weight):
            rows = self.fused_product(rows, self.weight, self.bias)
        else:
            rows = self.bias_add(self.matmul(rows, self.weight), self.bias)
        if self.activation_flag:
            rows = self.activation(rows)
        return rows if x.ndim == 2 else self.reshape(rows, x.shape[:-1] + (rows.shape[-1],))


class FastLoRA(_FastProduct):
    """A dense layer and its LoRA branch at once, ``x W^T + b + s x A^T B^T``, for what it `multiplies`."""

    def __init__(self, scale: float, out: int):
        super().__init__()
        self.fast = operators.LoRAProduct(scale)
        self.no_bias = Tensor(np.zeros(out, np.float32))

    def construct(self, x, weight, bias, a, b):
        return self.fast(x, weight, self.no_bias if bias is None else bias, a, b)


class FastQuantisedProduct(Fast, nn.Cell):
    """x W^T of a weight that is kept as codes: `construct` takes (x, codes, absmax, scales, offset)."""

    def __init__(self, original: Any):
        super().__init__(auto_prefix=False)
        self.fast, self.original = operators.QuantisedProduct(original.form), original

    def construct(self, x, codes, absmax, scales, offset):
        if self.takes(x) and len(x.shape) == 2:
            return self.fast(x, codes, absmax, scales, offset)
        return self.original(x, codes, absmax, scales, offset)


def is_plain_attention(cell: Any) -> bool:
    """Whether a kernel may stand for the whole of it: a usual dropout and softmax, which nobody watches or casts."""
    usual = type(cell.dropout) is nn.Dropout and cell.dropout.p is not None
    usual = usual or hasattr(cell.dropout, "has_words_for")
    softmax = vars(type(cell.softmax)).get("mindpet_kernel") == "masked_softmax"
    inner = [each for _, each in cell.cells_and_names()]
    return usual and softmax and not any(map(_compat.has_hooks, inner)) and not any(map(_compat.forced_dtype, inner))


class FastAttention(Fast, nn.Cell):
    """Attention of every head, where dropout is off or can be resumed; see DotProductAttention in mindpet.models."""

    def __init__(self, original: Any):
        super().__init__(auto_prefix=False)
        self.original = original
        original.softmax = FastMaskedSoftmax(original.softmax)
        plain = isinstance(original.dropout, nn.Dropout)
        self.drops = not plain or original.dropout.p > 0
        self.resumable = not plain  # DropoutKeys says when it puts a ResumableDropout into the original
        heads = original.heads, original.groups, original.scale
        self.whole = operators.Attention(*heads)
        self.dropped = operators.Attention(*heads, 1.0 / (1.0 - original.dropout.p)) if self.drops else self.whole
        self.no_words, self.no_keys = Tensor([0], mstype.int32), Tensor([0, 0, 0, 0], mstype.int32)

    def construct(self, query, key, value, mask):
        known = self.takes(query) and self.takes(key) and self.takes(value) and self.takes(mask)
        scores = query.shape[0], self.original.heads, query.shape[1], key.shape[1]
        if not (known and is_mask_of(mask.shape, scores)):
            return self.original(query, key, value, mask)
        if not (self.original.dropout.training and self.drops):
            return self.whole(query, key, value, mask, self.no_words, self.no_keys)
        rows = query.shape[0] * self.original.heads * query.shape[1]
        if self.resumable and self.original.dropout.has_words_for(rows, key.shape[1]):
            dropout = self.original.dropout
            return self.dropped(query, key, value, mask, dropout.words, dropout.keys_now())
        return self.original(query, key, value, mask)


class FastRMSNorm(Fast, nn.Cell):
    """RMSNorm over the last axis: the original has `weight` and `epsilon`, `construct` takes (x)."""

    def __init__(self, original: Any):
        super().__init__()
        self.weight, self.epsilon = original.weight, original.epsilon
        self.fast = operators.RMSNorm(original.epsilon)

    def construct(self, x):
        if self.takes(x) and self.weight.dtype == mstype.float32 and x.shape[-1:] == self.weight.shape:
            return self.fast(x, self.weight)
        wide = x.astype(mstype.float32)
        scale = ops.rsqrt(ops.square(wide).mean(-1, keep_dims=True) + self.epsilon)
        return (wide * scale).astype(x.dtype) * self.weight


class FastRotary(Fast, nn.Cell):
    """x cos + swap(x) sin: `construct` takes (x, cos, sin), all of four axes."""

    def __init__(self, original: nn.Cell):
        super().__init__(auto_prefix=False)
        self.fast, self.original = operators.Rotary(), original

    def construct(self, x, cos, sin):
        known = self.takes(x) and self.takes(cos) and self.takes(sin)
        if known and sin.shape == cos.shape == (x.shape[0], x.shape[1], 1, x.shape[3]) and x.shape[3] % 2 == 0:
            return self.fast(x, cos, sin)
        return self.original(x, cos, sin)


class FastGatedSiLU(Fast, nn.Cell):
    """silu(gate) * up: `construct` takes (gate, up)."""

    def __init__(self, original: nn.Cell):
        super().__init__()
        self.fast = operators.GatedSiLU()

    def construct(self, gate, up):
        if self.takes(gate) and self.takes(up) and gate.shape == up.shape:
            return self.fast(gate, up)
        return gate * ops.sigmoid(gate) * up


class FastCrossEntropy(Fast, nn.Cell):
    """The loss of each row, 0 where its label is negative: `construct` takes (logits, labels)."""

    def __init__(self, original: nn.Cell):
        super().__init__()
        self.fast = operators.CrossEntropy()

    def construct(self, logits, labels):
        if self.takes(logits) and _compat.is_known(labels.shape) and labels.shape == logits.shape[:-1]:
            return self.fast(logits, labels.astype(mstype.int32))
        counted = ops.where(labels < 0, -100, labels)
        return ops.cross_entropy(logits, counted, ignore_index=-100, reduction="none")


class FastHeadLoss(_FastProduct):
    """The loss of each row by a frozen tied head: `construct` takes (rows, table, labels)."""

    def __init__(self, original: Any):
        super().__init__(auto_prefix=False)
        self.fast, self.original = operators.HeadLoss(), original
        original.head, original.cross_entropy = FastMatMul(original.head), FastCrossEntropy(original.cross_entropy)

    def construct(self, rows, table, labels):
        fit = _compat.is_known(labels.shape) and labels.shape == rows.shape[:1]
        if self.original.training and fit and self.multiplies(rows, table):  # in training the gradient is wanted too
            return self.fast(rows, table, labels.astype(mstype.int32))
        return self.original(rows, table, labels)


class FastSquareSum(Fast, nn.Cell):
    """The sum of the squares of all entries: `construct` takes (x)."""

    def __init__(self, original: nn.Cell):
        super().__init__(auto_prefix=False)
        self.fast, self.original = operators.SquareSum(), original

    def construct(self, x):
        if self.takes(x):
            return self.fast(x)
        return self.original(x)
