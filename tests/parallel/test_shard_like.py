"""A whole network is cut at once: as its frozen layers are cut, or as it is told."""

import mindspore as ms
import pytest
from mindspore import nn, ops

import mindpet
from mindpet import ParallelConfig, _compat, shard_like
from mindpet.delta import AdapterLayer, LoRADense, PrefixEncoder, PrefixSlot, PTuning2Config
from mindpet.models import BertConfig, BertForSequenceClassification
from mindpet.parallel import strategies
from tests.parallel.compiler import compile_layer, devices
from tests.parallel.layers import PLAIN
from tests.tiny import SIZES

ROWS = ParallelConfig(data_parallel=2, model_parallel=4)
COLUMNS = ParallelConfig(data_parallel=2, model_parallel=4, cut="columns")
METHODS = {
    "lora": mindpet.LoRAConfig(rank=2, alpha=4, dropout=0.1, targets=["up", "down"]),
    "adapter": mindpet.AdapterConfig(size=8, targets=["up", "down"]),
    "low_rank_adapter": mindpet.LowRankAdapterConfig(reduction_factor=4, targets=["up", "down"]),
}


class FeedForward(nn.Cell):
    """Two dense layers."""

    def __init__(self, delta_method="lora"):
        super().__init__()
        self.up = nn.Dense(16, 64, activation=ops.Tanh())
        self.down = nn.Dense(64, 16)
        self.delta_method = delta_method

    def construct(self, x):
        return self.down(self.up(x))


def test_each_layer_follows_its_frozen_product():
    network = FeedForward()
    network.up.matmul.shard(((2, 1), (4, 1)))
    network.down.matmul.shard(((2, 4), (1, 4)))
    mindpet.inject(network, METHODS["lora"])
    given = shard_like(network)
    assert given == {"up": strategies(network.up, ROWS), "down": strategies(network.down, COLUMNS)}
    assert _compat.strategy_of(network.up.lora_b_matmul) == ((2, 1), (4, 1))
    assert _compat.strategy_of(network.down.lora_a_matmul) == ((2, 4), (1, 4))
    assert _compat.strategy_of(network.up.activation) == ((2, 4),)


def test_a_product_may_be_cut_both_ways_at_once():
    network = nn.SequentialCell(nn.Dense(8, 8))
    network[0].matmul.shard(((2, 2), (2, 2)))
    mindpet.inject(network, mindpet.LoRAConfig(rank=2, targets=["*"]))
    given = shard_like(network)["0"]
    assert given["strategy_lora_a_matmul"] == ((2, 2), (1, 2))
    assert given["strategy_lora_b_matmul"] == ((2, 1), (2, 1))
    assert given["strategy_lora_add"] == ((2, 2), (2, 2))


def test_what_the_frozen_product_says_comes_first():
    network = FeedForward()
    network.up.matmul.shard(((2, 1), (4, 1)))
    mindpet.inject(network, METHODS["lora"])
    given = shard_like(network, COLUMNS)
    assert given == {"up": strategies(network.up, ROWS), "down": strategies(network.down, COLUMNS)}


def test_patterns_say_it_for_each_layer_of_a_real_network():
    network = BertForSequenceClassification(BertConfig(**SIZES))
    mindpet.inject(network, mindpet.LoRAConfig(rank=2, targets=["*.query", "*.value", "*.output.dense"]))
    rows = ParallelConfig(model_parallel=2)
    columns = ParallelConfig(model_parallel=2, cut="columns")
    given = shard_like(network, {"*.query": rows, "*.value": rows, "*.output.dense": columns})
    assert len(given) == 8
    cells = dict(network.cells_and_names())
    for path, arguments in given.items():
        expected = columns if path.endswith("output.dense") else rows
        assert arguments == strategies(cells[path], expected)
        assert _compat.strategy_of(cells[path].matmul) == arguments["strategy_org_dense_matmul"]


@pytest.mark.parametrize("method", METHODS)
def test_rows_then_columns_compile_and_need_no_gathering(compiler, method):
    network = FeedForward(method)
    mindpet.inject(network, METHODS[method])
    with devices(8):
        given = shard_like(network, {"up": ROWS, "down": COLUMNS})
        compiled = compile_layer(network, (8, 16), (2, 1), 8)
    expected = [strategy for arguments in given.values() for strategy in arguments.values()]
    assert sorted(strategy for _, strategy in compiled.strategies) == sorted(expected)
    assert compiled.bare == []
    assert method == "low_rank_adapter" or compiled.moved == []
    assert compiled.slices["up.weight"] == (16, 16)
    assert compiled.slices["down.weight"] == (16, 16)
    assert set(compiled.updated) == {each.name.removeprefix("layer.") for each in network.trainable_params()}
    assert set(compiled.reduced) == set(compiled.updated)  # all of them: the batch is cut


def test_a_layer_by_itself_is_a_network():
    layer = AdapterLayer(16, bottleneck_size=4, **PLAIN)
    assert shard_like(layer, ROWS) == {"": strategies(layer, ROWS)}
    encoder = PrefixEncoder(4, 2, 8, 4, False, 16, 0.1)
    assert shard_like(encoder, ROWS) == {"": {"data_parallel": 2, "model_parallel": 4}}
    assert _compat.strategy_of(encoder.transpose) == ((2, 1, 1, 4, 1),)


def test_prompts_in_a_slot_are_not_cut():
    class WithSlot(FeedForward):
        def __init__(self):
            super().__init__()
            self.prefix = PrefixSlot(2, 4, 4)

    network = WithSlot()
    mindpet.inject(network, PTuning2Config(tokens=2, targets=["prefix"]))
    mindpet.inject(network, METHODS["lora"])
    assert set(shard_like(network, ROWS)) == {"up", "down"}
    assert _compat.strategy_of(network.prefix.encoder.dropout.dropout) is None


def test_a_weight_that_is_kept_the_other_way_round():
    layer = LoRADense(8, 16, 2, 1, **PLAIN)
    layer.matmul = ops.MatMul()  # as other toolkits put one in, with W (in, out)
    assert strategies(layer, ROWS)["strategy_org_dense_matmul"] == ((2, 1), (1, 4))
    layer.shard(strategy_org_dense_matmul=((2, 4), (4, 1)))
    assert shard_like(layer)[""]["strategy_lora_a_matmul"] == ((2, 4), (1, 4))


def test_nothing_is_written_when_one_layer_cannot_be_cut():
    network = FeedForward()
    mindpet.inject(network, METHODS["lora"])
    sixth = ParallelConfig(model_parallel=6)
    with pytest.raises(ValueError, match=r"'up \(LoRADense\)'(.|\n)*'down \(LoRADense\)'.*\n.*16 cannot be cut into 6"):
        shard_like(network, sixth)
    with pytest.raises(ValueError, match=r"an axis of 16 cannot be cut into 32 equal parts"):
        shard_like(network, {"up": ROWS, "down": ParallelConfig(model_parallel=32)})
    assert _compat.strategy_of(network.up.matmul) is None


def test_what_a_frozen_product_says_may_be_wrong_or_unreadable():
    network = FeedForward()
    mindpet.inject(network, METHODS["lora"])
    network.up.matmul.shard(((2, 1), (4, 1), (1, 1)))
    with pytest.raises(ValueError, match=r"'up \(LoRADense\)'.*\n.*one tuple for each of the 2 inputs, but has 3"):
        shard_like(network, ROWS)
    network = FeedForward()
    layout = ms.Layout((2, 4), ("data", "model"))
    network.up.matmul.shard((layout("data", "None"), layout("model", "None")))
    mindpet.inject(network, METHODS["lora"])
    with pytest.raises(ValueError, match=r"the matrix product of up \(LoRADense\) has Layouts"):
        shard_like(network, ROWS)


def test_every_layer_must_be_told():
    network = FeedForward()
    with pytest.raises(ValueError, match="has no layer that takes strategies: inject a method"):
        shard_like(network, ROWS)
    mindpet.inject(network, METHODS["lora"])
    with pytest.raises(ValueError, match=r"nothing says how to cut up \(LoRADense\)(.|\n)*down \(LoRADense\)"):
        shard_like(network)
    with pytest.raises(ValueError, match=r"nothing says how to cut down"):
        shard_like(network, {"up": ROWS})
    with pytest.raises(ValueError, match=r"no layer matches 'upp'; the layers are up, down \(did you mean 'up'\?\)"):
        shard_like(network, {"upp": ROWS, "*": ROWS})


@pytest.mark.parametrize("config", [2, "rows", {"*": 2}, [ROWS]])
def test_wrong_kinds(config):
    network = FeedForward()
    mindpet.inject(network, METHODS["lora"])
    with pytest.raises(TypeError, match="'config' must be a ParallelConfig or a mapping"):
        shard_like(network, config)
    with pytest.raises(TypeError, match="'network' must be a mindspore.nn.Cell"):
        shard_like("network", ROWS)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"data_parallel": 0}, ValueError, "'data_parallel' must be a positive int"),
        ({"model_parallel": 2.0}, TypeError, "'model_parallel' must be a positive int"),
        ({"cut": "row"}, ValueError, "'cut' must be one of rows, columns, but got 'row'.*did you mean 'rows'"),
    ],
)
def test_wrong_configurations(arguments, kind, message):
    with pytest.raises(kind, match=message):
        ParallelConfig(**arguments)


def test_strategies_are_for_layers_that_have_some():
    with pytest.raises(TypeError, match="'layer' must be one that has strategies"):
        strategies(nn.Dense(2, 2), ROWS)
    with pytest.raises(TypeError, match="'config' must be a ParallelConfig"):
        strategies(LoRADense(2, 2, 1, 1), 2)
