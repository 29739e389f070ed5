"""Virtual tokens in every network. Those that are the embeddings of words compute what the words would."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet import PromptTuningConfig, PTuning2Config, PTuningConfig, inject
from mindpet.graph import disable
from mindpet.models import BertConfig, BertForSequenceClassification
from mindpet.models.generation import generate
from tests.models.causal import WORDS, build, fill, logits, tokens

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
KINDS = ("llama", "gpt2")
START = (4, 9, 2)
AS_WORDS = PromptTuningConfig(tokens=3, start=START)
PAIRS = [
    ("llama", AS_WORDS),
    ("gpt2", PTuningConfig(tokens=1, encoder_hidden=8)),
    ("bert", PTuningConfig(tokens=3, encoder="lstm", encoder_hidden=8)),
]
NEAR = {"atol": 2e-5, "rtol": 1e-5}


def bert(pooling="pooler", **changes):
    config = BertConfig(vocab_size=WORDS, initializer_range=0.3, **BERT, **changes)
    return BertForSequenceClassification(config, 3, pooling).set_train(False)


def after_words(ids):
    return np.concatenate([np.tile(np.array(START, np.int32), (len(ids), 1)), ids], 1)


@pytest.mark.parametrize("family", KINDS)
def test_logits_are_those_of_the_tokens_after_the_words(mode, family):
    network, ids = build(family), tokens(2, 6)
    expected = logits(network, after_words(ids))[:, 3:]
    np.testing.assert_allclose(logits(inject(network, AS_WORDS), ids), expected, **NEAR)


def test_bert_pools_the_first_virtual_token(mode):
    network, ids = bert(), tokens(2, 6)
    mask, kinds = np.ones_like(ids), np.tile(np.array([0, 0, 0, 1, 1, 1], np.int32), (2, 1))
    mask[1, 4:] = 0
    before = [np.concatenate([np.full((2, 3), fill, np.int32), rows], 1) for fill, rows in ((1, mask), (0, kinds))]
    expected = network(Tensor(after_words(ids)), *map(Tensor, before)).asnumpy()
    inject(network, AS_WORDS)
    np.testing.assert_allclose(network(Tensor(ids), Tensor(mask), Tensor(kinds)).asnumpy(), expected, **NEAR)


def test_the_mean_is_of_the_tokens_alone():
    network, ids = bert("mean"), tokens(2, 6)
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    inject(network, AS_WORDS)
    layer, _ = network.bert(Tensor(ids), Tensor(mask), ops.zeros_like(Tensor(ids)))
    assert layer.shape == (2, 6, 16)
    mean = np.stack([layer.asnumpy()[0].mean(0), layer.asnumpy()[1, :4].mean(0)])
    expected = mean @ network.classifier.weight.asnumpy().T + network.classifier.bias.asnumpy()
    found = network(Tensor(ids), Tensor(mask), ops.zeros_like(Tensor(ids))).asnumpy()
    np.testing.assert_allclose(found, expected, **NEAR)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, side):
    network, ids = inject(build(kind), AS_WORDS), tokens(2, 5)
    width = (3, 0) if side == "left" else (0, 3)
    padded = np.pad(ids, ((0, 0), width), constant_values=9)
    mask = np.pad(np.ones_like(ids), ((0, 0), width))
    found = logits(network, padded, mask)
    np.testing.assert_allclose(found[mask == 1].reshape(2, 5, WORDS), logits(network, ids), **NEAR)


@pytest.mark.parametrize("kind", KINDS)
def test_every_segment_of_a_row_sees_the_virtual_tokens(kind):
    network = inject(build(kind), AS_WORDS)
    first, second = tokens(1, 4), tokens(1, 5, seed=1)
    row = np.concatenate([first, second, np.zeros((1, 2), np.int32)], 1)
    together = logits(network, row, [[1] * 4 + [2] * 5 + [0] * 2])
    np.testing.assert_allclose(together[:, :4], logits(network, first), **NEAR)
    np.testing.assert_allclose(together[:, 4:9], logits(network, second), **NEAR)


@pytest.mark.parametrize(("kind", "config"), PAIRS[:2])
def test_greedy_output_is_the_same_with_and_without_a_cache(mode, kind, config):
    network, ids = inject(build(kind, 1), config), tokens(2, 6)
    rows, mask = np.pad(ids, ((0, 0), (0, 5))), np.zeros((2, 11), np.int32)
    for length in range(6, 11):
        mask[:, :length] = 1
        rows[:, length] = logits(network, rows, mask)[:, length - 1].argmax(-1)
    found = np.stack(list(generate(network, ids, max_tokens=5)), 1)
    np.testing.assert_array_equal(found, rows[:, 6:])


def test_generation_leaves_the_network_training():
    network = inject(build("gpt2", embd_pdrop=0.5), AS_WORDS).set_train(True)
    one, other = (list(generate(network, tokens(1, 5)[0], max_tokens=5)) for _ in range(2))
    assert one == other
    assert network.training


def test_prompts_of_different_lengths_share_a_cache():
    network = inject(build("llama"), AS_WORDS)
    first, second = tokens(1, 3), tokens(1, 6, seed=1)
    ids, mask = np.concatenate([np.pad(first, ((0, 0), (3, 0))), second]), [[0] * 3 + [1] * 3, [1] * 6]
    found = network.step(ids, mask, network.new_cache(2, 6)).asnumpy()
    expected = [logits(network, first)[0, -1], logits(network, second)[0, -1]]
    np.testing.assert_allclose(found, expected, **NEAR)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_and_virtual_tokens_go_together(kind):
    """As the prefix alone with the words of the virtual tokens."""
    network, ids = inject(build(kind), PTuning2Config(tokens=2)), tokens(2, 5)
    expected = logits(fill(network), after_words(ids))[:, 3:]
    inject(network, AS_WORDS)
    np.testing.assert_allclose(logits(network, ids), expected, **NEAR)
    cache = network.new_cache(2, 6)
    np.testing.assert_allclose(network.step(ids, None, cache).asnumpy(), expected[:, -1], **NEAR)
    assert cache.lengths.tolist() == [10, 10]


def test_an_empty_slot_costs_nothing():
    network = build("llama")
    names = {parameter.name for parameter in network.get_parameters()}
    ids, before = tokens(2, 5), logits(network, tokens(2, 5))
    assert not any("prompts" in name for name in names)
    inject(network, AS_WORDS)
    with disable(network):
        np.testing.assert_array_equal(logits(network, ids), before)


@pytest.mark.parametrize(("kind", "config"), PAIRS)
def test_every_parameter_gets_a_gradient(mode, kind, config):
    network, ids = inject(bert() if kind == "bert" else build(kind), config), Tensor(tokens(2, 5))
    given = (ids, ops.ones_like(ids)) if kind != "bert" else (ids, ops.ones_like(ids), ops.zeros_like(ids))
    weights = network.trainable_params()

    def loss(*inputs):
        return (network(*inputs) ** 2).sum()

    gradients = ms.grad(loss, None, ms.ParameterTuple(weights))(*given)
    for parameter, gradient in zip(weights, gradients):
        assert np.abs(gradient.asnumpy()).max() > 0, parameter.name


def test_more_tokens_than_positions_are_an_error():
    with pytest.raises(ValueError, match="198 tokens after a prefix of 3 are more than the 200 positions"):
        logits(inject(build("gpt2"), AS_WORDS), tokens(1, 198))
    with pytest.raises(ValueError, match="201 tokens, prefix included, are more than the 200 positions"):
        inject(build("llama"), AS_WORDS).new_cache(1, 198)
    network, ids = inject(bert(max_position_embeddings=8), AS_WORDS), Tensor(tokens(1, 6))
    with pytest.raises(ValueError, match="6 tokens after a prefix of 3 are more than the 8 positions"):
        network(ids, ops.ones_like(ids), ops.zeros_like(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_float16_gives_nearly_the_same(kind):
    whole, half, ids = build(kind), build(kind), tokens(2, 6)
    for parameter in half.get_parameters():
        parameter.set_dtype(ms.float16)
    for network in (whole, half):
        inject(network, AS_WORDS)
    found = logits(half, ids)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, logits(whole, ids), atol=0.05, rtol=0.02)


def test_a_slot_is_around_an_embedding():
    from mindpet.delta import PromptSlot

    with pytest.raises(TypeError, match=r"'words' must be an nn\.Embedding, but got 8 \(int\)"):
        PromptSlot(8)
    slot = PromptSlot(nn.Embedding(11, 8))
    assert not list(slot.get_parameters())
    assert (slot.hidden_size, slot.tokens) == (8, 0)
