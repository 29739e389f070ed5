"""What LLaMA and GPT-2 share: who sees whom, prefixes, caches, deltas."""

import gc

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet import (
    AdapterConfig,
    AdaptionPromptConfig,
    BitFitConfig,
    LoRAConfig,
    LowRankAdapterConfig,
    PrefixConfig,
    PTuning2Config,
    inject,
    merge,
)
from tests.models.causal import FAMILIES, WORDS, build, fill, logits, tokens, write

KINDS = ("llama", "gpt2")
HEADS = ("llama, tied", "gpt2, untied")  # the others are compared with their formulas
NEAR = {"atol": 2e-5, "rtol": 1e-4}
METHODS = {
    "lora": LoRAConfig(rank=2),
    "adapter": AdapterConfig(size=4),
    "low_rank_adapter": LowRankAdapterConfig(reduction_factor=4),
    "prefix": PrefixConfig(tokens=3, embed_dim=8, mid_dim=8),
    "ptuning2": PTuning2Config(tokens=3),
    "adaption_prompt": AdaptionPromptConfig(tokens=3),
}


def greedy(network, ids, count, width):
    """The likeliest continuation of each row, each token from the whole text anew, which is padded to `width`."""
    length = ids.shape[1]
    ids = np.pad(ids, ((0, 0), (0, width - length)))
    for end in range(length, length + count):
        mask = np.broadcast_to(np.arange(width) < end, ids.shape)
        ids[:, end] = logits(network, ids, mask)[:, end - 1].argmax(-1)
    return ids[:, length : length + count]


def greedy_with_cache(network, ids, count, mask=None, length=None):
    cache = network.new_cache(len(ids), length or ids.shape[1] + count)
    found = [network.step(ids, mask, cache).asnumpy().argmax(-1)]
    while len(found) < count:
        found.append(network.step(found[-1][:, None], None, cache).asnumpy().argmax(-1))
    return np.stack(found, 1)


@pytest.mark.parametrize("family", HEADS)
def test_a_later_token_changes_nothing_before_it(mode, family):
    network, ids = build(family), tokens(2, 7)
    changed = ids.copy()
    changed[:, 4] = (changed[:, 4] + 1) % WORDS
    one, other = logits(network, ids), logits(network, changed)
    assert one.shape == (2, 7, WORDS)
    np.testing.assert_allclose(one[:, :4], other[:, :4], **NEAR)
    assert (np.abs(one[:, 4:] - other[:, 4:]).max(-1) > 1e-2).all()


@pytest.mark.exhaustive_in_graph("*-llama")
@pytest.mark.parametrize("kind", KINDS)
def test_samples_packed_into_a_row_see_the_prefix_and_not_each_other(mode, kind):
    network = fill(inject(build(kind), PTuning2Config(tokens=3)))
    first, second = tokens(1, 4), tokens(1, 5, seed=1)
    row = np.concatenate([first, second, np.zeros((1, 2), np.int32)], 1)
    together = logits(network, row, [[1] * 4 + [2] * 5 + [0] * 2])
    np.testing.assert_allclose(together[:, :4], logits(network, first), **NEAR)
    np.testing.assert_allclose(together[:, 4:9], logits(network, second), **NEAR)


@pytest.mark.exhaustive_in_graph("*-llama-left")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(mode, kind, side):
    network, ids = build(kind), tokens(2, 5)
    if side == "left":
        fill(inject(network, PTuning2Config(tokens=3)))
    width = (3, 0) if side == "left" else (0, 3)
    padded = np.pad(ids, ((0, 0), width), constant_values=9)
    mask = np.pad(np.ones_like(ids), ((0, 0), width))
    found = logits(network, padded, mask)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[mask == 1].reshape(2, 5, WORDS), logits(network, ids), **NEAR)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_row_is_finite(kind):
    assert np.isfinite(logits(build(kind), tokens(1, 4), np.zeros((1, 4)))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_of_keys_and_values_that_tokens_had_is_those_tokens(kind):
    """GPT-2's keys hold their positions, and LLaMA's are turned before they are stored."""
    network, ids = build(kind), tokens(1, 8)
    expected = logits(network, ids)[:, 3:]
    cache = network.new_cache(1, 8)
    network.step(ids[:, :3], None, cache)
    layers, heads, size = (getattr(network.prefix_slot, name) for name in ("num_layers", "num_heads", "head_dim"))
    parts = [buffer.asnumpy().reshape(-1, heads, size)[:3] for buffer in cache.buffers]
    table = np.stack([part for layer in range(layers) for part in (parts[layer], parts[layers + layer])], 1)
    inject(network, PTuning2Config(tokens=3))
    (prompts,) = network.trainable_params()
    prompts.set_data(Tensor(table.reshape(3, -1)))
    np.testing.assert_allclose(logits(network, ids[:, 3:]), expected, **NEAR)


@pytest.mark.parametrize(("kind", "method"), [("llama", "ptuning2"), ("gpt2", "lora")])
def test_gradients_reach_the_delta_in_both_modes(mode, kind, method):
    test_gradients_reach_the_delta_and_nothing_else(kind, method)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_delta_and_nothing_else(kind, method):
    network = build(kind, num_hidden_layers=1) if kind == "llama" else build(kind, n_layer=1)
    fill(inject(network, METHODS[method]))
    ids, targets = Tensor(tokens(2, 5)), Tensor(tokens(2, 5, seed=4).reshape(-1))
    ones = ops.ones_like(ids)

    def loss():
        return ops.cross_entropy(network(ids, ones).reshape((-1, WORDS)), targets)

    weights = network.trainable_params()
    assert weights
    assert all("mindpet_delta" in parameter.name for parameter in weights)
    gradients = ms.value_and_grad(loss, None, weights)()[1]
    for parameter, gradient in zip(weights, gradients):
        assert np.abs(gradient.asnumpy()).max() > 0, parameter.name


def test_usual_targets_fit_every_family():
    lora, adapter = METHODS["lora"], METHODS["adapter"]

    def adapted(family, config):
        network = inject(build(family), config)
        return {p.name.partition(".mindpet_delta")[0].partition(".0.")[2] for p in network.trainable_params()} - {""}

    assert adapted("llama", lora) == {"self_attn.q_proj", "self_attn.v_proj"}
    assert adapted("gpt2", lora) == {"attn.c_attn"}
    assert adapted("llama", adapter) == {"self_attn.o_proj", "mlp.down_proj"}
    assert adapted("gpt2", adapter) == {"attn.c_proj", "mlp.c_proj"}
    assert adapted("gpt2", BitFitConfig()) == {
        f"{name}.bias" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    with pytest.raises(ValueError, match="bitfit|nothing|no parameter"):
        inject(build("llama"), BitFitConfig())


def test_targets_that_are_given_must_all_match():
    with pytest.raises(ValueError, match=r"'\*\.c_attn'"):
        inject(build("llama"), LoRAConfig(targets=["*.q_proj", "*.c_attn"]))


@pytest.mark.exhaustive_in_graph("*-llama, tied")
@pytest.mark.parametrize("family", HEADS)
def test_a_cache_continues_as_the_whole_text_does(mode, family):
    network, ids = build(family), tokens(2, 6)
    np.testing.assert_array_equal(greedy_with_cache(network, ids, 8), greedy(network, ids, 8, 14))


@pytest.mark.exhaustive_in_graph("*-gpt2-ptuning2")
@pytest.mark.parametrize(("kind", "method"), [("llama", "lora"), ("gpt2", "ptuning2"), ("llama", "adaption_prompt")])
def test_a_cache_knows_deltas_in_both_modes(mode, kind, method):
    test_a_cache_knows_deltas(kind, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_knows_deltas(kind, method):
    network, ids = fill(inject(build(kind), METHODS[method])), tokens(2, 6)
    cache = network.new_cache(2, 9)
    np.testing.assert_allclose(network.step(ids[:, :5], None, cache).asnumpy(), logits(network, ids)[:, 4], **NEAR)
    np.testing.assert_allclose(network.step(ids[:, 5:], None, cache).asnumpy(), logits(network, ids)[:, 5], **NEAR)


@pytest.mark.exhaustive_in_graph("*-gpt2-right")
@pytest.mark.parametrize(("kind", "side"), [("llama", "left"), ("gpt2", "right")])
def test_prompts_of_different_lengths_share_a_cache(mode, kind, side):
    network, lengths = build(kind), (2, 7, 40)
    rows = [tokens(1, length, seed=length) for length in lengths]
    expected = [greedy(network, row, 3, 43)[0] for row in rows]
    widths = [(40 - length, 0) if side == "left" else (0, 40 - length) for length in lengths]
    ids = np.concatenate([np.pad(row, ((0, 0), width)) for row, width in zip(rows, widths)])
    mask = np.concatenate([np.pad(np.ones_like(row), ((0, 0), width)) for row, width in zip(rows, widths)])
    np.testing.assert_array_equal(greedy_with_cache(network, ids, 3, mask), expected)


def test_a_cache_grows():
    network, ids = build("gpt2"), tokens(1, 150)
    cache = network.new_cache(1, 10)
    assert cache.capacity == 128
    found = [network.step(part, None, cache).asnumpy() for part in (ids[:, :126], ids[:, 126:149], ids[:, 149:])]
    assert cache.capacity == 256
    assert cache.lengths == [150]
    np.testing.assert_allclose(np.concatenate(found), logits(network, ids)[0, [125, 148, 149]], **NEAR)


def test_two_caches_do_not_disturb_each_other_and_one_that_is_gone_leaves_nothing():
    network, one, other = build("llama"), tokens(1, 5), tokens(1, 5, seed=1)
    first, second = network.new_cache(1, 9), network.new_cache(1, 9)
    network.step(one[:, :4], None, first)
    network.step(other[:, :4], None, second)
    np.testing.assert_allclose(network.step(one[:, 4:], None, first).asnumpy()[0], logits(network, one)[0, -1], **NEAR)
    held = {id(buffer) for buffer in second.buffers}
    del second
    gc.collect()
    third = network.new_cache(1, 9)
    assert {id(buffer) for buffer in third.buffers} == held
    np.testing.assert_allclose(network.step(one, None, third).asnumpy()[0], logits(network, one)[0, -1], **NEAR)


def test_a_row_of_padding_waits():
    network, ids = build("llama"), tokens(2, 6)
    cache = network.new_cache(2, 8)
    network.step(ids[:, :4], None, cache)
    network.step(ids[:, 4:5], [[1], [0]], cache)
    assert cache.lengths.tolist() == [5, 4]
    found = network.step(np.stack([ids[0, 5:], ids[1, 4:5]]), None, cache).asnumpy()
    expected = logits(network, ids)
    np.testing.assert_allclose(found, [expected[0, 5], expected[1, 4]], **NEAR)


def test_forgotten_tokens_are_gone(mode):
    network, ids = build("gpt2"), tokens(1, 6)
    cache = network.new_cache(1, 8)
    network.step([[1, 2, 3, 4]], None, cache)
    cache.lengths[:] = 0
    np.testing.assert_allclose(network.step(ids, None, cache).asnumpy()[0], logits(network, ids)[0, -1], **NEAR)


def test_only_two_graphs_are_compiled_whatever_the_lengths():
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        network = build("llama")
        for length in (3, 9, 32, 70):
            cache = network.new_cache(1, 100)
            network.step(tokens(1, length), None, cache)
            for _ in range(3):
                network.step([[1]], None, cache)
            del cache
        assert len(network.step_cell().compile_cache) == 2
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_a_prompt_in_a_cache_needs_the_head_once():
    network, seen = build("llama"), []
    network.lm_head.register_forward_hook(lambda cell, inputs, output: seen.append(output.shape))
    network.step(tokens(2, 9), None, network.new_cache(2, 9))
    assert seen == [(2, WORDS)]


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        ([[1, 2]], None, r"must be \(2, n\) for this cache, but got \(1, 2\)"),
        ([1, 2], None, r"got \(2,\)"),
        ([[1], [2]], [[1, 1], [1, 1]], r"got \(2, 1\) and \(2, 2\)"),
        ([[1], [2]], [[0], [0]], "one token at least"),
        ([[1, 1], [2, 2]], [[1, 2], [1, 1]], "1 for tokens and 0 for padding"),
        (np.ones((2, 201), int), None, "201 tokens, prefix included, are more than the 200 positions"),
    ],
)
def test_wrong_steps_are_refused(ids, mask, says):
    network = build("llama")
    cache = network.new_cache(2, 4)
    with pytest.raises(ValueError, match=says):
        network.step(ids, mask, cache)
    assert cache.lengths.tolist() == [0, 0]


def test_more_tokens_than_positions_are_an_error():
    network = inject(build("gpt2"), PTuning2Config(tokens=8))
    with pytest.raises(ValueError, match="193 tokens after a prefix of 8 are more than the 200 positions"):
        logits(network, tokens(1, 193))
    with pytest.raises(ValueError, match="201 tokens"):
        network.new_cache(1, 193)


@pytest.mark.parametrize("kind", KINDS)
def test_float16_gives_nearly_the_same(kind):
    whole, half, ids = build(kind), build(kind), tokens(2, 6)
    for parameter in half.get_parameters():
        parameter.set_dtype(ms.float16)
    mask = np.array([[1] * 6, [0] * 2 + [1] * 4])
    found = logits(half, ids, mask)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found[:, 2:], logits(whole, ids, mask)[:, 2:], atol=0.05, rtol=0.02)
    cache = half.new_cache(2, 8)
    np.testing.assert_allclose(half.step(ids, mask, cache).asnumpy(), found[:, -1], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_again(tmp_path, family):
    network, ids = write(tmp_path, family), tokens(2, 5)
    again, report = type(network).from_pretrained(tmp_path)
    assert not report.missing
    assert not report.unexpected
    np.testing.assert_array_equal(logits(again.set_train(False), ids), logits(network, ids))
    assert again.config.initializer_range == 0.02


def test_cells_have_hugging_face_paths():
    names = {parameter.name for parameter in build("llama").get_parameters()}
    assert {"model.embed_tokens.embedding_table", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"} < names
    assert {"model.layers.0.post_attention_layernorm.weight", "model.norm.weight"} < names
    names = {parameter.name for parameter in build("gpt2").get_parameters()}
    assert {"transformer.h.0.attn.c_attn.bias", "transformer.ln_f.gamma", "transformer.wpe.embedding_table"} < names
    assert not any("lm_head" in name for name in names)


def test_one_table_serves_a_tied_head():
    network, ids = build("llama, tied"), tokens(1, 3)
    rows = network.model(Tensor(ids), Tensor([[0, 1, 2]], ms.int32), Tensor(np.triu(np.ones((1, 1, 3, 3)), 1)), ())
    table = network.model.embed_tokens.embedding_table.asnumpy()
    np.testing.assert_allclose(rows.asnumpy() @ table.T, logits(network, ids)[0], **NEAR)


def test_networks_learn():
    """One step against the gradient lowers the loss: everything is differentiable, the tied table included."""
    network = build("llama, tied").set_train(True)
    optimizer = nn.SGD(network.trainable_params(), 0.05)
    ids, ones = Tensor(tokens(2, 8)), Tensor(np.ones((2, 8), np.int32))

    def loss():
        found = network(ids, ones)[:, :-1]
        return ops.cross_entropy(found.reshape((-1, WORDS)), ids[:, 1:].reshape(-1))

    step = ms.value_and_grad(loss, None, optimizer.parameters)
    before, gradients = step()
    optimizer(gradients)
    assert loss().asnumpy() < before.asnumpy()


def test_lora_on_the_table_of_a_tied_head_does_not_merge():
    """The head multiplies with the table without the delta, so it would change."""
    for family, fits in (("llama, tied", False), ("llama", True), ("gpt2", False), ("gpt2, untied", True)):
        network, ids = build(family), tokens(2, 5)
        fill(inject(network, LoRAConfig(rank=2, targets=["*embed_tokens" if "llama" in family else "*wte"])))
        before = logits(network, ids)
        if fits:
            np.testing.assert_allclose(logits(merge(network), ids), before, atol=1e-4)
        else:
            with pytest.raises(ValueError, match="the head multiplies with its table .* too, and would change with it"):
                merge(network)
            np.testing.assert_array_equal(logits(network, ids), before)
