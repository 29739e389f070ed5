"""The named ways to cut a layer: they compile, cut every operator, and reduce each gradient over the right ranks."""

import mindspore as ms
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mindpet import _compat
from mindpet.delta import AdapterLayer, LoRADense, LowRankAdapterDense
from mindpet.delta.activation import activation_names
from mindpet.parallel import ParallelConfig, strategies
from tests.few import mostly_exhaustive
from tests.parallel.compiler import assert_reduced_over_ranks_with_the_same_slice, compile_layer, devices, text
from tests.parallel.layers import IN, LAYERS, OUT, PLAIN, PRESETS, input_shape, output_parts

CAN_BE_CUT = sorted(set(activation_names()) - {"rrelu", "logsoftmax", "logsoftmaxExt"})
# Which delta parameters are cut, and along which axis, where the layer is cut by rows and by columns.
CUT = {
    ("LoRADense", "rows"): {"mindpet_delta_lora_b": 0},
    ("LoRADense", "columns"): {"mindpet_delta_lora_a": 1},
    ("Adapter", "rows"): {"down_sampler.weight": 1, "up_sampler.weight": 0, "up_sampler.bias": 0},
    ("LowRankAdapter", "rows"): {
        "down_sampler.mindpet_delta_low_rank_adapter_weight_left": 0,
        "up_sampler.mindpet_delta_low_rank_adapter_weight_right": 1,
        "up_sampler.bias": 0,
    },
}


def compile_preset(layer, config, world=8, rank=0, rows=16, parts=None):
    with devices(world, rank):
        layer.shard(**strategies(layer, config))
        return compile_layer(layer, input_shape(layer, rows), parts or output_parts(config), world)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_preset_cuts_every_operator(compiler, name, preset):
    layer, config = LAYERS[name](), PRESETS[preset]
    whole = {parameter.name: tuple(parameter.shape) for parameter in layer.get_parameters()}
    expected = strategies(layer, config)
    compiled = compile_preset(layer, config)
    assert set(expected) == set(layer.sharded)
    assert {argument: [cut for _, cut in marks] for argument, marks in compiled.given.items()} == {
        argument: [text(strategy)] for argument, strategy in expected.items()
    }
    assert sorted(strategy for _, strategy in compiled.strategies) == sorted(expected.values())
    assert compiled.bare == []
    # MindSpore lays the product of two low-rank weights, which has no batch, out over the devices in another order.
    low_rank_weights = name.startswith("LowRank") and preset == "data and rows"
    assert bool(compiled.moved) == low_rank_weights
    assert_reduced_over_ranks_with_the_same_slice(compiled, layer, 8, 0)
    kind = name.replace("AdapterDense", "Adapter").replace("AdapterLayer", "Adapter")
    cut_axes = CUT.get((kind, config.cut), {})
    for parameter in (each for each in whole if "mindpet_delta" in each):
        shape = list(whole[parameter])
        for axis in (axis for ending, axis in cut_axes.items() if parameter.endswith(ending)):
            shape[axis] //= config.model_parallel
        assert compiled.slices[parameter] == tuple(shape), parameter
    if "weight" in whole:
        out, size = whole["weight"]
        cut = {"rows": (out // config.model_parallel, size), "columns": (out, size // config.model_parallel)}
        assert compiled.slices["weight"] == cut[config.cut]


@pytest.mark.parametrize("rank", [3, 5, 7])
@pytest.mark.parametrize("preset", ["data and rows", "data and columns"])
def test_each_rank_reduces_with_those_that_hold_the_same_slice(compiler, preset, rank):
    layer = LAYERS["LoRADense"]()
    compiled = compile_preset(layer, PRESETS[preset], rank=rank)
    assert_reduced_over_ranks_with_the_same_slice(compiled, layer, 8, rank)
    cut = "mindpet_delta_lora_b" if preset == "data and rows" else "mindpet_delta_lora_a"
    assert compiled.reduced[cut] == [
        rank % 4,
        rank % 4 + 4,
    ]  # the other half of the batch


@pytest.mark.parametrize("activation", mostly_exhaustive(CAN_BE_CUT, "gelu", "leakyrelu", "prelu", "softmax"))
def test_every_activation_that_can_be_cut_is_cut(compiler, activation):
    layer, config = LAYERS["LoRADense"](activation), PRESETS["data and rows"]
    operators = [each for each in _compat.primitives_of(layer.activation) if each.name != "Cast"]
    over_features = activation in ("softmax", "softmin")
    parts = (2, 1) if over_features else (2, 4)
    compiled = compile_preset(layer, config, parts=parts)
    marked = [(kind, cut) for kind, cut in compiled.given["strategy_activation"] if kind != "Cast"]
    assert sorted(kind for kind, _ in marked) == sorted(operator.name for operator in operators)
    assert all(cut.startswith(f"({parts}") for _, cut in marked)
    taken = list(compiled.strategies)
    for argument, strategy in strategies(layer, config).items():  # what is left is the activation's
        if argument != "strategy_activation":
            taken.remove((compiled.given[argument][0][0], strategy))
    assert sorted(kind for kind, _ in taken) == sorted(operator.name for operator in operators)
    assert all(strategy[0] == parts for _, strategy in taken)
    assert compiled.bare == []
    deltas = {name for name in compiled.updated if "mindpet_delta" in name}
    assert deltas == set(compiled.reduced) == {"mindpet_delta_lora_a", "mindpet_delta_lora_b"}


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_any_sizes_that_the_parts_divide_compile(compiler, data):
    world = data.draw(st.sampled_from([2, 4, 8, 16]), "devices")
    divisors = [number for number in range(1, world + 1) if world % number == 0]
    data_parallel = data.draw(st.sampled_from(divisors), "data_parallel")
    model_parallel = data.draw(
        st.sampled_from([number for number in divisors if world // data_parallel % number == 0]), "model_parallel"
    )
    cut = data.draw(st.sampled_from(["rows", "columns"]), "cut")
    config = ParallelConfig(data_parallel=data_parallel, model_parallel=model_parallel, cut=cut)
    size = [model_parallel * data.draw(st.integers(1, 5), axis) for axis in ("in", "out")]
    rank = data.draw(st.integers(1, 5), "rank")
    layer = data.draw(
        st.sampled_from(
            [
                LoRADense(*size, rank, 7, 0.5, **PLAIN),  # a scale of 1 would be compiled away
                AdapterLayer(size[1], bottleneck_size=rank, **PLAIN),
                LowRankAdapterDense(*size, low_rank_size=rank, has_bias=False, **PLAIN),
            ]
        ),
        "layer",
    )
    seen_by = data.draw(st.integers(0, world - 1), "rank of device")
    rows = data_parallel * data.draw(st.integers(1, 3), "rows")
    compiled = compile_preset(layer, config, world, seen_by, rows)
    assert sorted(strategy for _, strategy in compiled.strategies) == sorted(strategies(layer, config).values())
    assert compiled.bare == []
    assert_reduced_over_ranks_with_the_same_slice(compiled, layer, world, seen_by)


def test_a_three_dimensional_input_is_cut_by_its_batch(compiler):
    layer, config = LAYERS["LoRADense"](), PRESETS["data and rows"]
    with devices(8):
        layer.shard(**strategies(layer, config))
        compiled = compile_layer(layer, (4, 6, IN), (2, 1, 4), 8)
    assert sorted(strategy for _, strategy in compiled.strategies) == sorted(strategies(layer, config).values())
    assert compiled.slices["weight"] == (OUT // 4, IN)


def test_networks_run_as_before_outside_the_block(compiler, rng, mode):
    layer = LAYERS["LoRADense"]().set_train(False)
    x = ms.Tensor(rng.normal(size=(4, IN)), ms.float32)
    before = layer(x).asnumpy()
    compile_preset(LAYERS["LoRADense"](), PRESETS["rows"])
    np.testing.assert_array_equal(layer(x).asnumpy(), before)
    again = LAYERS["LoRADense"]().set_train(False)
    for mine, its in zip(again.get_parameters(), layer.get_parameters()):
        mine.set_data(its)
    np.testing.assert_array_equal(again(x).asnumpy(), before)
