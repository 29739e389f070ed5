"""Where an attention layer takes a prompt beside its own attention: the small protocol behind the adaption prompt.

An attention that can be tuned so holds one :class:`AdaptionSlot`, calls it once in ``construct``, and adds what its
queries find in the prompt to what they find in the text::

    self.adaption = AdaptionSlot(hidden_size)
    ...
    prompt = self.adaption()
    if len(prompt) > 0:
        rows = prompt[0].astype(mixed.dtype)                                            # (tokens, hidden)
        mixed = mixed + attend_prompt(query, self.key(rows), self.value(rows), prompt[1], head_dim)
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet import _checks


class AdaptionSlot(nn.Cell):
    """An empty slot: attention as it is. The adaption prompt replaces it by one that returns a prompt and a gate.

    Args:
        hidden_size: features of what the keys and values of the layer are made of.

    >>> AdaptionSlot(8)()
    ()
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = _checks.positive_int("AdaptionSlot", "hidden_size", hidden_size)

    def construct(self):
        return ()


def attend_prompt(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, head_dim: int) -> Tensor:
    r"""What every head finds in a prompt that all samples share: :math:`g\, \mathrm{softmax}(Q K^T / \sqrt{d})\, V`.

    Shapes: query ``(batch, seq, heads * d)``; key and value ``(tokens, groups * d)``, each group of which serves
    heads / groups heads; g ``(1,)``. Returns the shape and dtype of the query; the softmax is computed in float32.

    >>> rows = ops.ones((3, 4))
    >>> attend_prompt(ops.ones((2, 5, 8)), rows, rows, ops.ones((1,)), 4).shape
    (2, 5, 8)
    """
    groups = key.shape[1] // head_dim
    each = query.shape[2] // key.shape[1]  # heads of a group
    rows = (query * head_dim**-0.5).reshape((-1, groups, each, head_dim)).transpose((1, 0, 2, 3))
    scores = ops.BatchMatMul(transpose_b=True)(rows.reshape((groups, -1, head_dim)), _by_group(key, groups))
    weights = ops.Softmax(-1)(scores.astype(mstype.float32))  # (groups, batch * seq * each, tokens)
    weights = (weights * gate.astype(mstype.float32)).astype(query.dtype)
    mixed = ops.BatchMatMul()(weights, _by_group(value, groups)).reshape((groups, -1, each, head_dim))
    return mixed.transpose((1, 0, 2, 3)).reshape(query.shape)


def _by_group(rows, groups):
    """(tokens, groups * d) -> (groups, tokens, d)."""
    return rows.reshape((rows.shape[0], groups, -1)).transpose((1, 0, 2))
