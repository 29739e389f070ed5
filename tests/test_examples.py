"""Every single-file example runs as it stands, and what it asserts holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SLOW = ("decoder", "foreign_network", "hand_swapped")
ELSEWHERE = ("headlines",)  # part of the quickstart


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=pytest.mark.slow if path.stem in SLOW else ())
        for path in sorted(EXAMPLES.glob("*.py"))
        if path.stem not in ELSEWHERE
    ],
)
def test_an_example_runs(name, tmp_path):
    command = [sys.executable, EXAMPLES / f"{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_the_overview_lists_every_example():
    listed = (EXAMPLES.parent / "docs" / "how-to" / "index.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"`{path.name}`" in listed
        assert path.read_text().startswith('"""')
