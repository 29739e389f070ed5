"""``mindpet generate`` on a tiny LLaMA: what it prints where, what it is asked, how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from tokenizers import processors
from typer.testing import CliRunner

import mindpet
from mindpet.cli.app import app
from mindpet.models import open_pretrained
from mindpet.train.artifacts import open_network, open_tuned
from mindpet.train.config import load_run
from mindpet.train.language import Codec
from mindpet.train.run import finetune
from mindpet.train.writing import open_writer
from tests.models.causal import fill
from tests.tiny import overrides as classifier_overrides
from tests.tiny import questions, sentences, stories, write_language_model, write_model, write_rows


def invoke(*words, **more):
    result = CliRunner().invoke(app, [str(word) for word in ("generate", *words)], **more)
    return result.exit_code, result.stdout, result.stderr


def continuation(network, tokenizer, tokens, count):
    """The likeliest continuation, each token from the whole text anew."""
    ids = list(tokens)
    for _ in range(count):
        row = Tensor(np.array([ids], np.int32))
        ids.append(int(network(row, ms.ops.ones_like(row)).asnumpy()[0, -1].argmax()))
    return tokenizer.decode(ids[len(tokens) :])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model):
    """Two finished runs: on prompts and responses, and on a text; LoRA strong enough to change what is written."""
    folder = tmp_path_factory.mktemp("runs")
    write_rows(folder / "questions.jsonl", questions(24))
    (folder / "story.txt").write_text(stories(24))
    for name, data in (("chat", "questions.jsonl"), ("plain", "story.txt")):
        words = [f"model.path={model}", f"data.train={folder / data}", f"output.directory={folder / name}"]
        words += ["data.max_length=48", "train.max_steps=3", "train.mode=pynative", "train.learning_rate=0.05"]
        finetune(load_run(None, words))
    return folder


def test_the_command_line_streams_a_run_in_a_process_of_its_own(runs, tmp_path):
    words = [sys.executable, "-m", "mindpet", "generate", str(runs / "chat"), "the old boat", "--max-tokens", "12"]
    done = subprocess.run(words, capture_output=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    tuned = open_tuned(str(runs / "chat")).network
    codec = Codec.of(open_pretrained(load_run(runs / "chat" / "run.yaml").model.path))
    ids, learned = codec.encode((("user", "the old boat"), ("assistant", "sea")))
    asked = ids[: learned.argmax()].tolist()
    assert done.stdout.decode() == continuation(tuned, codec.tokenizer, asked, 12) + "\n"
    errors = done.stderr.decode()
    assert "chat: the run was on conversations." in errors
    assert "12 tokens at " in errors
    assert f"a prompt of {len(asked)} tokens" in errors
    assert "--max-tokens is reached" in errors


def test_json_tells_all(runs):
    code, output, errors = invoke(runs / "plain", "the old", "--max-tokens", 6, "--json")
    assert code == 0, errors
    assert "raw: the run was on plain text." in errors
    record = json.loads(output)
    network, tokenizer = open_tuned(str(runs / "plain")).network, open_writer(str(runs / "plain")).tokenizer
    asked = tokenizer.encode("the old").ids
    assert record["text"] == continuation(network, tokenizer, asked, 6)
    assert (record["tokens"], record["prompt_tokens"], record["stopped"]) == (6, len(asked), "max_tokens")
    assert (record["form"], record["mode"], record["seed"]) == ("raw", "pynative", 0)


def test_a_model_with_a_template_chats_and_can_be_told_not_to(model, tmp_path):
    tokenizer = open_pretrained(model).tokenizer()
    network = open_network(str(model)).set_train(False)
    turns = "<|im_start|>system\nBe old.<|im_end|>\n<|im_start|>user\nthe boat<|im_end|>\n<|im_start|>assistant\n"
    for text, words, says in (
        (turns, ["--system", "Be old."], "chat: the model has a chat template"),
        ("the boat", ["--raw"], "raw: as asked for"),
    ):
        code, output, errors = invoke(model, "--max-tokens", 5, *words, input="the boat\n")
        assert code == 0, errors
        assert output == continuation(network, tokenizer, tokenizer.encode(text).ids, 5) + "\n"
        assert says in errors
    plain = write_language_model(tmp_path / "plain", chat=False)
    assert "raw: the model has no chat template" in invoke(plain, "the boat", "--max-tokens", 2)[2]


def test_a_first_token_stands_before_a_text_and_not_before_a_turn(tmp_path):
    """As the same tokenizer lays them out in training."""
    model = write_language_model(tmp_path / "model")
    tokenizer = open_pretrained(model).tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(model / "tokenizer.json"))
    writer, codec = open_writer(str(model)), Codec.of(open_pretrained(model))
    ids, learned = codec.encode((("user", "the boat"), ("assistant", "sea")))
    assert writer.tokens_of("the boat") == ids[: learned.argmax()].tolist()
    assert writer.tokens_of("the boat", "raw") == codec.encode("the boat")[0][:-1].tolist()
    assert (writer.tokens_of("the boat")[0], writer.tokens_of("the boat", "raw")[0]) == (1, 0)


def test_a_delta_on_a_model(model, tmp_path):
    network = fill(mindpet.inject(open_network(str(model)), mindpet.LoRAConfig(rank=2)))
    mindpet.save_delta(network, tmp_path / "delta")
    network.set_train(False)
    tokenizer = open_pretrained(model).tokenizer()
    code, output, errors = invoke(model, "a wave", "--raw", "--delta", tmp_path / "delta", "--max-tokens", 6)
    assert code == 0, errors
    assert output == continuation(network, tokenizer, tokenizer.encode("a wave").ids, 6) + "\n"
    assert output != invoke(model, "a wave", "--raw", "--max-tokens", 6)[1]


def test_sampling_and_stop_texts(model):
    words = (model, "a wave", "--raw", "--max-tokens", 40, "--temperature", 1, "--top-k", 60, "--seed", 2)
    whole = invoke(*words)[1]
    assert whole == invoke(*words)[1]
    assert whole != invoke(*words[:-1], 3)[1]
    stop = whole[8:10]
    code, output, errors = invoke(*words, "--stop", "none such", "--stop", stop)
    assert output == whole[: whole.index(stop)] + "\n"
    assert "a stop text came" in errors


def test_graph_mode_writes_the_same(model):
    try:
        found = [invoke(model, "a wave", "--max-tokens", 8, "--json", "--mode", mode) for mode in ("graph", "pynative")]
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    graph, pynative = (json.loads(output) for _, output, _ in found)
    assert graph["text"] == pynative["text"]
    assert (graph["mode"], pynative["mode"]) == ("graph", "pynative")
    assert graph["compile_seconds"] > 0 == pynative["compile_seconds"]
    assert "Compiling takes" in found[0][2]


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_an_interruption_leaves_what_there_is(mode, tmp_path):
    model = write_language_model(tmp_path / "model", max_position_embeddings=20000)
    words = [sys.executable, "-m", "mindpet", "generate", str(model), "a wave", "--raw", "--mode", mode]
    words += ["--max-tokens", "15000", "--temperature", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + output).endswith(b"\n")
    assert b"interrupted." in errors
    assert b"Traceback" not in errors


def test_an_interruption_of_compiling_leaves_nothing(tmp_path):
    model = write_language_model(tmp_path / "model", num_hidden_layers=12)
    words = [sys.executable, "-m", "mindpet", "generate", str(model), "a wave", "--raw", "--mode", "graph"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        while b"Compiling takes" not in process.stderr.readline():
            pass
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, b"")
    assert errors.endswith(b"Interrupted.\n")
    assert b"Traceback" not in errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["MODEL", "x", "--top-p", "0.9"], "takes a 'temperature' above 0"),
        (["MODEL", "x", "--temperature", "-1", "--seed", "-2"], "'temperature' must be a number of 0 or more"),
        (["MODEL", "x", "--mode", "fast"], "--mode is pynative or graph, not 'fast'"),
        (["MODEL", ""], "the prompt is empty"),
        (["MODEL", "x", "--raw", "--system", "y"], "a system text belongs to a conversation"),
        (["MODEL", "x", "--raw", "--stop", ""], "--stop must not be empty"),
        (["MODEL", "boat " * 99, "--raw"], "128 positions"),
        (["PLAIN", "x", "--chat"], "no chat template"),
        (["nowhere", "x"], "There is no file or directory nowhere"),
        (["EMPTY", "x"], "neither a run nor a model"),
        (["RUN", "x", "--delta", "EMPTY"], "has its own delta"),
        (["CLASSIFIER", "x"], "is a classifier"),
    ],
)
def test_mistakes_get_a_message_and_no_traceback(words, says, model, runs, tmp_path):
    places = {"MODEL": model, "RUN": runs / "plain", "EMPTY": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()
    if "PLAIN" in words:
        places["PLAIN"] = write_language_model(tmp_path / "plain", chat=False)
    if "CLASSIFIER" in words:
        places["CLASSIFIER"] = write_model(tmp_path / "bert")
    code, output, errors = invoke(*(places.get(word, word) for word in words))
    assert code == 2
    assert not output
    assert says in " ".join(errors.split())


def test_a_mistake_in_the_prompt_is_told_before_the_weights_are_read(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    assert "the prompt is empty" in invoke(tmp_path / "model", "")[2]
    assert "model.safetensors" in invoke(tmp_path / "model", "x")[2]


def test_the_run_of_a_classifier_points_to_infer(tmp_path):
    model, rows = write_model(tmp_path / "bert"), write_rows(tmp_path / "rows.jsonl", sentences(30))
    words = classifier_overrides(model, rows, tmp_path / "run", "train.mode=pynative", "train.max_steps=1")
    finetune(load_run(None, words))
    code, _, errors = invoke(tmp_path / "run", "the boat")
    assert code == 2
    assert f"mindpet infer {tmp_path / 'run'}" in " ".join(errors.split())


def test_what_a_run_was_on_is_known_without_its_data(runs, tmp_path):
    import shutil

    shutil.copytree(runs / "chat", tmp_path / "run")
    there = tmp_path / "run" / "run.yaml"
    there.write_text(there.read_text().replace("questions.jsonl", "gone.jsonl"))
    writer = open_writer(str(tmp_path / "run"))
    assert (writer.form, "not there any more" in writer.why) == ("chat", True)
    there.write_text(there.read_text().replace("prompt: null", "prompt: prompt"))
    assert open_writer(str(tmp_path / "run")).why == "the run was on conversations"


def test_help_has_examples():
    code, output, _ = invoke("--help")
    assert code == 0
    assert "Examples:" in output
