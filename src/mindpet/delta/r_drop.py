"""R-Drop: Regularized Dropout for Neural Networks. Liang et al. 2021, arXiv:2106.14448, section 2.1."""

from typing import Any

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet import _checks

IGNORED = -100  # the label of a position that counts for nothing, as in MindSpore's cross_entropy


@ops.constexpr
def _check_inputs(alpha: Any, logits_shape: tuple, labels_shape: tuple, logits_type: Any, labels_are_float: bool):
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"For 'RDropLoss', 'alpha' must be an int or a float, but got {_checks.shown(alpha)}.")
    if not any(logits_type == kind for kind in _checks.FLOAT_TYPES):
        raise TypeError(f"For 'RDropLoss', 'logits' must be float32 or float16, but got {logits_type}.")
    wanted = logits_shape if labels_are_float else logits_shape[:-1]
    if tuple(labels_shape) != tuple(wanted):
        kind = "class probabilities" if labels_are_float else "class indices"
        raise ValueError(
            f"For 'RDropLoss', 'label_ids' are {kind} and must have shape {tuple(wanted)} for logits of shape "
            f"{tuple(logits_shape)}, but got shape {tuple(labels_shape)}."
        )
    if len(logits_shape) > 1 and logits_shape[0] % 2:
        raise ValueError(
            "For 'RDropLoss', 'logits' must hold two copies of each sample, neighbours along the first axis (see "
            f"rdrop_repeat), but got {logits_shape[0]} rows."
        )


class RDropLoss(nn.Cell):
    r"""Cross entropy of two passes over the same batch, and how far the two disagree.

    .. math:: L = \frac{1}{2N}\sum_{i=1}^{2N} -\log p_i(y_i)
              + \alpha\, \frac{1}{N}\sum_{i=1}^{N}
              \frac{\mathrm{KL}(p_{2i-1}\|p_{2i}) + \mathrm{KL}(p_{2i}\|p_{2i-1})}{4}

    This is the paper's objective halved, since its cross entropy is the sum over the two passes and this one the mean.
    The gradient flows through both sides of each divergence.

    Shapes: logits ``(2N, C)`` or, for a loss on every token, ``(2N, T, C)``; rows 2i and 2i + 1 are the two passes
    over sample i, as :func:`rdrop_repeat` lays them. Logits of shape ``(C,)`` are one row without a second pass: the
    loss is its cross entropy. The loss is a scalar in the dtype of the logits. Log-probabilities in the place of logits
    give the same value.

    Labels are class indices of an integer dtype, without the last axis, or class probabilities of the logits' shape.
    An index is in [0, C), or -100, which marks a position that counts for nothing, in either term.

    Raises:
        TypeError: `alpha` is not an int or a float; logits are not floats.
        ValueError: an odd number of rows; labels of another shape.

    >>> logits = Tensor([[2.0, 0.0], [2.0, 0.0]])
    >>> round(float(RDropLoss()(logits, Tensor([0, 0]))), 4)
    0.1269
    """

    def construct(self, logits, label_ids, alpha=4):
        labels_are_float = label_ids.dtype in (mstype.float32, mstype.float16, mstype.bfloat16, mstype.float64)
        _check_inputs(alpha, logits.shape, label_ids.shape, logits.dtype, labels_are_float)
        log_p = ops.log_softmax(logits.astype(mstype.float32), -1)
        if labels_are_float:
            entropy = -(log_p * label_ids.astype(mstype.float32)).sum(-1)  # (2N,) or (2N, T)
            weight = ops.ones_like(entropy)
        else:
            index = label_ids.astype(mstype.int32)  # first: unsigned labels do not compare with -100
            weight = (index != IGNORED).astype(mstype.float32)  # (2N,) or (2N, T)
            index = (index * weight.astype(mstype.int32)).expand_dims(-1)
            entropy = -ops.gather_elements(log_p, log_p.ndim - 1, index).squeeze(-1) * weight
        total = weight.sum()
        safe = total + (total == 0).astype(mstype.float32)  # all positions ignored: 0 / 1, not 0 / 0
        loss = entropy.sum() / safe
        if logits.ndim > 1 and alpha != 0:
            first, second = log_p[0::2], log_p[1::2]
            # KL(p||q) + KL(q||p) in one sum: (p - q) (log p - log q)
            both = ((ops.exp(first) - ops.exp(second)) * (first - second)).sum(-1)  # (N,) or (N, T)
            loss = loss + alpha * (both * weight[0::2]).sum() / (4 * safe / 2)
        return loss.astype(logits.dtype)


def rdrop_repeat(*inputs: Tensor) -> Any:
    """Each sample twice, the two copies neighbours: ``(N, ...)`` to ``(2N, ...)``.

    Returns a tuple for several inputs and a Tensor for one.

    Raises:
        TypeError: no input.

    >>> rdrop_repeat(Tensor([1, 2])).asnumpy().tolist()
    [1, 1, 2, 2]
    """
    if not inputs:
        raise TypeError("For 'rdrop_repeat', there must be at least one input.")
    outputs: tuple[Tensor, ...] = ()
    for value in inputs:
        pairs = ops.stack((value, value), 1)  # (N, 2, ...)
        outputs += (pairs.reshape((2 * value.shape[0],) + value.shape[1:]),)
    return outputs if len(outputs) > 1 else outputs[0]
