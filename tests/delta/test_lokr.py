"""LoKr: the Kronecker product that is never formed, and into which sizes a weight goes."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import LoKrConfig, inject
from mindpet._kronecker import factors

SIZES = [
    ({"rank": 1}, ["w1", "w2_a", "w2_b"]),
    ({"rank": 8}, ["w1", "w2"]),
    ({"rank": 1, "decompose_both": True, "decompose_factor": 4}, ["w1_a", "w1_b", "w2_a", "w2_b"]),
    ({"rank": 1, "decompose_both": True, "decompose_factor": 6}, ["w1_a", "w1_b", "w2_a", "w2_b"]),
    ({"rank": 2, "decompose_both": True, "decompose_factor": 12}, ["w1_a", "w1_b", "w2"]),
]


@pytest.mark.parametrize(("options", "names"), SIZES)
def test_the_outputs_are_those_of_the_kronecker_product(mode, rng, options, names):
    network = nn.SequentialCell(nn.Dense(24, 12))
    weight, bias = (p.asnumpy().astype(np.float64) for p in (network[0].weight, network[0].bias))
    inject(network, LoKrConfig(alpha=3, targets=["0"], **options))
    parts = {}
    for parameter in network.trainable_params():
        value = rng.standard_normal(parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(value))
        parts[parameter.name.rpartition("lokr_")[2]] = value.astype(np.float64)
    assert list(parts) == names
    left = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    right = parts["w2"] if "w2" in parts else parts["w2_a"] @ parts["w2_b"]
    delta = 3 / options["rank"] * np.kron(left, right)
    x = rng.standard_normal((2, 5, 24))
    np.testing.assert_allclose(
        network(Tensor(x.astype(np.float32))).asnumpy(), x @ (weight + delta).T + bias, atol=1e-3, rtol=1e-4
    )
    np.testing.assert_allclose(network[0].delta_weight().asnumpy(), delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("factor", "left", "right"),
    [  # as PEFT 0.21.2 factorises them
        (-1, (16, 1), (16, 127)),
        (4, (4, 1), (64, 127)),
        (7, (4, 1), (64, 127)),
        (127, (16, 127), (16, 1)),
        (128, (128, 1), (2, 127)),
    ],
)
def test_sizes_are_those_of_peft(factor, left, right):
    found = factors(256, 127, 1000, False, factor)
    assert (found.left, found.right) == (left, right)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "'rank' must be a positive int"),
        ({"decompose_factor": 0}, "'decompose_factor' must be a positive int"),
        ({"decompose_factor": -2}, "'decompose_factor' must be a positive int"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(ValueError, match=says):
        LoKrConfig(**options)
    with pytest.raises(TypeError, match="'decompose_both' must be a bool"):
        LoKrConfig(decompose_both=1)
