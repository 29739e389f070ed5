"""Putting methods into networks that nobody edits: names, sharing, targets, refusals."""

import logging
from dataclasses import InitVar, dataclass

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet.delta import (
    AdapterConfig,
    BitFitConfig,
    DeltaConfig,
    LoRAConfig,
    LoRADense,
    LowRankAdapterConfig,
    PrefixConfig,
    PrefixSlot,
    PTuning2Config,
)
from mindpet.graph import find_targets, inject, replace_cell


class Attention(nn.Cell):
    def __init__(self):
        super().__init__()
        self.query = nn.Dense(4, 4)
        self.value = nn.Dense(4, 4, has_bias=False)

    def construct(self, x):
        return self.query(x) * self.value(x)


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.feed = nn.SequentialCell(nn.Dense(4, 6, activation="relu"), nn.ReLU(), nn.Dense(6, 4))

    def construct(self, x):
        return self.feed(self.attention(x))


class Network(nn.Cell):
    """Cells in lists, in sequences, and nested."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.CellList([Block(), Block()])
        self.head = nn.Dense(4, 2)

    def construct(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Slotted(nn.Cell):
    """A network with a slot for prefixes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Dense(4, 4)
        self.prefix = PrefixSlot(2, 1, 4)

    def construct(self, x):
        pairs = self.prefix()
        out = self.body(x)
        if pairs:
            for pair in pairs:
                out = out + ms.ops.matmul(out, pair[0][:, 0].T) @ pair[1][:, 0]
        return out


TARGETS = ["blocks.*.attention.*", "blocks.*.feed.0"]
DENSE_CONFIGS = [
    LoRAConfig(rank=2, targets=TARGETS),
    AdapterConfig(size=3, targets=TARGETS),
    LowRankAdapterConfig(reduction_factor=2, targets=TARGETS),
]
PREFIX_CONFIGS = [
    PrefixConfig(tokens=3, embed_dim=4, mid_dim=4),
    PrefixConfig(tokens=3, embed_dim=4, mid_dim=4, projection=False),
    PTuning2Config(tokens=3),
    PTuning2Config(tokens=3, projection=True, projection_dim=4),
]


def named(configs):
    return pytest.mark.parametrize("config", configs, ids=lambda config: type(config).__name__)


def rows(rng, count=5):
    return Tensor(rng.normal(size=(count, 4)), ms.float32)


def assert_names_are_paths(network):
    for path, parameter in network.parameters_and_names():
        assert parameter.name == path


@named(DENSE_CONFIGS)
def test_every_name_is_a_path_and_every_weight_is_shared(config):
    network = Network()
    before = dict(network.parameters_and_names())
    assert inject(network, config) is network
    after = dict(network.parameters_and_names())
    assert_names_are_paths(network)
    for path, parameter in before.items():
        assert after[path] is parameter
    new = set(after) - set(before)
    assert new == {parameter.name for parameter in network.trainable_params()}
    hosts = {path.partition(".mindpet_delta")[0] for path in new}
    attentions = [f"blocks.{block}.attention.{name}" for block in (0, 1) for name in ("query", "value")]
    assert hosts == {*attentions, "blocks.0.feed.0", "blocks.1.feed.0"}


@named(DENSE_CONFIGS)
def test_an_injected_network_runs_trains_and_still_takes_its_base_checkpoint(mode, rng, tmp_path, config):
    network, x = Network(), rows(rng)
    expected = network(x).asnumpy()
    ms.save_checkpoint(network, str(tmp_path / "base.ckpt"))
    inject(network, config)
    out = network(x).asnumpy()
    if isinstance(config, LoRAConfig):  # B starts at zero
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)
    assert out.shape == expected.shape

    loss = nn.WithLossCell(network, nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean"))
    step = nn.TrainOneStepCell(loss, nn.Adam(network.trainable_params(), 0.1)).set_train(True)
    frozen = {p.name: p.asnumpy().copy() for p in network.get_parameters() if not p.requires_grad}
    for _ in range(2):
        step(x, Tensor([0, 1, 0, 1, 0], ms.int32))
    assert (network(x).asnumpy() != out).any()
    assert_names_are_paths(network)
    for parameter in network.get_parameters():
        if parameter.name in frozen:
            np.testing.assert_array_equal(parameter.asnumpy(), frozen[parameter.name])

    other = Network()
    inject(other, config)
    not_loaded, unknown = ms.load_param_into_net(other, ms.load_checkpoint(str(tmp_path / "base.ckpt")))
    assert set(not_loaded) == {parameter.name for parameter in other.trainable_params()}
    assert unknown == []
    for parameter in other.get_parameters():
        if parameter.name in frozen:
            np.testing.assert_array_equal(parameter.asnumpy(), frozen[parameter.name])


@named(PREFIX_CONFIGS)
def test_a_slot_is_filled(mode, rng, config):
    network, x = Slotted(), rows(rng)
    expected = network(x).asnumpy()
    inject(network, config)
    assert_names_are_paths(network)
    assert {parameter.name.partition(".")[0] for parameter in network.trainable_params()} == {"prefix"}
    out = network(x)
    assert out.shape == expected.shape
    assert (out.asnumpy() != expected).any()


def test_bitfit_changes_no_cell():
    network = Network()
    cells = {path: type(cell) for path, cell in network.cells_and_names()}
    inject(network, BitFitConfig())
    assert {path: type(cell) for path, cell in network.cells_and_names()} == cells
    assert {p.name for p in network.trainable_params()} == {
        p.name for p in network.get_parameters() if p.name.endswith("bias")
    }


def test_a_sequence_runs_the_new_cells(mode, rng):
    network = nn.SequentialCell(nn.Dense(4, 4), nn.ReLU(), nn.Dense(4, 2))
    x = rows(rng)
    expected = network(x).asnumpy()
    inject(network, LoRAConfig(rank=2, targets=["2"]))
    network[2].mindpet_delta_lora_b.set_data(Tensor(np.ones((2, 2), np.float32)))
    assert isinstance(network[2], LoRADense)
    assert (network(x).asnumpy() != expected).any()
    assert_names_are_paths(network)


def test_all_linear_means_every_dense_cell():
    network = inject(Network(), LoRAConfig(rank=1, targets="all-linear", exclude=["head"]))
    adapted = {path for path, cell in network.cells_and_names() if isinstance(cell, LoRADense)}
    assert len(adapted) == 8
    assert "head" not in adapted


class Tied(nn.Cell):
    """One dense cell under two paths."""

    def __init__(self):
        super().__init__()
        self.first = nn.Dense(4, 4)
        self.second = self.first

    def construct(self, x):
        return self.second(self.first(x))


def test_a_shared_cell_stays_one_cell(mode, rng):
    network, x = Tied(), rows(rng)
    expected = network(x).asnumpy()
    inject(network, LoRAConfig(rank=2, targets=["*"]))
    assert network.first is network.second
    assert len(network.trainable_params()) == 2
    np.testing.assert_allclose(network(x).asnumpy(), expected, rtol=1e-5, atol=1e-6)


def test_an_activation_of_the_original_stays(rng):
    network = nn.SequentialCell(nn.Dense(4, 4, activation="relu"))
    inject(network, LoRAConfig(rank=1, targets=["0"]))
    assert (network(rows(rng)).asnumpy() >= 0).all()


def test_modules_to_save_train_as_well():
    network = inject(Network(), LoRAConfig(rank=1, targets=["*.query"], modules_to_save=["head"]))
    trained = {parameter.name for parameter in network.trainable_params()}
    assert {"head.weight", "head.bias"} <= trained
    assert len(trained) == 2 * 2 + 2


# ------------------------------------------------------------------------------------------------------- refusals


def state_of(network):
    cells = {path: id(cell) for path, cell in network.cells_and_names()}
    return cells, {p.name: p.requires_grad for p in network.get_parameters()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(targets=["*.query", "*.qery"]), r"(?s)no cell.*'\*\.qery'; near it: blocks\.0\.attention\.query"),
        (LoRAConfig(targets=["*.key"]), r"(?s)match no cell.*'\*\.key'"),
        (LoRAConfig(targets=["blocks.0"]), r"(?s)match no cell.*'blocks\.0'"),
        (LoRAConfig(targets=["*.query"], modules_to_save=["haed"]), r"lies below 'haed' \(did you mean 'head'"),
        (PrefixConfig(), r"(?s)match no cell.*'\*prefix'"),
    ],
    ids=["misspelt", "unknown", "not a dense cell", "nothing to save", "no slot"],
)
def test_a_miss_is_an_error_that_names_what_is_near_and_changes_nothing(config, message):
    network = Network()
    before = state_of(network)
    with pytest.raises(ValueError, match=message):
        inject(network, config)
    assert state_of(network) == before


def test_an_option_that_there_is_not_is_refused_with_near_names():
    with pytest.raises(
        TypeError, match=r"LoRAConfig has no option 'rnk' \(did you mean 'rank'\?\), 'z'; its options are"
    ):
        LoRAConfig(rnk=4, z=1)


def test_a_configuration_of_one_s_own_may_take_other_options():
    class Sized(LoRAConfig):
        def __init__(self, size):
            super().__init__(rank=size)

    @dataclass(frozen=True, kw_only=True)
    class Scaled(LoRAConfig):
        times: InitVar[int] = 1

        def __post_init__(self, times):
            object.__setattr__(self, "rank", self.rank * times)
            super().__post_init__()

    assert Sized(size=3).rank == 3
    assert Scaled(rank=2, times=4).rank == 8
    with pytest.raises(TypeError, match=r"Scaled has no option 'tims' \(did you mean 'times'"):
        Scaled(rank=2, tims=4)


def test_injecting_twice_into_the_same_cell_is_refused():
    network = inject(Network(), LoRAConfig(rank=1, targets=["*.query"]))
    before = state_of(network)
    for config in (LoRAConfig(rank=1, targets=["*.query"]), AdapterConfig(targets=["*.query", "*.value"])):
        with pytest.raises(ValueError, match=r"'blocks\.0\.attention\.query' is a LoRADense already"):
            inject(network, config)
        assert state_of(network) == before


@pytest.mark.parametrize("network", [None, 3, "network", [nn.Dense(2, 2)]])
def test_only_a_cell_takes_a_method(network):
    with pytest.raises(TypeError, match=r"'network' must be a mindspore.nn.Cell, but got"):
        inject(network, LoRAConfig())


@pytest.mark.parametrize("config", [None, "lora", {"rank": 8}, DeltaConfig()], ids=repr)
def test_only_a_method_has_a_configuration(config):
    with pytest.raises(TypeError, match="use one of LoRAConfig, AdapterConfig"):
        inject(Network(), config)


# --------------------------------------------------------------------------------------------------- replace_cell


@pytest.mark.parametrize("path", ["head", "blocks.1.attention.value", "blocks.0.feed.2"])
def test_a_replaced_cell_has_the_names_of_its_path(mode, rng, path):
    network, x = Network(), rows(rng)
    old = dict(network.cells_and_names())[path]
    new = nn.Dense(old.in_channels, old.out_channels, weight_init="zeros", bias_init="zeros")
    replace_cell(network, path, new)
    assert dict(network.cells_and_names())[path] is new
    assert {f"{path}.weight", f"{path}.bias"} <= {parameter.name for parameter in network.get_parameters()}
    assert_names_are_paths(network)
    out = network(x).asnumpy()
    if path == "head":
        np.testing.assert_array_equal(out, 0.0)


@pytest.mark.parametrize(("path", "near"), [("haed", "'head'"), ("blocks.2", "'blocks.[01]'"), ("", "")])
def test_a_path_that_leads_nowhere_is_refused_with_near_names(path, near):
    with pytest.raises(KeyError, match=f"no cell at '{path}'.*{near}"):
        replace_cell(Network(), path, nn.Dense(4, 2))


def test_targets_are_found_without_changing_anything():
    network = Network()
    before = state_of(network)
    report = find_targets(network, ["*.query", "*.nothing"], (nn.Dense,), exclude=["blocks.1.*"])
    assert list(report.matched) == ["blocks.0.attention.query"]
    assert list(report.misses) == ["*.nothing"]
    assert state_of(network) == before


@pytest.mark.parametrize("include_norm", [False, True])
def test_another_method_beside_bitfit_says_nothing_of_norms(include_norm):
    network = nn.SequentialCell(nn.Dense(4, 4), nn.LayerNorm((4,)))
    inject(network, BitFitConfig(include_norm=include_norm))
    inject(network, LoRAConfig(rank=1, targets=["0"]))
    trains = {parameter.name for parameter in network.trainable_params()}
    assert "0.bias" in trains
    assert ("1.beta" in trains) == include_norm


def test_a_rank_that_no_weight_has_is_told_once(caplog):
    with caplog.at_level(logging.WARNING, logger="mindpet"):
        inject(Network(), LoRAConfig(rank=4, targets=["*.query", "*.value"]))
        assert not caplog.text
        inject(Network(), LoRAConfig(rank=4, rank_pattern={"*.value": 5}, targets=["*.query", "*.value"]))
    assert caplog.text.count("A rank of 5 is more than the weight of 'blocks.0.attention.value' has: 4 at most") == 1
    assert caplog.text.count("A rank of") == 1
