"""The page "Add a method" keeps its word: its code, run as it stands, makes a method that keeps the whole contract."""

import importlib.util
import re
from pathlib import Path

import pytest

from mindpet import METHODS
from tests import test_contract, test_cost

PAGE = Path(__file__).parent.parent / "docs" / "add-a-method.md"


@pytest.fixture
def method(tmp_path, monkeypatch):
    first = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    path = tmp_path / "scale.py"
    path.write_text(first)
    spec = importlib.util.spec_from_file_location("scale", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "scale", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, module.METHOD.name, module.METHOD)  # the one line
    return module.METHOD


def test_a_new_method_keeps_the_contract(mode, method, tmp_path, monkeypatch):
    test_contract.test_the_start(mode, method)
    test_contract.test_only_the_delta_and_the_head_train(mode, method)
    test_contract.test_names_are_paths_and_none_is_there_twice(method)
    test_contract.test_base_checkpoints_still_load(method)
    test_contract.test_freezing_by_mode_is_what_injection_freezes(method)
    test_contract.test_a_delta_saved_and_loaded_gives_the_same_outputs(mode, method, tmp_path / "delta")
    test_contract.test_merging_keeps_the_outputs_or_is_refused(mode, method)
    test_contract.test_ejecting_restores_the_network(mode, method)
    test_contract.test_float16(mode, method)
    test_contract.test_the_registry_says_what_people_need(method)
    (kind,) = method.adapt
    test_cost.test_the_cost_in_the_docstring_is_what_it_is(method, kind, {})


def test_the_run_file_knows_it(method):
    from mindpet.train.config import load_run, method_config

    config = load_run(None, ["model.path=m", "data.train=d", "method.name=scale", "method.start=2.0"])
    assert method_config(config.method).start == 2.0
