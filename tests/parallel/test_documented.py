"""The examples of the user document, compiled for eight devices: with gradients, with an optimizer, as written."""

import pytest

from mindpet.delta import AdapterDense, AdapterLayer, LoRADense, LowRankAdapterDense, LowRankAdapterLayer, PrefixEncoder
from mindpet.parallel import ParallelConfig, strategies
from tests.delta.test_shard import ADAPTER, DENSE, LORA, LOW_RANK_ADAPTER
from tests.parallel.compiler import assert_reduced_over_ranks_with_the_same_slice, compile_layer, devices, text

# Layer, strategies, how its output is cut, and shapes of slices that differ from the whole.
EXAMPLES = {
    "LoRADense": (
        lambda: LoRADense(1 * 28 * 28, 512, lora_rank=8, lora_alpha=16, lora_dropout=0.1, activation="relu"),
        LORA,
        (2, 4),
        {"weight": (128, 784), "bias": (128,), "mindpet_delta_lora_b": (128, 8)},
    ),
    "AdapterDense": (
        lambda: AdapterDense(1 * 28 * 28, 512, bottleneck_size=64, activation="relu"),
        {**DENSE, **ADAPTER},
        (2, 1),
        {"weight": (512, 196)},
    ),
    "AdapterLayer": (lambda: AdapterLayer(512, bottleneck_size=64), ADAPTER, (2, 1), {}),
    "LowRankAdapterDense": (
        lambda: LowRankAdapterDense(1 * 28 * 28, 512, reduction_factor=8, activation="relu"),
        {**DENSE, **LOW_RANK_ADAPTER},
        (2, 1),
        {"weight": (512, 196)},
    ),
    "LowRankAdapterLayer": (
        lambda: LowRankAdapterLayer(512, reduction_factor=8, low_rank_size=1),
        LOW_RANK_ADAPTER,
        (2, 1),
        {},
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_operator_has_the_strategy_of_the_example(compiler, name):
    make, given, parts, slices = EXAMPLES[name]
    layer = make()
    whole = {parameter.name: tuple(parameter.shape) for parameter in layer.get_parameters()}
    with devices(8):
        layer.shard(**given)
        sizes = layer.axis_sizes()
        compiled = compile_layer(layer, (16, sizes.get("in", sizes["out"])), parts, 8)
    # The one activation has one input, whatever the document's example of LoRADense says.
    expected = dict(given)
    if "strategy_activation" in given:
        expected["strategy_activation"] = given["strategy_activation"][:1]
    assert {argument: [strategy for _, strategy in marks] for argument, marks in compiled.given.items()} == {
        argument: [text(strategy)] for argument, strategy in expected.items()
    }
    assert sorted(strategy for _, strategy in compiled.strategies) == sorted(expected.values())
    assert compiled.bare == []
    held = {name: shape for name, shape in compiled.slices.items() if name in whole}
    assert held == {**whole, **slices}
    assert_reduced_over_ranks_with_the_same_slice(compiled, layer, 8, 0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_the_presets_give(name):
    make, given, _, _ = EXAMPLES[name]
    cut = "rows" if name == "LoRADense" else "columns"
    config = ParallelConfig(data_parallel=2, model_parallel=4, cut=cut)
    one_input = {"strategy_activation": ((2, 4),)} if name == "LoRADense" else {}
    assert strategies(make(), config) == {**given, **one_input}


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(("data_parallel", "model_parallel"), [(2, 4), (8, 1), (1, 8)])
def test_prefix_encoder_cuts_the_batch_and_the_heads(compiler, data_parallel, model_parallel, projection):
    encoder = PrefixEncoder(4, 2, 8, 4, projection, 16, 0.1)
    cut = (1, data_parallel, model_parallel, 1, 1)  # key and value, batch, heads, tokens, kv_channels
    with devices(8):
        encoder.shard(data_parallel, model_parallel)
        compiled = compile_layer(encoder, (2, 8, 8, 4, 4), cut, 8)
    whole = (data_parallel, 1, 1, model_parallel, 1)
    dense = [("MatMul", ((1, 1), (1, 1))), ("BiasAdd", ((1, 1), (1,)))]
    network = [*dense, ("Tanh", ((1, 1),)), *dense] if projection else []
    assert compiled.strategies == sorted(
        [
            ("Dropout", (whole,)),
            ("Split", (cut,)),
            ("Tile", ((1, 1, 1, model_parallel, 1),)),
            ("Transpose", (whole,)),
            *network,
        ]
    )
    assert compiled.bare == []
    trained = {parameter.name.removeprefix("layer.") for parameter in encoder.trainable_params()}
    assert set(compiled.updated) == trained
    assert compiled.reduced == {name: list(range(8)) for name in trained}
