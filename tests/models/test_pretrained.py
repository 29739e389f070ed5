"""One door for every kind of files."""

import json

import numpy as np
import pytest

from mindpet.models import (
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PretrainedFilesError,
    chat_template,
    family_of,
    load_tokenizer,
    open_pretrained,
)
from mindpet.models.families import FAMILIES
from tests.models.causal import write
from tests.tiny import SIZES, write_model


def test_a_directory_opens(tmp_path):
    write_model(tmp_path)
    pretrained = open_pretrained(tmp_path)
    assert pretrained.config["model_type"] == "bert"
    assert pretrained.family.network is BertForSequenceClassification
    assert pretrained.family.task == "classification"
    assert pretrained.family.max_positions(pretrained.config) == SIZES["max_position_embeddings"]
    assert pretrained.tokenizer().encode("the boat").tokens == ["[CLS]", "the", "boat", "[SEP]"]
    assert pretrained.tensors()["embeddings.word_embeddings.weight"].shape == (40, 16)
    assert pretrained.chat_template() is None


@pytest.mark.parametrize(("kind", "network"), [("llama", LlamaForCausalLM), ("gpt2", GPT2LMHeadModel)])
def test_language_models_are_recognised(tmp_path, kind, network):
    write(tmp_path, kind)
    family = family_of(tmp_path)
    assert (family.name, family.task, family.network) == (kind, "language", network)
    assert family.max_positions(open_pretrained(tmp_path).config) == 200


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_says_what_it_is(family):
    assert family.task in ("classification", "language")
    assert hasattr(family.network, "from_pretrained")
    assert family.max_positions({"model_type": family.name}) > 0


def test_chatml_is_recognised_wherever_a_template_stands(tmp_path):
    write(tmp_path, "llama")
    assert chat_template(tmp_path) is None
    jinja = "{{ '<|im_start|>' + role + content + '<|im_end|>' }}"
    for content in (jinja, [{"name": "tools", "template": "?"}, {"name": "default", "template": jinja}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": content}))
        assert chat_template(tmp_path).end("assistant") == "<|im_end|>\n"
    (tmp_path / "chat_template.jinja").write_text("[INST] {{ content }} [/INST]")
    assert chat_template(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nothing-here", None, "There is no file or directory .*nothing-here"),
        ("some.bin", b"PK\3\4", "begins with neither GGUF nor E5S1"),
        ("empty.gguf", b"", "begins with neither"),
        ("model.safetensors", b"12345678", "give its directory"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PretrainedFilesError, match=says):
        open_pretrained(tmp_path / name)


def test_what_lies_beside_a_misspelt_path_is_shown(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    for name in ("a", "b", "c", "d", "e", "f", "g", "h", ".hidden"):
        (tmp_path / name).mkdir()
    with pytest.raises(PretrainedFilesError, match=r"; near it: model\.gguf\.$"):
        open_pretrained(tmp_path / "modle.gguf")
    with pytest.raises(PretrainedFilesError, match="; beside it: a, b, c, d, e, f, g, h.$"):
        open_pretrained(tmp_path / "xyz")


@pytest.mark.parametrize(
    ("content", "says"), [("[]", "must hold an object"), ("{", "cannot be read as JSON"), (None, "There is no file")]
)
def test_broken_configurations_are_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(PretrainedFilesError, match=says):
        open_pretrained(tmp_path)


def test_an_unknown_family_is_named_with_those_that_are_here(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(
        PretrainedFilesError, match="of a 'lama', but only bert, llama, gpt2 are here .did you mean 'llama'"
    ):
        family_of(tmp_path)


def test_a_missing_tokenizer_is_an_error_of_the_files(tmp_path):
    write(tmp_path, "llama")
    with pytest.raises(PretrainedFilesError, match=r"There is no .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PretrainedFilesError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_classifier_does_not_take_a_language_model(tmp_path):
    write(tmp_path, "llama")
    with pytest.raises(PretrainedFilesError, match="'llama', not of a BERT"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_sharded_weights_are_joined(tmp_path):
    from safetensors.numpy import load_file, save_file

    network = write(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    names = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for part in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == part}, tmp_path / part)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    again, _ = LlamaForCausalLM.from_pretrained(tmp_path)
    for here, there in zip(again.get_parameters(), network.get_parameters()):
        np.testing.assert_array_equal(here.asnumpy(), there.asnumpy())
