"""Checkpoints of distributed runs come together in one network, and are cut anew, to the last bit."""

import re
import resource
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from mindspore.parallel import (
    build_searched_strategy,
    load_distributed_checkpoint,
    merge_sliced_parameter,
    transform_checkpoints,
    unified_safetensors,
)
from mindspore.train import node_strategy_pb2

import mindpet
from mindpet import load_distributed_delta, transform_delta_checkpoints
from mindpet.graph import DeltaFileError
from mindpet.utils.exceptions import AbsolutePathError, LinkPathError
from tests.parallel.runs import Run, make, numbers, training

FORMATS = ["ckpt", "safetensors"]
TRAINED = {
    *(f"{layer}.mindpet_delta_lora_{letter}" for layer in ("up", "down") for letter in "ab"),
    *("head.weight", "head.bias"),
}


@pytest.fixture(scope="module")
def runs(compiler, tmp_path_factory):
    """Pre-training on eight devices and tuning on eight, four and two, with the compiler's strategy files."""
    directory = tmp_path_factory.mktemp("strategies")
    return {
        "base": Run(directory / "base.ckpt", 2, 4, tuned=False),
        8: Run(directory / "8.ckpt", 2, 4, tuned=True),
        4: Run(directory / "4.json", 2, 2, tuned=True),
        2: Run(directory / "2.ckpt", 1, 2, tuned=True),
    }


@pytest.fixture
def tuned():
    """The network after tuning, whole."""
    return make(tuned=True, seed=2)


@pytest.fixture
def files(runs, tuned, tmp_path):
    """Arguments of load_distributed_delta for a run on eight devices: directories and strategy files."""
    return {
        "base": runs["base"].save(tmp_path / "base", make(tuned=False, seed=1), everything=True),
        "base_strategy": runs["base"].strategy,
        "delta": runs[8].save(tmp_path / "tuned", tuned),
        "delta_strategy": runs[8].strategy,
    }


def expected(tuned):
    """Pre-trained numbers, tuned ones on top."""
    return numbers(make(tuned=False, seed=1)) | {
        name: value for name, value in numbers(tuned).items() if name in TRAINED
    }


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def in_order_of_rank(directory):
    return [str(directory / f"rank_{rank}" / "tuned-1_3.ckpt") for rank in range(8)]


def content(path):
    """Numbers of a checkpoint, exactly, and their dtype."""
    loaded = ms.load_checkpoint(str(path), format=Path(path).suffix[1:])
    return {name: value.astype(ms.float32).asnumpy() for name, value in loaded.items()}, {
        v.dtype for v in loaded.values()
    }


# ------------------------------------------------------------------------------- appendix A, with MindSpore's own call


def test_strategy_files_of_a_tuning_run_name_what_trains_and_its_moments(runs):
    named = set(build_searched_strategy(runs[8].strategy))
    assert {name for name in named if not name.startswith("moment")} == TRAINED
    assert {name.partition(".")[2] for name in named if name.startswith("moment")} == TRAINED


@pytest.mark.parametrize("everything", [False, True], ids=["TrainableParamsCheckPoint", "ModelCheckpoint"])
def test_the_two_scenarios_of_appendix_a(runs, tuned, files, tmp_path, everything):
    if everything:  # scenario two: the files of the tuning run hold the frozen weights and the moments as well
        files["delta"] = runs[8].save(tmp_path / "everything", tuned, everything=True)
        assert {"up.weight", "moment1.head.weight"} < set(ms.load_checkpoint(in_order_of_rank(files["delta"])[5]))
    else:
        assert set(ms.load_checkpoint(in_order_of_rank(files["delta"])[5])) == TRAINED
    network = make(tuned=True)
    for role in ("base", "delta"):
        load_distributed_checkpoint(
            network=network,
            checkpoint_filenames=in_order_of_rank(files[role]),
            train_strategy_filename=files[f"{role}_strategy"],
        )
    assert_same(numbers(network), expected(tuned))


# ------------------------------------------------------------------------------------------------------- as one call


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("everything", [False, True], ids=["TrainableParamsCheckPoint", "ModelCheckpoint"])
def test_base_and_delta(runs, tuned, tmp_path, everything, file_format):
    base = runs["base"].save(tmp_path / "base", make(tuned=False, seed=1), file_format=file_format)
    delta = runs[8].save(tmp_path / "tuned", tuned, everything=everything, file_format=file_format)
    network = make(tuned=True)
    report = load_distributed_delta(
        network, base=base, base_strategy=runs["base"].strategy, delta=delta, delta_strategy=runs[8].strategy
    )
    assert_same(numbers(network), expected(tuned))
    assert set(report.delta) == TRAINED
    assert set(report.base) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert report.untouched == ()
    assert ("moment1.head.weight" in report.ignored) == everything
    assert str(report).startswith("4 parameters from the base, 6 from the delta, 0 left as they were")


def test_outputs_are_those_of_the_tuned_network(mode, files, tuned, rng):
    network, x = make(tuned=True), ms.Tensor(rng.normal(size=(3, 16)), ms.float32)
    before = network(x).asnumpy()  # compiled before the numbers come
    load_distributed_delta(network, **files)
    ms.load_param_into_net(tuned, {name: ms.Parameter(value) for name, value in expected(tuned).items()})
    np.testing.assert_array_equal(network(x).asnumpy(), tuned(x).asnumpy())
    assert (before != network(x).asnumpy()).any()


def test_the_delta_alone(files, tuned):
    network = make(tuned=True, seed=5)
    kept = numbers(network)
    report = load_distributed_delta(network, delta=files["delta"], delta_strategy=files["delta_strategy"])
    assert_same(numbers(network), kept | {name: value for name, value in numbers(tuned).items() if name in TRAINED})
    assert (report.base, set(report.untouched)) == ((), set(kept) - TRAINED)


def test_a_whole_base_has_nowrite_strategy(files, tuned, tmp_path):
    ms.save_checkpoint(make(tuned=False, seed=1), str(tmp_path / "whole.ckpt"))
    network = make(tuned=True)
    load_distributed_delta(network, **files | {"base": tmp_path / "whole.ckpt", "base_strategy": None})
    assert_same(numbers(network), expected(tuned))


def test_ways_to_name_the_files(files, tuned, tmp_path, monkeypatch):
    flat = tmp_path / "flat"
    flat.mkdir()
    for rank, path in enumerate(in_order_of_rank(files["delta"])):
        (flat / f"delta{rank}.ckpt").symlink_to(path)
        (tmp_path / f"named_rank{rank}-1_3.ckpt").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    (files["delta"] / "rank_0" / "tuned-graph.meta").write_text("not a checkpoint")
    for delta in (
        str(files["delta"]),
        files["delta"] / "rank_*" / "tuned-1_3.ckpt",
        in_order_of_rank(files["delta"]),
        flat,
        "flat/delta*.ckpt",
        "named*",
    ):
        network = make(tuned=True)
        load_distributed_delta(network, **files | {"delta": delta})
        assert_same(numbers(network), expected(tuned))


def test_numbers_take_the_dtype_of_the_network(runs, files, tuned, tmp_path):
    network = make(tuned=True).to_float(ms.float16)
    for parameter in network.get_parameters():
        parameter.set_dtype(ms.float16)
    load_distributed_delta(network, **files)
    assert_same(numbers(network), {name: value.astype(np.float16) for name, value in expected(tuned).items()})
    wide = runs[8].save(tmp_path / "wide", tuned, dtype=ms.bfloat16)
    network = make(tuned=True)
    load_distributed_delta(network, delta=wide, delta_strategy=files["delta_strategy"])
    rounded = ms.Tensor(tuned.head.weight).astype(ms.bfloat16).astype(ms.float32).asnumpy()
    np.testing.assert_array_equal(network.head.weight.asnumpy(), rounded)


def test_a_strategy_file_may_name_frozen_weights_too(runs, files, tuned, tmp_path):
    run = Run(tmp_path / "all.ckpt", 2, 4, tuned=True, only_trainable_params=False)
    assert "up.weight" in build_searched_strategy(run.strategy)
    network = make(tuned=True)
    load_distributed_delta(network, **files | {"delta_strategy": run.strategy})
    assert_same(numbers(network), expected(tuned))


# -------------------------------------------------------------------------------------------------- what does not fit


def refused(files, *messages, network=None, **changes):
    """Everything that is wrong is in one message, and nothing has changed."""
    network = network or make(tuned=True, seed=9)
    before = numbers(network)
    with pytest.raises(DeltaFileError) as refusal:
        load_distributed_delta(network, **{**files, **changes})
    for message in messages:
        assert message in str(refusal.value)
    assert_same(numbers(network), before)
    return str(refusal.value)


def test_all_problems_at_once(files):
    (files["base"] / "rank_3" / "tuned-1_3.ckpt").unlink()
    (files["delta"] / "rank_6" / "tuned-1_3.ckpt").write_bytes(b"not a checkpoint")
    network = make(tuned=False, seed=9)
    mindpet.inject(network, mindpet.LoRAConfig(rank=4, targets=["up"]))
    refused(
        files,
        "base: the strategy file is for 8 devices, and there is no file of rank 3",
        f"delta: {files['delta'] / 'rank_6' / 'tuned-1_3.ckpt'} cannot be read as a checkpoint",
        "delta: not in this network: down.mindpet_delta_lora_a",
        "delta: up.mindpet_delta_lora_b: the files have shape (64, 2), the network (64, 4)",
        network=network,
    )


def test_parameters_that_no_file_has(files):
    class Larger(nn.Cell):
        def __init__(self):
            super().__init__()
            whole = make(tuned=False)
            self.up, self.down, self.head, self.more = whole.up, whole.down, whole.head, nn.Dense(2, 2)

    network = Larger()
    mindpet.inject(network, mindpet.LoRAConfig(rank=2, targets=["up", "down", "more"]))
    refused(files, "more.weight: no file has it", "more.mindpet_delta_lora_a: no delta file has it", network=network)


def test_what_was_trained_must_come_from_the_tuning_run(runs, files, tuned, tmp_path):
    for parameter in (tuned.head.weight, tuned.head.bias):
        parameter.requires_grad = False
    network = make(tuned=True)
    for rank, path in enumerate(in_order_of_rank(files["delta"])):
        kept = {name: value for name, value in ms.load_checkpoint(path).items() if name != "head.weight"}
        ms.save_checkpoint([{"name": name, "data": value} for name, value in kept.items()], path)
    message = refused(files, "head.weight: no delta file has it", network=network)
    assert "head.bias" not in message


def test_a_slice_that_one_rank_lacks(files):
    path = in_order_of_rank(files["delta"])[4]
    kept = {name: value for name, value in ms.load_checkpoint(path).items() if name != "up.mindpet_delta_lora_b"}
    ms.save_checkpoint([{"name": name, "data": value} for name, value in kept.items()], path)
    refused(files, "delta: up.mindpet_delta_lora_b: rank 4 has no slice of it")


def test_files_of_two_moments(runs, files, tuned):
    later = make(tuned=True, seed=3)
    other = runs[8].save(files["delta"].parent / "later", later)
    mixed = [*in_order_of_rank(files["delta"])[:6], *in_order_of_rank(other)[6:]]
    refused(files, "up.mindpet_delta_lora_a: ranks 0 and 6 have other numbers in the same slice", delta=mixed)


def test_counters_tell_moments_apart(runs, files, tuned):
    parts = [
        runs[8].save(files["delta"].parent / str(step), tuned, append_info=["step_num"], step=step) for step in (3, 4)
    ]
    mixed = [*in_order_of_rank(parts[0])[:6], *sorted(map(str, parts[1].glob("rank_[67]/*")))]
    refused(files, "step_num differs from rank to rank: these files are not of one moment", delta=mixed)
    network = make(tuned=True)
    load_distributed_delta(network, **files | {"delta": parts[1]})
    assert_same(numbers(network), expected(tuned))


def test_numbers_that_are_none_and_numbers_too_large(runs, files, tuned):
    tuned.head.bias.set_data(ms.Tensor(np.full(6, np.nan), ms.float32))
    tuned.down.mindpet_delta_lora_b.set_data(ms.Tensor(np.full((16, 2), 7e4), ms.float32))
    files["delta"] = runs[8].save(files["delta"].parent / "wrong", tuned)
    network = make(tuned=True, seed=9)
    message = refused(files, "head.bias: it holds NaN or infinity", network=network)
    assert "mindpet_delta" not in message
    for parameter in network.get_parameters():
        parameter.set_dtype(ms.float16)
    refused(files, "down.mindpet_delta_lora_b: it holds NaN or infinity, or numbers too large", network=network)


def test_a_strategy_file_of_another_run(runs, files):
    refused(
        files, "strategy file is for 4 devices, and there is a file of rank 4, 5, 6, 7", delta_strategy=runs[4].strategy
    )
    refused(
        files, "base: the strategy file names none of", base_strategy=write_strategy(files, {"x": ([8], [-1], 0, 0)})
    )
    refused(files, "there is no strategy file, and there is a file of rank 1, 2", delta_strategy=None)


def test_strategy_files_that_cannot_be_read(files, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.ckpt").write_bytes(b"no protocol buffer")
    (tmp_path / "empty.json").write_text("{}")
    for name in ("broken.json", "broken.ckpt", "absent.ckpt"):
        refused(files, f"delta: the strategy file {tmp_path / name} cannot be read", delta_strategy=tmp_path / name)
    refused(files, "empty.json holds no parameter", base_strategy=str(tmp_path / "empty.json"))


def test_files_that_cannot_be_told_apart(runs, files, tuned, tmp_path):
    listed = in_order_of_rank(files["delta"])
    refused(files, "the list has a file twice", delta=[*listed[:7], listed[6]])
    refused(files, f"{listed[1]} is at place 0 of the list", delta=[listed[1], listed[0], *listed[2:]])
    refused(files, "there is no file of rank 7", delta=listed[:7])
    refused(files, "the list of files is empty", delta=[])
    refused(files, "there is no file", delta=[*listed[:7], tmp_path / "absent.ckpt"])
    refused(files, "ends neither in .ckpt nor in .safetensors", delta=[*listed[:7], __file__])
    refused(files, "no file matches", delta=str(tmp_path / "nothing*"))
    refused(files, "there is no .ckpt or .safetensors file in", delta=tmp_path)
    refused(files, "ends neither in .ckpt nor in .safetensors", delta=str(files["delta"] / "rank_[0-7]"))
    (files["delta"] / "rank_0" / "tuned-1_4.ckpt").symlink_to(listed[0])
    pattern = f"give a pattern that matches one, such as {files['delta']}/rank_*/tuned-1_4.ckpt"
    refused(files, "rank 0 has several files (tuned-1_3.ckpt, tuned-1_4.ckpt)", pattern)
    (tmp_path / "flat").mkdir()
    for number, path in enumerate(listed):
        (tmp_path / "flat" / f"tuned-{number}_3.ckpt").symlink_to(path)
    refused(files, "does not say whose rank it is: give a list in order of rank", delta=tmp_path / "flat")


def test_wrong_arguments(files):
    network = make(tuned=True)
    with pytest.raises(TypeError, match="'network' must be a mindspore.nn.Cell"):
        load_distributed_delta("network", **files)
    with pytest.raises(TypeError, match="'delta' must be a path, or a list of paths, but got 3"):
        load_distributed_delta(network, **files | {"delta": 3})
    with pytest.raises(TypeError, match="'base' must be a path, or a list of paths, but got None"):
        load_distributed_delta(network, **files | {"base": [None]})
    with pytest.raises(ValueError, match="'base_strategy' is given, but no 'base'"):
        load_distributed_delta(network, **files | {"base": None})
    mindpet.merge(network)
    with pytest.raises(ValueError, match="unmerge them first"):
        load_distributed_delta(network, **files)


# ---------------------------------------------------------------------------------------------------------- cut anew


def assert_holds(paths, run, whole, dtype=ms.float32):
    """Each file has the rank's slices of what trains, and nothing else."""
    for rank, path in enumerate(paths):
        values, dtypes = content(path)
        assert set(values) == TRAINED
        assert dtypes == {dtype}
        for name, value in values.items():
            part = whole[name] if run is None else run.slice(name, whole[name], rank)
            np.testing.assert_array_equal(value, part, err_msg=f"{name} of rank {rank}")


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.bfloat16], ids=str)
@pytest.mark.parametrize("file_format", FORMATS)
def test_whole_and_to_other_numbers_of_devices_and_back(runs, tuned, tmp_path, file_format, dtype):
    whole = {
        name: ms.Tensor(value).astype(dtype).astype(ms.float32).asnumpy() for name, value in numbers(tuned).items()
    }
    source = runs[8].save(tmp_path / "tuned", tuned, file_format=file_format, dtype=dtype)
    strategy = runs[8].strategy
    for step, devices in enumerate([4, 2, None, 2, 8, None, 4, 8]):
        target = None if devices is None else runs[devices].strategy
        place = tmp_path / f"{step}"
        paths = transform_delta_checkpoints(
            source, place, strategy=strategy, target_strategy=target, prefix="cut", format=file_format
        )
        assert paths == [place / f"rank_{n}" / f"cut{n}.{file_format}" for n in range(devices or 1)]
        assert_holds(paths, runs.get(devices), whole, dtype)
        source, strategy = place, target


def test_the_same_as_mindspores_own_tools(runs, tuned, tmp_path):
    """Where they do it: for .ckpt between any numbers of devices, for safetensors into one."""
    source = runs[8].save(tmp_path / "ckpt", tuned)
    transform_checkpoints(str(source), str(tmp_path / "theirs"), "delta", runs[8].strategy, runs[4].strategy)
    ours = transform_delta_checkpoints(
        source, tmp_path / "ours", strategy=runs[8].strategy, target_strategy=runs[4].strategy
    )
    for path in ours:
        assert_same(content(path)[0], content(tmp_path / "theirs" / path.relative_to(tmp_path / "ours"))[0])
    slices = [ms.load_checkpoint(path) for path in in_order_of_rank(source)]
    layouts = build_searched_strategy(runs[8].strategy)
    merged = {name: merge_sliced_parameter([each[name] for each in slices], layouts).asnumpy() for name in TRAINED}
    unified_safetensors(
        str(runs[8].save(tmp_path / "safetensors", tuned, file_format="safetensors")),
        runs[8].strategy,
        str(tmp_path / "unified"),
    )
    (whole,) = transform_delta_checkpoints(source, tmp_path / "whole", strategy=runs[8].strategy)
    assert_same(content(whole)[0], merged)
    assert_same(content(tmp_path / "unified" / "part0.safetensors")[0], merged)


def test_from_one_format_to_the_other(runs, tuned, tmp_path):
    source = runs[8].save(tmp_path / "tuned", tuned, file_format="safetensors")
    four = {"strategy": runs[8].strategy, "target_strategy": runs[4].strategy}
    assert_holds(transform_delta_checkpoints(source, tmp_path / "four", **four), runs[4], numbers(tuned))
    (whole,) = transform_delta_checkpoints(tmp_path / "four", tmp_path / "whole", strategy=runs[4].strategy)
    (again,) = transform_delta_checkpoints(whole, tmp_path / "again", format="safetensors")
    assert_holds([again], None, numbers(tuned))


def test_what_the_strategy_file_says_nothing_of_is_left_out(runs, tuned, tmp_path):
    """MindSpore's own tools pass frozen weights on as they are on some rank: a slice for the whole."""
    source = runs[8].save(tmp_path / "tuned", tuned, everything=True)
    path = in_order_of_rank(source)[3]
    own = {**ms.load_checkpoint(path), "of_rank_3": ms.Tensor(np.ones(2, np.float32))}
    ms.save_checkpoint([{"name": name, "data": value} for name, value in own.items()], path)
    (whole,) = transform_delta_checkpoints(source, tmp_path / "whole", strategy=runs[8].strategy)
    names = set(content(whole)[0])
    assert names > TRAINED
    assert {name.partition(".")[2] for name in names - TRAINED} == TRAINED  # and their moments, to go on from


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_was_put_together_is_the_delta_of_a_network_that_never_was_cut(runs, files, tuned, tmp_path, file_format):
    ms.load_param_into_net(tuned, {name: ms.Parameter(value) for name, value in expected(tuned).items()})
    mindpet.save_delta(tuned, tmp_path / "never cut", hash_weights=True)
    cut = runs[8].save(tmp_path / "cut", tuned, file_format=file_format)
    (whole,) = transform_delta_checkpoints(cut, tmp_path / "whole", strategy=runs[8].strategy, format=file_format)
    networks = {"one call": make(tuned=True), "whole": make(tuned=True)}
    load_distributed_delta(networks["one call"], **files | {"delta": cut})
    load_distributed_delta(networks["whole"], **files | {"delta": whole, "delta_strategy": None})
    for name, network in networks.items():
        mindpet.save_delta(network, tmp_path / name, hash_weights=True)
        for file in ("delta.safetensors", "delta.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "never cut" / file).read_bytes()


def test_a_target_that_does_not_fit(runs, files, tmp_path):
    other = {
        "head.weight": ([4], [0, -1], 0, 0),
        "head.bias": ([4], [-1], 0, 0),
        "up.mindpet_delta_lora_a": ([4], [0], 0, 0),
    }
    with pytest.raises(DeltaFileError) as refusal:
        transform_delta_checkpoints(
            files["delta"], tmp_path / "new", strategy=runs[8].strategy, target_strategy=write_strategy(files, other)
        )
    for message in (
        "target: head.weight: shape (6, 16) cannot be cut into (4, 1) parts",
        "target: up.mindpet_delta_lora_a: shape (2, 16) cannot be cut into (4,) parts",
        "target: the strategy file says nothing of up.mindpet_delta_lora_b",
    ):
        assert message in str(refusal.value)
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_half_written(runs, files, tmp_path):
    place = tmp_path / "out" / "new"
    whole = {"strategy": runs[8].strategy, "target_strategy": runs[4].strategy}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        with pytest.raises((RuntimeError, OSError, ValueError)):
            transform_delta_checkpoints(files["delta"], place, **whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(place.parent.iterdir()) == []
    place.mkdir()
    assert len(transform_delta_checkpoints(files["delta"], place, **whole)) == 4
    assert list(place.parent.iterdir()) == [place]
    with pytest.raises(ValueError, match="'directory' must be new or empty"):
        transform_delta_checkpoints(files["delta"], place, **whole)


def test_the_directory_follows_the_rules_of_trainable_params_checkpoint(files, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    strategy = files["delta_strategy"]
    with pytest.raises(LinkPathError, match="must not be a symbolic link"):
        transform_delta_checkpoints(files["delta"], f"{tmp_path / 'link'}/", strategy=strategy)
    with pytest.raises(AbsolutePathError, match="must be absolute, but got 'new'"):
        transform_delta_checkpoints(files["delta"], "new", strategy=strategy)
    for empty in (None, ""):
        with pytest.raises(ValueError, match="must be an absolute path, but got"):
            transform_delta_checkpoints(files["delta"], empty, strategy=strategy)
    with pytest.raises(TypeError, match="'directory' must be a str or a Path"):
        transform_delta_checkpoints(files["delta"], 3, strategy=strategy)
    with pytest.raises(ValueError, match="'format' must be ckpt or safetensors, but got 'gguf'"):
        transform_delta_checkpoints(files["delta"], tmp_path / "new", strategy=strategy, format="gguf")
    with pytest.raises(ValueError, match="'prefix' must be a str without '/'"):
        transform_delta_checkpoints(files["delta"], tmp_path / "new", strategy=strategy, prefix="a/b")


# --------------------------------------------------------------- strategies that the compiler here has no devices for


def write_strategy(files, layouts):
    """A strategy file, written: (device matrix, tensor map, step and size of the optimizer's cut) by name."""
    content = node_strategy_pb2.ParallelStrategyMap(current_stage=1)
    content.parallel_strategy_item.add(node_name="operator").parallel_strategys.stage = 0
    for name, (matrix, axes, step, size) in layouts.items():
        item = content.parallel_layout_item.add(param_name=name)
        layout = item.parallel_layouts
        layout.dev_matrix.add().dim.extend(matrix)
        for each in axes if isinstance(axes[0], list) else [axes]:
            layout.tensor_map.add().dim.extend(each)
        layout.param_split_shape.add()
        layout.field = 0
        layout.opt_weight_shard_step, layout.opt_weight_shard_size = step, size
    path = files["delta"].parent / "written.ckpt"
    path.write_bytes(content.SerializeToString())
    return str(path)


def parts_of(value, layout, rank):
    """The slice of a rank where an axis may be cut by several axes of the matrix, and the first one further."""
    matrix, axes, step, size = layout
    place = np.unravel_index(rank, matrix)
    for axis, cut in enumerate(axes):
        for number in cut if isinstance(cut, list) else [cut]:
            if number >= 0:
                dimension = len(matrix) - 1 - number
                value = np.split(value, matrix[dimension], axis)[place[dimension]]
    return np.array(np.split(value, size)[rank // step % size] if size else value, order="C")


WRITTEN = {
    "optimizer parallel": {"head.weight": ([2, 4], [-1, 0], 4, 2), "up.weight": ([2, 4], [0, -1], 4, 2)},
    "optimizer parallel over all": {"head.weight": ([8], [-1, -1], 1, 2), "up.weight": ([8], [-1, -1], 1, 8)},
    "optimizer parallel for some": {"head.weight": ([8], [-1, -1], -1, 0), "up.weight": ([8], [-1, -1], 1, 8)},
    "both axes": {"head.weight": ([2, 2, 2], [1, 0], 0, 0), "up.weight": ([2, 2, 2], [0, 2], 0, 0)},
    "an axis cut twice": {"head.weight": ([2, 4], [[-1], [1, 0]], 0, 0), "up.weight": ([2, 4], [[1, 0], [-1]], 0, 0)},
}


def loaded_and_made_whole(tmp_path, strategy, values):
    """The slices in ``delta`` become `values` in a network, and one whole checkpoint, which is returned."""
    network = nn.Cell()
    network.head, network.up = nn.Dense(16, 6), nn.Dense(16, 64)
    before = numbers(network)
    load_distributed_delta(network, delta=tmp_path / "delta", delta_strategy=strategy)
    assert_same(numbers(network), before | values)
    (whole,) = transform_delta_checkpoints(tmp_path / "delta", tmp_path / "whole", strategy=strategy)
    assert_same(content(whole)[0], values)
    return whole


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("file_format", FORMATS)
def test_other_strategies(tuned, tmp_path, kind, file_format):
    values, layouts = {name: numbers(tuned)[name] for name in ("head.weight", "up.weight")}, WRITTEN[kind]
    strategy = write_strategy({"delta": tmp_path / "delta"}, layouts)
    for rank in range(8):
        (tmp_path / "delta" / f"rank_{rank}").mkdir(parents=True)
        slices = [{"name": n, "data": ms.Tensor(parts_of(v, layouts[n], rank))} for n, v in values.items()]
        path = tmp_path / "delta" / f"rank_{rank}" / f"tuned-1_3.{file_format}"
        ms.save_checkpoint(slices, str(path), format=file_format)
    whole = loaded_and_made_whole(tmp_path, strategy, values)
    back = transform_delta_checkpoints(whole, tmp_path / "back", target_strategy=strategy, format=file_format)
    for rank, path in enumerate(back):
        assert_same(content(path)[0], {name: parts_of(value, layouts[name], rank) for name, value in values.items()})


def test_a_whole_checkpoint_of_everything(tuned, tmp_path):
    """Moments and the optimizer's numbers are not part of the network, and no mistake."""
    ms.save_checkpoint(training(tuned), str(tmp_path / "everything.ckpt"))
    network = make(tuned=True)
    report = load_distributed_delta(network, delta=tmp_path / "everything.ckpt")
    assert_same(numbers(network), numbers(tuned))
    assert {"moment1.head.weight", "global_step", "learning_rate"} < set(report.ignored)


def test_stages_of_a_pipeline(tuned, tmp_path):
    """Two stages of two devices; the strategy file is what merge_pipeline_strategys makes of those of the stages."""
    stages = {"up.weight": (0, ([2], [0, -1], 0, 0)), "head.weight": (1, ([2], [-1, 0], 0, 0))}
    strategy = write_strategy(
        {"delta": tmp_path / "delta"}, {f"{stage}-{n}": layout for n, (stage, layout) in stages.items()}
    )
    values = {name: numbers(tuned)[name] for name in stages}
    for rank in range(4):
        (tmp_path / "delta" / f"rank_{rank}").mkdir(parents=True)
        mine = {n: parts_of(values[n], layout, rank % 2) for n, (stage, layout) in stages.items() if stage == rank // 2}
        slices = [{"name": name, "data": ms.Tensor(value)} for name, value in mine.items()]
        ms.save_checkpoint(slices, str(tmp_path / "delta" / f"rank_{rank}" / "tuned-1_3.ckpt"))
    whole = loaded_and_made_whole(tmp_path, strategy, values)
    back = transform_delta_checkpoints(whole, tmp_path / "back", target_strategy=strategy)
    for rank, path in enumerate(back):
        assert_same(content(path)[0], content(tmp_path / "delta" / f"rank_{rank}" / "tuned-1_3.ckpt")[0])


def test_the_code_of_the_page_on_distributed_checkpoints_runs(runs, compiler, tuned, files, tmp_path, capsys):
    """Every Python block of the page, in order, on the files that it speaks of."""
    place = tmp_path / "runs"
    place.mkdir()
    Path(files["delta"]).rename(place / "tuned")
    for rank in range(8):
        folder = place / "pretrained" / f"rank_{rank}"
        folder.mkdir(parents=True)
        (Path(files["base"]) / f"rank_{rank}" / "tuned-1_3.ckpt").rename(folder / "model-10_500.ckpt")
    strategies = {"pretrained": runs["base"].strategy, "tuned": runs[8].strategy}
    strategies["four"] = Run(tmp_path / "four.ckpt", 2, 2, tuned=True).strategy
    for name, path in strategies.items():
        (place / f"{name}.strategy.ckpt").write_bytes(Path(path).read_bytes())
    page = (Path(__file__).parent.parent.parent / "docs" / "distributed-checkpoints.md").read_text()
    network = make(tuned=True)
    names = {
        "network": network,
        "rank": 0,
        "base_files": [str(place / "pretrained" / f"rank_{rank}" / "model-10_500.ckpt") for rank in range(8)],
        "tuned_files": in_order_of_rank(place / "tuned"),
    }
    try:
        for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
            exec(block.replace("/runs", str(place)).replace('"my-delta"', repr(str(tmp_path / "delta"))), names)
            if "report = " in block:
                assert capsys.readouterr().out.strip() == re.search(r"print\(report\)  # (.*)", block)[1]
                assert_same(numbers(network), expected(tuned))
    finally:
        ms.reset_auto_parallel_context()
    assert_same(numbers(network), expected(tuned))
    assert [Path(path).name for path in names["four"]] == [
        "delta0.safetensors",
        *(f"delta{n}.safetensors" for n in (1, 2, 3)),
    ]
