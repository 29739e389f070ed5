"""Every kernel and its gradients against float64, at ordinary sizes and at the ends of what floats hold."""

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn, ops

from mindpet.kernels import build, operators
from tests.kernels import formulas

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no kernels here: {build.why_not()}")

EPSILON = 0.1  # of a row that hardly varies, a smaller one would magnify the last bit
OPERATORS = {
    "gelu": (operators.GELU, formulas.gelu),
    "gelu_tanh": (operators.TanhGELU, formulas.gelu_tanh),
    "gated_silu": (operators.GatedSiLU, formulas.gated_silu),
    "rotary": (operators.Rotary, formulas.rotary),
    "layer_norm": (lambda: operators.LayerNorm(EPSILON), formulas.layer_norm),
    "rms_norm": (lambda: operators.RMSNorm(EPSILON), formulas.rms_norm),
    "masked_softmax": (operators.MaskedSoftmax, formulas.masked_softmax),
    "cross_entropy": (operators.CrossEntropy, formulas.cross_entropy),
    "head_loss": (operators.HeadLoss, formulas.head_loss),
    "dropout": (lambda: operators.Dropout(1.25), formulas.dropout),
    "product": (operators.Product, formulas.product),
    "biased_product": (operators.BiasedProduct, formulas.biased_product),
    "lora": (lambda: operators.LoRAProduct(0.7), formulas.lora),
    "attention": (lambda: operators.Attention(6, 2, 0.3, 1.25), formulas.attention),
}
# the inputs that get no gradient
CONSTANT = {"rotary": {1, 2}, "masked_softmax": {1}, "cross_entropy": {1}, "head_loss": {2}}
CONSTANT |= {"dropout": {1, 2}, "attention": {3, 4, 5}}
PRODUCTS = ("product", "biased_product", "lora")
MASKS = [(1, 1, 1), (2, 1, 1), (2, 1, 3), (1, 4, 3), (2, 4, 3)]


def inputs_for(name, shape, rng, mask=(2, 1, 1)):
    def normal(*sizes):
        return (2 * rng.standard_normal(sizes)).astype(np.float32)

    if name == "masked_softmax":
        return normal(2, 4, 3, shape[-1]), normal(*mask, shape[-1])
    if name == "rotary":
        rows, size = int(np.prod(shape[:-1])), 2 * shape[-1]
        return normal(2, rows, 3, size), normal(2, rows, 1, size), normal(2, rows, 1, size)
    if name == "cross_entropy":
        rows = int(np.prod(shape[:-1]))
        labels = rng.integers(0, shape[-1], rows).astype(np.int32)
        labels[::3] = -100
        return normal(rows, shape[-1]), labels
    if name == "head_loss":
        return normal(int(np.prod(shape[:-1])), 5), normal(shape[-1], 5), inputs_for("cross_entropy", shape, rng)[1]
    words = rng.integers(-(2**31), 2**31, 4096).astype(np.int32)
    keys = np.array([rng.integers(-(2**31), 2**31), rng.integers(-(2**31), 2**31), -(2**30), 1], np.int32)
    if name == "dropout":
        return normal(*shape), words, keys
    if name == "product":
        return normal(int(np.prod(shape[:-1])), shape[-1]), normal(5, shape[-1])
    if name == "biased_product":
        return normal(int(np.prod(shape[:-1])), shape[-1]), normal(5, shape[-1]), normal(5)
    if name == "lora":
        rows, into = int(np.prod(shape[:-1])), shape[-1]
        return normal(rows, into), normal(5, into), normal(5), normal(3, into), normal(5, 3)
    if name == "attention":
        queries, dim = int(np.prod(shape[:-1])), 1 + shape[-1] // 8
        hidden = np.where(rng.random((2, 1, queries, shape[-1])) < 0.3, np.float32(-50), np.float32(0))
        key, value = normal(2, shape[-1], 2 * dim), normal(2, shape[-1], 2 * dim)
        return normal(2, queries, 6 * dim), key, value, hidden, words if shape[-1] % 2 else words[:1], keys
    count = {"gelu": 0, "gelu_tanh": 0, "gated_silu": 0, "layer_norm": 2, "rms_norm": 1}[name]
    second = (normal(*shape),) if name == "gated_silu" else ()
    return (normal(*shape), *second, *(normal(shape[-1]) for _ in range(count)))


def tensors(values):
    return [Tensor(value) for value in values]


class Probed(nn.Cell):
    """The sum of a kernel's output times a probe."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def construct(self, probe, *inputs):
        return (self.operator(*inputs) * probe).sum()


def check(name, values, rng):
    make, formula = OPERATORS[name]
    operator = make()
    right = formula(*(value.astype(np.float64) if value.dtype.kind == "f" else value for value in values))
    # scores take up the rounding of a mask that is larger than they, and a branch that of its inner product
    close = {"attention": 1e-5, "lora": 3e-5}.get(name, 2e-6)
    np.testing.assert_allclose(operator(*tensors(values)).asnumpy(), right, atol=close, rtol=close)
    wanted = [index for index in range(len(values)) if index not in CONSTANT.get(name, ())]
    probe = rng.standard_normal(right.shape).astype(np.float32)
    gradient = ops.grad(Probed(operator), tuple(index + 1 for index in wanted))
    found = gradient(Tensor(probe), *tensors(values))
    for index, each in zip(wanted, found if isinstance(found, tuple) else (found,)):
        expected = formulas.derivative(formula, values, probe, index)
        scale = 1 + np.abs(expected).max(initial=0)
        np.testing.assert_allclose(each.asnumpy() / scale, expected / scale, atol=1e-5, err_msg=f"input {index}")


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 3, 40)])
def test_agrees_with_float64(name, shape, mode, rng):
    check(name, inputs_for(name, shape, rng), rng)


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_may_be_one_for_all(mask, mode, rng):
    check("masked_softmax", inputs_for("masked_softmax", (7,), rng, mask), rng)


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 999))
def test_agrees_with_float64_at_any_shape(name, shape, seed):
    generator = np.random.default_rng(seed)
    check(name, inputs_for(name, tuple(shape), generator), generator)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in ("dropout", "attention")])
def test_many_rows_do_not_depend_on_how_they_are_shared_out(name, rng):
    """Large enough for all threads: each row is what it is alone, and a second run is the same to the bit."""
    make, _ = OPERATORS[name]
    operator = make()
    values = inputs_for(name, (4000, 130), rng)
    if name == "masked_softmax":
        values = (rng.standard_normal((8, 12, 64, 64), np.float32), rng.standard_normal((8, 1, 1, 64), np.float32))
    whole = operator(*tensors(values)).asnumpy()
    by_row = {0, *CONSTANT.get(name, ())} | ({1} if name == "gated_silu" else set())
    part = [value[-5:] if index in by_row else value for index, value in enumerate(values)]
    alone = operator(*tensors(part)).asnumpy()
    # LoRA's inner product is MindSpore's, whose last bits depend on the number of rows
    np.testing.assert_allclose(whole[-5:], alone, rtol=0, atol=2e-4 if name == "lora" else 0)
    gradient = ops.grad(Probed(operator), tuple(range(1, len(values) + 1)))
    runs = [gradient(Tensor(np.ones_like(whole)), *tensors(values)) for _ in range(2)]
    for first, second in zip(*runs):
        np.testing.assert_array_equal(first.asnumpy(), second.asnumpy())


def test_sums_over_many_rows_are_right(rng):
    x, gamma, beta = inputs_for("layer_norm", (50_000, 5), rng)
    probe = rng.standard_normal(x.shape).astype(np.float32) + 1
    gradient = ops.grad(Probed(operators.LayerNorm(EPSILON)), (2, 3))
    for_gamma, for_beta = gradient(Tensor(probe), *tensors((x, gamma, beta)))
    wide = x.astype(np.float64)
    normal = formulas.layer_norm(wide, 1.0, 0.0)
    np.testing.assert_allclose(for_gamma.asnumpy(), (normal * probe).sum(0), atol=0.02)  # sums of 50,000
    np.testing.assert_allclose(for_beta.asnumpy(), probe.astype(np.float64).sum(0), rtol=1e-6)


def test_erf_is_right_to_2e_7():
    x = np.concatenate([np.linspace(-12, 12, 200_001), [1e-30, -1e-30, 0.0]]).astype(np.float32)
    wide = x.astype(np.float64)
    found = operators.GELU()(Tensor(x)).asnumpy()
    error = np.abs(found - formulas.gelu(wide)) / np.maximum(np.abs(wide), 1.0)  # of the distribution function
    assert error.max() < 2e-7


ENDS = np.array([1e4, -1e4, 1e30, -1e30, 0.0, 88.0, -88.0, 1e-30], np.float32)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "gated_silu"])
def test_activations_have_their_limits(name, mode):
    """Huge and infinite entries: the identity on the right, 0 on the left, slopes 1 and 0."""
    x = np.append(ENDS, [np.inf, -np.inf]).astype(np.float32)
    operator = OPERATORS[name][0]()
    more = [np.ones_like(x)] if name == "gated_silu" else []
    found = operator(*tensors([x, *more])).asnumpy()
    slope = ops.grad(Probed(operator), 1)(Tensor(np.ones_like(x)), *tensors([x, *more])).asnumpy()
    far = np.abs(x) > 50
    np.testing.assert_allclose(found[far], np.maximum(x, 0)[far], atol=1e-30)
    np.testing.assert_array_equal(slope[far], (x > 0)[far])
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", [n for n in OPERATORS if n not in ("dropout", "attention", "rotary", *PRODUCTS)])
def test_nan_goes_through(name, mode, rng):
    values = inputs_for(name, (4, 40), rng)
    first = values[0].reshape(-1, values[0].shape[-1])
    first[1, 3] = np.nan  # in the second row, whose label counts
    operator = OPERATORS[name][0]()
    found = operator(*tensors(values))
    slope = ops.grad(Probed(operator), 1)(ops.ones_like(found), *tensors(values)).asnumpy()
    found = found.asnumpy()
    entry = (1, 3) if name in ("gelu", "gelu_tanh", "gated_silu") else (1,)
    assert np.isnan(found.reshape(-1, found.shape[-1] if found.ndim > 1 else 1)[entry]).all()
    assert np.isnan(slope.reshape(first.shape)[entry]).all()
    rest = np.delete(found.reshape(len(first), -1), 1, axis=0)
    assert np.isfinite(rest).all()


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(("rows", "into", "out", "rank"), [(200, 1700, 70, 8), (96, 832, 64, 1), (97, 830, 33, 50)])
def test_deep_products_add_up_their_blocks(name, rows, into, out, rank, rng):
    """More columns than a block has: a branch's columns begin in the middle of one, and at the end."""
    shapes = [(rows, into), (out, into), (out,), (rank, into), (out, rank)]
    inputs = {"product": 2, "biased_product": 3, "lora": 5}[name]
    values = [rng.standard_normal(shape).astype(np.float32) for shape in shapes[:inputs]]
    wide = [value.astype(np.float64) for value in values]
    make, formula = OPERATORS[name]
    operator = make()
    np.testing.assert_allclose(operator(*tensors(values)).asnumpy(), formula(*wide), atol=2e-3)
    probe = rng.standard_normal((rows, out)).astype(np.float32)
    found = ops.grad(Probed(operator), tuple(range(1, len(values) + 1)))(*tensors((probe, *values)))
    for ours, right in zip(found, formulas.product_slopes(probe.astype(np.float64), *wide)):
        np.testing.assert_allclose(ours.asnumpy(), right, atol=1e-6 * np.abs(right).max() + 1e-6)


@pytest.mark.parametrize("size", [0, 1, 7, 8192, 70_001, 1_000_000])
def test_the_sum_of_squares_is_right(size, mode, rng):
    x = rng.standard_normal(size).astype(np.float32) + 1
    found = float(operators.SquareSum()(Tensor(x)))
    assert found == pytest.approx((x.astype(np.float64) ** 2).sum(), rel=3e-7)
    if size:
        x[-1] = np.nan
        assert np.isnan(float(operators.SquareSum()(Tensor(x))))


def hiding(kind):
    """A mask (2, 1, 150, 90) or (2, 1, 1, 90) that hides whole blocks of keys from blocks of queries."""
    at, keys = np.arange(150)[:, None], np.arange(90)
    hidden = {
        "causal": keys > at,
        "sliding": (keys > at) | (keys < at - 20),
        "padded on the left": np.broadcast_to(keys < 40, (1, 90)),
        "padded on the right": np.broadcast_to(keys > 50, (1, 90)),
    }[kind]
    mask = np.where(hidden, np.float32(-1e9), np.float32(0)) * np.ones((2, 1, 1, 1), np.float32)
    mask[1, 0, :3] = 0  # another sample sees more
    return mask


@pytest.mark.parametrize(
    "mask",
    [(1, 1, 1), (2, 1, 1), (2, 1, 150), (1, 6, 150), (2, 6, 150)]
    + ["causal", "sliding", "padded on the left", "padded on the right"],
    ids=str,
)
@pytest.mark.parametrize("drops", [False, True])
def test_attention_of_more_queries_than_a_block(mask, drops, rng):
    """Against the same in MindSpore's operators, with the mask of dropout as a constant."""
    query = rng.standard_normal((2, 150, 6 * 20)).astype(np.float32)
    key, value = (rng.standard_normal((2, 90, 2 * 20)).astype(np.float32) for _ in range(2))
    hidden = hiding(mask) if isinstance(mask, str) else rng.standard_normal((*mask, 90)).astype(np.float32)
    words = rng.integers(-(2**31), 2**31, 1 << 13).astype(np.int32)[: None if drops else 1]
    keys = np.array([12345, -678, -(2**30), 1], np.int32)
    factor = formulas.kept(words, keys, 2 * 6 * 150, 90).reshape(2, 6, 150, 90) * 1.25 if drops else np.ones(1)
    factor = Tensor(factor.astype(np.float32))

    class Plain(nn.Cell):
        def construct(self, probe, query, key, value):
            parts = [x.reshape((2, x.shape[1], -1, 20)).transpose((0, 2, 1, 3)) for x in (query, key, value)]
            query, key, value = parts[0], *(ops.repeat_interleave(x, 3, 1) for x in parts[1:])
            weights = ops.softmax(ops.matmul(query, key.swapaxes(2, 3)) * 0.3 + Tensor(hidden), -1) * factor
            return (ops.matmul(weights, value).transpose((0, 2, 1, 3)).reshape((2, 150, -1)) * probe).sum()

    class Fast(nn.Cell):
        def __init__(self):
            super().__init__()
            self.operator = operators.Attention(6, 2, 0.3, 1.25)

        def construct(self, probe, query, key, value):
            return (self.operator(query, key, value, Tensor(hidden), Tensor(words), Tensor(keys)) * probe).sum()

    probe = rng.standard_normal(query.shape).astype(np.float32)
    results = [ops.value_and_grad(cell, (1, 2, 3))(*tensors((probe, query, key, value))) for cell in (Fast(), Plain())]
    np.testing.assert_allclose(float(results[0][0]), float(results[1][0]), rtol=1e-4)
    for ours, theirs in zip(results[0][1], results[1][1]):
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), atol=2e-5)


def test_nan_goes_through_what_mixes_entries(mode, rng):
    x, words, keys = inputs_for("dropout", (4, 40), rng)
    x[1, 3] = np.nan
    found = operators.Dropout(1.25)(*tensors((x, words, keys))).asnumpy()
    assert np.isnan(found).sum() == 1
    x, cos, sin = inputs_for("rotary", (2, 8), rng)
    x[1, 1, 2, 3] = np.nan
    found = operators.Rotary()(*tensors((x, cos, sin))).asnumpy()
    assert np.isnan(found).sum() == np.isnan(found[1, 1, 2, [3, 11]]).sum() == 2
    x, weight = inputs_for("product", (4, 40), rng)
    x[1, 3] = np.nan
    found = operators.Product()(*tensors((x, weight))).asnumpy()
    assert np.isnan(found[1]).all()
    assert np.isfinite(np.delete(found, 1, 0)).all()
    values = inputs_for("attention", (3, 41), rng)
    values[0][1, 2, 3] = np.nan  # a query of the first head, whose size is 6
    operator = operators.Attention(6, 2, 0.3, 1.25)
    found = operator(*tensors(values)).asnumpy()
    assert np.isnan(found[1, 2, :6]).all()
    assert np.isnan(found).sum() == 6
    slopes = ops.grad(Probed(operator), (1, 2))(ops.ones_like(Tensor(found)), *tensors(values))
    assert np.isnan(slopes[0].asnumpy()).sum() == 6
    assert np.isnan(slopes[1].asnumpy()[1, :, :6]).all()


def causal_attention(key_scale, masked, rng):
    """Query, key, value, mask and what attention() needs besides, of two heads and 100 tokens."""
    query, key, value = (rng.standard_normal((1, 100, 8)).astype(np.float32) for _ in range(3))
    mask = np.where(np.arange(100) > np.arange(100)[:, None], np.float32(masked), np.float32(0))[None, None]
    return query, key * np.float32(key_scale), value, mask, np.zeros(1, np.int32), np.zeros(4, np.int32)


def test_a_key_counts_whose_score_outweighs_the_mask(rng):
    values = causal_attention(1000, -500, rng)
    found = operators.Attention(2, 2, 0.3)(*tensors(values)).asnumpy()
    wide = [value.astype(np.float64) if value.dtype == np.float32 else value for value in values]
    np.testing.assert_allclose(found, formulas.attention(*wide, 2, 2, 0.3), atol=1e-4)
    causal = formulas.attention(*wide[:3], np.where(wide[3] < 0, -1e9, 0), *wide[4:], 2, 2, 0.3)
    assert np.abs(found - causal).max() > 1  # it is not what a mask that hides would give


@pytest.mark.parametrize(("place", "bad"), [(1, np.nan), (2, np.nan), (2, np.inf)])
def test_hidden_keys_and_values_that_are_no_numbers_come_through(place, bad, rng):
    """As in MindSpore's operators: 0 times infinity is not 0."""
    values = causal_attention(1, -1e9, rng)
    values[place][0, 80, 0] = bad
    found = operators.Attention(2, 2, 0.3)(*tensors(values)).asnumpy()
    assert not np.isfinite(found[0, :, 0]).any()
    assert np.isfinite(found[0, :, 4:]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_no_number_reaches_hidden_keys(bad, rng):
    values = tensors(causal_attention(1, -1e9, rng))
    operator = operators.Attention(2, 2, 0.3)
    probe = np.ones((1, 100, 8), np.float32)
    probe[0, 3, 0] = bad
    for_key, for_value = ops.grad(Probed(operator), (2, 3))(Tensor(probe), *values)
    assert not np.isfinite(for_key.asnumpy()[0, :, :4]).any()
    assert np.isfinite(for_key.asnumpy()[0, :, 4:]).all()
    assert not np.isfinite(for_value.asnumpy()[0, :, 0]).any()


def test_keys_that_a_large_mask_hides_by_a_rounding_only_are_seen():
    """Near -1e10 floats are 1024 apart: a score of 600 decides what the sum is rounded to."""
    query, key = np.full((1, 1, 8), 1.0, np.float32), np.full((1, 64, 8), 1.0, np.float32)
    key[:, :32], key[:, 32:] = -79, 79
    value = np.ones((1, 64, 8), np.float32)
    value[:, :32] = 0
    mask = np.where(np.arange(64) < 32, np.float32(-1e10), np.float32(-1e10 - 2048)).reshape(1, 1, 1, 64)
    inputs = tensors((query, key, value, mask, np.zeros(1, np.int32), np.zeros(4, np.int32)))
    found = operators.Attention(1, 1, 1.0)(*inputs).asnumpy()
    scores = (query @ key.swapaxes(1, 2)).astype(np.float32) + mask[0]
    weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    np.testing.assert_allclose(found, weights @ value, atol=1e-6)
    assert 0.4 < found.min() < 0.6


def test_a_query_that_may_see_nothing_sees_all_alike():
    query, key, value = (np.ones((1, 2, 4), np.float32) for _ in range(3))
    value[0, 0] = 3.0
    mask = np.full((1, 1, 1, 2), -1e9, np.float32)
    inputs = tensors((query, key, value, mask, np.zeros(1, np.int32), np.zeros(4, np.int32)))
    np.testing.assert_allclose(operators.Attention(2, 2, 0.5)(*inputs).asnumpy(), 2.0)


def test_norms_and_softmax_of_huge_entries():
    x = np.array([[1e4, -1e4, 1e4, 5.0], [3e4, 3e4, 3e4, 3e4]], np.float32)
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    wide = x.astype(np.float64)
    norm = operators.LayerNorm(EPSILON)(*tensors([x, ones, zeros])).asnumpy()
    np.testing.assert_allclose(norm, formulas.layer_norm(wide, 1.0, 0.0), atol=1e-6)
    scaled = operators.RMSNorm(EPSILON)(*tensors([x, ones])).asnumpy()
    np.testing.assert_allclose(scaled, formulas.rms_norm(wide, 1.0), rtol=1e-6)
    mask = np.array([0, 0, -1e9, -np.inf], np.float32).reshape(1, 1, 1, 4)
    softmax = operators.MaskedSoftmax()(*tensors([x.reshape(1, 1, 2, 4), mask])).asnumpy()
    np.testing.assert_array_equal(softmax[0, 0], [[1, 0, 0, 0], [0.5, 0.5, 0, 0]])


def test_a_row_that_is_hidden_altogether_is_uniform():
    """As MindSpore's: adding -1e9 everywhere swallows the scores."""
    scores, mask = np.ones((1, 1, 1, 5), np.float32), np.full((1, 1, 1, 5), -1e9, np.float32)
    np.testing.assert_allclose(operators.MaskedSoftmax()(*tensors([scores, mask])).asnumpy(), 0.2)


def test_a_label_of_no_class_is_no_silent_number():
    losses = operators.CrossEntropy()(Tensor(np.zeros((2, 3), np.float32)), Tensor([3, 1], ms.int32)).asnumpy()
    assert np.isnan(losses[0])
    assert losses[1] == pytest.approx(np.log(3))


def test_classes_may_take_any_number_of_blocks(rng):
    """The largest logit of a row may come early or late; a label of no class is none in any block."""
    rows, classes, size = 37, 5000, 6
    x, table = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, size), (classes, size)))
    table *= np.linspace(0.1, 30, classes, dtype=np.float32)[:, None]  # from nearly even to one that has all
    for order in (1, -1):
        turned = np.ascontiguousarray(table[::order])
        labels = rng.integers(0, classes, rows).astype(np.int32)
        labels[:3] = -1, classes, np.argmax(x[2] @ turned.T)
        wide = [x.astype(np.float64), turned.astype(np.float64)]
        right = formulas.head_loss(*wide, np.minimum(labels, classes - 1))
        right[1] = np.nan
        operator = operators.HeadLoss()
        losses = operator(*tensors([x, turned, labels])).asnumpy()
        np.testing.assert_allclose(losses, right, rtol=1e-5, atol=1e-4)
        z = wide[0] @ wide[1].T
        chances = np.exp(z - z.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        chances[np.arange(rows), np.minimum(labels, classes - 1)] -= 1
        expected = chances @ wide[1]
        expected[0], expected[1] = 0, np.nan
        slope = ops.grad(Probed(operator), 1)(Tensor(np.ones(rows, np.float32)), *tensors([x, turned, labels]))
        np.testing.assert_allclose(slope.asnumpy(), expected, atol=1e-5 * np.abs(wide[1]).max())


def test_no_row_that_counts_has_no_loss(rng):
    x, table = (rng.standard_normal((9, 5)).astype(np.float32) for _ in range(2))
    both = ops.value_and_grad(Probed(operators.HeadLoss()), 1)
    loss, slope = both(Tensor(np.ones(9, np.float32)), *tensors([x, table, np.full(9, -100, np.int32)]))
    assert float(loss) == 0
    assert not slope.asnumpy().any()


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "gated_silu", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_nothing_in_nothing_out(name, shape, rng):
    operator = OPERATORS[name][0]()
    values = tensors(inputs_for(name, shape, rng))
    assert operator(*values).shape == shape


def test_transposed_inputs_are_read_in_their_own_order(mode, rng):
    """In PyNative a transposed Tensor is a view with strides."""
    x = rng.standard_normal((4, 6)).astype(np.float32)

    class Transposed(nn.Cell):
        def __init__(self):
            super().__init__()
            self.gelu = operators.GELU()

        def construct(self, x):
            return self.gelu(x.transpose((1, 0)))

    np.testing.assert_allclose(Transposed()(Tensor(x)).asnumpy(), formulas.gelu(x.T.astype(np.float64)), atol=1e-6)
    slope = ops.grad(Transposed())(Tensor(x)).asnumpy()
    expected = formulas.derivative(formulas.gelu, [x.T], 1.0, 0).T
    np.testing.assert_allclose(slope, expected, atol=2e-6)
