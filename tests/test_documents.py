"""The code in the documents runs, and the Chinese documents are in step with the English ones."""

import os
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "README.zh.md",
    *sorted(f"docs/{path.relative_to(ROOT / 'docs')}" for path in (ROOT / "docs").rglob("*.md")),
]
PAIRS = [("README.md", "README.zh.md"), ("docs/guide.md", "docs/zh/guide.md")]
RUNNABLE = [
    *(english for english, _ in PAIRS),
    "docs/add-a-method.md",
    "docs/how-to/merge-and-switch.md",
    "docs/how-to/peft.md",
    "docs/how-to/run-file.md",
    "docs/migration.md",
    "docs/parallel.md",
    "docs/reference/index.md",
    "docs/speed.md",
    "docs/troubleshooting.md",
]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


def without_comments(code):
    return [re.sub(r"\s*#.*", "", line) for line in code.splitlines() if not line.strip().startswith("#")]


@pytest.mark.exhaustive_in_graph("*-README.md", "*-docs/guide.md", "*-docs/speed.md")
@pytest.mark.parametrize("path", RUNNABLE)
def test_python_in_documents_runs_as_it_stands(path, mode, tmp_path):
    header = f"import mindspore as ms\nms.set_context(mode=ms.{mode.upper()}_MODE)\n"
    script = tmp_path / "document.py"
    script.write_text(header + "\n".join(blocks(path, "python")))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.exhaustive_in_graph
def test_the_code_of_every_methods_page_runs(mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in sorted((ROOT / "docs" / "methods").glob("*.md")):
        exec(compile("\n".join(blocks(path, "python")), str(path), "exec"), {"__name__": "page"})


def test_every_method_has_a_page_whose_run_file_is_valid():
    from mindpet._methods import MODULES
    from mindpet.train.config import MethodSection, method_config

    for name in MODULES:
        text = "\n".join(blocks(ROOT / "docs" / "methods" / f"{name}.md", "yaml"))
        section = MethodSection.model_validate(yaml.safe_load(text)["method"])
        assert section.name == name
        method_config(section)


@pytest.mark.slow
@pytest.mark.models
def test_the_code_of_the_page_on_language_models_works(smollm2, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2.gguf").symlink_to(smollm2)
    (tmp_path / "hamlet.txt").write_text((ROOT / "docs" / "guide.md").read_text())  # any text of some length
    (tmp_path / "run.yaml").write_text(blocks("docs/language.md", "yaml")[0])
    code = "\n".join(blocks("docs/language.md", "python"))
    assert "max_tokens=60" in code
    (tmp_path / "document.py").write_text(code.replace("max_tokens=60", "max_tokens=6"))

    def run(*words):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-m", "mindpet", "finetune", "run.yaml", "train.max_steps=2", "data.holdout=2", "train.mode=pynative")
    assert " Paris" in run("document.py")


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


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_lead_somewhere(path):
    document = ROOT / path
    for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{path}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS)
def test_nothing_is_left_to_fill_in(path):
    assert not re.findall(r"^[A-Z_0-9]{4,}$|TODO|TBD|@@", (ROOT / path).read_text(), re.MULTILINE)


def test_run_files_in_documents_and_examples_are_valid():
    from mindpet.train.config import RunConfig

    whole = [blocks("docs/guide.md", "yaml")[0], *blocks("docs/language.md", "yaml")]
    whole += [*blocks("docs/run-file.md", "yaml"), *blocks("docs/how-to/run-file.md", "yaml")]
    whole += [path.read_text() for path in sorted((ROOT / "examples").rglob("*.yaml"))]
    for text in whole:
        content = yaml.safe_load(text)
        RunConfig.model_validate({"data": {"train": "text.txt"}, **content})


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"make ([a-z]+)", (ROOT / path).read_text())) <= targets


def table_of_methods(page):
    """The cells of each row that begins with a link."""
    lines = (ROOT / "docs" / "methods" / f"{page}.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in lines if line.startswith("| [")]


def test_the_table_of_methods_is_what_the_registry_says():
    from mindpet.train.artifacts import methods_table

    for cells, row in zip(table_of_methods("index"), methods_table(), strict=True):
        name, *rest = row.values()
        assert cells == [f"[{name}]({name}.md)", *rest[:-1]]


def test_the_page_of_what_was_measured_says_what_the_command_line_does():
    from mindpet.train.artifacts import methods_table

    said = {row[0].partition("]")[0][1:]: row[4:7] for row in table_of_methods("measured")}
    fields = ("static MiB", "step over LoRA", "R8 accuracy (%)")
    assert said == {row["method"]: [row[field] for field in fields] for row in methods_table()}
    assert all(all(values) for values in said.values())


def test_the_page_on_the_run_file_is_what_its_script_makes():
    from dataclasses import fields

    from mindpet.delta import DeltaConfig

    script = runpy.run_path(str(ROOT / "scripts" / "run_file_reference.py"))
    written = (ROOT / "docs" / "run-file.md").read_text()
    assert written == script["page"](), "python scripts/run_file_reference.py writes it anew"
    for field in fields(DeltaConfig):
        assert f"| `{field.name}` |" in written


REFERENCE = {  # the pages of the reference: what mkdocs makes from the docstring of this object
    entry: path.name
    for path in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for entry in re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize(
    "package",
    ["mindpet", *(f"mindpet.{name}" for name in ("delta", "graph", "interop", "kernels", "models", "parallel"))],
)
def test_every_public_name_is_in_the_reference(package):
    module = import_module(package)
    shown = {id(found(entry)) for entry in REFERENCE}
    missing = [name for name in module.__all__ if name != "__version__" and id(getattr(module, name)) not in shown]
    assert not missing


def test_what_the_reference_shows_is_there_and_has_a_docstring():
    names = [entry for entry in REFERENCE if entry.rpartition(".")[2] != "METHODS"]
    assert all(found(entry).__doc__ for entry in names)


def found(entry):
    """The object that an entry of the reference names."""
    module, _, name = entry.rpartition(".")
    return getattr(import_module(module), name)


def test_docstrings_become_markdown():
    as_markdown = runpy.run_path(str(ROOT / "scripts" / "docstrings.py"))["as_markdown"]
    text = """A layer.

.. math:: y = x W^T
    + b

As :class:`~mindpet.delta.LoRADense`.

>>> 1 + 1
2
"""
    fenced = """A layer.


```tex
y = x W^T
+ b
```

As `mindpet.delta.LoRADense`.


```pycon
>>> 1 + 1
2
```
"""
    assert as_markdown(text) == fenced
