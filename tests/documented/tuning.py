"""What the examples leave out: a data set, a training loop, and a look at what it changed and saved."""

from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
from mindspore import Tensor, nn
from mindspore.train import Model

from mindpet.graph import TrainableParamsCheckPoint


@dataclass
class Outcome:
    """A tuned network, the names of what trained and of what changed, and what its newest checkpoint holds."""

    network: nn.Cell
    trained: set[str]
    changed: set[str]
    base_file: str
    delta_file: str
    saved: dict[str, ms.Parameter]


def rows_and_labels(rng, size, classes=3, samples=16):
    return rng.normal(size=(samples, size)).astype(np.float32), rng.integers(0, classes, size=samples).astype(np.int32)


def tune(network, freeze, columns, directory: Path, loss=None, batch=4, epochs=2, rate=1e-2) -> Outcome:
    """Freeze, train with Model.train, save with TrainableParamsCheckPoint."""
    base_file = str(directory / "base.ckpt")
    ms.save_checkpoint(network, base_file)
    before = {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}
    freeze(network)
    trained = network.trainable_params()
    dataset = ds.NumpySlicesDataset(columns, shuffle=False).batch(batch)
    ckpt_callback = TrainableParamsCheckPoint(directory=str(directory / "delta"))
    model = Model(network, loss, nn.Adam(trained, learning_rate=rate))
    model.train(epochs, dataset, callbacks=ckpt_callback, dataset_sink_mode=False)
    changed = {p.name for p in network.get_parameters() if (p.asnumpy() != before[p.name]).any()}
    newest = ckpt_callback.latest_ckpt_file_name
    return Outcome(network, {p.name for p in trained}, changed, base_file, newest, ms.load_checkpoint(newest))


def cross_entropy():
    return nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")


def assert_restores(outcome, fresh, *inputs):
    """A new network with the base checkpoint and the delta on top answers bit for bit as the tuned one."""
    inputs = [Tensor(value) for value in inputs]
    tuned = outcome.network.set_train(False)(*inputs).asnumpy()
    fresh.set_train(False)
    ms.load_param_into_net(fresh, ms.load_checkpoint(outcome.base_file))
    assert (fresh(*inputs).asnumpy() != tuned).any()
    not_loaded, _ = ms.load_param_into_net(fresh, outcome.saved)
    assert not set(not_loaded) & outcome.trained
    np.testing.assert_array_equal(fresh(*inputs).asnumpy(), tuned)
