"""The parallel adapter: its formula, its start, its refusals."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import ParallelAdapterConfig
from mindpet.delta import ParallelAdapterDense
from tests.oracles import NP_ACTIVATIONS, inputs_of_every_rank, randomise, values


def made(activation=None, **options):
    dense = nn.Dense(6, 4, activation=activation)
    return ParallelAdapterDense.from_dense(dense, ParallelAdapterConfig(size=3, **options))


@pytest.mark.parametrize(("activation", "non_linearity"), [(None, "relu"), ("sigmoid", "tanh"), ("relu", "gelu")])
def test_outputs_are_those_of_the_formula(mode, rng, activation, non_linearity):
    layer = randomise(made(activation, scale=-1.5, non_linearity=non_linearity), rng)
    p = values(layer)
    down, up = "mindpet_delta_parallel_adapter_down", "mindpet_delta_parallel_adapter_up"
    for x in inputs_of_every_rank(rng, 6)[1:]:
        inner = NP_ACTIVATIONS[non_linearity](x @ p[down].T + p[f"{down}_bias"])
        out = x @ p["weight"].T + p["bias"] - 1.5 * (inner @ p[up].T + p[f"{up}_bias"])
        np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), NP_ACTIVATIONS[activation](out), atol=5e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 0}, "'size' must be a positive int, but got 0"),
        ({"scale": 0.0}, "'scale' must be finite and not 0"),
        ({"scale": float("nan")}, "'scale' must be finite and not 0"),
        ({"non_linearity": "rellu"}, "'non_linearity'.*'rellu'.*did you mean 'relu'"),
    ],
)
def test_wrong_values_are_refused(options, says):
    with pytest.raises(ValueError, match=f"For 'ParallelAdapterConfig', {says}"):
        ParallelAdapterConfig(**options)
