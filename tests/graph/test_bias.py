"""The option `bias` of LoRA and its relatives: which biases train as well."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import DoRAConfig, LoRAConfig, MixedDeltas, eject, inject, load_delta, merge, save_delta
from mindpet.delta import LoRAFAConfig


class Body(nn.Cell):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Dense(4, 4), nn.LayerNorm((4,)), nn.Dense(4, 3, has_bias=False)
        self.head = nn.Dense(3, 2)

    def construct(self, x):
        return self.head(self.last(self.norm(self.first(x))))


def trains(network):
    return {p.name for p in network.trainable_params() if "mindpet_delta" not in p.name}


@pytest.mark.parametrize("config", [LoRAConfig, DoRAConfig, LoRAFAConfig])
@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", set()), ("lora_only", {"first.bias"}), ("all", {"first.bias", "norm.beta", "head.bias"})],
)
def test_the_biases_that_it_says_train(config, bias, expected):
    assert trains(inject(Body(), config(rank=2, targets=["first", "last"], bias=bias))) == expected


def test_each_of_two_injections_says_it_for_itself():
    network = inject(Body(), LoRAConfig(rank=2, targets=["first"], bias="lora_only"))
    assert trains(inject(network, LoRAConfig(rank=2, targets=["head"]))) == {"first.bias"}


def test_they_are_saved_and_ejected_and_stay_when_the_rest_is_merged(tmp_path):
    x = Tensor(np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
    network = Body()
    base = {p.name: p.value().copy() for p in network.get_parameters()}
    before = network(x).asnumpy()
    inject(network, LoRAConfig(rank=2, targets=["first"], bias="all"))
    for parameter in network.trainable_params():
        parameter.set_data(parameter + 0.5)
    tuned = network(x).asnumpy()
    save_delta(network, tmp_path)
    other = Body()
    for parameter in other.get_parameters():
        parameter.set_data(base[parameter.name])
    np.testing.assert_array_equal(load_delta(other, tmp_path)(x).asnumpy(), tuned)
    assert trains(other) == {"first.bias", "norm.beta", "head.bias"}
    np.testing.assert_allclose(merge(other)(x).asnumpy(), tuned, atol=1e-5)
    np.testing.assert_array_equal(eject(network)(x).asnumpy(), before)


def test_rows_with_biases_of_their_own_are_not_mixed(tmp_path):
    network = inject(Body(), LoRAConfig(rank=2, targets=["first"], bias="lora_only"))
    save_delta(network, tmp_path)
    load_delta(network, tmp_path, "a")
    with pytest.raises(ValueError, match="first has a bias that trains: .* bias='none'"):
        MixedDeltas(network)


def test_rows_with_a_head_of_which_the_bias_alone_trains_are_mixed(tmp_path):
    network = inject(Body(), LoRAConfig(rank=2, targets=["first"], modules_to_save=["head.bias"]))
    x = Tensor(np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32))
    before = network(x).asnumpy()
    network.head.bias.set_data(Tensor(np.array([3, 4], np.float32)))
    save_delta(network, tmp_path)
    tuned = load_delta(network, tmp_path, "a")(x).asnumpy()
    with MixedDeltas(network) as mixed:
        np.testing.assert_allclose(mixed(["a", None], x).asnumpy(), [tuned[0], before[1]], atol=1e-6)
