"""How good predictions are."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import nn

from mindpet.delta.r_drop import IGNORED
from mindpet.kernels import accelerate
from mindpet.parallel.group import ALONE, Group
from mindpet.train.compiled import compile_once
from mindpet.train.data import Encoded
from mindpet.train.step import SummedScores


@dataclass(frozen=True)
class Scores:
    """Of a classifier on labelled rows.

    Attributes:
        accuracy: share of rows that are right.
        macro_f1: mean over the labels that occur of the harmonic mean of precision and recall.
        loss: mean cross entropy.
        rows: how many counted.
        confusion: ``(labels, labels)``, true label down, predicted label across.
    """

    accuracy: float
    macro_f1: float
    loss: float
    rows: int
    confusion: np.ndarray

    @property
    def merit(self) -> list[float]:
        """What decides which evaluation is the best: the accuracy, and of equal ones the loss."""
        return [self.accuracy, -self.loss]

    def as_record(self) -> dict[str, float]:
        """For a line of metrics."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1, "evaluation_loss": self.loss}

    def in_full(self, labels: list[str]) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**self.as_record(), "rows": self.rows, "labels": labels, "confusion": self.confusion.tolist()}


@dataclass(frozen=True)
class LanguageScores:
    """Of a language model on texts.

    Attributes:
        loss: mean cross entropy of the tokens that count, in nats.
        token_accuracy: share of them that are the most probable token.
        tokens: how many counted.
    """

    loss: float
    token_accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss: among how many equally probable tokens the model hesitates."""
        return math.exp(min(self.loss, 700.0))  # e**710 is more than a float holds

    @property
    def merit(self) -> list[float]:
        """What decides which evaluation is the best: the loss, lower is better."""
        return [-self.loss]

    def as_record(self) -> dict[str, float]:
        """For a line of metrics."""
        return {
            "perplexity": self.perplexity,
            "token_accuracy": self.token_accuracy,
            "evaluation_loss": self.loss,
        }

    def in_full(self, labels: list[str]) -> dict[str, Any]:
        """All of it, for JSON; there are no labels."""
        return {**self.as_record(), "tokens": self.tokens}


Scorer = Callable[[Encoded, int], Scores | LanguageScores]  # of rows, so many at a time


def scorer(network: nn.Cell, task: str, group: Group = ALONE) -> Scorer:
    """What scores a network on rows, without dropout; each process of `group` a part of them, all with the result."""
    if task == "classification":
        return lambda rows, batch_size: score(
            predict_logits(network, rows, batch_size, group), rows.columns["labels"][: rows.count]
        )
    sums = accelerate(SummedScores(network))
    return lambda rows, batch_size: score_tokens(sums, rows, batch_size, group)


def score_tokens(sums: SummedScores, rows: Encoded, batch_size: int, group: Group = ALONE) -> LanguageScores:
    """Scores over all tokens that count; the logits of no more than one batch are held."""
    sums.set_train(False)
    total = np.zeros(3)
    for batch in rows.batches(group.share(rows.count), group.part_of(batch_size)):
        compile_once(sums, *batch.values())
        total += [float(value) for value in sums(*batch.values())]
    loss, hits, count = group.gather(total).sum(0)
    return LanguageScores(float(loss / count), float(hits / count), int(count))


def predict_logits(network: nn.Cell, rows: Encoded, batch_size: int, group: Group = ALONE) -> np.ndarray:
    """Logits ``(rows, labels)`` without dropout, in the order of the rows."""
    network.set_train(False)
    own = group.share(rows.count)
    outputs: list[np.ndarray] = []
    for batch in rows.batches(own, group.part_of(batch_size)):
        columns = list(batch.values())[:-1]
        compile_once(network, *columns)
        outputs.append(network(*columns).asnumpy())
    together = group.gather(np.concatenate(outputs)[: len(own)])  # (processes, rows of each, labels)
    return together.reshape(-1, together.shape[-1])[: rows.count].astype(np.float64)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis.

    >>> probabilities(np.array([0.0, 0.0])).tolist()
    [0.5, 0.5]
    """
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def score(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Scores of `logits` ``(rows, labels)`` against `labels` ``(rows,)``; rows labelled -100 do not count.

    >>> score(np.array([[2.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), np.array([0, 1, 1])).accuracy
    0.6666666666666666
    """
    counts = labels != IGNORED
    logits, labels = logits[counts], labels[counts]
    classes = logits.shape[-1]
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, logits.argmax(-1)), 1)
    hits, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    f1 = 2 * hits[true > 0] / (true + predicted)[true > 0]
    likelihood = probabilities(logits)[np.arange(len(labels)), labels]
    loss = float(-np.log(np.maximum(likelihood, 1e-12)).mean()) if len(labels) else float("nan")
    accuracy = float(hits.sum() / len(labels)) if len(labels) else float("nan")
    return Scores(accuracy, float(f1.mean()) if len(f1) else float("nan"), loss, len(labels), confusion)
