import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from mindpet.delta import PromptSlot, PTuning, PTuningConfig
from mindpet.parallel.group import Group
from mindpet.train.dropout import DropoutKeys, ResumableDropout


class Two(nn.Cell):
    def __init__(self, p=0.3):
        super().__init__()
        self.first = nn.Dropout(p=p)
        self.second = nn.SequentialCell(nn.Dropout(p=p), nn.Dropout(p=0.0))

    def construct(self, x):
        return self.first(x), self.second(x)


def masks(network, shape=(200, 64)):
    return [(output.asnumpy() != 0) for output in network(ops.ones(shape))]


def test_a_mask_follows_from_seed_and_step_alone(mode):
    one, other = Two(), Two()
    keys, again = DropoutKeys(one, seed=4), DropoutKeys(other, seed=4)
    one.set_train()
    other.set_train()
    keys.set_step(0)
    first = masks(one)
    keys.set_step(1)
    second = masks(one)
    again.set_step(1)  # as after a resume: step 0 was never run here
    np.testing.assert_array_equal(masks(other), second)
    assert (first[0] != second[0]).mean() > 0.3
    assert (first[0] != first[1]).mean() > 0.3


def test_the_share_of_zeros_and_the_scale_are_right(mode):
    network = Two(p=0.3)
    keys = DropoutKeys(network, seed=1)
    network.set_train()
    shares, means = [], []
    for step in range(10):
        keys.set_step(step)
        output = network(ops.ones((300, 100)))[0].asnumpy()
        shares.append((output == 0).mean())
        means.append(output.mean())
    deviation = np.sqrt(0.3 * 0.7 / (300 * 100 * 10))
    assert abs(np.mean(shares) - 0.3) < 5 * deviation
    assert abs(np.mean(means) - 1.0) < 5 * deviation / 0.7


def test_the_dropout_in_an_encoder_of_prompts_follows_too(mode):
    """It is the same for every process: virtual tokens belong to no sample."""
    config = PTuningConfig(tokens=4, encoder="lstm", encoder_hidden=5, dropout=0.5)
    filled = PTuning.from_slot(PromptSlot(nn.Embedding(11, 6)), config)
    network = nn.SequentialCell(filled)
    keys = DropoutKeys(network, seed=4, batch_size=8, group=Group(1, 2))
    network.set_train()
    keys.set_step(0)
    first = network[0]().asnumpy()
    keys.set_step(1)
    assert not np.array_equal(network[0]().asnumpy(), first)
    keys.set_step(0)
    np.testing.assert_array_equal(network[0]().asnumpy(), first)
    (dropped,) = (cell for _, cell in network.cells_and_names() if isinstance(cell, ResumableDropout))
    assert (dropped.rank, dropped.part, dropped.whole) == (0, 1, 1)


def test_entries_are_independent_of_their_neighbours():
    network = Two(p=0.5)
    keys = DropoutKeys(network, seed=2)
    network.set_train()
    signs = []
    for step in range(20):
        keys.set_step(step)
        signs.append(masks(network, (128, 128))[0] * 2.0 - 1.0)
    signs = np.array(signs)
    bound = 5 / np.sqrt(signs.size)
    for shift, axis in ((1, 2), (1, 1), (7, 2), (1, 0)):
        assert abs((signs * np.roll(signs, shift, axis)).mean()) < bound


def test_it_is_silent_in_evaluation(mode):
    network = Two()
    DropoutKeys(network, seed=1)
    network.set_train(False)
    assert all(mask.all() for mask in masks(network))


def test_nothing_of_it_trains_and_p_of_zero_is_left_alone():
    network = Two()
    keys = DropoutKeys(network, seed=1)
    assert keys.count == 2
    assert network.trainable_params() == []
    assert type(network.second[1]) is nn.Dropout


def test_the_gradient_passes_where_the_value_does(mode):
    network = Two()
    keys = DropoutKeys(network, seed=1)
    network.set_train()
    keys.set_step(3)
    x = ops.ones((20, 8))
    output = network(x)[0].asnumpy()
    gradient = ms.grad(network)(x).asnumpy()
    np.testing.assert_allclose(gradient, output + network(x)[1].asnumpy(), atol=1e-6)


@pytest.mark.parametrize("shape", [(600_000, 2), (3, 600_000), ((1 << 19) + 1, 3)])
def test_a_mask_may_be_longer_than_the_pool_of_words(shape):
    network = Two(p=0.3)
    DropoutKeys(network, seed=3)
    network.set_train()
    kept = masks(network, shape)[0]
    assert kept.shape == shape
    assert abs(kept.mean() - 0.7) < 0.005
