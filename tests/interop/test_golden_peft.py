"""Directories that Hugging Face PEFT wrote (tests/golden/make_peft.py), read without torch; and all that is refused."""

import json
import logging
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from safetensors.numpy import load_file, save_file

from mindpet import METHODS, AdapterConfig, BitFitConfig, LoRAConfig, PrefixConfig, PTuning2Config, inject
from mindpet.delta import LoRADense
from mindpet.graph import eject, freeze_delta, merge
from mindpet.graph.inject import injections
from mindpet.interop import PeftFormatError, load_peft, save_peft
from mindpet.models import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM
from tests.few import mostly_exhaustive
from tests.oracles import difference

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
EXPECTED = {path.parent.name: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*/expected.json"))}
BASES = {name: EXPECTED.pop(name) for name in ("base", "base_llama", "base_gpt2")}
BASE = BASES["base"]
LANGUAGE = {"base_llama": LlamaForCausalLM, "base_gpt2": GPT2LMHeadModel}
CASES = list(EXPECTED)
ENCODED = ("prefix_projection", "p_tuning", "p_tuning_lstm")  # what they trained through is not in the file
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def network(case="query_value", **changes):
    base = base_of(case)
    if base in LANGUAGE:
        return LANGUAGE[base].from_pretrained(GOLDEN / base, **changes)[0].set_train(False)
    return BertForSequenceClassification.from_pretrained(GOLDEN / base, num_labels=3, **changes)[0].set_train(False)


def base_of(case):
    return EXPECTED[case].get("base", "base")


def inputs_of(cell):
    if isinstance(cell, BertForSequenceClassification):
        return [Tensor(np.array(rows, np.int32)) for rows in BASE["inputs"].values()]
    ids = Tensor(np.array(BASES["base_llama"]["inputs"]["input_ids"], np.int32))
    return [ids, ops.ones_like(ids)]


def logits(cell):
    return cell(*inputs_of(cell)).asnumpy()


def tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


@pytest.fixture
def edited(tmp_path):
    """A copy of a golden directory with other keys in its configuration and other tensors."""

    def edit(case="query_value", config=(), change=lambda tensors: tensors):
        directory = tmp_path / "edited"
        shutil.copytree(GOLDEN / case, directory)
        content = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps({**content, **dict(config)}))
        save_file(change(tensors(directory)), directory / "adapter_model.safetensors", {"format": "pt"})
        return directory

    edit.folder = tmp_path / "edited"
    return edit


ALWAYS = ("query_value", "embeddings", "dora", "oft", "multitask_prompt_tuning")


def in_both_modes(cases):
    """Of the cases, in graph mode a few by default: the contract tests compile every method."""
    compiled = [pytest.param("graph", one, marks=() if one in ALWAYS else pytest.mark.exhaustive) for one in cases]
    plain = [("pynative", one) for one in cases]
    return pytest.mark.parametrize(("mode", "case"), [*plain, *compiled], indirect=["mode"])


@in_both_modes([case for case in CASES if case in ENCODED])
def test_logits_equal_those_of_peft(mode, case):
    np.testing.assert_allclose(logits(load_peft(network(), GOLDEN / case)), EXPECTED[case]["logits"], atol=1e-5)


def differences(case, cell, directory):
    """The largest difference from PEFT of the logits, and of the gradient of each parameter by its name there."""
    assert sum(parameter.size for parameter in cell.trainable_params()) == EXPECTED[case]["trains"]
    return differences_of_what_trains(case, cell, directory)


def differences_of_what_trains(case, cell, directory):
    parameters = cell.trainable_params()
    inputs = inputs_of(cell)
    causal = base_of(case) in LANGUAGE
    labels = inputs[0][:, 1:].reshape(-1) if causal else Tensor([0, 2], ms.int32)

    def loss(*inputs):
        predicted = cell(*inputs)
        judged = predicted[:, :-1].reshape((-1, predicted.shape[-1])) if causal else predicted
        return ops.cross_entropy(judged, labels), predicted

    gradients, (predicted,) = ops.grad(loss, None, ms.ParameterTuple(parameters), has_aux=True)(*inputs)
    found = {"logits": difference(predicted.asnumpy(), EXPECTED[case]["logits"])}
    for parameter, gradient in zip(parameters, gradients):
        parameter.set_data(gradient)
    save_peft(cell, directory)  # each gradient is where its parameter goes in the file
    written = tensors(directory)
    for name, gradient in EXPECTED[case]["gradients"].items():
        if name in written or ".modules_to_save." not in name:
            gradient = np.reshape(gradient, written[name].shape)  # of no numbers at all, the list has no shape
            found[name] = difference(written[name], gradient)
    return found


@in_both_modes([case for case in CASES if case not in ENCODED])
def test_logits_what_trains_and_its_gradients_are_those_of_peft(mode, tmp_path, case):
    found = differences(case, load_peft(network(case), GOLDEN / case), tmp_path)
    assert len(found) > 1
    assert {name: error for name, error in found.items() if not error <= 1e-5} == {}


VARIANTS = {  # of LoRA, that differ in what trains or how fast: the names of its A and B there
    "lora_fa": ("mindpet_delta_frozen_lora_fa_a", "mindpet_delta_lora_fa_b"),
    "lora_plus": ("mindpet_delta_lora_a", "mindpet_delta_lora_b"),
}


def variant(method):
    """A network with the LoRA of the case query_value as that method has it."""
    plain, names = load_peft(network(), GOLDEN / "query_value"), VARIANTS[method]
    config = injections(plain)[0].config
    given = {"rank": config.rank, "alpha": config.alpha, "modules_to_save": ["classifier"]}
    cell = inject(network(), METHODS[method].config(targets=["*.query", "*.value"], **given))
    parameters = cell.parameters_dict()
    for name, value in plain.parameters_and_names():
        path, _, last = name.rpartition(".")
        last = {"mindpet_delta_lora_a": names[0], "mindpet_delta_lora_b": names[1]}.get(last, last)
        parameters[f"{path}.{last}"].set_data(value)
    return cell


@pytest.mark.parametrize("method", VARIANTS)
def test_variants_of_lora_have_its_logits_and_its_gradients_where_they_train(mode, tmp_path, method):
    cell = variant(method)
    frozen = [name for name, p in cell.parameters_and_names() if "lora" in name and not p.requires_grad]
    assert len(frozen) == (4 if method == "lora_fa" else 0)
    found = differences_of_variant(method, cell, tmp_path)
    assert len(found) == (7 if method == "lora_fa" else 11)
    assert {name: error for name, error in found.items() if not error <= 1e-5} == {}


def differences_of_variant(method, cell, directory):
    found = differences_of_what_trains("query_value", cell, directory)
    return {name: error for name, error in found.items() if method != "lora_fa" or ".lora_A." not in name}


@pytest.mark.parametrize("case", mostly_exhaustive(CASES, *ALWAYS))
def test_eject_takes_out_what_was_read(case):
    cell = load_peft(network(case), GOLDEN / case)
    assert np.abs(logits(cell) - BASES[base_of(case)]["logits"]).max() > 0.1
    np.testing.assert_array_equal(logits(eject(cell)), logits(network(case)))


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_bit_for_bit(tmp_path, case):
    save_peft(load_peft(network(case), GOLDEN / case), tmp_path, base_model="tiny", task_type="SEQ_CLS")
    before, after = tensors(GOLDEN / case), tensors(tmp_path)
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
        assert value.shape == before[name].shape or ".adaption_" not in name
    copies = (".modules_to_save.", ".original_module.", ".randlora_A", ".randlora_B")  # of what is there elsewhere
    missing = {name for name in before.keys() - after.keys() if not any(copy in name for copy in copies)}
    assert not missing
    assert {"base_model.randlora_A"} & before.keys() <= after.keys()
    theirs, ours = (json.loads((path / "adapter_config.json").read_text()) for path in (GOLDEN / case, tmp_path))
    assert ours.keys() <= theirs.keys()
    loose = {"base_model_name_or_path", "task_type", "peft_version", "target_modules", "exclude_modules"}
    loose |= {"rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "encoder_hidden_size"}
    loose |= {"modules_to_save", "prefix_projection", "num_transformer_submodules", "num_attention_heads", "num_layers"}
    loose |= {"feedforward_modules"}
    if theirs["peft_type"] == "P_TUNING":  # a table of prompts, as prompt tuning trains it
        theirs["peft_type"] = "PROMPT_TUNING"
    loose |= {"total_step"}  # of a schedule that is over
    for key in ours.keys() - loose:
        assert ours[key] == theirs[key], key
    assert (ours["base_model_name_or_path"], ours["task_type"]) == ("tiny", "SEQ_CLS")
    again = load_peft(network(case), tmp_path)
    np.testing.assert_array_equal(logits(again), logits(load_peft(network(case), GOLDEN / case)))


def test_what_trained_goes_on_training():
    assert injections(load_peft(network(), GOLDEN / "bias_all"))[0].config.bias == "all"
    cell = load_peft(network(), GOLDEN / "bias_lora_only")
    assert injections(cell)[0].config.bias == "lora_only"
    names = {parameter.name for parameter in cell.trainable_params()}
    assert len(names) == 4 * 3 + 2  # A, B and a bias of four modules, the head
    assert "bert.encoder.layer.1.attention.self.value.bias" in names
    assert "classifier.weight" in names


def test_short_names_are_written_where_they_are_enough(tmp_path):
    config = LoRAConfig(rank=4, alpha=8, targets=["*.query", "*.value"], rank_pattern={"*.query": 2, "*.1.*.value": 3})
    save_peft(inject(network(), config), tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["target_modules"] == ["query", "value"]
    assert (content["r"], content["lora_alpha"], content["alpha_pattern"]) == (2, 8, {})
    assert content["rank_pattern"] == {
        "bert.encoder.layer.0.attention.self.value": 4,
        "bert.encoder.layer.1.attention.self.value": 3,
    }


def test_a_pattern_never_means_a_module_whose_name_only_ends_alike(tmp_path):
    def build():
        return nn.SequentialCell([nn.SequentialCell([nn.Dense(3, 3)]), nn.Dense(3, 3)])

    names = {"0.0": "body.x", "1": "x"}
    save_peft(inject(build(), LoRAConfig(rank=2, targets=["0.0", "1"], rank_pattern={"1": 1})), tmp_path, names=names)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {"^x": 1}
    back = load_peft(build(), tmp_path, names=names)
    assert [back[0][0].lora_rank, back[1].lora_rank] == [2, 1]


def test_layers_placed_by_hand_are_written(tmp_path, rng):
    cell = nn.SequentialCell(LoRADense(4, 3, lora_rank=2, lora_alpha=5, lora_b_init="normal", compute_dtype=ms.float32))
    with pytest.raises(PeftFormatError, match=r"0\.weight trains beside its LoRA"):
        save_peft(cell, tmp_path)
    freeze_delta(cell, "lora")
    save_peft(cell, tmp_path)
    other = nn.SequentialCell(nn.Dense(4, 3))
    other[0].weight.set_data(cell[0].weight)
    other[0].bias.set_data(cell[0].bias)
    x = Tensor(rng.standard_normal((2, 4)).astype(np.float32))
    np.testing.assert_array_equal(load_peft(other, tmp_path)(x).asnumpy(), cell(x).asnumpy())


def test_a_float16_network_keeps_its_dtype():
    cell = network()
    for parameter in cell.get_parameters():
        parameter.set_dtype(ms.float16)
    load_peft(cell, GOLDEN / "query_value")
    assert {parameter.dtype for parameter in cell.get_parameters()} == {ms.float16}


def test_numbers_that_float16_cannot_hold_are_refused(edited):
    directory = edited(change=lambda tensors: {name: value * 1e6 for name, value in tensors.items()})
    cell = network()
    for parameter in cell.get_parameters():
        parameter.set_dtype(ms.float16)
    with pytest.raises(PeftFormatError, match="holds NaN or infinity in float16"):
        load_peft(cell, directory)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "missing in the file: .*query.lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_bias is True: that is a bias on B"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeated layers"),
        ({"trainable_token_indices": [3]}, "single trained rows"),
        ({"target_parameters": ["pooler.dense.weight"]}, "target_parameters is"),
        ({"alora_invocation_tokens": [1]}, "Activated LoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
        ({"monteclora_config": {"num_samples": 2}}, "MonteCLoRA"),
        ({"arrow_config": {"top_k": 3}}, "routing"),
        ({"ensure_weight_tying": True}, "weights that are tied"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': the adapter belongs to a base weight changed"),
        ({"init_lora_weights": "olora"}, "base weight changed"),
        ({"use_next_year": True}, "use_next_year is unknown here, so its value True"),
        ({"next_year_size": 16}, "next_year_size is unknown"),
        ({"peft_type": "NEXTLORA"}, "peft_type is 'NEXTLORA'.*only LORA, PREFIX_TUNING, .*LOHA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": None}, "r is missing"),
        ({"r": "2"}, "'rank' must be a positive int"),
        ({"lora_alpha": 0}, "'alpha' must be finite and not 0"),
        ({"lora_dropout": 1.5}, "'dropout' must be in"),
        ({"bias": "some"}, "bias must be 'none', 'lora_only' or 'all'"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"target_modules": "(query"}, "is not a regular expression"),
        ({"rank_pattern": {r"(.*\.)+x": 4}}, "could take very long"),
        ({"alpha_pattern": {"(a|aa)*x": 4}}, "could take very long: write out"),
        ({"target_modules": [1]}, "must be a string or a list of strings"),
        ({"rank_pattern": {"query": 4}}, r"misshaped: .*query.lora_A.weight is \(2, 8\) in the file, \(4, 8\) here"),
        ({"target_modules": ["query", "value", "key"]}, "missing in the file: LoRA of .*layer.1.attention.self.key"),
        ({"modules_to_save": ["pooler"]}, "missing in the file: bert.pooler.dense.weight"),
        ({"bias": "lora_only"}, "missing in the file: bert.encoder.layer.0.attention.self.query.bias"),
        ({"bias": "all"}, "missing in the file: bert.embeddings.LayerNorm.bias"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_configurations_that_are_refused(edited, config, says):
    cell = network()
    before = {parameter.name for parameter in cell.get_parameters()}
    with pytest.raises(PeftFormatError, match=says):
        load_peft(cell, edited(config=config))
    assert {parameter.name for parameter in cell.get_parameters()} == before


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("miss", {"init_weights": False}),
        ("oft", {"oft_block_size": 3}),  # divides none of the sizes: PEFT took 4 then
        ("boft", {"boft_n_butterfly_factor": 2}),  # without its kernel PEFT makes one and says two
    ],
)
def test_what_peft_makes_of_its_configuration_is_seen_in_the_file(edited, case, config):
    before = json.loads((GOLDEN / case / "adapter_config.json").read_text())
    assert all(before[key] != value for key, value in config.items())
    np.testing.assert_allclose(logits(load_peft(network(), edited(case, config))), EXPECTED[case]["logits"], atol=1e-5)


def test_three_terms_of_oft_are_four(edited):
    cell = load_peft(network(), edited("oft", {"num_cayley_neumann_terms": 3}))
    assert injections(cell)[0].config.terms == 4


def test_dropout_travels_or_is_told_of(edited, caplog):
    cell = load_peft(network(), edited("miss", {"miss_dropout": 0.3}))
    assert injections(cell)[0].config.dropout == 0.3
    assert not caplog.text
    shutil.rmtree(edited.folder)
    load_peft(network(), edited("randlora", {"randlora_dropout": 0.2}))
    assert "randlora_dropout is 0.2 there" in caplog.text


def test_a_prefix_may_say_that_it_has_no_bias(edited):
    np.testing.assert_array_equal(
        logits(load_peft(network(), edited("prefix", {"bias": None}))), logits(load_peft(network(), GOLDEN / "prefix"))
    )


@pytest.mark.parametrize("bias", ["hra_only", "lora_only"])
def test_a_methods_own_name_for_its_biases_is_read(edited, bias):
    with pytest.raises(PeftFormatError, match="missing in the file: .*query.bias"):
        load_peft(network(), edited("hra", {"bias": bias}))


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!", r"(?:.*\.)*(query|value)"])
def test_targets_that_take_long_to_match_are_not_compared(edited, caplog, pattern):
    load_peft(network(), edited(config={"target_modules": pattern}))
    assert "could take very long to match" in caplog.text


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_virtual_tokens": 4}, r"prompt_embeddings is \(3, 32\) in the file, \(4, 32\) here"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens"),
        ({"num_layers": 3}, "num_layers is 3 in the configuration, 2 here"),
        ({"num_transformer_submodules": 2}, "encoder and decoder"),
        ({"next_year_size": 16}, "next_year_size is unknown"),
    ],
)
def test_prefix_configurations_that_are_refused(edited, config, says):
    with pytest.raises(PeftFormatError, match=says):
        load_peft(network(), edited("prefix", config))


def test_a_prefix_without_the_head_that_was_trained_with_it_is_refused(edited):
    def change(tensors):
        return {"prompt_embeddings": tensors["prompt_embeddings"]}

    with pytest.raises(PeftFormatError, match="missing in the file: classifier.weight"):
        load_peft(network(), edited("prefix", change=change))


def test_a_prefix_alone_is_written_and_read(tmp_path):
    save_peft(inject(network(), PTuning2Config(tokens=2)), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    assert list(tensors(tmp_path)) == ["prompt_embeddings"]
    load_peft(network(), tmp_path)


def test_dora_is_for_dense_layers_only(edited):
    with pytest.raises(
        PeftFormatError, match="word_embeddings is a Embedding, not for DoRA, which adapts dense layers"
    ):
        load_peft(network(), edited("embeddings", {"use_dora": True}))


def test_dora_without_its_lengths_is_refused(edited):
    def change(tensors):
        return {
            name: value
            for name, value in tensors.items()
            if not name.endswith("layer.0.attention.self.query.lora_magnitude_vector")
        }

    with pytest.raises(PeftFormatError, match="missing in the file: .*layer.0.*query.lora_magnitude_vector"):
        load_peft(network(), edited("dora", change=change))


def test_keys_without_effect_are_accepted_and_unknown_ones_reported(edited, caplog):
    config = {
        "lora_ga_config": {"scale": "stable"},
        "init_lora_weights": "gaussian",
        "next_year": None,
        "use_new": False,
    }
    with caplog.at_level(logging.WARNING, "mindpet"):
        cell = load_peft(network(), edited(config=config))
    np.testing.assert_allclose(logits(cell), EXPECTED["query_value"]["logits"], atol=1e-4)
    assert [key for key in (*config, "r") if repr(key) in caplog.text] == ["next_year", "use_new"]


def test_the_file_decides_which_modules_there_are_and_a_contradiction_is_reported(edited, caplog):
    with caplog.at_level(logging.WARNING, "mindpet"):
        cell = load_peft(network(), edited(config={"target_modules": ["query"]}))
    assert "target_modules does not mean these modules" in caplog.text
    np.testing.assert_allclose(logits(cell), EXPECTED["query_value"]["logits"], atol=1e-4)


def test_a_projection_is_reported(caplog):
    with caplog.at_level(logging.WARNING, "mindpet"):
        load_peft(network(), GOLDEN / "prefix_projection")
    assert "training cannot go on through the projection" in caplog.text


@pytest.mark.parametrize("case", ["p_tuning", "p_tuning_lstm"])
def test_an_encoder_is_reported(caplog, case):
    with caplog.at_level(logging.WARNING, "mindpet"):
        load_peft(network(), GOLDEN / case)
    assert "training cannot go on through the encoder" in caplog.text


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_virtual_tokens": 4}, r"prompt_embeddings is \(3, 8\) in the file, \(4, 8\) here"),
        ({"num_tasks": 3}, r"prefix_task_cols is \(2, 3, 2\) in the file, \(3, 3, 2\) here"),
        ({"num_ranks": 1}, r"prefix_task_rows is \(2, 2, 8\) in the file, \(2, 1, 8\) here"),
        ({"num_tasks": 0}, "num_tasks"),
        ({"token_dim": 16}, "token_dim is 16 in the configuration, 8 here"),
        ({"num_transformer_submodules": 2}, "encoder and decoder"),
        ({"peft_type": "PROMPT_TUNING"}, "unexpected in the file: prefix_task_cols"),
        ({"next_year_size": 16}, "next_year_size is unknown"),
    ],
)
def test_prompt_configurations_that_are_refused(edited, config, says):
    with pytest.raises(PeftFormatError, match=says):
        load_peft(network(), edited("multitask_prompt_tuning", config))


def test_every_misfit_is_in_one_message(edited):
    def change(tensors):
        tensors[f"{QUERY}.lora_A.weight"] = np.zeros((2, 7), np.float32)
        tensors[f"{QUERY.replace('query', 'qeury')}.lora_A.weight"] = np.zeros((2, 8), np.float32)
        tensors["base_model.model.bert.encoder.layer.0.output.LayerNorm.lora_A.weight"] = np.zeros((2, 8), np.float32)
        tensors[f"{QUERY}.lora_magnitude_vector"] = np.zeros(8, np.float32)
        tensors[f"{QUERY}.lora_embedding_A"] = np.zeros((2, 8), np.float32)
        tensors["prompt_embeddings"] = np.zeros(2, np.float32)
        tensors["base_model.model.classifier.bias"] = np.array([np.nan, 0, 0], np.float32)
        del tensors[f"{QUERY.replace('.0.', '.1.')}.lora_B.weight"], tensors["base_model.model.classifier.weight"]
        return tensors

    with pytest.raises(PeftFormatError) as error:
        load_peft(network(), edited(change=change))
    lines = str(error.value).split("\n  ")[1:]
    for line in (
        "misshaped: bert.encoder.layer.0.attention.self.query.lora_A.weight is (2, 7) in the file, (2, 8) here",
        "missing in the file: bert.encoder.layer.1.attention.self.query.lora_B.weight",
        "missing in the file: classifier.weight",
        "unexpected in the file: bert.encoder.layer.0.attention.self.query.lora_embedding_A",
        "unexpected in the file: prompt_embeddings",
        "unexpected in the file: bert.encoder.layer.0.output.LayerNorm is a LayerNorm, not for LoRA",
        "classifier.bias holds NaN or infinity",
    ):
        assert any(entry.startswith(line) for entry in lines), line
    assert any("self.qeury is no module of this network (did you mean" in entry for entry in lines)
    assert any("self.query.lora_magnitude_vector" in entry for entry in lines)
    assert len(lines) == 9


def test_a_square_weight_saved_whole_is_ambiguous_with_fan_in_fan_out(edited):
    with pytest.raises(PeftFormatError, match="pooler.dense.weight is square, and with fan_in_fan_out"):
        load_peft(network(), edited("modules_to_save", {"fan_in_fan_out": True}))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (shutil.rmtree, "There is no file"),
        (lambda d: (d / "adapter_config.json").unlink(), "There is no file .*adapter_config.json"),
        (lambda d: (d / "adapter_config.json").write_text("{'r': 2}"), "cannot be read as JSON"),
        (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[1]"), "must hold an object"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "There is no file .*adapter_model.safetensors"),
        (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), "pickled weights"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b""), "cannot be read as safetensors"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle"), "cannot be read as safetensors"),
        (lambda d: truncate(d / "adapter_model.safetensors", 40), "cannot be read as safetensors"),
        (lambda d: truncate(d / "adapter_model.safetensors", -40), "cannot be read as safetensors"),
        (lambda d: save_file({}, d / "adapter_model.safetensors"), "there is no LoRA tensor in the file"),
    ],
)
def test_broken_directories_are_named(edited, break_it, says):
    directory = edited()
    break_it(directory)
    with pytest.raises(PeftFormatError, match=says):
        load_peft(network(), directory)


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_an_adapter_of_another_size_is_refused():
    with pytest.raises(PeftFormatError, match=r"layer.1.attention.self.value is no module of this network"):
        load_peft(
            BertForSequenceClassification(
                type(network().config)(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=11), 3
            ),
            GOLDEN / "query_value",
        )


def test_the_network_must_be_untouched():
    with pytest.raises(ValueError, match="eject"):
        load_peft(inject(network(), LoRAConfig()), GOLDEN / "query_value")
    with pytest.raises(TypeError, match="Cell"):
        load_peft("network", GOLDEN / "query_value")


@pytest.mark.parametrize(
    ("configs", "says"),
    [
        ([], "has nothing: of those here, PEFT has .*lokr.*, the prefix"),
        ([AdapterConfig(targets=["*.query"])], "has adapter"),
        ([LoRAConfig(), PTuning2Config(tokens=2)], "has lora and ptuning2"),
        ([PrefixConfig(tokens=2), BitFitConfig()], "biases train beside the prefix"),
        (
            [LoRAConfig(modules_to_save=["*.query.weight"])],
            "layer.0.attention.self.query.weight trains beside its LoRA",
        ),
    ],
)
def test_what_peft_cannot_hold_is_not_written(tmp_path, configs, says):
    cell = network()
    for config in configs:
        inject(cell, config)
    with pytest.raises(PeftFormatError, match=says):
        save_peft(cell, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_merged_deltas_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="unmerge"):
        save_peft(merge(inject(network(), LoRAConfig())), tmp_path)


def test_names_must_tell_cells_apart(tmp_path):
    with pytest.raises(ValueError, match="'names' calls both"):
        save_peft(inject(network(), LoRAConfig()), tmp_path, names=lambda path: "same")
    with pytest.raises(TypeError, match="must be a str"):
        save_peft(inject(network(), LoRAConfig()), tmp_path, names=lambda path: None)
