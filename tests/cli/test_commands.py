import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from typer.testing import CliRunner

from mindpet.cli import screen
from mindpet.cli.app import app
from mindpet.train.config import as_yaml, load_run
from tests.tiny import hear_ctrl_c, overrides, sentences, write_model, write_rows

RUNNER = CliRunner()


def invoke(*words, **more):
    result = RUNNER.invoke(app, [str(word) for word in words], **more)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run made by the command line: its directory, its run file, what was printed."""
    folder = tmp_path_factory.mktemp("tuned")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl", sentences(60))
    run_file = folder / "run.yaml"
    code, output = invoke("config", "init", run_file, "--model", model, "--train", rows)
    assert code == 0, output
    more = overrides(model, rows, folder / "out", "train.mode=pynative", "train.epochs=8")[2:]
    code, output = invoke("finetune", run_file, *more)
    assert code == 0, output
    return folder / "out", run_file, output


def test_a_run_shows_progress_and_ends_with_a_table(tuned):
    directory, _, output = tuned
    for part in ("loss", "samples/s", "s left", "held-out accuracy", "before", "after", "peak memory", "curve.png"):
        assert part in output
    report = json.loads((directory / "report.json").read_text())
    assert f"{report['parameters']['trainable']:,}" in output


def test_what_is_left_is_estimated_without_the_step_that_was_compiled(monkeypatch, capsys):
    record = dict.fromkeys(("loss", "learning_rate", "samples_per_second", "tokens_per_second"), 1.0)
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    shown = screen.Screen()
    shown.start(10, 20)
    for step, seconds in ((11, 60.0), (12, 6.0), (13, 6.0)):
        now[0] += seconds
        shown.step({**record, "step": step})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert "left" not in lines[0]
    assert [line.rpartition("  ")[2] for line in lines[1:]] == ["48 s left", "42 s left"]


def test_evaluate_prints_tables_and_json(tuned):
    directory, _, _ = tuned
    code, output = invoke("evaluate", directory)
    assert code == 0
    assert "recall" in output
    code, output = invoke("evaluate", directory, "--json")
    scores = json.loads(output)
    assert scores["accuracy"] == json.loads((directory / "report.json").read_text())["after"]["accuracy"]
    assert sum(map(sum, scores["confusion"])) == scores["rows"] == 12


def test_evaluate_takes_other_data(tuned, tmp_path):
    directory, _, _ = tuned
    other = write_rows(tmp_path / "other.jsonl", sentences(21, seed=9))
    code, output = invoke("evaluate", directory, f"data.test={other}", "--json")
    assert code == 0, output
    assert json.loads(output)["rows"] == 21


def test_infer_takes_arguments_a_file_and_stdin(tuned, tmp_path):
    directory, _, _ = tuned
    code, output = invoke("infer", directory, "the boat and the wave")
    assert code == 0
    assert "sea" in output
    lines = tmp_path / "lines.txt"
    lines.write_text("boat wave tide\n\nstar moon cloud\n")
    for words, stdin in ((("--file", lines), None), ((), lines.read_text())):
        code, output = invoke("infer", directory, "--json", *words, input=stdin)
        assert code == 0, output
        answers = [json.loads(line) for line in output.splitlines()]
        assert [answer["label"] for answer in answers] == ["sea", "sky"]
        assert all(sum(answer["probabilities"].values()) == pytest.approx(1) for answer in answers)


def test_config_show_prints_the_resolved_file(tuned):
    _, run_file, _ = tuned
    code, output = invoke("config", "show", run_file, "train.epochs=3")
    assert code == 0
    assert yaml.safe_load(output)["train"]["epochs"] == 3
    assert yaml.safe_load(output)["train"]["optimizer"] == "adam"


def test_config_validate_checks_model_and_data(tuned, tmp_path):
    _, run_file, _ = tuned
    code, output = invoke("config", "validate", run_file, "data.max_length=16")
    assert code == 0, output
    assert "is fine" in output
    code, output = invoke("config", "validate", run_file)
    assert code == 2
    assert "data.max_length is 128, but the model" in output
    missing = tmp_path / "none.jsonl"
    code, output = invoke("config", "validate", run_file, "data.max_length=16", f"data.train={missing}")
    assert code == 2
    assert "There is no file or folder" in output


def test_config_init_does_not_overwrite(tuned):
    _, run_file, _ = tuned
    code, output = invoke("config", "init", run_file)
    assert code == 2
    assert "is there already" in output


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["finetune", "."], 2, "is a directory, and no run file"),
        (["finetune", "none.yaml"], 2, "There is no run file none.yaml"),
        (["finetune", "RUN", "train.epoch=1"], 2, "did you mean 'epochs'?"),
        (["finetune", "RUN", "method.name=loar"], 2, "did you mean lora"),
        (["finetune", "RUN", "model.path=nowhere", "output.directory=new"], 2, "nowhere that can be read"),
        (["finetune", "RUN", "--resume"], 2, "is finished"),
        (["finetune", "RUN"], 2, "--overwrite"),
        (["evaluate", "."], 2, "is not the directory of a run"),
        (["infer", ".", "text"], 2, "is not the directory of a run"),
        (["infer", ".", "--file", "none.txt"], 2, "There is no file none.txt"),
        (["finetune"], 2, "Missing argument"),
        (["fintune"], 2, "No such command"),
    ],
)
def test_mistakes_get_a_message_and_no_traceback(tuned, words, code, says, monkeypatch, tmp_path):
    directory, run_file, _ = tuned
    monkeypatch.chdir(tmp_path)
    given = yaml.safe_load((directory / "run.yaml").read_text())
    full = tmp_path / "full.yaml"
    full.write_text(yaml.safe_dump(given))
    actual, output = invoke(*[full if word == "RUN" else word for word in words])
    assert (actual, "Traceback" in output) == (code, False), output
    assert says in " ".join(output.split())


def run_python(*words):
    begun = time.monotonic()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    return done.stdout, time.monotonic() - begun


def test_help_and_version_do_not_import_mindspore():
    code = "import sys; from mindpet.cli.app import app; print('mindspore' in sys.modules, 'pydantic' in sys.modules)"
    assert run_python("-c", code)[0].split() == ["False", "False"]
    assert "finetune" in run_python("-m", "mindpet", "--help")[0]
    assert run_python("-m", "mindpet", "--version")[0].startswith("mindpet 1.")


@pytest.mark.parametrize(
    "command",
    [
        ["finetune"],
        ["evaluate"],
        ["infer"],
        ["generate"],
        ["compare"],
        ["summary"],
        ["inspect"],
        ["methods"],
        ["merge"],
        ["export"],
        ["import"],
        ["config", "init"],
        ["config", "show"],
        ["config", "validate"],
    ],
)
def test_every_command_has_help_with_an_example(command):
    code, output = invoke(*command, "--help")
    assert code == 0
    assert "Examples:" in output


def test_inspect_takes_a_run_file_a_directory_and_a_factory(tuned, tmp_path, monkeypatch):
    directory, _, _ = tuned
    code, output = invoke("inspect", directory / "run.yaml")
    assert code == 0, output
    report = json.loads((directory / "report.json").read_text())
    assert "bert.encoder.layer.1.attention.self.value" in output
    assert "bert.encoder.layer.0.intermediate.dense" in output
    model = yaml.safe_load((directory / "run.yaml").read_text())["model"]["path"]
    code, output = invoke("inspect", model, "method.name=adapter", "method.size=4")
    assert code == 0, output
    assert "AdapterDense" in output
    (tmp_path / "my_networks.py").write_text(
        "from mindspore import nn\n\ndef build():\n    return nn.SequentialCell(nn.Dense(4, 4), nn.Dense(4, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    code, output = invoke("inspect", "my_networks:build", "method.targets=['0']", "method.rank=1")
    assert code == 0, output
    assert "8 of 38 parameters" in output
    for wrong in ("nothing", "my_networks:other", "no_module:build"):
        assert invoke("inspect", wrong)[0] == 2
    assert report["parameters"]["total"] > 0


def test_methods_lists_the_registry():
    from mindpet.delta import METHODS

    code, output = invoke("methods")
    assert code == 0
    assert all(name in output for name in METHODS)
    code, output = invoke("methods", "PrefixTuning")
    assert code == 0
    assert "mid_dim" in output
    assert '["*prefix"]' in output  # the usual targets
    code, output = invoke("methods", "full")
    assert code == 0
    assert "no options" in output
    code, output = invoke("methods", "lroa")
    assert code == 2
    assert "did you mean 'lora'" in output


def test_merge_writes_a_model_that_gives_the_same_probabilities(tuned, tmp_path):
    from mindpet.models import BertForSequenceClassification
    from mindpet.train import run

    directory, _, _ = tuned
    code, output = invoke("merge", directory, tmp_path / "merged")
    assert code == 0, output
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]["1"] == "sea"
    _, tuned_network, labels = run.load_tuned(directory)
    merged, report = BertForSequenceClassification.from_pretrained(tmp_path / "merged", len(labels), "mean")
    assert not report.missing
    merged.set_train(False)
    rows = [ms.Tensor([[2, 14, 15, 3]], ms.int32), ms.Tensor([[1, 1, 1, 1]], ms.int32), ms.Tensor([[0] * 4], ms.int32)]
    np.testing.assert_allclose(merged(*rows).asnumpy(), tuned_network(*rows).asnumpy(), atol=1e-5)
    assert invoke("merge", directory, tmp_path / "merged")[0] == 2


def test_export_and_import_are_inverse(tuned, tmp_path):
    directory, _, _ = tuned
    model = yaml.safe_load((directory / "run.yaml").read_text())["model"]["path"]
    code, output = invoke("export", directory, tmp_path / "adapter")
    assert code == 0, output
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    code, output = invoke("import", tmp_path / "adapter", tmp_path / "delta", "--model", model)
    assert code == 0, output
    ours, theirs = (load_file(folder / "delta.safetensors") for folder in (directory / "delta", tmp_path / "delta"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(value, theirs[name]) for name, value in ours.items())


def test_merge_and_export_take_a_model_or_a_factory_with_a_delta(tuned, tmp_path, monkeypatch):
    import mindpet

    directory, _, _ = tuned
    model = yaml.safe_load((directory / "run.yaml").read_text())["model"]["path"]
    for source, options in ((directory / "run.yaml", []), (model, ["--delta", directory / "delta"])):
        name = f"merged-{len(options)}"
        code, output = invoke("merge", source, tmp_path / name, *options)
        assert code == 0, output
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("merged-0", "merged-2"))
    assert all(np.array_equal(value, theirs[name]) for name, value in ours.items())
    (tmp_path / "more_networks.py").write_text(
        "import mindspore as ms\nfrom mindspore import nn\n\n"
        "def build():\n    ms.set_seed(1)\n    return nn.SequentialCell(nn.Dense(4, 4), nn.Dense(4, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from more_networks import build

    network = mindpet.inject(build(), mindpet.LoRAConfig(rank=2, targets=["0"]))
    network[0].mindpet_delta_lora_b.set_data(ms.ops.ones_like(network[0].mindpet_delta_lora_b))
    mindpet.save_delta(network, tmp_path / "delta")
    monkeypatch.chdir(tmp_path)
    code, output = invoke("merge", "more_networks:build", "merged", "--delta", "delta")
    assert code == 0, output
    mindpet.merge(network)
    np.testing.assert_array_equal(load_file("merged/model.safetensors")["0.weight"], network[0].weight.asnumpy())
    code, output = invoke("export", "more_networks:build", "adapter", "--delta", "delta")
    assert code == 0, output
    code, output = invoke("import", "adapter", "again", "--model", "more_networks:build")
    assert code == 0, output
    ours, theirs = (load_file(f"{name}/delta.safetensors") for name in ("delta", "again"))
    assert all(np.array_equal(value, theirs[name]) for name, value in ours.items())
    for command in ("merge", "export"):
        assert invoke(command, model, tmp_path / "merged-2", "--delta", directory / "delta")[0] == 2


@pytest.mark.parametrize("library", ["multiarray_umath", "libmindspore_core", "_c_expression"])
def test_ctrl_c_while_something_is_imported_ends_it_at_once(tmp_path, library):
    command = [sys.executable, "-m", "mindpet", "finetune", str(write_run_file_of(tmp_path))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, preexec_fn=hear_ctrl_c, **pipes)
    maps = Path(f"/proc/{process.pid}/maps")
    while library not in maps.read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "Interrupted.\n"
    assert process.returncode == 130


def write_run_file_of(folder):
    path, model = folder / "run.yaml", write_model(folder / "model")
    words = overrides(model, write_rows(folder / "rows.jsonl", sentences(20)), folder / "out")
    path.write_text(as_yaml(load_run(None, words)))
    return path


@pytest.mark.parametrize("place", ["file", "file/deep", "read-only/run"])
def test_an_output_directory_that_cannot_be_is_told_before_anything_is_read(tmp_path, place, monkeypatch):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "read-only").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, how: Path(path).name != "read-only" and access(path, how))
    code, output = invoke(
        "finetune", write_run_file_of(tmp_path), f"output.directory={tmp_path / place}", "model.path=nowhere"
    )
    assert code == 2
    output = " ".join(output.split())
    assert ("is read-only" if "read-only" in place else f"{tmp_path / 'file'} is a file, not a directory") in output
