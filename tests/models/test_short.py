"""The halves of a layer for a few rows: the numbers of the long way, in place only where all of it is plain."""

import itertools
from types import MethodType

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Parameter, Tensor, nn, ops

import mindpet
from mindpet import inject
from mindpet.delta import AdaptionPromptConfig, LNTuningConfig, LoRAConfig, PrefixConfig
from mindpet.kernels import build, few
from mindpet.kernels.operators import FEW
from mindpet.models import LlamaForCausalLM, cache, generate
from mindpet.models.llama import LlamaMLP
from tests.kernels import formulas
from tests.kernels.test_packing import KINDS, coarse, from_a_file, packed
from tests.kernels.test_packing import products as packed_products
from tests.kernels.test_packing import pytestmark as only_where_weights_are_packed
from tests.models import causal

SIZES = {"hidden_size": 256, "intermediate_size": 288, "num_attention_heads": 4, "num_key_value_heads": 2}
pytestmark = pytest.mark.skipif(not build.available(), reason=f"no kernels here: {build.why_not()}")
WITH_PLAIN = (*(pytest.param(kind, marks=only_where_weights_are_packed) for kind in KINDS), "F32")
EPSILON = Tensor([0.1], ms.float32)


def network_of(kind="Q4_1", fast=True, change=lambda network: None, layers=1):
    network = from_a_file(kind, layers, **SIZES)
    change(network)
    return mindpet.accelerate(network, compiled=True) if fast else network


def halves(network):
    """Which halves of each layer would be short."""
    cache._pack(network)
    return [tuple(part is not None for part in layer.shortened()) for layer in network.model.layers]


def as_inputs(weight):
    found = packed(weight)
    return (found.codes, found.factors) if found is not None else (Tensor(weight), Tensor(weight))


@pytest.mark.parametrize("kind", WITH_PLAIN)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, FEW),
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
    for found, product in zip(few.NormAndThreeProducts()(*start, *codes[0], *codes[1], *codes[2]), right):
        np.testing.assert_allclose(found.asnumpy(), product, **close)
    found = few.NormAndGate()(*start, *codes[0], *codes[3]).asnumpy()
    np.testing.assert_allclose(found, formulas.gated_silu(right[0], right[3]), rtol=1e-4, atol=1e-4 * into)
    begin = generator.standard_normal((rows, outs[1])).astype(np.float32)
    found = few.ProductOnto()(Tensor(x), *codes[1], Tensor(begin)).asnumpy()
    np.testing.assert_allclose(found, begin + x.astype(np.float64) @ weights[1].T, **close)


def attention(heads, groups, scale):
    return few.CachedAttention(Tensor([heads, groups], ms.int32), Tensor([scale, 1.0], ms.float32))


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
    tokens, dim, heads = FEW // batch, 2 * half, groups * each

    def normal(*sizes):
        return (2 * generator.standard_normal(sizes)).astype(np.float32)

    rows = batch * tokens
    mask = normal(*(generator.choice([1, size]) for size in (batch, heads, tokens)), capacity)
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
            added = np.broadcast_to(mask, (batch, heads, tokens, capacity))[sample, head, row % tokens, :seen]
            right[row, head] = formulas.masked_softmax(scores, added) @ values[sample, :seen, head // each]
    buffers = [Parameter(Tensor(buffer), name=f"buffer_{index}") for index, buffer in enumerate(held)]
    inputs = [Tensor(each) for each in (query, key, value, cos, sin)]
    found = attention(heads, groups, 0.3)(*inputs, *buffers, Tensor(slots[:, None]), Tensor(mask)).asnumpy()
    np.testing.assert_allclose(found, right.reshape(rows, -1), rtol=1e-4, atol=2e-4)
    for buffer, rows_of_it in zip(buffers, expected):
        np.testing.assert_allclose(buffer.asnumpy(), rows_of_it, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slot", [-1, 8, 2**31 - 1])
def test_a_slot_outside_of_the_cache_is_refused_and_nothing_written(slot):
    rows, angles = ops.ones((2, 4)), ops.ones((1, 2, 1, 4))
    buffers = [Parameter(ops.zeros((8, 4)), name=name) for name in "kv"]
    slots, mask = Tensor([[3], [slot]], ms.int32), ops.zeros((1, 1, 1, 8))
    with pytest.raises(RuntimeError):
        attention(1, 1, 1.0)(rows, rows, rows, angles, angles, *buffers, slots, mask).asnumpy()
    assert not any(buffer.asnumpy().any() for buffer in buffers)


def test_no_kernel_takes_more_rows_than_few():
    rows, angles, weight = ops.ones((FEW + 1, 32)), ops.ones((1, FEW + 1, 1, 32)), ops.ones((32, 32))
    buffers = [Parameter(ops.zeros((8, 32)), name=name) for name in "kv"]
    slots, mask = ops.arange(FEW + 1).astype(ms.int32).expand_dims(1), ops.zeros((1, 1, 1, 8))
    calls = [
        lambda: few.ProductOnto()(rows, weight, weight, rows),
        lambda: few.NormAndThreeProducts()(rows, weight[0], EPSILON, *[weight] * 6)[0],
        lambda: few.NormAndGate()(rows, weight[0], EPSILON, *[weight] * 4),
        lambda: attention(1, 1, 1.0)(rows, rows, rows, angles, angles, *buffers, slots, mask),
    ]
    for call in calls:
        with pytest.raises(RuntimeError):
            call().asnumpy()


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        pytest.param("Q4_0", 1, marks=(only_where_weights_are_packed, pytest.mark.exhaustive)),
        pytest.param("Q4_1", 3, marks=only_where_weights_are_packed),
        pytest.param("Q8_0", FEW, marks=(only_where_weights_are_packed, pytest.mark.exhaustive)),
        pytest.param("F32", FEW + 1, marks=pytest.mark.exhaustive),
    ],
)
def test_a_network_says_the_same(kind, rows):
    plain, fast = network_of(kind, fast=False), network_of(kind)
    names = list(fast.parameters_dict())
    ids, mask = causal.tokens(rows, 6), np.ones((rows, 6), np.int32)
    mask[0, :3] = 0
    said = [list(map(list, generate(each, ids, attention_mask=mask, max_tokens=9))) for each in (plain, fast)]
    assert said[0] == said[1]
    assert halves(fast) == [(True, True)]
    assert bool(packed_products(fast)) == (kind != "F32")
    assert all(layer.short_mlp is layer.short_attention is None for layer in fast.model.layers)
    assert list(fast.parameters_dict()) == names


def logits(network, count, rows=1, prompt=5):
    """Those after a prompt and after each of so many tokens."""
    held, ids = network.new_cache(rows, prompt + count), causal.tokens(rows, prompt + count)
    parts = [ids[:, :prompt], *np.split(ids[:, prompt:], count, 1)]
    return np.stack([network.step(part, None, held).asnumpy() for part in parts])


class Nothing(nn.Cell):
    """In the place of a kernel."""

    def construct(self, x, codes, factors, rows):
        return rows * 0.5


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("rows", [FEW, pytest.param(FEW + 1, marks=pytest.mark.exhaustive)])
def test_a_token_goes_the_short_way_and_a_prompt_does_not(monkeypatch, rows):
    right = logits(network_of(), 3, rows)
    np.testing.assert_allclose(right, logits(network_of(fast=False), 3, rows), atol=1e-3)
    monkeypatch.setattr(few, "ProductOnto", Nothing)
    wrong = np.abs(logits(network_of(), 3, rows) - right).max((1, 2))
    assert wrong[0] < 1e-5
    assert wrong[1:].min() > 0.1 if rows <= FEW else wrong.max() < 1e-5


class Windowed(LlamaForCausalLM):
    """A token sees the last three alone."""

    def hidden_rows(self, input_ids, positions, hidden, extras):
        order = ops.arange(hidden.shape[-1])
        far = (order + 2 < positions.expand_dims(2)).astype(ms.float32).expand_dims(1)
        return self.model(input_ids, positions, ops.maximum(hidden, far), extras)


@pytest.mark.usefixtures("graph_mode")
def test_a_mask_of_ones_own_holds_for_a_token_too(monkeypatch):
    usual = logits(network_of(), 6)
    monkeypatch.setattr(causal, "LlamaForCausalLM", Windowed)
    found = logits(network_of(), 6)
    assert np.abs(found - usual).max() > 0.1
    np.testing.assert_allclose(found, logits(network_of(fast=False), 6), atol=1e-3)


def doubled(self, rows):
    return 2 * self.down_proj(self.act(self.gate_proj(rows), self.up_proj(rows)))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("graph_mode")
def test_a_method_of_ones_own_holds_for_a_token_too():
    plain, fast = network_of(fast=False, layers=2), network_of(layers=2)
    for network in (plain, fast):
        own(network.model.layers[0].mlp, doubled)
    np.testing.assert_allclose(logits(fast, 6), logits(plain, 6), atol=1e-3)
    assert halves(fast) == [(True, False), (True, True)]


@pytest.mark.exhaustive
@pytest.mark.usefixtures("graph_mode")
def test_a_token_has_the_constants_of_the_kernels_that_a_prompt_has():
    fast = network_of(layers=2)
    usual = logits(fast, 6)
    fast.model.layers[1].input_layernorm.epsilon = 0.5
    fast.model.layers[0].self_attn.core.original.scale *= 0.5
    fast.forget_caches()
    np.testing.assert_allclose(logits(fast, 6), usual, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("graph_mode")
def test_two_caches_take_turns():
    networks = [network_of(fast=False), network_of()]
    ids = causal.tokens(2, 8)
    caches = [[network.new_cache(1, 8) for _ in range(2)] for network in networks]
    for index in range(8):
        for one in range(2):
            both = [
                network.step(ids[one : one + 1, index : index + 1], None, held[one]).asnumpy()
                for network, held in zip(networks, caches)
            ]
            np.testing.assert_allclose(both[1], both[0], atol=1e-3)


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


def own(cell, construct):
    cell.construct = MethodType(construct, cell)


CHANGES = {
    "lora on queries": (lambda it: inject(it, LoRAConfig(rank=2, targets=["*.q_proj"])), (False, True)),
    "lora on one": (lambda it: inject(it, LoRAConfig(rank=2, targets=["*.0.*.q_proj"])), None),
    "lora on down": (lambda it: inject(it, LoRAConfig(rank=2, targets=["*.down_proj"])), (True, False)),
    "adaption prompt": (lambda it: inject(it, AdaptionPromptConfig()), (False, True)),
    "norms": (lambda it: inject(it, LNTuningConfig()), (True, True)),
    "prefix": (lambda it: inject(it, PrefixConfig(tokens=3)), (True, True)),
    "a hook": (
        lambda it: [each.mlp.register_forward_hook(lambda *seen: None) for each in it.model.layers],
        (True, False),
    ),
    "a method": (lambda it: [own(each.mlp, doubled) for each in it.model.layers], (True, False)),
    "to_float": (lambda it: [each.self_attn.to_float(ms.float32) for each in it.model.layers], (False, True)),
}


def with_change(change, fast=True):
    def changed(network):
        CHANGES[change][0](network)
        generator = np.random.default_rng(5)
        for each in network.trainable_params():
            each.set_data(Tensor(0.3 * generator.standard_normal(each.shape), each.dtype))

    return network_of(change=changed, fast=fast, layers=2)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_method_or_somebody_changed_goes_the_long_way(change):
    expected = CHANGES[change][1]
    assert halves(with_change(change)) == ([expected] * 2 if expected else [(False, True), (True, True)])


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize(
    "change",
    ["lora on one", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("adaption prompt", "prefix"))],
)
def test_long_and_short_ways_go_together(change):
    np.testing.assert_allclose(logits(with_change(change), 5, 2), logits(with_change(change, False), 5, 2), atol=1e-3)


@pytest.mark.exhaustive
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
    assert halves(fast) == [(True, False)]
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
    assert halves(both[1]) == [(True, True)]
    assert both[1].model.layers[0].mlp.up_proj.matmul.packed is None


@pytest.mark.usefixtures("graph_mode")
def test_dropout_in_training_mode_goes_the_long_way():
    network = mindpet.accelerate(from_a_file("Q4_1", 1, **SIZES, attention_dropout=0.9))

    def steps(trains):
        held = network.set_train(trains).new_cache(1, 8)
        return np.concatenate([network.step(np.array([[token]]), None, held).asnumpy() for token in (3, 4)])

    assert halves(network) == [(True, True)]
    assert np.abs(steps(True) - steps(False)).max() > 1e-2
    np.testing.assert_array_equal(steps(False), steps(False))
