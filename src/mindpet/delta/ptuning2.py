"""P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning. Liu et al. 2021, arXiv:2110.07602, section 3.

The prompts of all layers are one table, ``(tokens, layers * 2 * heads * head_dim)``; with a projection it comes out of
an embedding and a two-layer network.
"""

from dataclasses import dataclass
from typing import Any

from mindspore import Parameter, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal, initializer

from mindpet import _checks
from mindpet.delta.method import DeltaConfig, Method
from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.delta.strategy import require_devices
from mindpet.utils.version_control import get_dropout


@dataclass(frozen=True, kw_only=True)
class PTuning2Config(DeltaConfig):
    """Trained prompts in every attention layer.

    Attributes:
        tokens: prompts in each layer.
        projection: whether a two-layer network makes the prompts from an embedding.
        projection_dim: width of that network.
        dropout: probability, on the prompts, in training only.
    """

    tokens: int = 20
    projection: bool = False
    projection_dim: int = 128
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _checks.positive_int("PTuning2Config", "tokens", self.tokens)
        _checks.boolean("PTuning2Config", "projection", self.projection)
        _checks.positive_int("PTuning2Config", "projection_dim", self.projection_dim)
        _checks.rate("PTuning2Config", "dropout", self.dropout, allow_int=True)


class PrefixEncoder(nn.Cell):
    r"""The prompts of every layer, as keys and values for a batch.

    .. math:: P = E \quad\text{or, with a projection,}\quad P = \tanh(E W_1^T + b_1)\, W_2^T + b_2

    Shapes, with ``w = layers * 2 * heads * kv_channels``: P ``(tokens, w)``; E ``(tokens, w)``, or with a projection
    E ``(tokens, heads * kv_channels)``, W_1 ``(projection, heads * kv_channels)``, W_2 ``(w, projection)``.

    Calling ``encoder(batch_size, dtype=float16)`` returns one Tensor a layer, ``(2, batch, heads, tokens,
    kv_channels)``: key first, value second. Cost without projection: ``tokens * w`` parameters.

    Args:
        pre_seq_len: prompts in each layer.
        num_layers: layers of the network.
        num_heads: heads of keys and values.
        kv_channels: size of each head.
        prefix_projection: whether a two-layer network makes the prompts.
        projection_dim: width of that network.
        dropout_prob: probability of zeroing an entry of the prompts, in training only.
        parallel_config: with `data_parallel` and `model_parallel`, or None: sharded at once.
        out_perm: order in which the axes (batch, tokens, layers * 2, heads, kv_channels) come out.

    Raises:
        TypeError: a size that is not a positive int, `prefix_projection` that is not a bool.
        ValueError: `dropout_prob` is not in [0, 1); `out_perm` does not order five axes.

    >>> encoder = PrefixEncoder(3, 2, 4, 8, False, 16, 0.0)
    >>> pairs = encoder(5)
    >>> len(pairs), pairs[0][0].shape
    (2, (5, 4, 3, 8))
    """

    delta_method = "ptuning2"

    def __init__(
        self,
        pre_seq_len: int,
        num_layers: int,
        num_heads: int,
        kv_channels: int,
        prefix_projection: bool,
        projection_dim: int,
        dropout_prob: float,
        parallel_config: Any = None,
        out_perm: tuple[int, ...] = (2, 0, 3, 1, 4),
    ):
        super().__init__()
        owner = type(self).__name__
        self.pre_seq_len = _checks.positive_int(owner, "pre_seq_len", pre_seq_len)
        self.num_layers = _checks.positive_int(owner, "num_layers", num_layers)
        self.num_heads = _checks.positive_int(owner, "num_heads", num_heads)
        self.kv_channels = _checks.positive_int(owner, "kv_channels", kv_channels)
        self.prefix_projection = _checks.boolean(owner, "prefix_projection", prefix_projection)
        self.projection_dim = _checks.positive_int(owner, "projection_dim", projection_dim)
        self.dropout_prob = _checks.rate(owner, "dropout_prob", dropout_prob, allow_int=True)
        if not isinstance(out_perm, (tuple, list)):
            raise TypeError(f"For '{owner}', 'out_perm' must be a tuple, but got {_checks.shown(out_perm)}.")
        if sorted(out_perm) != [0, 1, 2, 3, 4]:
            raise ValueError(
                f"For '{owner}', 'out_perm' must order the axes 0 to 4, but got {_checks.shown(out_perm)}."
            )
        self.out_perm = tuple(out_perm)
        hidden = self.num_heads * self.kv_channels
        width = self.num_layers * 2 * hidden
        self.mindpet_delta_ptuning2_embedding = Parameter(
            initializer(Normal(0.02), (self.pre_seq_len, hidden if self.prefix_projection else width)),
            name="mindpet_delta_ptuning2_embedding",
        )
        if self.prefix_projection:
            self.mindpet_delta_ptuning2_in = nn.Dense(hidden, self.projection_dim)
            self.mindpet_delta_ptuning2_out = nn.Dense(self.projection_dim, width)
        self.tanh = ops.Tanh()
        self.dropout = get_dropout(self.dropout_prob)
        self.cast, self.reshape, self.tile = ops.Cast(), ops.Reshape(), ops.Tile()
        self.transpose = ops.Transpose()
        self.split = ops.Split(self.out_perm.index(2), self.num_layers)
        if parallel_config is not None:
            self.shard(parallel_config.data_parallel, parallel_config.model_parallel)

    def prompts(self):
        """P, as (tokens, layers * 2, heads, kv_channels)."""
        table = self.mindpet_delta_ptuning2_embedding
        if self.prefix_projection:
            table = self.mindpet_delta_ptuning2_out(self.tanh(self.mindpet_delta_ptuning2_in(table)))
        return self.reshape(table, (self.pre_seq_len, self.num_layers * 2, self.num_heads, self.kv_channels))

    def construct(self, batch_size, dtype=mstype.float16):
        prompts = self.cast(self.prompts(), dtype)
        prompts = self.reshape(prompts, (1,) + prompts.shape)
        prompts = self.dropout(self.tile(prompts, (batch_size, 1, 1, 1, 1)))  # (batch, tokens, layers * 2, heads, kv)
        return self.split(self.transpose(prompts, self.out_perm))

    def shard(self, data_parallel: int, model_parallel: int) -> None:
        """Cut the batch over `data_parallel` devices and the heads over `model_parallel`.

        Raises:
            TypeError, ValueError: not a positive int; heads that `model_parallel` does not divide; more devices than
                there are.
        """
        dp, mp = self.require_cut(data_parallel, model_parallel)
        whole = (dp, 1, 1, mp, 1)  # batch, tokens, layers * 2, heads, kv_channels
        if self.prefix_projection:
            self.mindpet_delta_ptuning2_in.matmul.shard(((1, 1), (1, 1)))
            self.mindpet_delta_ptuning2_in.bias_add.shard(((1, 1), (1,)))
            self.tanh.shard(((1, 1),))
            self.mindpet_delta_ptuning2_out.matmul.shard(((1, 1), (1, 1)))
            self.mindpet_delta_ptuning2_out.bias_add.shard(((1, 1), (1,)))
        self.tile.shard(((1, 1, 1, mp, 1),))
        self.dropout.dropout.shard((whole,))
        self.transpose.shard((whole,))
        self.split.shard((tuple(whole[axis] for axis in self.out_perm),))

    def require_cut(self, data_parallel: int, model_parallel: int) -> tuple[int, int]:
        """The checks of :meth:`shard`, without writing anything."""
        dp = _checks.positive_int("PrefixEncoder", "data_parallel", data_parallel)
        mp = _checks.positive_int("PrefixEncoder", "model_parallel", model_parallel)
        if self.num_heads % mp:
            raise ValueError(
                f"For 'PrefixEncoder', 'model_parallel' must divide the {self.num_heads} heads, "
                f"but got {_checks.shown(model_parallel)}."
            )
        require_devices("PrefixEncoder", f"data_parallel={dp}, model_parallel={mp}", dp * mp)
        return dp, mp


class PTuning2(PrefixSlot):
    """A slot filled by one :class:`PrefixEncoder`: the same prompts for every sample.

    Returns, for each layer, the pair (key, value), each ``(tokens, heads, head_dim)``. Cost, without a projection:
    ``layers * 2 * tokens * hidden`` parameters and ``layers * 4 * tokens * hidden`` floating-point operations a row, of
    which each position of the text is one. Cost, with a projection:
    ``tokens * hidden + (hidden + 1) * projection_dim + (projection_dim + 1) * layers * 2 * hidden`` parameters,
    ``layers * 4 * tokens * hidden`` floating-point operations a row and
    ``tokens * ((2 * hidden + 1) * projection_dim + (2 * projection_dim + 1) * layers * 2 * hidden)`` a call.
    """

    delta_method = "ptuning2"

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, config: PTuning2Config):
        super().__init__(num_layers, num_heads, head_dim)
        self.encoder = PrefixEncoder(
            config.tokens, num_layers, num_heads, head_dim, config.projection, config.projection_dim, config.dropout
        )

    @classmethod
    def from_slot(cls, slot: PrefixSlot, config: PTuning2Config) -> "PTuning2":
        """The slot's sizes, filled."""
        return cls(slot.num_layers, slot.num_heads, slot.head_dim, config)

    def construct(self):
        prompts = self.encoder.dropout(self.encoder.prompts())  # (tokens, layers * 2, heads, head_dim)
        pairs: tuple = ()
        for layer in range(self.num_layers):
            pairs += ((prompts[:, 2 * layer], prompts[:, 2 * layer + 1]),)
        return pairs


METHOD = Method(
    name="ptuning2",
    config=PTuning2Config,
    trainable=("*mindpet_delta_ptuning2*",),
    paper="Liu et al. 2021, P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally, arXiv:2110.07602",
    adapt={PrefixSlot: PTuning2.from_slot},
    targets=("*prefix",),
    learning_rate=0.005,
)
