"""What a kernel does not take goes to MindSpore's operators: the values, dtypes and errors of the Cell it replaced."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import mindpet
from mindpet.kernels import build
from mindpet.models.attention import DotProductAttention, MaskedSoftmax
from mindpet.models.gpt2 import GELUTanh
from mindpet.models.head import CrossEntropy
from mindpet.models.llama import RMSNorm, SwiGLU, Turn
from mindpet.train.step import SquareSum, SummedLoss

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no kernels here: {build.why_not()}")

CELLS = {  # how to make the Cell, and the shapes of its inputs; an int32 stands for as many labels
    "gelu": (lambda: nn.GELU(approximate=False), [(3, 8)]),
    "gelu of tanh": (nn.GELU, [(3, 8)]),
    "layer_norm": (lambda: nn.LayerNorm((8,)), [(3, 8)]),
    "gelu_tanh": (GELUTanh, [(3, 8)]),
    "rms_norm": (lambda: weighted(RMSNorm(8, 1e-5)), [(3, 8)]),
    "gated_silu": (SwiGLU, [(3, 8), (3, 8)]),
    "rotary": (Turn, [(2, 3, 4, 8), (2, 3, 1, 8), (2, 3, 1, 8)]),
    "square_sum": (SquareSum, [(3, 8)]),
    "masked_softmax": (MaskedSoftmax, [(2, 2, 3, 8), (2, 1, 1, 8)]),
    "cross_entropy": (CrossEntropy, [(3, 8), "labels"]),
    "attention": (lambda: DotProductAttention(4, 2, 2, 0.0), [(2, 3, 8), (2, 5, 4), (2, 5, 4), (2, 1, 1, 5)]),
}


def weighted(norm):
    norm.weight.set_data(Tensor(np.linspace(-1, 2, 8), ms.float32))
    return norm


class Around(nn.Cell):
    """accelerate replaces what is inside of a network."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, *inputs):
        return self.cell(*inputs)


def plain_and_fast(name):
    make, _ = CELLS[name]
    fast = mindpet.accelerate(Around(make()))
    assert type(fast.cell).__name__.startswith("Fast")
    return Around(make()), fast


def inputs_of(name, rng, dtype=ms.float32):
    labels = Tensor([7, -100, 0], ms.int32)
    return [labels if shape == "labels" else Tensor(rng.standard_normal(shape), dtype) for shape in CELLS[name][1]]


class Marked(nn.Cell):
    """Stands where the kernel stands."""

    def construct(self, *inputs):
        return inputs[0] * 0.0 + 7.0


@pytest.mark.parametrize("name", CELLS)
def test_float32_of_known_shapes_goes_to_the_kernel(name, mode, rng):
    _, fast = plain_and_fast(name)
    fast.cell.fast = fast.cell.whole = Marked()
    inputs = inputs_of(name, rng)
    assert (fast(*inputs).asnumpy() == 7.0).all()
    values, slope = ms.jit(ops.value_and_grad(fast, 0))(*inputs)
    assert (values.asnumpy() == 7.0).all()
    assert (slope.asnumpy() == 0.0).all()


@pytest.mark.exhaustive_in_graph("graph-dtype0-*")
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", [ms.float16, ms.float64])
def test_other_dtypes_go_to_mindspore(name, dtype, mode, rng):
    plain, fast = plain_and_fast(name)
    inputs = inputs_of(name, rng, dtype)
    found, right = fast(*inputs), plain(*inputs)
    assert found.dtype == right.dtype
    tolerance = 2e-3 if dtype == ms.float16 else 1e-6
    np.testing.assert_allclose(found.asnumpy(), right.asnumpy(), atol=tolerance)


@pytest.mark.parametrize("name", CELLS)
def test_forced_to_float16_afterwards(name, mode, rng):
    plain, fast = plain_and_fast(name)
    inputs = inputs_of(name, rng)
    found, right = (network.to_float(ms.float16)(*inputs) for network in (fast, plain))
    assert found.dtype == right.dtype
    np.testing.assert_allclose(found.asnumpy(), right.asnumpy(), atol=5e-3)


@pytest.mark.exhaustive_in_graph("graph-False-*", "graph-True-layer_norm")
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("rank_known", [True, False])
def test_shapes_that_a_graph_does_not_know_go_to_mindspore(name, rank_known, mode, rng):
    plain, fast = plain_and_fast(name)
    inputs = inputs_of(name, rng)
    shapes = [[None, *value.shape[1:]] if rank_known else None for value in inputs]
    fast.set_inputs(*(Tensor(shape=shape, dtype=value.dtype) for shape, value in zip(shapes, inputs)))
    np.testing.assert_allclose(fast(*inputs).asnumpy(), plain(*inputs).asnumpy(), atol=1e-4)


def test_gradients_where_shapes_are_not_known(mode, rng):
    plain, fast = (nn.SequentialCell(nn.Dense(8, 8), nn.LayerNorm((8,)), nn.GELU(approximate=False)) for _ in range(2))
    ms.load_param_into_net(fast, plain.parameters_dict())
    mindpet.accelerate(fast)
    fast.set_inputs(Tensor(shape=[None, 8], dtype=ms.float32))
    for rows in (3, 5):
        x = Tensor(rng.standard_normal((rows, 8)), ms.float32)
        found, right = (ops.grad(net, None, net.trainable_params())(x) for net in (fast, plain))
        for each, expected in zip(found, right):
            np.testing.assert_allclose(each.asnumpy(), expected.asnumpy(), atol=1e-5)


def test_rms_norm_of_another_width_is_what_it_was(mode):
    """Width 1 broadcasts; any other that is not the weight's is an error, and nothing beyond the weight is read."""
    plain, fast = plain_and_fast("rms_norm")
    x = Tensor([[2.0], [-3.0]], ms.float32)
    assert fast(x).shape == (2, 8)
    np.testing.assert_allclose(fast(x).asnumpy(), plain(x).asnumpy(), atol=1e-6)
    with pytest.raises((ValueError, RuntimeError)):
        fast(Tensor(np.ones((2, 16)), ms.float32)).asnumpy()


def test_a_mask_that_widens_the_scores_does_so(mode, rng):
    plain, fast = plain_and_fast("masked_softmax")
    scores = Tensor(rng.standard_normal((1, 2, 3, 4)), ms.float32)
    for shape in [(2, 1, 3, 4), (1, 2, 3, 1), (1, 1, 1, 4), (3, 4), (4,)]:
        mask = Tensor(rng.standard_normal(shape), ms.float32)
        found, right = fast(scores, mask), plain(scores, mask)
        assert found.shape == right.shape
        np.testing.assert_allclose(found.asnumpy(), right.asnumpy(), atol=1e-6)


def test_cross_entropy_of_other_labels(mode, rng):
    """int64 labels have the kernel too; labels of another number are MindSpore's error, and not read."""
    plain, fast = plain_and_fast("cross_entropy")
    logits = Tensor(rng.standard_normal((3, 8)), ms.float32)
    labels = Tensor([7, -100, 0], ms.int64)
    expected = plain(logits, labels.astype(ms.int32)).asnumpy()
    np.testing.assert_allclose(fast(logits, labels).asnumpy(), expected, atol=1e-6)
    with pytest.raises((ValueError, RuntimeError)):
        fast(logits, Tensor([1, 2], ms.int32)).asnumpy()


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_loss_in_float16(order, mode, rng):
    network = nn.Dense(4, 3)
    columns = Tensor(rng.standard_normal((5, 4)), ms.float32), Tensor([0, 1, -100, 2, 1], ms.int32)
    expected, count = SummedLoss(network)(*columns)
    if order == "before":
        loss = mindpet.accelerate(SummedLoss(network).to_float(ms.float16))
    else:
        loss = mindpet.accelerate(SummedLoss(network)).to_float(ms.float16)
    found, counted = loss(*columns)
    np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), rtol=5e-3)
    assert float(counted) == float(count)
