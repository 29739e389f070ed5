"""Write the strategies that cut adapted layers over eight devices, and see what is refused, on one CPU.

    python examples/sharded.py

MindSpore runs semi-auto parallel mode on Ascend devices and GPUs only: on a CPU nothing is cut, strategies are kept and
otherwise ignored. So this shows what can be seen here: the strategies that mindpet.parallel gives to each operator, the
slices of the weights that follow, that a strategy that does not fit is refused at once, and that the outputs stay.
docs/parallel.md says what was compiled and what was executed.
"""

import mindspore as ms
import numpy as np
from mindspore import nn

import mindpet
from mindpet.delta import LoRADense
from mindpet.parallel import ParallelConfig, strategies

BOTH = ParallelConfig(data_parallel=2, model_parallel=4)


def one_layer():
    """The user document's layer, cut in two along the batch and in four along the rows of its weight."""
    layer = LoRADense(784, 512, lora_rank=8, lora_alpha=16, compute_dtype=ms.float32)
    x = ms.Tensor(np.random.default_rng(0).standard_normal((4, 784)).astype(np.float32))
    before = layer(x).asnumpy()
    given = strategies(layer, BOTH)
    for operator, strategy in given.items():
        print(f"  {operator}: {strategy}")
    layer.shard(**given)
    rows, columns = given["strategy_org_dense_matmul"][1]
    print(f"  each device holds {512 // rows} x {784 // columns} of the weight of 512 x 784")
    assert (rows, columns) == (4, 1)
    assert np.array_equal(layer(x).asnumpy(), before)  # a plain run takes no notice
    try:
        layer.shard(strategy_org_dense_matmul=((2, 1), (3, 1)))
    except ValueError as error:
        print(f"  refused: {error}")
    else:
        raise AssertionError("512 rows cannot be cut in three")


def whole_network():
    """A feed-forward network: rows in the first layer and columns in the second leave nothing to move in between."""
    network = nn.SequentialCell(nn.Dense(64, 256), nn.Dense(256, 64))
    network[0].matmul.shard(((2, 1), (4, 1)))  # what the network's author wrote
    network[1].matmul.shard(((2, 4), (1, 4)))
    mindpet.inject(network, mindpet.LoRAConfig(rank=8, targets=["*"]))
    for path, given in mindpet.shard_like(network).items():  # the LoRA is cut to match
        a, b = given["strategy_lora_a_matmul"][1], given["strategy_lora_b_matmul"][1]
        print(f"  layer {path}: A (rank, in) is cut {a}, B (out, rank) is cut {b}")
        assert (a, b) == (((1, 1), (4, 1)) if path == "0" else ((1, 4), (1, 1)))


if __name__ == "__main__":
    print("One layer, two by four devices:")
    one_layer()
    print("A whole network:")
    whole_network()
