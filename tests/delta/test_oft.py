"""OFT and BOFT: orthogonal block by block, against the formulas in NumPy."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import BOFTConfig, OFTConfig
from mindpet.delta import BOFTDense, OFTDense


def made(rng, kind, config, scale=1.0):
    layer = getattr(kind, "from_dense")(nn.Dense(8, 4, activation="relu"), config)
    for parameter in layer.get_parameters():
        parameter.set_data(Tensor((scale * rng.standard_normal(parameter.shape)).astype(np.float32)))
    return layer


def cayley(skew):
    unit = np.eye(len(skew))
    return (unit - skew) @ np.linalg.inv(unit + skew)


def series(skew, terms):
    powers = [np.linalg.matrix_power(skew, power) for power in range(terms)]
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


def diagonal(blocks):
    size = len(blocks[0])
    total = np.zeros((size * len(blocks),) * 2)
    for index, block in enumerate(blocks):
        total[index * size : (index + 1) * size, index * size : (index + 1) * size] = block
    return total


def oft_matrix(layer, blocks, size, terms):
    """R, by which the input is multiplied."""
    turns = []
    for entries in layer.mindpet_delta_oft_q.asnumpy().astype(np.float64):
        skew = np.zeros((size, size))
        skew[np.triu_indices(size, 1)] = entries
        turns.append(series(skew - skew.T, terms) if terms else cayley(skew - skew.T))
    return diagonal(turns * (blocks // len(turns)))


OFT = [
    ({"block_size": 4}, 2, 4, 5),
    ({"blocks": 4, "terms": 6}, 4, 2, 6),
    ({"blocks": 1, "terms": 4}, 1, 8, 4),
    ({"blocks": 2, "cayley_neumann": False}, 2, 4, 0),
    ({"block_size": 4, "block_share": True, "cayley_neumann": False}, 2, 4, 0),
]


@pytest.mark.parametrize(("options", "blocks", "size", "terms"), OFT)
def test_oft_is_its_formula(mode, rng, options, blocks, size, terms):
    layer = made(rng, OFTDense, OFTConfig(**options), 0.5)
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    turned = oft_matrix(layer, blocks, size, terms)
    weight = layer.weight.asnumpy().astype(np.float64)
    expected = x @ turned @ weight.T + layer.bias.asnumpy()
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), np.maximum(expected, 0), atol=1e-5)
    np.testing.assert_allclose(layer.delta_weight().asnumpy(), weight @ turned.T - weight, atol=1e-5)
    if not terms:
        np.testing.assert_allclose(turned @ turned.T, np.eye(8), atol=1e-9)


def test_the_series_is_orthogonal_about_zero(rng):
    layer = made(rng, OFTDense, OFTConfig(block_size=4), 0.02)
    turns = layer.rotations().asnumpy()
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(4), turns.shape), atol=1e-5)


def permutation(size, block, factor):
    """P of a butterfly factor as its definition says: even half blocks of a group before odd ones."""
    total, half = np.zeros((size, size)), block // 2
    group = block * 2**factor
    row = 0
    for start in range(0, size, group):
        for first in (0, half):
            for offset in range(first, group, block):
                for place in range(half):
                    total[row, start + offset + place] = 1
                    row += 1
    return total


@pytest.mark.parametrize(("block", "factors"), [(4, 1), (2, 3), (4, 2), (2, 1)])
def test_boft_is_its_formula(mode, rng, block, factors):
    layer = made(rng, BOFTDense, BOFTConfig(block_size=block, butterfly_factors=factors))
    turned = np.eye(8)
    for factor, blocks in enumerate(layer.mindpet_delta_boft_r.asnumpy().astype(np.float64)):
        order = permutation(8, block, factor) if factor else np.eye(8)
        turned = order @ diagonal([cayley((one - one.T) / 2) for one in blocks]) @ order.T @ turned
    x, scale = rng.standard_normal((2, 3, 8)).astype(np.float32), layer.mindpet_delta_boft_s.asnumpy()
    weight = layer.weight.asnumpy().astype(np.float64)
    expected = scale[:, 0] * (x @ turned @ weight.T) + layer.bias.asnumpy()
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), np.maximum(expected, 0), atol=1e-4)
    np.testing.assert_allclose(layer.delta_weight().asnumpy(), scale * (weight @ turned.T) - weight, atol=1e-4)
    np.testing.assert_allclose(turned @ turned.T, np.eye(8), atol=1e-9)
    reach = (np.abs(turned) > 1e-9).sum(0)
    assert (reach == block * 2 ** (factors - 1)).all()


@pytest.mark.parametrize(
    ("kind", "make", "says"),
    [
        (OFTDense, lambda: OFTConfig(block_size=3), "'block_size' must divide 8, .*, but got 3: .* are 2 and 4"),
        (OFTDense, lambda: OFTConfig(blocks=5), "'blocks' must divide 8, the size of the input, but got 5"),
        (OFTDense, lambda: OFTConfig(block_size=1), "blocks of size 1 have no rotation: .* than block_size=1"),
        (BOFTDense, lambda: BOFTConfig(blocks=8), "blocks of size 1 have no rotation: .* than blocks=8"),
        (OFTDense, lambda: OFTConfig(blocks=2, block_size=4), "'block_size' and 'blocks' cannot both be given"),
        (OFTDense, lambda: OFTConfig(terms=3), "'terms' must be at least 4, but got 3"),
        (BOFTDense, lambda: BOFTConfig(blocks=-1), "'blocks' must be a positive int, but got -1"),
        (BOFTDense, lambda: BOFTConfig(block_size=1, butterfly_factors=2), "have no rotation"),
        (BOFTDense, lambda: BOFTConfig(block_size=4, butterfly_factors=3), "4 of them or a multiple"),
    ],
)
def test_what_cannot_be_is_refused(kind, make, says):
    with pytest.raises(ValueError, match=says):
        kind.from_dense(nn.Dense(8, 4), make())
