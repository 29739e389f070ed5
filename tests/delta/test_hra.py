"""HRA: products of reflections, against the formula in NumPy."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import HRAConfig
from mindpet.delta import HRADense


def made(rng, **options):
    layer = HRADense.from_dense(nn.Dense(6, 4, activation="relu"), HRAConfig(**options))
    for parameter in layer.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    return layer


def matrix(layer):
    """R, by which the weight is multiplied from the right."""
    columns = layer.mindpet_delta_hra_u.asnumpy().astype(np.float64)
    if layer.gram_schmidt:
        columns = np.linalg.qr(columns)[0]
    product = np.eye(len(columns))
    for column in columns.T:
        product = product @ (np.eye(len(columns)) - 2 * np.outer(column, column) / (column @ column))
    return product


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 3, "gram_schmidt": True}, {"rank": 1}, {"rank": 12}])
def test_outputs_and_delta_are_those_of_the_formula(mode, rng, options):
    layer = made(rng, **options)
    x = rng.standard_normal((2, 3, 6)).astype(np.float32)
    weight = layer.weight.asnumpy().astype(np.float64)
    expected = x @ (weight @ matrix(layer)).T + layer.bias.asnumpy()
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), np.maximum(expected, 0), atol=1e-5)
    np.testing.assert_allclose(layer.delta_weight().asnumpy(), weight @ matrix(layer) - weight, atol=1e-5)


def test_the_weight_is_turned_and_not_stretched(rng):
    layer = made(rng, rank=4)
    weight = layer.weight.asnumpy()
    changed = weight + layer.delta_weight().asnumpy()
    np.testing.assert_allclose(changed @ changed.T, weight @ weight.T, atol=1e-4)
    assert np.linalg.matrix_rank(changed - weight, tol=1e-4) <= 4


def test_more_orthogonal_vectors_than_inputs_are_refused():
    with pytest.raises(ValueError, match="'rank' must be at most 6, the size of the input, but got 7"):
        made(np.random.default_rng(0), rank=7, gram_schmidt=True)
    with pytest.raises(TypeError, match="'gram_schmidt' must be a bool, but got 1"):
        HRAConfig(gram_schmidt=1)
