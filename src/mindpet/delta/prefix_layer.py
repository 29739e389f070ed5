"""Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li and Liang 2021, arXiv:2101.00190, section 4.

::

    index ── embedding ── dropout ── Linear ── tanh ── Linear ──┬── key   (tokens, hidden)
                                                                └── value (tokens, hidden)
"""

from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from mindpet import _checks
from mindpet.delta.method import DeltaConfig, Method
from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.utils.version_control import get_dropout


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(DeltaConfig):
    """A trained prefix before the keys and values of every attention layer.

    Attributes:
        tokens: length of the prefix.
        embed_dim: size of the embedding that the reparameterisation starts from.
        mid_dim: width of its hidden layer.
        projection: whether keys and values come out of the reparameterisation, as the paper trains them, or are
            trained themselves, starting from what it gives.
        dropout: probability, on the embedding of the reparameterisation, in training only.
    """

    tokens: int = 20
    embed_dim: int = 128
    mid_dim: int = 256
    projection: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.boolean(owner, "projection", self.projection)
        for name in ("tokens", "embed_dim", "mid_dim"):
            _checks.positive_int(owner, name, getattr(self, name))
        _checks.rate(owner, "dropout", self.dropout, allow_int=True)


class PrefixLayer(nn.Cell):
    r"""The prefix of one attention layer: a key and a value for each of its virtual tokens.

    .. math:: (K, V) = \mathrm{split}\bigl(\tanh(\mathrm{dropout}(E)\, W_1^T + b_1)\, W_2^T + b_2\bigr)

    Shapes: E ``(tokens, embed)``, W_1 ``(mid, embed)``, W_2 ``(2 * hidden, mid)``, K and V ``(tokens, hidden)``.

    There are two ways to use it. *Calling* the layer in ``construct`` gives (K, V) through the network above, as the
    paper trains it (section 4.3). Or take `past_key_reparam` and `past_value_reparam`, two parameters that start with
    the network's output and train by themselves. :meth:`fold` writes the network's present output into the two
    parameters, as the paper does after training.

    Args:
        prefix_token_num: virtual tokens, a multiple of `batch_size`; a multiple of 8 is fast on Ascend.
        batch_size: samples in a batch, for networks that share the tokens out over the batch.
        num_heads: attention heads.
        hidden_dim: size of a key and of a value, all heads together.
        embed_dim: size of the embedding.
        mid_dim: width of the hidden layer.
        dropout_rate: probability of zeroing an entry of the embedding, in training only.

    Raises:
        TypeError: an argument that is not a positive int.
        ValueError: `prefix_token_num` is not a multiple of `batch_size`; `dropout_rate` is not in [0, 1).

    >>> prefix = PrefixLayer(10, batch_size=2, num_heads=4, hidden_dim=16, embed_dim=8, mid_dim=8)
    >>> key, value = prefix()
    >>> key.shape, prefix.past_key_reparam.shape
    ((10, 16), (10, 16))
    """

    delta_method = "prefix"

    def __init__(
        self,
        prefix_token_num: int,
        batch_size: int,
        num_heads: int,
        hidden_dim: int,
        embed_dim: int,
        mid_dim: int = 512,
        dropout_rate: float = 0.1,
    ):
        super().__init__()
        owner = type(self).__name__
        self.prefix_token_num = _checks.positive_int(owner, "prefix_token_num", prefix_token_num)
        self.batch_size = _checks.positive_int(owner, "batch_size", batch_size)
        self.num_heads = _checks.positive_int(owner, "num_heads", num_heads)
        self.hidden_dim = _checks.positive_int(owner, "hidden_dim", hidden_dim)
        self.embed_dim = _checks.positive_int(owner, "embed_dim", embed_dim)
        self.mid_dim = _checks.positive_int(owner, "mid_dim", mid_dim)
        self.dropout_rate = _checks.rate(owner, "dropout_rate", dropout_rate, allow_int=True)
        if self.prefix_token_num % self.batch_size:
            raise ValueError(
                f"For '{owner}', 'prefix_token_num' must be a multiple of 'batch_size' ({self.batch_size}), "
                f"but got {_checks.shown(prefix_token_num)}."
            )
        self.mindpet_delta_prefixtuning_embedding = Parameter(
            initializer(Normal(0.02), (self.prefix_token_num, self.embed_dim)),
            name="mindpet_delta_prefixtuning_embedding",
        )
        self.mindpet_delta_prefixtuning_in = nn.Dense(self.embed_dim, self.mid_dim)
        self.mindpet_delta_prefixtuning_out = nn.Dense(self.mid_dim, 2 * self.hidden_dim)
        self.dropout = get_dropout(self.dropout_rate)
        self.tanh = ops.Tanh()
        key, value = self._network_output()
        self.mindpet_delta_prefixtuning_past_key = Parameter(key, name="mindpet_delta_prefixtuning_past_key")
        self.mindpet_delta_prefixtuning_past_value = Parameter(value, name="mindpet_delta_prefixtuning_past_value")

    def construct(self):
        rows = self.dropout(self.mindpet_delta_prefixtuning_embedding)  # (tokens, embed)
        rows = self.tanh(self.mindpet_delta_prefixtuning_in(rows))  # (tokens, mid)
        rows = self.mindpet_delta_prefixtuning_out(rows)  # (tokens, 2 * hidden)
        return rows[:, : self.hidden_dim], rows[:, self.hidden_dim :]

    @property
    def past_key_reparam(self) -> Parameter:
        """The key that trains by itself, ``(tokens, hidden)``."""
        return self.mindpet_delta_prefixtuning_past_key

    @property
    def past_value_reparam(self) -> Parameter:
        """The value that trains by itself, ``(tokens, hidden)``."""
        return self.mindpet_delta_prefixtuning_past_value

    def fold(self) -> None:
        """Write what the network gives now, without dropout, into `past_key_reparam` and `past_value_reparam`."""
        key, value = self._network_output()
        self.past_key_reparam.set_data(key)
        self.past_value_reparam.set_data(value)

    def _network_output(self) -> tuple[Tensor, Tensor]:
        """(K, V) computed beside any graph, in NumPy: the layer may be built in either mode."""
        first, second = self.mindpet_delta_prefixtuning_in, self.mindpet_delta_prefixtuning_out
        table, w1, b1, w2, b2 = (
            parameter.asnumpy()
            for parameter in (
                self.mindpet_delta_prefixtuning_embedding.init_data(),
                first.weight.init_data(),
                first.bias.init_data(),
                second.weight.init_data(),
                second.bias.init_data(),
            )
        )
        rows = np.tanh(table @ w1.T + b1) @ w2.T + b2
        key, value = np.split(rows.astype(table.dtype), 2, axis=1)
        return Tensor(np.ascontiguousarray(key)), Tensor(np.ascontiguousarray(value))


class PrefixTuning(PrefixSlot):
    """A slot whose layers each have a trained prefix, shared by every sample.

    Returns, for each layer, the pair (key, value), each ``(tokens, heads, head_dim)``. Cost, with a projection:
    ``layers * (tokens * embed_dim + (embed_dim + 1) * mid_dim + (mid_dim + 1) * 2 * hidden)`` parameters,
    ``layers * 4 * tokens * hidden`` floating-point operations a row, of which each position of the text is one, and
    ``layers * tokens * ((2 * embed_dim + 1) * mid_dim + (2 * mid_dim + 1) * 2 * hidden)`` a call. Cost, without a
    projection: ``layers * 2 * tokens * hidden`` parameters and ``layers * 4 * tokens * hidden`` floating-point
    operations a row.
    """

    delta_method = "prefix"

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, config: PrefixConfig):
        super().__init__(num_layers, num_heads, head_dim)
        hidden = num_heads * head_dim
        self.layers = nn.CellList(
            [
                PrefixLayer(config.tokens, 1, num_heads, hidden, config.embed_dim, config.mid_dim, config.dropout)
                for _ in range(num_layers)
            ]
        )
        self.projection = config.projection
        # of the network and the two parameters beside it, one trains; the other would only idle
        for layer in self.layers:
            if config.projection:
                del layer.mindpet_delta_prefixtuning_past_key, layer.mindpet_delta_prefixtuning_past_value
            else:
                del layer.mindpet_delta_prefixtuning_embedding
                del layer.mindpet_delta_prefixtuning_in, layer.mindpet_delta_prefixtuning_out
        self.heads_shape = (config.tokens, num_heads, head_dim)

    @classmethod
    def from_slot(cls, slot: PrefixSlot, config: PrefixConfig) -> "PrefixTuning":
        """The slot's sizes, filled."""
        return cls(slot.num_layers, slot.num_heads, slot.head_dim, config)

    def construct(self):
        pairs: tuple = ()
        for layer in self.layers:
            if self.projection:
                key, value = layer()
            else:
                key = layer.mindpet_delta_prefixtuning_past_key
                value = layer.mindpet_delta_prefixtuning_past_value
            pairs += ((key.reshape(self.heads_shape), value.reshape(self.heads_shape)),)
        return pairs


METHOD = Method(
    name="prefix",
    config=PrefixConfig,
    trainable=("*mindpet_delta_prefixtuning*",),
    paper="Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv:2101.00190",
    adapt={PrefixSlot: PrefixTuning.from_slot},
    targets=("*prefix",),
    aliases=("prefixtuning",),
    learning_rate=0.005,
)
