"""R-Drop in training: one batch that holds every sample twice, with different dropout, and the exact loss."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet.models.pretrained import open_pretrained
from mindpet.train.config import load_run
from mindpet.train.data import Rows, encode
from mindpet.train.dropout import DropoutKeys
from mindpet.train.language import Codec, encode_texts
from mindpet.train.run import build_network
from mindpet.train.step import IGNORED, SummedLoss
from tests.tiny import questions, sentences, write_language_model, write_model

ALPHA = 1.5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "classification": write_model(folder / "bert"),
        "language": write_language_model(folder / "llama", attention_dropout=0.1),
    }


def columns_of(model, task):
    """Five samples; of the classifier's, one has a label that does not count."""
    pretrained = open_pretrained(model)
    if task == "language":
        texts = [(("user", row["prompt"]), ("assistant", row["response"])) for row in questions(5)]
        encoded = encode_texts(Codec.of(pretrained), texts, 96, packing=False, blocks=False)
    else:
        rows = sentences(5)
        labels = [row["label"] for row in rows[:-1]] + ["unknown"]
        encoded = encode(
            pretrained.tokenizer(), Rows([row["text"] for row in rows], labels), ["land", "sea", "sky"], 16
        )
    return [values[: encoded.count] for values in encoded.columns.values()]


def network_of(model, mode, task):
    settings = [f"model.path={model}", "data.train=x", f"train.mode={mode}", "method.dropout=0.1", "method.rank=4"]
    network = build_network(load_run(None, settings), ["land", "sea", "sky"] if task == "classification" else [])
    for parameter in network.trainable_params():  # B of LoRA starts at zero, where the dropout before it shows nothing
        parameter.set_data(Tensor(np.random.default_rng(0).normal(0, 0.3, parameter.shape).astype(np.float32)))
    keys = DropoutKeys(network, seed=3)
    return network.set_train(), keys


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def loss_by_hand(first, second, labels, alpha):
    """The mean over both copies of the cross entropy, and over the pairs of the symmetric divergence, over 4."""
    first, second = log_softmax(first.astype(np.float64)), log_softmax(second.astype(np.float64))
    counted = labels != IGNORED
    index = np.where(counted, labels, 0)[..., None]
    entropies = [-np.take_along_axis(log_p, index, -1)[..., 0][counted] for log_p in (first, second)]
    forward = (np.exp(first) * (first - second)).sum(-1)[counted]
    backward = (np.exp(second) * (second - first)).sum(-1)[counted]
    return np.concatenate(entropies).mean() + alpha * (forward + backward).mean() / 4


@pytest.mark.parametrize("task", ["classification", "language"])
def test_the_loss_is_that_of_the_same_logits_by_hand(mode, models, task):
    columns = columns_of(models[task], task)
    network, keys = network_of(models[task], mode, task)
    keys.set_step(7)
    twice = [Tensor(np.repeat(column, 2, 0)) for column in columns]
    logits = network(*twice[:-1]).asnumpy()
    total, count = SummedLoss(network, ALPHA)(*map(Tensor, columns))
    assert float(count) == (columns[-1] != IGNORED).sum()
    expected = loss_by_hand(logits[0::2], logits[1::2], columns[-1], ALPHA)
    assert float(total) / float(count) == pytest.approx(expected, rel=1e-5)
    without = loss_by_hand(logits[0::2], logits[1::2], columns[-1], 0)
    assert expected > without + 1e-4, "the two copies disagree"


@pytest.mark.exhaustive_in_graph("*-language")
@pytest.mark.parametrize("task", ["classification", "language"])
def test_an_alpha_of_zero_is_the_plain_loss(mode, models, task):
    columns = columns_of(models[task], task)
    network, keys = network_of(models[task], mode, task)
    keys.set_step(7)
    logits = network(*map(Tensor, columns[:-1])).asnumpy()
    total, count = SummedLoss(network, 0.0)(*map(Tensor, columns))
    expected = loss_by_hand(logits, logits, columns[-1], 0)
    assert float(total) / float(count) == pytest.approx(expected, rel=1e-5)


class Recorder(nn.Cell):
    """Notes the sizes of the batches that pass."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network, self.sizes = network, []

    def construct(self, *inputs):
        self.sizes.append(inputs[0].shape[0])
        return self.network(*inputs)


@pytest.mark.parametrize("task", ["classification", "language"])
def test_both_copies_pass_in_one_batch(models, task):
    columns = columns_of(models[task], task)
    recorder = Recorder(network_of(models[task], "pynative", task)[0])
    SummedLoss(recorder, ALPHA)(*map(Tensor, columns))
    assert recorder.sizes == [10]


@pytest.mark.exhaustive_in_graph("*-classification")
@pytest.mark.parametrize("task", ["classification", "language"])
def test_the_two_copies_of_every_sample_get_different_masks(mode, models, task):
    columns = columns_of(models[task], task)
    network, keys = network_of(models[task], mode, task)
    for step in range(3):
        keys.set_step(step)
        logits = network(*(Tensor(np.repeat(column, 2, 0)) for column in columns[:-1])).asnumpy()
        apart = np.abs(logits[0::2] - logits[1::2]).reshape(5, -1).max(1)
        assert (apart > 1e-4).all()
    network.set_train(False)
    logits = network(*(Tensor(np.repeat(column, 2, 0)) for column in columns[:-1])).asnumpy()
    np.testing.assert_allclose(logits[0::2], logits[1::2], atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 40, 64), (8 * 40, 64), (8, 4, 20, 20)])
def test_the_masks_of_the_copies_are_independent(mode, shape):
    """Whether a network keeps the batch as its first axis or has rows of tokens, neighbours are the copies."""
    p = 0.25
    network = nn.SequentialCell(nn.Dropout(p=p))
    keys = DropoutKeys(network, seed=11)
    network.set_train()
    products = []
    for step in range(12):
        keys.set_step(step)
        kept = (network(ops.ones(shape)).asnumpy() != 0).reshape(4, 2, -1)
        products.append((kept[:, 0] - (1 - p)) * (kept[:, 1] - (1 - p)))
    products = np.array(products) / (p * (1 - p))  # correlations
    assert abs(products.mean()) < 5 / np.sqrt(products.size)
    assert ms.get_context("mode") == (ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
