"""Each kernel as a Cell with its gradient, on float32 Tensors alone; :mod:`mindpet.kernels.cells` chooses when.

A gradient with respect to a parameter is an operator of its own: in graph mode, one that nobody asks for is not run.
Only that of a LoRA branch's B comes with the gradient of what B is multiplied with: both read the same rows once.
"""

from collections.abc import Callable
from typing import Any

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet.delta.blockwise import DYNAMIC, Form
from mindpet.kernels.build import library

FEW = 4  # the most rows that packed weights are multiplied with
BLOCK = 32  # weights of a row of theirs that share a scale and an offset
NARROW = 16  # the largest rank of a LoRA branch whose products with A and B have kernels of their own


def _first(*shapes: Any) -> Any:
    return shapes[0]


def _last_axis(*shapes: Any) -> Any:
    return shapes[0][-1:]


def _second(*shapes: Any) -> Any:
    return shapes[1]


def _rows_and_outputs(*shapes: Any) -> Any:
    return [shapes[0][0], shapes[1][0]]


def _rows_and_inputs(*shapes: Any) -> Any:
    return [shapes[0][0], shapes[1][1]]


def _columns(*shapes: Any) -> Any:
    return [shapes[0][1], shapes[1][1]]


def _one(*shapes: Any) -> Any:
    return [1]


def _losses_and_slopes(*shapes: Any) -> Any:
    return shapes[2], shapes[0]


def _branch(*shapes: Any) -> Any:
    return [shapes[0][0], shapes[1][1]], shapes[1]


def _first_three(*shapes: Any) -> Any:
    return shapes[0], shapes[1], shapes[2]


class Kernel(ops.Custom):
    """The compiled function of that name; `shape` says the output's from the inputs', or those of several `outputs`.

    With a `width` the output has the first input's rows and that many columns: PyNative takes operators with the same
    inputs and attributes for the same.
    """

    def __init__(self, function: str, shape: Callable = _first, outputs: int = 1, width: int | None = None):
        if width is not None:

            def shape(x: Any, *rest: Any) -> Any:
                return [x[0], width]

        dtype = mstype.float32 if outputs == 1 else (mstype.float32,) * outputs
        super().__init__(f"{library()}:{function}", shape, dtype, func_type="aot")
        self.function, self.outputs, self.width = function, outputs, width
        if width is not None:
            self.add_prim_attr("width", width)

    def __deepcopy__(self, memo: dict) -> "Kernel":  # MindSpore's does not know what a Custom is made from
        return Kernel(self.function, self.out_shape, self.outputs, self.width)


class _Function(nn.Cell):
    """y = f(x)."""

    def __init__(self, name: str):
        super().__init__(auto_prefix=False)
        self.forward = Kernel(f"{name}_forward")
        self.backward = Kernel(f"{name}_backward")

    def construct(self, x):
        return self.forward(x)

    def bprop(self, x, out, dout):
        return (self.backward(x, dout),)


class GELU(_Function):
    r"""The exact form, :math:`x\,\Phi(x)`."""

    def __init__(self):
        super().__init__("gelu")


class TanhGELU(_Function):
    r"""The tanh form, :math:`\tfrac x2 (1 + \tanh(\sqrt{2/\pi}\,(x + 0.044715 x^3)))`."""

    def __init__(self):
        super().__init__("gelu_tanh")


class GatedSiLU(nn.Cell):
    r""":math:`\mathrm{gate}\,\sigma(\mathrm{gate}) \cdot \mathrm{up}` of two Tensors of one shape."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = Kernel("gated_silu_forward")
        self.backward = Kernel("gated_silu_backward")

    def construct(self, gate, up):
        return self.forward(gate, up)

    def bprop(self, gate, up, out, dout):
        return self.backward(gate, up, dout), self.forward(gate, dout)


class Rotary(nn.Cell):
    """x cos + swap(x) sin, where swap exchanges the halves of the last axis; cos and sin are constants.

    Shapes: x ``(batch, n, heads, d)``, cos and sin ``(batch, n, 1, d)``.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = Kernel("rotary_forward")
        self.backward = Kernel("rotary_backward")

    def construct(self, x, cos, sin):
        return self.forward(x, cos, sin)

    def bprop(self, x, cos, sin, out, dout):
        return self.backward(dout, cos, sin), ops.zeros_like(cos), ops.zeros_like(sin)


class LayerNorm(nn.Cell):
    r""":math:`\gamma\,(x - \mathrm{E}x) / \sqrt{\mathrm{Var}\,x + \epsilon} + \beta` over the last axis.

    Shapes: x ``(..., size)``, gamma and beta ``(size,)``.
    """

    def __init__(self, epsilon: float):
        super().__init__(auto_prefix=False)
        self.epsilon = Tensor([epsilon], mstype.float32)
        self.forward = Kernel("layer_norm_forward")
        self.backward = Kernel("layer_norm_backward")
        self.backward_gamma = Kernel("layer_norm_backward_gamma", _last_axis)
        self.backward_beta = Kernel("sum_of_rows", _last_axis)

    def construct(self, x, gamma, beta):
        return self.forward(x, gamma, beta, self.epsilon)

    def bprop(self, x, gamma, beta, out, dout):
        dx = self.backward(x, gamma, self.epsilon, dout)
        return dx, self.backward_gamma(x, self.epsilon, dout), self.backward_beta(dout)


class RMSNorm(nn.Cell):
    r""":math:`w\,x / \sqrt{\mathrm{E}x^2 + \epsilon}` over the last axis: x ``(..., size)``, w ``(size,)``."""

    def __init__(self, epsilon: float):
        super().__init__(auto_prefix=False)
        self.epsilon = Tensor([epsilon], mstype.float32)
        self.forward = Kernel("rms_norm_forward")
        self.backward = Kernel("rms_norm_backward")
        self.backward_weight = Kernel("rms_norm_backward_weight", _last_axis)

    def construct(self, x, weight):
        return self.forward(x, weight, self.epsilon)

    def bprop(self, x, weight, out, dout):
        return self.backward(x, weight, self.epsilon, dout), self.backward_weight(x, self.epsilon, dout)


class MaskedSoftmax(nn.Cell):
    """Softmax of ``scores + mask`` over the last axis; the mask is a constant.

    Shapes: scores ``(batch, heads, queries, keys)``; the mask the same, with 1 for any axis but the last.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = Kernel("masked_softmax_forward")
        self.backward = Kernel("softmax_backward")

    def construct(self, scores, mask):
        return self.forward(scores, mask)

    def bprop(self, scores, mask, out, dout):
        return self.backward(out, dout), ops.zeros_like(mask)


class Dropout(nn.Cell):
    """x times a mask of 0 and `kept`, which follows from `words` and `keys` as in :class:`Attention`."""

    def __init__(self, kept: float):
        super().__init__(auto_prefix=False)
        self.kept = Tensor([kept], mstype.float32)
        self.apply_mask = Kernel("dropout_apply")

    def construct(self, x, words, keys):
        return self.apply_mask(x, words, keys, self.kept)

    def bprop(self, x, words, keys, out, dout):
        return self.apply_mask(dout, words, keys, self.kept), ops.zeros_like(words), ops.zeros_like(keys)


class Product(nn.Cell):
    """x W^T: ``(rows, in)``, ``(out, in)``."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = Kernel("dense_forward", _rows_and_outputs)
        self.backward = Kernel("dense_backward", _rows_and_inputs)
        self.backward_weight = Kernel("dense_backward_weight", _columns)

    def construct(self, x, weight):
        return self.forward(x, weight)

    def bprop(self, x, weight, out, dout):
        return self.backward(dout, weight), self.backward_weight(dout, x)


class BiasedProduct(nn.Cell):
    """x W^T + b: ``(rows, in)``, ``(out, in)``, ``(out,)``."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = Kernel("dense_forward_bias", _rows_and_outputs)
        self.backward = Kernel("dense_backward", _rows_and_inputs)
        self.backward_weight = Kernel("dense_backward_weight", _columns)
        self.backward_bias = Kernel("sum_of_rows", _last_axis)

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias)

    def bprop(self, x, weight, bias, out, dout):
        return self.backward(dout, weight), self.backward_weight(dout, x), self.backward_bias(dout)


class LoRAProduct(nn.Cell):
    """x W^T + b + s x A^T B^T: ``(rows, in)``, ``(out, in)``, ``(out,)``, ``(rank, in)``, ``(out, rank)``.

    The branch is a few more columns of the one product, and so is its gradient with respect to x.
    """

    def __init__(self, scale: float):
        super().__init__(auto_prefix=False)
        self.down, self.narrow_down = ops.MatMul(transpose_b=True), Kernel("narrow_forward", _rows_and_outputs)
        self.sum = _LoRASum(scale)

    def construct(self, x, weight, bias, a, b):
        hidden = self.narrow_down(x, a) if a.shape[0] <= NARROW else self.down(x, a)  # (rows, rank)
        return self.sum(x, weight, bias, a, b, ops.stop_gradient(hidden))


class _LoRASum(nn.Cell):
    """The same, with h = x A^T given: it need not be computed again in the backward pass."""

    def __init__(self, scale: float):
        super().__init__(auto_prefix=False)
        self.scale = Tensor([scale], mstype.float32)
        self.forward = Kernel("lora_forward", _rows_and_outputs)
        self.backward = Kernel("lora_backward", _rows_and_inputs)
        self.backward_weight = Kernel("dense_backward_weight", _columns)
        self.backward_bias = Kernel("sum_of_rows", _last_axis)
        self.up, self.across = ops.MatMul(), ops.MatMul(transpose_a=True)
        self.narrow_up = Kernel("narrow_backward", _branch, 2)
        self.narrow_across = Kernel("narrow_backward_weight", _columns)

    def construct(self, x, weight, bias, a, b, hidden):
        return self.forward(x, weight, bias, hidden, b, self.scale)

    def bprop(self, x, weight, bias, a, b, hidden, out, dout):
        if a.shape[0] <= NARROW:
            slope, for_b = self.narrow_up(dout, b, hidden, self.scale)  # (rows, rank), (out, rank)
            for_a = self.narrow_across(slope, x)
        else:
            slope, for_b = self.up(dout, b) * self.scale, self.across(dout, hidden) * self.scale
            for_a = self.across(slope, x)
        dx = self.backward(dout, weight, slope, a)
        for_weight, for_bias = self.backward_weight(dout, x), self.backward_bias(dout)
        return dx, for_weight, for_bias, for_a, for_b, ops.zeros_like(hidden)


class PackedProduct(nn.Cell):
    """x W^T of a few rows of x and a W that codes and factors say too, as :mod:`mindpet.kernels.packing` makes them.

    Only the gradients read W. A graph would keep several copies of a Tensor, and has none of a Parameter; that these
    are, but no parameters of the network, whose checkpoints know nothing of them.
    """

    hidden_parameters = "codes", "factors"  # see mindpet.graph.blocks

    def __init__(self, name: str, codes: Tensor, factors: Tensor):
        super().__init__(auto_prefix=False)
        for attribute, value in zip(self.hidden_parameters, (codes, factors)):
            hidden = Parameter(value, name=f"mindpet_packed_{attribute}_{name}", requires_grad=False)
            self.__dict__[attribute] = hidden  # not by setattr, which would make it the network's
        self.forward = Kernel("packed_forward", _rows_and_outputs)
        self.backward, self.backward_weight = ops.MatMul(), ops.MatMul(transpose_a=True)

    def construct(self, x, weight):
        return self.forward(x, weight, self.codes, self.factors)

    def bprop(self, x, weight, out, dout):
        return self.backward(dout, weight), self.backward_weight(dout, x)


class SquareSum(nn.Cell):
    """The sum of the squares of all entries. No gradient goes through it."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = Kernel("square_sum", _one)

    def construct(self, x):
        return self.forward(x).reshape(())


class QuantisedProduct(nn.Cell):
    """x W^T of a weight that is kept as codes: ``(rows, in)``, then what `mindpet.delta.blockwise` keeps of it.

    No gradient goes to the codes, and the weight is not kept for the gradient of x.
    """

    def __init__(self, form: Form):
        super().__init__(auto_prefix=False)
        out, into = form.shape
        self.tables = Tensor(form.table), Tensor(DYNAMIC), Tensor([out, into, form.block_size], mstype.int32)
        self.forward = Kernel("quantised_forward", width=out)
        self.backward = Kernel("quantised_backward", width=into)

    def construct(self, x, codes, absmax, scales, offset):
        return self.forward(x, codes, absmax, scales, offset, *self.tables)

    def bprop(self, x, codes, absmax, scales, offset, out, dout):
        slope = self.backward(dout, codes, absmax, scales, offset, *self.tables)
        rest = ops.zeros_like(codes), ops.zeros_like(absmax), ops.zeros_like(scales), ops.zeros_like(offset)
        return slope, *rest


class Attention(nn.Cell):
    r""":math:`\mathrm{drop}(\mathrm{softmax}(s\,Q_h K_h^T + M))\,V_h` for each head h; the mask is a constant.

    Nothing of the size of the scores is kept between the forward and the backward pass.

    Shapes: query ``(batch, queries, heads * dim)``; key and value ``(batch, keys, groups * dim)``, each group for
    heads / groups heads; mask ``(batch, heads, queries, keys)`` with 1 for any axis but the last. `words` and `keys`
    make the masks of :class:`~mindpet.train.dropout.ResumableDropout`: `keys` holds its two keys of a step, its
    threshold and the rank of the process, int32 ``(4,)``. One word alone: nothing is dropped.
    """

    def __init__(self, heads: int, groups: int, scale: float, kept: float = 1.0):
        super().__init__(auto_prefix=False)
        self.counts = Tensor([heads, groups], mstype.int32)
        self.factors = Tensor([scale, kept], mstype.float32)
        self.forward = Kernel("attention_forward")
        self.backward = Kernel("attention_backward", _first_three, 3)

    def construct(self, query, key, value, mask, words, keys):
        return self.forward(query, key, value, mask, words, keys, self.counts, self.factors)

    def bprop(self, query, key, value, mask, words, keys, out, dout):
        inputs = query, key, value, mask, words, keys, self.counts, self.factors
        slopes = self.backward(*inputs, out, dout)
        rest = ops.zeros_like(mask), ops.zeros_like(words), ops.zeros_like(keys)
        return slopes[0], slopes[1], slopes[2], *rest


class CrossEntropy(nn.Cell):
    """-log(softmax(logits)[label]) of each row, 0 for a label below 0: ``(rows, classes)``, int32 ``(rows,)``."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = Kernel("cross_entropy_forward", _second)
        self.backward = Kernel("cross_entropy_backward")

    def construct(self, logits, labels):
        return self.forward(logits, labels)

    def bprop(self, logits, labels, out, dout):
        return self.backward(logits, labels, dout), ops.zeros_like(labels)


class HeadLoss(nn.Cell):
    """-log(softmax(x W^T)[label]) of each row, 0 for a label below 0, and the logits are nowhere in memory.

    Shapes: x ``(rows, in)``, W ``(classes, in)``, labels int32 ``(rows,)``. The gradient of x comes with the losses;
    that of W, if somebody asks for it, computes the logits again.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.both = _LossesAndSlopes()

    def construct(self, x, weight, labels):
        return self.both(x, weight, labels)[0]


class _LossesAndSlopes(nn.Cell):
    """The losses and d(each loss)/d(its row); no gradient goes through the latter."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = Kernel("head_loss", _losses_and_slopes, 2)
        self.logits = Kernel("dense_forward", _rows_and_outputs)
        self.backward_logits = Kernel("cross_entropy_backward")
        self.backward_weight = Kernel("dense_backward_weight", _columns)

    def construct(self, x, weight, labels):
        return self.forward(x, weight, labels)

    def bprop(self, x, weight, labels, out, dout):
        dx = out[1] * dout[0].expand_dims(1)
        slopes = self.backward_logits(self.logits(x, weight), labels, dout[0])
        return dx, self.backward_weight(slopes, x), ops.zeros_like(labels)
