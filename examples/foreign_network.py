"""Inject LoRA into a network that nobody edits, train with plain MindSpore, and merge.

    python examples/foreign_network.py

The network stands for one from somebody else's package: nothing in it knows of MindPet. It learns the sum of its
inputs' squares; then LoRA learns another sum, with 13 % of the parameters. Shown are the dry run (mindpet.targets),
mindpet.inject, a training loop of one's own, saving and loading the delta, and merging: plain nn.Dense layers again,
the same outputs.
"""

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn, ops

import mindpet

OUTPUT = Path("runs/foreign_network")


class Block(nn.Cell):
    """Somebody else's: a residual block."""

    def __init__(self, size):
        super().__init__()
        self.norm = nn.LayerNorm((size,))
        self.up = nn.Dense(size, 4 * size)
        self.act = nn.Tanh()
        self.down = nn.Dense(4 * size, size)

    def construct(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class Regressor(nn.Cell):
    """Somebody else's: three blocks between two dense layers."""

    def __init__(self, inputs=8, size=32):
        super().__init__()
        self.embed = nn.Dense(inputs, size)
        self.blocks = nn.SequentialCell([Block(size) for _ in range(3)])
        self.head = nn.Dense(size, 1)

    def construct(self, x):  # (batch, inputs)
        return self.head(self.blocks(self.embed(x)))  # (batch, 1)


def rows(weights, seed, count=512):
    """Inputs and the weighted sum of their squares."""
    x = np.random.default_rng(seed).uniform(-1, 1, (count, len(weights))).astype(np.float32)
    return ms.Tensor(x), ms.Tensor((x**2 @ weights)[:, None].astype(np.float32))


def train(network, data, steps, learning_rate):
    """All rows in every step; the last loss."""
    optimizer = nn.Adam(network.trainable_params(), learning_rate)
    step = nn.TrainOneStepCell(nn.WithLossCell(network, nn.MSELoss()), optimizer).set_train()
    for _ in range(steps):
        loss = step(*data)
    network.set_train(False)
    return float(loss)


def error(network, data):
    """Mean squared error."""
    return float(((network(data[0]) - data[1]) ** 2).mean())


def main():
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(1)
    ones, others = np.ones(8), np.linspace(-1, 1, 8)
    network = Regressor()
    train(network, rows(ones, seed=1), 300, 3e-3)
    test = rows(others, seed=3)
    print(f"error on the old task {error(network, rows(ones, seed=2)):.3f}, on the new one {error(network, test):.3f}")
    weights = {parameter.name: parameter.asnumpy() for parameter in network.get_parameters()}

    config = mindpet.LoRAConfig(rank=4, alpha=8, targets=["blocks.*.up", "blocks.*.down"], modules_to_save=["head"])
    print("would be adapted:", ", ".join(mindpet.targets(network, config.targets).matched))
    mindpet.inject(network, config)
    trained = sum(parameter.size for parameter in network.trainable_params())
    print(f"{trained:,} of {sum(parameter.size for parameter in network.get_parameters()):,} parameters train")
    train(network, rows(others, seed=4), 300, 1e-2)
    tuned = error(network, test)
    mindpet.save_delta(network, OUTPUT / "delta")

    fresh = Regressor()
    ms.load_param_into_net(fresh, {name: ms.Parameter(value) for name, value in weights.items()}, strict_load=True)
    mindpet.load_delta(fresh, OUTPUT / "delta")
    print(f"error after tuning {tuned:.3f}, with the delta from the file {error(fresh, test):.3f}")
    assert np.allclose(error(fresh, test), tuned, rtol=1e-4)

    before = network(test[0]).asnumpy()
    mindpet.merge_and_eject(network)
    kinds = {type(cell).__name__ for _, cell in network.cells_and_names()}
    after = network(test[0]).asnumpy()
    print(f"merged: the cells are {', '.join(sorted(kinds))}; outputs differ by {np.abs(after - before).max():.1e}")
    assert np.allclose(after, before, atol=1e-4)
    assert set(weights) == {parameter.name for parameter in network.get_parameters()}
    assert ops.isfinite(network(test[0])).all()


if __name__ == "__main__":
    main()
