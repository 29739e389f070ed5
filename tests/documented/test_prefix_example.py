"""The example of Prefix-Tuning: the two matrices are taken in __init__ and train."""

import math

import mindspore
import mindspore.nn as nn
import numpy
from mindspore.common.tensor import Tensor

# step 1: import PrefixLayer
from mindpet.delta.prefix_layer import PrefixLayer
from mindpet.graph.freeze_utils import freeze_delta
from tests.documented.tuning import assert_restores, cross_entropy, tune

BATCH, SEQ, HEADS, HIDDEN = 2, 16, 20, 1280


# the model's attention layer
class MaskSelfAttention(nn.Cell):
    def __init__(self, seq_length=1024):
        super().__init__()
        self.seq_length = seq_length
        # step 2: define the PrefixLayer
        self.prefix = PrefixLayer(
            prefix_token_num=10,
            batch_size=2,
            num_heads=20,
            hidden_dim=1280,
            embed_dim=512,
            mid_dim=512,
            dropout_rate=0.1,
        )
        # define the prefix matrices
        self.past_key = self.prefix.past_key_reparam
        self.past_value = self.prefix.past_value_reparam
        # step 3: define the help matrices
        self.help_matrix = Tensor(
            numpy.ones([self.prefix.batch_size, self.prefix.num_heads - 1, seq_length, seq_length])
        )
        self.help = Tensor(
            numpy.ones(
                [
                    self.prefix.batch_size,
                    self.prefix.num_heads,
                    seq_length,
                    self.prefix.prefix_token_num // self.prefix.batch_size,
                ]
            )
        )

    def construct(self, input_tensor, attention_mask):
        query = input_tensor[0]
        key = input_tensor[1]
        value = input_tensor[2]
        # step 2: put the prefix matrices before key and value
        key = mindspore.ops.concat((self.past_key, key), 0)
        value = mindspore.ops.concat((self.past_value, value), 0)
        # step 3: extend the mask by the help matrices
        attention_mask = mindspore.ops.concat((attention_mask, self.help_matrix), 1)
        attention_mask = mindspore.ops.concat((attention_mask, self.help), -1)
        # what the example leaves out: the attention itself
        query, key, value = self.split_heads(query), self.split_heads(key), self.split_heads(value)
        scores = mindspore.ops.matmul(query, key.swapaxes(2, 3)) / math.sqrt(HIDDEN // HEADS)
        scores = scores + (1 - attention_mask.astype(scores.dtype)) * -10000.0  # (batch, heads, seq, 5 + seq)
        mixed = mindspore.ops.matmul(mindspore.ops.softmax(scores), value)
        return mixed.swapaxes(1, 2).reshape((BATCH * self.seq_length, HIDDEN))

    def split_heads(self, rows):
        return rows.reshape((BATCH, -1, HEADS, HIDDEN // HEADS)).swapaxes(1, 2)


class Network(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, HIDDEN)
        self.attention = MaskSelfAttention(seq_length=SEQ)
        self.head = nn.Dense(HIDDEN, 3)

    def construct(self, input_ids, attention_mask):
        rows = self.embedding(input_ids).reshape((-1, HIDDEN))  # (batch * seq, hidden)
        rows = self.attention((rows, rows, rows), attention_mask)
        return self.head(rows.reshape((BATCH, SEQ, HIDDEN)).mean(1))


class WithLoss(nn.Cell):
    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network
        self.loss = cross_entropy()

    def construct(self, input_ids, attention_mask, labels):
        return self.loss(self.network(input_ids, attention_mask), labels)


def test_the_example_trains_both_matrices(mode, rng, tmp_path):
    network = Network()
    past_key, past_value = network.attention.past_key, network.attention.past_value
    assert isinstance(past_key, mindspore.Parameter)
    assert isinstance(past_value, mindspore.Parameter)
    assert past_key is not past_value
    assert past_key.shape == past_value.shape == (10, 1280)
    started = past_key.asnumpy().copy(), past_value.asnumpy().copy()

    def freeze(with_loss):
        # freeze all cell except Prefix and head
        freeze_delta(model=with_loss.network, mode="prefix", exclude=["*head*"])

    ids = rng.integers(0, 30, size=(8, SEQ)).astype(numpy.int32)
    mask = numpy.tril(numpy.ones((8, 1, SEQ, SEQ)))  # as float64 as the help matrices are
    labels = rng.integers(0, 3, size=8).astype(numpy.int32)
    outcome = tune(WithLoss(network), freeze, (ids, mask, labels), tmp_path, batch=BATCH)

    for parameter, start in zip((past_key, past_value), started):
        assert parameter.requires_grad
        assert parameter.name in outcome.trained
        assert (parameter.asnumpy() != start).any(axis=1).all()  # every virtual token moved
        numpy.testing.assert_array_equal(outcome.saved[parameter.name].asnumpy(), parameter.asnumpy())
    assert past_key.name != past_value.name
    assert (past_key.asnumpy() != past_value.asnumpy()).any()
    assert outcome.changed == {past_key.name, past_value.name, "head.weight", "head.bias"}
    assert set(outcome.saved) == outcome.trained
    assert "embedding.embedding_table" not in outcome.trained

    outcome.network = network
    assert_restores(outcome, Network(), ids[:BATCH], mask[:BATCH])
