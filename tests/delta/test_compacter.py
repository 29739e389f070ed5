"""Compacter: the sum of Kronecker products, what the layers share, its refusals."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import CompacterConfig, inject, load_delta, save_delta
from mindpet.delta import CompacterDense
from tests.oracles import NP_ACTIVATIONS, below, dense, inputs_of_every_rank, randomise, values

DOWN, UP = "mindpet_delta_compacter_down", "mindpet_delta_compacter_up"


def made(activation=None, **options):
    config = CompacterConfig(size=4, phm_dim=2, shared=False, **options)
    return CompacterDense.from_dense(nn.Dense(6, 8, activation=activation), config, None)


def hypercomplex(x, p):
    mark = "mindpet_delta_compacter_"
    b = p[f"{mark}whole"] if f"{mark}whole" in p else p[f"{mark}left"] @ p[f"{mark}right"]
    return x @ sum(np.kron(a, each) for a, each in zip(p[f"{mark}rule"], b)) + p["bias"]


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize(("activation", "non_linearity"), [(None, "relu"), ("relu", "gelu")])
def test_outputs_are_those_of_the_formula(mode, rng, low_rank, activation, non_linearity):
    layer = randomise(made(activation, low_rank=low_rank, rank=3, non_linearity=non_linearity), rng, 0.5)
    p = values(layer)
    for x in inputs_of_every_rank(rng, 6)[1:]:
        hidden = dense(x, p, activation)
        inner = NP_ACTIVATIONS[non_linearity](hypercomplex(hidden, below(p, DOWN)))
        expected = hidden + hypercomplex(inner, below(p, UP))
        np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), expected, atol=5e-4)


def network():
    return nn.SequentialCell(nn.Dense(6, 8), nn.Dense(8, 4), nn.Dense(4, 4))


def rules(cell):
    return [getattr(one, name).mindpet_delta_compacter_rule for one in cell for name in (DOWN, UP)]


def test_all_layers_have_the_same_rule_or_each_product_its_own():
    shared, own = (
        inject(network(), CompacterConfig(size=4, phm_dim=2, shared=shared, targets=["*"])) for shared in (True, False)
    )
    assert len({id(rule) for rule in rules(shared)}) == 1
    assert len({id(rule) for rule in rules(own)}) == 6
    names = [p.name for p in shared.trainable_params() if p.name.endswith("rule")]
    assert names == [f"0.{DOWN}.mindpet_delta_compacter_rule"]


def test_a_delta_with_a_shared_rule_is_shared_when_loaded(rng, tmp_path):
    one = inject(network(), CompacterConfig(size=4, phm_dim=2, targets=["*"]))
    randomise(one, rng, 0.5)
    save_delta(one, tmp_path)
    other = network()
    for cell, source in zip(other, one):
        cell.weight.set_data(source.weight)
        cell.bias.set_data(source.bias)
    load_delta(other, tmp_path)
    x = Tensor(rng.normal(size=(3, 6)).astype(np.float32))
    np.testing.assert_array_equal(other(x).asnumpy(), one(x).asnumpy())
    assert len({id(rule) for rule in rules(other)}) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 6}, r"'size' must be a multiple of 'phm_dim' \(4\), but got 6"),
        ({"rank": 0}, "'rank' must be a positive int"),
        ({"phm_dim": -1}, "'phm_dim' must be a positive int"),
        ({"low_rank": 1}, "'low_rank' must be a bool"),
        ({"shared": "yes"}, "'shared' must be a bool"),
        ({"non_linearity": "gelo"}, "'non_linearity'.*did you mean 'gelu'"),
    ],
)
def test_wrong_values_are_refused(options, says):
    with pytest.raises((TypeError, ValueError), match=f"For 'CompacterConfig', {says}"):
        CompacterConfig(**options)


def test_a_layer_that_cannot_be_cut_is_refused_and_nothing_changes():
    one = nn.SequentialCell(nn.Dense(8, 8), nn.Dense(8, 3))
    with pytest.raises(
        ValueError, match=r"'phm_dim' must divide 3, the size of the output of .*weight, but got 4: .* are 3 and 1"
    ):
        inject(one, CompacterConfig(targets=["*"]))
    assert [type(cell) for cell in one] == [nn.Dense, nn.Dense]
