"""Whole comparisons through the command line, each cell in its own process."""

import csv
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from mindpet.cli.app import app
from mindpet.cli.board import Board, print_comparison
from mindpet.train.fit import read_metrics
from mindpet.train.summary import summarise
from tests.tiny import sentences, stories, write_language_model, write_model, write_rows

METHODS = ("lora", "full")
SEEDS = (0, 1)


class Project:
    """A run file of a comparison, and the command on it."""

    def __init__(self, folder, model, data, **sections):
        self.folder, self.out = folder, folder / "out"
        train = {"epochs": 2, "batch_size": 8, "mode": "pynative", "save_every": 2, "learning_rate": 0.01}
        content = {
            "model": {"path": str(model)},
            "data": {"train": str(data), "max_length": 16},
            "train": train | sections.pop("train", {}),
            "output": {"directory": str(self.out)},
            "compare": {"methods": list(METHODS), "seeds": list(SEEDS), **sections},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(content))

    def start(self, *words):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        words = [sys.executable, "-m", "mindpet", "compare", "run.yaml", *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, cwd=self.folder, env=environment, start_new_session=True, **pipes)

    def run(self, *words, code=0):
        """From within this process; the cells have their own."""
        words = ["compare", str(self.folder / "run.yaml"), *map(str, words)]
        result = CliRunner().invoke(app, words, env={"OMP_NUM_THREADS": "1", "COLUMNS": "100"})
        assert result.exit_code == code, result.output
        return result.output

    def result(self):
        return json.loads((self.out / "comparison.json").read_text())

    def row(self, method):
        return next(row for row in self.result()["rows"] if row["method"] == method)

    def report(self, method, seed):
        return json.loads((self.out / method / f"seed-{seed}" / "report.json").read_text())

    def times(self):
        """When each report was written."""
        return {str(path.parent.relative_to(self.out)): path.stat().st_mtime_ns for path in self.reports()}

    def reports(self):
        return sorted(self.out.glob("*/seed-*/report.json"))

    def wait_for_steps(self, process, place, steps):
        end = time.monotonic() + 300
        while len(read_metrics(self.out / place / "metrics.jsonl")) < steps:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)


def lines(path):
    return set(Path(path).read_text().splitlines())


def project(folder, **sections):
    model = write_model(folder / "model")
    return Project(folder, model, write_rows(folder / "rows.jsonl", sentences(60)), **sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison of two methods over two seeds, and what was printed."""
    made = project(tmp_path_factory.mktemp("finished"))
    made.output = made.run()
    return made


@pytest.mark.slow
def test_the_figures_are_those_of_the_runs(finished):
    full = statistics.mean(finished.report("full", seed)["after"]["accuracy"] for seed in SEEDS)
    table = list(csv.DictReader(io.StringIO((finished.out / "comparison.csv").read_text())))
    for method, in_csv in zip(METHODS, table):
        reports = [finished.report(method, seed) for seed in SEEDS]
        values = [report["after"]["accuracy"] for report in reports]
        row = finished.row(method)
        assert row["mean"] == pytest.approx(sum(values) / 2)
        assert row["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert row["gap_to_full"] == pytest.approx(100 * (sum(values) / 2 - full))
        assert [row["seeds"][str(seed)] for seed in SEEDS] == reports
        counts = reports[0]["parameters"]
        # LoRA keeps the frozen weights, and Adam two numbers for each that trains
        assert row["static_mib"] == pytest.approx(4 * (counts["total"] + 2 * counts["trainable"]) / 2**20, rel=0.01)
        assert row["dynamic_mib"] == pytest.approx(
            sum(report["peak_memory_mib"] for report in reports) / 2 - row["static_mib"]
        )
        assert float(in_csv["mean"]) == row["mean"]
        assert [float(in_csv[f"seed_{seed}"]) for seed in SEEDS] == values
        text = f"{100 * row['mean']:.2f} ± {100 * row['deviation']:.2f}"
        assert text in (finished.out / "comparison.md").read_text()
        assert text in finished.output
    assert finished.result()["rows"][1]["share"] == 1
    assert finished.result()["machine"]["cores"] >= 1
    assert (finished.out / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_score_is_of_the_last_step_on_the_same_rows_for_all(finished):
    held_out = set()
    for path in finished.reports():
        records = [record for record in read_metrics(path.parent / "metrics.jsonl") if "accuracy" in record]
        report = json.loads(path.read_text())
        assert report["after"]["accuracy"] == records[-1]["accuracy"]
        assert report["kept_step"] == report["step"] == records[-1]["step"]
        held_out.add(json.loads((path.parent / "data.json").read_text())["held_out"])
    assert len(held_out) == 1


@pytest.mark.slow
def test_a_comparison_that_was_killed_ends_as_if_it_had_not_been(finished, tmp_path):
    other, cells = project(tmp_path), ("--only", "lora:0", "--only", "full:0")
    process = other.start(*cells)
    other.wait_for_steps(process, "full/seed-0", 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = other.times()
    assert list(kept) == ["lora/seed-0"]
    output = other.run(*cells)
    assert "lora, seed 0: is finished already" in output
    assert "full, seed 0: going on from its last save" in output
    assert other.times()["lora/seed-0"] == kept["lora/seed-0"]
    for method in METHODS:
        assert other.report(method, 0)["after"] == pytest.approx(finished.report(method, 0)["after"])


@pytest.mark.slow
def test_finished_cells_are_kept_and_changed_settings_redo_those_concerned(finished):
    before = finished.times()
    assert len(before) == 4
    output = finished.run()
    assert output.count("is finished already") == 4
    assert finished.times() == before
    output = finished.run("compare.settings={lora: {method.rank: 2}}", "--only", "lora:1")
    assert "lora, seed 1: done anew, settings have changed (method.rank: it was None, now 2)" in output
    after = finished.times()
    assert {place for place in after if after[place] != before[place]} == {"lora/seed-1"}
    row = finished.row("lora")
    assert row["options"] == {"rank": 2, "alpha": 16}
    assert (row["state"], row["seeds_finished"]) == ("unfinished", 1)  # seed 0 is still of rank 8
    finished.run("--only", "full", "--redo", "full:1")
    assert {place for place, then in finished.times().items() if then != after[place]} == {"full/seed-1"}


@pytest.mark.slow
def test_sigterm_saves_the_running_cells(tmp_path):
    made = project(tmp_path, train={"epochs": 200})
    process = made.start("--jobs", "2")
    made.wait_for_steps(process, "lora/seed-0", 4)
    made.wait_for_steps(process, "full/seed-0", 4)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert "0 of 4 cells are done, the rest is saved" in output
    for method in METHODS:
        assert "Stopped after step" in (made.out / method / "seed-0" / "errors.txt").read_text()
        assert not (made.out / method / "seed-0" / "report.json").exists()


@pytest.mark.slow
def test_a_second_sigterm_ends_cells_that_do_not_react(tmp_path):
    made = project(tmp_path, train={"epochs": 200})
    process = made.start("--only", "lora:0")
    made.wait_for_steps(process, "lora/seed-0", 2)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    try:
        assert "the rest is saved" in process.communicate(timeout=30)[0]
        assert process.returncode == 130
        assert not Path(f"/proc/{child}").exists()
    finally:
        if Path(f"/proc/{child}").exists():
            os.kill(int(child), signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_do_not_run_the_same_cell(tmp_path):
    made = project(tmp_path, train={"epochs": 400})
    first = made.start("--only", "lora:0")
    made.wait_for_steps(first, "lora/seed-0", 2)
    assert "lora, seed 0: another process runs it" in made.run("--only", "lora:0")
    os.kill(first.pid, signal.SIGINT)
    assert "the rest is saved" in first.communicate(timeout=120)[0]


@pytest.mark.slow
def test_a_cell_that_fails_is_reported_and_the_others_go_on(tmp_path):
    settings = {"full": {"train.learning_rate": 1e30, "train.clip_norm": 0.0, "train.warmup": 0.0}}
    made = project(tmp_path, settings=settings)
    output = made.run("--seeds", "0", code=1)
    assert "full, seed 0 failed" in output
    assert "Try a lower train.learning_rate" in output
    assert made.row("lora")["state"] == "finished"
    assert made.row("full")["state"] == "failed"
    assert made.row("lora")["gap_to_full"] is None
    assert "Try a lower" in (made.out / "comparison.md").read_text()


@pytest.mark.slow
def test_a_search_chooses_on_training_rows_and_its_rate_is_used(tmp_path):
    made = project(tmp_path, methods=["bitfit"], seeds=[4], grid=[0.01, 1, 1e32], train={"learning_rate": None})
    output = made.run("--search")
    found = json.loads((made.out / "bitfit" / "search.json").read_text())
    assert [entry["learning_rate"] for entry in found["candidates"]] == [3e-5, 3e-3, 3e29]
    scored = {entry["learning_rate"]: entry["accuracy"] for entry in found["candidates"] if "accuracy" in entry}
    losses = {entry["learning_rate"]: entry["evaluation_loss"] for entry in found["candidates"] if "accuracy" in entry}
    assert found["chosen"] == max(scored, key=lambda rate: (scored[rate], -losses[rate]))
    assert f"the best learning rate on the validation rows is {found['chosen']:g}" in output
    assert made.row("bitfit")["searched"]
    assert made.row("bitfit")["learning_rate"] == found["chosen"]
    settings = yaml.safe_load((made.out / "bitfit" / "seed-4" / "run.yaml").read_text())
    assert settings["train"]["learning_rate"] == found["chosen"]
    held_out = lines(settings["data"]["test"])
    assert held_out
    for run_file in (made.out / "bitfit" / "search").glob("*/run.yaml"):
        data = yaml.safe_load(run_file.read_text())["data"]
        seen = lines(data["train"]) | lines(data["test"])
        assert seen == lines(settings["data"]["train"])
        assert not seen & held_out
    before = made.times()
    assert "as a search found before" in made.run()
    assert made.times() == before


@pytest.mark.slow
def test_a_language_model_is_compared_by_perplexity_and_may_not_fit_a_method(tmp_path):
    model = write_language_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(stories(60))
    methods = ["bitfit", "lora", "full", "r_drop"]
    made = Project(tmp_path, model, tmp_path / "text.txt", methods=methods, seeds=[0])
    output = made.run()
    assert made.result()["quality"] == "perplexity"
    lora, full = (made.report(method, 0)["after"]["perplexity"] for method in ("lora", "full"))
    assert made.row("lora")["gap_to_full"] == pytest.approx(100 * (lora / full - 1))
    assert made.row("bitfit")["state"] == "does not apply"
    assert "No parameter of this LlamaForCausalLM" in made.row("bitfit")["reason"]
    assert "bitfit does not apply here: No parameter of" in " ".join(output.split())
    assert made.row("r_drop")["state"] == "does not apply"
    assert "set model.dropout=0.1" in made.row("r_drop")["reason"]
    assert "does not apply." in made.run()  # and is not tried again


def test_the_board_has_a_bar_for_each_running_cell_on_a_terminal():
    board = Board()
    board.console = Console(file=io.StringIO(), force_terminal=True, width=90, highlight=False)
    with board:
        board.progress("lora, seed 0", 3, 10)
        board.overall(1, 6, 200.0)
        board.message("full, seed 0: begins")
        assert {task.description for task in board.bars.tasks} == {"lora, seed 0", "all cells"}
        assert board.bars.tasks[1].fields["left"] == "about 3 min left"
        board.ended("lora, seed 0")
        assert [task.description for task in board.bars.tasks] == ["all cells"]
    assert "full, seed 0: begins" in board.console.file.getvalue()


def test_the_table_reads_well_in_a_hundred_columns(tmp_path):
    row = {
        "state": "finished", "reason": "", "epochs": 5, "max_steps": None, "optimizer": "adam", "learning_rate": 1e-3,
        "searched": True, "options": {"rank": 8, "alpha": 16.0}, "seeds_finished": 3, "seeds_planned": 3,
        "mean": 0.9575, "deviation": 0.0021, "gap_to_full": -0.41, "share": 0.0041, "static_mib": 87.4,
        "dynamic_mib": 1460.2, "seconds_per_step": 0.412,
    }  # fmt: skip
    rows = [{**row, "method": name} for name in ("lora", "low_rank_adapter", "low_rank_adapter+r_drop", "full")]
    result = {"quality": "accuracy", "rows": rows}
    console = Console(file=io.StringIO(), width=100)
    print_comparison(console, result, tmp_path)
    output = console.file.getvalue()
    assert "…" not in output
    for part in ("low_rank_adapter+r_drop", "87 + 1460", "95.75 ± 0.21", "-0.41", "0.001*", "0.41%", "0.412"):
        assert part in output
    assert "All with 5 epochs, adam." in output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--methods", "lora,bitfti"], "did you mean 'bitfit'"),
        (["--seeds", "0,x"], "--seeds takes whole numbers"),
        (["--only", "lora:7"], "--only lora:7: is not in this comparison"),
        (["compare.seds=[1]"], "did you mean 'seeds'"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_at_once(tmp_path, words, says):
    project(tmp_path)
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "run.yaml"), *words])
    assert result.exit_code == 2
    assert says in result.output


def test_a_summary_of_a_known_network_a_model_and_a_run_file(tmp_path):
    made = project(tmp_path)
    output = CliRunner().invoke(app, ["summary", "--preset", "bert-base-chinese", "--labels", "15"]).output
    assert "0.30%" in output  # LoRA on BERT-base with 15 classes, as in the user document's table
    assert "low_rank_adapter" in output
    output = (
        CliRunner().invoke(app, ["summary", str(tmp_path / "model"), "--method", "lora", "--optimizer", "sgd"]).output
    )
    assert "sgd" in output
    assert "adapter" not in output
    content = yaml.safe_load((made.folder / "run.yaml").read_text())
    (made.folder / "run.yaml").write_text(yaml.safe_dump({**content, "method": {"name": "lora", "rank": 2}}))
    output = CliRunner().invoke(app, ["summary", str(made.folder / "run.yaml"), "--method", "lora"]).output
    lora = 2 * 2 * 2 * (16 + 16) + 16 * 2 + 2  # two layers, two cells in each, rank 2; and the head
    assert f" {lora} " in output
    compared = {**content, "compare": {**content.get("compare", {}), "settings": {"lora": {"method.rank": 4}}}}
    (made.folder / "run.yaml").write_text(yaml.safe_dump(compared))
    output = CliRunner().invoke(app, ["summary", str(made.folder / "run.yaml"), "--method", "lora"]).output
    assert f" {2 * 2 * 4 * (16 + 16) + 16 * 2 + 2} " in output
    both = {**compared, "method": {"name": "LoRA", "rank": 8, "targets": ["*.query"]}}  # one goes over the other
    (made.folder / "run.yaml").write_text(yaml.safe_dump(both))
    output = CliRunner().invoke(app, ["summary", str(made.folder / "run.yaml"), "--method", "lora"]).output
    assert f" {2 * 1 * 4 * (16 + 16) + 16 * 2 + 2} " in output


def test_a_table_in_a_file_is_not_cut_off():
    done = subprocess.run(
        [sys.executable, "-m", "mindpet", "summary", "--preset", "glm2-6b"],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "COLUMNS"},
    )
    assert "of full" in done.stdout
    assert "…" not in done.stdout


@pytest.mark.parametrize(
    ("written", "asked", "options"),
    [("LoRA", "lora", {"rank": 2}), ("lora", "LORA", {"rank": 2}), ("prefixtuning", "prefix", {"tokens": 3})],
)
def test_options_of_a_run_file_count_however_its_method_is_written(tmp_path, written, asked, options):
    made = project(tmp_path)
    content = yaml.safe_load((made.folder / "run.yaml").read_text())
    (made.folder / "run.yaml").write_text(yaml.safe_dump({**content, "method": {"name": written, **options}}))
    output = CliRunner().invoke(app, ["summary", str(made.folder / "run.yaml"), "--method", asked]).output
    sizes = json.loads((tmp_path / "model" / "config.json").read_text())
    assert f" {summarise(sizes, asked, options, labels=2).trained:,} " in output


@pytest.mark.parametrize("content", ["[]", '"bert"', '{"model_type": []}', '{"model_type": {}}'])
def test_a_summary_refuses_a_config_json_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    result = CliRunner().invoke(app, ["summary", str(tmp_path)])
    assert result.exit_code == 2
    assert "config.json must be an object" in result.output or "'model_type' must be one of bert" in result.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Give a run file, a model, or --preset"),
        (["--preset", "llama-7"], "did you mean 'llama-7b'"),
        (["llama-7b"], "Do you mean --preset llama-7b?"),
        (["--preset", "gpt2", "--method", "lor"], "did you mean 'lora'"),
        (["--preset", "gpt2", "--optimizer", "adma"], "did you mean 'adam'"),
    ],
)
def test_a_summary_says_what_is_wrong(words, says):
    result = CliRunner().invoke(app, ["summary", *words])
    assert result.exit_code == 2
    assert says in result.output


def test_a_method_that_finds_nothing_has_a_line_of_its_own():
    output = CliRunner().invoke(app, ["summary", "--preset", "llama-7b"]).output
    assert "bitfit does not apply: llama-7b has no bias" in output
