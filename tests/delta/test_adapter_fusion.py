"""AdapterFusion: what it computes, and where its adapters come from."""

import shutil

import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from safetensors.numpy import load_file

from mindpet import AdapterConfig, AdapterFusionConfig, LoRAConfig, inject, load_delta, save_delta
from mindpet.delta import AdapterFusionDense
from mindpet.graph import DeltaFileError, freeze_delta
from tests.oracles import below, dense, inputs_of_every_rank, randomise, values

MARK = "mindpet_delta_fusion_"
BLOCK = "mindpet_delta_adapter_block.mindpet_delta_adapter_"


def bottleneck(h, p):
    down, up = below(p, f"{BLOCK}down_sampler"), below(p, f"{BLOCK}up_sampler")
    return np.maximum(h @ down["weight"].T + down["bias"], 0) @ up["weight"].T + up["bias"]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_outputs_are_those_of_the_formula(mode, rng, value, activation):
    config = AdapterFusionConfig(adapters=3, size=2, non_linearity="relu", value=value)
    layer = AdapterFusionDense.from_dense(nn.Dense(6, 4, activation=activation), config, [])
    p = values(randomise(layer, rng, 0.7))
    for x in inputs_of_every_rank(rng, 6)[1:]:
        h = dense(x, p, activation)
        z = np.stack([bottleneck(h, below(p, f"{MARK}adapters.{index}")) for index in range(3)], -2)
        query = h @ p[f"{MARK}query"].T + p[f"{MARK}query_bias"]
        scores = np.einsum("...o,...no->...n", query, z @ p[f"{MARK}key"].T)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        mix = np.einsum("...n,...no->...o", weights, z @ p[f"{MARK}value"].T if value else z)
        np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), h + mix, atol=1e-4)


def network():
    return nn.SequentialCell(nn.Dense(6, 8), nn.ReLU(), nn.Dense(8, 4), nn.Dense(4, 3))


def base_of(source):
    """Another network with the same base."""
    other = network()
    for cell, given in zip((other[0], other[2], other[3]), (source[0], source[2], source[3])):
        cell.weight.set_data(given.weight)
        cell.bias.set_data(given.bias)
    return other


@pytest.fixture
def tuned(rng, tmp_path):
    """A base, and directories of two adapters trained on it, each with a head of its own."""
    source, paths = network(), []
    for name in ("one", "two"):
        adapted = base_of(source)
        inject(adapted, AdapterConfig(size=2, targets=["0", "2"], non_linearity="relu", modules_to_save=["3"]))
        for parameter in adapted.trainable_params():
            parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
        save_delta(adapted, tmp_path / name)
        paths.append(str(tmp_path / name))
    return source, paths


def test_trained_adapters_are_taken_over_exactly(mode, tuned, rng):
    source, paths = tuned
    fused = inject(base_of(source), AdapterFusionConfig(adapters=paths, value=False))
    for index, path in enumerate(paths):
        for name, value in load_file(f"{path}/delta.safetensors").items():
            if "mindpet_delta" in name:
                mine = name.replace("mindpet_delta_adapter.", f"{MARK}adapters.{index}.")
                np.testing.assert_array_equal(dict(fused.parameters_and_names())[mine].asnumpy(), value)
    # with all the attention on one of them the network is the one that was tuned with it, but for the head
    x = Tensor(rng.standard_normal((5, 6)).astype(np.float32))
    for path in (paths[0], paths[0]), (paths[1], paths[1]):
        alike = inject(base_of(source), AdapterFusionConfig(adapters=path, value=False))
        alone = load_delta(base_of(source), path[0])
        for head, given in zip(alone[3].get_parameters(), source[3].get_parameters()):
            head.set_data(given.value())
        np.testing.assert_allclose(alike(x).asnumpy(), alone(x).asnumpy(), rtol=1e-5, atol=1e-5)


def test_what_the_directories_say_holds(tuned):
    source, paths = tuned
    config = AdapterFusionConfig(adapters=paths, size=64, non_linearity="gelu")
    assert (config.size, config.non_linearity, config.targets) == (2, "relu", ("0", "2"))
    assert [type(cell) for cell in inject(base_of(source), config)][::2] == [AdapterFusionDense] * 2
    only = inject(base_of(source), AdapterFusionConfig(adapters=paths, targets=["2"]))
    assert type(only[0]) is nn.Dense


def test_the_directory_of_a_run_is_taken_for_that_of_its_delta(tuned, tmp_path):
    source, paths = tuned
    runs = [tmp_path / "run-one", tmp_path / "run-two"]
    for path, run in zip(paths, runs):
        shutil.copytree(path, run / "delta")
    fused, other = (inject(base_of(source), AdapterFusionConfig(adapters=given)) for given in (paths, runs))
    for name, parameter in fused.parameters_and_names():
        if "adapters" in name:
            np.testing.assert_array_equal(other.parameters_dict()[name].asnumpy(), parameter.asnumpy())


def test_only_the_fusion_trains(mode, tuned):
    source, paths = tuned
    fused = inject(base_of(source), AdapterFusionConfig(adapters=paths, modules_to_save=["3"]))
    parts = [f"{cell}.{MARK}{part}" for cell in (0, 2) for part in ("query", "query_bias", "key", "value")]
    assert [p.name for p in fused.trainable_params()] == [*parts, "3.weight", "3.bias"]
    before = {parameter.name: parameter.asnumpy().copy() for parameter in fused.get_parameters()}
    loss = nn.WithLossCell(fused, nn.MSELoss())
    step = nn.TrainOneStepCell(loss, nn.Adam(fused.trainable_params(), 0.01)).set_train()
    x, y = Tensor(np.ones((4, 6), np.float32)), Tensor(np.ones((4, 3), np.float32))
    losses = [float(step(x, y)) for _ in range(5)]
    assert losses[-1] < losses[0]
    changed = {p.name for p in fused.get_parameters() if not np.array_equal(p.asnumpy(), before[p.name])}
    assert changed == {*parts, "3.weight", "3.bias"}


def test_a_saved_fusion_needs_no_other_directory(mode, tuned, rng, tmp_path):
    source, paths = tuned
    fused = inject(base_of(source), AdapterFusionConfig(adapters=paths, modules_to_save=["3"]))
    randomise(fused, rng, 0.5)
    other, there = base_of(fused), inject(base_of(fused), AdapterFusionConfig(adapters=paths, modules_to_save=["3"]))
    save_delta(fused, tmp_path / "fused")
    for path in paths:
        (tmp_path / path / "delta.safetensors").unlink()
    x = Tensor(rng.standard_normal((5, 6)).astype(np.float32))
    load_delta(other, tmp_path / "fused")
    np.testing.assert_array_equal(other(x).asnumpy(), fused(x).asnumpy())
    load_delta(there, tmp_path / "fused")  # into one that was injected with the directories
    np.testing.assert_array_equal(there(x).asnumpy(), fused(x).asnumpy())
    with pytest.raises(DeltaFileError, match="adapters was 2 and is 3 here"):
        load_delta(
            inject(base_of(fused), AdapterFusionConfig(adapters=3, size=2, targets=["0", "2"])), tmp_path / "fused"
        )


def test_float16_adapters_keep_their_numbers(tuned):
    source, paths = tuned
    half = base_of(source)
    for parameter in half.get_parameters():
        parameter.set_dtype(mstype.float16)
    inject(half, AdapterFusionConfig(adapters=paths))
    assert {parameter.dtype for parameter in half.get_parameters()} == {mstype.float16}
    assert half(ops.ones((2, 6), mstype.float16)).dtype == mstype.float16


def test_the_two_methods_are_frozen_apart(tuned):
    fused = inject(base_of(tuned[0]), AdapterFusionConfig(adapters=tuned[1]))
    freeze_delta(fused, "adapter")
    assert all(".mindpet_delta_adapter_block." in parameter.name for parameter in fused.trainable_params())
    freeze_delta(fused, "adapter_fusion")
    assert all(parameter.name.rpartition(".")[2].startswith(MARK) for parameter in fused.trainable_params())


def test_what_cannot_be_fused_is_refused(tuned, tmp_path):
    source, paths = tuned

    def saved(config, name):
        save_delta(inject(network(), config), tmp_path / name)
        return str(tmp_path / name)

    other = saved(AdapterConfig(size=3, targets=["0", "2"], non_linearity="relu"), "other")
    with pytest.raises(
        ValueError, match=r"must have the same size, but got 2 \(int\) in .*one and 3 \(int\) in .*other"
    ):
        AdapterFusionConfig(adapters=[paths[0], other])
    other = saved(AdapterConfig(size=2, targets=["0"], non_linearity="relu"), "fewer")
    with pytest.raises(ValueError, match="must have the same targets"):
        AdapterFusionConfig(adapters=[paths[0], other])
    with pytest.raises(ValueError, match=r"Only adapters can be fused.*has lora"):
        AdapterFusionConfig(adapters=saved(LoRAConfig(targets=["0"]), "lora"))
    with pytest.raises(ValueError, match="There is no file"):
        AdapterFusionConfig(adapters=[str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match=r"has no 3\.mindpet_delta_adapter"):
        inject(base_of(source), AdapterFusionConfig(adapters=paths, targets=["3"]))
    wider = nn.SequentialCell(nn.Dense(6, 9))
    with pytest.raises(ValueError, match=r"has shape \(2, 8\) in an adapter to be fused, and \(2, 9\) here"):
        inject(wider, AdapterFusionConfig(adapters=paths, targets=["0"]))
    assert type(wider[0]) is nn.Dense


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"adapters": 0}, "'adapters' must be a positive int"),
        ({"adapters": True}, "'adapters' must be a positive int"),
        ({"adapters": []}, "'adapters' must be directories or a number"),
        ({"adapters": [3]}, "'adapters' must be directories or a number"),
        ({"size": 0}, "'size' must be a positive int"),
        ({"value": 1}, "'value' must be a bool"),
        ({"non_linearity": "gelo"}, "'non_linearity'.*did you mean 'gelu'"),
    ],
)
def test_wrong_values_are_refused(options, says):
    with pytest.raises((TypeError, ValueError), match=f"For 'AdapterFusionConfig', {says}"):
        AdapterFusionConfig(**options)
