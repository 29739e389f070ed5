"""What a distributed run leaves: strategy files of the parallel compiler, and a checkpoint a rank with its slices."""

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.train import CheckpointConfig, ModelCheckpoint, RunContext
from mindspore.train.callback._callback import InternalCallbackParam

import mindpet
from mindpet import shard_like
from mindpet.graph import TrainableParamsCheckPoint, freeze_delta
from tests.parallel.compiler import compile_cell, devices
from tests.parallel.exported import sliced

BATCH = 8


class Network(nn.Cell):
    """Two layers that are tuned by LoRA, and a head that is tuned whole."""

    def __init__(self):
        super().__init__()
        self.up = nn.Dense(16, 64)
        self.down = nn.Dense(64, 16)
        self.head = nn.Dense(16, 6)

    def construct(self, x):
        return self.head(self.down(self.up(x)))


class Objective(nn.Cell):
    """Mean of squares, cut by the batch; the names of parameters stay."""

    def __init__(self, network, data_parallel):
        super().__init__(auto_prefix=False)
        self.network = network
        self.square = ops.Square().shard(((data_parallel, 1),))
        self.mean = ops.ReduceMean().shard(((data_parallel, 1),))

    def construct(self, x):
        return self.mean(self.square(self.network(x)))


def make(tuned, seed=None):
    """The network, before tuning or with LoRA; with numbers of its own if there is a seed."""
    network = Network()
    if tuned:
        mindpet.inject(network, mindpet.LoRAConfig(rank=2, alpha=4, targets=["up", "down"]))
        freeze_delta(network, "lora", exclude=["head.*"])
    if seed is not None:
        rng = np.random.default_rng(seed)
        for parameter in network.get_parameters():
            parameter.set_data(ms.Tensor(rng.normal(size=parameter.shape), ms.float32))
    return network


def training(network, data_parallel=1):
    """A training step with Adam."""
    return nn.TrainOneStepCell(Objective(network, data_parallel), nn.Adam(network.trainable_params(), 1e-3))


def numbers(network):
    """All parameters, by name."""
    return {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}


class Run:
    """A run on so many devices: it compiles, and so writes its strategy file, and has known numbers at some step.

    Attributes:
        strategy: path of the strategy file.
        layouts: device matrix and tensor map of each parameter of the training step, moments included.
    """

    def __init__(self, path, data_parallel, model_parallel, tuned, **config):
        self.world, self.tuned, self.strategy = data_parallel * model_parallel, tuned, str(path)
        network = make(tuned)
        rows, columns = (
            ((data_parallel, 1), (model_parallel, 1)),
            ((data_parallel, model_parallel), (1, model_parallel)),
        )
        with devices(self.world):
            ms.set_auto_parallel_context(strategy_ckpt_config={"save_file": self.strategy, **config})
            network.up.matmul.shard(rows)
            network.up.bias_add.shard(((data_parallel, model_parallel), (model_parallel,)))
            network.down.matmul.shard(columns)
            network.down.bias_add.shard(((data_parallel, 1), (1,)))
            network.head.matmul.shard(((data_parallel, 1), (1, 1)))
            network.head.bias_add.shard(((data_parallel, 1), (1,)))
            if tuned:
                shard_like(network)
            step = training(network, data_parallel)
            compile_cell(step, ms.Tensor(np.ones((BATCH, 16), np.float32)))
        self.layouts = {name: layout[:2] for name, layout in step.parameter_layout_dict.items()}

    def slice(self, name, value, rank):
        """What a rank has of a parameter."""
        return sliced(value, self.layouts[name], rank) if name in self.layouts else value

    def save(self, directory, whole, everything=False, file_format="ckpt", dtype=ms.float32, step=3, **config):
        """Each rank's file, ``rank_N/tuned-1_STEP``, of the callback that would write it there.

        Args:
            directory: where to.
            whole: a network with the numbers.
            everything: by ModelCheckpoint, which saves frozen weights and moments too.
            file_format: ckpt or safetensors.
            dtype: of the numbers.
            step: what the training loop is at.
            config: for CheckpointConfig.
        """
        values = numbers(whole)
        for rank in range(self.world):
            # one for each rank: the callback counts in it
            settings = CheckpointConfig(save_checkpoint_steps=1, integrated_save=False, format=file_format, **config)
            loop = InternalCallbackParam()
            loop.train_network = training(make(self.tuned))
            loop.cur_epoch_num, loop.cur_step_num, loop.batch_num, loop.epoch_num = 1, step, 10, 1
            for parameter in loop.train_network.get_parameters():
                value = values.get(parameter.name, parameter.asnumpy())
                part = ms.Tensor(self.slice(parameter.name, value, rank)).astype(dtype if value.ndim else ms.float32)
                parameter.set_dtype(part.dtype)
                parameter.set_data(part, slice_shape=True)
            kind = ModelCheckpoint if everything else TrainableParamsCheckPoint
            callback = kind(directory=str(directory / f"rank_{rank}"), prefix="tuned", config=settings)
            context = RunContext(loop)
            callback.begin(context)
            callback.step_end(context)
        return directory
