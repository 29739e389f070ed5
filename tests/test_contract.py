"""What every method of the registry owes: a new entry is tested here without a line being added."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet import METHODS, eject, inject, load_delta, merge, save_delta, unmerge
from mindpet.delta import AdaptionSlot, PrefixSlot, PromptSlot
from mindpet.delta.adaption_slot import attend_prompt
from mindpet.delta.prompt_slot import before_rows
from mindpet.graph import freeze_delta

WIDTH = 8


class Attention(nn.Cell):
    """Attends over its own positions, over a prefix, and beside it over a prompt."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Dense(WIDTH, WIDTH) for _ in range(3))
        self.adaption = AdaptionSlot(WIDTH)

    def construct(self, x, prefix):
        query, key, value = self.query(x), self.key(x), self.value(x)  # (batch, seq, width)
        if prefix is not None:
            shape = (x.shape[0], 1, 1)
            key = ops.concat((ops.tile(prefix[0].reshape((1, -1, WIDTH)).astype(x.dtype), shape), key), 1)
            value = ops.concat((ops.tile(prefix[1].reshape((1, -1, WIDTH)).astype(x.dtype), shape), value), 1)
        weights = ops.softmax(ops.bmm(query, key.transpose((0, 2, 1))), -1)
        mixed = ops.bmm(weights, value)
        prompt = self.adaption()
        if len(prompt) > 0:
            rows = prompt[0].astype(x.dtype)
            mixed = mixed + attend_prompt(query, self.key(rows), self.value(rows), prompt[1], WIDTH // 2)
        return mixed


class Reader(nn.Cell):
    """Two attention layers in a CellList, with slots for a prefix and for virtual tokens."""

    def __init__(self):
        super().__init__()
        self.layers = nn.CellList([Attention(), Attention()])
        self.prefix = PrefixSlot(2, 2, WIDTH // 2)
        self.prompts = PromptSlot(nn.Embedding(5, WIDTH))

    def construct(self, x):
        return self.read(x)

    def read(self, x):
        pairs, prompts = self.prefix(), self.prompts()
        if prompts is not None:
            x = before_rows(prompts, x)
        for index in range(len(self.layers)):
            x = x + self.layers[index](x, pairs[index] if len(pairs) > 0 else None)
        return x


class Tiny(Reader):
    """The same after an embedding and a norm, and before a SequentialCell and a head."""

    def __init__(self):
        super().__init__()
        self.places, self.numbers = nn.Embedding(5, WIDTH), Tensor(np.arange(5, dtype=np.int32))
        self.norm = nn.LayerNorm((WIDTH,))
        self.feed = nn.SequentialCell(nn.Dense(WIDTH, WIDTH), nn.ReLU(), nn.Dense(WIDTH, WIDTH))
        self.head = nn.Dense(WIDTH, 3)

    def construct(self, x):
        x = self.read(self.norm(x + self.places(self.numbers)))
        return self.head(self.feed(x)[:, 0])


def config(method, **more):
    """Small, on what the method can adapt."""
    sizes = {
        "rank": 2,
        "initial_rank": 3,
        "size": 2,
        "phm_dim": 2,
        "reduction_factor": 4,
        "tokens": 3,
        "embed_dim": 4,
        "mid_dim": 4,
        "projection_dim": 4,
        "encoder_hidden": 4,
        "num_tasks": 2,
        "task": 1,
        "feedforward": ["feed.*"],
        "frequencies": 5,
        "scaling": 10.0,
        "block_size": 2,
        "butterfly_factors": 2,
        "token_indices": [3, 1],
    }
    known = {name: value for name, value in sizes.items() if name in method.config.__dataclass_fields__}
    if nn.Dense in method.adapt:
        known["targets"] = ["layers.*.query", "layers.*.value", "feed.0"]
        known["targets"] += ["prefix"] if PrefixSlot in method.adapt else []
    elif nn.Embedding in method.adapt:
        known["targets"] = ["places"]
    if method.name == "randlora":
        known["alpha"] = 2.0  # the default is for a rank of 32
    return method.config(**known, **more)


def inputs(dtype=np.float32):
    return Tensor(np.random.default_rng(3).standard_normal((4, 5, WIDTH)).astype(dtype))


def shake(network):
    """Move what trains away from its start."""
    generator = np.random.default_rng(5)
    for parameter in network.trainable_params():
        step = 0.3 * generator.standard_normal(parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(parameter.asnumpy() + step.astype(parameter.asnumpy().dtype)))


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_list_of_targets_is_refused(method, empty):
    with pytest.raises(ValueError, match=rf"For '{method.config.__name__}', 'targets' must name a cell at least"):
        method.config(targets=empty)


@pytest.fixture(params=list(METHODS))
def method(request):
    return METHODS[request.param]


STARTS_ELSEWHERE = {
    "fourierft",
    "prefix",
    "mam",
    "ptuning2",
    "low_rank_adapter",
    "prompt_tuning",
    "p_tuning",
    "multitask_prompt_tuning",
}  # as documented
QUANTISES = {"qlora"}  # and so lets the weights go that it adapts
STARTS_NEAR_IT = {"adapter", "adapter_fusion", "compacter"}


@pytest.mark.exhaustive_in_graph("*-lora", "*-prefix", "*-prompt_tuning", "*-qlora")
def test_the_start(mode, method):
    network = Tiny()
    before = network(inputs()).asnumpy()
    inject(network, config(method))
    difference = np.abs(network(inputs()).asnumpy() - before).max()
    if method.name in STARTS_ELSEWHERE | QUANTISES:
        assert np.isfinite(difference)
    elif method.name in STARTS_NEAR_IT:
        assert difference < 0.05
    else:
        assert difference <= 1e-6


def test_only_the_delta_and_the_head_train(mode, method):
    network = inject(Tiny(), config(method, modules_to_save=["head"]))
    before = {p.name: p.asnumpy().copy() for p in network.get_parameters()}
    trainable = {p.name for p in network.trainable_params()}
    loss = nn.WithLossCell(network, nn.CrossEntropyLoss())
    step = nn.TrainOneStepCell(loss, nn.Adam(network.trainable_params(), 0.02))
    step.set_train()
    labels = Tensor([0, 1, 2, 0], ms.int32)
    losses = [float(step(inputs(), labels)) for _ in range(6)]
    assert losses[-1] < losses[0]
    changed = {p.name for p in network.get_parameters() if not np.array_equal(p.asnumpy(), before[p.name])}
    assert changed <= trainable
    assert "head.weight" in changed
    assert any("mindpet_delta" in name for name in changed) or not method.adapt


def test_names_are_paths_and_none_is_there_twice(method):
    network = inject(Tiny(), config(method))
    names = [parameter.name for parameter in network.get_parameters()]
    assert len(set(names)) == len(names)
    assert names == [path for path, _ in network.parameters_and_names()]


def test_base_checkpoints_still_load(method):
    base = {p.name: ms.Parameter(p.value(), name=p.name) for p in Tiny().get_parameters()}
    network = inject(Tiny(), config(method))
    ms.load_param_into_net(network, base)
    loaded = {p.name: p.asnumpy() for p in network.get_parameters()}
    if method.name in QUANTISES:
        base = {name: value for name, value in base.items() if name in loaded}
    assert all(np.array_equal(loaded[name], value.asnumpy()) for name, value in base.items())


def test_freezing_by_mode_is_what_injection_freezes(method):
    network = inject(Tiny(), config(method))
    expected = {p.name for p in network.trainable_params()}
    freeze_delta(network, method.name)
    assert {p.name for p in network.trainable_params()} == expected


@pytest.mark.exhaustive_in_graph("*-lora", "*-qlora", "*-prefix", "*-adapter_fusion", "*-adaption_prompt")
def test_a_delta_saved_and_loaded_gives_the_same_outputs(mode, method, tmp_path):
    network = Tiny()
    base = {p.name: ms.Parameter(p.value(), name=p.name) for p in network.get_parameters()}
    inject(network, config(method, modules_to_save=["head"]))
    shake(network)
    expected = network(inputs()).asnumpy()
    save_delta(network, tmp_path)
    other = Tiny()
    ms.load_param_into_net(other, base)
    np.testing.assert_array_equal(load_delta(other, tmp_path)(inputs()).asnumpy(), expected)


@pytest.mark.exhaustive_in_graph("*-lora", "*-qlora", "*-prefix", "*-adapter_fusion", "*-adaption_prompt")
def test_merging_keeps_the_outputs_or_is_refused(mode, method):
    network = inject(Tiny(), config(method))
    shake(network)
    expected = network(inputs()).asnumpy()
    adapted = [cell for _, cell in network.cells_and_names() if hasattr(cell, "delta_method")]
    if adapted and all(hasattr(cell, "delta_weight") for cell in adapted):
        np.testing.assert_allclose(merge(network)(inputs()).asnumpy(), expected, atol=1e-5)
        np.testing.assert_array_equal(unmerge(network)(inputs()).asnumpy(), expected)
    else:
        with pytest.raises(ValueError, match=r"cannot merge|can be merged"):
            merge(network)


@pytest.mark.exhaustive_in_graph("*-lora", "*-prefix", "*-adaption_prompt")
def test_ejecting_restores_the_network(mode, method):
    network = Tiny()
    expected = network(inputs()).asnumpy()
    inject(network, config(method, modules_to_save=["head"]))
    if method.name in QUANTISES:
        expected = network(inputs()).asnumpy()
    shake(network)
    eject(network)
    np.testing.assert_allclose(
        network(inputs()).asnumpy(), expected, atol=1e-6 if method.name in QUANTISES else 0, rtol=0
    )
    assert all(parameter.requires_grad for parameter in network.get_parameters())


@pytest.mark.exhaustive_in_graph("*-lora", "*-prefix", "*-adaption_prompt")
def test_float16(mode, method):
    network = Tiny()
    for parameter in network.get_parameters():
        parameter.set_dtype(ms.float16)
    inject(network, config(method))
    output = network(inputs(np.float16))
    assert output.dtype == ms.float16
    assert np.isfinite(output.asnumpy()).all()


def test_the_registry_says_what_people_need(method):
    assert "arXiv:" in method.paper
    assert method.config.__doc__
    assert 1e-5 <= method.learning_rate <= 0.1
    assert method.trainable
