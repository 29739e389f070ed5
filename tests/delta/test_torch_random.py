"""What torch 2.13 drew on a CPU, written down: no torch is needed here."""

import numpy as np
import pytest

from mindpet.delta.torch_random import TorchRandom, rounded_to_bfloat16


@pytest.mark.parametrize(
    ("seed", "size", "expected"),
    [
        (0, 64, [44, 46, 17, 3, 47]),
        (777, 64, [39, 63, 11, 47, 0]),
        (777, 70000, [65735, 40224, 8877, 29629, 39603]),
        (2**40 + 5, 70000, [53411, 50200, 53621, 48915, 22746]),
        (777, 5, [0, 4, 3, 2, 1]),
    ],
)
def test_a_permutation_is_that_of_torch(seed, size, expected):
    np.testing.assert_array_equal(TorchRandom(seed).permutation(size, 5), expected)


def test_a_whole_permutation_has_every_number_once():
    assert sorted(TorchRandom(3).permutation(500, 500)) == list(range(500))


def test_a_size_for_which_torch_draws_otherwise_is_refused():
    with pytest.raises(ValueError, match="'size' must be less than 214748364"):
        TorchRandom(0).permutation(2**32, 1)


def test_uniform_numbers_are_those_of_torch_call_after_call():
    random = TorchRandom(3)
    expected = [-0.4957364797592163, -0.39443063735961914, -0.21415752172470093]
    expected += [-0.4730451703071594, -0.028385639190673828, -0.4398837089538574]
    assert random.uniform((2, 3), -0.5, 0.5).ravel().tolist() == expected
    expected = [0.2718658447265625, 0.24369937181472778, 0.09442120790481567]
    assert random.uniform((3,), -0.5, 0.5).tolist() == expected


def test_uniform_numbers_in_bfloat16_are_those_of_torch():
    values = TorchRandom(3).uniform((40000,), -0.5, 0.5, bfloat16=True)
    assert values[:4].tolist() == [-0.49609375, -0.39453125, -0.2138671875, -0.47265625]
    assert ((values == -0.5).sum(), (values == 0.5).sum()) == (83, 0)
    assert values.astype(np.float64).sum() == -64.08876192569733


def test_rounding_to_bfloat16_ties_to_even():
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8], np.float32)
    np.testing.assert_array_equal(rounded_to_bfloat16(ties), np.array([1, 1 + 2**-6, -1], np.float32))
