"""The products of dense layers at sizes where tiles, panels, blocks of the depth and pieces of work begin and end."""

import ctypes

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mindpet.kernels import build
from tests.kernels import direct

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no kernels here: {build.why_not()}")

RANK = 3
# around a tile (8 rows, 48 columns), what a thread takes (4 panels, 48 strips), and a block of the depth (400 or 800)
EDGES = [1, 2, 7, 8, 9, 15, 16, 17, 47, 48, 49, 95, 97, 193, 383, 385, 399, 401, 801]
SIZE = st.sampled_from(EDGES) | st.integers(1, 60)


def close(found, expected):
    scale = 1 + np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(rows=SIZE, into=SIZE, out=SIZE, seed=st.integers(0, 99))
@example(rows=801, into=801, out=401, seed=0)
@example(rows=1, into=1700, out=49, seed=0)
@example(rows=50, into=1700, out=400, seed=0)
@example(rows=2000, into=30, out=780, seed=0)
def test_products_agree_with_float64(rows, into, out, seed):
    library = ctypes.CDLL(str(build.library()))
    generator = np.random.default_rng(seed)
    x, dy, w, bias, h, dh, a, b = (
        generator.standard_normal(shape, np.float32)
        for shape in (
            (rows, into),
            (rows, out),
            (out, into),
            out,
            (rows, RANK),
            (rows, RANK),
            (RANK, into),
            (out, RANK),
        )
    )
    factor = np.array([0.7], np.float32)

    def call(name, *inputs, shape):
        return direct.call(library, name, *inputs, shape=shape)

    wide_x, wide_dy, wide_w, wide_h, wide_dh, wide_a, wide_b = map(np.float64, (x, dy, w, h, dh, a, b))
    product = wide_x @ wide_w.T
    close(call("dense_forward", x, w, shape=(rows, out)), product)
    close(call("dense_forward_bias", x, w, bias, shape=(rows, out)), product + bias)
    close(call("dense_backward", dy, w, shape=(rows, into)), wide_dy @ wide_w)
    close(call("dense_backward_weight", dy, x, shape=(out, into)), wide_dy.T @ wide_x)
    with_branch = product + bias + 0.7 * wide_h @ wide_b.T
    close(call("lora_forward", x, w, bias, h, b, factor, shape=(rows, out)), with_branch)
    close(call("lora_backward", dy, w, dh, a, shape=(rows, into)), wide_dy @ wide_w + wide_dh @ wide_a)


@settings(max_examples=60, deadline=None)
@given(rows=SIZE, columns=SIZE, rank=st.integers(1, 17), seed=st.integers(0, 99))
@example(rows=801, columns=801, rank=16, seed=0)
@example(rows=257, columns=1, rank=9, seed=0)
def test_products_with_a_few_columns_agree_with_float64(rows, columns, rank, seed):
    library = ctypes.CDLL(str(build.library()))
    generator = np.random.default_rng(seed)
    x, a, b, h = (
        generator.standard_normal(shape, np.float32)
        for shape in ((rows, columns), (rank, columns), (columns, rank), (rows, rank))
    )
    wide_x, wide_a, wide_b, wide_h = map(np.float64, (x, a, b, h))
    close(direct.call(library, "narrow_forward", x, a, shape=(rows, rank)), wide_x @ wide_a.T)
    close(direct.call(library, "narrow_backward_weight", h, x, shape=(rank, columns)), wide_h.T @ wide_x)
    factor, more = np.array([0.7], np.float32), [(columns, rank)]
    found = direct.call(library, "narrow_backward", x, b, h, factor, shape=(rows, rank), more=more)
    close(found[: rows * rank].reshape(rows, rank), 0.7 * wide_x @ wide_b)
    close(found[rows * rank :].reshape(columns, rank), 0.7 * wide_x.T @ wide_h)


@pytest.mark.parametrize("name", ["dense_forward", "dense_backward"])
def test_a_row_is_the_same_in_any_company(name):
    """To the last bit, whatever tile, piece of work and batch it is in."""
    library = ctypes.CDLL(str(build.library()))
    generator = np.random.default_rng(1)
    x, w = generator.standard_normal((413, 900), np.float32), generator.standard_normal((900, 900), np.float32)
    whole = direct.call(library, name, x, w, shape=(413, 900))
    for first, last in ((0, 1), (5, 18), (100, 413), (412, 413)):
        part = direct.call(library, name, x[first:last], w, shape=(last - first, 900))
        np.testing.assert_array_equal(part, whole[first:last])


def test_an_empty_product_is_the_bias():
    library = ctypes.CDLL(str(build.library()))
    bias = np.arange(50, dtype=np.float32)
    nothing = np.zeros((9, 0), np.float32)
    found = direct.call(library, "dense_forward_bias", nothing, np.zeros((50, 0), np.float32), bias, shape=(9, 50))
    np.testing.assert_array_equal(found, np.tile(bias, (9, 1)))
    none = np.zeros((0, 9), np.float32)
    assert direct.call(library, "dense_forward", none, np.ones((5, 9), np.float32), shape=(0, 5)).shape == (0, 5)
    sums = direct.call(library, "dense_backward_weight", np.zeros((0, 4), np.float32), none, shape=(4, 9))
    np.testing.assert_array_equal(sums, 0.0)
