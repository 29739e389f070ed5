"""LayerNorm tuning, and that `targets`, `exclude` and `layers` limit a method that only selects parameters."""

import json

import pytest
from mindspore import nn

from mindpet import BitFitConfig, LNTuningConfig, LoRAConfig, eject, inject
from mindpet.graph import freeze_delta
from mindpet.interop import PeftFormatError, save_peft
from mindpet.models import LlamaConfig, LlamaForCausalLM


def network():
    return nn.SequentialCell(
        *(nn.SequentialCell(nn.Dense(4, 4), nn.LayerNorm((4,)), nn.BatchNorm1d(4)) for _ in range(2)), nn.Dense(4, 2)
    )


def trains(cell):
    return [parameter.name for parameter in cell.trainable_params()]


def test_every_norm_trains():
    cell = inject(network(), LNTuningConfig())
    assert trains(cell) == [f"{layer}.{norm}.{name}" for layer in "01" for norm in "12" for name in ("gamma", "beta")]
    eject(cell)
    freeze_delta(cell, "ln_tuning")
    assert len(trains(cell)) == 8


def test_root_mean_square_norms_are_found_by_their_name():
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=8, max_position_embeddings=8)
    names = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"]
    assert trains(inject(LlamaForCausalLM(config), LNTuningConfig())) == [f"{name}.weight" for name in names]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LNTuningConfig(targets=["0.1", "1.2"]), ["0.1.gamma", "0.1.beta", "1.2.gamma", "1.2.beta"]),
        (LNTuningConfig(targets=[nn.LayerNorm], layers=1), ["1.1.gamma", "1.1.beta"]),
        (LNTuningConfig(exclude=["*.2", "0.*"]), ["1.1.gamma", "1.1.beta"]),
        (BitFitConfig(layers=[1]), ["1.0.bias"]),
        (BitFitConfig(targets="all-linear", exclude=["0.*"]), ["1.0.bias", "2.bias"]),
    ],
)
def test_some_cells_alone(config, expected):
    cell = inject(network(), config)
    assert trains(cell) == expected
    inject(cell, LoRAConfig(rank=1, targets=["2"]))  # which goes on training beside another method
    assert set(trains(cell)) == {*expected, "2.mindpet_delta_lora_a", "2.mindpet_delta_lora_b"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LNTuningConfig(targets=["*.5"]), "match no cell"),
        (LNTuningConfig(targets=["2"]), "None of the cells .* has a parameter of the method 'ln_tuning'"),
        (LNTuningConfig(layers=[7]), "match no cell"),
    ],
)
def test_cells_without_a_norm_are_an_error_and_change_nothing(config, says):
    cell = network()
    before = trains(cell)
    with pytest.raises(ValueError, match=says):
        inject(cell, config)
    assert trains(cell) == before


def test_what_peft_has_no_place_for_is_not_written(tmp_path):
    cell = inject(inject(network(), LNTuningConfig()), BitFitConfig())
    with pytest.raises(PeftFormatError, match="biases train beside ln_tuning"):
        save_peft(cell, tmp_path)
    cell = inject(inject(network(), LNTuningConfig()), LoRAConfig(rank=1, targets=["2"]))
    with pytest.raises(PeftFormatError, match="has ln_tuning and lora|has lora and ln_tuning"):
        save_peft(cell, tmp_path)


def test_what_is_saved_whole_beside_the_norms_is_written_for_peft(tmp_path):
    save_peft(inject(network(), LNTuningConfig(modules_to_save=["2"])), tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["modules_to_save"] == ["0.2", "1.2", "2"]  # the last part of a path is enough
