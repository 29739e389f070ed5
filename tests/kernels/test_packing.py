"""Weights of few bits: found where they are, the same numbers, never those of yesterday."""

import copy

import mindspore as ms
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Parameter, Tensor, nn, ops

import mindpet
from mindpet.delta.registry import METHODS
from mindpet.graph.blocks import equal_blocks_as_one
from mindpet.kernels import build, operators
from mindpet.kernels.packing import _agrees, _packed, _products, pack_weights, packed_in_use
from mindpet.models import cache, generate, start_prefix
from mindpet.train.step import SummedLoss, TrainStep
from tests.models import causal


def _packs():
    """Whether anything is packed on this machine: without AVX2 nothing is."""
    return build.available() and _packed(Parameter(Tensor(np.zeros((1, 32), np.float32)), name="w")) is not None


pytestmark = pytest.mark.skipif(not _packs(), reason=f"nothing is packed here: {build.why_not() or 'no AVX2'}")

EXHAUSTIVE = (pytest.mark.exhaustive,)
KINDS = ("Q4_0", "Q4_1", "Q8_0")
SIZES = {"vocab_size": 600, "hidden_size": 192, "intermediate_size": 256}


def coarse(kind, values):
    """What a file of that kind makes of these values; F32 leaves them as they are."""
    if kind == "F32":
        return values.astype(np.float32)
    kind = GGMLQuantizationType[kind]
    return quants.dequantize(quants.quantize(values.astype(np.float32), kind), kind).astype(np.float32)


def packed(values):
    return _packed(Parameter(Tensor(values), name="w", requires_grad=False))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    out=st.integers(1, 70),
    blocks=st.integers(1, 5),
    scale=st.sampled_from([1e-6, 0.03, 1.0, 900.0]),
    shift=st.sampled_from([0.0, 1.0, -40.0]),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_the_weights(kind, rows, out, blocks, scale, shift, seed):
    generator = np.random.default_rng(seed)
    values = scale * (generator.standard_normal((out, 32 * blocks)) + shift)
    values[0, :32] = 0
    weight = coarse(kind, values)
    found = packed(weight)
    assert found is not None
    assert found.codes.shape[1] <= (32 if kind == "Q8_0" else 16)
    x = generator.standard_normal((min(rows, operators.FEW), weight.shape[1])).astype(np.float32)
    right = x.astype(np.float64) @ weight.T.astype(np.float64)
    close = 1e-6 * (1 + np.abs(x) @ np.abs(weight.T))  # of a sum, whatever its terms leave
    assert (np.abs(found(Tensor(x), Tensor(weight)).asnumpy() - right) < close).all()


@pytest.mark.parametrize("spoilt", [1e-3, np.nan, np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_other_weight_is_not_packed(kind, spoilt, rng):
    weight = coarse(kind, rng.standard_normal((40, 64)))
    assert packed(weight) is not None
    weight[39, 63] += spoilt
    assert packed(weight) is None
    assert packed(rng.standard_normal((40, 64)).astype(np.float32)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_product(kind, mode, rng):
    weight, x = coarse(kind, rng.standard_normal((40, 64))), rng.standard_normal((3, 64)).astype(np.float32)
    probe = rng.standard_normal((3, 40)).astype(np.float32)

    class Probed(nn.Cell):
        def __init__(self):
            super().__init__()
            self.product = packed(weight)

        def construct(self, x, weight):
            return (self.product(x, weight) * Tensor(probe)).sum()

    slopes = ops.grad(Probed(), (0, 1))(Tensor(x), Tensor(weight))
    np.testing.assert_allclose(slopes[0].asnumpy(), probe @ weight, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(slopes[1].asnumpy(), probe.T @ x, rtol=1e-4, atol=1e-4)


def from_a_file(kind, layers=2, **sizes):
    """A frozen network whose matrices are what a file of that kind would hold."""
    network = causal.build("llama, tied", layers, **{**SIZES, **sizes})
    for parameter in network.get_parameters():
        parameter.requires_grad = False
        if parameter.ndim == 2:
            parameter.set_data(Tensor(coarse(kind, parameter.asnumpy())))
    return network


def products(network):
    return [each for _, each in network.cells_and_names() if isinstance(each, operators.PackedProduct)]


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("kind", [pytest.param(each, marks=EXHAUSTIVE * (each != "Q4_1")) for each in KINDS])
def test_a_network_says_the_same_and_its_checkpoint_is_as_before(kind):
    plain, fast = from_a_file(kind), mindpet.accelerate(from_a_file(kind))
    names = list(fast.parameters_dict())
    prompt = causal.tokens(2, 5)
    said = [list(map(list, generate(network, prompt, max_tokens=7))) for network in (plain, fast)]
    assert said[0] == said[1]
    assert len(products(fast)) == 11  # the head and five of each layer: keys and values are too small
    assert not products(plain)
    assert list(fast.parameters_dict()) == names
    again = copy.deepcopy(fast)
    assert list(map(list, generate(again, prompt, max_tokens=7))) == said[0]


@pytest.mark.usefixtures("graph_mode")
def test_weights_that_change_are_noticed():
    network, plain = mindpet.accelerate(from_a_file("Q8_0", 1)), from_a_file("Q8_0", 1)
    ids, ones = causal.tokens(1, 3), np.ones((1, 3), np.int32)
    both = [Tensor(ids), Tensor(ones)]
    first = network.step(ids, ones, network.new_cache(1, 8)).asnumpy()
    held = len(products(network))
    cache = network.new_cache(1, 8)
    network.step(ids, ones, cache)
    for each in (network, plain):
        weight = each.model.layers[0].mlp.up_proj.weight
        weight.set_data(Tensor(weight.asnumpy() * np.float32(1.5)))
    np.testing.assert_allclose(network(*both).asnumpy(), plain(*both).asnumpy(), atol=1e-4)  # it uses none
    cache.lengths[:] = 0  # the prompt once more
    expected = plain.new_cache(1, 8)
    for tokens, mask in ((ids, ones), (ids[:, :1], ones[:, :1])):
        found = network.step(tokens, mask, cache).asnumpy()
        np.testing.assert_allclose(found, plain.step(tokens, mask, expected).asnumpy(), atol=1e-4)
    assert np.abs(found - first).max() > 1e-3
    assert len(products(network)) == held - 1
    assert all(_agrees(product.packed, weight) for product, weight in packed_of(network))


@pytest.mark.usefixtures("graph_mode")
def test_a_prefix_that_starts_from_tokens_packs_nothing():
    network = from_a_file("Q4_1")
    mindpet.inject(network, mindpet.PTuning2Config(tokens=3))
    mindpet.accelerate(network)
    start_prefix(network, [3, 4, 5])
    assert not products(network)
    network.new_cache(1, 4)
    assert products(network)


@pytest.mark.usefixtures("graph_mode")
def test_training_after_generation_is_training():
    """Four rows are few: but a step reads the weights."""
    curves = []
    for generates in (False, True):
        network = from_a_file("Q4_1", 1).set_train()
        for parameter in network.get_parameters():
            parameter.requires_grad = True
        mindpet.accelerate(network)
        if generates:
            list(generate(network, [1, 2, 3], max_tokens=2))
            assert products(network)
        step = TrainStep(SummedLoss(network), nn.SGD(network.trainable_params(), 0.01), 1.0)
        columns = [Tensor(causal.tokens(1, 4)), ops.ones((1, 4), ms.int32), Tensor(causal.tokens(1, 4, seed=1))]
        curves.append([float(step(*columns)[0]) for _ in range(4)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def packed_of(network):
    return [(product, weight) for product, weight in _products(network, network.tied_table) if product.packed]


@pytest.mark.usefixtures("graph_mode")
def test_weights_that_were_trained_or_merged_are_let_go():
    network = from_a_file("Q4_1")
    mindpet.inject(network, mindpet.LoRAConfig(rank=2, targets=["*.up_proj"], modules_to_save=["*.0.mlp.gate_proj"]))
    mindpet.accelerate(network)
    assert pack_weights(network, network.tied_table)
    held = {weight.name for _, weight in packed_of(network)}
    changed = {name for name in held if "up_proj" in name or "0.mlp.gate_proj" in name}
    assert len(changed) == 3  # the frozen weight beside a branch too
    assert not pack_weights(network, network.tied_table)  # nothing new
    for parameter in network.trainable_params():
        parameter.set_data(Tensor(0.1 + parameter.asnumpy()))
    mindpet.merge(network)
    network.new_cache(1, 4)
    assert {weight.name for _, weight in packed_of(network)} == held - changed
    assert not pack_weights(network, network.tied_table)


DENSE = sorted(name for name, method in METHODS.items() if nn.Dense in method.adapt and name != "qlora")


@pytest.mark.parametrize("method", [*DENSE, "trainable_tokens"])
def test_every_method_multiplies_with_what_it_means(method):
    """Some change the weight before they multiply with it: those have it read as it is."""
    config = METHODS[method].config
    options = {"token_indices": [1, 2]} if method == "trainable_tokens" else {}
    targets = ["*.embed_tokens"] if method == "trainable_tokens" else ["*.up_proj", "*.q_proj"]
    if method == "adaption_prompt":
        targets = None
    network = from_a_file("Q8_0")
    mindpet.inject(network, config(targets=targets, **options))
    generator = np.random.default_rng(2)
    for parameter in network.trainable_params():
        change = 0.1 * generator.standard_normal(parameter.shape)
        parameter.set_data(Tensor(parameter.asnumpy() + change, parameter.dtype))
    ids = Tensor(causal.tokens(1, 4))
    expected = network(ids, ops.ones_like(ids)).asnumpy()
    mindpet.accelerate(network, compiled=True)
    cache._pack(network)
    assert products(network)
    with packed_in_use(network):
        found = network(ids, ops.ones_like(ids)).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * (1 + np.abs(expected).max()))


def test_a_cell_of_somebody_else_may_change_its_weight():
    class Doubled(nn.Dense):
        def construct(self, x):
            return self.matmul(x, self.weight * 2)

    network = nn.SequentialCell(Doubled(256, 256, has_bias=False), nn.Dense(256, 256, has_bias=False))
    for cell in network:
        cell.weight.set_data(Tensor(coarse("Q4_1", cell.weight.asnumpy())))
    mindpet.accelerate(network, compiled=True)
    assert pack_weights(network)
    assert len(products(network)) == 1
    assert network[1].matmul.packed is not None


@pytest.mark.usefixtures("graph_mode")
def test_blocks_compiled_as_one_keep_their_own():
    network, plain = mindpet.accelerate(from_a_file("Q4_1")), from_a_file("Q4_1")
    assert pack_weights(network, network.tied_table)
    ids = Tensor(causal.tokens(1, 4))
    expected = plain(ids, ops.ones_like(ids)).asnumpy()
    with packed_in_use(network), equal_blocks_as_one(network), equal_blocks_as_one(network):
        found = network(ids, ops.ones_like(ids)).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.usefixtures("graph_mode")
def test_blocks_that_somebody_else_compiles_as_one_are_left_alone():
    network = mindpet.accelerate(from_a_file("Q4_1"))
    network.model.layers[0].cell_init_args = "lazy_inline_mine"
    assert not pack_weights(network, network.tied_table)
