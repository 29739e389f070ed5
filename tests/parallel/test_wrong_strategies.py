"""Strategies that cannot be are refused by us, with everything that is wrong, before MindSpore compiles anything."""

import mindspore as ms
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mindspore import nn, ops

from mindpet import _compat
from mindpet.delta import LoRADense, PrefixEncoder
from mindpet.delta.strategy import operator_of
from mindpet.parallel import ParallelConfig, strategies
from tests.parallel.compiler import compile_layer, devices
from tests.parallel.layers import IN, LAYERS, OUT, PLAIN, PRESETS


@pytest.fixture
def eight_devices():
    """The context alone: what shard needs to know how many devices there are."""
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=8)
    yield
    ms.reset_auto_parallel_context()


WRONG = {
    "does not divide": (
        {"strategy_org_dense_matmul": ((2, 1), (3, 1))},
        r"'LoRADense'.*\n.*strategy_org_dense_matmul=\(\(2, 1\), \(3, 1\)\) of MatMul on \(rows, 32\) and \(64, 32\): "
        r"an axis of 64 cannot be cut into 3 equal parts",
    ),
    "too few tuples": ({"strategy_lora_add": ((2, 4),)}, "one tuple for each of the 2 inputs, but has 1"),
    "too many tuples": ({"strategy_lora_dropout": ((2, 1), (1, 1))}, "one tuple for each of the 1 inputs, but has 2"),
    "too many tuples, different": ({"strategy_activation": ((2, 4), (2, 1))}, "each of the 1 inputs, but has 2"),
    "too few numbers": ({"strategy_lora_a_matmul": ((2, 1), (1,))}, r"input 2 must have 2 numbers.*but is \(1,\)"),
    "too many numbers": ({"strategy_org_bias_add": ((2, 4, 1), (4,))}, "input 1 must have 2 numbers"),
    "zero": ({"strategy_lora_b_matmul": ((0, 1), (4, 1))}, "0 is no number of parts; 1 leaves an axis whole"),
    "negative": ({"strategy_lora_b_matmul": ((2, 1), (-1, 1))}, "-1 is no number of parts"),
    "the scalar": ({"strategy_lora_mul": ((2, 4), (1,))}, r"input 2 must have 0 numbers"),
    "unequal": ({"strategy_org_dense_matmul": ((2, 4), (1, 2))}, "cut into 4 parts in one and 2 in the other"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_strategy_names_layer_operator_strategy_and_shape(case):
    layer = LAYERS["LoRADense"]()
    given_strategies, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        layer.shard(**given_strategies)
    assert all(_compat.strategy_of(operator) is None for operator in (layer.matmul, layer.lora_b_matmul, layer.add))


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_written():
    layer = LAYERS["LowRankAdapterDense"]()
    with pytest.raises(ValueError, match="these strategies do not fit") as refusal:
        layer.shard(
            strategy_matmul_org=((2, 5), (1, 5)),
            strategy_bias_org=((2, 1), (1,)),
            strategy_matmul_down_sampler_weight=((1, 1), (1, 3)),
            strategy_residual_add=((2, 1), (4, 1)),
        )
    message = str(refusal.value)
    assert "strategy_bias_org" not in message
    assert "strategy_matmul_down_sampler_weight=((1, 1), (1, 3)) of MatMul on (64, 2) and (2, 8)" in message
    assert "strategy_residual_add=((2, 1), (4, 1)) of Add on (rows, 64) and (rows, 64)" in message
    assert _compat.strategy_of(layer.bias_add) is None


@pytest.mark.parametrize("name", LAYERS)
def test_more_devices_than_there_are(eight_devices, name):
    layer = LAYERS[name]()
    too_many = ParallelConfig(data_parallel=8, model_parallel=2)
    with pytest.raises(ValueError, match=rf"'{name}'(.|\n)*it needs 16 devices, too many for 8"):
        layer.shard(**strategies(layer, too_many))


def test_devices_that_cannot_be_shared_out_equally(eight_devices):
    with pytest.raises(ValueError, match="it needs 3 devices, not an equal share of 8"):
        LAYERS["LoRADense"]().shard(strategy_lora_dropout=((3, 1),))
    with pytest.raises(ValueError, match="data_parallel=2, model_parallel=8 does not fit: it needs 16 devices"):
        PrefixEncoder(4, 2, 8, 4, False, 16, 0.1).shard(2, 8)


def test_stages_of_a_pipeline_share_the_devices():
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=8, pipeline_stages=2)
    try:
        with pytest.raises(ValueError, match="it needs 8 devices, too many for 4"):
            LAYERS["LoRADense"]().shard(strategy_lora_dropout=((8, 1),))
    finally:
        ms.reset_auto_parallel_context()


def test_how_many_devices_there_are_may_not_be_known_yet():
    LAYERS["LoRADense"]().shard(strategy_lora_dropout=((1024, 1),))


@pytest.mark.parametrize("strategy", [[2, 1], (1, 2), ([2, 1], [1, 1]), ((2.5, 1), (1, 1)), ((True, 1), (1, 1)), "ab"])
def test_what_is_no_tuple_of_tuples_of_ints_names_the_argument(strategy):
    with pytest.raises(TypeError, match="'LoRADense', 'strategy_lora_a_matmul' must be a tuple with a tuple of ints"):
        LAYERS["LoRADense"]().shard(strategy_lora_a_matmul=strategy)


def test_layouts_are_left_to_mindspore():
    layer, layout = LAYERS["LoRADense"](), ms.Layout((2, 4), ("data", "model"))
    layer.shard(strategy_org_dense_matmul=(layout("data", "None"), layout("model", "None")))
    assert _compat.has_layouts(layer.matmul)


@pytest.mark.parametrize("activation", ["softmax", "softmin"])
def test_what_an_activation_normalises_over_stays_whole(activation):
    layer = LAYERS["LoRADense"](activation)
    with pytest.raises(ValueError, match="it normalises over axis 1, which must stay whole"):
        layer.shard(strategy_activation=((2, 4),))
    layer.shard(strategy_activation=((2, 1),))


@pytest.mark.parametrize("activation", [ops.HSwish(), nn.HSwish()], ids=["primitive", "cell"])
def test_an_activation_whose_strategy_mindspore_would_not_read(activation):
    layer = LoRADense(IN, OUT, 2, 1, activation=activation, **PLAIN)
    with pytest.raises(ValueError, match="does not read a strategy of HSwish; give the activation by name.*hswish"):
        layer.shard(strategy_activation=((2, 4),))


@pytest.mark.parametrize("name", ["LoRADense", "AdapterDense", "LowRankAdapterDense"])
def test_log_softmax_is_refused_in_a_parallel_mode(eight_devices, name):
    layer = {
        "LoRADense": lambda: LoRADense(IN, OUT, 2, 1, activation="logsoftmax"),
        "AdapterDense": lambda: LAYERS["AdapterDense"]("logsoftmax"),
        "LowRankAdapterDense": lambda: LAYERS["LowRankAdapterDense"]("logsoftmax"),
    }[name]()
    with pytest.raises(ValueError, match=f"'{name}'.*LogSoftmax is not supported"):
        layer.shard(**strategies(layer, PRESETS["data"]))


def test_a_batch_that_cannot_be_cut_shows_in_compiling(compiler, capfd):
    layer, config = LAYERS["LoRADense"](), PRESETS["data"]
    with devices(8), pytest.raises(RuntimeError, match="operator MatMul init failed"):
        layer.shard(**strategies(layer, config))
        compile_layer(layer, (12, IN), (8, 1), 8)


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_the_compiler_agrees_with_what_is_refused(compiler, data):
    """Any one strategy of numbers: either we take it and it compiles, or we refuse it and it would not have."""
    layer = LoRADense(24, 48, 4, 6, lora_dropout=0.1, activation="tanh", **PLAIN)
    argument = data.draw(st.sampled_from(sorted(layer.sharded)))
    correct = strategies(layer, PRESETS["data and rows"])
    numbers = st.sampled_from([1, 2, 4, 8, 3, 0, 16])
    strategy = tuple(
        tuple(data.draw(numbers) if data.draw(st.booleans()) else right for right in each) for each in correct[argument]
    )
    with devices(8):
        layer.shard(**{**correct, argument: None})
        try:
            layer.shard(**{argument: strategy})
        except ValueError:
            operator = operator_of(layer, layer.sharded[argument])
            operator = operator if argument != "strategy_activation" else _compat.primitives_of(operator)[0]
            operator.shard(strategy)
            with pytest.raises(RuntimeError):
                compile_layer(layer, (16, 24), (2, 4), 8)
        else:
            compiled = compile_layer(layer, (16, 24), (2, 4), 8)
            assert strategy in [each for _, each in compiled.strategies]
