"""Several processes that train together give what one gives, whatever becomes of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from mindpet._methods import DOCUMENTED
from mindpet.parallel.group import Group
from mindpet.train import run
from mindpet.train.config import RunFileError, load_run
from mindpet.train.data import DataError
from mindpet.train.dropout import DropoutKeys, ResumableDropout
from mindpet.train.fit import CHECKPOINT, Interrupted, Reporter, read_metrics
from mindpet.train.run import NothingDrops
from tests.parallel.exported import run_script
from tests.tiny import overrides, sentences, stories, write_language_model, write_model, write_rows

SAME = 1e-6
PROCESSES = "parallel.processes=2"
MODES = ("graph", "pynative")
OWN = {  # what a method needs to be tested with all it has; dropout wherever there is some
    "lora": ["method.dropout=0.2"],
    "prefix": ["method.dropout=0.2", "method.tokens=4"],
    "ptuning2": ["method.dropout=0.2", "method.tokens=4"],
    "low_rank_adapter": ["method.reduction_factor=4"],
    "full": ["train.optimizer=sgd"],  # the bias of a key has no gradient but rounding, which Adam makes a step of
    "bitfit": ["train.optimizer=sgd"],
}
EVERY_METHOD = {method: [f"method.name={method}", *OWN.get(method, ())] for method in (*DOCUMENTED, "full")}
ACCUMULATED = ["method.name=lora", "train.accumulate=3", "train.weight_decay=0.1", "train.optimizer=adamw"]
R_DROP = ["method.name=ptuning2", "method.tokens=4", "train.r_drop_alpha=2", "train.accumulate=2"]
FEW = {
    "lora": [*EVERY_METHOD["lora"], "train.r_drop_alpha=2", "train.batch_size=7"],
    "full": [*EVERY_METHOD["full"], "train.accumulate=3", "train.weight_decay=0.1", "train.mode=pynative"],
}
ALL = {
    **{f"{name}-{mode}": [*runs, f"train.mode={mode}"] for name, runs in EVERY_METHOD.items() for mode in MODES},
    **{f"accumulated-{mode}": [*ACCUMULATED, f"train.mode={mode}"] for mode in MODES},
    **{f"r_drop-{mode}": [*R_DROP, f"train.mode={mode}"] for mode in MODES},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl", sentences(62))


def tuned(directory):
    """The trained tensors of the last save."""
    return {key: value for key, value in load_file(directory / CHECKPOINT).items() if key.startswith("network/")}


def assert_same_runs(one, other):
    """Records and trained tensors of two runs."""
    left, right = read_metrics(one / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    assert [record["step"] for record in left] == [record["step"] for record in right]
    for mine, theirs in zip(left, right):
        for key in mine.keys() - {"seconds", "samples_per_second", "tokens_per_second"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6, abs=2e-6), (mine["step"], key)
    first, second = tuned(one), tuned(other)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=SAME, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [FEW, pytest.param(ALL, marks=pytest.mark.exhaustive)], ids=["few", "all"])
def test_two_processes_are_one_on_the_joined_batch(inputs, tmp_path, back_to_pynative, chosen):
    """13 rows held out and 49 to train on: neither is a multiple of a batch of 8, nor of two processes."""
    common = overrides(*inputs, tmp_path, "data.holdout=13", "train.epochs=3", "train.learning_rate=0.003")
    common += ["model.dropout=0.1", "train.max_steps=10"]
    runs = {name: [*common, *more] for name, more in chosen.items()}
    story = tmp_path / "story.txt"
    story.write_text(stories(60))
    language = [f"model.path={write_language_model(tmp_path / 'language')}", f"data.train={story}"]
    language += ["data.max_length=32", "train.batch_size=3", "train.learning_rate=0.01", "train.max_steps=10"]
    runs["language"] = [*language, "method.name=lora", "method.dropout=0.1", "data.holdout=0.1", "train.mode=pynative"]
    together, alone = tmp_path / "together", tmp_path / "alone"
    for directory in (together, alone):
        directory.mkdir()
        (directory / "runs.json").write_text(json.dumps(runs))
    script = str(Path(__file__).with_name("together.py"))
    run_script(together, 2, [script, str(together)], 1800)
    subprocess.run([sys.executable, script, str(alone)], check=True, capture_output=True, timeout=1800)
    for name in runs:
        assert_same_runs(alone / name, together / name)
        report = json.loads((together / name / "report.json").read_text())
        assert report["processes"] == 2
        assert len([record for record in read_metrics(together / name / "metrics.jsonl") if "loss" in record]) == 10


@pytest.mark.exhaustive_in_graph("*-shape0-3")
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shape", [(12, 5, 8), (12, 64)])
def test_each_process_drops_what_one_alone_would(mode, size, shape):
    class Network(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.drop = ms.nn.Dropout(p=0.4)

        def construct(self, x):
            return self.drop(x)

    def masks(rank, size):
        network, group = Network(), Group(rank, size)
        keys = DropoutKeys(network, 3, shape[0], group)
        network.set_train()
        keys.set_step(5)
        return network(ms.ops.ones((group.part_of(shape[0]), *shape[1:]))).asnumpy()

    parts = [masks(rank, size) for rank in range(size)]
    np.testing.assert_array_equal(np.concatenate(parts), masks(0, 1))


def test_masks_of_large_inputs_are_those_of_one_process_too(monkeypatch):
    monkeypatch.setattr("mindpet.train.dropout._POOL", 1 << 13)

    def masks(rank, part, whole):
        words = ms.Parameter(ms.Tensor(np.random.default_rng(0).integers(-(2**31), 2**31, 1 << 13).astype(np.int32)))
        keys = ms.Parameter(ms.Tensor([[7, 5]], ms.int32))
        cell = ResumableDropout(0.4, words, keys, 0, rank, part, whole).set_train()
        return cell(ms.ops.ones((part, 2100, 3))).asnumpy()

    whole = masks(0, 6, 6)
    assert 0.35 < (whole == 0).mean() < 0.45
    for size in (2, 3):
        parts = [masks(rank, 6 // size, 6) for rank in range(size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_more_processes_than_rows_in_a_batch_are_refused(inputs, tmp_path):
    with pytest.raises(RunFileError, match=r"parallel.processes=9 is more than the 8 rows of a batch"):
        load_run(None, overrides(*inputs, tmp_path, "parallel.processes=9"))


class Watch(Reporter):
    """Does something at a step of a run; keeps what it is told."""

    def __init__(self, at=0, act=lambda: None):
        self.at, self.act, self.steps, self.lines = at, act, [], []

    def step(self, record):
        self.steps.append(record["step"])
        if record["step"] >= self.at and self.at:
            self.at = 0
            self.act()

    def message(self, text):
        self.lines.append(text)


def pid_of(directory, rank):
    return json.loads((directory / "parallel" / f"process-{rank}.json").read_text())["pid"]


def of_job(directory):
    """Processes that have anything to do with the run in a directory."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or ())
        if str(directory / "parallel") in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("train_mode", ["pynative", pytest.param("graph", marks=pytest.mark.exhaustive)])
def test_a_run_survives_what_becomes_of_its_processes(inputs, tmp_path, back_to_pynative, train_mode):
    """Killed, resumed by two, interrupted, resumed by one: the end is that of a run nothing happened to."""
    directory = tmp_path / "run"
    settings = overrides(*inputs, tmp_path, "method.name=lora", "method.dropout=0.1", "train.epochs=60")
    settings += ["train.max_steps=70", "train.save_every=7", "train.evaluate_every=50", "train.learning_rate=0.001"]
    settings += [f"train.mode={train_mode}"]
    together = load_run(None, [*settings, f"output.directory={directory}", PROCESSES])

    watch = Watch(12, lambda: os.kill(pid_of(directory, 1), signal.SIGKILL))
    begun = time.monotonic()
    says = r"Process 1 of 2 \(counted from 0\) \(pid \d+\) was killed by signal 9 after step \d+"
    with pytest.raises(RuntimeError, match=says):
        run.finetune(together, watch)
    assert watch.at == 0
    assert time.monotonic() - begun < 90
    wait_until(lambda: not of_job(directory), 5)
    saved = max(watch.steps) // 7 * 7

    watch = Watch(saved + 12, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match=r"Stopped after step \d+ of 70; it is saved.\nGo on with: mindpet finetune"):
        run.finetune(together, watch, resume=True)
    assert watch.steps[0] in range(saved - 13, saved + 15)
    assert not of_job(directory)
    assert any("Starting 2 processes" in line for line in watch.lines)

    run.finetune(load_run(None, [*settings, f"output.directory={directory}"]), resume=True)
    run.finetune(load_run(None, [*settings, f"output.directory={tmp_path / 'alone'}"]))
    assert_same_runs(tmp_path / "alone", directory)


@pytest.mark.slow
def test_nothing_outlives_the_command_line(inputs, tmp_path):
    directory = tmp_path / "run"
    words = overrides(*inputs, directory, "train.max_steps=100000", "train.epochs=1", "train.mode=pynative", PROCESSES)
    (tmp_path / "run.yaml").write_text(f"model: {{path: {inputs[0]}}}\ndata: {{train: {inputs[1]}}}\n")
    command = [sys.executable, "-m", "mindpet", "finetune", str(tmp_path / "run.yaml"), *words]
    with open(tmp_path / "output.txt", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: read_metrics(directory / "metrics.jsonl"), 120)
        assert len(of_job(directory)) >= 3  # msrun, the scheduler and two processes
        wait_until(lambda: re.search(r"step \d+/100000  loss", (tmp_path / "output.txt").read_text()), 30)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not of_job(directory), 15)


@pytest.mark.slow
def test_under_msrun_the_command_line_is_one_of_several(inputs, tmp_path):
    directory = tmp_path / "run"
    words = overrides(*inputs, directory, "train.epochs=1", "method.name=bitfit", "train.mode=pynative")
    (tmp_path / "run.yaml").write_text(f"model: {{path: {inputs[0]}}}\ndata: {{train: {inputs[1]}}}\n")
    command = str(Path(sys.executable).parent / "mindpet")
    run_script(tmp_path, 2, [command, "finetune", str(tmp_path / "run.yaml"), *words], 240)
    assert json.loads((directory / "report.json").read_text())["processes"] == 2
    assert "held-out accuracy" in (tmp_path / "log" / "worker_0.log").read_text()
    assert "held-out accuracy" not in (tmp_path / "log" / "worker_1.log").read_text()


@pytest.mark.slow
def test_what_a_process_finds_wrong_is_said_as_it_is_by_one_process(inputs, tmp_path):
    config = load_run(None, overrides(*inputs, tmp_path, "model.dropout=0", "train.r_drop_alpha=4"))
    with pytest.raises(NothingDrops) as alone:
        run.finetune(config)
    together = load_run(None, overrides(*inputs, tmp_path, "model.dropout=0", "train.r_drop_alpha=4", PROCESSES))
    with pytest.raises(NothingDrops) as error:
        run.finetune(together)
    assert str(error.value) == str(alone.value)
    assert not of_job(tmp_path)


def test_what_is_wrong_with_the_data_is_said_before_anything_starts(inputs, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "no label"}\n')
    with pytest.raises(DataError, match="no 'label'"):
        run.finetune(load_run(None, overrides(inputs[0], bad, tmp_path / "run", PROCESSES)))
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_a_run_is_refused_before_anything_starts(inputs, tmp_path):
    (tmp_path / "run.yaml").write_text("model: {path: x}\n")
    config = load_run(None, overrides(*inputs, tmp_path, PROCESSES))
    with pytest.raises(RunFileError, match="holds a run already"):
        run.finetune(config)
    assert not (tmp_path / "parallel").exists()
