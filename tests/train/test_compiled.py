"""Graphs that are kept between runs: taken when nothing differs, never when something does."""

import dataclasses
import os
import shutil
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet import LoRAConfig, PTuning2Config, inject
from mindpet.graph import facts
from mindpet.kernels import build as kernels
from mindpet.models import start_prefix
from mindpet.train import compiled
from mindpet.train.fit import read_metrics
from tests.models.causal import build
from tests.models.test_prefix import bert
from tests.tiny import overrides, sentences, write_model, write_rows

RUN = """
import sys
from mindpet.train import config, run
from mindpet.train.fit import Reporter

class Aloud(Reporter):
    def message(self, text):
        print(text)

run.finetune(config.load_run(None, sys.argv[1:]), Aloud())
"""
EMBEDDINGS = {"bert": "word_embeddings", "llama": "embed_tokens", "gpt2": "wte"}
TAKEN = "compiled by an earlier run"


def with_kernels(cache):
    """A cache directory of its own, that has the kernels already."""
    if kernels.available() and not cache.exists():
        cache.mkdir()
        shutil.copy(kernels.library(), cache)


def tuned_in_a_process(directory, cache, words, kept="1"):
    """The records of a run in a process of its own, without the times, and whether its graph was there."""
    script = directory.parent / "run.py"
    script.write_text(RUN)
    with_kernels(cache)
    environment = {**os.environ, "MINDPET_CACHE": str(cache), "MINDPET_COMPILED": kept}
    command = [sys.executable, str(script), *words, f"output.directory={directory}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [
        {key: value for key, value in record.items() if "second" not in key}
        for record in read_metrics(directory / "metrics.jsonl")
    ]
    return records, TAKEN in done.stdout


@pytest.mark.slow
def test_a_second_run_takes_the_graphs_of_the_first_and_another_one_does_not(tmp_path):
    words = overrides(write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", sentences(40)), tmp_path)
    words += [
        "train.max_steps=4",
        "train.accumulate=2",
        "model.dropout=0.1",
        "method.name=lora",
        "train.keep_best=false",
    ]
    first, taken = tuned_in_a_process(tmp_path / "first", tmp_path / "cache", words)
    assert not taken
    again, taken = tuned_in_a_process(tmp_path / "again", tmp_path / "cache", [*words, "train.epochs=7"])
    assert taken
    assert again == first
    other, taken = tuned_in_a_process(tmp_path / "other", tmp_path / "cache", [*words, "method.alpha=32"])
    assert not taken
    assert other == tuned_in_a_process(tmp_path / "alone", tmp_path / "cache", [*words, "method.alpha=32"], kept="0")[0]
    assert other != first


class Holder(nn.Cell):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator


def arguments(operator):
    names = {"Softmax": ["axis"], "MatMul": [], "Dropout": ["keep_prob"]}[operator.name]
    return [compiled._compat.arguments_of(operator)[name] for name in names]


class Scaled(nn.Cell):
    def __init__(self, factor):
        super().__init__()
        self.dense, self.factor, self.constant = nn.Dense(4, 4), factor, Tensor(np.full(4, factor, np.float32))

    def construct(self, x):
        return self.dense(x) * self.factor + self.constant


@pytest.fixture(autouse=True)
def _these_cells_too(monkeypatch):
    monkeypatch.setattr(facts, "_TRUSTED", (*facts._TRUSTED, "tests"))


def of(cell, *shape):
    return compiled.fingerprint(cell, (Tensor(np.ones(shape or (2, 4), np.float32)),))


def test_a_fingerprint_is_that_of_the_graph():
    assert of(Scaled(2.0)) == of(Scaled(2.0))  # with other numbers in its weights
    assert of(Scaled(2.0)) != of(Scaled(3.0))
    assert of(Scaled(2.0), 2, 4) != of(Scaled(2.0), 3, 4)
    assert of(Scaled(2.0).set_train()) != of(Scaled(2.0).set_train(False))
    constant = Scaled(2.0)
    constant.constant = Tensor(np.arange(4, dtype=np.float32))
    assert of(constant) != of(Scaled(2.0))
    frozen = Scaled(2.0)
    frozen.dense.weight.requires_grad = False
    assert of(frozen) != of(Scaled(2.0))
    halved = Scaled(2.0)
    halved.dense.weight.set_dtype(ms.float16)
    assert of(halved) != of(Scaled(2.0))
    recomputed = Scaled(2.0)
    recomputed.dense.recompute()
    assert of(recomputed) != of(Scaled(2.0))


def test_options_of_a_method_and_attributes_of_operators_are_in_it():
    def adapted(**options):
        ms.set_seed(3)  # operators of dropout number their seeds
        return inject(nn.SequentialCell(nn.Dense(4, 4)), LoRAConfig(rank=2, targets=["0"], **options)).set_train()

    assert of(adapted()) == of(adapted())
    assert of(adapted()) != of(adapted(alpha=3))
    assert of(adapted(dropout=0.1)) != of(adapted(dropout=0.2))
    for first, second in (
        (ops.Softmax(0), ops.Softmax(1)),
        (ops.MatMul(), ops.MatMul(transpose_b=True)),
        (ops.Dropout(0.4), ops.Dropout(0.5)),
    ):
        assert of(Holder(first)) == of(Holder(type(first)(*arguments(first))))
        assert of(Holder(first)) != of(Holder(second))
    strategy = adapted()
    strategy[0].matmul.add_prim_attr("primitive_target", "CPU")
    assert of(strategy) != of(adapted())


def test_which_cell_and_which_parameter_is_where_is_in_it():
    class Two(nn.Cell):
        def __init__(self, chosen, tied):
            super().__init__()
            self.a, self.b, self.c = nn.Dense(4, 4), nn.Dense(4, 4), nn.Dense(4, 4)
            self.chosen = (self.a, self.b)[chosen]
            self.c.weight = (self.a, self.b)[tied].weight

    assert of(Two(0, 0)) == of(Two(0, 0))
    assert len({of(Two(chosen, tied)) for chosen in (0, 1) for tied in (0, 1)}) == 4
    buffered = [Scaled(1.0), Scaled(1.0)]
    for value, cell in enumerate(buffered):
        cell.register_buffer("shift", Tensor([value], ms.float32))
    assert of(buffered[0]) != of(buffered[1])


def test_networks_of_other_packages_have_none(monkeypatch):
    monkeypatch.setattr(facts, "_TRUSTED", ("mindspore", "mindpet"))
    with pytest.raises(facts.NotKnown, match="is a class of tests"):
        of(Scaled(2.0))


def test_what_is_too_deep_is_not_told():
    value = 1
    for _ in range(8):
        value = [value]
    assert facts.Facts().of(value).count("list") == 8
    with pytest.raises(facts.NotKnown, match="too deep to look into"):
        facts.Facts().of([value])


def test_what_cannot_be_told_apart_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("MINDPET_CACHE", str(tmp_path))
    monkeypatch.setenv("MINDPET_KERNELS", "0")
    monkeypatch.setenv("MINDPET_COMPILED", "1")
    monkeypatch.setattr(compiled._compat, "in_graph_mode", lambda: True)
    cell = Scaled(2.0)
    number = 3
    cell.rule = lambda x: x * number
    with pytest.raises(facts.NotKnown, match="holds a"):
        of(cell)
    assert compiled.compile_once(cell, Tensor(np.ones((2, 4), np.float32))) is False
    assert not (tmp_path / "graphs").exists()


def test_only_so_many_are_kept(tmp_path):
    for index in range(compiled._KEPT + 3):
        (tmp_path / f"{index:03}").mkdir()
        os.utime(tmp_path / f"{index:03}", (index, index))
    compiled._forget_old(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:03}" for i in range(3, compiled._KEPT + 3)]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize(
    "config",
    [LoRAConfig(rank=2), LoRAConfig(rank=2, targets=["the embedding"]), PTuning2Config()],
    ids=["lora", "embedding", "ptuning2"],
)
def test_every_network_of_ours_can_be_told(family, config):
    network = bert() if family == "bert" else build(family)
    inject(network, dataclasses.replace(config, targets=config.targets and [f"*{EMBEDDINGS[family]}"]))
    if family != "bert" and isinstance(config, PTuning2Config):
        start_prefix(network, [1, 2])
    assert compiled.fingerprint(network, (1,)) == compiled.fingerprint(network, (1,))
    network.set_train(not network.training)
    before = compiled.fingerprint(network, (1,))
    network.set_train(not network.training)
    assert compiled.fingerprint(network, (1,)) != before
