import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mindpet._methods import DOCUMENTED
from mindpet.cli.screen import print_report
from mindpet.graph import DeltaFileError
from mindpet.train import run
from mindpet.train.config import RunFileError, TrainSection, load_run
from mindpet.train.data import DataError
from mindpet.train.fit import (
    CHECKPOINT,
    CannotResume,
    Diverged,
    Interrupted,
    Reporter,
    learning_rates,
    read_metrics,
)
from mindpet.train.prepare import prepare
from tests.few import mostly_exhaustive
from tests.tiny import overrides, sentences, write_model, write_rows

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl", sentences(60))


class Notes(Reporter):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def settings(inputs, output, *more):
    return load_run(None, overrides(*inputs, output, *more))


def losses(directory):
    return [record["loss"] for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]


@pytest.mark.exhaustive_in_graph("lora-graph-0")  # the documented examples train each method in both modes
@pytest.mark.parametrize("alpha", [0, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("train_mode", ["graph", "pynative"])
@pytest.mark.parametrize("method", mostly_exhaustive([*DOCUMENTED, "full"], "lora", "ptuning2", "full"))
@pytest.mark.usefixtures("back_to_pynative")
def test_every_method_learns(inputs, tmp_path, method, train_mode, alpha):
    small = {
        "low_rank_adapter": "method.reduction_factor=4",
        "prefix": "method.tokens=4",
        "ptuning2": "method.tokens=4",
    }
    options = [small[method]] if method in small else []
    config = settings(
        inputs,
        tmp_path,
        *options,
        f"method.name={method}",
        f"train.mode={train_mode}",
        f"train.r_drop_alpha={alpha}",
        "train.max_steps=16",
        "train.learning_rate=0.02",
        "train.optimizer=adam",
    )
    report = run.finetune(config)
    curve = losses(tmp_path)
    assert len(curve) == 16
    assert np.mean(curve[-4:]) < 0.95 * np.mean(curve[:3])
    assert 0 < report["parameters"]["share"] <= 1
    saved = json.loads((tmp_path / "delta" / "delta.json").read_text())["parameters"]
    assert any(name.startswith("classifier") for name in saved)
    scores, labels = run.evaluate(tmp_path)
    assert scores.accuracy == report["after"]["accuracy"]
    assert labels == ["land", "sea", "sky"]


@pytest.mark.usefixtures("back_to_pynative")
def test_both_modes_give_the_same_curve(inputs, tmp_path):
    curves = {}
    for train_mode in ("graph", "pynative"):
        run.finetune(settings(inputs, tmp_path / train_mode, f"train.mode={train_mode}", "train.max_steps=6"))
        curves[train_mode] = losses(tmp_path / train_mode)
    np.testing.assert_allclose(curves["graph"], curves["pynative"], rtol=2e-4)


@pytest.mark.usefixtures("back_to_pynative")
def test_accumulation_equals_one_large_batch(inputs, tmp_path):
    same = ("train.max_steps=5", "model.dropout=0", "train.weight_decay=0.01", "train.clip_norm=0.5")
    run.finetune(settings(inputs, tmp_path / "large", "train.batch_size=12", *same))
    run.finetune(settings(inputs, tmp_path / "small", "train.batch_size=4", "train.accumulate=3", *same))
    np.testing.assert_allclose(losses(tmp_path / "small"), losses(tmp_path / "large"), rtol=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "rate"), [pytest.param("adam", 0.02, marks=pytest.mark.exhaustive), ("adamw", 0.02), ("sgd", 0.3)]
)
@pytest.mark.usefixtures("back_to_pynative")
def test_every_optimizer_learns_with_weight_decay(inputs, tmp_path, optimizer, rate):
    more = (f"train.optimizer={optimizer}", "train.weight_decay=0.1", "train.max_steps=16", "train.mode=pynative")
    run.finetune(settings(inputs, tmp_path, *more, f"train.learning_rate={rate}"))
    curve = losses(tmp_path)
    assert np.mean(curve[-4:]) < 0.95 * np.mean(curve[:3])


@pytest.mark.exhaustive_in_graph
@pytest.mark.parametrize("train_mode", ["graph", "pynative"])
@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [("adam", 0.02), *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in (("adamw", 0.005), ("sgd", 0.1)))],
)
@pytest.mark.usefixtures("back_to_pynative")
def test_lora_plus_learns_and_resumes(inputs, tmp_path, optimizer, rate, train_mode):
    """B's rate is another one: a ratio of 1 gives another curve."""
    more = (f"train.optimizer={optimizer}", "train.weight_decay=0.1", "train.max_steps=12", f"train.mode={train_mode}")
    more = (*more, f"train.learning_rate={rate}", "method.name=lora_plus", "train.schedule=cosine")
    run.finetune(settings(inputs, tmp_path / "whole", *more, "method.ratio=8"))
    curve = losses(tmp_path / "whole")
    assert np.mean(curve[-4:]) < 0.97 * np.mean(curve[:3])
    cut = settings(inputs, tmp_path / "cut", *more, "method.ratio=8")
    with pytest.raises(Interrupted, match="--resume"):
        run.finetune(cut, StopAt(5))
    run.finetune(cut, resume=True)
    assert losses(tmp_path / "cut") == curve
    run.finetune(settings(inputs, tmp_path / "plain", *more, "method.ratio=1"))
    assert losses(tmp_path / "plain")[0] == curve[0]
    assert losses(tmp_path / "plain")[-1] != curve[-1]


@pytest.mark.parametrize(
    ("train_mode", "accumulate"),
    [*(pytest.param("graph", count, marks=pytest.mark.exhaustive) for count in (1, 2)), ("pynative", 1)],
)
@pytest.mark.usefixtures("back_to_pynative")
def test_adalora_keeps_its_budget_and_resumes_before_and_after_the_last_choice(
    inputs, tmp_path, train_mode, accumulate
):
    more = ("method.name=adalora", "method.rank=1", "method.initial_rank=3", "method.interval=2", "train.max_steps=12")
    more = (*more, f"train.mode={train_mode}", f"train.accumulate={accumulate}", "train.epochs=9")
    more = (*more, "train.keep_best=false", "train.learning_rate=0.02", "train.batch_size=6")
    run.finetune(settings(inputs, tmp_path / "whole", *more))
    cut = settings(inputs, tmp_path / "cut", *more)
    for at in (5, 10):  # the last choice is at step 8
        with pytest.raises(Interrupted, match="--resume"):
            run.finetune(cut, StopAt(at), resume=at > 5)
    run.finetune(cut, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "delta" / "delta.safetensors") for name in ("cut", "whole"))
    assert all(np.array_equal(value, theirs[name]) for name, value in ours.items())
    values = {name: value for name, value in ours.items() if name.endswith("adalora_e")}
    assert len(values) == 4
    assert sum(np.count_nonzero(value) for value in values.values()) == 4


@pytest.mark.usefixtures("back_to_pynative")
def test_the_uneven_last_batch_counts_its_rows_only(inputs, tmp_path):
    model, _ = inputs
    rows = write_rows(tmp_path / "rows.jsonl", sentences(9))
    test = write_rows(tmp_path / "test.jsonl", sentences(6, seed=1))
    same = ("model.dropout=0", "train.epochs=1", f"data.test={test}", "data.overlap=keep", "train.mode=pynative")
    run.finetune(load_run(None, overrides(model, rows, tmp_path / "a", "train.batch_size=9", *same)))
    run.finetune(load_run(None, overrides(model, rows, tmp_path / "b", "train.batch_size=16", *same)))
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-5)


def start(inputs, output, *more):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "mindpet", "finetune", str(write_run_file(inputs, output, *more))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def write_run_file(inputs, output, *more):
    from mindpet.train.config import as_yaml

    path = output.parent / f"{output.name}.yaml"
    path.write_text(as_yaml(settings(inputs, output, *more)))
    return path


def wait_for_steps(output, steps, process):
    for _ in range(1200):
        if len(losses(output)) >= steps:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("no progress")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "train_mode", "accumulate"),
    [
        ("SIGINT", "graph", 1),
        *(pytest.param("SIGKILL", *each, marks=pytest.mark.exhaustive) for each in (("pynative", 2), ("graph", 1))),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_curve(inputs, tmp_path, number, train_mode, accumulate):
    more = (
        "train.epochs=12",
        f"train.mode={train_mode}",
        f"train.accumulate={accumulate}",
        "train.save_every=7",
        "train.evaluate_every=10",
        "train.r_drop_alpha=1",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(inputs, whole, *more)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    process = start(inputs, cut, *more)
    wait_for_steps(cut, 11, process)
    process.send_signal(getattr(signal, number))
    output, _ = process.communicate(timeout=120)
    done = len(losses(cut))
    if number == "SIGINT":
        assert process.returncode == 130, output
        assert "--resume" in output
    assert done < len(losses(whole)), "the run ended before the signal came"
    resumed = [sys.executable, "-m", "mindpet", "finetune", str(tmp_path / "cut.yaml"), "--resume"]
    again = subprocess.run(resumed, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert losses(cut) == losses(whole)
    strip = lambda directory: {
        key: value
        for key, value in json.loads((directory / "report.json").read_text()).items()
        if key in ("before", "after", "step", "kept_step")
    }
    assert strip(cut) == strip(whole)
    ours, theirs = (load_file(directory / "delta" / "delta.safetensors") for directory in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(value, theirs[name]) for name, value in ours.items())


class StopAt(Reporter):
    """Interrupts at a step, as a signal would."""

    def __init__(self, step):
        self.at = step

    def step(self, record):
        if record["step"] == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("at", [2, *(pytest.param(at, marks=pytest.mark.exhaustive) for at in (1, 3, 4, 5, 6))])
@pytest.mark.usefixtures("back_to_pynative")
def test_a_run_can_be_resumed_at_every_step(inputs, tmp_path, at):
    """Uneven batches, accumulated in pairs, an evaluation every second step, and early stopping at step six."""
    more = (
        "train.mode=pynative",
        "train.batch_size=11",
        "train.accumulate=2",
        "train.epochs=4",
        "train.evaluate_every=2",
    )
    config = settings(inputs, tmp_path, *more, "train.early_stopping=2", "train.learning_rate=1e-9")
    with pytest.raises(Interrupted, match="--resume"):
        run.finetune(config, StopAt(at))
    report = run.finetune(config, resume=True)
    whole = settings(inputs, tmp_path / "whole", *more, "train.early_stopping=2", "train.learning_rate=1e-9")
    expected = run.finetune(whole)
    assert (report["step"], report["after"]) == (expected["step"], expected["after"])
    assert losses(tmp_path) == losses(tmp_path / "whole")


@pytest.mark.usefixtures("back_to_pynative")
def test_changed_data_is_noticed_on_resume(inputs, tmp_path):
    model, _ = inputs
    rows = write_rows(tmp_path / "rows.jsonl", sentences(60))
    config = load_run(None, overrides(model, rows, tmp_path / "out", "train.mode=pynative"))
    with pytest.raises(Interrupted):
        run.finetune(config, StopAt(2))
    write_rows(rows, sentences(60, seed=5))
    with pytest.raises(CannotResume, match="data has changed"):
        run.finetune(config, resume=True)


@pytest.mark.usefixtures("back_to_pynative")
def test_starting_anew_leaves_nothing_of_the_old_run(inputs, tmp_path):
    config = settings(inputs, tmp_path, "train.max_steps=2", "train.mode=pynative")
    run.finetune(config)
    with pytest.raises(Interrupted):
        run.finetune(config, StopAt(1), overwrite=True)
    with pytest.raises(RunFileError, match="no delta yet"):
        run.infer(tmp_path, ["boat"])


@pytest.mark.usefixtures("back_to_pynative")
def test_a_run_can_be_used_from_anywhere(inputs, tmp_path, monkeypatch):
    model, rows = inputs
    monkeypatch.chdir(model.parent)
    relative = overrides(model.relative_to(model.parent), rows.relative_to(model.parent), tmp_path / "out")
    run.finetune(load_run(None, [*relative, "train.max_steps=2", "train.mode=pynative"]))
    monkeypatch.chdir("/")
    assert run.infer(tmp_path / "out", ["boat"])
    other = write_rows(tmp_path / "one.jsonl", sentences(1))
    scores, _ = run.evaluate(tmp_path / "out", [f"data.test={other}", "data.train=gone"])
    assert scores.rows == 1
    strange = write_rows(tmp_path / "strange.jsonl", [{"text": "a", "label": "nowhere"}])
    with pytest.raises(DataError, match="No held-out row has a known label"):
        run.evaluate(tmp_path / "out", [f"data.test={strange}"])


@pytest.mark.usefixtures("back_to_pynative")
def test_what_would_give_wrong_scores_is_refused(inputs, tmp_path):
    model, _ = inputs
    rows = write_rows(tmp_path / "rows.jsonl", sentences(60))
    run.finetune(load_run(None, overrides(model, rows, tmp_path / "out", "train.max_steps=2", "train.mode=pynative")))
    other = write_model(tmp_path / "other", seed=6)
    with pytest.raises(DeltaFileError, match="other weights than the one it was trained on"):
        run.infer(tmp_path / "out", ["boat"], [f"model.path={other}"])
    write_rows(rows, sentences(45))
    with pytest.raises(DataError, match="has changed since the run"):
        run.evaluate(tmp_path / "out")


@pytest.mark.usefixtures("back_to_pynative")
def test_pairs_of_texts_are_trained_on_and_used(inputs, tmp_path):
    model, _ = inputs
    rows = [{**row, "second": "the old"} for row in sentences(30)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    more = ("data.text_pair=second", "train.max_steps=2", "train.mode=pynative")
    run.finetune(load_run(None, overrides(model, path, tmp_path / "out", *more)))
    assert run.infer(tmp_path / "out", ["boat\tthe old"])
    with pytest.raises(DataError, match="put a tab between"):
        run.infer(tmp_path / "out", ["boat"])


def test_texts_longer_than_the_model_are_refused(inputs, tmp_path):
    with pytest.raises(RunFileError, match="has 32 positions"):
        run.finetune(settings(inputs, tmp_path, "data.max_length=64"))
    with pytest.raises(RunFileError, match="32 after a prefix of 10 tokens"):
        run.finetune(settings(inputs, tmp_path, "data.max_length=32", "method.name=ptuning2", "method.tokens=10"))
    longest = settings(inputs, tmp_path, "data.max_length=32", "method.name=adaption_prompt")  # it takes no position
    assert prepare(longest, Reporter()).train.count


@pytest.mark.usefixtures("back_to_pynative")
def test_a_run_of_an_earlier_version_is_resumed(inputs, tmp_path):
    """Its run.yaml lacks keys that came later, and the method's own learning rate, and a best of two numbers."""
    more = ("train.max_steps=6", "train.mode=pynative", "train.learning_rate=null", "train.evaluate_every=1")
    config = settings(inputs, tmp_path / "out", *more)
    with pytest.raises(Interrupted):
        run.finetune(config, StopAt(2))
    path = tmp_path / "out" / "run.yaml"
    content = yaml.safe_load(path.read_text())
    assert content["train"].pop("prefix_start") == "text"
    assert content["train"].pop("learning_rate") == 0.001
    path.write_text(yaml.safe_dump(content))
    saved = tmp_path / "out" / CHECKPOINT
    with safe_open(saved, "numpy") as file:
        metadata = file.metadata()
    state = json.loads(metadata["state"])
    assert len(state["best"]) == 2
    metadata["state"] = json.dumps({**state, "best": state["best"][0]})
    save_file(load_file(saved), saved, metadata)
    assert run.finetune(config, resume=True)["step"] == 6
    path.write_text("- no run file")
    (tmp_path / "out" / "report.json").unlink()
    with pytest.raises(CannotResume, match="cannot be told what the run in"):
        run.finetune(config, resume=True)


@pytest.mark.usefixtures("back_to_pynative")
def test_what_resume_refuses(inputs, tmp_path):
    config = settings(inputs, tmp_path / "out", "train.max_steps=2", "train.mode=pynative")
    with pytest.raises(CannotResume, match="nothing to go on from"):
        run.finetune(config, resume=True)
    run.finetune(config)
    with pytest.raises(CannotResume, match="is finished"):
        run.finetune(config, resume=True)
    with pytest.raises(RunFileError, match="--overwrite"):
        run.finetune(config)
    (tmp_path / "out" / "report.json").unlink()
    other = settings(inputs, tmp_path / "out", "train.max_steps=2", "train.mode=pynative", "train.batch_size=4")
    with pytest.raises(CannotResume, match="train.batch_size: it was 8, now 4"):
        run.finetune(other, resume=True)
    (tmp_path / "out" / CHECKPOINT).write_bytes(b"broken")
    with pytest.raises(CannotResume, match="cannot be read.*--overwrite"):
        run.finetune(config, resume=True)


@pytest.mark.usefixtures("back_to_pynative")
def test_early_stopping_and_the_best_delta(inputs, tmp_path):
    more = ("train.early_stopping=2", "train.evaluate_every=1", "train.epochs=40", "train.learning_rate=1e-12")
    notes = Notes()
    report = run.finetune(settings(inputs, tmp_path, *more, "train.mode=pynative"), notes)
    assert (report["step"], report["kept_step"]) == (3, 1)
    assert any("Early stopping" in line for line in notes.lines)


@pytest.mark.usefixtures("back_to_pynative")
def test_of_equally_right_deltas_the_one_with_the_lowest_loss_is_kept(inputs, tmp_path):
    more = ("train.evaluate_every=1", "train.max_steps=9", "train.learning_rate=0.02", "train.mode=pynative")
    report = run.finetune(settings(inputs, tmp_path, *more))
    records = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "accuracy" in line]
    best = max(record["accuracy"] for record in records)
    equal = [record for record in records if record["accuracy"] == best]
    lowest = min(equal, key=lambda record: record["evaluation_loss"])
    assert report["kept_step"] == lowest["step"] != equal[0]["step"]
    console = Console(record=True, width=100)
    print_report(console, report, tmp_path)
    assert (f"step {lowest['step']} of 9" in console.export_text()) == (lowest["step"] < 9)


@pytest.mark.usefixtures("back_to_pynative")
def test_a_loss_that_is_not_finite_stops_the_run(inputs, tmp_path):
    with pytest.raises(Diverged, match="learning_rate"):
        run.finetune(
            settings(
                inputs,
                tmp_path,
                "train.learning_rate=1e30",
                "train.warmup=0",
                "train.mode=pynative",
                "train.clip_norm=0",
            )
        )


@pytest.mark.usefixtures("back_to_pynative")
def test_the_data_is_described(inputs, tmp_path):
    model, _ = inputs
    rows = sentences(30)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    path.write_text(path.read_text() + "broken\n")
    test = write_rows(tmp_path / "test.jsonl", [*rows[:3], {"text": "far away", "label": "space"}])
    notes = Notes()
    more = (f"data.test={test}", "train.max_steps=1", "train.mode=pynative")
    config = load_run(None, overrides(model, path, tmp_path / "out", *more))
    report = run.finetune(config, notes)
    text = "\n".join(notes.lines)
    assert "1 row left out" in text
    assert "line 31: not JSON" in text
    assert "3 training rows have a text that is also held out" in text
    assert "labels that no training row has (space)" in text
    assert report["rows"] == {"train": 27, "test": 4}
    with pytest.raises(DataError, match="data.overlap=drop"):
        run.finetune(
            load_run(None, [*overrides(model, path, tmp_path / "o", f"data.test={test}"), "data.overlap=error"])
        )


def test_the_learning_rate_warms_up_and_decays():
    linear = learning_rates(TrainSection(warmup=0.2, schedule="linear"), 1.0, 10)
    np.testing.assert_allclose(linear, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    cosine = learning_rates(TrainSection(warmup=0, schedule="cosine"), 2.0, 4)
    np.testing.assert_allclose(cosine, [2 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    assert learning_rates(TrainSection(warmup=0, schedule="constant"), 3.0, 2) == [3.0, 3.0]


@pytest.mark.usefixtures("back_to_pynative")
def test_the_folder_has_everything(inputs, tmp_path):
    run.finetune(settings(inputs, tmp_path, "train.max_steps=2", "train.mode=pynative"))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "before.json", CHECKPOINT, "data.json", "curve.png", "delta", "labels.json", "metrics.jsonl", "report.json",
        "run.yaml", ".writer.lock",
    }  # fmt: skip
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert set(first) == {
        "step", "epoch", "loss", "learning_rate", "gradient_norm", "seconds", "samples_per_second", "tokens_per_second"
    }  # fmt: skip


@pytest.mark.usefixtures("back_to_pynative")
def test_predictions_come_with_probabilities(inputs, tmp_path):
    run.finetune(settings(inputs, tmp_path, "train.epochs=6", "train.mode=pynative", "train.learning_rate=0.03"))
    predictions = run.infer(tmp_path, ["the boat and the wave", "cloud"])
    for chances in predictions:
        assert set(chances) == {"sea", "sky", "land"}
        assert list(chances.values()) == sorted(chances.values(), reverse=True)
        assert sum(chances.values()) == pytest.approx(1)
    assert next(iter(predictions[0])) == "sea"


@pytest.mark.usefixtures("back_to_pynative")
def test_a_model_in_a_single_file_is_tuned_and_merged_into_a_directory(tmp_path):
    from mindpet.train import artifacts
    from tests.models.test_e5 import tensors_of, write_file

    model = tmp_path / "e5.bin"
    write_file(model, tensors_of(np.random.default_rng(0)))
    rows = [{"text": text, "label": text[0]} for text in ("海", "a a", "é", "海 a", "a é", "é 海") * 5]
    rows = [{**row, "text": f"{row['text']} {'a' * (number % 7)}"} for number, row in enumerate(rows)]
    config = settings((model, write_rows(tmp_path / "rows.jsonl", rows)), tmp_path / "out", "train.mode=pynative")
    report = run.finetune(config)
    assert report["task"] == "classification"
    assert report["model_bytes"] == model.stat().st_size
    predictions = run.infer(tmp_path / "out", ["海 a"])
    artifacts.merge_into(str(tmp_path / "out"), tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    again = write_rows(tmp_path / "again.jsonl", rows)
    run.finetune(settings((tmp_path / "merged", again), tmp_path / "more", "train.mode=pynative"))
    assert set(predictions[0]) == {"海", "a", "é"}
