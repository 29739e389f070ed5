"""The halves of a layer for a few rows: the numbers of the long way, in place only where all of it is plain."""

import itertools

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Parameter, Tensor, ops

import mindpet
from mindpet import inject
from mindpet.delta import AdaptionPromptConfig, LNTuningConfig, LoRAConfig, PrefixConfig
from mindpet.kernels import operators
from mindpet.models import cache, generate
from mindpet.models.llama import LlamaMLP
from tests.kernels import formulas
from tests.kernels.test_packing import KINDS, coarse, from_a_file, packed, pytestmark  # noqa: F401
from tests.kernels.test_packing import products as packed_products
from tests.models import causal

SIZES = {"hidden_size": 256, "intermediate_size": 288, "num_attention_heads": 4, "num_key_value_heads": 2}
WITH_PLAIN = (*KINDS, "F32")
EPSILON = Tensor([0.1], ms.float32)


def network_of(kind="Q4_1", fast=True, change=lambda network: None):
    network = from_a_file(kind, **SIZES)
    change(network)
    return mindpet.accelerate(network, compiled=True) if fast else network


def halves(network):
    """Which halves of each layer would be short."""
    cache._pack(network)
    return [tuple(part is not None for part in layer.shortened()) for layer in network.model.layers]


@pytest.fixture
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


def as_inputs(weight):
    found = packed(weight)
    return (found.codes, found.factors) if found is not None else (Tensor(weight), Tensor(weight))


@pytest.mark.parametrize("kind", WITH_PLAIN)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, operators.FEW),
    outs=st.lists(st.integers(1, 70), min_size=3, max_size=3),
    blocks=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_products_of_a_norm(kind, rows, outs, blocks, seed):
    generator = np.random.default_rng(seed)
    into = 32 * blocks
    weights = [coarse(kind, generator.standard_normal((out, into))) for out in (*outs, outs[0])]
    codes = [as_inputs(weight) for weight in weights]
    x, scale = (generator.standard_normal(size).astype(np.float32) for size in ((rows, into), into))
    norm = formulas.rms_norm(x.astype(np.float64), scale.astype(np.float64))
    right = [norm @ weight.T.astype(np.float64) for weight in weights]
    close = {"rtol": 1e-5, "atol": 3e-5 * into**0.5}
    start = Tensor(x), Tensor(scale), EPSILON
    for found, product in zip(operators.PackedThree()(*start, *codes[0], *codes[1], *codes[2]), right):
        np.testing.assert_allclose(found.asnumpy(), product, **close)
    found = operators.PackedGated()(*start, *codes[0], *codes[3]).asnumpy()
    np.testing.assert_allclose(found, formulas.gated_silu(right[0], right[3]), rtol=1e-4, atol=1e-4 * into)
    begin = generator.standard_normal((rows, outs[1])).astype(np.float32)
    found = operators.PackedOnto()(Tensor(x), *codes[1], Tensor(begin)).asnumpy()
    np.testing.assert_allclose(found, begin + x.astype(np.float64) @ weights[1].T, **close)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    groups=st.integers(1, 3),
    each=st.integers(1, 3),
    half=st.integers(1, 20),
    capacity=st.integers(4, 300),
    seed=st.integers(0, 99),
)
def test_attention_to_a_cache(batch, groups, each, half, capacity, seed):
    generator = np.random.default_rng(seed)
    tokens, dim, heads = operators.FEW // batch, 2 * half, groups * each

    def normal(*sizes):
        return (2 * generator.standard_normal(sizes)).astype(np.float32)

    rows = batch * tokens
    query, key, value = normal(rows, heads * dim), normal(rows, groups * dim), normal(rows, groups * dim)
    cos, sin = normal(batch, tokens, 1, dim), normal(batch, tokens, 1, dim)
    held = [normal(batch * capacity, groups * dim) for _ in range(2)]
    places = np.stack([np.sort(generator.choice(capacity, tokens, replace=False)) for _ in range(batch)])
    slots = (np.arange(batch)[:, None] * capacity + places).reshape(-1).astype(np.int32)

    def turned(x, parts):
        wide = x.astype(np.float64).reshape(batch, tokens, parts, dim)
        return formulas.rotary(wide, cos.astype(np.float64), sin.astype(np.float64)).reshape(rows, parts, dim)

    expected = [buffer.astype(np.float64) for buffer in held]
    expected[0][slots], expected[1][slots] = turned(key, groups).reshape(rows, -1), value
    keys, values = (buffer.reshape(batch, capacity, groups, dim) for buffer in expected)
    right = np.zeros((rows, heads, dim))
    for row, turned_query in enumerate(turned(query, heads)):
        sample, seen = row // tokens, places.reshape(-1)[row] + 1
        for head in range(heads):
            scores = 0.3 * keys[sample, :seen, head // each] @ turned_query[head]
            right[row, head] = formulas.masked_softmax(scores, 0.0) @ values[sample, :seen, head // each]
    buffers = [Parameter(Tensor(buffer), name=f"buffer_{index}") for index, buffer in enumerate(held)]
    inputs = [Tensor(each) for each in (query, key, value, cos, sin)]
    found = operators.CachedAttention(heads, groups, 0.3)(*inputs, *buffers, Tensor(slots)).asnumpy()
    np.testing.assert_allclose(found, right.reshape(rows, -1), rtol=1e-4, atol=2e-4)
    for buffer, rows_of_it in zip(buffers, expected):
        np.testing.assert_allclose(buffer.asnumpy(), rows_of_it, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slot", [-1, 8, 2**31 - 1])
def test_a_slot_outside_of_the_cache_is_refused(slot):
    rows, angles = ops.ones((1, 4)), ops.ones((1, 1, 1, 4))
    buffers = [Parameter(ops.zeros((8, 4)), name=name) for name in "kv"]
    with pytest.raises(RuntimeError):
        operators.CachedAttention(1, 1, 1.0)(
            rows, rows, rows, angles, angles, *buffers, Tensor([slot], ms.int32)
        ).asnumpy()
    assert not buffers[0].asnumpy().any()


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("rows", [1, 3, operators.FEW + 1])
@pytest.mark.parametrize("kind", WITH_PLAIN)
def test_a_network_says_the_same(kind, rows):
    plain, fast = network_of(kind, fast=False), network_of(kind)
    names = list(fast.parameters_dict())
    ids, mask = causal.tokens(rows, 6), np.ones((rows, 6), np.int32)
    mask[0, :3] = 0
    said = [list(map(list, generate(each, ids, attention_mask=mask, max_tokens=9))) for each in (plain, fast)]
    assert said[0] == said[1]
    assert halves(fast) == [(True, True)] * 2
    assert bool(packed_products(fast)) == (kind != "F32")
    assert all(layer.short_mlp is layer.short_attention is None for layer in fast.model.layers)
    assert list(fast.parameters_dict()) == names


@pytest.mark.usefixtures("graph_mode")
def test_what_was_written_is_there_for_whoever_reads_it():
    """A cache that grows is copied, one that goes back is written over, another prompt reads what a token wrote."""
    plain, fast = network_of(fast=False), network_of()
    caches = [each.new_cache(2, 120) for each in (plain, fast)]
    ids = causal.tokens(2, 150)
    taken = [0, 4, *range(5, 131), 134, 135, 136]  # pieces and tokens, over the end of the first 128 slots
    for start, end in itertools.pairwise(taken):
        both = [
            each.step(ids[:, start:end], None, held).asnumpy() for each, held in zip((plain, fast), caches, strict=True)
        ]
        np.testing.assert_allclose(both[1], both[0], atol=1e-3, err_msg=str(start))
    assert caches[1].capacity == 256
    for held in caches:
        held.lengths = held.lengths - 20
    for start in (140, 141):
        both = [each.step(ids[:, start : start + 1], None, held).asnumpy() for each, held in zip((plain, fast), caches)]
        np.testing.assert_allclose(both[1], both[0], atol=1e-3)


CHANGES = {
    "lora on queries": (lambda it: inject(it, LoRAConfig(rank=2, targets=["*.q_proj"])), (False, True)),
    "lora on down": (lambda it: inject(it, LoRAConfig(rank=2, targets=["*.down_proj"])), (True, False)),
    "adaption prompt": (lambda it: inject(it, AdaptionPromptConfig()), (False, True)),
    "norms": (lambda it: inject(it, LNTuningConfig()), (True, True)),
    "prefix": (lambda it: inject(it, PrefixConfig(tokens=3)), (True, True)),
    "a hook": (lambda it: [each.mlp.register_forward_hook(print) for each in it.model.layers], (True, False)),
    "to_float": (lambda it: [each.self_attn.to_float(ms.float32) for each in it.model.layers], (False, True)),
}


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_method_or_somebody_changed_goes_the_long_way(change):
    apply, expected = CHANGES[change]

    def changed(network):
        apply(network)
        generator = np.random.default_rng(5)
        for each in network.trainable_params():
            each.set_data(Tensor(0.3 * generator.standard_normal(each.shape), each.dtype))

    fast = network_of(change=changed)
    assert halves(fast) == [expected] * 2
    if "hook" in change:  # a graph does not run it
        return
    plain = network_of(change=changed, fast=False)
    prompt = causal.tokens(2, 5)
    said = [list(map(list, generate(each, prompt, max_tokens=7))) for each in (plain, fast)]
    assert said[0] == said[1]


@pytest.mark.usefixtures("graph_mode")
def test_a_layer_of_somebody_elses_goes_the_long_way():
    class Doubled(LlamaMLP):
        def construct(self, rows):
            return 2 * self.down_proj(self.act(self.gate_proj(rows), self.up_proj(rows)))

    def doubled(network):
        for layer in network.model.layers:
            own = Doubled(network.config)
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(own, name).weight.set_data(getattr(layer.mlp, name).weight)
            layer.mlp = own

    plain, fast = network_of(change=doubled, fast=False), network_of(change=doubled)
    assert halves(fast) == [(True, False)] * 2
    prompt = causal.tokens(1, 5)
    said = [list(map(list, generate(each, prompt, max_tokens=7))) for each in (plain, fast)]
    assert said[0] == said[1]


@pytest.mark.usefixtures("graph_mode")
def test_training_that_goes_on_between_two_texts_is_seen():
    """Norms are read as they are; a weight that is packed no more, too."""
    both = [network_of(fast=False), network_of()]
    prompt = causal.tokens(1, 5)
    first = [list(map(list, generate(each, prompt, max_tokens=7))) for each in both]
    for each in both:
        for layer in each.model.layers:
            layer.input_layernorm.weight.set_data(layer.input_layernorm.weight * -1.5)
        weight = each.model.layers[0].mlp.up_proj.weight
        weight.set_data(weight * 1.25)
    second = [list(map(list, generate(each, prompt, max_tokens=7))) for each in both]
    assert first[0] == first[1] != second[1] == second[0]
    assert halves(both[1]) == [(True, True)] * 2
    assert both[1].model.layers[0].mlp.up_proj.matmul.packed is None


@pytest.mark.usefixtures("graph_mode")
def test_dropout_in_training_mode_goes_the_long_way():
    network = mindpet.accelerate(from_a_file("Q4_1", **SIZES, attention_dropout=0.9))

    def steps(trains):
        held = network.set_train(trains).new_cache(1, 8)
        return np.concatenate([network.step(np.array([[token]]), None, held).asnumpy() for token in (3, 4)])

    assert halves(network) == [(True, True)] * 2
    assert np.abs(steps(True) - steps(False)).max() > 1e-2
    np.testing.assert_array_equal(steps(False), steps(False))
