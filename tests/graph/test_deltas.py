import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from safetensors.numpy import save_file

from mindpet import AdapterConfig, BitFitConfig, DoRAConfig, LoRAConfig, inject, load_delta, save_delta
from mindpet.delta import LoRADense
from mindpet.graph import DeltaFileError, MixedDeltas, combine, use
from mindpet.graph.deltas import read_delta, write_delta


def network():
    return nn.SequentialCell(nn.Dense(6, 6), nn.ReLU(), nn.Dense(6, 3))


def tuned(seed=3):
    """A network whose delta is not the one it started with."""
    cell = inject(network(), LoRAConfig(rank=2, targets=["0"], modules_to_save=["2"]))
    generator = np.random.default_rng(seed)
    for parameter in cell.trainable_params():
        parameter.set_data(Tensor(generator.standard_normal(parameter.shape).astype(np.float32)))
    return cell


def base_of(cell):
    return {p.name: ms.Parameter(p.value(), name=p.name) for p in cell.get_parameters() if "delta" not in p.name}


def test_a_delta_that_is_loaded_between_steps_goes_on_training(mode, tmp_path, rng):
    cell = tuned()
    save_delta(cell, tmp_path)
    x, labels = Tensor(rng.standard_normal((4, 6)).astype(np.float32)), Tensor([0, 1, 2, 0], ms.int32)
    loss = nn.WithLossCell(cell, nn.CrossEntropyLoss())
    step = nn.TrainOneStepCell(loss, nn.Adam(cell.trainable_params(), 0.1))
    step(x, labels)
    for load in (
        lambda: load_delta(cell, tmp_path),
        lambda: load_delta(cell, tmp_path, "b"),
        lambda: use(cell, "default"),
    ):
        load()
        before = {p.name: p.asnumpy().copy() for p in cell.trainable_params()}
        step(x, labels)
        assert all(not np.array_equal(p.asnumpy(), before[p.name]) for p in cell.trainable_params())


def test_a_delta_goes_into_an_untouched_network(mode, tmp_path, rng):
    ours = tuned()
    save_delta(ours, tmp_path)
    other = network()
    ms.load_param_into_net(other, base_of(ours))
    load_delta(other, tmp_path)
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    np.testing.assert_array_equal(other(x).asnumpy(), ours(x).asnumpy())
    assert {p.name for p in other.trainable_params()} == {p.name for p in ours.trainable_params()}
    assert json.loads((tmp_path / "delta.json").read_text())["methods"][0]["rank"] == 2


def test_every_misfit_is_in_one_message(tmp_path):
    save_delta(tuned(), tmp_path)
    other = inject(nn.SequentialCell(nn.Dense(6, 6), nn.ReLU(), nn.Dense(6, 4)), LoRAConfig(rank=1, targets=["0", "2"]))
    with pytest.raises(DeltaFileError) as error:
        load_delta(other, tmp_path)
    message = str(error.value)
    assert "0.mindpet_delta_lora_a: the file has shape (2, 6), the network (1, 6)" in message
    assert "2.weight: the file has shape (3, 6), the network (4, 6)" in message
    assert "not in the file: 2.mindpet_delta_lora_a" in message


def rewritten(directory, **changes):
    """The delta again, with another description."""
    description, _, tensors = read_delta(directory)
    write_delta(directory, {**description, **changes}, tensors)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda d: (d / "delta.safetensors").unlink(), "There is no file"),
        (lambda d: (d / "delta.safetensors").write_bytes(b"x" * 20), "cannot be read as safetensors"),
        (lambda d: save_file({"a": np.zeros(2, np.float32)}, d / "delta.safetensors"), "no usable description"),
        (lambda d: rewritten(d, format=7), "format 7, and this version reads format 1"),
        (lambda d: rewritten(d, methods=[{"method": "loar"}]), "did you mean 'lora'"),
        (lambda d: rewritten(d, methods=["x"]), "no usable description"),
        (lambda d: rewritten(d, methods=5), "no usable description"),
        (lambda d: rewritten(d, methods=[{"method": "lora", "rank": 0}]), "'rank' must be a positive int"),
        (lambda d: rewritten(d, methods=[{"method": "lora", "targets": ["9"]}]), "cannot be injected"),
    ],
)
def test_broken_directories_are_named_and_the_network_is_left_alone(tmp_path, break_it, says):
    save_delta(tuned(), tmp_path)
    break_it(tmp_path)
    cell = network()
    with pytest.raises(DeltaFileError, match=says):
        load_delta(cell, tmp_path)
    assert [type(child) for child in cell] == [nn.Dense, nn.ReLU, nn.Dense]


def test_the_copy_for_people_is_not_needed(tmp_path):
    save_delta(tuned(), tmp_path)
    (tmp_path / "delta.json").unlink()
    assert load_delta(network(), tmp_path).trainable_params()


@pytest.mark.parametrize("kind", ["names", "shapes", "weights"])
def test_another_base_is_noticed(tmp_path, kind):
    save_delta(tuned(), tmp_path, hash_weights=True)
    other = {
        "names": lambda: nn.SequentialCell(nn.Dense(6, 6, has_bias=False), nn.ReLU(), nn.Dense(6, 3)),
        "shapes": lambda: nn.SequentialCell(nn.Dense(6, 8), nn.ReLU(), nn.Dense(6, 3)),
        "weights": network,
    }[kind]()
    with pytest.raises(DeltaFileError, match="the base"):
        load_delta(other, tmp_path)
    assert type(other[0]) is nn.Dense


def test_quite_another_network_is_told_in_one_line(tmp_path):
    save_delta(tuned(), tmp_path)
    with pytest.raises(DeltaFileError) as error:
        load_delta(nn.SequentialCell(nn.CellList([nn.Dense(6, 6)])), tmp_path)
    wanted = "another network, which had 2 weights (0.weight, ...); this SequentialCell has 2 (0.0.weight, ...)"
    assert wanted in str(error.value)
    assert str(error.value).count("\n") == 1


def network_with(base):
    cell = network()
    ms.load_param_into_net(cell, {name: ms.Parameter(value, name=name) for name, value in base.items()})
    return cell


def saved(directory, base, seed, rank=2, alpha=16, modules=("2",)):
    """A delta of its own over the same base."""
    cell = network_with(base)
    inject(cell, LoRAConfig(rank=rank, alpha=alpha, targets=["0"], modules_to_save=list(modules)))
    generator = np.random.default_rng(seed)
    for parameter in cell.trainable_params():
        parameter.set_data(Tensor(0.3 * generator.standard_normal(parameter.shape).astype(np.float32)))
    save_delta(cell, directory)
    return cell


def test_several_deltas_take_turns_on_one_network(mode, tmp_path, rng):
    cell = network()
    base = {p.name: p.value() for p in cell.get_parameters()}
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    alone = {
        name: saved(tmp_path / name, base, seed, rank, alpha)(x).asnumpy()
        for seed, (name, rank, alpha) in enumerate([("wide", 4, 16), ("narrow", 2, 5), ("other", 4, 8)])
    }
    for name in alone:
        load_delta(cell, tmp_path / name, name=name)
    for name in ("wide", "narrow", "other", "wide"):
        np.testing.assert_allclose(use(cell, name)(x).asnumpy(), alone[name], atol=1e-5)
    with pytest.raises(ValueError, match="did you mean 'narrow'"):
        use(cell, "narow")


def test_rows_of_one_batch_use_different_deltas(mode, tmp_path, rng):
    cell = network()
    base = {p.name: p.value() for p in cell.get_parameters()}
    x = rng.standard_normal((5, 3, 6)).astype(np.float32)
    alone = {None: network_with(base)(Tensor(x)).asnumpy()}
    for seed, (name, rank) in enumerate([("a", 4), ("b", 2)]):
        alone[name] = saved(tmp_path / name, base, seed, rank)(Tensor(x)).asnumpy()
        load_delta(cell, tmp_path / name, name=name)
    before = cell(Tensor(x)).asnumpy()
    with MixedDeltas(cell) as mixed:
        for names in (["a", "b", None, "b", "a"], ["b", "b", "a", None, "a"], ["a", None]):
            together = mixed(names, Tensor(x[: len(names)])).asnumpy()
            for row, name in enumerate(names):
                np.testing.assert_allclose(together[row], alone[name][row], atol=1e-5)
        with pytest.raises(ValueError, match="No delta is called 'c'"):
            mixed(["c"], Tensor(x[:1]))
    np.testing.assert_array_equal(cell(Tensor(x)).asnumpy(), before)


def test_only_lora_and_heads_can_be_mixed(tmp_path):
    cell = inject(network(), AdapterConfig(size=2, targets=["0"]))
    with pytest.raises(ValueError, match="No delta is loaded"):
        MixedDeltas(cell)
    save_delta(cell, tmp_path)
    load_delta(cell, tmp_path)
    with pytest.raises(ValueError, match="rows can only be mixed for LoRA"):
        MixedDeltas(cell)


def test_switching_keeps_what_was_trained_since(tmp_path, rng):
    cell = network()
    base = {p.name: p.value() for p in cell.get_parameters()}
    for seed, name in enumerate("ab"):
        saved(tmp_path / name, base, seed)
        load_delta(cell, tmp_path / name, name=name)
    trained = cell.trainable_params()[0]
    trained.set_data(trained + 1)
    expected = trained.asnumpy().copy()
    use(cell, "a")
    assert not np.array_equal(trained.asnumpy(), expected)
    use(cell, "b")
    np.testing.assert_array_equal(trained.asnumpy(), expected)


def test_a_delta_with_another_configuration_is_refused(tmp_path):
    cell = inject(network(), AdapterConfig(size=2, targets=["0"]))
    save_delta(cell, tmp_path)
    with pytest.raises(DeltaFileError, match="non_linearity was 'gelu' and is 'relu' here"):
        load_delta(inject(network(), AdapterConfig(size=2, targets=["0"], non_linearity="relu")), tmp_path)
    with pytest.raises(DeltaFileError, match="is of adapter, the network has lora"):
        load_delta(tuned(), tmp_path)


def delta_of(directory):
    """The matrix that a directory of rank patterns and scales adds to layer 0."""
    _, (config,), tensors = read_delta(directory)
    here = config.at("0")
    scale = here.scaled_alpha / here.rank
    return scale * tensors["0.mindpet_delta_lora_b"].astype(float) @ tensors["0.mindpet_delta_lora_a"]


def test_combined_deltas_follow_their_formulas(tmp_path, rng):
    base = {p.name: p.value() for p in network().get_parameters()}
    for seed, (name, rank, alpha) in enumerate([("a", 2, 16), ("b", 2, 5)]):
        saved(tmp_path / name, base, seed, rank, alpha)
    sources, weights = [tmp_path / "a", tmp_path / "b"], [0.75, 0.5]
    first, second = (delta_of(source) for source in sources)
    total = 0.75 * first + 0.5 * second

    combine(sources, tmp_path / "cat", "concatenation", weights)
    np.testing.assert_allclose(delta_of(tmp_path / "cat"), total, atol=1e-5)

    combine(sources, tmp_path / "svd4", "svd", weights, rank=4)
    np.testing.assert_allclose(delta_of(tmp_path / "svd4"), total, atol=1e-5)
    combine(sources, tmp_path / "svd1", "svd", weights, rank=1)
    left, values, right = np.linalg.svd(total)
    np.testing.assert_allclose(delta_of(tmp_path / "svd1"), values[0] * np.outer(left[:, 0], right[0]), atol=1e-5)

    combine([sources[0]], tmp_path / "one", "linear", [0.5])
    np.testing.assert_allclose(delta_of(tmp_path / "one"), 0.5 * first, atol=1e-5)

    combine(sources, tmp_path / "ties", "ties", weights, rank=6, density=1.0)
    parts = np.stack([0.75 * first, 0.5 * second])
    agrees = np.sign(parts) == np.sign(parts.sum(0))
    share = np.array([0.75, 0.5])[:, None, None]
    expected = (parts * agrees).sum(0) / (agrees * share).sum(0) * 1.25
    np.testing.assert_allclose(delta_of(tmp_path / "ties"), expected, atol=1e-5)

    combine(sources, tmp_path / "trim", "ties", weights, rank=6, density=0.25)
    expected = np.zeros_like(first)
    least = [np.sort(np.abs(each), axis=None)[-9] for each in (first, second)]  # of 36 entries a quarter
    for place in np.ndindex(first.shape):
        votes = [(w, w * d[place]) for w, d, size in zip(weights, (first, second), least) if abs(d[place]) >= size]
        for_it = [(w, vote) for w, vote in votes if np.sign(vote) == np.sign(sum(each for _, each in votes))]
        if for_it:
            expected[place] = 1.25 * sum(vote for _, vote in for_it) / sum(w for w, _ in for_it)
    np.testing.assert_allclose(delta_of(tmp_path / "trim"), expected, atol=1e-5)

    combine(sources, tmp_path / "dare", "dare", weights, rank=6, density=1.0)
    np.testing.assert_allclose(delta_of(tmp_path / "dare"), total, atol=1e-5)
    draws = []
    for seed in range(200):
        combine([sources[0]], tmp_path / "draw", "dare", [1.0], rank=6, density=0.5, seed=seed)
        draws.append(delta_of(tmp_path / "draw"))
    deviation = np.abs(first) / np.sqrt(200)
    assert (np.abs(np.mean(draws, 0) - first) < 5 * deviation + 1e-5).all()

    head = [read_delta(source)[2]["2.weight"] for source in sources]
    np.testing.assert_allclose(
        read_delta(tmp_path / "svd4")[2]["2.weight"], (0.75 * head[0] + 0.5 * head[1]) / 1.25, atol=1e-6
    )
    combined = load_delta(network(), tmp_path / "cat")
    assert combined[0].lora_rank == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "svdd"}, "did you mean 'svd'"),
        ({"weights": [1.0]}, "2 sources and 1 weights"),
        ({"method": "linear", "weights": [1, -1]}, "none may be negative"),
        ({"method": "ties", "density": 0.0}, "must be in"),
        ({"method": "linear"}, "needs equal ones"),
    ],
)
def test_what_cannot_be_combined_is_explained(tmp_path, options, says):
    base = {p.name: p.value() for p in network().get_parameters()}
    saved(tmp_path / "a", base, 0, rank=2)
    saved(tmp_path / "b", base, 1, rank=3)
    with pytest.raises(ValueError, match=says):
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


LORA_ON_0 = {"rank": 2, "targets": ["0"]}


@pytest.mark.parametrize(
    "configs", [[DoRAConfig(**LORA_ON_0)], [LoRAConfig(**LORA_ON_0), BitFitConfig()], [BitFitConfig()]]
)
def test_only_lora_is_combined(tmp_path, configs):
    cell = network()
    for config in configs:
        inject(cell, config)
    save_delta(cell, tmp_path / "a")
    with pytest.raises(DeltaFileError, match="only LoRA is combined|is not a delta of LoRA alone"):
        combine([tmp_path / "a", tmp_path / "a"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("part", ["parameters", "quantised", "base"])
def test_a_description_may_leave_a_part_out(tmp_path, part):
    save_delta(inject(network(), LoRAConfig(**LORA_ON_0)), tmp_path)
    rewritten(tmp_path, **{part: None})
    assert load_delta(network(), tmp_path).trainable_params()


def test_a_delta_that_is_not_there_is_looked_for(tmp_path):
    save_delta(tuned(), tmp_path / "run" / "delta")
    with pytest.raises(DeltaFileError, match="; there is one in .*run/delta.$"):
        load_delta(network(), tmp_path / "run")
    with pytest.raises(DeltaFileError, match="; near it: run.$"):
        load_delta(network(), tmp_path / "runn")


def test_a_broken_checkpoint_is_no_delta(tmp_path):
    (tmp_path / "mine.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(DeltaFileError, match="mine.ckpt"):
        load_delta(network(), tmp_path / "mine.ckpt")


def test_nothing_to_save_is_an_error(tmp_path):
    cell = network()
    for parameter in cell.get_parameters():
        parameter.requires_grad = False
    with pytest.raises(ValueError, match="Nothing in this network trains"):
        save_delta(cell, tmp_path)


@pytest.mark.parametrize("names", ["ab", "AB"])
def test_a_bare_layer_takes_both_spellings_of_its_names(tmp_path, names, rng):
    layer = LoRADense(4, 3, 2, 4, compute_dtype=ms.float32)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip(names, [(2, 4), (3, 2)])}
    saved = [{"name": f"mindpet_delta_lora_{name}", "data": Tensor(value)} for name, value in values.items()]
    ms.save_checkpoint(saved, str(tmp_path / "delta.ckpt"))
    load_delta(layer, tmp_path / "delta.ckpt")
    np.testing.assert_array_equal(layer.mindpet_delta_lora_a.asnumpy(), values[names[0]])
    np.testing.assert_array_equal(layer.mindpet_delta_lora_b.asnumpy(), values[names[1]])


def test_each_injection_is_fitted_by_itself(tmp_path, rng):
    def two(first_alpha, order=("0", "2")):
        cell = network()
        for path in order:
            inject(cell, LoRAConfig(rank=2, alpha=first_alpha if path == "0" else 32, targets=[path]))
        return cell

    source = two(4)
    base = {p.name: ms.Parameter(p.value(), name=p.name) for p in source.get_parameters() if "delta" not in p.name}
    for parameter in source.trainable_params():
        parameter.set_data(Tensor(0.3 * rng.standard_normal(parameter.shape).astype(np.float32)))
    save_delta(source, tmp_path)
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    for order in (("0", "2"), ("2", "0")):
        other = two(8, order)
        ms.load_param_into_net(other, base)
        np.testing.assert_allclose(load_delta(other, tmp_path)(x).asnumpy(), source(x).asnumpy(), atol=1e-5)


def test_a_delta_with_more_than_the_network_s_is_refused(tmp_path):
    cell = network()
    base = {p.name: p.value() for p in cell.get_parameters()}
    saved(tmp_path / "plain", base, 0, modules=())
    saved(tmp_path / "head", base, 1)
    load_delta(cell, tmp_path / "plain", "plain")
    with pytest.raises(DeltaFileError, match="2.weight"):
        load_delta(cell, tmp_path / "head", "head")


def test_numbers_that_do_not_fit_the_dtype_are_refused(tmp_path):
    cell = tuned()
    cell[0].mindpet_delta_lora_b.set_data(Tensor(np.full((6, 2), 1e5, np.float32)))
    save_delta(cell, tmp_path)
    half = network()
    for parameter in half.get_parameters():
        parameter.set_dtype(ms.float16)
    with pytest.raises(DeltaFileError, match="too large for the network's Float16"):
        load_delta(half, tmp_path)


def test_a_file_that_lacks_what_it_says_is_refused(tmp_path):
    save_delta(tuned(), tmp_path)
    description, _, tensors = read_delta(tmp_path)
    tensors.pop("2.bias")
    write_delta(tmp_path, description, tensors)
    with pytest.raises(DeltaFileError, match="does not hold what it says: 2.bias"):
        load_delta(network(), tmp_path)


def test_ranks_added_in_loading_can_train(tmp_path):
    base = {p.name: p.value() for p in network().get_parameters()}
    saved(tmp_path, base, 0, rank=2)
    wide = inject(network_with(base), LoRAConfig(rank=4, targets=["0"], modules_to_save=["2"]))
    load_delta(wide, tmp_path)
    weights = ms.ParameterTuple([wide[0].mindpet_delta_lora_b])
    x = Tensor(np.random.default_rng(1).standard_normal((16, 6)).astype(np.float32))
    (gradient,) = ms.grad(lambda rows: wide(rows).sum(), None, weights)(x)
    assert (np.abs(gradient.asnumpy()) > 0).any(axis=0).all()  # each of the four ranks


def test_a_path_that_begins_like_another_is_fitted_once(tmp_path, rng):
    def eleven(alpha):
        cell = nn.SequentialCell(*[nn.Dense(3, 3) for _ in range(11)])
        inject(cell, LoRAConfig(rank=2, alpha=alpha, targets=["1"]))
        return inject(cell, LoRAConfig(rank=2, alpha=alpha, targets=["10"]))

    source = eleven(4)
    base = {p.name: ms.Parameter(p.value(), name=p.name) for p in source.get_parameters() if "delta" not in p.name}
    for parameter in source.trainable_params():
        parameter.set_data(Tensor(0.3 * rng.standard_normal(parameter.shape).astype(np.float32)))
    save_delta(source, tmp_path)
    other = eleven(8)
    ms.load_param_into_net(other, base)
    x = Tensor(rng.standard_normal((4, 3)).astype(np.float32))
    np.testing.assert_allclose(load_delta(other, tmp_path)(x).asnumpy(), source(x).asnumpy(), atol=1e-5)
