"""What a compiled step of a cache remembers of the state of its network: nothing."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet import PTuning2Config, inject
from mindpet.models.generation import generate
from tests.models.causal import build, tokens

PROMPT = tokens(1, 6)[0].tolist()
DROPOUT = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}


def train_a_step(network):
    """By SGD with a learning rate of 0, with dropout: nothing changes but what is compiled."""

    def loss(ids, mask):
        return ops.cross_entropy(network(ids, mask)[:, :-1].reshape((-1, 31)), ids[:, 1:].reshape(-1))

    network.set_train(True)
    ids = Tensor(tokens(2, 8))
    optimizer = nn.SGD(network.trainable_params(), learning_rate=0.0)
    optimizer(ms.value_and_grad(loss, None, optimizer.parameters)(ids, ops.ones_like(ids))[1])


def continued(network, training):
    """Eight tokens after the prompt, by steps of the network in that state."""
    network.set_train(training)
    cache = network.new_cache(1, 20)
    found, rows = [], np.array([PROMPT])
    for _ in range(8):
        values = network.step(rows, None, cache).asnumpy()
        found.append(values)
        rows = values.argmax(-1)[:, None]
    return np.concatenate(found)


def test_after_a_training_step_texts_are_those_of_a_fresh_network(mode):
    expected = list(generate(build("gpt2, untied", **DROPOUT), PROMPT, max_tokens=8))
    network = build("gpt2, untied", **DROPOUT)
    train_a_step(network)
    for _ in range(2):
        assert list(generate(network, PROMPT, max_tokens=8)) == expected
    assert network.training


def test_steps_drop_out_in_training_and_at_no_other_time(mode):
    expected = continued(build("gpt2, untied", **DROPOUT), False)
    network = build("gpt2, untied", **DROPOUT)
    assert np.abs(continued(network, True) - expected).max() > 0.1
    np.testing.assert_array_equal(continued(network, False), expected)
    assert np.abs(continued(network, True) - expected).max() > 0.1
    np.testing.assert_array_equal(continued(network, False), expected)


def test_a_prefix_that_fails_is_left_in_the_state_that_it_was_in():
    network = inject(build("llama"), PTuning2Config(tokens=3))
    network.set_train(True)
    network.prefix_slot.construct = _fails
    with pytest.raises(OSError, match="no prefix"):
        network.new_cache(1, 4)
    assert network.prefix_slot.training


def _fails():
    raise OSError("no prefix")
