"""The example of P-Tuning v2: the encoder's prompts go to every layer's attention."""

import math
from types import SimpleNamespace

import mindspore as ms
import mindspore.nn as nn
import mindspore.ops.operations as P
import numpy as np
from mindspore import ops

from mindpet.delta.ptuning2 import PrefixEncoder
from mindpet.graph import freeze_delta
from tests.documented.tuning import assert_restores, cross_entropy, tune

HEADS, HEAD_DIM, LAYERS, PROMPTS = 2, 4, 2, 3
HIDDEN = HEADS * HEAD_DIM


# the model's attention layer
class SelfAttention(nn.Cell):
    def __init__(self, pre_seq_len):
        super().__init__()
        self.pre_seq_len = pre_seq_len
        self.qkv = nn.Dense(HIDDEN, 3 * HIDDEN).to_float(ms.float16)
        self.out = nn.Dense(HIDDEN, HIDDEN)

    # the example leaves out `self`, or this
    @staticmethod
    def add_prefix(prefix_key_value, pre_seq_len, key, value, attention_mask):
        # [bs, num_heads, seq_length, head_dim]
        seq_len = key.shape[2]

        # [bs, num_heads, pre_seq_len, head_dim]
        prefix_key = prefix_key_value[0]
        prefix_value = prefix_key_value[1]
        cat = P.Concat(2)
        key = cat([prefix_key, key])
        value = cat([prefix_value, value])

        batch_size = attention_mask.shape[0]
        prefix_mask = attention_mask.new_ones((batch_size, 1, seq_len, pre_seq_len))
        m_cat = P.Concat(3)

        # [bs, 1, seq_len, pre_seq_len + seq_len]
        attention_mask = m_cat((prefix_mask, attention_mask))

        return key, value, attention_mask

    def attention(self, query, key, value, attention_mask):
        scores = ops.matmul(query, key.swapaxes(2, 3)) / math.sqrt(HEAD_DIM)
        scores = ops.softmax(scores.astype(ms.float32) + (1 - attention_mask) * -10000.0)
        return ops.matmul(scores.astype(value.dtype), value)

    def construct(self, input_tensor, attention_mask, prefix_key_value):
        batch_size, seq_len, _ = input_tensor.shape
        packed = self.qkv(input_tensor).reshape((batch_size, seq_len, 3, HEADS, HEAD_DIM)).transpose((2, 0, 3, 1, 4))
        query_layer, key_layer, value_layer = packed[0], packed[1], packed[2]
        key_layer, value_layer, attention_mask = self.add_prefix(
            prefix_key_value, self.pre_seq_len, key_layer, value_layer, attention_mask
        )
        context_layer = self.attention(query_layer, key_layer, value_layer, attention_mask)
        context_layer = context_layer.swapaxes(1, 2).reshape((batch_size, seq_len, HIDDEN))
        return input_tensor + self.out(context_layer.astype(ms.float32))


class ChatModel(nn.Cell):
    """What the example derives from."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(20, HIDDEN)
        self.layers = nn.CellList([SelfAttention(config.pet_config.pre_seq_len) for _ in range(LAYERS)])
        self.lm = nn.Dense(HIDDEN, 3)

    def construct(self, input_ids, attention_mask, prefix_key_values):
        hidden = self.embedding(input_ids)
        for index in range(LAYERS):
            hidden = self.layers[index](hidden, attention_mask, prefix_key_values[index])
        return self.lm(hidden.mean(1))


class ChatModelWithPt2(ChatModel):
    def __init__(self, config):
        super().__init__(config)
        self.prefix_encoder = PrefixEncoder(
            config.pet_config.pre_seq_len,
            config.pet_config.num_layers,
            config.pet_config.num_heads,
            config.pet_config.kv_channels,
            config.pet_config.prefix_projection,
            config.pet_config.projection_dim,
            config.pet_config.dropout_prob,
        )

    def construct(self, input_ids, attention_mask):
        batch_size = input_ids.shape[0]
        prefix_key_values = self.prefix_encoder(batch_size)
        return super().construct(input_ids, attention_mask, prefix_key_values)


class WithLoss(nn.Cell):
    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network
        self.loss = cross_entropy()

    def construct(self, input_ids, attention_mask, labels):
        return self.loss(self.network(input_ids, attention_mask), labels)


def config():
    return SimpleNamespace(
        pet_config=SimpleNamespace(
            pre_seq_len=PROMPTS,
            num_layers=LAYERS,
            num_heads=HEADS,
            kv_channels=HEAD_DIM,
            prefix_projection=False,
            projection_dim=8,
            dropout_prob=0.1,
        )
    )


def test_the_example_trains_the_prompts_alone(mode, rng, tmp_path):
    def freeze(with_loss):
        # freeze all cell except ptuning2
        freeze_delta(model=with_loss.network, mode="ptuning2")

    network = ChatModelWithPt2(config())
    table = network.prefix_encoder.mindpet_delta_ptuning2_embedding
    started = table.asnumpy().copy()
    ids = rng.integers(0, 20, size=(8, 5)).astype(np.int32)
    mask = np.tril(np.ones((8, 1, 5, 5), np.float32))
    labels = rng.integers(0, 3, size=8).astype(np.int32)
    outcome = tune(WithLoss(network), freeze, (ids, mask, labels), tmp_path)
    name = "prefix_encoder.mindpet_delta_ptuning2_embedding"
    assert outcome.trained == outcome.changed == set(outcome.saved) == {name}
    assert (table.asnumpy() != started).mean() > 0.9  # key and value of every layer

    outcome.network = network
    assert_restores(outcome, ChatModelWithPt2(config()), ids, mask)
