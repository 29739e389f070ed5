"""LoRA's starts: what A and B are, that the network starts as it was, and that the start stays frozen and is kept."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import LoRAConfig, combine, inject, load_delta, merge_and_eject, save_delta
from mindpet.delta import DoRAConfig, LoRADense, LoRAFAConfig
from mindpet.delta.lora import LoRAStartDense
from mindpet.graph import freeze_delta

KEPT = ("pissa", "olora")


def network(seed=0):
    generator = np.random.default_rng(seed)
    cell = nn.SequentialCell(nn.Dense(10, 8), nn.ReLU(), nn.Dense(8, 12))
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(generator.normal(size=parameter.shape).astype(np.float32)))
    return cell


def x(rows=6):
    return Tensor(np.random.default_rng(1).normal(size=(rows, 10)).astype(np.float32))


def layer(start, dtype=np.float32, **options):
    dense = nn.Dense(10, 8, dtype=ms.float16 if dtype == np.float16 else ms.float32)
    dense.weight.set_data(Tensor(np.random.default_rng(2).normal(size=(8, 10)).astype(dtype)))
    return LoRADense.from_dense(dense, LoRAConfig(**{"rank": 4, "alpha": 6, **options}, start=start))


def values(cell):
    a, b = cell.mindpet_delta_lora_a.asnumpy(), cell.mindpet_delta_lora_b.asnumpy()
    return a.astype(np.float64), b.astype(np.float64), cell.weight.asnumpy().astype(np.float64)


def trained(cell):
    step = nn.TrainOneStepCell(nn.WithLossCell(cell, nn.MSELoss()), nn.SGD(cell.trainable_params(), 0.02))
    for _ in range(3):
        step(x(), Tensor(np.ones((6, 12), np.float32)))
    return cell


def test_the_default_is_plain_lora():
    assert type(layer("kaiming")) is type(layer("gaussian")) is type(layer("orthogonal")) is LoRADense
    assert [p.name for p in layer("orthogonal").get_parameters() if "mindpet" in p.name] == [
        "mindpet_delta_lora_a",
        "mindpet_delta_lora_b",
    ]


@pytest.mark.parametrize("options", [{}, {"rank_stabilised": True}])
def test_pissa_is_the_nearest_matrix_of_that_rank(options):
    """Meng et al. equations 2 and 3, with the scale of the branch: s B A = U_r S_r V_r^T, shared out evenly."""
    cell = layer("pissa", **options)
    a, b, w = values(cell)
    u, s, v = np.linalg.svd(w)
    scale = 6 / 2 if options else 6 / 4
    np.testing.assert_allclose(scale * b @ a, (u[:, :4] * s[:4]) @ v[:4], atol=1e-5)
    np.testing.assert_allclose(scale * a @ a.T, np.diag(s[:4]), atol=1e-5)
    np.testing.assert_allclose(scale * b.T @ b, np.diag(s[:4]), atol=1e-5)


def test_olora_is_the_first_columns_and_rows_of_qr():
    a, b, w = values(layer("olora"))
    np.testing.assert_allclose(b.T @ b, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(np.tril(a, -1), 0, atol=1e-6)
    np.testing.assert_allclose((b @ a)[:, :4], w[:, :4], atol=1e-5)


def test_the_halves_of_an_orthogonal_start_meet_nowhere():
    a, b, _ = values(layer("orthogonal"))
    np.testing.assert_allclose(b @ a, 0, atol=1e-8)
    assert np.linalg.matrix_rank(a, 1e-5) == np.linalg.matrix_rank(b, 1e-5) == 2
    assert min(np.abs(a).max(), np.abs(b).max()) > 0.05


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", *KEPT])
def test_a_network_starts_as_it_was_and_its_weights_stay(mode, start):
    cell, plain = network(), network()
    inject(cell, LoRAConfig(rank=4, alpha=6, targets=["0", "2"], start=start))
    difference = np.abs(cell(x()).asnumpy() - plain(x()).asnumpy()).max()
    assert difference == 0 if start != "orthogonal" else difference < 1e-5
    for path in ("0", "2"):
        weight = dict(cell.parameters_and_names())[f"{path}.weight"]
        np.testing.assert_array_equal(weight.asnumpy(), dict(plain.parameters_and_names())[f"{path}.weight"].asnumpy())


@pytest.mark.parametrize("start", KEPT)
def test_float16_starts_exactly_as_well(start):
    cell = layer(start, np.float16)
    rows = Tensor(np.random.default_rng(3).normal(size=(5, 10)).astype(np.float16))
    np.testing.assert_array_equal(cell(rows).asnumpy(), cell.plain()(rows).asnumpy())


@pytest.mark.parametrize("start", KEPT)
def test_what_it_computes_is_the_residual_weight_and_a_branch(mode, start):
    """The paper's form, y = x (W - s B0 A0 + s B A)^T + b, in float64."""
    cell = inject(network(), LoRAConfig(rank=4, alpha=6, targets=["2"], start=start))
    a0, b0, w = values(cell[2])
    trained(cell)
    a, b, _ = values(cell[2])
    assert np.abs(b @ a - b0 @ a0).max() > 0.01
    inner = np.maximum(x().asnumpy() @ cell[0].weight.asnumpy().T + cell[0].bias.asnumpy(), 0).astype(np.float64)
    expected = inner @ (w - 1.5 * b0 @ a0 + 1.5 * b @ a).T + cell[2].bias.asnumpy()
    np.testing.assert_allclose(cell(x()).asnumpy(), expected, atol=1e-4)
    merged = merge_and_eject(cell)
    assert type(merged[2]) is nn.Dense
    np.testing.assert_allclose(merged(x()).asnumpy(), expected, atol=1e-4)


@pytest.mark.parametrize("start", KEPT)
def test_the_start_is_frozen_whoever_freezes_and_saved_with_the_delta(tmp_path, start):
    cell = inject(network(), LoRAConfig(rank=4, targets=["0", "2"], start=start))
    learned = {f"{path}.mindpet_delta_lora_{letter}" for path in "02" for letter in "ab"}
    assert {p.name for p in cell.trainable_params()} == learned
    freeze_delta(cell, "lora")
    assert {p.name for p in cell.trainable_params()} == learned
    before = {p.name: p.asnumpy().copy() for p in cell.get_parameters()}
    trained(cell)
    assert {p.name for p in cell.get_parameters() if not np.array_equal(p.asnumpy(), before[p.name])} == learned
    save_delta(cell, tmp_path)
    moved = network(seed=9)  # a base that another start comes from: what counts is the start that was saved
    ms.load_param_into_net(moved, {p.name: ms.Parameter(p.value(), p.name) for p in network().get_parameters()})
    np.testing.assert_array_equal(load_delta(moved, tmp_path)(x()).asnumpy(), cell(x()).asnumpy())


def test_a_delta_fits_into_a_higher_rank_and_another_scale(tmp_path):
    cell = trained(inject(network(), LoRAConfig(rank=2, alpha=6, targets=["2"], start="pissa")))
    save_delta(cell, tmp_path)
    wider = inject(network(), LoRAConfig(rank=4, alpha=3, targets=["2"], start="pissa"))
    np.testing.assert_allclose(load_delta(wider, tmp_path)(x()).asnumpy(), cell(x()).asnumpy(), atol=1e-4)


def test_several_are_combined_into_a_plain_one(tmp_path):
    deltas = []
    for index, start in enumerate(KEPT):
        cell = inject(network(), LoRAConfig(rank=3, targets=["2"], start=start))
        deltas.append(trained(cell)[2].delta_weight().asnumpy())
        save_delta(cell, tmp_path / str(index))
    combine([tmp_path / "0", tmp_path / "1"], tmp_path / "sum", "concatenation", weights=[1, 2])
    both = load_delta(network(), tmp_path / "sum")
    assert type(both[2]) is LoRADense
    np.testing.assert_allclose(both[2].delta_weight().asnumpy(), deltas[0] + 2 * deltas[1], atol=1e-5)


def test_a_start_of_the_weight_can_be_made_by_hand():
    assert type(layer("pissa")) is type(LoRAStartDense.from_dense(nn.Dense(4, 4), LoRAConfig(rank=2, start="olora")))


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (LoRAConfig, {"start": "pisa"}, "'start' must be one of kaiming, .*did you mean 'pissa'"),
        (LoRAConfig, {"start": 3}, "'start' must be one of kaiming, .*, but got 3"),
        (LoRAConfig, {"start": "orthogonal", "rank": 3}, "'rank' must be even for the start 'orthogonal', but got 3"),
        (LoRAConfig, {"start": "orthogonal", "rank_pattern": {"*": 5}}, "must be even"),
        (LoRAConfig, {"start": "pissa", "alpha": -1}, "'alpha' must be above 0 for the start 'pissa'"),
        (LoRAConfig, {"bias": "some"}, "'bias' must be one of none, lora_only, all"),
        (DoRAConfig, {"start": "pissa"}, "For 'DoRAConfig', 'start' must be one of kaiming, gaussian, orthogonal, but"),
        (LoRAFAConfig, {"start": "olora"}, "For 'LoRAFAConfig', 'start' must be one of kaiming, gaussian, but"),
    ],
)
def test_wrong_options_are_named(config, options, says):
    with pytest.raises((ValueError, TypeError), match=says):
        config(**options)


@pytest.mark.parametrize(
    ("cell", "rank", "start", "says"),
    [
        (nn.Dense(6, 3), 4, "pissa", "'rank' must be at most 3 for the start 'pissa' of .*weight, which is .3, 6."),
        (nn.Embedding(6, 3), 2, "olora", "'start' must be one of kaiming, gaussian, but got 'olora'"),
        (nn.Conv2d(3, 3, 3), 2, "pissa", "which is for dense layers"),
    ],
)
def test_a_start_that_a_cell_cannot_have_leaves_the_network_alone(cell, rank, start, says):
    network = nn.SequentialCell(cell)
    with pytest.raises(ValueError, match=says):
        inject(network, LoRAConfig(rank=rank, targets=["0"], start=start))
    assert network[0] is cell
