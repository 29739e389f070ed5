"""The example of R-Drop: repeat the inputs, then lose on both copies."""

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor

from mindpet.delta import RDropLoss, rdrop_repeat
from tests import oracles


class BaseModel(nn.Cell):
    """What the example derives from."""

    def __init__(self, is_training):
        super().__init__()
        self.is_training = is_training


class Bert(nn.Cell):
    """What stands in for the encoder: it has a dropout, so the two copies differ."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.dropout = nn.Dropout(p=0.2)
        self.dense = nn.Dense(8, 3)

    def construct(self, input_ids, input_mask, token_type_id):
        hidden = self.dropout(self.embedding(input_ids + token_type_id)) * input_mask.expand_dims(-1)
        return self.dense(hidden.mean(1))


class BertClsModel(BaseModel):
    def __init__(self, is_training):
        super().__init__(is_training)
        self.bert = Bert()
        # origin self.loss
        # self.loss = CrossEntropyLoss()

        # replace CrossEntropyLoss with RDropLoss
        self.loss = RDropLoss()

    def construct(self, input_ids, input_mask, token_type_id, label_ids):
        # repeat the input
        input_ids, input_mask, token_type_id, label_ids = rdrop_repeat(input_ids, input_mask, token_type_id, label_ids)

        logits = self.bert(input_ids, input_mask, token_type_id)
        if self.is_training:
            # call RDropLoss.construct()
            return self.loss(logits, label_ids, alpha=4)
        return logits


def batch(rng):
    ids = Tensor(rng.integers(0, 18, size=(4, 6)), ms.int32)
    return ids, Tensor(np.ones((4, 6)), ms.float32), ids % 2, Tensor([0, 1, 2, 0], ms.int32)


def test_the_example_trains(mode, rng):
    model = BertClsModel(is_training=True).set_train(True)
    step = nn.TrainOneStepCell(model, nn.Adam(model.trainable_params(), learning_rate=0.05)).set_train(True)
    inputs = batch(rng)
    losses = [float(step(*inputs)) for _ in range(30)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_the_two_copies_differ_in_training_and_agree_in_evaluation(mode, rng):
    model = BertClsModel(is_training=False)
    logits = model.set_train(True)(*batch(rng)).asnumpy()
    assert logits.shape == (8, 3)
    assert (logits[0::2] != logits[1::2]).any()
    logits = model.set_train(False)(*batch(rng)).asnumpy()
    np.testing.assert_array_equal(logits[0::2], logits[1::2])


def test_the_loss_is_that_of_its_logits(mode, rng):
    model = BertClsModel(is_training=True).set_train(False)
    inputs = batch(rng)
    loss = float(model(*inputs))
    model.is_training = False
    logits = BertClsModel.construct(model, *inputs).asnumpy()
    labels = oracles.one_hot(np.repeat(inputs[3].asnumpy(), 2), 3)
    np.testing.assert_allclose(loss, oracles.r_drop(logits, labels, 4), rtol=1e-4)
