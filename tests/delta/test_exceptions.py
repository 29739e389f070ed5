"""Every documented exception, one case each: whose argument, what was given, what is raised, what the message says.

``python -m tests.delta.test_exceptions`` prints the table as Markdown.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.train import CheckpointConfig

import mindpet.delta.adapter as adapter_home
import mindpet.delta.lora as lora_home
import mindpet.delta.prefix_layer as prefix_home
import mindpet.delta.ptuning2 as ptuning2_home
from mindpet.delta import RDropLoss
from mindpet.delta.registry import METHODS
from mindpet.graph import TrainableParamsCheckPoint, freeze_delta, freeze_from_config, freeze_modules
from mindpet.utils.exceptions import (
    AbsolutePathError,
    LinkPathError,
    ModelConfigFreezeInfoError,
    ReadYamlFileError,
)

BOTH = (TypeError, ValueError)  # zero and negative ints: either `except` works


@dataclass(frozen=True)
class Case:
    """One documented exception."""

    owner: str
    argument: str
    given: str
    kinds: tuple[type[Exception], ...]
    says: tuple[str, ...]
    call: Callable[[Any], Any]

    @property
    def id(self):
        return f"{self.owner}-{self.argument}-{self.given}"


def zeros(*shape):
    return Tensor(np.zeros(shape, np.float32))


VALID = {
    "LoRADense": (lora_home.LoRADense, {"in_channels": 6, "out_channels": 4, "lora_rank": 2, "lora_alpha": 4}),
    "AdapterDense": (adapter_home.AdapterDense, {"in_channels": 6, "out_channels": 4}),
    "AdapterLayer": (adapter_home.AdapterLayer, {"hidden_size": 6}),
    "LowRankAdapterDense": (adapter_home.LowRankAdapterDense, {"in_channels": 6, "out_channels": 4}),
    "LowRankAdapterLayer": (adapter_home.LowRankAdapterLayer, {"hidden_size": 6, "reduction_factor": 2}),
    "PrefixLayer": (
        prefix_home.PrefixLayer,
        {"prefix_token_num": 4, "batch_size": 2, "num_heads": 2, "hidden_dim": 4, "embed_dim": 3},
    ),
    "PrefixEncoder": (
        ptuning2_home.PrefixEncoder,
        {
            "pre_seq_len": 3,
            "num_layers": 2,
            "num_heads": 2,
            "kv_channels": 3,
            "prefix_projection": True,
            "projection_dim": 4,
            "dropout_prob": 0.1,
        },
    ),
}


def building(owner, argument, value, kinds, *says, given=None):
    """A layer built with one bad argument."""
    make, valid = VALID[owner]
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    arguments = {**valid, argument: value}
    return Case(owner, argument, given or repr(value), kinds, (f"'{argument}'", *says), lambda _: make(**arguments))


def bad_ints(owner, *arguments):
    """Not an int, and not positive."""
    for argument in arguments:
        for value in (1.5, "2", True, None):
            yield building(owner, argument, value, TypeError, "must be a positive int", f"got {value!r}")
        for value in (0, -1):
            yield building(owner, argument, value, BOTH, "must be a positive int", f"got {value!r}")


def bad_dtypes(owner):
    for argument in ("param_init_type", "compute_dtype"):
        for value in (ms.int32, ms.float64, "float32", None):
            allowed = ("mindspore.float32", "mindspore.float16")
            yield building(owner, argument, value, TypeError, *allowed, "got", given=str(value))


def bad_initial_values(owner, argument, shapes, names_only=False):
    allowed = "a str or an Initializer" if names_only else "a Tensor, a str, an Initializer or a number"
    yield building(owner, argument, [1], TypeError, allowed, "got [1]")
    yield building(owner, argument, None, TypeError, allowed, "got None")
    yield building(owner, argument, "norml", ValueError, "normal", "xavieruniform", "'norml'")
    if names_only:
        yield building(owner, argument, 0.5, TypeError, allowed, "got 0.5")
    for shape, right in shapes:
        yield building(
            owner, argument, zeros(*shape), ValueError, f"{right}", f"{shape}", given=f"Tensor of shape {shape}"
        )


def bad_activations(owner, argument="activation"):
    if argument == "activation":
        yield building(owner, argument, 3, TypeError, "a str, a Cell, a Primitive or None", "got 3")
        yield building(owner, argument, "rellu", KeyError, "relu, relu6", "'rellu'", "did you mean 'relu'")
        yield building(owner, argument, "ReLU", KeyError, "relu, relu6", "'ReLU'")
    else:
        yield building(owner, argument, 3, TypeError, "must be a str", "got 3")
        yield building(owner, argument, None, TypeError, "must be a str", "got None")
        yield building(owner, argument, nn.ReLU(), TypeError, "must be a str", "ReLU", given="nn.ReLU()")
        yield building(owner, argument, "rellu", ValueError, "relu, relu6", "'rellu'", "did you mean 'relu'")


def bad_rates(owner, argument, ints_allowed):
    for value in ("0.1", None, True) if ints_allowed else ("0.1", None, True, 0):
        yield building(owner, argument, value, TypeError, "float in [0, 1)", f"got {value!r}")
    for value in (1.0, -0.1, float("nan")):
        yield building(owner, argument, value, ValueError, "in [0, 1)", f"got {value!r}")


def dense_cases(owner):
    yield from bad_ints(owner, "in_channels", "out_channels")
    for value in (1, "True", None):
        yield building(owner, "has_bias", value, TypeError, "must be a bool", f"got {value!r}")
    yield from bad_activations(owner)
    yield from bad_dtypes(owner)
    yield from bad_initial_values(owner, "weight_init", [((24,), (4, 6)), ((5, 6), (4, 6)), ((4, 5), (4, 6))])
    yield from bad_initial_values(owner, "bias_init", [((4, 1), (4,)), ((5,), (4,))])


def layer_cases():
    yield from dense_cases("LoRADense")
    yield from bad_ints("LoRADense", "lora_rank")
    for value in ("4", None, True, Tensor(4.0)):
        says = ("an int or a float", "got")
        yield building("LoRADense", "lora_alpha", value, TypeError, *says, given=str(value))
    for value in (0, 0.0):
        yield building("LoRADense", "lora_alpha", value, ValueError, "not 0", f"got {value!r}")
    yield from bad_rates("LoRADense", "lora_dropout", ints_allowed=False)
    a_shapes, b_shapes = [((12,), (2, 6)), ((3, 6), (2, 6)), ((2, 5), (2, 6))], [((8,), (4, 2)), ((5, 2), (4, 2))]
    yield from bad_initial_values("LoRADense", "lora_a_init", a_shapes)
    yield from bad_initial_values("LoRADense", "lora_b_init", [*b_shapes, ((4, 3), (4, 2))])

    yield from dense_cases("AdapterDense")
    yield from bad_ints("AdapterDense", "bottleneck_size")
    yield from bad_activations("AdapterDense", "non_linearity")

    yield from bad_ints("AdapterLayer", "hidden_size", "bottleneck_size")
    yield from bad_activations("AdapterLayer", "non_linearity")
    yield from bad_dtypes("AdapterLayer")

    yield from dense_cases("LowRankAdapterDense")
    yield from bad_ints("LowRankAdapterLayer", "hidden_size")
    yield from bad_dtypes("LowRankAdapterLayer")
    for owner, size in (("LowRankAdapterDense", 4), ("LowRankAdapterLayer", 6)):
        yield from bad_ints(owner, "reduction_factor", "low_rank_size")
        yield from bad_activations(owner, "non_linearity")
        yield from bad_initial_values(owner, "low_rank_w_init", [], names_only=True)
        yield building(owner, "reduction_factor", size + 1, ValueError, f"at most {size}", f"got {size + 1}")

    yield from bad_ints(
        "PrefixLayer", "prefix_token_num", "batch_size", "num_heads", "hidden_dim", "embed_dim", "mid_dim"
    )
    yield building("PrefixLayer", "prefix_token_num", 5, ValueError, "a multiple of 'batch_size' (2)", "got 5")
    yield from bad_rates("PrefixLayer", "dropout_rate", ints_allowed=True)

    yield from bad_ints("PrefixEncoder", "pre_seq_len", "num_layers", "num_heads", "kv_channels", "projection_dim")
    yield building("PrefixEncoder", "prefix_projection", 1, TypeError, "must be a bool", "got 1")
    yield building("PrefixEncoder", "out_perm", (0, 1, 2, 3), ValueError, "the axes 0 to 4", "(0, 1, 2, 3)")
    yield from bad_rates("PrefixEncoder", "dropout_prob", ints_allowed=True)


def calling(owner, argument, given, kinds, says, call):
    return Case(owner, argument, given, kinds if isinstance(kinds, tuple) else (kinds,), says, call)


def loss_cases():
    def loss(alpha):
        return lambda _: RDropLoss()(zeros(4, 3), Tensor(np.zeros(4, np.int32)), alpha)

    for value in ("4", True, None, [4], Tensor(4)):
        says = ("'alpha'", "an int or a float", "got")
        shown = f"Tensor {value}" if isinstance(value, Tensor) else repr(value)
        yield calling("RDropLoss", "alpha", shown, TypeError, says, loss(value))


LOG_SOFTMAX_IN = {
    "LoRADense": ("activation", "strategy_activation"),
    "AdapterDense": ("activation", "strategy_activation_org"),
    "AdapterLayer": ("non_linearity", "strategy_non_linearity"),
    "LowRankAdapterDense": ("activation", "strategy_activation_org"),
    "LowRankAdapterLayer": ("non_linearity", "strategy_non_linearity"),
}


def shard_cases():
    def shard(owner, argument, mode, strategies):
        def call(_):
            make, valid = VALID[owner]
            layer = make(**{**valid, argument: "logsoftmax"})
            ms.set_auto_parallel_context(parallel_mode=mode)
            try:
                layer.shard(**strategies)
            finally:
                ms.reset_auto_parallel_context()

        return call

    for owner, (argument, strategy) in LOG_SOFTMAX_IN.items():
        for mode in ("semi_auto_parallel", "auto_parallel"):
            given = f"{argument}='logsoftmax' in {mode}"
            says = ("LogSoftmax", f"'{strategy}'")
            yield calling(f"{owner}.shard", strategy, given, ValueError, says, shard(owner, argument, mode, {}))


def network():
    return nn.SequentialCell(nn.Dense(2, 2), lora_home.LoRADense(2, 2, 1, 1))


def freeze_cases():
    for value in (None, 3, [nn.Dense(2, 2)]):
        shown = "[nn.Dense(2, 2)]" if isinstance(value, list) else repr(value)
        says = ("'model'", "mindspore.nn.Cell", "got")
        yield calling("freeze_modules", "model", shown, TypeError, says, lambda _, v=value: freeze_modules(v, ["*"]))
        yield calling("freeze_delta", "model", shown, TypeError, says, lambda _, v=value: freeze_delta(v, "lora"))
        yield calling(
            "freeze_from_config", "model", shown, TypeError, says, lambda _, v=value: freeze_from_config(v, "a.yaml")
        )
    for argument in ("include", "exclude"):
        for value in ([], "*", ("*",), {"a": 1}):
            says = (f"'{argument}'", "a non-empty list of str", f"got {value!r}")
            yield calling(
                "freeze_modules",
                argument,
                repr(value),
                TypeError,
                says,
                lambda _, a=argument, v=value: freeze_modules(network(), **{a: v}),
            )
            yield calling(
                "freeze_delta",
                argument,
                repr(value),
                TypeError,
                says,
                lambda _, a=argument, v=value: freeze_delta(network(), "lora", **{a: v}),
            )
        says = (f"'{argument}'", "a str", "got 3")
        yield calling(
            "freeze_modules",
            argument,
            "['*', 3]",
            TypeError,
            says,
            lambda _, a=argument: freeze_modules(network(), **{a: ["*", 3]}),
        )
    says = ("'include'", "'exclude'", "both be None")
    yield calling("freeze_modules", "include", "None twice", ValueError, says, lambda _: freeze_modules(network()))
    known = ("lora", "prefix", "adapter", "low_rank_adapter", "bitfit", "ptuning2")
    yield calling(
        "freeze_delta",
        "mode",
        "'loora'",
        ValueError,
        ("'loora'", *known, "did you mean 'lora'"),
        lambda _: freeze_delta(network(), "loora"),
    )
    yield calling(
        "freeze_delta",
        "mode",
        "'adapter' without one",
        ValueError,
        ("'adapter'", "everything would be frozen", "lora"),
        lambda _: freeze_delta(network(), "adapter"),
    )
    for value in (None, 3, [], ["lora", 3]):
        says = ("'mode'", "a str or a list of str", f"got {value!r}")
        yield calling(
            "freeze_delta", "mode", repr(value), TypeError, says, lambda _, v=value: freeze_delta(network(), v)
        )


def config_cases():
    def read(text, name="freeze.yaml"):
        def call(directory):
            path = directory / name
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            freeze_from_config(network(), str(path))

        return call

    def link(directory):
        target = directory / "target.yaml"
        target.write_text("freeze: {include: ['*']}")
        (directory / "link.yaml").symlink_to(target)
        freeze_from_config(network(), str(directory / "link.yaml"))

    def row(given, kinds, says, call):
        return calling("freeze_from_config", "config_path", given, kinds, says, call)

    says = ("'config_path'", "must be a str", "got None")
    yield row("None", TypeError, says, lambda _: freeze_from_config(network(), None))
    yield row("''", ValueError, ("'config_path'", "YAML file"), lambda _: freeze_from_config(network(), ""))
    yield row(
        "missing file", ReadYamlFileError, ("no file",), lambda d: freeze_from_config(network(), str(d / "none.yaml"))
    )
    yield row("directory", ReadYamlFileError, ("no file",), lambda d: freeze_from_config(network(), str(d)))
    yield row("symbolic link", ReadYamlFileError, ("symbolic link", "link.yaml"), link)
    yield row("not YAML", ReadYamlFileError, ("YAML",), read("freeze: [1, 2\nx: }"))
    yield row("not text", ReadYamlFileError, ("YAML",), read(b"\xff\xfe\x00\x80"))
    for tag in ("!!python/object/apply:os.getcwd []", "!!python/name:os.system", "!!python/object:builtins.object {}"):
        yield row(f"tag {tag.split(':')[0]}", ReadYamlFileError, ("YAML", "python"), read(f"freeze: {tag}"))
    yield row("no content", ModelConfigFreezeInfoError, ("no content", "freeze"), read(""))
    yield row("comment only", ModelConfigFreezeInfoError, ("no content", "freeze"), read("# nothing"))
    yield row("no freeze", ModelConfigFreezeInfoError, ("'freeze'",), read("other: 1"))
    yield row("a list", ModelConfigFreezeInfoError, ("'freeze'",), read("- freeze"))
    for value in ("[1]", "text", "3", ""):
        says = ("'freeze'", "mapping", "'include'", "'exclude'")
        yield row(f"freeze: {value}", ModelConfigFreezeInfoError, says, read(f"freeze: {value}"))
    says = ("includes", "'include'", "'exclude'", "did you mean 'include'")
    yield row("freeze: {includes: ...}", ModelConfigFreezeInfoError, says, read("freeze: {includes: ['*']}"))
    yield row(
        "freeze and another key",
        ModelConfigFreezeInfoError,
        ("other", "'freeze'"),
        read("freeze: {include: ['*']}\nother: 1"),
    )
    for text in ("freeze: {}", "freeze: {include: , exclude: }", "freeze: {include: [], exclude: []}"):
        yield row(text, ValueError, ("'include'", "'exclude'", "both empty"), read(text))
    yield row("freeze: {include: [3]}", TypeError, ("'include'", "a str", "got 3"), read("freeze: {include: [3]}"))
    says = ("'include'", "list of str", "got 'a'")
    yield row("freeze: {include: a}", TypeError, says, read("freeze: {include: a}"))


def checkpoint_cases():
    def row(argument, given, kinds, says, call):
        return calling("TrainableParamsCheckPoint", argument, given, kinds, says, call)

    def link(directory):
        (directory / "real").mkdir()
        (directory / "link").symlink_to(directory / "real")
        TrainableParamsCheckPoint(str(directory / "link"))

    for value in (3, {"keep_checkpoint_max": 1}, CheckpointConfig):
        shown = "the class" if value is CheckpointConfig else repr(value)
        says = ("'config'", "a CheckpointConfig", "got")
        yield row(
            "config", shown, TypeError, says, lambda d, v=value: TrainableParamsCheckPoint(str(d / "new"), config=v)
        )
    for value in (None, ""):
        says = ("'directory'", "an absolute path", f"got {value!r}")
        yield row("directory", repr(value), ValueError, says, lambda _, v=value: TrainableParamsCheckPoint(v))
    yield row("directory", "3", TypeError, ("'directory'", "a str", "got 3"), lambda _: TrainableParamsCheckPoint(3))
    yield row("directory", "symbolic link", LinkPathError, ("'directory'", "symbolic link"), link)
    says = ("'directory'", "absolute", "'here'")
    yield row("directory", "'here'", AbsolutePathError, says, lambda _: TrainableParamsCheckPoint("here"))


CASES = [
    *layer_cases(),
    *loss_cases(),
    *shard_cases(),
    *freeze_cases(),
    *config_cases(),
    *checkpoint_cases(),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_documented_exception(case, tmp_path):
    with pytest.raises(case.kinds[0]) as caught:
        case.call(tmp_path)
    for kind in case.kinds:
        assert isinstance(caught.value, kind)
    message = str(caught.value)
    for part in case.says:
        assert part in message, message


def test_no_case_is_listed_twice():
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("owner", VALID)
def test_the_valid_arguments_are_valid(owner):
    make, valid = VALID[owner]
    make(**valid)


@pytest.mark.parametrize("activation", [None, "relu", nn.ReLU(), ops.ReLU()], ids=["none", "str", "cell", "primitive"])
@pytest.mark.parametrize("owner", ["LoRADense", "AdapterDense", "LowRankAdapterDense"])
def test_every_documented_kind_of_activation_is_taken(mode, owner, activation):
    make, valid = VALID[owner]
    layer = make(**valid, activation=activation, weight_init=1.0, compute_dtype=ms.float32)
    frozen = layer(ops.neg(ops.ones((2, 6)))).asnumpy()
    if owner == "LoRADense":
        np.testing.assert_array_equal(frozen, -6.0 if activation is None else 0.0)


@pytest.mark.parametrize("value", [np.int64(3), 3])
def test_ints_of_numpy_are_ints(value):
    assert adapter_home.AdapterLayer(value).hidden_size == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: lora_home.LoRADense(4, 4, 1, 1, compute_dtype=ms.bfloat16),
        lambda: adapter_home.AdapterDense(4, 4, compute_dtype=ms.bfloat16),
        lambda: adapter_home.AdapterLayer(4, compute_dtype=ms.bfloat16),
        lambda: adapter_home.LowRankAdapterDense(4, 4, compute_dtype=ms.bfloat16),
        lambda: adapter_home.LowRankAdapterLayer(4, compute_dtype=ms.bfloat16),
    ],
)
def test_bfloat16_is_accepted_and_a_cpu_says_that_it_cannot_multiply_in_it(mode, make):
    layer = make()
    with pytest.raises(TypeError, match="no bfloat16 matrix product on a CPU"):
        layer(ops.ones((2, 4)))


def test_parameters_may_be_kept_in_bfloat16():
    layer = lora_home.LoRADense(2, 2, 1, 1, param_init_type=ms.bfloat16, compute_dtype=ms.float32)
    assert layer.weight.dtype == ms.bfloat16
    assert layer(ops.ones((3, 2))).shape == (3, 2)


def test_a_relative_directory_is_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AbsolutePathError):
        TrainableParamsCheckPoint("here")
    assert not list(tmp_path.iterdir())


def as_markdown():
    """The table, one line for each owner, argument and exception."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for case in CASES:
        kinds = " and ".join(kind.__name__ for kind in case.kinds)
        rows.setdefault((case.owner, case.argument, kinds), []).append(case.given.replace("|", "\\|"))
    lines = ["| of | argument | given | raises |", "|---|---|---|---|"]
    for (owner, argument, kinds), given_values in rows.items():
        shown = ", ".join(f"`{value}`" for value in given_values)
        lines.append(f"| `{owner}` | `{argument}` | {shown} | {kinds} |")
    return "\n".join(lines)


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if hasattr(one.config, "dropout")])
def test_a_dropout_of_the_int_zero_is_none(name):
    more = {"encoder": "lstm"} if name == "p_tuning" else {}
    assert METHODS[name].config(dropout=0, **more).dropout == 0


if __name__ == "__main__":
    print(as_markdown())
