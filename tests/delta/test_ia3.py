"""(IA)^3: where the factors go, and what merging does to the bias."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import IA3Config, inject, merge, unmerge
from mindpet.delta import IA3Dense


def made(rng, feedforward, activation=None):
    layer = IA3Dense.from_dense(nn.Dense(5, 4, activation=activation), IA3Config(feedforward=feedforward))
    for parameter in layer.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    return layer


@pytest.mark.parametrize("feedforward", [(), ("*",)])
def test_outputs_are_those_of_the_formula(mode, rng, feedforward):
    layer = made(rng, feedforward, "relu")
    x = rng.standard_normal((2, 3, 5)).astype(np.float32)
    w, b, factors = (p.asnumpy().astype(np.float64) for p in (layer.weight, layer.bias, layer.mindpet_delta_ia3_l))
    factors = factors.reshape(-1)
    expected = (factors * x) @ w.T + b if feedforward else factors * (x @ w.T + b)
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), np.maximum(expected, 0), atol=1e-5)


def test_it_starts_at_one():
    assert (IA3Dense.from_dense(nn.Dense(5, 4), IA3Config()).mindpet_delta_ia3_l.asnumpy() == 1).all()


def test_patterns_say_whose_input_is_multiplied():
    network = nn.SequentialCell(nn.Dense(5, 4), nn.Dense(4, 3))
    inject(network, IA3Config(targets=["*"], feedforward="1"))
    assert [cell.mindpet_delta_ia3_l.shape for cell in network] == [(4, 1), (1, 4)]
    assert [cell.on_input for cell in network] == [False, True]
    with pytest.raises(ValueError, match="match no cell"):
        inject(nn.SequentialCell(nn.Dense(5, 4)), IA3Config(targets=["*"], feedforward=["mlp"]))
    with pytest.raises(TypeError, match="'feedforward' must be a pattern or a list of them"):
        IA3Config(feedforward=[3])


def test_merging_changes_the_bias_and_unmerging_brings_it_back(rng):
    network = nn.SequentialCell(nn.Dense(5, 4))
    inject(network, IA3Config(targets=["0"]))
    layer = network[0]
    layer.bias.set_data(Tensor(rng.standard_normal(4).astype(np.float32)))
    layer.mindpet_delta_ia3_l.set_data(Tensor(np.array([[2], [1], [0], [-1]], np.float32)))
    before = layer.bias.asnumpy().copy()
    merge(network)
    np.testing.assert_array_equal(network[0].bias.asnumpy(), before * [2, 1, 0, -1])
    unmerge(network)
    np.testing.assert_array_equal(network[0].bias.asnumpy(), before)


def test_a_shared_bias_is_not_merged():
    network = nn.SequentialCell(nn.Dense(4, 4), nn.Dense(4, 4))
    network[1].bias = network[0].bias
    inject(network, IA3Config(targets=["0"]))
    with pytest.raises(ValueError, match="other cells use its bias"):
        merge(network)
