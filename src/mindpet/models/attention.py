"""The parts of attention that all networks here share."""

from mindspore import nn, ops


class MaskedSoftmax(nn.Cell):
    """Softmax of ``scores + mask`` over the last of four axes; the mask is a constant, without a gradient."""

    mindpet_kernel = "masked_softmax"  # what mindpet.kernels.accelerate replaces it by

    def __init__(self):
        super().__init__()
        self.softmax = ops.Softmax(axis=-1)

    def construct(self, scores, mask):
        return self.softmax(scores + ops.stop_gradient(mask))


def after_prefix(prefix, part):
    """(tokens, heads, head_dim), the same for every sample, before the third axis of (batch, heads, seq, head_dim)."""
    shape = (part.shape[0], prefix.shape[1], prefix.shape[0], prefix.shape[2])
    prefix = prefix.astype(part.dtype).transpose((1, 0, 2)).expand_dims(0)  # (1, heads, tokens, head_dim)
    return ops.concat((ops.broadcast_to(prefix, shape), part), 2)
