"""FourierFT: NumPy's transform is the oracle, of a spectrum whose places are those of PEFT."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import FourierFTConfig, inject
from mindpet.delta.fourierft import places


def test_the_outputs_are_those_of_the_transform(mode, rng):
    network = nn.SequentialCell(nn.Dense(5, 7))
    weight, bias = (p.asnumpy().astype(np.float64) for p in (network[0].weight, network[0].bias))
    inject(network, FourierFTConfig(frequencies=6, scaling=20, seed=3, targets=["0"]))
    spectrum = np.zeros((7, 5))
    rows, columns = places(7, 5, 6, 3).T
    spectrum[rows, columns] = network[0].mindpet_delta_fourierft_spectrum.asnumpy()
    delta = 20 * np.fft.ifft2(spectrum).real
    assert np.abs(delta).max() > 0.1
    x = rng.standard_normal((4, 5))
    np.testing.assert_allclose(
        network(Tensor(x.astype(np.float32))).asnumpy(), x @ (weight + delta).T + bias, atol=1e-5
    )


def test_places_are_all_different_and_those_of_torch():
    found = places(8, 12, 96, 777)
    assert len({tuple(place) for place in found}) == 96
    np.testing.assert_array_equal(found[:5] @ [12, 1], [71, 15, 81, 77, 51])  # torch.randperm(96) with this seed


def test_a_start_at_zero_is_the_network_as_it_was(rng):
    network, x = nn.SequentialCell(nn.Dense(5, 7)), Tensor(rng.standard_normal((4, 5)).astype(np.float32))
    before = network(x).asnumpy()
    inject(network, FourierFTConfig(frequencies=6, start_at_zero=True, targets=["0"]))
    np.testing.assert_array_equal(network(x).asnumpy(), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frequencies": 0}, "'frequencies' must be a positive int"),
        ({"scaling": 0}, "'scaling' must be finite and not 0"),
        ({"seed": -1}, "'seed' must be an int from 0 on"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(ValueError, match=says):
        FourierFTConfig(**options)


def test_more_frequencies_than_entries_are_refused():
    with pytest.raises(ValueError, match=r"'frequencies' must be at most 35, the entries .* \(7, 5\), but got 36"):
        inject(nn.SequentialCell(nn.Dense(5, 7)), FourierFTConfig(frequencies=36, targets=["0"]))
