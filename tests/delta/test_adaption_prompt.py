"""The adaption prompt: the formula, which layers, what it leaves alone, and what PEFT's format cannot say."""

import json

import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from mindpet import AdaptionPromptConfig, LoRAConfig, accelerate, inject, load_peft, save_peft
from mindpet.delta.adaption_slot import attend_prompt
from mindpet.graph import target_report
from mindpet.interop import PeftFormatError
from mindpet.kernels import build as kernels
from mindpet.models import BertConfig, BertForSequenceClassification
from tests.models.causal import build, fill, logits, tokens

NEAR = {"atol": 2e-5, "rtol": 1e-4}


def layers_of(network):
    return sorted({int(p.name.split(".")[2]) for p in network.trainable_params()})


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_head_attends_to_the_keys_of_its_group(mode, rng, groups):
    query, key, value = (rng.standard_normal(shape) for shape in ((2, 3, 20), (6, 5 * groups), (6, 5 * groups)))
    expected = np.zeros((2, 3, 20))
    for head in range(4):
        group = slice(5 * (head * groups // 4), 5 * (head * groups // 4) + 5)
        part = slice(5 * head, 5 * head + 5)
        weights = np.exp(query[..., part] @ key[:, group].T / np.sqrt(5))
        expected[..., part] = 0.7 * weights / weights.sum(-1, keepdims=True) @ value[:, group]
    given = (Tensor(part.astype(np.float32)) for part in (query, key, value, np.array([0.7])))
    np.testing.assert_allclose(attend_prompt(*given, 5).asnumpy(), expected, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_gate_at_zero_changes_nothing_whatever_the_prompt_is(family):
    network, ids = build(family), tokens(2, 6)
    before = logits(network, ids)
    inject(network, AdaptionPromptConfig(tokens=3))
    np.testing.assert_array_equal(logits(network, ids), before)
    fill(network)
    assert np.abs(logits(network, ids) - before).max() > 0.1


def test_a_bert_has_it_before_its_output_layer(rng):
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8, initializer_range=0.5), 3)
    fill(inject(network.set_train(False), AdaptionPromptConfig(tokens=3)))
    attention = network.bert.encoder.layer[0].attention.self
    rows, mask = Tensor(rng.standard_normal((10, 8)).astype(np.float32)), Tensor(np.zeros((2, 1, 1, 5), np.float32))
    prompt, gate = attention.adaption()
    query = attention.query(rows).reshape((2, 5, 8))
    expected = attend_prompt(query, attention.key(prompt), attention.value(prompt), gate, 4).asnumpy()
    opened = attention(rows, mask, None).asnumpy()
    gate.set_data(Tensor(np.zeros(1, np.float32)))
    np.testing.assert_allclose(opened - attention(rows, mask, None).asnumpy(), expected.reshape(10, 8), atol=1e-6)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_layers": 3}, [1, 2, 3]),
        ({"layers": [0, 2]}, [0, 2]),
        ({"layers": [0, 2, 3], "top_layers": 2}, [2, 3]),
        ({"exclude": ["*.3.*"], "top_layers": 1}, [2]),
    ],
)
def test_the_topmost_of_the_targeted_layers_are_chosen(options, expected):
    network = inject(build("llama", num_hidden_layers=4), AdaptionPromptConfig(tokens=2, **options))
    assert layers_of(network) == expected


def test_options_are_checked():
    with pytest.raises(TypeError, match="'tokens' must be a positive int"):
        AdaptionPromptConfig(tokens=0.5)
    with pytest.raises(ValueError, match="'top_layers' must be a positive int"):
        AdaptionPromptConfig(top_layers=0)
    network = build("llama")
    with pytest.raises(ValueError, match="'top_layers' must be at most 2, .* but got 3"):
        inject(network, AdaptionPromptConfig(top_layers=3))
    assert all(parameter.requires_grad for parameter in network.get_parameters())


def test_padding_changes_nothing():
    network, ids = fill(inject(build("llama"), AdaptionPromptConfig(tokens=3))), tokens(2, 5)
    padded, mask = np.pad(ids, ((0, 0), (3, 0)), constant_values=9), np.pad(np.ones_like(ids), ((0, 0), (3, 0)))
    np.testing.assert_allclose(logits(network, padded, mask)[:, 3:], logits(network, ids), **NEAR)


@pytest.mark.parametrize("prompt_first", [True, False])
def test_lora_on_the_projections_changes_the_keys_of_the_prompt_too(prompt_first):
    """As PEFT would have it: the prompt goes through the layers as they are."""
    network, ids = build("llama"), tokens(1, 4)
    configs = [AdaptionPromptConfig(tokens=3), LoRAConfig(rank=2, targets=["*.k_proj"])]
    for config in configs if prompt_first else configs[::-1]:
        inject(network, config)
    fill(network)
    adapted = logits(network, ids)
    for layer in network.model.layers:  # the same weights without LoRA
        projection = layer.self_attn.k_proj
        projection.weight.set_data(projection.weight + projection.delta_weight())
        projection.mindpet_delta_lora_b.set_data(projection.mindpet_delta_lora_b * 0)
    np.testing.assert_allclose(logits(network, ids), adapted, **NEAR)


@pytest.mark.skipif(not kernels.available(), reason=f"no kernels here: {kernels.why_not()}")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_kernels_compute_the_same(mode, family):
    network, ids = fill(inject(build(family), AdaptionPromptConfig(tokens=3))), tokens(2, 6)
    before = logits(network, ids)
    np.testing.assert_allclose(logits(accelerate(network), ids), before, **NEAR)
    cache = network.new_cache(2, 9)
    np.testing.assert_allclose(network.step(ids, None, cache).asnumpy(), before[:, -1], **NEAR)


@pytest.mark.parametrize("layers", [[0], [0, 2]])
def test_layers_that_are_not_the_topmost_are_not_written_for_peft(tmp_path, layers):
    network = inject(build("llama", num_hidden_layers=3), AdaptionPromptConfig(layers=layers))
    with pytest.raises(PeftFormatError, match="ADAPTION_PROMPT is in the topmost layers"):
        save_peft(network, tmp_path / "new")


def test_attentions_that_peft_does_not_have_it_for_are_not_written(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    network = inject(BertForSequenceClassification(BertConfig(vocab_size=31, **sizes), 3), AdaptionPromptConfig())
    with pytest.raises(PeftFormatError, match="called self_attn or attn, .* and not in self"):
        save_peft(network, tmp_path / "new")
    assert not (tmp_path / "new" / "adapter_config.json").exists()


def test_a_misspelt_target_is_told_of_before_the_number_of_layers():
    report = target_report(build("llama"), AdaptionPromptConfig(targets=["*.adaption", "*.adaptoin"], top_layers=9))
    assert list(report.misses) == ["*.adaptoin"]


@pytest.fixture
def written(tmp_path):
    save_peft(fill(inject(build("llama", num_hidden_layers=3), AdaptionPromptConfig(tokens=3, top_layers=2))), tmp_path)
    return tmp_path


def test_a_directory_for_peft_says_how_many_layers_and_which_module(written):
    content = json.loads((written / "adapter_config.json").read_text())
    assert content["peft_type"] == "ADAPTION_PROMPT"
    assert (content["adapter_len"], content["adapter_layers"], content["target_modules"]) == (3, 2, "self_attn")
    assert {name: value.shape for name, value in load_file(written / "adapter_model.safetensors").items()} == {
        f"base_model.model.model.layers.{layer}.self_attn.adaption_{part}": shape
        for layer in (1, 2)
        for part, shape in (("prompt", (1, 3, 16)), ("gate", (1,)))
    }
    assert layers_of(load_peft(build("llama", num_hidden_layers=3), written)) == [1, 2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"adapter_layers": 1}, r"model.layers.1.self_attn.adaption is not one of the topmost 1"),
        ({"adapter_layers": 3}, r"missing in the file: adaption_prompt of model.layers.0.self_attn.adaption"),
        ({"adapter_layers": 4}, "adapter_layers is 4, and must be from 1 to 3"),
        ({"adapter_layers": None}, "adapter_layers is None, and must be from 1 to 3"),
        ({"adapter_len": 4}, r"adaption_prompt of .* is \(1, 3, 16\) in the file, \(4, 16\) here"),
        ({"adapter_heads": 2}, "adapter_heads is unknown"),
    ],
)
def test_configurations_of_peft_that_are_refused(written, change, says):
    content = json.loads((written / "adapter_config.json").read_text())
    (written / "adapter_config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(PeftFormatError, match=says):
        load_peft(build("llama", num_hidden_layers=3), written)


def test_a_deeper_network_and_a_file_without_a_gate_are_refused(written):
    with pytest.raises(PeftFormatError, match=r"missing in the file: adaption_prompt of model.layers.3.self_attn"):
        load_peft(build("llama", num_hidden_layers=4), written)
    tensors = load_file(written / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.2.self_attn.adaption_gate"]
    save_file(tensors, written / "adapter_model.safetensors")
    with pytest.raises(PeftFormatError, match=r"missing in the file: adaption_gate of model.layers.2.self_attn"):
        load_peft(build("llama", num_hidden_layers=3), written)
