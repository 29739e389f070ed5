"""SHiRA: which entries train, and that the others stay."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import SHiRAConfig, inject


def network():
    return nn.SequentialCell(nn.Dense(6, 8), nn.ReLU(), nn.Dense(8, 6))


def masks(cell):
    found = []
    for index in (0, 2):
        mask = np.zeros(cell[index].weight.shape, bool)
        mask[tuple(cell[index].mindpet_delta_shira_places.asnumpy().T)] = True
        found.append(mask)
    return found


def test_the_delta_is_the_values_at_their_places(mode, rng):
    cell = nn.SequentialCell(nn.Dense(6, 8))
    weight, bias = (p.asnumpy().astype(np.float64) for p in (cell[0].weight, cell[0].bias))
    inject(cell, SHiRAConfig(rank=2, targets=["0"]))
    values = rng.standard_normal(28)
    cell[0].mindpet_delta_shira_values.set_data(Tensor(values.astype(np.float32)))
    delta = np.zeros((8, 6))
    delta[tuple(cell[0].mindpet_delta_shira_places.asnumpy().T)] = values
    assert (delta != 0).sum() == 28  # all places are different
    x = rng.standard_normal((3, 6))
    np.testing.assert_allclose(cell(Tensor(x.astype(np.float32))).asnumpy(), x @ (weight + delta).T + bias, atol=1e-5)
    np.testing.assert_allclose(cell[0].delta_weight().asnumpy(), delta, atol=1e-6)


def test_the_entries_of_the_largest_magnitude():
    cell = network()
    largest = np.sort(np.abs(cell[0].weight.asnumpy()), axis=None)[-14]
    inject(cell, SHiRAConfig(rank=1, mask="magnitude", targets=["0", "2"]))
    np.testing.assert_array_equal(masks(cell)[0], np.abs(cell[0].weight.asnumpy()) >= largest)


def test_masks_without_a_seed_follow_that_of_mindspore():
    def made():
        return [mask.ravel() for mask in masks(inject(network(), SHiRAConfig(rank=1, targets=["0", "2"])))]

    ms.set_seed(1)
    first = made()
    ms.set_seed(1)
    np.testing.assert_array_equal(made(), first)
    assert (made()[0] != first[0]).any()
    assert (first[0] != first[1]).any()  # not the same for layers of as many entries


def test_a_seed_gives_the_same_mask_every_time():
    def made():
        return masks(inject(network(), SHiRAConfig(rank=1, seed=5, targets=["0", "2"])))[0]

    np.testing.assert_array_equal(made(), made())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "'rank' must be a positive int"),
        ({"mask": "snip"}, "'mask' must be 'random' or 'magnitude', but got 'snip'"),
        ({"seed": -1}, "'seed' must be an int from 0 on"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(ValueError, match=says):
        SHiRAConfig(**options)


def test_more_values_than_entries_are_refused():
    with pytest.raises(ValueError, match=r"'rank' must leave at most 48 values.*\(8, 6\), but got 4, which makes 56"):
        inject(network(), SHiRAConfig(rank=4, targets=["0"]))
