"""Blocks that are compiled as one: the results are those of blocks compiled each by itself, to the last bit."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import mindpet
from mindpet import _compat
from mindpet.delta.registry import METHODS
from mindpet.graph import blocks, facts
from mindpet.models import BertConfig, BertForSequenceClassification, generate
from mindpet.train.compiled import compile_once
from mindpet.train.dropout import DropoutKeys
from mindpet.train.step import SummedLoss, TrainStep
from tests.few import mostly_exhaustive
from tests.models.causal import build

TRAIN_ALONE = [name for name in METHODS if name not in ("adapter_fusion", "trainable_tokens")]  # no adapters, no tokens
FEW = ("lora", "ptuning2")


def bert():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=31, max_position_embeddings=40, **sizes), 3)


def step_of(network):
    network.set_train()
    keys = DropoutKeys(network, 5)
    optimizer = nn.Adam(list(network.trainable_params()), 1e-2)
    return TrainStep(mindpet.accelerate(SummedLoss(network)), optimizer, 1.0), keys


def network_of(method, change):
    ms.set_seed(1)
    network = bert()
    if method != "full":
        mindpet.inject(network, METHODS[method].config(modules_to_save=("classifier",)))
    change(network)
    return network


def tuned(method, as_one, monkeypatch, change=lambda network: None):
    """Losses of three steps and what was trained, and how many blocks were compiled as one."""
    found = blocks.equal_blocks
    monkeypatch.setattr(blocks, "equal_blocks", lambda cell: found(cell) if as_one else [])
    network = network_of(method, change)
    step, keys = step_of(network)
    ids = Tensor(np.random.default_rng(2).integers(1, 31, (4, 9)).astype(np.int32))
    columns = ids, ms.ops.ones_like(ids), ms.ops.zeros_like(ids), Tensor([0, 1, 2, 0], ms.int32)
    counts = [len(group) for group in blocks.equal_blocks(step)]
    losses = []
    for number in range(3):
        keys.set_step(number)
        compile_once(step, *columns)
        losses.append(float(step(*columns)[0]))
    monkeypatch.undo()
    return losses, {each.name: each.asnumpy() for each in network.trainable_params()}, counts


def groups_of(change):
    """How many blocks there are in each group, of a step that is not compiled."""
    ms.set_context(mode=ms.GRAPH_MODE)
    return [len(group) for group in blocks.equal_blocks(step_of(network_of("full", change))[0])]


def same(method, monkeypatch, change=lambda network: None):
    """How many blocks there are in each group; the results are held against those of blocks by themselves."""
    ms.set_context(mode=ms.GRAPH_MODE)
    losses, trained, counts = tuned(method, True, monkeypatch, change)
    alone, trained_alone, none = tuned(method, False, monkeypatch, change)
    assert none == []
    assert losses == alone
    assert len(set(losses)) == 3
    for name, value in trained_alone.items():
        np.testing.assert_array_equal(trained[name], value, err_msg=name)
    return counts


@pytest.mark.parametrize("method", mostly_exhaustive(["full", *TRAIN_ALONE], *FEW))
def test_the_results_are_those_of_blocks_by_themselves(method, monkeypatch, back_to_pynative):
    counts = same(method, monkeypatch)
    assert 4 in counts or method not in FEW


def lora_on(*layers):
    return lambda network: mindpet.inject(network, mindpet.LoRAConfig(targets=[f"*.layer.{i}.*query" for i in layers]))


def another_rate(network):
    network.bert.encoder.layer[1].output.dropout.p = 0.4


def frozen(network):
    network.bert.encoder.layer[3].output.dense.weight.requires_grad = False


def watched(network):
    network.bert.encoder.layer[0].register_forward_hook(lambda *_: None)


def other_epsilon(network):
    network.bert.encoder.layer[2].output.LayerNorm.epsilon = 0.1


def alphas(network):
    for layer, alpha in enumerate((4, 4, 8, 8)):
        mindpet.inject(network, mindpet.LoRAConfig(alpha=alpha, targets=[f"*.layer.{layer}.*query"]))


def transposed(network):
    product = network.bert.encoder.layer[1].attention.output.dense.matmul
    product.transpose_b = False  # of a square weight: it fits both ways


def cast(network):
    network.bert.encoder.layer[2].output.dropout.to_float(ms.float16)


def without_dropout(change):
    def changed(network):
        for _, cell in network.cells_and_names():
            if type(cell) is nn.Dropout:
                cell.p = 0.0
        change(network)

    return changed


DIFFERENT = {
    "LoRA on two": (lora_on(1, 3), [2, 2]),
    "LoRA on one": (lora_on(1), [3]),
    "another rate": (another_rate, [3]),
    "frozen": (frozen, [3]),
    "watched": (watched, [3]),
    "another epsilon": (other_epsilon, [3]),
    "scales": (alphas, [2, 2]),
    "transposed": (without_dropout(transposed), [3]),
    "cast": (without_dropout(cast), [3]),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_a_block_that_differs_is_told_apart(change, back_to_pynative):
    assert groups_of(DIFFERENT[change][0]) == DIFFERENT[change][1]


@pytest.mark.parametrize("change", mostly_exhaustive(DIFFERENT, "LoRA on two"))
def test_the_results_are_those_of_blocks_by_themselves_where_one_differs(change, monkeypatch, back_to_pynative):
    assert same("full", monkeypatch, DIFFERENT[change][0]) == DIFFERENT[change][1]


class Times(nn.Cell):
    """A block with a factor."""

    def __init__(self, factor):
        super().__init__()
        self.dense, self.factor = nn.Dense(2, 2, weight_init="ones", has_bias=False), factor

    def construct(self, x):
        return self.dense(x) * self.factor


class Chain(nn.Cell):
    def __init__(self):
        super().__init__()
        self.blocks = nn.CellList([Times(factor) for factor in (1, 1, 5)])

    def construct(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_false_key_would_be_believed(monkeypatch, back_to_pynative):
    """So blocks are compiled as one at all, and only those that are equal."""
    ms.set_context(mode=ms.GRAPH_MODE)
    monkeypatch.setattr(facts, "_TRUSTED", (*facts._TRUSTED, "tests"))
    x, found = Tensor(np.ones((1, 2), np.float32)), []
    for told in (blocks._told, lambda block: ("the same",)):
        monkeypatch.setattr(blocks, "_told", told)
        network = Chain()
        compile_once(network, x)
        found.append(float(network(x)[0, 0]))
    assert found == [40.0, 8.0]


class Held(nn.Cell):
    def __init__(self, value):
        super().__init__()
        self.value, self.words, self.dense = value, value, nn.Dense(2, 2)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Dense(2, 2).construct, nn.Dense(2, 2).construct),
        (ms.ops.GradOperation(get_all=True), ms.ops.GradOperation(get_all=False)),
        ([1, 2], (1, 2)),
        (0.1, np.float32(0.1)),
        ("a", "b"),
    ],
)
def test_values_that_differ_are_told_apart(first, second, monkeypatch):
    monkeypatch.setattr(facts, "_TRUSTED", (*facts._TRUSTED, "tests"))
    assert blocks.equal_blocks(nn.CellList([Held(first), Held(second)])) == []
    assert [len(group) for group in blocks.equal_blocks(nn.CellList([Held("a"), Held("a")]))] == [2]


def test_what_compiles_again_takes_equal_blocks_for_one_again(monkeypatch, back_to_pynative):
    ms.set_context(mode=ms.GRAPH_MODE)
    calls = []
    found = blocks.equal_blocks
    monkeypatch.setattr(blocks, "equal_blocks", lambda cell: calls.append(cell) or found(cell))
    network = build("llama")
    for length in (3, 4, 3):  # another shape compiles another graph
        ids = Tensor([list(range(1, 1 + length))], ms.int32)
        compile_once(network, ids, ms.ops.ones_like(ids))
    assert len(calls) == 2
    list(generate(network, [1, 2], max_tokens=3))
    generated = len(calls)
    assert generated > 2
    list(generate(network, [1, 2], max_tokens=3))
    assert len(calls) == generated
    mindpet.inject(network, mindpet.LoRAConfig(rank=2, targets=["*.q_proj"]))
    list(generate(network, [1, 2], max_tokens=3))
    assert len(calls) == 2 * (generated - 2) + 2


def test_no_key_stays_behind(monkeypatch, back_to_pynative):
    ms.set_context(mode=ms.GRAPH_MODE)
    network = build("llama")
    ids = Tensor([[1, 2, 3]], ms.int32)
    assert [len(group) for group in blocks.equal_blocks(network)] == [len(network.model.layers)]
    compile_once(network, ids, ms.ops.ones_like(ids))
    assert network.compile_cache
    for _, cell in network.cells_and_names():
        assert "mindpet_block" not in str(vars(cell).get("_cell_init_args"))
        assert "no_inline" not in vars(cell)


def test_parameters_that_two_places_share_are_told_apart():
    def block(tied):
        cells = nn.SequentialCell(nn.Dense(4, 4), nn.Dense(4, 4))
        if tied:
            cells[1].weight = cells[0].weight
        return cells

    assert [len(group) for group in blocks.equal_blocks(nn.CellList([block(False), block(False)]))] == [2]
    assert blocks.equal_blocks(nn.CellList([block(False), block(True)])) == []


def test_what_is_not_a_cell_is_refused():
    with (
        pytest.raises(TypeError, match=r"'cell' must be a Cell, such as a training step, but got .*function"),
        blocks.equal_blocks_as_one(lambda x: x),
    ):
        pass


@pytest.mark.skipif(not hasattr(nn.Cell, "compile_phase"), reason="MindSpore 2.7 names no graphs in cells")
def test_a_graph_is_named_in_the_cells_below_when_it_is_compiled_and_not_at_each_call():
    ms.set_context(mode=ms.GRAPH_MODE)

    class Root(_compat.GraphCell):
        def __init__(self):
            super().__init__()
            self.dense = nn.Dense(3, 2)

        def construct(self, x):
            return self.dense(x)

    root, x = Root(), Tensor(np.ones((1, 3), np.float32))
    root(x)
    assert root.dense.compile_phase == root.compile_phase
    root.dense._compile_phase = "another graph's"
    root(x)
    assert root.dense.compile_phase == "another graph's"
    root.dense = nn.Dense(3, 2, weight_init="zeros", has_bias=False)
    _compat.forget_compiled(root)
    assert not root(x).asnumpy().any()
    assert root.dense.compile_phase == root.compile_phase
