"""Every layer and loss against its documented formula."""

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn, ops

from mindpet.delta import (
    AdapterDense,
    AdapterLayer,
    LoRADense,
    LowRankAdapterDense,
    LowRankAdapterLayer,
    PrefixEncoder,
    PrefixLayer,
    RDropLoss,
    rdrop_repeat,
)
from tests import oracles
from tests.oracles import OnEach, inputs_of_every_rank, randomise, values

FLOAT32 = {"compute_dtype": ms.float32}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def assert_equal_on_every_rank(layer, expected, rng, size, **tolerance):
    inputs = inputs_of_every_rank(rng, size)
    outputs = OnEach(layer)(*map(Tensor, inputs))
    for x, out in zip(inputs, outputs):
        assert out.dtype == ms.float32
        np.testing.assert_allclose(out.asnumpy(), expected(x.astype(np.float64)), **(tolerance or CLOSE))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_lora_dense_is_its_formula(mode, rng, has_bias, activation):
    layer = randomise(LoRADense(6, 4, 2, 3, has_bias=has_bias, activation=activation, **FLOAT32), rng, 0.5)
    parameters = values(layer)
    assert ("bias" in parameters) == has_bias
    assert_equal_on_every_rank(layer, lambda x: oracles.lora(x, parameters, 3 / 2, activation), rng, 6)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_adapter_dense_is_its_formula(mode, rng, has_bias, activation):
    options = {"has_bias": has_bias, "activation": activation, "bottleneck_size": 3, "non_linearity": "sigmoid"}
    layer = randomise(AdapterDense(6, 4, **options, **FLOAT32), rng, 0.5)
    parameters = values(layer)
    bottleneck = oracles.below(parameters, "mindpet_delta_adapter")

    def expected(x):
        return oracles.adapter(oracles.dense(x, parameters, activation), bottleneck, "sigmoid")

    assert_equal_on_every_rank(layer, expected, rng, 6)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_low_rank_adapter_dense_is_its_formula(mode, rng, has_bias, activation):
    options = {"has_bias": has_bias, "activation": activation, "reduction_factor": 2, "low_rank_size": 2}
    layer = randomise(LowRankAdapterDense(6, 8, non_linearity="sigmoid", **options, **FLOAT32), rng, 0.5)
    parameters = values(layer)
    bottleneck = oracles.below(parameters, "mindpet_delta_low_rank_adapter")

    def expected(x):
        return oracles.low_rank_adapter(oracles.dense(x, parameters, activation), bottleneck, "sigmoid")

    assert_equal_on_every_rank(layer, expected, rng, 6)


# MindSpore's CPU tanh is off by up to 1e-4, and the default gelu is the tanh form.
@pytest.mark.parametrize(("non_linearity", "tolerance"), [("relu", 1e-5), ("sigmoid", 1e-5), ("gelu", 1e-3)])
def test_bottleneck_layers_are_their_formulas(mode, rng, non_linearity, tolerance):
    wide = randomise(AdapterLayer(6, 3, non_linearity, **FLOAT32), rng, 0.5)
    thin = randomise(LowRankAdapterLayer(6, 4, 2, non_linearity=non_linearity, **FLOAT32), rng, 0.5)
    close = {"rtol": tolerance, "atol": tolerance}
    assert_equal_on_every_rank(wide, lambda x: oracles.adapter(x, values(wide), non_linearity), rng, 6, **close)
    assert_equal_on_every_rank(
        thin, lambda x: oracles.low_rank_adapter(x, values(thin), non_linearity), rng, 6, **close
    )


def test_bottleneck_width_is_rounded_down():
    layer = LowRankAdapterLayer(10, 4, low_rank_size=3)
    assert layer.mindpet_delta_low_rank_adapter_down_sampler.bias.shape == (2,)
    assert {parameter.shape for parameter in layer.get_parameters()} == {(10, 3), (3, 2), (2,), (2, 3), (3, 10), (10,)}


def test_default_gelu_is_the_default_of_mindspore(mode, rng):
    layer = randomise(AdapterLayer(6, 3, **FLOAT32), rng, 0.5)
    p = oracles.below(values(layer), "mindpet_delta_adapter_block")
    x = rng.normal(size=(5, 6)).astype(np.float32)
    down, up = "mindpet_delta_adapter_down_sampler", "mindpet_delta_adapter_up_sampler"
    inner = x @ p[f"{down}.weight"].T + p[f"{down}.bias"]
    inner = nn.get_activation("gelu")(Tensor(inner, ms.float32)).asnumpy()
    expected = x + inner @ p[f"{up}.weight"].T + p[f"{up}.bias"]
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), expected, **CLOSE)


def test_initial_values_are_the_documented_ones():
    lora = LoRADense(64, 48, 4, 8)
    assert not lora.mindpet_delta_lora_b.asnumpy().any()
    assert not lora.bias.asnumpy().any()
    a = lora.mindpet_delta_lora_a.asnumpy()
    bound = np.sqrt(6 / ((1 + 5) * 64))  # HeUniform(negative_slope=sqrt(5)): a uniform distribution
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.9 * bound
    assert 0.008 < lora.weight.asnumpy().std() < 0.012  # 'normal' has deviation 0.01
    thin = LowRankAdapterLayer(64, 8)
    left = thin.mindpet_delta_low_rank_adapter_down_sampler.mindpet_delta_low_rank_adapter_weight_left.asnumpy()
    assert np.abs(left).max() <= np.sqrt(6 / (64 + 1))  # xavier_uniform
    assert not thin.mindpet_delta_low_rank_adapter_up_sampler.bias.asnumpy().any()


def test_initial_tensors_become_the_parameters(rng):
    weight, bias, a, b = (rng.normal(size=size).astype(np.float32) for size in ((4, 6), (4,), (2, 6), (4, 2)))
    layer = LoRADense(
        6, 4, 2, 1, lora_a_init=Tensor(a), lora_b_init=Tensor(b), weight_init=Tensor(weight), bias_init=Tensor(bias)
    )
    for parameter, given_value in (
        (layer.weight, weight),
        (layer.bias, bias),
        (layer.mindpet_delta_lora_a, a),
        (layer.mindpet_delta_lora_b, b),
    ):
        np.testing.assert_array_equal(parameter.asnumpy(), given_value)


def test_new_layers_start_as_what_they_replace(mode, rng):
    x = rng.normal(size=(5, 6)).astype(np.float32)
    weight = rng.normal(size=(6, 6)).astype(np.float32)
    plain = nn.Dense(6, 6, Tensor(weight), bias_init="zeros")(Tensor(x)).asnumpy()
    lora = LoRADense(6, 6, 2, 4, weight_init=Tensor(weight), **FLOAT32)
    adapted = AdapterDense(6, 6, weight_init=Tensor(weight), bottleneck_size=2, **FLOAT32)
    np.testing.assert_allclose(lora(Tensor(x)).asnumpy(), plain, **CLOSE)
    # Near the identity, not the identity: two weights of deviation 0.01.
    np.testing.assert_allclose(adapted(Tensor(x)).asnumpy(), plain, atol=1e-2)


class EveryLayer(nn.Cell):
    """All the layers side by side, behind one compilation."""

    def __init__(self, **kinds):
        super().__init__()
        self.lora = LoRADense(6, 6, 2, 3, **kinds)
        self.adapter_dense = AdapterDense(6, 6, bottleneck_size=3, non_linearity="relu", **kinds)
        self.adapter_layer = AdapterLayer(6, 3, "relu", **kinds)
        self.low_rank_dense = LowRankAdapterDense(6, 6, reduction_factor=2, non_linearity="relu", **kinds)
        self.low_rank_layer = LowRankAdapterLayer(6, 2, non_linearity="relu", **kinds)

    def construct(self, x):
        return (
            self.lora(x),
            self.adapter_dense(x),
            self.adapter_layer(x),
            self.low_rank_dense(x),
            self.low_rank_layer(x),
        )

    def expected(self, x):
        p = values(self)
        wide, thin = oracles.below(p, "adapter_dense"), oracles.below(p, "low_rank_dense")
        return (
            oracles.lora(x, oracles.below(p, "lora"), 3 / 2),
            oracles.adapter(oracles.dense(x, wide), oracles.below(wide, "mindpet_delta_adapter"), "relu"),
            oracles.adapter(x, oracles.below(p, "adapter_layer"), "relu"),
            oracles.low_rank_adapter(
                oracles.dense(x, thin), oracles.below(thin, "mindpet_delta_low_rank_adapter"), "relu"
            ),
            oracles.low_rank_adapter(x, oracles.below(p, "low_rank_layer"), "relu"),
        )


@pytest.mark.parametrize("input_dtype", [ms.float32, ms.float16], ids=str)
@pytest.mark.parametrize("param_init_type", [ms.float32, ms.float16], ids=str)
@pytest.mark.parametrize("compute_dtype", [ms.float32, ms.float16], ids=str)
def test_output_has_the_dtype_of_the_input(mode, rng, input_dtype, param_init_type, compute_dtype):
    layers = randomise(EveryLayer(param_init_type=param_init_type, compute_dtype=compute_dtype), rng, 0.5)
    assert {parameter.dtype for parameter in layers.get_parameters()} == {param_init_type}
    x = rng.normal(size=(2, 3, 6)).astype(np.float16)
    outputs = layers(Tensor(x, input_dtype))
    exact = ms.float16 not in (input_dtype, param_init_type, compute_dtype)
    close = CLOSE if exact else {"rtol": 2e-2, "atol": 2e-2}
    for out, expected in zip(outputs, layers.expected(x.astype(np.float64))):
        assert out.dtype == input_dtype
        np.testing.assert_allclose(out.asnumpy(), expected, **close)


def test_compute_dtype_is_float16_unless_told_otherwise():
    for layer in (LoRADense(2, 2, 1, 1), AdapterDense(2, 2), AdapterLayer(2), LowRankAdapterDense(2, 2)):
        assert layer.compute_dtype == ms.float16
        assert {parameter.dtype for parameter in layer.get_parameters()} == {ms.float32}


@pytest.mark.parametrize("rate", [0.5, 0.75])
def test_dropout_is_on_the_delta_branch_only(mode, rng, rate):
    size = 16
    eye = Tensor(np.eye(size, dtype=np.float32))  # A and B let the dropped-out input through
    weight = Tensor(rng.normal(size=(size, size)).astype(np.float32))
    layer = LoRADense(size, size, size, float(size), rate, eye, eye, weight_init=weight, **FLOAT32)
    x = rng.uniform(1, 2, size=(8, size)).astype(np.float32)
    frozen = x @ weight.asnumpy().T

    layer.set_train(True)
    branch = layer(Tensor(x)).asnumpy() - frozen
    dropped = np.abs(branch) < 1e-4
    np.testing.assert_allclose(branch[~dropped], (x / (1 - rate))[~dropped], rtol=1e-4, atol=1e-4)
    assert rate - 0.2 < dropped.mean() < rate + 0.2
    assert (layer(Tensor(x)).asnumpy() != branch + frozen).any()  # another mask each time

    layer.set_train(False)
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), frozen + x, **CLOSE)


def test_zero_dropout_is_silent_in_training(mode, rng):
    layer = randomise(LoRADense(6, 4, 2, 3, 0.0, **FLOAT32), rng).set_train(True)
    x = rng.normal(size=(5, 6)).astype(np.float32)
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), oracles.lora(x, values(layer), 1.5), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None, database=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    channels=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9)),
    alpha=st.one_of(st.integers(-3, -1), st.floats(0.1, 32)),
    seed=st.integers(0, 99),
)
def test_lora_dense_of_any_shape(lead, channels, alpha, seed):
    rng = np.random.default_rng(seed)
    size, out, rank = channels
    layer = randomise(LoRADense(size, out, rank, alpha, **FLOAT32), rng, 0.3)
    x = rng.normal(size=(*lead, size)).astype(np.float32)
    result = layer(Tensor(x)).asnumpy()
    assert result.shape == (*lead, out)
    np.testing.assert_allclose(result, oracles.lora(x, values(layer), alpha / rank), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None, database=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    hidden=st.integers(1, 9),
    bottleneck=st.integers(1, 5),
    rank=st.integers(1, 3),
    data=st.data(),
)
def test_bottleneck_layers_of_any_shape(lead, hidden, bottleneck, rank, data):
    rng = np.random.default_rng(3)
    factor = data.draw(st.integers(1, hidden))
    x = rng.normal(size=(*lead, hidden)).astype(np.float32)
    wide = randomise(AdapterLayer(hidden, bottleneck, "relu", **FLOAT32), rng, 0.3)
    thin = randomise(LowRankAdapterLayer(hidden, factor, rank, non_linearity="relu", **FLOAT32), rng, 0.3)
    np.testing.assert_allclose(
        wide(Tensor(x)).asnumpy(), oracles.adapter(x, values(wide), "relu"), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        thin(Tensor(x)).asnumpy(), oracles.low_rank_adapter(x, values(thin), "relu"), rtol=1e-4, atol=1e-5
    )


def test_lora_delta_weight_is_what_the_branch_adds(rng):
    layer = randomise(LoRADense(6, 4, 2, 3, **FLOAT32), rng)
    p = values(layer)
    expected = 3 / 2 * p["mindpet_delta_lora_b"] @ p["mindpet_delta_lora_a"]
    np.testing.assert_allclose(layer.delta_weight().asnumpy(), expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------- prefix methods


def test_called_prefix_layer_is_its_network(mode, rng):
    layer = randomise(PrefixLayer(6, 2, 2, 8, 5, 7, dropout_rate=0.4), rng, 0.5).set_train(False)
    key, value = layer()
    expected_key, expected_value = oracles.prefix(values(layer))
    assert key.shape == value.shape == (6, 8)
    # the CPU's tanh
    np.testing.assert_allclose(key.asnumpy(), expected_key, atol=1e-3)
    np.testing.assert_allclose(value.asnumpy(), expected_value, atol=1e-3)


def test_prefix_parameters_start_from_the_network_and_fold_follows_it(mode, rng):
    layer = PrefixLayer(6, 2, 2, 8, 5, 7)
    key, value = layer.past_key_reparam, layer.past_value_reparam
    assert isinstance(key, ms.Parameter)
    assert isinstance(value, ms.Parameter)
    assert key is not value
    assert key.shape == value.shape == (6, 8)
    for parameter, expected in zip((key, value), oracles.prefix(values(layer))):
        np.testing.assert_allclose(parameter.asnumpy(), expected, atol=1e-6)
    assert (key.asnumpy() != value.asnumpy()).any()
    randomise(layer, rng)
    assert np.abs(key.asnumpy() - oracles.prefix(values(layer))[0]).max() > 0.1
    layer.fold()
    for parameter, expected in zip((key, value), oracles.prefix(values(layer))):
        np.testing.assert_allclose(parameter.asnumpy(), expected, atol=1e-5)
    assert layer.past_key_reparam is key  # the parameter that the user's network holds


def test_prefix_dropout_is_on_the_embedding_in_training_only(mode):
    layer = PrefixLayer(8, 1, 2, 4, 8, 8, dropout_rate=0.5)
    eye = np.eye(8, dtype=np.float32)
    layer.mindpet_delta_prefixtuning_embedding.set_data(Tensor(np.full((8, 8), 0.5, np.float32)))
    layer.mindpet_delta_prefixtuning_in.weight.set_data(Tensor(eye))
    layer.mindpet_delta_prefixtuning_out.weight.set_data(Tensor(eye))
    layer.mindpet_delta_prefixtuning_in.bias.set_data(Tensor(np.zeros(8, np.float32)))
    layer.mindpet_delta_prefixtuning_out.bias.set_data(Tensor(np.zeros(8, np.float32)))
    layer.set_train(True)
    rows = np.concatenate([half.asnumpy() for half in layer()], axis=1)
    dropped = np.abs(rows) < 1e-3
    assert 0.2 < dropped.mean() < 0.8
    np.testing.assert_allclose(rows[~dropped], np.tanh(1.0), atol=1e-3)
    layer.set_train(False)
    rows = np.concatenate([half.asnumpy() for half in layer()], axis=1)
    np.testing.assert_allclose(rows, np.tanh(0.5), atol=1e-3)


class Encoded(nn.Cell):
    """A PrefixEncoder called as documented, and in a dtype that is asked for."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def construct(self):
        return self.encoder(3), self.encoder(3, ms.float32)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("out_perm", [(2, 0, 3, 1, 4), (2, 1, 0, 3, 4), (0, 2, 3, 1, 4)])
def test_prefix_encoder_is_its_table(mode, rng, projection, out_perm):
    tokens, layers, heads, channels = 5, 3, 2, 4
    encoder = PrefixEncoder(tokens, layers, heads, channels, projection, 6, 0.5, out_perm=out_perm)
    randomise(encoder, rng, 0.5).set_train(False)
    table = oracles.prompts(values(encoder), layers, heads, channels)
    whole = np.broadcast_to(table, (3, *table.shape)).transpose(out_perm)
    expected = np.split(whole, layers, axis=out_perm.index(2))
    by_default, asked = Encoded(encoder)()
    assert len(by_default) == len(asked) == layers
    for half, single, formula in zip(by_default, asked, expected):
        assert (half.dtype, single.dtype) == (ms.float16, ms.float32)
        assert half.shape == single.shape == formula.shape
        np.testing.assert_allclose(half.asnumpy(), formula, rtol=2e-2, atol=2e-2)
        close = {"atol": 1e-3} if projection else {"rtol": 1e-5}  # the CPU's tanh
        np.testing.assert_allclose(single.asnumpy(), formula, **close)


def test_prefix_encoder_gives_key_then_value(rng):
    encoder = randomise(PrefixEncoder(5, 2, 3, 4, False, 6, 0.0), rng)
    table = values(encoder)["mindpet_delta_ptuning2_embedding"].reshape(5, 4, 3, 4)
    pairs = encoder(2, ms.float32)
    for layer, pair in enumerate(pairs):
        key, value = pair[0].asnumpy(), pair[1].asnumpy()  # (batch, heads, tokens, channels)
        np.testing.assert_allclose(key[1], table[:, 2 * layer].transpose(1, 0, 2), rtol=1e-6)
        np.testing.assert_allclose(value[0], table[:, 2 * layer + 1].transpose(1, 0, 2), rtol=1e-6)


def test_prefix_encoder_drops_out_in_training_only(mode):
    encoder = PrefixEncoder(8, 1, 4, 4, False, 6, 0.5)
    encoder.mindpet_delta_ptuning2_embedding.set_data(Tensor(np.ones((8, 32), np.float32)))
    encoder.set_train(True)
    prompts = encoder(2)[0].asnumpy()
    assert set(np.unique(prompts)) == {0.0, 2.0}
    assert (prompts[:, 0] != prompts[:, 1]).any()  # each sample has a mask of its own
    encoder.set_train(False)
    np.testing.assert_array_equal(encoder(2)[0].asnumpy(), 1.0)


# ------------------------------------------------------------------------------------------------------ R-Drop


class Losses(nn.Cell):
    """One loss on several pairs of logits and labels."""

    def __init__(self, alpha=4):
        super().__init__()
        self.loss = RDropLoss()
        self.alpha = alpha

    def construct(self, logits, *labels):
        outputs = ()
        for label in labels:
            outputs += (self.loss(logits, label, self.alpha),)
        return outputs


INDEX_TYPES = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]


@pytest.mark.parametrize("shape", [(6,), (4, 3)], ids=["rows", "tokens"])
def test_r_drop_is_its_formula_for_labels_of_every_kind(mode, rng, shape):
    logits = rng.normal(size=(*shape, 5)).astype(np.float32)
    index = rng.integers(0, 5, size=shape)
    soft = rng.dirichlet(np.ones(5), size=shape).astype(np.float16)
    labels = [Tensor(index.astype(kind)) for kind in INDEX_TYPES]
    labels += [Tensor(soft), Tensor(soft.astype(np.float32))]
    losses = [float(loss) for loss in Losses()(Tensor(logits), *labels)]
    hard = oracles.r_drop(logits, oracles.one_hot(index, 5), 4)
    np.testing.assert_allclose(losses[: len(INDEX_TYPES)], hard, rtol=1e-5)
    np.testing.assert_allclose(losses[len(INDEX_TYPES) :], oracles.r_drop(logits, soft.astype(float), 4), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0, 1, 4, 6.5])
def test_r_drop_weighs_the_divergence_by_alpha(mode, rng, alpha):
    logits = rng.normal(size=(6, 5)).astype(np.float32)
    index = np.array([0, 0, 3, 3, 4, 4], np.int32)
    (loss,) = Losses(alpha)(Tensor(logits), Tensor(index))
    np.testing.assert_allclose(float(loss), oracles.r_drop(logits, oracles.one_hot(index, 5), alpha), rtol=1e-5)


def test_r_drop_has_alpha_four_by_default(mode, rng):
    logits = rng.normal(size=(4, 5)).astype(np.float32)
    index = np.array([0, 0, 3, 3], np.int32)
    loss = RDropLoss()(Tensor(logits), Tensor(index))
    np.testing.assert_allclose(float(loss), oracles.r_drop(logits, oracles.one_hot(index, 5), 4), rtol=1e-5)


def test_r_drop_of_log_probabilities_is_that_of_logits(mode, rng):
    logits = rng.normal(size=(6, 5)).astype(np.float32) * 3
    index = Tensor(np.array([0, 0, 3, 3, 4, 4], np.int32))
    log_probabilities = oracles.log_softmax(logits).astype(np.float32)
    (loss,) = Losses()(Tensor(logits), index)
    (same,) = Losses()(Tensor(log_probabilities), index)
    np.testing.assert_allclose(float(loss), float(same), rtol=1e-5)


def test_r_drop_does_not_grow_with_the_batch(mode, rng):
    logits = rng.normal(size=(4, 5)).astype(np.float32)
    index = np.array([1, 1, 2, 2], np.int32)
    (once,) = Losses()(Tensor(logits), Tensor(index))
    (three_times,) = Losses()(Tensor(np.tile(logits, (3, 1))), Tensor(np.tile(index, 3)))
    np.testing.assert_allclose(float(three_times), float(once), rtol=1e-5)


def test_r_drop_of_equal_copies_is_the_cross_entropy(mode, rng):
    rows = rng.normal(size=(3, 5)).astype(np.float32)
    index = np.array([1, 0, 4], np.int32)
    logits, labels = rdrop_repeat(Tensor(rows), Tensor(index))
    (loss,) = Losses()(logits, labels)
    expected = ops.cross_entropy(Tensor(rows), Tensor(index))
    np.testing.assert_allclose(float(loss), float(expected), rtol=1e-5)


def test_r_drop_of_one_row_with_probabilities_is_its_cross_entropy(mode, rng):
    logits = rng.normal(size=5).astype(np.float32)
    soft = rng.dirichlet(np.ones(5)).astype(np.float32)
    (loss,) = Losses()(Tensor(logits), Tensor(soft))
    assert loss.shape == ()
    np.testing.assert_allclose(float(loss), -(soft * oracles.log_softmax(logits.astype(float))).sum(), rtol=1e-5)


def test_r_drop_in_float16(mode, rng):
    logits = rng.normal(size=(6, 5)).astype(np.float16)
    index = np.array([0, 0, 3, 3, 4, 4], np.int32)
    (loss,) = Losses()(Tensor(logits), Tensor(index))
    assert loss.dtype == ms.float16
    np.testing.assert_allclose(float(loss), oracles.r_drop(logits, oracles.one_hot(index, 5), 4), rtol=2e-2)


def test_r_drop_of_large_logits_is_finite(mode):
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    (loss,) = Losses()(Tensor(logits), Tensor(np.array([0, 0], np.int32)))
    np.testing.assert_allclose(float(loss), oracles.r_drop(logits, oracles.one_hot(np.array([0, 0]), 2), 4), rtol=1e-5)


def test_r_drop_ignores_positions_labelled_minus_100(mode, rng):
    logits = rng.normal(size=(4, 3, 5)).astype(np.float32)
    index = np.repeat(rng.integers(0, 5, size=(2, 3)), 2, axis=0).astype(np.int32)
    index[:2, 1:] = -100  # in both copies, as rdrop_repeat lays them
    counts = index != -100
    expected = oracles.r_drop(logits, oracles.one_hot(np.where(counts, index, 0), 5), 4, counts)
    ignored = logits.copy()
    ignored[:2, 1:] += rng.normal(size=(2, 2, 5))
    (loss,) = Losses()(Tensor(logits), Tensor(index))
    (other,) = Losses()(Tensor(ignored.astype(np.float32)), Tensor(index))
    (nothing,) = Losses()(Tensor(logits), Tensor(np.full_like(index, -100)))
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
    np.testing.assert_allclose(float(other), expected, rtol=1e-5)
    assert float(nothing) == 0.0


@pytest.mark.parametrize("alpha", [True, "4", None, Tensor(4.0)], ids=["bool", "str", "none", "tensor"])
def test_r_drop_refuses_other_kinds_of_alpha(mode, alpha):
    logits, index = Tensor(np.zeros((4, 5), np.float32)), Tensor(np.zeros(4, np.int32))
    with pytest.raises(TypeError, match=r"'alpha' must be an int or a float, but got"):
        RDropLoss()(logits, index, alpha)


def test_r_drop_refuses_an_odd_number_of_rows(mode):
    with pytest.raises(ValueError, match=r"two copies of each sample.*3 rows"):
        RDropLoss()(Tensor(np.zeros((3, 5), np.float32)), Tensor(np.zeros(3, np.int32)))


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [(np.zeros((4, 1), np.int32), r"\(4,\)"), (np.zeros((4, 3), np.float32), r"\(4, 5\)")],
    ids=["indices", "probabilities"],
)
def test_r_drop_refuses_labels_of_another_shape(mode, labels, wanted):
    with pytest.raises(ValueError, match=rf"'label_ids'.*must have shape {wanted}"):
        RDropLoss()(Tensor(np.zeros((4, 5), np.float32)), Tensor(labels))


def test_r_drop_refuses_logits_that_are_not_floats(mode):
    with pytest.raises(TypeError, match=r"'logits' must be float32 or float16"):
        RDropLoss()(Tensor(np.zeros((4, 5), np.int32)), Tensor(np.zeros(4, np.int32)))


class Repeated(nn.Cell):
    def construct(self, one, two, three):
        return rdrop_repeat(one, two, three) + (rdrop_repeat(one),)


def test_rdrop_repeat_makes_neighbours(mode, rng):
    one, two = np.array([1, 2], np.int32), rng.normal(size=(2, 3)).astype(np.float32)
    three = rng.integers(0, 9, size=(2, 3, 4))
    outputs = Repeated()(Tensor(one), Tensor(two), Tensor(three))
    assert outputs[0].asnumpy().tolist() == [1, 1, 2, 2]
    for out, given_value in zip(outputs, (one, two, three, one)):
        np.testing.assert_array_equal(out.asnumpy(), np.repeat(given_value, 2, axis=0))
        assert out.asnumpy().dtype == given_value.dtype
