"""MiSS: a shared block, against the formula in NumPy."""

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet import MiSSConfig
from mindpet.delta import MiSSDense


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_outputs_and_delta_are_those_of_the_formula(mode, rng, rank):
    layer = MiSSDense.from_dense(nn.Dense(6, 4, activation="relu"), MiSSConfig(rank=rank))
    for parameter in layer.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    x = rng.standard_normal((2, 3, 6)).astype(np.float32)
    block = layer.mindpet_delta_miss_block.asnumpy().astype(np.float64)
    delta = np.array([[block[inputs % rank, output] for inputs in range(6)] for output in range(4)])
    expected = x @ (layer.weight.asnumpy() + delta).T + layer.bias.asnumpy()
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), np.maximum(expected, 0), atol=1e-5)
    np.testing.assert_allclose(layer.delta_weight().asnumpy(), delta, atol=1e-6)


def test_dropout_is_on_the_branch_alone():
    layer = MiSSDense.from_dense(nn.Dense(6, 4), MiSSConfig(rank=2, dropout=0.5)).set_train()
    x = ops.ones((50, 6))
    assert np.ptp(layer(x).asnumpy(), axis=0).max() == 0  # the branch is zero yet
    layer.mindpet_delta_miss_block.set_data(ops.ones((2, 4)))
    assert np.ptp(layer(x).asnumpy(), axis=0).min() > 0
    assert np.ptp(layer.set_train(False)(x).asnumpy(), axis=0).max() == 0


def test_a_rank_above_the_inputs_is_refused():
    with pytest.raises(ValueError, match="'rank' must be at most 6, the size of the input, but got 7"):
        MiSSDense.from_dense(nn.Dense(6, 4), MiSSConfig(rank=7))
