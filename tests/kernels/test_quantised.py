"""The product with a quantised weight against float64, and where accelerate puts it."""

import copy
import ctypes

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn, ops

import mindpet
from mindpet import QLoRAConfig
from mindpet.delta.blockwise import DYNAMIC, LEVELS, Form, QuantisedProduct, dequantise, quantise
from mindpet.kernels import build, cells, operators
from tests.kernels import direct

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no kernels here: {build.why_not()}")

FORMS = [(bits, double) for bits in LEVELS for double in (False, True)]


class Probed(nn.Cell):
    """The sum of the product times a probe."""

    def __init__(self, product):
        super().__init__()
        self.product = product

    def construct(self, probe, *inputs):
        return (self.product(*inputs) * probe).sum()


def quantised(shape, bits, double, block_size, rng):
    weight = (rng.standard_normal(shape) * rng.uniform(0.1, 3)).astype(np.float32)
    form = Form(shape, bits, block_size, double)
    codes = quantise(weight, form)
    return form, list(map(Tensor, vars(codes).values())), dequantise(codes, form).astype(np.float64)


def check(form, codes, weight, rows, rng):
    product = operators.QuantisedProduct(form)
    x, probe = (rng.standard_normal((rows, size)).astype(np.float32) for size in form.shape[::-1])
    expected = x @ weight.T
    found = product(Tensor(x), *codes).asnumpy()
    np.testing.assert_allclose(found, expected, atol=2e-6 * (1 + np.abs(expected).max()) * np.sqrt(form.shape[1]))
    slope = ops.grad(Probed(product), 1)(Tensor(probe), Tensor(x), *codes).asnumpy()
    expected = probe @ weight
    np.testing.assert_allclose(slope, expected, atol=2e-6 * (1 + np.abs(expected).max()) * np.sqrt(form.shape[0]))


@pytest.mark.parametrize(("bits", "double"), FORMS)
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 80), st.integers(1, 300)),
    half=st.integers(1, 70),
    rows=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_agrees_with_float64_at_any_shape(bits, double, shape, half, rows, seed):
    generator = np.random.default_rng(seed)
    check(*quantised(shape, bits, double, 2 * half, generator), rows, generator)


@pytest.mark.parametrize(("bits", "double"), FORMS)
def test_agrees_with_float64(bits, double, mode, rng):
    check(*quantised((130, 131), bits, double, 64, rng), 50, rng)


@pytest.mark.parametrize(("bits", "double"), FORMS)
@pytest.mark.parametrize("block_size", [2, 64, 66, 4096])
def test_decodes_to_the_same_bits_as_numpy(bits, double, block_size, rng):
    """With more rows than a strip, and with fewer."""
    form, codes, weight = quantised((301, 67), bits, double, block_size, rng)
    eye = np.eye(67, dtype=np.float32)
    for rows in (eye, eye[:3]):
        found = operators.QuantisedProduct(form)(Tensor(rows), *codes).asnumpy()
        np.testing.assert_array_equal(found, weight.T[: len(rows)])


def test_inputs_of_the_same_shapes_may_be_of_different_weights(mode, rng):
    for shape in ((45, 1), (80, 1), (7, 1), (45, 1)):
        form, codes, weight = quantised(shape, "nf4", True, 90, rng)
        product = copy.deepcopy(operators.QuantisedProduct(form))
        check(form, codes, weight, 18, rng)
        assert product(Tensor(np.ones((18, 1), np.float32)), *codes).shape == (18, shape[0])


def test_rows_do_not_depend_on_how_they_are_shared_out(rng):
    form, codes, _ = quantised((256, 320), "nf4", True, 64, rng)
    x = Tensor(rng.standard_normal((2000, 320)), ms.float32)
    product = operators.QuantisedProduct(form)
    whole = product(x, *codes).asnumpy()
    np.testing.assert_array_equal(product(x, *codes).asnumpy(), whole)
    np.testing.assert_array_equal(product(x[-50:], *codes).asnumpy(), whole[-50:])


class Marked(nn.Cell):
    """Stands where the kernel stands."""

    def construct(self, x, *codes):
        return x * 0.0 + 7.0


def tuned(**options):
    generator = np.random.default_rng(2)
    network = nn.SequentialCell(nn.Dense(40, 40), nn.Tanh(), nn.Dense(40, 3))
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(generator.normal(0, 0.3, parameter.shape), ms.float32))
    mindpet.inject(network, QLoRAConfig(rank=2, targets=["0"], modules_to_save=["2"], **options))
    for parameter in network.trainable_params():
        parameter.set_data(Tensor(generator.normal(0, 0.3, parameter.shape), ms.float32))
    return network


@pytest.mark.parametrize("options", [{}, {"bits": "int8", "double_quantisation": False}])
def test_accelerate_puts_the_kernel_in(options, mode, rng):
    plain, fast = tuned(**options), mindpet.accelerate(tuned(**options))
    assert type(fast[0].product) is cells.FastQuantisedProduct
    assert [p.name for p in fast.get_parameters()] == [p.name for p in plain.get_parameters()]
    x = Tensor(rng.standard_normal((30, 40)), ms.float32)
    np.testing.assert_allclose(fast(x).asnumpy(), plain(x).asnumpy(), atol=1e-5)
    results = []
    for network in (plain, fast):
        weights = ms.ParameterTuple(network.trainable_params())
        results.append(ops.grad(Squares(network), 0, weights)(x))
    for theirs, ours in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1])):
        scale = np.abs(theirs.asnumpy()).max()
        np.testing.assert_allclose(ours.asnumpy() / scale, theirs.asnumpy() / scale, atol=1e-5)
    fast[0].product.fast = Marked()
    x = Tensor(rng.standard_normal((31, 40)), ms.float32)
    assert np.abs(fast(x).asnumpy() - plain(x).asnumpy()).max() > 1e-2


class Squares(nn.Cell):
    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, x):
        return ops.square(self.network(x)).sum()


@pytest.mark.parametrize("kind", ["float16", "unknown rows", "forced"])
def test_what_the_kernel_does_not_take_goes_to_mindspore(kind, mode, rng):
    form, codes, weight = quantised((40, 24), "nf4", True, 64, rng)
    fast = cells.FastQuantisedProduct(QuantisedProduct(form))
    fast.fast = Marked()
    x = Tensor(rng.standard_normal((6, 24)), ms.float32)
    if kind == "float16":
        x = x.astype(ms.float16)
    elif kind == "forced":
        fast.to_float(ms.float16)
    elif mode == "graph":
        shapes = [Tensor(shape=each.shape, dtype=each.dtype) for each in codes]
        fast.set_inputs(Tensor(shape=[None, 24], dtype=ms.float32), *shapes)
    else:
        pytest.skip("in PyNative mode every shape is known")
    found = fast(x, *codes)
    assert found.dtype == (ms.float32 if kind == "unknown rows" else ms.float16)
    np.testing.assert_allclose(found.asnumpy(), x.asnumpy() @ weight.T, atol=0.1 if "f" in kind else 1e-5)


def test_a_delta_goes_from_one_to_the_other(tmp_path, rng):
    fast = mindpet.accelerate(tuned())
    x = Tensor(rng.standard_normal((5, 40)), ms.float32)
    expected = fast(x).asnumpy()
    with mindpet.disable(fast):
        assert type(fast[0]) is nn.Dense
    np.testing.assert_array_equal(fast(x).asnumpy(), expected)
    np.testing.assert_allclose(mindpet.merge(fast)(x).asnumpy(), expected, atol=1e-5)
    mindpet.save_delta(mindpet.unmerge(fast), tmp_path)
    mindpet.eject(fast)
    assert fast[0].weight.shape == (40, 40)


def test_wrong_arguments_are_refused_and_not_read(rng):
    library = ctypes.CDLL(str(build.library()))
    form = Form((6, 10), "nf4", 4, True)
    codes = quantise(rng.standard_normal((6, 10)).astype(np.float32), form)
    sizes = np.array([6, 10, 4], np.int32)
    x = np.ones((3, 10), np.float32)
    right = [x, codes.codes, codes.absmax, codes.scales, codes.offset, form.table, DYNAMIC, sizes]
    direct.call(library, "quantised_forward", *right, shape=(3, 6))
    direct.call(library, "quantised_backward", x[:, :6], *right[1:], shape=(3, 10))
    wrong = [
        (0, x[:, :9]),
        (0, x.astype(np.float16)),
        (1, codes.codes[:-1]),
        (1, codes.codes.astype(np.int32)),
        (2, codes.absmax[:8]),
        (2, np.ones(14, np.float32)),
        (3, np.ones(2, np.float32)),
        (4, np.ones(2, np.float32)),
        (5, form.table[:255]),
        (5, np.ones((256, 3), np.float32)),
        (6, DYNAMIC[:255]),
        (7, sizes[:2]),
        (7, np.array([6, 10, 0], np.int32)),
        (7, np.array([6, 10, 8], np.int32)),
        (7, np.array([-6, -10, 4], np.int32)),
    ]
    for at, other in wrong:
        inputs = [*right[:at], other, *right[at + 1 :]]
        with pytest.raises(ValueError, match="returned 1"):
            direct.call(library, "quantised_forward", *inputs, shape=(3, 6))
    with pytest.raises(ValueError, match="returned 1"):
        direct.call(library, "quantised_backward", *right, shape=(3, 10))
