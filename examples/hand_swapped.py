"""Swap dense layers for LoRADense by hand, in a training script of your own.

    python examples/hand_swapped.py

A small attention network learns which of two marks comes first in a sequence. It is trained whole on one pair of
marks; then LoRA on query and value, and the head, learn another pair. Shown are the three calls that a script needs:
LoRADense in the place of nn.Dense, freeze_delta before the optimizer is made, and TrainableParamsCheckPoint in the
place of ModelCheckpoint. At the end the base checkpoint and the small one are loaded, one on top of the other, into a
new network.
"""

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.dataset import NumpySlicesDataset
from mindspore.train import Accuracy, CheckpointConfig, Model

from mindpet.delta import LoRADense
from mindpet.graph import TrainableParamsCheckPoint, freeze_delta

WORDS, LENGTH, HIDDEN = 12, 8, 32
OUTPUT = Path("runs/hand_swapped").resolve()  # TrainableParamsCheckPoint wants an absolute path


class Classifier(nn.Cell):
    """One block of attention, the mean over the words, and a head. `dense` makes query and value."""

    def __init__(self, dense):
        super().__init__()
        self.words = nn.Embedding(WORDS, HIDDEN)
        self.places = nn.Embedding(LENGTH, HIDDEN)
        self.query = dense(HIDDEN, HIDDEN)  # before: nn.Dense(HIDDEN, HIDDEN)
        self.key = nn.Dense(HIDDEN, HIDDEN)
        self.value = dense(HIDDEN, HIDDEN)  # before: nn.Dense(HIDDEN, HIDDEN)
        self.head = nn.Dense(HIDDEN, 2)
        self.order = ms.Tensor(np.arange(LENGTH), ms.int32)

    def construct(self, ids):  # (batch, seq)
        x = self.words(ids) + self.places(self.order)  # (batch, seq, hidden)
        scores = ops.bmm(self.query(x), self.key(x).swapaxes(1, 2)) / HIDDEN**0.5  # (batch, seq, seq)
        mixed = x + ops.bmm(ops.softmax(scores, -1), self.value(x))  # (batch, seq, hidden)
        return self.head(ops.relu(mixed).mean(1))  # (batch, 2)


def lora(inputs, outputs):
    """The layer that takes the place of nn.Dense: the same arguments, and two more."""
    return LoRADense(inputs, outputs, lora_rank=4, lora_alpha=8, compute_dtype=ms.float32)


def rows(first, second, count, seed):
    """Sequences of fillers with two marks in them; the label says whether `first` comes first."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(4, WORDS, (count, LENGTH))
    for row in ids:
        row[generator.choice(LENGTH, 2, replace=False)] = generator.permutation([first, second])
    labels = (ids == first).argmax(1) < (ids == second).argmax(1)
    columns = {"ids": ids.astype(np.int32), "label": labels.astype(np.int32)}
    return NumpySlicesDataset(columns, shuffle=False).batch(32)


def train(network, data, epochs, learning_rate, callbacks=None):
    """As any MindSpore script does it."""
    optimizer = nn.Adam(network.trainable_params(), learning_rate)
    model = Model(network, nn.CrossEntropyLoss(), optimizer, metrics={"accuracy": Accuracy()})
    model.train(epochs, data, callbacks=callbacks)
    return model


def accuracy(network, data):
    """Share of the rows that are classified right."""
    return Model(network, nn.CrossEntropyLoss(), metrics={"accuracy": Accuracy()}).eval(data)["accuracy"]


def main():
    ms.set_context(mode=ms.GRAPH_MODE)  # compiles first, then a step is several times faster
    ms.set_seed(1)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    base = Classifier(nn.Dense)
    train(base, rows(0, 1, 1024, seed=1), epochs=8, learning_rate=5e-3)
    ms.save_checkpoint(base, str(OUTPUT / "base.ckpt"))
    test = rows(2, 3, 256, seed=3)
    before = accuracy(base, test)
    print(f"the base on its own marks: {accuracy(base, rows(0, 1, 256, seed=2)):.1%}, on new ones: {before:.1%}")

    network = Classifier(lora)
    ms.load_param_into_net(network, ms.load_checkpoint(str(OUTPUT / "base.ckpt")))
    freeze_delta(network, mode="lora", exclude=["*head*"])  # before the optimizer is made
    print("what trains:", ", ".join(parameter.name for parameter in network.trainable_params()))
    config = CheckpointConfig(save_checkpoint_steps=32, keep_checkpoint_max=1)
    saves = TrainableParamsCheckPoint(str(OUTPUT), prefix="marks", config=config)  # before: ModelCheckpoint
    train(network, rows(2, 3, 1024, seed=4), epochs=8, learning_rate=1e-2, callbacks=[saves])
    tuned = accuracy(network, test)

    fresh = Classifier(lora)
    ms.load_param_into_net(fresh, ms.load_checkpoint(str(OUTPUT / "base.ckpt")))
    ms.load_param_into_net(fresh, ms.load_checkpoint(saves.latest_ckpt_file_name))
    small, whole = Path(saves.latest_ckpt_file_name), OUTPUT / "base.ckpt"
    print(f"tuned: {tuned:.1%}, from the files: {accuracy(fresh, test):.1%}")
    print(f"{whole.name} has {whole.stat().st_size:,} bytes, {small.name} {small.stat().st_size:,}")
    assert accuracy(fresh, test) == tuned
    assert tuned > before


if __name__ == "__main__":
    main()
