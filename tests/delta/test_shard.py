"""Each documented ``shard`` call writes each strategy on the operator that it names.

A plain run on a CPU ignores strategies, so this shows what is written down, not that it compiles for several devices.
"""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from mindpet.delta import (
    AdapterDense,
    AdapterLayer,
    LoRADense,
    LowRankAdapterDense,
    LowRankAdapterLayer,
    PrefixEncoder,
)
from mindpet.delta.strategy import Sharded, _reason, _shapes, input_axes


def strategy_of(operator):
    return operator.get_attr_dict().get("in_strategy")


LORA = {
    "strategy_org_dense_matmul": ((2, 1), (4, 1)),
    "strategy_org_bias_add": ((2, 4), (4,)),
    "strategy_lora_dropout": ((2, 1),),
    "strategy_lora_a_matmul": ((2, 1), (1, 1)),
    "strategy_lora_b_matmul": ((2, 1), (4, 1)),
    "strategy_lora_mul": ((2, 4), ()),
    "strategy_lora_add": ((2, 4), (2, 4)),
    "strategy_activation": ((2, 4), (2, 4)),
}
DENSE = {
    "strategy_matmul_org": ((2, 4), (1, 4)),
    "strategy_bias_org": ((2, 1), (1,)),
    "strategy_activation_org": ((2, 1),),
}
ADAPTER = {
    "strategy_matmul_down_sampler": ((2, 1), (1, 1)),
    "strategy_bias_down_sampler": ((2, 1), (1,)),
    "strategy_non_linearity": ((2, 1),),
    "strategy_matmul_up_sampler": ((2, 1), (1, 1)),
    "strategy_bias_up_sampler": ((2, 1), (1,)),
    "strategy_residual_add": ((2, 1), (2, 1)),
}
LOW_RANK_ADAPTER = {
    "strategy_matmul_down_sampler_weight": ((1, 1), (1, 1)),
    "strategy_matmul_down_sampler_input": ((2, 1), (1, 1)),
    "strategy_bias_down_sampler": ((2, 1), (1,)),
    "strategy_non_linearity": ((2, 1),),
    "strategy_matmul_up_sampler_weight": ((1, 1), (1, 1)),
    "strategy_matmul_up_sampler_input": ((2, 1), (1, 1)),
    "strategy_bias_up_sampler": ((2, 1), (1,)),
    "strategy_residual_add": ((2, 1), (2, 1)),
}


def lora_operators(layer):
    return {
        "strategy_org_dense_matmul": layer.matmul,
        "strategy_org_bias_add": layer.bias_add,
        "strategy_lora_dropout": layer.lora_dropout.dropout,
        "strategy_lora_a_matmul": layer.lora_a_matmul,
        "strategy_lora_b_matmul": layer.lora_b_matmul,
        "strategy_lora_mul": layer.mul,
        "strategy_lora_add": layer.add,
        "strategy_activation": layer.activation,
    }


def adapter_operators(layer):
    block = layer.mindpet_delta_adapter_block
    down, up = block.mindpet_delta_adapter_down_sampler, block.mindpet_delta_adapter_up_sampler
    return {
        "strategy_matmul_down_sampler": down.matmul,
        "strategy_bias_down_sampler": down.bias_add,
        "strategy_non_linearity": block.mindpet_delta_adapter_non_linear.gelu,
        "strategy_matmul_up_sampler": up.matmul,
        "strategy_bias_up_sampler": up.bias_add,
        "strategy_residual_add": layer.residual_add,
    }


def low_rank_adapter_operators(layer):
    down = layer.mindpet_delta_low_rank_adapter_down_sampler
    up = layer.mindpet_delta_low_rank_adapter_up_sampler
    return {
        "strategy_matmul_down_sampler_weight": down.matmul_weight,
        "strategy_matmul_down_sampler_input": down.matmul_input,
        "strategy_bias_down_sampler": down.bias_add,
        "strategy_non_linearity": layer.mindpet_delta_low_rank_adapter_non_linear.gelu,
        "strategy_matmul_up_sampler_weight": up.matmul_weight,
        "strategy_matmul_up_sampler_input": up.matmul_input,
        "strategy_bias_up_sampler": up.bias_add,
        "strategy_residual_add": layer.residual_add,
    }


def dense_operators(layer):
    return {
        "strategy_matmul_org": layer.matmul,
        "strategy_bias_org": layer.bias_add,
        "strategy_activation_org": layer.activation,
    }


def adapter_dense_operators(layer):
    return {**dense_operators(layer), **adapter_operators(layer.mindpet_delta_adapter)}


def low_rank_adapter_dense_operators(layer):
    return {**dense_operators(layer), **low_rank_adapter_operators(layer.mindpet_delta_low_rank_adapter)}


# An activation as a Primitive, so that its strategy can be read where it is written.
LAYERS = {
    "LoRADense": (lambda: LoRADense(784, 512, 8, 16, activation=ops.ReLU()), LORA, lora_operators),
    "AdapterDense": (
        lambda: AdapterDense(784, 512, bottleneck_size=64, activation=ops.ReLU()),
        {**DENSE, **ADAPTER},
        adapter_dense_operators,
    ),
    "AdapterLayer": (lambda: AdapterLayer(512, bottleneck_size=64), ADAPTER, adapter_operators),
    "LowRankAdapterDense": (
        lambda: LowRankAdapterDense(784, 512, reduction_factor=8, activation=ops.ReLU()),
        {**DENSE, **LOW_RANK_ADAPTER},
        low_rank_adapter_dense_operators,
    ),
    "LowRankAdapterLayer": (
        lambda: LowRankAdapterLayer(512, 8, low_rank_size=1),
        LOW_RANK_ADAPTER,
        low_rank_adapter_operators,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_documented_strategy_is_written_on_the_operator_that_it_names(name):
    make, strategies, operators_of = LAYERS[name]
    layer = make()
    operators = operators_of(layer)
    assert set(operators) == set(strategies)
    assert {strategy_of(operator) for operator in operators.values()} == {None}
    layer.shard(**strategies)
    written = dict(strategies)
    if name == "LoRADense":  # the document gives two tuples, and an activation has one input
        written["strategy_activation"] = ((2, 4),)
    assert {argument: strategy_of(operator) for argument, operator in operators.items()} == written


@pytest.mark.parametrize("name", LAYERS)
def test_each_strategy_is_written_on_one_operator_alone(name):
    make, strategies, operators_of = LAYERS[name]
    for argument, strategy in strategies.items():
        layer = make()
        layer.shard(**{argument: strategy})
        written = {other for other, operator in operators_of(layer).items() if strategy_of(operator) is not None}
        assert written == {argument}


@pytest.mark.parametrize("name", LAYERS)
def test_none_leaves_operators_alone(name):
    make, _, operators_of = LAYERS[name]
    layer = make()
    layer.shard()
    assert {strategy_of(operator) for operator in operators_of(layer).values()} == {None}


@pytest.mark.parametrize("name", ["LoRADense", "AdapterDense", "LowRankAdapterDense"])
def test_strategies_of_operators_that_are_not_there_are_ignored(name):
    make = {"LoRADense": lambda **o: LoRADense(8, 8, 2, 1, **o), "AdapterDense": lambda **o: AdapterDense(8, 8, **o)}
    layer = make.get(name, lambda **o: LowRankAdapterDense(8, 8, **o))(has_bias=False)
    layer.shard(**LAYERS[name][1])
    assert layer.activation is None
    assert strategy_of(layer.matmul) is not None


@pytest.mark.parametrize("name", ["AdapterDense", "AdapterLayer", "LowRankAdapterDense", "LowRankAdapterLayer"])
def test_the_misspelt_argument_is_an_unexpected_keyword(name):
    layer = LAYERS[name][0]()
    with pytest.raises(TypeError, match="unexpected keyword argument 'strategy_residential_add'"):
        layer.shard(strategy_residential_add=((2, 1), (2, 1)))


@pytest.mark.parametrize("strategy", [[2, 1], (1, 2), ([2, 1], [1, 1]), ((2.5, 1), (1, 1)), (("2", 1), (1, 1))])
def test_what_is_no_tuple_of_tuples_of_ints_is_refused(strategy):
    with pytest.raises(TypeError):
        LoRADense(8, 8, 2, 1).shard(strategy_lora_a_matmul=strategy)


def test_a_sharded_layer_computes_on_one_device_as_before(mode, rng):
    layer = LoRADense(8, 8, 2, 1, activation="gelu", lora_b_init="normal", compute_dtype=ms.float32)
    x = ms.Tensor(rng.normal(size=(4, 8)), ms.float32)
    before = layer(x).asnumpy()
    layer.shard(**{**LORA, "strategy_activation": ((2, 4),)})
    np.testing.assert_array_equal(layer(x).asnumpy(), before)


def test_lora_has_the_operators_that_frameworks_reach_for():
    layer = LoRADense(8, 8, 2, 1)
    for path in ("matmul", "bias_add", "lora_dropout.dropout", "lora_a_matmul", "lora_b_matmul", "mul", "add"):
        operator = layer
        for name in path.split("."):
            operator = getattr(operator, name)
        assert isinstance(operator, ops.Primitive), path
        assert callable(operator.shard), path
    assert layer.matmul.transpose_b
    assert layer.lora_a_matmul.transpose_b
    assert layer.lora_b_matmul.transpose_b


def test_low_rank_products_transpose_nothing():
    layer = LowRankAdapterLayer(8, 2)
    for sampler in (
        layer.mindpet_delta_low_rank_adapter_down_sampler,
        layer.mindpet_delta_low_rank_adapter_up_sampler,
    ):
        assert not sampler.matmul_weight.transpose_b
        assert not sampler.matmul_input.transpose_b


def encoder_strategies(encoder):
    names = ("tile", "transpose", "split")
    found = {name: strategy_of(getattr(encoder, name)) for name in names}
    found["dropout"] = strategy_of(encoder.dropout.dropout)
    return found


@pytest.mark.parametrize("out_perm", [(2, 0, 3, 1, 4), (0, 2, 3, 1, 4)])
def test_prefix_encoder_cuts_the_batch_and_the_heads(out_perm):
    encoder = PrefixEncoder(8, 2, 4, 16, True, 32, 0.1, out_perm=out_perm)
    assert set(encoder_strategies(encoder).values()) == {None}
    encoder.shard(2, 4)
    whole = (2, 1, 1, 4, 1)
    assert encoder_strategies(encoder) == {
        "tile": ((1, 1, 1, 4, 1),),
        "dropout": (whole,),
        "transpose": (whole,),
        "split": (tuple(whole[axis] for axis in out_perm),),
    }
    assert strategy_of(encoder.mindpet_delta_ptuning2_in.matmul) == ((1, 1), (1, 1))
    assert strategy_of(encoder.mindpet_delta_ptuning2_out.bias_add) == ((1, 1), (1,))


def test_prefix_encoder_takes_a_parallel_config():
    parallel_config = SimpleNamespace(data_parallel=2, model_parallel=4)
    given = PrefixEncoder(8, 2, 4, 16, False, 32, 0.1, parallel_config=parallel_config)
    called = PrefixEncoder(8, 2, 4, 16, False, 32, 0.1)
    called.shard(data_parallel=2, model_parallel=4)
    assert encoder_strategies(given) == encoder_strategies(called)
    assert strategy_of(given.transpose) == ((2, 1, 1, 4, 1),)


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ((0, 1), ValueError, "'data_parallel' must be a positive int"),
        ((1, 1.5), TypeError, "'model_parallel' must be a positive int"),
        ((1, 3), ValueError, "'model_parallel' must divide the 4 heads"),
    ],
)
def test_prefix_encoder_refuses_cuts_that_do_not_fit(sizes, kind, message):
    with pytest.raises(kind, match=message):
        PrefixEncoder(8, 2, 4, 16, False, 32, 0.1).shard(*sizes)


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (((2, 2), (4, 4)), "cut into 2 parts in one and 4 in the other"),
        (((2, 4), (4, 2)), "cut into 4 parts in one and 2 in the other"),
        (((2, 2), (4, 2)), ""),
    ],
)
def test_a_shared_axis_is_cut_alike(strategy, says):
    reason = _reason(strategy, [("rows", "in"), ("out", "in")], {"in": 8, "out": 8}, ())
    assert says in reason
    assert bool(says) == bool(reason)


def test_a_weight_the_other_way_round_has_its_axes_so():
    product = Sharded("matmul", "rows in, out in")
    assert input_axes(ops.MatMul(transpose_b=True), product) == [("rows", "in"), ("out", "in")]
    assert input_axes(ops.MatMul(), product) == [("rows", "in"), ("in", "out")]
    assert _shapes([("rows", "in"), ("out",), ()], {"in": 8, "out": 3}) == "(rows, 8) and (3,) and ()"


def test_heads_are_cut_into_equal_parts():
    encoder = PrefixEncoder(4, 2, 6, 8, False, 16, 0.0)
    assert encoder.require_cut(1, 1) == (1, 1)
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=3)
    try:
        assert encoder.require_cut(1, 3) == (1, 3)
    finally:
        ms.reset_auto_parallel_context()
    with pytest.raises(ValueError, match="must divide the 6 heads, but got 4"):
        encoder.require_cut(1, 4)
