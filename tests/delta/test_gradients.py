"""What trains gets the right gradient, and nothing else moves."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet.delta import (
    AdapterDense,
    AdapterLayer,
    LoRADense,
    LowRankAdapterDense,
    LowRankAdapterLayer,
    PrefixEncoder,
    PrefixLayer,
    RDropLoss,
)
from mindpet.graph import freeze_delta
from tests import oracles
from tests.oracles import randomise, values

FLOAT32 = {"compute_dtype": ms.float32}


class Probed(nn.Cell):
    """The sum of a layer's output times a probe: a scalar that every output entry has a part in."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def construct(self, probe, *inputs):
        return (self.layer(*inputs) * probe).sum()


class Joined(nn.Cell):
    """Key and value of a PrefixLayer, side by side."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def construct(self):
        key, value = self.layer()
        return ms.ops.concat((key, value), 1)


class Stacked(nn.Cell):
    """All layers of a PrefixEncoder in one Tensor."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def construct(self):
        return ms.ops.stack(self.encoder(2, ms.float32))


def stacked_prompts(p):
    table = oracles.prompts(oracles.below(p, "encoder"), 2, 2, 3)
    whole = np.broadcast_to(table, (2, *table.shape)).transpose(2, 0, 3, 1, 4)
    return np.stack(np.split(whole, 2))


def adapter_dense(x, p):
    return oracles.adapter(oracles.dense(x, p), oracles.below(p, "mindpet_delta_adapter"), "sigmoid")


def low_rank_adapter_dense(x, p):
    inner = oracles.below(p, "mindpet_delta_low_rank_adapter")
    return oracles.low_rank_adapter(oracles.dense(x, p), inner, "sigmoid")


SMOOTH = {"non_linearity": "sigmoid", **FLOAT32}

# name: layer, its formula of (input, parameters), its method
WITH_INPUT = {
    "lora": (
        lambda: LoRADense(5, 4, 2, 3, activation="sigmoid", **FLOAT32),
        lambda x, p: oracles.lora(x, p, 1.5, "sigmoid"),
        "lora",
    ),
    "adapter_dense": (lambda: AdapterDense(5, 4, bottleneck_size=3, **SMOOTH), adapter_dense, "adapter"),
    "adapter_layer": (
        lambda: AdapterLayer(5, 3, **SMOOTH),
        lambda x, p: oracles.adapter(x, p, "sigmoid"),
        None,
    ),
    "low_rank_dense": (
        lambda: LowRankAdapterDense(5, 4, reduction_factor=2, **SMOOTH),
        low_rank_adapter_dense,
        "low_rank_adapter",
    ),
    "low_rank_layer": (
        lambda: LowRankAdapterLayer(5, 2, 2, **SMOOTH),
        lambda x, p: oracles.low_rank_adapter(x, p, "sigmoid"),
        None,
    ),
}
WITHOUT_INPUT = {
    "prefix": (
        lambda: Joined(PrefixLayer(4, 2, 2, 4, 3, 5, 0.0)),
        lambda p: np.concatenate(oracles.prefix(oracles.below(p, "layer")), 1),
        "prefix",
    ),
    "ptuning2": (lambda: Stacked(PrefixEncoder(3, 2, 2, 3, False, 4, 0.0)), stacked_prompts, "ptuning2"),
    "ptuning2_projected": (lambda: Stacked(PrefixEncoder(3, 2, 2, 3, True, 4, 0.0)), stacked_prompts, "ptuning2"),
}


def assert_gradients(layer, formula, inputs, rng, tolerance):
    """MindSpore's gradient of every trainable parameter against central differences of the formula in float64."""
    p = values(layer)
    probe = rng.normal(size=formula(p).shape)
    trained = layer.trainable_params()
    grad = ms.grad(Probed(layer), None, ms.ParameterTuple(trained))
    gradients = grad(Tensor(probe, ms.float32), *inputs)
    paths = {id(parameter): path for path, parameter in layer.parameters_and_names()}
    assert trained
    for parameter, gradient in zip(trained, gradients):
        path = paths[id(parameter)]
        expected = oracles.central_differences(lambda: (formula(p) * probe).sum(), p[path])
        if "past_" not in path:  # the folded prefix has no part in calling the layer
            assert np.abs(expected).max() > 1e-3, path
        np.testing.assert_allclose(gradient.asnumpy(), expected, rtol=tolerance, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("name", WITH_INPUT)
def test_gradients_of_layers_are_central_differences(mode, rng, name):
    make, formula, method = WITH_INPUT[name]
    layer = randomise(make(), rng, 0.7)
    if method:
        freeze_delta(layer, method)
    x = rng.normal(size=(2, 3, 5)).astype(np.float32)
    assert_gradients(layer, lambda p: formula(x.astype(np.float64), p), [Tensor(x)], rng, 1e-4)


# Wider: the CPU's tanh is off by up to 1e-4.
@pytest.mark.parametrize("name", WITHOUT_INPUT)
def test_gradients_of_prefixes_are_central_differences(mode, rng, name):
    make, formula, method = WITHOUT_INPUT[name]
    layer = randomise(make(), rng, 0.5)
    freeze_delta(layer, method)
    assert_gradients(layer, formula, [], rng, 2e-3)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_r_drop_gradient_flows_through_both_sides(mode, rng, kind):
    logits = rng.normal(size=(6, 4))
    index = np.array([0, 0, 3, 3, 1, 1])
    soft = oracles.one_hot(index, 4)
    labels = Tensor(index, ms.int32) if kind == "indices" else Tensor(soft, ms.float32)
    gradient = ms.grad(RDropLoss())(Tensor(logits, ms.float32), labels)
    expected = oracles.central_differences(lambda: oracles.r_drop(logits, soft, 4), logits)
    np.testing.assert_allclose(gradient.asnumpy(), expected, rtol=1e-4, atol=1e-5)
    entropy_only = oracles.central_differences(lambda: oracles.r_drop(logits, soft, 0), logits)
    assert (np.abs(gradient.asnumpy() - entropy_only).max(1) > 1e-2).all()  # every row, first copy and second


def test_r_drop_gradient_ignores_positions_labelled_minus_100(mode, rng):
    logits = Tensor(rng.normal(size=(4, 3, 5)), ms.float32)
    index = np.zeros((4, 3), np.int32)
    index[:, 2] = -100
    gradient = ms.grad(RDropLoss())(logits, Tensor(index)).asnumpy()
    assert not gradient[:, 2].any()
    assert (np.abs(gradient[:, :2]).max(-1) > 1e-4).all()


# ------------------------------------------------------------------------------------- what trains, and what moves


class Network(nn.Cell):
    """A frozen body, one adapted layer, and a head."""

    def __init__(self, layer):
        super().__init__()
        self.body = nn.Dense(5, 5)
        self.norm = nn.LayerNorm((5,))
        self.adapted = layer
        self.head = nn.Dense(4, 3)

    def construct(self, x):
        return self.head(self.adapted(self.norm(self.body(x))))


class Prefixed(nn.Cell):
    """A dense layer whose output is scored against the keys, which weigh the values."""

    def __init__(self, keys_and_values):
        super().__init__()
        self.body = nn.Dense(5, 4)
        self.adapted = keys_and_values
        self.head = nn.Dense(4, 3)

    def construct(self, x):
        key, value = self.adapted()
        scores = ms.ops.softmax(ms.ops.matmul(self.body(x), key.T))
        return self.head(ms.ops.matmul(scores, value))


class FirstLayer(nn.Cell):
    """The keys and values of a PrefixEncoder's only layer, one sample, one head."""

    def __init__(self):
        super().__init__()
        self.encoder = PrefixEncoder(6, 1, 1, 4, True, 4, 0.0)

    def construct(self):
        pair = self.encoder(1, ms.float32)[0]
        return pair[0, 0, 0], pair[1, 0, 0]


DELTA_NAMES = {
    "lora": {"adapted.mindpet_delta_lora_a", "adapted.mindpet_delta_lora_b"},
    "adapter": {
        f"adapted.mindpet_delta_adapter.mindpet_delta_adapter_block.mindpet_delta_adapter_{side}_sampler.{name}"
        for side in ("down", "up")
        for name in ("weight", "bias")
    },
    "low_rank_adapter": {
        f"adapted.mindpet_delta_low_rank_adapter.mindpet_delta_low_rank_adapter_{side}_sampler.{name}"
        for side in ("down", "up")
        for name in (
            "mindpet_delta_low_rank_adapter_weight_left",
            "mindpet_delta_low_rank_adapter_weight_right",
            "bias",
        )
    },
    "prefix": {
        f"adapted.mindpet_delta_prefixtuning_{name}"
        for name in ("embedding", "in.weight", "in.bias", "out.weight", "out.bias", "past_key", "past_value")
    },
    "ptuning2": {
        f"adapted.encoder.mindpet_delta_ptuning2_{name}"
        for name in ("embedding", "in.weight", "in.bias", "out.weight", "out.bias")
    },
    "bitfit": {"body.bias", "adapted.bias", "head.bias"},
}
NETWORKS = {
    "lora": lambda: Network(LoRADense(5, 4, 2, 3, 0.1, **FLOAT32)),
    "adapter": lambda: Network(AdapterDense(5, 4, bottleneck_size=3, **FLOAT32)),
    "low_rank_adapter": lambda: Network(LowRankAdapterDense(5, 4, **FLOAT32)),
    "prefix": lambda: Prefixed(PrefixLayer(6, 1, 1, 4, 3, 5, 0.0)),
    "ptuning2": lambda: Prefixed(FirstLayer()),
    "bitfit": lambda: Network(nn.Dense(5, 4)),
}


@pytest.mark.parametrize("method", NETWORKS)
def test_one_step_changes_what_trains_and_nothing_else(mode, rng, method):
    network = randomise(NETWORKS[method](), rng, 0.5)
    freeze_delta(network, method)
    trained = network.trainable_params()
    assert {parameter.name for parameter in trained} == DELTA_NAMES[method]
    for parameter in network.get_parameters():
        assert parameter.requires_grad == (parameter.name in DELTA_NAMES[method])

    optimizer = nn.Adam(trained, learning_rate=0.1)
    loss = nn.WithLossCell(network, nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean"))
    step = nn.TrainOneStepCell(loss, optimizer).set_train(True)
    before = {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}
    x = Tensor(rng.normal(size=(8, 5)), ms.float32)
    step(x, Tensor(rng.integers(0, 3, size=8), ms.int32))

    called = {name for name in DELTA_NAMES[method] if "past_" not in name}  # the folded prefix is not called here
    for parameter in network.get_parameters():
        changed = parameter.asnumpy() != before[parameter.name]
        assert changed.any() == (parameter.name in called), parameter.name


def test_frozen_parameters_are_not_in_the_optimizer(rng):
    network = NETWORKS["lora"]()
    freeze_delta(network, "lora", exclude=["head.*"])
    optimizer = nn.Adam(network.trainable_params())
    assert {parameter.name for parameter in optimizer.parameters} == DELTA_NAMES["lora"] | {"head.weight", "head.bias"}
