"""DoRA against its formula in float64; its gradients are held against PEFT's in tests/interop/test_golden_peft.py."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import DoRAConfig, combine, inject, load_delta, save_delta
from mindpet.delta import DoRADense
from mindpet.graph.deltas import DeltaFileError

CONFIG = DoRAConfig(rank=2, alpha=3)


def layer(rng, dtype=np.float32, **options):
    dense = nn.Dense(6, 4, dtype=ms.float16 if dtype == np.float16 else ms.float32, **options)
    dense.weight.set_data(Tensor(rng.normal(size=(4, 6)).astype(dtype)))
    if dense.has_bias:
        dense.bias.set_data(Tensor(rng.normal(size=4).astype(dtype)))
    return dense, DoRADense.from_dense(dense, CONFIG)


@pytest.mark.parametrize("options", [{}, {"has_bias": False}, {"activation": "relu"}])
def test_outputs_are_those_of_the_formula(mode, rng, options):
    _, cell = layer(rng, **options)
    for parameter in cell.trainable_params():
        parameter.set_data(Tensor(rng.normal(size=parameter.shape).astype(np.float32)))
    p = {name: parameter.asnumpy().astype(np.float64) for name, parameter in cell.parameters_and_names()}
    turned = p["weight"] + 1.5 * p["mindpet_delta_dora_b"] @ p["mindpet_delta_dora_a"]
    length = np.linalg.norm(turned, axis=1, keepdims=True)
    weight = p["mindpet_delta_dora_magnitude"][:, None] * turned / length
    x = rng.normal(size=(2, 3, 6))
    expected = x @ weight.T + p.get("bias", 0)
    expected = np.maximum(expected, 0) if options.get("activation") else expected
    np.testing.assert_allclose(cell(Tensor(x.astype(np.float32))).asnumpy(), expected, atol=1e-5)
    np.testing.assert_allclose(cell.delta_weight().asnumpy(), weight - p["weight"], atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_it_starts_at_the_lengths_of_the_rows(mode, rng, dtype):
    dense, cell = layer(rng, dtype)
    lengths = np.linalg.norm(dense.weight.asnumpy().astype(np.float64), axis=1)
    found = cell.mindpet_delta_dora_magnitude.asnumpy()
    assert found.dtype == dtype
    np.testing.assert_allclose(found, lengths, rtol=1e-6 if dtype == np.float32 else 1e-3)
    x = Tensor(rng.normal(size=(5, 6)).astype(dtype))
    # the bias is added after the scaling, so what is left is rounding
    tolerance = 1e-6 if dtype == np.float32 else 5e-3
    np.testing.assert_allclose(cell(x).asnumpy(), dense(x).asnumpy(), atol=tolerance)


def test_a_row_of_zeros_stays_a_row_of_zeros(rng):
    dense = nn.Dense(6, 4, has_bias=False)
    dense.weight.set_data(Tensor(np.diag([1.0, 2, 0, 3]).astype(np.float32) @ rng.normal(size=(4, 6)).astype("f4")))
    out = DoRADense.from_dense(dense, CONFIG)(Tensor(rng.normal(size=(3, 6)).astype(np.float32))).asnumpy()
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[:, 2], 0)


def test_a_delta_fits_whatever_it_started_from_and_no_other_scale(tmp_path):
    network = inject(nn.SequentialCell(nn.Dense(4, 4)), DoRAConfig(rank=2, targets=["0"], start="gaussian"))
    save_delta(network, tmp_path)
    load_delta(inject(nn.SequentialCell(nn.Dense(4, 4)), DoRAConfig(rank=2, targets=["0"])), tmp_path)
    with pytest.raises(DeltaFileError, match=r"alpha was 16.0 and is 4.0 here"):
        load_delta(inject(nn.SequentialCell(nn.Dense(4, 4)), DoRAConfig(rank=2, alpha=4.0, targets=["0"])), tmp_path)


def test_it_is_no_delta_of_lora_to_combine(tmp_path):
    save_delta(inject(nn.SequentialCell(nn.Dense(4, 4)), DoRAConfig(rank=2, targets=["0"])), tmp_path / "a")
    with pytest.raises(DeltaFileError, match="is of dora: only LoRA is combined"):
        combine([tmp_path / "a"], tmp_path / "b")
