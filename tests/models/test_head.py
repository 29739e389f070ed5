"""Losses by the network itself: what its logits lose, whether or not the logits are ever made."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

import mindpet
from mindpet.graph.blocks import equal_blocks_as_one
from mindpet.kernels import build
from mindpet.kernels.cells import FastHeadLoss
from mindpet.train.step import SummedLoss
from tests.models import causal

VOCABULARY = 1600  # large enough for the kernel to take it, in more than one block
METHODS = {  # of the names of the attention's first layer and of the embedding
    "lora": lambda layer, words: mindpet.LoRAConfig(rank=2, targets=[layer]),
    "embedding": lambda layer, words: mindpet.LoRAConfig(rank=2, targets=[words]),
    "tokens": lambda layer, words: mindpet.TrainableTokensConfig(token_indices=[1, 4], targets=[words]),
    "prefix": lambda layer, words: mindpet.PrefixConfig(tokens=3, projection=False),
    "prompts": lambda layer, words: mindpet.PromptTuningConfig(tokens=3),
    "full": None,
}
needs_kernels = pytest.mark.skipif(not build.available(), reason=f"no kernels here: {build.why_not()}")


def batch(rows=3, length=21):
    generator = np.random.default_rng(3)
    ids = generator.integers(0, VOCABULARY, (rows, length)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    labels = np.where(generator.random(ids.shape) < 0.3, -100, np.roll(ids, -1, 1)).astype(np.int32)
    return Tensor(ids), Tensor(mask), Tensor(labels)


def tuned(family, method, **changes):
    network = causal.build(family, 1, vocab_size=VOCABULARY, **changes)
    if METHODS[method] is not None:
        mindpet.inject(
            network, METHODS[method](*(("*.q_proj", "*.embed_tokens") if "llama" in family else ("*.c_attn", "*.wte")))
        )
        generator = np.random.default_rng(5)
        for parameter in network.trainable_params():  # a delta that does something
            parameter.set_data(Tensor(0.2 * generator.standard_normal(parameter.shape), parameter.dtype))
    return network.set_train()


def slopes(loss, columns):
    """Loss, count, and the gradient of everything that trains."""
    step = ops.value_and_grad(loss, None, loss.network.trainable_params(), has_aux=True)
    with equal_blocks_as_one(loss):
        (total, count), gradients = step(*columns)
    return float(total), float(count), [each.asnumpy() for each in gradients]


@pytest.mark.parametrize("family", causal.FAMILIES)
def test_losses_are_those_of_the_logits(family, mode):
    network = tuned(family, "lora")
    ids, mask, labels = batch()
    wide = network(ids, mask).asnumpy().astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    chosen = np.take_along_axis(wide, np.maximum(labels.asnumpy(), 0)[..., None], -1)[..., 0]
    expected = np.where(labels.asnumpy() == -100, 0, np.log(np.exp(wide).sum(-1)) - chosen)
    losses = network(ids, mask, labels)
    assert losses.dtype == ms.float32
    np.testing.assert_allclose(losses.asnumpy(), expected, atol=1e-5)


def test_losses_of_a_network_in_float16_are_float32(mode):
    columns = batch()
    expected, count = SummedLoss(tuned("llama, tied", "full"))(*columns)
    total, same = SummedLoss(tuned("llama, tied", "full").to_float(ms.float16))(*columns)
    assert total.dtype == ms.float32
    assert float(same) == float(count)
    assert float(total) == pytest.approx(float(expected), rel=1e-2)
    assert float(total) != float(np.float16(float(total)))


@needs_kernels
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("llama, tied", method) for method in ("lora", "tokens", "prefix")),
        ("gpt2", "lora"),
        *(pytest.param("llama, tied", each, marks=pytest.mark.exhaustive) for each in ("embedding", "prompts", "full")),
        pytest.param("gpt2", "tokens", marks=pytest.mark.exhaustive),
    ],
)
def test_kernels_lose_the_same_and_what_trains_learns_the_same(family, method):
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        columns = batch()
        expected = slopes(SummedLoss(tuned(family, method)), columns)
        loss = mindpet.accelerate(SummedLoss(tuned(family, method)))
        taken = isinstance(loss.network.losses, FastHeadLoss)
        assert taken == (method not in ("embedding", "tokens", "full"))
        found = slopes(loss, columns)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-5)
    for ours, right in zip(found[2], expected[2], strict=True):
        scale = 1 + np.abs(right).max()
        np.testing.assert_allclose(ours / scale, right / scale, atol=1e-5)


@needs_kernels
def test_a_table_that_trains_later_has_its_gradient():
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        columns, both = batch(), []
        for fast in (False, True):
            network = tuned("llama, tied", "lora")
            loss = mindpet.accelerate(SummedLoss(network)) if fast else SummedLoss(network)
            network.tied_table.requires_grad = True
            both.append(slopes(loss, columns))
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    (expected, _, right), (found, _, ours) = both
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(ours) == len(right) > 1
    for one, other in zip(ours, right):
        np.testing.assert_allclose(one, other, atol=2e-5 * (1 + np.abs(other).max()))


@needs_kernels
@pytest.mark.exhaustive_in_graph("*-llama, tied")
@pytest.mark.parametrize("family", causal.FAMILIES)
def test_an_accelerated_network_still_predicts_and_scores(family, mode):
    """Outside of training, and for few rows, the kernel would only be slower."""
    network, (ids, mask, labels) = tuned(family, "lora"), batch()
    logits, losses = network(ids, mask).asnumpy(), network(ids, mask, labels).asnumpy()
    mindpet.accelerate(network)
    for training in (True, False):
        network.set_train(training)
        np.testing.assert_allclose(network(ids, mask).asnumpy(), logits, atol=1e-4)
        np.testing.assert_allclose(network(ids, mask, labels).asnumpy(), losses, atol=1e-4)
    few = network(ids[:1], mask[:1], labels[:1]).asnumpy()
    np.testing.assert_allclose(few, losses[:1], atol=1e-4)
