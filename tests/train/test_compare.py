"""What a comparison consists of, before anything runs; tests/cli/test_compare.py runs whole ones."""

import itertools
import json
import os
from pathlib import Path

import pytest
from matplotlib import pyplot
from matplotlib.text import Text

from mindpet import _files
from mindpet._methods import DOCUMENTED
from mindpet.delta.registry import METHODS
from mindpet.train.compare import compare
from mindpet.train.comparison import picture, tables
from mindpet.train.comparison import runner as cell_runner
from mindpet.train.comparison.cells import Watcher
from mindpet.train.comparison.plan import make_plan, variant_named
from mindpet.train.comparison.search import judge, recorded_rate
from mindpet.train.comparison.splits import write_splits
from mindpet.train.config import RunConfig, RunFileError, as_yaml, load_run
from mindpet.train.data import read_rows
from mindpet.train.fit import CHECKPOINT
from mindpet.train.language import read_texts
from mindpet.train.processes import lock_of
from tests.tiny import questions, sentences, stories, write_language_model, write_model, write_rows


class Notes(Watcher):
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("language"))


def a_run(folder: Path, model: Path, data: Path, **sections) -> RunConfig:
    content = {"model": {"path": str(model)}, "data": {"train": str(data)}, **sections}
    content["data"] |= {"max_length": 16}
    content["output"] = {"directory": str(folder / "out")}
    (folder / "run.yaml").write_text(json.dumps(content))
    return load_run(folder / "run.yaml")


@pytest.fixture
def run(tmp_path, model):
    """A run file of a classifier, with these sections."""
    rows = write_rows(tmp_path / "rows.jsonl", sentences(60))
    return lambda **sections: a_run(tmp_path, model, rows, **sections)


@pytest.mark.parametrize(
    ("word", "name"),
    [("lora", "lora"), (" LoRA ", "lora"), ("lora+r_drop", "lora+r_drop"), ("prefixtuning", "prefix")]
    + [("r_drop", "r_drop"), ("full+r_drop", "r_drop"), ("FULL", "full")],
)
def test_names_of_rows(word, name):
    assert variant_named(word) == name


@pytest.mark.parametrize("word", ["", "loar", "lora+dropout", "r_drop+r_drop", "lora+", "+r_drop", "lora+lora"])
def test_other_names_are_refused(word):
    with pytest.raises(ValueError, match=r"there is no .*the methods are lora.*each also with \+r_drop"):
        variant_named(word)


def test_without_a_word_every_documented_method_and_full_tuning_are_compared(run):
    plan = make_plan(run())
    assert set(plan.variants) == {*DOCUMENTED, "full"}
    assert plan.seeds == [0, 1, 2]
    assert [cell.config.train.seed for cell in plan.cells("lora")] == [0, 1, 2]
    assert [str(cell) for cell in plan.cells("lora")] == ["lora, seed 0", "lora, seed 1", "lora, seed 2"]
    assert plan.cells("lora")[1].directory == plan.directory / "lora" / "seed-1"


def test_each_method_has_its_own_learning_rate_unless_one_is_set(run):
    plan = make_plan(run(compare={"methods": [*DOCUMENTED, "vera", "full"]}))
    for name in (*DOCUMENTED, "vera"):
        assert plan.variants[name].train.learning_rate == METHODS[name].learning_rate
    assert plan.variants["full"].train.learning_rate == 1e-4
    section = {"settings": {"full": {"train.learning_rate": 5e-5}}}
    plan = make_plan(run(train={"learning_rate": 0.02}, compare=section))
    assert plan.variants["lora"].train.learning_rate == 0.02
    assert plan.variants["full"].train.learning_rate == 5e-5


def test_options_in_the_section_method_are_that_methods_alone(run):
    plan = make_plan(run(method={"name": "lora", "rank": 2}), ["lora", "lora+r_drop", "adapter", "full"])
    options = {name: config.method.options for name, config in plan.variants.items()}
    assert options == {"lora": {"rank": 2}, "lora+r_drop": {"rank": 2}, "adapter": {}, "full": {}}


def test_settings_of_a_method_hold_with_r_drop_too_which_may_have_its_own(run):
    settings = {
        "lora": {"method.rank": 4, "train.epochs": 9},
        "lora+r_drop": {"train.epochs": 7},
        "full": {"train.batch_size": 2},
    }
    plan = make_plan(run(compare={"methods": ["lora", "lora+r_drop", "r_drop", "full"], "settings": settings}))
    trains = {name: (config.train.epochs, config.train.r_drop_alpha) for name, config in plan.variants.items()}
    assert trains == {"lora": (9, 0), "lora+r_drop": (7, 4), "r_drop": (5, 4), "full": (5, 0)}
    assert plan.variants["lora+r_drop"].method.options == {"rank": 4}
    assert plan.variants["r_drop"].train.batch_size == 2
    assert make_plan(run(train={"r_drop_alpha": 2}), ["r_drop", "full"]).variants["r_drop"].train.r_drop_alpha == 2
    assert make_plan(run(train={"r_drop_alpha": 2}), ["r_drop", "full"]).variants["full"].train.r_drop_alpha == 0


def test_nothing_is_chosen_on_the_held_out_rows(run):
    plan = make_plan(run(train={"keep_best": True, "early_stopping": 2}))
    for config in plan.variants.values():
        assert not config.train.keep_best
        assert config.train.early_stopping is None


def test_every_problem_of_a_comparison_is_in_one_message(run):
    settings = {
        "lora": {"method.rnak": 8, "train.epoch": 1},
        "adapter": {"method.size": -1, "data.holdout": 0.5},
        "full": {"train.learning_rat": 1, "train.keep_best": True, "method.rank": 3},
        "lara": {"method.rank": 3},
    }
    config = run(compare={"methods": ["lora", "bitfti"], "settings": settings})
    with pytest.raises(RunFileError) as error:
        make_plan(config, seeds=[-1])
    for part in (
        "compare.methods: there is no 'bitfti'",
        "did you mean 'bitfit' or",
        "compare.settings: there is no 'lara'",
        "compare.settings.lora: train.epoch: there is no such key; did you mean 'epochs'?",
        "compare.settings.adapter: data.holdout: is not method.KEY or train.KEY",
        "compare.settings.adapter: method: ",
        "'size' must be a positive int",
        "compare.settings.full: train.learning_rat: there is no such key; did you mean 'learning_rate'?",
        "compare.settings.full: train.keep_best: is not for a method to set",
        "seeds: -1 is not from 0",
    ):
        assert part in str(error.value)
    with pytest.raises(RunFileError, match=r"'lora' has no option rnak \(did you mean 'rank'\?\)"):
        make_plan(run(compare={"settings": {"lora": {"method.rnak": 8}}}))
    with pytest.raises(RunFileError, match=r"compare\.seeds"):
        run(compare={"seeds": []})
    with pytest.raises(RunFileError, match=r"compare\.methds: there is no such key; did you mean 'methods'"):
        run(compare={"methds": []})


def test_the_run_files_of_cells_do_not_speak_of_the_comparison(run):
    cell = make_plan(run(compare={"seeds": [5]})).cells("full")[0]
    assert "compare" not in as_yaml(cell.config)


def test_the_rows_are_split_once_and_a_search_never_sees_a_held_out_one(run):
    config = run(train={"seed": 3})
    plan = make_plan(config)
    data, fitting = write_splits(plan, Watcher())
    train, test = (set(read_rows(data[key]).texts) for key in ("train", "test"))
    fit, validation = (set(read_rows(fitting[key]).texts) for key in ("train", "test"))
    everything = set(read_rows(config.data.train).texts)
    assert train | test == everything
    assert fit | validation == train
    for one, other in itertools.combinations((test, fit, validation), 2):
        assert one
        assert not one & other
    assert write_splits(plan, Watcher()) == (data, fitting)


def test_a_search_sees_no_text_that_is_held_out_even_where_overlap_is_kept(tmp_path, model):
    rows = sentences(60)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = a_run(tmp_path, model, data)
    test = write_rows(tmp_path / "test.jsonl", rows[:9])
    section = config.data.model_copy(update={"test": str(test), "overlap": "keep"})
    said = Notes()
    written, fitting = write_splits(make_plan(config.model_copy(update={"data": section})), said)
    held_out = set(read_rows(test).texts)
    assert held_out <= set(read_rows(written["train"]).texts)  # the table keeps them, as asked
    searched = [read_rows(fitting[key]).texts for key in ("train", "test")]
    assert len(searched[0] + searched[1]) == 51
    assert not held_out & set(searched[0] + searched[1])
    assert "9 of the former are also held out; the search leaves them out." in said.lines


def test_other_rows_mean_other_files_so_that_all_runs_are_made_anew(run, tmp_path):
    plan = make_plan(run())
    before, _ = write_splits(plan, Watcher(), for_search=False)
    write_rows(tmp_path / "rows.jsonl", sentences(60, seed=1))
    after, nothing = write_splits(plan, Watcher(), for_search=False)
    assert before["train"] != after["train"]
    assert nothing is None


def test_pairs_of_texts_are_written_as_pairs(tmp_path, model):
    rows = [{"first": f"boat {word}", "second": "wave", "label": "yn"[i % 2]} for i, word in enumerate("abcdefghij")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = a_run(tmp_path, model, data)
    config = config.model_copy(update={"data": config.data.model_copy(update={"text": "first", "text_pair": "second"})})
    written, _ = write_splits(make_plan(config), Watcher())
    found = [
        read_rows(written[key], written["text"], written["label"], written["text_pair"]) for key in ("train", "test")
    ]
    assert sorted(text for rows in found for text in rows.texts) == [(f"boat {word}", "wave") for word in "abcdefghij"]


@pytest.mark.parametrize("kind", ["document", "folder", "texts", "questions"])
def test_texts_of_a_language_model_are_read_back_the_same(tmp_path, language_model, kind):
    if kind == "document":
        data = tmp_path / "text.txt"
        data.write_text(stories(30))
    elif kind == "folder":
        data = tmp_path / "texts"
        data.mkdir()
        for number in range(12):
            (data / f"{number}.txt").write_text(stories(3, seed=number))
    else:
        rows = [{"text": row["text"]} for row in sentences(30)] if kind == "texts" else questions(30)
        data = write_rows(tmp_path / "rows.jsonl", rows)
    config = a_run(tmp_path, language_model, data)
    written, fitting = write_splits(make_plan(config), Watcher())
    section = config.data.model_copy(update=written)
    parts = [read_texts(written[key], section).texts for key in ("train", "test")]
    whole = read_texts(data, config.data).texts
    if kind == "document":
        assert "".join(part[0] for part in parts) == whole[0]
    else:
        assert sorted(parts[0] + parts[1]) == sorted(whole)
    searched = [read_texts(fitting[key], section).texts for key in ("train", "test")]
    if kind == "document":
        assert "".join(part[0] for part in searched) == parts[0][0]
    else:
        assert sorted(searched[0] + searched[1]) == sorted(parts[0])


def test_a_search_tries_factors_of_the_methods_rate(run):
    plan = make_plan(run(train={"seed": 9}), ["lora"])
    data, fitting = write_splits(plan, Watcher())
    cells = plan.search_cells("lora", fitting)
    assert [cell.config.train.learning_rate for cell in cells] == [3e-4, 1e-3, 3e-3]
    assert {cell.config.train.seed for cell in cells} == {9}
    assert {cell.config.data.test for cell in cells} == {fitting["test"]}
    assert recorded_rate(plan.directory / "lora", cells) is None


def report(cell, accuracy):
    """The cell's directory as a finished run leaves it."""
    _files.write_text(cell.directory / "run.yaml", as_yaml(cell.config))
    after = {"accuracy": accuracy, "evaluation_loss": 1 - accuracy}
    content = {
        "after": after, "seconds": {"whole": 1.0}, "seconds_per_step": 0.1, "peak_memory_mib": 500,
        "static_memory_bytes": 1 << 20, "parameters": {"trainable": 1, "total": 100, "share": 0.01},
        "rows": {"train": 48, "test": 12},
    }  # fmt: skip
    _files.write_json(cell.directory / "report.json", content)


def another_process_runs(cell):
    """Its lock, as the process that runs it holds it; close it to let go."""
    lock = lock_of(cell.directory)
    assert lock is not None
    return lock


def test_a_search_that_another_process_is_still_running_finds_no_rate_and_starts_no_run(run):
    plan = make_plan(run(), ["lora"], [0])
    _, fitting = write_splits(plan, Watcher())
    cells = plan.search_cells("lora", fitting)
    report(cells[0], 0.9)
    report(cells[1], 0.5)
    lock, said = another_process_runs(cells[2]), Notes()
    result = compare(plan, said, search=True)
    assert not (plan.directory / "lora" / "search.json").exists()
    assert result["rows"][0]["state"] == "unfinished"
    assert not (plan.directory / "lora" / "seed-0").exists()
    assert "lora: its search is not finished; another process is at it. Its runs wait for that." in said.lines
    os.close(lock)


def test_a_search_is_judged_when_every_rate_has_a_score_a_refusal_or_a_failure(run):
    plan = make_plan(run(), ["lora"], [0])
    _, fitting = write_splits(plan, Watcher())
    cells, found = plan.search_cells("lora", fitting), cell_runner.CellRunner(1, 3, Watcher())
    directory = plan.directory / "lora"
    report(cells[0], 0.9)
    cells[1].refuse("nothing to adapt")
    assert not judge(directory, cells, found, Watcher())
    assert not (directory / "search.json").exists()
    found.failures[cells[2]] = "the loss is not finite"
    assert judge(directory, cells, found, Watcher())
    assert recorded_rate(directory, cells) == 3e-4
    assert not found.failures


@pytest.mark.parametrize("search", [False, True])
def test_redo_leaves_alone_what_another_process_runs(run, search):
    plan = make_plan(run(), ["lora"], [0])
    data, fitting = write_splits(plan, Watcher(), search)
    cells = plan.search_cells("lora", fitting) if search else []
    cells += plan.with_changes(["lora"], data=data).cells("lora")
    locks = [another_process_runs(cell) for cell in cells]
    for cell in cells:
        (cell.directory / CHECKPOINT).touch()
    compare(plan, search=search, redo=["lora"])
    assert all((cell.directory / CHECKPOINT).exists() for cell in cells)
    for lock in locks:
        os.close(lock)


def test_paths_are_published_as_the_run_file_has_them(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", sentences(60))
    content = {"model": {"path": os.path.relpath(model)}, "data": {"train": "rows.jsonl"}}
    content["output"] = {"directory": "runs/compared"}
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    plan = make_plan(load_run("run.yaml"), ["lora", "adapter"], [0])
    data, _ = write_splits(plan, Watcher(), for_search=False)
    done = plan.with_changes(["lora", "adapter"], data=data)
    report(done.cells("lora")[0], 0.9)
    done.cells("adapter")[0].refuse(f"Nothing in {model} fits, see {tmp_path}/runs/compared/adapter.")
    compare(plan, only=["adapter"])
    result = json.loads((tmp_path / "runs/compared/comparison.json").read_text())
    assert result["model"] == result["run_file"]["model"]["path"] == content["model"]["path"]
    assert result["run_file"]["data"]["train"] == "rows.jsonl"
    assert result["run_file"]["output"]["directory"] == "runs/compared"
    assert result["rows"][0]["settings"]["data"]["train"].startswith("runs/compared/data/train-")
    assert result["rows"][1]["reason"] == f"Nothing in {content['model']['path']} fits, see runs/compared/adapter."
    for name in ("comparison.json", "comparison.md", "comparison.csv"):
        text = (tmp_path / "runs/compared" / name).read_text()
        assert str(tmp_path) not in text
        assert str(model) not in text
    assert f"# Comparison on {model.name}\n" in (tmp_path / "runs/compared/comparison.md").read_text()


@pytest.mark.parametrize("option", ["only", "redo"])
def test_cells_that_are_not_in_the_plan_are_refused(run, option):
    plan = make_plan(run(), ["lora"], [0, 1])
    with pytest.raises(RunFileError) as error:
        compare(plan, **{option: ["full", "lora:2", "loar"]})
    for part in (
        f"--{option} full: is not in this comparison, which has lora:0, lora:1",
        "lora:2",
        "did you mean 'lora'",
    ):
        assert part in str(error.value)


def test_options_are_shown_with_their_defaults(run):
    settings = {"lora": {"method.targets": ["*.query"], "method.dropout": 0.1}}
    plan = make_plan(run(compare={"settings": settings}), ["lora", "bitfit", "adapter", "r_drop"])
    shown = {name: tables.in_words(tables.own_options(config)) for name, config in plan.variants.items()}
    assert shown["lora"] == "targets *.query, rank 8, alpha 16, dropout 0.1"
    assert shown["adapter"] == "size 64"
    assert shown["bitfit"] == ""
    assert shown["r_drop"] == "r_drop_alpha 4"


def test_names_in_the_picture_do_not_cover_each_other():
    figure, axes = pyplot.subplots()
    names = ["lora", "lora+r_drop", "low_rank_adapter", "bitfit", "prefix", "ptuning2"]
    points = [(name, 0.3 + 0.01 * number, 95 + 0.02 * number, 0.3, "C0") for number, name in enumerate(names)]
    for _, x, y, _, _ in points:
        axes.plot([x], [y], "o")
    axes.set_xscale("log")
    axes.margins(0.5)
    picture._label(figure, axes, points)
    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == names
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    pyplot.close(figure)
