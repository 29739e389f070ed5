"""What the Makefile stands on: finding an interpreter, and metadata that leads to a working installation."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIND = ["/bin/sh", str(ROOT / "scripts" / "find-python")]


def interpreter(folder, name, body):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def find(folder, **more):
    environment = {"PATH": str(folder), "HOME": str(folder), **more}
    return subprocess.run(FIND, capture_output=True, text=True, env=environment)


def pretend(version):
    """Answers the version check as that Python would, through the real interpreter."""
    major, minor = version.split(".")
    return f'exec {sys.executable} -c "import sys; sys.exit(0 if sys.argv[1] == \\"{major}.{minor}\\" else 1)" "$3"'


def test_the_newest_supported_interpreter_is_taken(tmp_path):
    interpreter(tmp_path, "python3.10", pretend("3.10"))
    interpreter(tmp_path, "python3.11", pretend("3.11"))
    interpreter(tmp_path, "python3.13", pretend("3.13"))
    assert find(tmp_path).stdout.strip() == str(tmp_path / "python3.11")


def test_a_shim_that_cannot_run_is_passed_over(tmp_path):
    interpreter(tmp_path, "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    interpreter(tmp_path, "python3", pretend("3.10"))
    assert find(tmp_path).stdout.strip() == str(tmp_path / "python3")


def test_a_version_under_pyenv_is_found_last(tmp_path):
    (tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin").mkdir(parents=True)
    hidden = interpreter(tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin", "python", pretend("3.12"))
    assert find(tmp_path).stdout.strip() == str(hidden)


def test_no_interpreter_is_explained(tmp_path):
    interpreter(tmp_path, "python3.13", pretend("3.13"))
    done = find(tmp_path)
    assert done.returncode == 1
    assert "none for 3.13" in done.stderr
    assert "apt install python3.12" in done.stderr


def test_a_chosen_interpreter_is_checked(tmp_path):
    good = interpreter(tmp_path, "mine", pretend("3.11"))
    bad = interpreter(tmp_path, "old", pretend("3.9"))
    assert find(tmp_path, PYTHON=str(good)).stdout.strip() == str(good)
    assert "is not a Python 3.10, 3.11 or 3.12" in find(tmp_path, PYTHON=str(bad)).stderr


def test_numpy_2_is_kept_out_by_our_own_metadata():
    from importlib.metadata import requires

    needed = [entry for entry in requires("mindpet") or [] if "extra" not in entry]
    assert any(entry.replace(" ", "").startswith("numpy") and "<2" in entry for entry in needed)
    assert any(entry.startswith("mindspore") and "<2.11" in entry for entry in needed)


@pytest.mark.parametrize("code", ["import mindpet", "import mindpet.cli.app"])
def test_importing_does_not_import_mindspore(code):
    script = f"{code}, sys; print('mindspore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="another Python has other versions of some packages")
def test_the_licences_of_what_is_installed_are_listed():
    script = runpy.run_path(str(ROOT / "scripts" / "licences.py"))
    rows = [line for line in script["PLACE"].read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    listed = dict(line.strip("| ").split(" | ") for line in rows if "---" not in line)
    here = {
        name: script["licence"](each)
        for name, each in script["installed"]("mindpet", script["EXTRAS"]).items()
        if name != "mindpet"
    }
    assert here == listed, "python scripts/licences.py writes the page anew"
