"""The library is compiled once, for this machine, and a machine without a compiler does without it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mindspore import nn

from tests.tiny import hear_ctrl_c

SCRIPT = """
import logging, os, sys
logging.basicConfig(stream=sys.stdout, format="LOG %(message)s")
os.environ.setdefault("GLOG_v", "4")
import mindspore as ms
from mindspore import Tensor, nn
import mindpet
from mindpet import kernels

network = nn.SequentialCell(nn.GELU(approximate=False), nn.LayerNorm((4,)))
for _ in range(2):
    mindpet.accelerate(network)
print("CELLS", *[type(cell).__name__ for cell in network])
print("WHY", kernels.why_not())
print("VALUE", network(Tensor([[1.0, -1.0, 3.0, 0.0]])).asnumpy().round(4).tolist())
"""


def start(directory, **environment):
    script = directory / "use_kernels.py"
    script.write_text(SCRIPT)
    variables = {**os.environ, "MINDPET_CACHE": str(directory / "cache"), **environment}
    return subprocess.Popen(
        [sys.executable, str(script)],
        cwd=directory,
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )


def result(process, told=None):
    """What it printed; whether it said that it compiles goes into `told`."""
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    found = {"LOG": []}
    for line in out.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "LOG" and rest.startswith("The CPU kernels are compiled into"):
            (told if told is not None else []).append(rest)
        elif kind == "LOG":
            found["LOG"].append(rest)
        else:
            found[kind] = rest
    return found


def libraries(directory):
    return sorted(path.name for path in (directory / "cache").glob("*"))


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
PLAIN = "GELU LayerNorm"


@pytest.mark.slow
@needs_compiler
def test_two_processes_at_once_make_one_library(tmp_path):
    told, script = [], tmp_path / "fast-compiler"  # what it makes is not as fast
    script.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    script.chmod(0o755)
    fast = {"CXX": str(script)}
    first, second = (result(process, told) for process in [start(tmp_path, **fast), start(tmp_path, **fast)])
    assert first == second
    assert f"compiled into {tmp_path / 'cache'}, once" in told[0]
    assert first["CELLS"] == "FastGELU FastLayerNorm"
    assert first["LOG"] == []
    assert first["WHY"] == ""
    (name,) = libraries(tmp_path)  # and no temporary files
    made = (tmp_path / "cache" / name).stat().st_mtime_ns
    assert result(start(tmp_path, MINDPET_KERNELS="0"))["VALUE"] == first["VALUE"]
    told.clear()
    assert result(start(tmp_path, **fast), told)["CELLS"] == "FastGELU FastLayerNorm"
    assert not told
    assert (tmp_path / "cache" / name).stat().st_mtime_ns == made  # found, not compiled again


def test_the_switch_turns_them_off_without_a_word(tmp_path):
    found = result(start(tmp_path, MINDPET_KERNELS="0"))
    assert found["CELLS"] == PLAIN
    assert found["LOG"] == []
    assert libraries(tmp_path) == []


def compiler(directory, does):
    """A program that answers --version, takes every flag, makes empty files, and does this before."""
    program = directory / f"compiler-{len(list(directory.iterdir()))}"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in --version|*-fsyntax-only*) exit 0;; esac\n{does}\nfor last; do :; done\n: > "$last"\n'
    )
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nonexistent"}, "there is no C++ compiler (/nonexistent)"),
        ({"CXX": "BAD"}, "error: no space"),
        ({"CXX": "KILLED"}, "failed: -9"),  # and nothing slower takes its place
        ({"CXX": "LINKS NOTHING"}, "error: no link"),
        ({"MINDPET_CACHE": "FILE"}, "cannot be written to"),
        pytest.param({"MINDPET_CACHE": "COLON"}, "colon", marks=pytest.mark.exhaustive),
        pytest.param(
            {"MS_CUSTOM_AOT_WHITE_LIST": "/nowhere"},
            "outside of MS_CUSTOM_AOT_WHITE_LIST",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_without_kernels_mindspore_computes_and_one_line_says_why(environment, reason, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    replaced = {
        "BAD": compiler(tmp_path, 'echo "rows.cpp:1: error: no space" >&2; exit 1'),
        "KILLED": compiler(tmp_path, 'case "$*" in *head.cpp*) kill -9 $$;; esac'),
        "LINKS NOTHING": compiler(tmp_path, 'case "$*" in *-shared*) echo "error: no link" >&2; exit 1;; esac'),
        "FILE": str(tmp_path / "file" / "cache"),
        "COLON": str(tmp_path / "a:b"),
    }
    found = result(start(tmp_path, **{key: replaced.get(value, value) for key, value in environment.items()}))
    assert found["CELLS"] == PLAIN
    assert len(found["LOG"]) == 1
    assert reason in found["LOG"][0]
    assert found["VALUE"].startswith("[[")
    assert not (tmp_path / "cache").exists() or libraries(tmp_path) == []


def test_an_interruption_ends_what_compiles(tmp_path):
    """Of the process alone, as a supervisor sends it; a terminal's reaches the compilers by itself."""
    (tmp_path / "begun").touch()
    process = start(tmp_path, CXX=compiler(tmp_path, f"echo $$ >> {tmp_path}/begun; exec sleep 60"))
    at_once = min(4, len(os.sched_getaffinity(0)))
    while process.poll() is None and len((tmp_path / "begun").read_text().split()) < at_once:
        time.sleep(0.05)
    time.sleep(0.5)  # and the last of them is known to who began it
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode
    assert libraries(tmp_path) == []
    assert not any(Path(f"/proc/{number}").exists() for number in (tmp_path / "begun").read_text().split())


@needs_compiler
def test_what_changes_in_a_running_process_counts(monkeypatch, tmp_path, caplog):
    """The switch, and the variables that the library depends on: asked for at each call, told once."""
    from mindpet import accelerate
    from mindpet.kernels import available, build, why_not

    assert available()
    caplog.clear()  # it may have been compiled
    path = build.library()
    monkeypatch.setenv("MINDPET_KERNELS", "0")
    assert why_not() == "MINDPET_KERNELS is 0"
    assert type(accelerate(nn.SequentialCell(nn.GELU()))[0]) is nn.GELU
    monkeypatch.delenv("MINDPET_KERNELS")
    (tmp_path / "file").write_text("not a directory")
    with monkeypatch.context() as changed:
        changed.setenv("MINDPET_CACHE", str(tmp_path / "file" / "cache"))
        for _ in range(2):
            assert not available()
            assert "cannot be written to" in why_not()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert available()
    assert build.library() == path
    assert type(accelerate(nn.SequentialCell(nn.GELU()))[0]) is not nn.GELU


def test_another_device_has_no_kernels(monkeypatch):
    """This machine has a CPU only: what MindSpore says about the device is put in its place."""
    from mindpet import _compat
    from mindpet.kernels import available, why_not

    available()
    monkeypatch.setattr(_compat, "device_target", lambda: "Ascend")
    assert why_not() == "the kernels are for a CPU, and the device is Ascend."
    assert not available()


def test_importing_compiles_nothing(tmp_path):
    script = tmp_path / "only_import.py"
    script.write_text("import mindpet.kernels.accelerate, mindpet.kernels.cells\n")
    variables = {**os.environ, "MINDPET_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=variables, check=True, timeout=120)
    assert not (tmp_path / "cache").exists()


@needs_compiler
@pytest.mark.parametrize(
    "how",
    [
        ["-fsyntax-only"],
        *(pytest.param(["-c", *machine], marks=pytest.mark.exhaustive) for machine in ([], ["-march=native"])),
    ],
    ids=" ".join,
)
def test_the_source_compiles_without_a_warning(how, tmp_path):
    from mindpet.kernels import build

    command = ["g++", *build._FLAGS, "-Wall", "-Wextra", "-Werror", *how, *map(str, build._SOURCES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
