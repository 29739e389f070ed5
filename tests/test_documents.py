"""The code in the documents runs, and the Chinese documents are in step with the English ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAIRS = [("README.md", "README.zh.md"), ("docs/guide.md", "docs/zh/guide.md")]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


def without_comments(code):
    return [re.sub(r"\s*#.*", "", line) for line in code.splitlines() if not line.strip().startswith("#")]


@pytest.mark.parametrize("path", [*(english for english, _ in PAIRS), "docs/add-a-method.md"])
def test_python_in_documents_runs_as_it_stands(path, mode, tmp_path):
    header = f"import mindspore as ms\nms.set_context(mode=ms.{mode.upper()}_MODE)\n"
    script = tmp_path / "document.py"
    script.write_text(header + "\n".join(blocks(path, "python")))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_chinese_documents_have_the_same_code_and_headings(english, chinese):
    for language in ("python", "bash", "yaml"):
        ours, theirs = blocks(english, language), blocks(chinese, language)
        assert [without_comments(code) for code in ours] == [without_comments(code) for code in theirs]
    levels = [
        re.findall(r"^(#+) ", re.sub(r"```.*?```", "", (ROOT / p).read_text(), flags=re.S), re.M)
        for p in (english, chinese)
    ]
    assert levels[0] == levels[1]
    tables = [sum(line.startswith("|") for line in (ROOT / p).read_text().splitlines()) for p in (english, chinese)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("path", ["README.md", "README.zh.md", "docs/guide.md", "docs/zh/guide.md", "docs/index.md"])
def test_links_lead_somewhere(path):
    document = ROOT / path
    for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{path}: {target}"


@pytest.mark.parametrize("path", ["README.md", "README.zh.md", "docs/guide.md", "docs/zh/guide.md", "docs/index.md"])
def test_nothing_is_left_to_fill_in(path):
    assert not re.findall(r"^[A-Z_0-9]{4,}$|TODO|TBD", (ROOT / path).read_text(), re.MULTILINE)


def test_run_files_in_documents_and_examples_are_valid():
    from mindpet.train.config import RunConfig

    for text in [blocks("docs/guide.md", "yaml")[0], (ROOT / "examples" / "quickstart.yaml").read_text()]:
        RunConfig.model_validate(yaml.safe_load(text))


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"make ([a-z]+)", (ROOT / path).read_text())) <= targets
