"""The parts of attention that all networks here share."""

import math

from mindspore import nn, ops


class MaskedSoftmax(nn.Cell):
    """Softmax of ``scores + mask`` over the last of four axes; the mask is a constant, without a gradient."""

    mindpet_kernel = "masked_softmax"  # what mindpet.kernels.accelerate replaces it by

    def __init__(self):
        super().__init__()
        self.softmax = ops.Softmax(axis=-1)

    def construct(self, scores, mask):
        return self.softmax(scores + ops.stop_gradient(mask))


class DotProductAttention(nn.Cell):
    r"""Attention of every head: :math:`\mathrm{dropout}(\mathrm{softmax}(Q K^T / \sqrt{d} + M))\, V`.

    Shapes: query ``(batch, queries, heads * d)``; key and value ``(batch, keys, groups * d)``, each group of which
    serves heads / groups heads; mask M ``(batch, 1, 1 or queries, keys)``. Returns ``(batch, queries, heads * d)``.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2; groups as in Ainslie et al. 2023, arXiv:2305.13245.
    """

    mindpet_kernel = "attention"

    def __init__(self, heads: int, groups: int, head_dim: int, dropout: float):
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        self.dropout = nn.Dropout(p=dropout)
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = MaskedSoftmax()
        self.scale = 1.0 / math.sqrt(head_dim)

    def construct(self, query, key, value, mask):
        batch, queries, _ = query.shape
        key, value = self.split(key), self.split(value)  # (batch, groups, keys, d)
        query = self.split(query * self.scale).reshape((batch, self.groups, -1, self.head_dim))
        scores = self.scores(query, key).reshape((batch, self.heads, queries, -1))
        weights = self.dropout(self.softmax(scores, mask))  # (batch, heads, queries, keys)
        mixed = self.mix(weights.reshape((batch, self.groups, -1, weights.shape[-1])), value)
        mixed = mixed.reshape((batch, self.heads, queries, self.head_dim)).transpose((0, 2, 1, 3))
        return mixed.reshape((batch, queries, -1))

    def split(self, rows):
        """(batch, n, heads * d) -> (batch, heads, n, d)."""
        return rows.reshape((rows.shape[0], rows.shape[1], -1, self.head_dim)).transpose((0, 2, 1, 3))


def _after_prefix(prefix, rows):
    """(tokens, heads, head_dim), the same for every sample, before (batch, seq, heads * head_dim)."""
    shape = (rows.shape[0], prefix.shape[0], rows.shape[-1])
    prefix = prefix.astype(rows.dtype).reshape((1, *shape[1:]))
    return ops.concat((ops.broadcast_to(prefix, shape), rows), 1)


def attend(core, query, key, value, mask, extra):
    """Attention of a layer's tokens to each other and to what else there is: a prefix, or a cache.

    Args:
        core: a :class:`DotProductAttention`.
        query: ``(batch, seq, heads * head_dim)``.
        key: ``(batch, seq, groups * head_dim)``.
        value: the same.
        mask: of all keys, those of `extra` too, ``(batch, 1, 1 or seq, keys)``.
        extra: None; (key, value) of a prefix; or the buffers of a cache, (key, value, slots to write to).
    """
    if extra is None:
        return core(query, key, value, mask)
    if len(extra) == 2:
        return core(query, _after_prefix(extra[0], key), _after_prefix(extra[1], value), mask)
    return core(query, _written(extra[0], extra[2], key), _written(extra[1], extra[2], value), mask)


def _written(buffer, slots, part):
    """Write (batch, n, heads * head_dim) into slots (batch * n, 1) of a buffer, and return it, (batch, capacity, .).

    The buffer is a Parameter of rows, (batch * capacity, heads * head_dim), which is changed in place.
    """
    batch, _, width = part.shape
    # not ScatterUpdate, whose first write MindSpore 2.7.0 loses in PyNative mode
    rows = ops.ScatterNdUpdate()(buffer, slots, part.reshape((-1, width)).astype(buffer.dtype))
    return rows.reshape((batch, -1, width))
