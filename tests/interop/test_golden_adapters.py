"""What the library `adapters` computes (tests/golden/make_adapters.py): the same outputs and gradients here."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from mindpet import AdapterConfig, AdapterFusionConfig, CompacterConfig, MAMConfig, ParallelAdapterConfig, inject
from mindpet.models import BertForSequenceClassification
from tests.oracles import difference

GOLDEN = Path(__file__).parents[1] / "golden"
INPUTS = json.loads((GOLDEN / "peft" / "base" / "expected.json").read_text())["inputs"]
BLOCK = "mindpet_delta_adapter_block.mindpet_delta_adapter"
BEHIND = {
    "adapter_down.0.weight": "down_sampler.weight",
    "adapter_down.0.bias": "down_sampler.bias",
    "adapter_up.weight": "up_sampler.weight",
    "adapter_up.bias": "up_sampler.bias",
}
BESIDE = {
    "a.adapter_down.0.weight": "mindpet_delta_parallel_adapter_down",
    "a.adapter_down.0.bias": "mindpet_delta_parallel_adapter_down_bias",
    "a.adapter_up.weight": "mindpet_delta_parallel_adapter_up",
    "a.adapter_up.bias": "mindpet_delta_parallel_adapter_up_bias",
}
FUSION = {
    **{f"a.{name}": f"mindpet_delta_fusion_adapters.0.{BLOCK}_{part}" for name, part in BEHIND.items()},
    **{f"b.{name}": f"mindpet_delta_fusion_adapters.1.{BLOCK}_{part}" for name, part in BEHIND.items()},
    **{f"a,b.{name}.weight": f"mindpet_delta_fusion_{name}" for name in ("query", "key", "value")},
    "a,b.query.bias": "mindpet_delta_fusion_query_bias",
}
WITHOUT_EFFECT = ".a,b.key.bias"  # the same for all adapters
SAMPLERS = {"a.adapter_down.0": "mindpet_delta_compacter_down", "a.adapter_up": "mindpet_delta_compacter_up"}
PHM = {"W_left": "left", "W_right": "right", "W": "whole", "phm_rule": "rule"}
COMPACTER = {
    **{f"{a}.{b}": f"{x}.mindpet_delta_compacter_{y}" for a, x in SAMPLERS.items() for b, y in PHM.items()},
    **{f"{a}.b": f"{x}.bias" for a, x in SAMPLERS.items()},
}
PREFIX = "bert.encoder.layer.0.attention.self.prefix_tuning.pool.prefix_tunings.a.self_prefix.control_trans"
SHARED = {  # parameters of no dense layer there
    "bert.shared_parameters.a.phm_rule": "bert.encoder.layer.0.attention.output.dense.mindpet_delta_compacter_down."
    "mindpet_delta_compacter_rule",
}
CASES = {  # the configuration, and our name for each of the library's
    "adapter": (
        AdapterConfig(size=2, non_linearity="relu"),
        {f"a.{name}": f"mindpet_delta_adapter.{BLOCK}_{part}" for name, part in BEHIND.items()},
    ),
    "fusion": (AdapterFusionConfig(adapters=2, size=2, non_linearity="relu"), FUSION),
    "parallel_adapter": (ParallelAdapterConfig(size=2), BESIDE),
    "mam": (MAMConfig(tokens=3, projection=False, size=2), BESIDE),
    "compacter": (CompacterConfig(size=4, phm_dim=2, non_linearity="relu"), COMPACTER),
    "phm": (CompacterConfig(size=4, phm_dim=2, low_rank=False, shared=False, non_linearity="relu"), COMPACTER),
}


def translated(case, tensors):
    """By our paths."""
    names = CASES[case][1]
    found = {}
    for name, value in tensors.items():
        if name.endswith(WITHOUT_EFFECT):
            continue
        if name == PREFIX:  # one after the other: tokens, layers, key and value, width
            rows = np.array(value, np.float32).reshape(3, 2, 2, 8)
            for layer, kind in np.ndindex(2, 2):
                mine = f"mindpet_delta_prefixtuning_past_{('key', 'value')[kind]}"
                found[f"bert.encoder.prefix.layers.{layer}.{mine}"] = rows[:, layer, kind]
            continue
        path, _, part = name.partition(".dense.")
        found[f"{path}.dense.{names[part]}" if part else SHARED[name]] = np.array(value, np.float32)
    return found


def differences(case):
    """The largest difference from the library of the logits, and of the gradient of each parameter by its name here."""
    expected = json.loads((GOLDEN / "adapters" / f"{case}.json").read_text())
    network = BertForSequenceClassification.from_pretrained(GOLDEN / "peft" / "base", num_labels=3)[0]
    inject(network.set_train(False), CASES[case][0])
    parameters = {parameter.name: parameter for parameter in network.get_parameters()}
    for name, value in translated(case, expected["values"]).items():
        parameters[name].set_data(Tensor(value))
    inputs = [Tensor(np.array(rows, np.int32)) for rows in INPUTS.values()]
    differ = {"logits": difference(network(*inputs).asnumpy(), expected["logits"])}
    labels = Tensor([0, 2], ms.int32)

    def loss(*given):
        return ops.cross_entropy(network(*given), labels)

    trained = network.trainable_params()
    without = [value for name, value in expected["gradients"].items() if name.endswith(WITHOUT_EFFECT)]
    assert np.abs(np.array(without)).max(initial=0) < 1e-6
    assert sum(parameter.size for parameter in trained) == expected["trains"] - np.size(without)
    found = ops.grad(loss, None, ms.ParameterTuple(trained))(*inputs)
    wanted = translated(case, expected["gradients"])
    assert set(wanted) == {parameter.name for parameter in trained}
    for parameter, gradient in zip(trained, found):
        differ[parameter.name] = difference(gradient.asnumpy(), wanted[parameter.name])
    return differ


@pytest.mark.exhaustive_in_graph("*-adapter", "*-fusion")
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_library(mode, case):
    found = differences(case)
    assert {name: error for name, error in found.items() if not error <= 1e-5} == {}
