"""Run by test_checkpoint.py: saves a few megabytes at every step until it is killed."""

import os
import sys

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
from mindspore import nn
from mindspore.train import CheckpointConfig, Model

from mindpet.graph import TrainableParamsCheckPoint, freeze_modules


def network():
    return nn.SequentialCell(nn.Dense(16, 40000), nn.ReLU(), nn.Dense(40000, 2))


def main(directory, file_format, async_save):
    ms.set_device("CPU")
    net = network()
    freeze_modules(net, include=["0.bias"])
    data = np.ones((2, 16), np.float32), np.zeros(2, np.int32)
    dataset = ds.NumpySlicesDataset(data, shuffle=False).batch(2).repeat(100)
    config = CheckpointConfig(
        save_checkpoint_steps=1,
        keep_checkpoint_max=1,
        format=file_format,
        async_save={"no": False, "thread": "thread", "process": "process"}[async_save],
    )
    loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
    callback = TrainableParamsCheckPoint(directory, "kill", config)
    model = Model(net, loss, nn.SGD(net.trainable_params(), 1e-3))
    model.train(1000, dataset, callbacks=callback, dataset_sink_mode=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
