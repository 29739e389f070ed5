"""How good predictions are."""

from dataclasses import dataclass

import numpy as np
from mindspore import nn

from mindpet.delta.r_drop import IGNORED
from mindpet.train.data import Encoded


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

    def as_record(self) -> dict[str, float]:
        """For a line of metrics."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1, "evaluation_loss": self.loss}


def predict_logits(network: nn.Cell, rows: Encoded, batch_size: int) -> np.ndarray:
    """Logits ``(rows, labels)`` without dropout, in the order of the rows."""
    network.set_train(False)
    outputs = [
        network(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]).asnumpy()
        for batch in rows.batches(np.arange(rows.count), batch_size)
    ]
    return np.concatenate(outputs)[: rows.count].astype(np.float64)


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
