"""Where an attention network takes extra keys and values: the small protocol behind the prefix methods.

A network that prefix methods can tune holds one :class:`PrefixSlot` beside its layers, calls it once in ``construct``
and hands layer i the pair i::

    self.prefix = PrefixSlot(num_layers, num_heads, head_dim)
    ...
    pairs = self.prefix()
    for index, layer in enumerate(self.layers):
        hidden = layer(hidden, mask, pairs[index] if pairs else None)

The attention puts the key and the value, ``(tokens, heads, head_dim)``, before those of every sample, and lets every
position see them.
"""

from mindspore import nn

from mindpet import _checks


class PrefixSlot(nn.Cell):
    """An empty slot: no layer gets a prefix. Prefix-Tuning and P-Tuning v2 replace it by one that has some.

    Args:
        num_layers: attention layers of the network.
        num_heads: heads of keys and values.
        head_dim: size of each head.

    >>> PrefixSlot(2, 4, 8)()
    ()
    """

    def __init__(self, num_layers: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_layers = _checks.positive_int("PrefixSlot", "num_layers", num_layers)
        self.num_heads = _checks.positive_int("PrefixSlot", "num_heads", num_heads)
        self.head_dim = _checks.positive_int("PrefixSlot", "head_dim", head_dim)

    def construct(self):
        return ()
