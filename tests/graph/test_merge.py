import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import AdapterConfig, LoRAConfig, inject
from mindpet.delta import LoRADense
from mindpet.graph import disable, eject, merge, merge_and_eject, unmerge


def network():
    return nn.SequentialCell(nn.Dense(6, 6, activation="relu"), nn.Dense(6, 5), nn.Dense(5, 3))


def with_lora(rng, **options):
    cell = inject(network(), LoRAConfig(rank=2, targets=["0", "1"], modules_to_save=["2"], **options))
    for parameter in cell.trainable_params():
        parameter.set_data(Tensor(0.2 * rng.standard_normal(parameter.shape).astype(np.float32)))
    return cell


def weights(cell):
    return {name: parameter.asnumpy().copy() for name, parameter in cell.parameters_and_names()}


@pytest.mark.parametrize(
    "options", [{}, {"rank_stabilised": True}, {"rank_pattern": {"1": 4}, "alpha_pattern": {"0": 3}}]
)
def test_merged_outputs_equal_and_unmerge_restores_every_bit(mode, rng, options):
    cell = with_lora(rng, **options)
    cell.set_train(False)
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    expected, before = cell(x).asnumpy(), weights(cell)
    merge(cell)
    assert type(cell[0]) is nn.Dense
    np.testing.assert_allclose(cell(x).asnumpy(), expected, atol=1e-5)
    assert not np.array_equal(cell[0].weight.asnumpy(), before["0.weight"])
    unmerge(cell)
    assert type(cell[0]) is LoRADense
    after = weights(cell)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)
    np.testing.assert_array_equal(cell(x).asnumpy(), expected)


def test_merge_and_eject_leaves_the_plain_network(mode, rng):
    cell = with_lora(rng)
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    expected = cell(x).asnumpy()
    assert merge_and_eject(cell) is cell
    assert [type(child) for child in cell] == [nn.Dense] * 3
    assert {name for name, _ in cell.parameters_and_names()} == {name for name, _ in network().parameters_and_names()}
    np.testing.assert_allclose(cell(x).asnumpy(), expected, atol=1e-5)
    inject(cell, LoRAConfig(targets=["0"]))


def test_eject_puts_everything_back(mode, rng):
    cell = network()
    cell[2].bias.requires_grad = False
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    expected, before = cell(x).asnumpy(), weights(cell)
    inject(cell, LoRAConfig(rank=2, targets=["0", "1"], modules_to_save=["2"]))
    inject(cell, AdapterConfig(size=2, targets=["2"]))
    for parameter in cell.trainable_params():
        parameter.set_data(parameter + 1)
    assert not np.allclose(cell(x).asnumpy(), expected)
    eject(cell)
    assert weights(cell).keys() == before.keys()
    assert all(np.array_equal(value, before[name]) for name, value in weights(cell).items())
    np.testing.assert_array_equal(cell(x).asnumpy(), expected)
    assert [p.name for p in cell.get_parameters() if not p.requires_grad] == ["2.bias"]
    with pytest.raises(ValueError, match="Nothing was injected"):
        eject(cell)


def test_disable_gives_the_base_outputs(mode, rng):
    cell = network()
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    base = cell(x).asnumpy()
    inject(cell, LoRAConfig(rank=2, targets=["0"], modules_to_save=["2"]))
    for parameter in cell.trainable_params():
        parameter.set_data(parameter + 0.5)
    tuned = cell(x).asnumpy()
    with disable(cell):
        np.testing.assert_array_equal(cell(x).asnumpy(), base)
    np.testing.assert_array_equal(cell(x).asnumpy(), tuned)


def test_layers_placed_by_hand_merge_as_well(mode, rng):
    layer = LoRADense(6, 3, 2, 4, lora_b_init="normal", compute_dtype=ms.float32)
    cell = nn.SequentialCell(layer)
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    expected = cell(x).asnumpy()
    merge(cell)
    assert type(cell[0]) is nn.Dense
    np.testing.assert_allclose(cell(x).asnumpy(), expected, atol=1e-5)
    unmerge(cell)
    assert cell[0] is layer


def test_a_weight_kept_the_other_way_round_merges(mode, rng):
    layer = LoRADense(5, 5, 2, 4, lora_b_init="normal", compute_dtype=ms.float32)
    layer.matmul = ms.ops.MatMul(transpose_b=False)
    cell = nn.SequentialCell(layer)
    x = Tensor(rng.standard_normal((4, 5)).astype(np.float32))
    expected = cell(x).asnumpy()
    merge(cell)
    np.testing.assert_allclose(cell(x).asnumpy(), expected, atol=1e-5)


def test_float16_weights_merge(rng):
    cell = network().to_float(ms.float16)
    for parameter in cell.get_parameters():
        parameter.set_dtype(ms.float16)
    inject(cell, LoRAConfig(rank=2, targets=["0"]))
    cell[0].mindpet_delta_lora_b.set_data(Tensor(rng.standard_normal((6, 2)).astype(np.float16)))
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float16))
    expected = cell(x).asnumpy()
    merge(cell)
    assert cell[0].weight.dtype == ms.float16
    np.testing.assert_allclose(cell(x).asnumpy(), expected, atol=2e-2)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_sum_that_is_not_finite_is_refused_and_changes_nothing(rng, value):
    cell = with_lora(rng)
    cell[1].mindpet_delta_lora_b.set_data(Tensor(np.full((5, 2), value, np.float32)))
    before = weights(cell)
    with pytest.raises(ValueError, match="1: the sum would hold NaN or infinity"):
        merge(cell)
    assert all(np.array_equal(value, before[name], equal_nan=True) for name, value in weights(cell).items())
    assert type(cell[0]) is LoRADense


def test_methods_that_cannot_merge_say_so(rng):
    cell = inject(network(), AdapterConfig(size=2, targets=["0", "1"]))
    with pytest.raises(ValueError, match="0: adapter is more than a matrix"):
        merge(cell)
    with pytest.raises(ValueError, match="can be merged"):
        merge(network())
    with pytest.raises(ValueError, match="is merged"):
        unmerge(network())


def test_a_tied_weight_is_refused(rng):
    class Tied(nn.Cell):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Dense(4, 4), nn.Dense(4, 4)
            self.other.weight = self.one.weight

        def construct(self, x):
            return self.other(self.one(x))

    cell = inject(Tied(), LoRAConfig(targets=["one"]))
    with pytest.raises(ValueError, match="other cells use its weight"):
        merge(cell)


def test_merged_networks_are_neither_saved_nor_ejected(rng, tmp_path):
    from mindpet import save_delta

    cell = merge(with_lora(rng))
    with pytest.raises(ValueError, match="unmerge"):
        save_delta(cell, tmp_path)
    with pytest.raises(ValueError, match="unmerge"):
        eject(cell)


def test_a_second_method_leaves_the_first_training(rng):
    cell = inject(network(), LoRAConfig(rank=2, targets=["0"]))
    inject(cell, AdapterConfig(size=2, targets=["1"]))
    names = [p.name for p in cell.trainable_params()]
    assert any("lora" in name for name in names)
    assert any("adapter" in name for name in names)
    assert not any(name.endswith("0.weight") for name in names)


class Wrapper(nn.Cell):
    """Holds a network, as a loss or a training step does."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, x):
        return self.network(x) * 2


def test_what_was_compiled_around_a_network_is_compiled_anew(mode, rng):
    cell, x = network(), Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    around, jitted = Wrapper(cell), ms.jit(lambda_free(cell))
    base = around(x).asnumpy()
    np.testing.assert_allclose(jitted(x).asnumpy(), base / 2, atol=1e-6)
    inject(cell, LoRAConfig(rank=2, targets=["0"]))
    cell[0].mindpet_delta_lora_b.set_data(Tensor(rng.standard_normal((6, 2)).astype(np.float32)))
    tuned = cell(x).asnumpy()
    for change in (lambda: None, lambda: merge(cell), lambda: unmerge(cell)):
        change()
        np.testing.assert_allclose(around(x).asnumpy(), 2 * tuned, atol=1e-5, err_msg="around")
        np.testing.assert_allclose(jitted(x).asnumpy(), tuned, atol=1e-5, err_msg="jitted")
    eject(cell)
    np.testing.assert_array_equal(around(x).asnumpy(), base)


def lambda_free(cell):
    def forward(x):
        return cell(x)

    return forward


def test_a_weight_that_the_network_itself_holds_is_refused(rng):
    class Own(nn.Cell):
        def __init__(self):
            super().__init__()
            self.one = nn.Dense(4, 4)
            self.table = self.one.weight

        def construct(self, x):
            return ms.ops.matmul(self.one(x), self.table)

    cell = inject(Own(), LoRAConfig(targets=["one"]))
    with pytest.raises(ValueError, match="other cells use its weight"):
        merge(cell)


def test_nothing_else_is_done_to_a_network_whose_deltas_are_merged_or_held_out(rng, tmp_path):
    from mindpet import load_delta, save_delta, use
    from mindpet.graph import MixedDeltas

    cell = with_lora(rng)
    save_delta(cell, tmp_path)
    load_delta(cell, tmp_path, "a")
    actions = [
        lambda: inject(cell, AdapterConfig(size=2, targets=["2"])),
        lambda: eject(cell),
        lambda: merge(cell),
        lambda: save_delta(cell, tmp_path / "other"),
        lambda: load_delta(cell, tmp_path),
        lambda: use(cell, "a"),
        lambda: disable(cell).__enter__(),
        lambda: MixedDeltas(cell),
    ]
    expected = weights(cell)
    mixed = MixedDeltas(cell)
    for enter, says in (
        (lambda: merge(cell), "unmerge"),
        (lambda: disable(cell), "disable"),
        (lambda: mixed, "MixedDeltas"),
    ):
        block = enter()
        if says != "unmerge":
            block.__enter__()
        for action in actions:
            with pytest.raises(ValueError, match=says):
                action()
        unmerge(cell) if says == "unmerge" else block.__exit__(None, None, None)
        assert all(np.array_equal(value, expected[name]) for name, value in weights(cell).items())
        assert type(cell[0]) is LoRADense
    with pytest.raises(RuntimeError, match="inside the block"):
        mixed(["a"], Tensor(np.ones((1, 6), np.float32)))


def test_training_mode_follows_the_network(rng):
    cell = network()
    cell.set_train()
    inject(cell, LoRAConfig(rank=2, dropout=0.5, targets=["0"]))
    assert cell[0].lora_dropout.training
    with disable(cell):
        cell.set_train(False)
    assert not cell[0].training
    assert not cell[0].lora_dropout.training
    merge(cell)
    cell.set_train()
    unmerge(cell)
    assert cell[0].lora_dropout.training


def test_to_float_of_one_layer_stays(mode, rng):
    cell = nn.SequentialCell(nn.Dense(6, 6).to_float(ms.float16))
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    before = cell(x)
    inject(cell, LoRAConfig(rank=2, targets=["0"]))
    assert cell[0].compute_dtype == ms.float16
    np.testing.assert_array_equal(cell(x).asnumpy(), before.asnumpy())  # a float32 output of float16 numbers


def test_merge_and_eject_trains_what_trained_before(rng):
    cell = network()
    cell[0].bias.requires_grad = False
    merge_and_eject(inject(cell, LoRAConfig(rank=2, targets=["0"])))
    assert [p.name for p in cell.get_parameters() if not p.requires_grad] == ["0.bias"]
