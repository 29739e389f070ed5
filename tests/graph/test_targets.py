import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import mindpet
from mindpet import AdapterConfig, LoRAConfig, PrefixConfig, inject
from mindpet.delta import LoRADense
from mindpet.graph import find_targets, target_report
from mindpet.models import BertConfig, BertForSequenceClassification


class Layer(nn.Cell):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Dense(4, 4), nn.Dense(4, 4)
        self.norm = nn.LayerNorm((4,))

    def construct(self, x):
        return self.norm(self.value(self.query(x)))


class Network(nn.Cell):
    def __init__(self):
        super().__init__()
        self.layers = nn.CellList([Layer() for _ in range(3)])
        self.heads = nn.CellDict({"one": nn.Dense(4, 2), "other": nn.Dense(4, 2)})

    def construct(self, x):
        for index in range(len(self.layers)):
            x = self.layers[index](x)
        return self.heads["one"](x) + self.heads["other"](x)


def matched(*patterns, **options):
    return list(find_targets(Network(), list(patterns), (nn.Dense,), **options).matched)


def test_patterns_mean_whole_paths():
    assert matched("*.query") == [f"layers.{i}.query" for i in range(3)]
    assert matched("layers.1.*") == ["layers.1.query", "layers.1.value"]
    assert matched("heads.one") == ["heads.one"]


def test_types_and_all_linear():
    assert len(matched(nn.Dense)) == len(find_targets(Network(), "all-linear", (nn.Dense, nn.LayerNorm)).matched) == 8
    assert list(find_targets(Network(), [nn.LayerNorm]).matched) == [f"layers.{i}.norm" for i in range(3)]


def test_exclude_and_layers():
    assert matched("*", exclude=["heads.*", "*.value"]) == [f"layers.{i}.query" for i in range(3)]
    assert matched("*.query", layers=[0, 2]) == ["layers.0.query", "layers.2.query"]


def test_a_miss_shows_near_names():
    report = mindpet.targets(Network(), ["*.qurey", "*.value"])
    assert list(report.misses) == ["*.qurey"]
    with pytest.raises(ValueError, match=r"'\*.qurey'; near it: layers.0.query"):
        report.require_all()


def test_a_target_of_another_kind_says_what_it_is():
    with pytest.raises(
        ValueError, match=r"layers.0.norm .LayerNorm. and 2 more, and the method adapts Dense, .*Embedding"
    ):
        inject(Network(), LoRAConfig(targets=["*.query", "*.norm"]))
    with pytest.raises(ValueError, match="LayerNorm'>\"; it matches layers.0.norm"):
        inject(Network(), LoRAConfig(targets=[nn.LayerNorm]))


class Plain(nn.Cell):
    """No cell has a usual name."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Dense(4, 4), nn.Dense(4, 2)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LoRAConfig(), r"usual ones of 'lora' match no cell here: '\*.query', .* targets: first, last\.$"),
        (PrefixConfig(), r"of 'prefix' match no cell here: '\*prefix'\. .* kind PrefixSlot; this network has none\.$"),
    ],
)
def test_without_targets_a_network_of_other_names_is_told_what_there_is(config, says):
    with pytest.raises(ValueError, match=says):
        inject(Plain(), config)


def test_a_cell_that_is_never_called_is_not_adapted_with_all():
    def adapted(pooling):
        config = BertConfig(
            vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        )
        network = BertForSequenceClassification(config, 2, pooling)
        return list(target_report(network, LoRAConfig(targets="all-linear", modules_to_save=["classifier"])).matched)

    assert "bert.pooler.dense" in adapted("pooler")
    assert adapted("pooler") == [*adapted("mean"), "bert.pooler.dense"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": ["*.query"], "layers": [7]}, r"'\*.query'; it matches cells in layers 0 to 2, none in 7$"),
        ({"targets": ["layers.1.*"], "layers": [0, 2]}, r"it matches cells in layer 1, none in 0, 2$"),
        (
            {"layers": [7]},
            r"adapt:\n  '\*.query'; .* none in 7\n  '\*.value'; .* none in 7$",
        ),  # and no usual targets else
        ({"targets": ["heads.*"], "layers": [7]}, "it matches heads.one, which is in no layer$"),
        ({"targets": ["*.query"], "exclude": ["*.query"]}, r"'\*.query'; all of them are excluded"),
        ({"targets": ["*.query"], "exclude": ["*.quer"]}, r"'\*.quer'; of 'exclude'; near it: layers.0.query$"),
        ({"targets": ["*.query"], "rank_pattern": {"query": 4}}, r"'query'; of 'rank_pattern'; a pattern is for whole"),
        ({"targets": ["all-liner"]}, r"'all-liner'; did you mean 'all-linear'\?$"),
        (
            {"targets": ["query"]},
            r"'query'; a pattern is for whole paths: '\*.query' matches layers.0.query and 2 more$",
        ),
    ],
)
def test_a_pattern_that_leaves_nothing_says_why(options, says):
    with pytest.raises(ValueError, match=says):
        inject(Network(), LoRAConfig(**options))


def test_the_dry_run_is_what_inject_does():
    network, config = Network(), LoRAConfig(rank=2, targets=[nn.Dense], exclude=["heads.*"], layers=[1])
    expected = list(target_report(network, config).matched)
    inject(network, config)
    assert [path for path, cell in network.cells_and_names() if type(cell) is LoRADense] == expected


def test_what_a_method_put_in_is_no_target():
    network = inject(Network(), AdapterConfig(size=2, targets=["*.query"]))
    inject(network, LoRAConfig(rank=2, targets="all-linear", exclude=["*.query"]))
    lora = [path for path, cell in network.cells_and_names() if type(cell) is LoRADense]
    assert lora == [f"layers.{i}.value" for i in range(3)] + ["heads.one", "heads.other"]


def test_children_in_a_dict_are_replaced(mode, rng):
    network = Network()
    x = Tensor(rng.standard_normal((2, 4)).astype(np.float32))
    before = network(x).asnumpy()
    inject(network, LoRAConfig(rank=2, targets=["heads.one"]))
    np.testing.assert_array_equal(network(x).asnumpy(), before)
    network.heads["one"].mindpet_delta_lora_b.set_data(Tensor(np.ones((2, 2), np.float32)))
    assert not np.allclose(network(x).asnumpy(), before)


def test_strategies_on_the_dense_layer_carry_over():
    network = Network()
    query = network.layers[0].query
    query.matmul.shard(((2, 1), (4, 1)))
    query.bias_add.shard(((2, 4), (4,)))
    inject(network, LoRAConfig(rank=2, targets=["layers.0.query"]))
    adapted = network.layers[0].query
    assert type(adapted) is LoRADense
    assert adapted.matmul.attrs["in_strategy"] == ((2, 1), (4, 1))
    assert adapted.bias_add.attrs["in_strategy"] == ((2, 4), (4,))


class Scaled(nn.Dense):
    def construct(self, x):
        return super().construct(x) * 100


class Renamed(nn.Dense):
    """The same computation."""


def test_dense_subclasses_are_adapted_when_they_compute_the_same(mode, rng):
    network = nn.SequentialCell(Renamed(4, 4), nn.Dense(4, 2))
    x = Tensor(rng.standard_normal((2, 4)).astype(np.float32))
    before = network(x).asnumpy()
    inject(network, LoRAConfig(rank=2, targets=["0"]))
    np.testing.assert_array_equal(network(x).asnumpy(), before)
    with pytest.raises(TypeError, match="A Scaled has a construct of its own"):
        inject(nn.SequentialCell(Scaled(4, 4)), LoRAConfig(targets=["0"]))


def test_tied_weights_stay_tied(mode, rng):
    class Tied(nn.Cell):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Dense(4, 4), nn.Dense(4, 4)
            self.other.weight = self.one.weight

        def construct(self, x):
            return self.other(self.one(x))

    network = inject(Tied(), LoRAConfig(rank=2, targets=["one"]))
    assert network.one.weight is network.other.weight
    names = [parameter.name for parameter in network.get_parameters()]
    assert len(set(names)) == len(names)
    assert network(Tensor(rng.standard_normal((2, 4)).astype(np.float32))).shape == (2, 4)


def test_no_weight_is_copied():
    network = Network()
    before = {id(parameter) for parameter in network.get_parameters()}
    inject(network, LoRAConfig(rank=1, targets="all-linear"))
    new = [parameter for parameter in network.get_parameters() if id(parameter) not in before]
    assert all("mindpet_delta" in parameter.name for parameter in new)
    assert {id(p) for p in network.get_parameters()} >= before
    assert sum(p.nbytes for p in new) == 4 * (6 * (4 + 4) + 2 * (4 + 2))


@pytest.mark.parametrize(
    ("cell", "shape"),
    [
        (lambda: nn.Conv2d(3, 5, 3, has_bias=True), (2, 3, 7, 6)),
        (lambda: nn.Conv2d(3, 5, (3, 2), stride=2, pad_mode="pad", padding=1, dilation=(2, 1)), (2, 3, 9, 8)),
        (lambda: nn.Conv2d(3, 5, 1, pad_mode="valid"), (2, 3, 4, 4)),
        (lambda: nn.Conv1d(3, 5, 3, stride=2, has_bias=True), (2, 3, 9)),
        (lambda: nn.Embedding(11, 5), (2, 4)),
    ],
)
@pytest.mark.exhaustive_in_graph("graph-True-*-shape1", "graph-True-*-shape3", "graph-True-*-shape4")
@pytest.mark.parametrize("stabilised", [False, True])
def test_lora_on_convolutions_and_embeddings_is_a_change_of_the_weight(mode, rng, cell, shape, stabilised):
    """The oracle is MindSpore's own layer with the weight W + scale * B A, computed in NumPy."""
    network = nn.SequentialCell(cell())
    ids = type(network[0]) is nn.Embedding
    x = Tensor(rng.integers(0, 11, shape).astype(np.int32) if ids else rng.standard_normal(shape).astype(np.float32))
    before = network(x).asnumpy()
    inject(network, LoRAConfig(rank=2, alpha=3, targets=["0"], rank_stabilised=stabilised))
    np.testing.assert_allclose(network(x).asnumpy(), before, atol=1e-6)
    a, b = network[0].mindpet_delta_lora_a, network[0].mindpet_delta_lora_b
    for parameter in (a, b):
        parameter.set_data(Tensor(0.4 * rng.standard_normal(parameter.shape).astype(np.float32)))
    scale = 3 / np.sqrt(2) if stabilised else 3 / 2
    product = scale * (b.asnumpy().reshape(b.shape[0], -1).astype(float) @ a.asnumpy().reshape(2, -1))
    plain = cell()
    weight = network[0].embedding_table if ids else network[0].weight
    delta = product.T if ids else product.reshape(weight.shape)
    target = plain.embedding_table if ids else plain.weight
    target.set_data(Tensor((weight.asnumpy() + delta).astype(np.float32)))
    if getattr(plain, "has_bias", False):
        plain.bias.set_data(network[0].bias)
    np.testing.assert_allclose(network(x).asnumpy(), plain(x).asnumpy(), atol=2e-5)


def test_grouped_convolutions_are_refused():
    with pytest.raises(ValueError, match="2 groups"):
        inject(nn.SequentialCell(nn.Conv2d(4, 4, 3, group=2)), LoRAConfig(targets=["0"]))


def test_dropout_of_a_convolution_is_on_its_branch_and_in_training_only(mode):
    network = inject(nn.SequentialCell(nn.Conv2d(2, 3, 3)), LoRAConfig(rank=2, dropout=0.5, targets=["0"]))
    network[0].mindpet_delta_lora_b.set_data(ms.ops.ones_like(network[0].mindpet_delta_lora_b))
    x = ms.ops.ones((1, 2, 6, 6))
    network.set_train(False)
    still = network(x).asnumpy()
    np.testing.assert_array_equal(network(x).asnumpy(), still)
    network.set_train()
    assert not np.allclose(network(x).asnumpy(), still)


def test_patterns_of_ranks_and_exclusions_must_match_too():
    with pytest.raises(ValueError, match="nonsense") as error:
        inject(
            Network(),
            LoRAConfig(
                targets=["*.query"], rank_pattern={"nonsense": 4}, alpha_pattern={"*.qurey": 2}, exclude=["vlaue"]
            ),
        )
    assert "near it: layers.0.query" in str(error.value)
    assert "vlaue" in str(error.value)


def test_all_linear_leaves_what_is_trained_whole():
    network = inject(Network(), LoRAConfig(rank=2, targets="all-linear", modules_to_save=["heads.one"]))
    assert type(network.heads["one"]) is nn.Dense
    assert type(network.heads["other"]) is LoRADense
