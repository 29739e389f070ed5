"""What a compiled step of a cache remembers of the state of its network: nothing."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet import PTuning2Config, inject
from mindpet.models.generation import generate
from tests.models.causal import WORDS, build, tokens

FIRST = 7
DROPOUT = {"n_layer": 1, "attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}


def train_a_step(network):
    """By SGD, with a learning rate of 0: with dropout, and nothing changes but what is compiled."""

    def loss(ids, mask):
        return ops.cross_entropy(network(ids, mask)[:, :-1].reshape((-1, WORDS)), ids[:, 1:].reshape(-1))

    network.set_train(True)
    ids = Tensor(tokens(2, 8))
    optimizer = nn.SGD(network.trainable_params(), learning_rate=0.0)
    optimizer(ms.value_and_grad(loss, None, optimizer.parameters)(ids, ops.ones_like(ids))[1])


def after_the_first_token(network):
    """Logits, in the state that the network is in."""
    return network.step([[FIRST]], None, network.new_cache(1, 20)).asnumpy()


def test_dropout_in_training_leaves_nothing_behind_in_what_is_generated(mode):
    fresh, network = build("gpt2, untied", **DROPOUT), build("gpt2, untied", **DROPOUT)
    expected, expected_logits = list(generate(fresh, [FIRST], max_tokens=8)), after_the_first_token(fresh)
    for _ in range(2):
        train_a_step(network)
        assert np.abs(after_the_first_token(network) - expected_logits).max() > 0.1
        for _ in range(2):
            assert list(generate(network, [FIRST], max_tokens=8)) == expected
        assert network.training
        network.set_train(False)
        np.testing.assert_array_equal(after_the_first_token(network), expected_logits)


def test_a_prefix_that_fails_is_left_in_the_state_that_it_was_in():
    network = inject(build("llama"), PTuning2Config(tokens=3))
    network.set_train(True)
    network.prefix_slot.construct = _fails
    with pytest.raises(OSError, match="no prefix"):
        network.new_cache(1, 4)
    assert network.prefix_slot.training


def _fails():
    raise OSError("no prefix")
