"""Every activation that MindSpore knows by name: computed as MindSpore does, sharded, or refused with a reason."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet import _compat
from mindpet.delta import AdapterDense, AdapterLayer, LoRADense, LowRankAdapterLayer
from mindpet.delta.activation import activation_names

SIZE = 6
REFUSED = {"threshold": "needs a threshold and a value", "softmax2d": "over channels of images"}
RANDOM = {"rrelu"}
# The name behind it whose kernel a CPU has, and which computes the same.
SAME_AS = {"logsoftmaxExt": "logsoftmax", "preluExt": "prelu"}
EVERY_NAME = sorted(_compat.activation_classes())
WORKING = [name for name in EVERY_NAME if name not in REFUSED]


class BothPlaces(nn.Cell):
    """The activation behind a LoRADense and inside an adapter, around weights that let the input through."""

    def __init__(self, name):
        super().__init__()
        eye = Tensor(np.eye(SIZE, dtype=np.float32))
        self.dense = LoRADense(SIZE, SIZE, 2, 1, weight_init=eye, activation=name, compute_dtype=ms.float32)
        self.adapter = AdapterLayer(SIZE, SIZE, name, compute_dtype=ms.float32)
        block = self.adapter.mindpet_delta_adapter_block
        block.mindpet_delta_adapter_down_sampler.weight.set_data(eye)
        block.mindpet_delta_adapter_up_sampler.weight.set_data(eye)

    def construct(self, x):
        return self.dense(x), self.adapter(x) - x


def test_the_names_are_those_of_mindspore():
    assert set(activation_names()) == set(EVERY_NAME) - set(REFUSED)
    assert {"relu", "gelu", "tanh", "sigmoid", "softmax", "leakyrelu"} <= set(activation_names())


@pytest.mark.exhaustive_in_graph("*-gelu", "*-leakyrelu", "*-prelu*", "*-softmax", "*-hs*")
@pytest.mark.parametrize("name", WORKING)
def test_a_name_computes_what_mindspore_computes(mode, rng, name):
    x = Tensor(2 * rng.normal(size=(5, SIZE)), ms.float32)
    by_lora, by_adapter = (out.asnumpy() for out in BothPlaces(name)(x))
    if name in RANDOM:  # y = x where x >= 0, else x times a slope drawn from [1/8, 1/3]
        for out in (by_lora, by_adapter):
            ratio = out / x.asnumpy()
            positive = x.asnumpy() >= 0
            np.testing.assert_allclose(ratio[positive], 1, rtol=1e-4)
            assert 1 / 8 - 1e-4 < ratio[~positive].min() < ratio[~positive].max() < 1 / 3 + 1e-4
        return
    expected = nn.get_activation(SAME_AS.get(name, name))(x).asnumpy()
    assert (expected != x.asnumpy()).any()
    np.testing.assert_allclose(by_lora, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_adapter, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WORKING)
def test_a_name_works_in_float16(name, rng):
    x = Tensor(rng.normal(size=(5, SIZE)), ms.float16)
    layer = LoRADense(SIZE, SIZE, 2, 1, activation=name)
    out = layer(x)
    assert out.dtype == ms.float16
    assert np.isfinite(out.asnumpy()).all()


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_a_name_that_cannot_follow_a_dense_layer_is_refused_with_the_reason(name, reason):
    with pytest.raises(KeyError, match=f"cannot be '{name}'.*{reason}"):
        LoRADense(SIZE, SIZE, 2, 1, activation=name)
    with pytest.raises(ValueError, match=f"cannot be '{name}'.*{reason}"):
        AdapterLayer(SIZE, non_linearity=name)
    with pytest.raises(ValueError, match=f"cannot be '{name}'.*{reason}"):
        LowRankAdapterLayer(SIZE, 2, non_linearity=name)


@pytest.mark.parametrize("name", ["prelu", "preluExt"])
def test_the_parameter_of_prelu_trains_with_its_adapter(name):
    layer = AdapterDense(SIZE, SIZE, activation=name, bottleneck_size=2, non_linearity=name)
    paths = [path for path, _ in layer.parameters_and_names() if path.endswith("weight")]
    assert "activation.weight" in paths
    assert "mindpet_delta_adapter.mindpet_delta_adapter_block.mindpet_delta_adapter_non_linear.weight" in paths


def test_a_cell_and_a_primitive_are_used_as_they_are(mode, rng):
    x = Tensor(rng.normal(size=(5, SIZE)), ms.float32)
    eye = Tensor(np.eye(SIZE, dtype=np.float32))
    for activation in (nn.Threshold(0.1, 20.0), ops.Tanh()):
        layer = LoRADense(SIZE, SIZE, 2, 1, weight_init=eye, activation=activation, compute_dtype=ms.float32)
        assert layer.activation is activation
        np.testing.assert_allclose(layer(x).asnumpy(), activation(x).asnumpy(), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- strategies


def strategy_of(operator):
    return operator.get_attr_dict().get("in_strategy")


@pytest.fixture(params=["semi_auto_parallel", "auto_parallel"])
def parallel_mode(request):
    """The context only: no devices are needed to write strategies down."""
    ms.set_auto_parallel_context(parallel_mode=request.param)
    yield request.param
    ms.reset_auto_parallel_context()


@pytest.mark.parametrize("name", WORKING)
def test_a_strategy_reaches_every_operator(name):
    layer = AdapterLayer(SIZE, 3, name)
    activation = layer.mindpet_delta_adapter_block.mindpet_delta_adapter_non_linear
    if name in RANDOM:
        with pytest.raises(ValueError, match=r"no operator that takes a strategy.*relu"):
            layer.shard(strategy_non_linearity=((2, 1),))
        return
    layer.shard(strategy_non_linearity=((2, 1),))
    operators = [operator for operator in _compat.primitives_of(activation) if operator.name != "Cast"]
    assert operators
    for operator in operators:
        strategy = strategy_of(operator)
        assert strategy[0] == (2, 1), operator.name
        # A second input is cut as the first, or is a scalar, or the one weight of a PReLU.
        assert strategy[1:] in ((), ((2, 1),), ((),), ((1,),)), operator.name


@pytest.mark.parametrize("activation", [ops.Tanh(), nn.Tanh()], ids=["primitive", "cell"])
def test_a_strategy_reaches_the_operator_of_a_given_activation(activation):
    layer = LoRADense(SIZE, SIZE, 2, 1, activation=activation)
    layer.shard(strategy_activation=((4, 2),))
    operator = activation if isinstance(activation, ops.Primitive) else _compat.primitives_of(activation)[0]
    assert strategy_of(operator) == ((4, 2),)


def test_an_activation_without_operators_is_refused_with_names_that_have_some():
    layer = LoRADense(SIZE, SIZE, 2, 1, activation=nn.SiLU())  # MindSpore computes it in a function
    layer.shard(strategy_lora_a_matmul=((1, 1), (1, 1)))
    with pytest.raises(ValueError, match=r"SiLU has no operator that takes a strategy.*silu"):
        layer.shard(strategy_activation=((2, 1),))


@pytest.mark.parametrize(
    "activation", ["logsoftmax", "logsoftmaxExt", nn.LogSoftmax(), ops.LogSoftmax()], ids=["name", "ext", "cell", "op"]
)
def test_log_softmax_is_refused_in_parallel_modes(parallel_mode, activation):
    layer = LoRADense(SIZE, SIZE, 2, 1, activation=activation)
    for strategies in ({}, {"strategy_activation": ((1, 1),)}):
        with pytest.raises(ValueError, match="LogSoftmax is not supported"):
            layer.shard(**strategies)
    assert strategy_of(layer.matmul) is None


def test_log_softmax_is_allowed_without_parallel_modes():
    layer = LoRADense(SIZE, SIZE, 2, 1, activation="logsoftmax")
    layer.shard(strategy_activation=((2, 1),))
    assert strategy_of(_compat.primitives_of(layer.activation)[0]) == ((2, 1),)
