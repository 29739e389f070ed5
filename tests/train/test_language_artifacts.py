"""What can be taken out of a language model's run, and what the commands say about it."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file
from typer.testing import CliRunner

from mindpet.cli.app import app
from mindpet.models.llama import LlamaForCausalLM
from mindpet.train import artifacts, run
from tests.tiny import stories, write_language_model

IDS = np.random.default_rng(0).integers(3, 290, (2, 12)).astype(np.int32)


def invoke(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def tuned(request, tmp_path_factory):
    """A run made by the command line: its model, its directory, its run file, what was printed."""
    folder = tmp_path_factory.mktemp("tuned")
    model = write_language_model(folder / "model", tie_word_embeddings=request.param)
    (folder / "story.txt").write_text(stories(60))
    run_file = folder / "run.yaml"
    code, output = invoke("config", "init", run_file, "--model", model, "--train", folder / "story.txt")
    assert code == 0, output
    more = ("data.max_length=32", "train.max_steps=6", "train.mode=pynative", "train.learning_rate=0.03")
    code, output = invoke("finetune", run_file, f"output.directory={folder / 'out'}", *more)
    assert code == 0, output
    yield model, folder / "out", run_file, output
    ms.set_context(mode=ms.PYNATIVE_MODE)


def logits_of(network):
    return network.set_train(False)(Tensor(IDS), Tensor(np.ones_like(IDS))).asnumpy()


def test_a_run_shows_perplexities_and_points_to_generate(tuned):
    _, directory, _, output = tuned
    for part in ("tokens to predict", "tokens/s", "held-out perplexity", "token accuracy", "mindpet generate"):
        assert part in output
    after = json.loads((directory / "report.json").read_text())["after"]
    assert f"{after['perplexity']:.2f}" in output


def test_evaluate_gives_the_perplexity(tuned, tmp_path):
    _, directory, _, _ = tuned
    code, output = invoke("evaluate", directory)
    assert code == 0, output
    assert "perplexity" in output
    code, output = invoke("evaluate", directory, "--json")
    after = json.loads((directory / "report.json").read_text())
    assert json.loads(output) == {**after["after"], "tokens": after["tokens"]["test"]}
    other = tmp_path / "other.txt"
    other.write_text(stories(8, seed=5))
    code, output = invoke("evaluate", directory, f"data.test={other}", "--json")
    assert code == 0, output
    assert json.loads(output)["tokens"] != after["tokens"]["test"]


def test_infer_points_to_generate(tuned):
    code, output = invoke("infer", tuned[1], "the boat")
    assert code == 2
    assert "mindpet generate" in output


def test_a_run_file_is_checked(tuned):
    code, output = invoke("config", "validate", tuned[2], "data.max_length=32")
    assert code == 0, output
    assert "is fine" in output
    code, output = invoke("config", "validate", tuned[2], "data.label=topic")
    assert code == 2
    assert "data.label: not for a language model" in output


def test_inspect_shows_what_would_be_adapted(tuned):
    model, directory, _, _ = tuned
    report = json.loads((directory / "report.json").read_text())["parameters"]
    code, output = invoke("inspect", directory / "run.yaml")
    assert code == 0, output
    assert f"{report['trainable']:,} of {report['total']:,}" in output
    found = artifacts.inspect(str(model), ["method.name=lora", "method.targets=['*.o_proj']"])
    assert list(found.adapted) == [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]
    assert "model.layers.0.mlp.up_proj" in found.left


def test_a_merged_model_gives_the_same_logits(tuned, tmp_path):
    model, directory, _, _ = tuned
    code, output = invoke("merge", directory, tmp_path / "merged")
    assert code == 0, output
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == json.loads((model / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (model / name).read_bytes()
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names == load_file(model / "model.safetensors").keys()
    merged, report = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert not report.missing
    _, network, _ = run.load_tuned(directory)
    np.testing.assert_allclose(logits_of(merged), logits_of(network), atol=1e-4)
    assert np.abs(logits_of(network) - logits_of(LlamaForCausalLM.from_pretrained(model)[0])).max() > 0.01


def test_an_exported_adapter_comes_back_as_the_same_delta(tuned, tmp_path):
    model, directory, _, _ = tuned
    code, output = invoke("export", directory, tmp_path / "adapter")
    assert code == 0, output
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"] or []) == ("CAUSAL_LM", [])
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    code, output = invoke("import", tmp_path / "adapter", tmp_path / "delta", "--model", model)
    assert code == 0, output
    ours, theirs = (load_file(path / "delta.safetensors") for path in (directory / "delta", tmp_path / "delta"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(value, theirs[name]) for name, value in ours.items())
    code, output = invoke("merge", model, tmp_path / "merged", "--delta", tmp_path / "delta")
    assert code == 0, output
