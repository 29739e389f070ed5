"""What :func:`mindpet.kernels.accelerate` puts in the place of Cells: kernels for float32, else MindSpore's operators.

They take the original's parameters, under the same names, and its arguments.
"""

from typing import Any

from mindspore import dtype as mstype
from mindspore import nn, ops

from mindpet.kernels import operators


class FastGELU(nn.GELU):
    """GELU, exact or in its tanh form."""

    def __init__(self, original: nn.GELU):
        tanh = original.approximate == "tanh"
        super().__init__(tanh)
        self.fast = operators.TanhGELU() if tanh else operators.GELU()

    def construct(self, x):
        if x.dtype == mstype.float32:
            return self.fast(x)
        return ops.gelu(x, approximate=self.approximate)


class FastLayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, with the original's gamma and beta."""

    def __init__(self, original: nn.LayerNorm):
        nn.Cell.__init__(self)
        for name in ("normalized_shape", "begin_norm_axis", "begin_params_axis", "epsilon", "layer_norm"):
            setattr(self, name, getattr(original, name))
        self.gamma, self.beta = original.gamma, original.beta
        self.fast = operators.LayerNorm(original.epsilon)

    def construct(self, x):
        if x.dtype == mstype.float32 and x.shape[-1] == self.gamma.shape[0]:
            return self.fast(x, self.gamma, self.beta)
        y, _, _ = self.layer_norm(x, self.gamma.astype(x.dtype), self.beta.astype(x.dtype))
        return y


class FastMaskedSoftmax(nn.Cell):
    """Softmax of ``scores + mask``: `construct` takes (scores, mask), both of four axes."""

    def __init__(self, original: nn.Cell):
        super().__init__()
        self.fast = operators.MaskedSoftmax()
        self.softmax = ops.Softmax(axis=-1)

    def construct(self, scores, mask):
        four_axes = len(scores.shape) == 4 and len(mask.shape) == 4 and scores.shape[-1] == mask.shape[-1]
        if four_axes and scores.dtype == mstype.float32 and mask.dtype == mstype.float32:
            return self.fast(scores, mask)
        return self.softmax(scores + ops.stop_gradient(mask))


class FastRMSNorm(nn.Cell):
    """RMSNorm over the last axis: the original has `weight` and `epsilon`, `construct` takes (x)."""

    def __init__(self, original: Any):
        super().__init__()
        self.weight, self.epsilon = original.weight, original.epsilon
        self.fast = operators.RMSNorm(original.epsilon)

    def construct(self, x):
        if x.dtype == mstype.float32 and self.weight.dtype == mstype.float32:
            return self.fast(x, self.weight)
        wide = x.astype(mstype.float32)
        scale = ops.rsqrt(ops.square(wide).mean(-1, keep_dims=True) + self.epsilon)
        return (wide * scale).astype(x.dtype) * self.weight.astype(x.dtype)


class FastGatedSiLU(nn.Cell):
    """silu(gate) * up: `construct` takes (gate, up)."""

    def __init__(self, original: nn.Cell):
        super().__init__()
        self.fast = operators.GatedSiLU()

    def construct(self, gate, up):
        if gate.dtype == mstype.float32 and up.dtype == mstype.float32 and gate.shape == up.shape:
            return self.fast(gate, up)
        return gate * ops.sigmoid(gate) * up


class FastCrossEntropy(nn.Cell):
    """The loss of each row, 0 where its label is negative: `construct` takes (logits, labels)."""

    def __init__(self, original: nn.Cell):
        super().__init__()
        self.fast = operators.CrossEntropy()

    def construct(self, logits, labels):
        return self.fast(logits.astype(mstype.float32), labels.astype(mstype.int32))
