"""What freeze_modules, freeze_delta and freeze_from_config leave trainable."""

import logging

import mindspore as ms
import pytest
from mindspore import nn

from mindpet._methods import DOCUMENTED
from mindpet.delta import (
    AdapterDense,
    LoRADense,
    LowRankAdapterDense,
    PrefixEncoder,
    PrefixLayer,
)
from mindpet.graph import freeze_delta, freeze_from_config, freeze_modules, freeze_utils
from mindpet.utils.exceptions import MindPetError, ReadYamlFileError


class Network(nn.Cell):
    """Something of every method."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Dense(4, 4)
        self.norm = nn.LayerNorm((4,))
        self.lora = LoRADense(4, 4, 2, 1)
        self.adapter = AdapterDense(4, 4, bottleneck_size=2)
        self.low_rank = LowRankAdapterDense(4, 4)
        self.prefix = PrefixLayer(2, 1, 1, 4, 2, 2)
        self.encoder = PrefixEncoder(2, 1, 1, 4, True, 2, 0.0)
        self.head = nn.Dense(4, 2)


MARKERS = {
    "lora": "mindpet_delta_lora",
    "prefix": "mindpet_delta_prefixtuning",
    "adapter": "mindpet_delta_adapter",
    "low_rank_adapter": "mindpet_delta_low_rank_adapter",
    "ptuning2": "mindpet_delta_ptuning2",
}


@pytest.fixture
def network():
    return Network()


def trainable(network):
    return {parameter.name for parameter in network.trainable_params()}


def every_name(network):
    return {parameter.name for parameter in network.get_parameters()}


def names_with(network, part):
    return {name for name in every_name(network) if part in name}


# --------------------------------------------------------------------------------------------------- freeze_delta


@pytest.mark.parametrize(("mode_name", "marker"), MARKERS.items())
def test_a_mode_leaves_its_own_parameters_trainable(network, mode_name, marker):
    freeze_delta(network, mode_name)
    assert trainable(network) == names_with(network, marker) != set()


def test_bitfit_leaves_every_bias_trainable(network):
    freeze_delta(network, "bitfit")
    assert trainable(network) == {name for name in every_name(network) if name.endswith("bias")}
    assert {"plain.bias", "lora.bias", "head.bias"} <= trainable(network)
    assert "norm.beta" not in trainable(network)


def test_bitfit_counts_the_shift_of_a_norm_when_asked(network):
    freeze_delta(network, "bitfit")
    without = trainable(network)
    freeze_delta(network, "bitfit", include_norm=True)
    assert trainable(network) == without | {"norm.beta"}


def test_the_norm_counts_with_bitfit_only(network):
    freeze_delta(network, "lora", include_norm=True)
    assert trainable(network) == names_with(network, "mindpet_delta_lora")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("prefixtuning", "prefix"),
        ("PrefixTuning", "prefix"),
        ("LoRA", "lora"),
        ("BITFIT", "bitfit"),
        ("Low_Rank_Adapter", "low_rank_adapter"),
        ("PTuning2", "ptuning2"),
    ],
)
def test_case_does_not_matter_and_prefixtuning_is_prefix(network, written, meant):
    freeze_delta(network, meant)
    expected = trainable(network)
    freeze_modules(network, include=["*"])
    freeze_delta(network, written)
    assert trainable(network) == expected


def test_adapter_does_not_mean_low_rank_adapter(network):
    freeze_delta(network, "adapter")
    assert not names_with(network, "low_rank") & trainable(network)
    freeze_delta(network, "low_rank_adapter")
    assert not names_with(network, "mindpet_delta_adapter") & trainable(network)


@pytest.mark.parametrize("modes", [["lora", "bitfit"], ("lora", "bitfit"), ["BitFit", "LoRA", "lora"]])
def test_methods_combine(network, modes):
    freeze_delta(network, modes)
    biases = {name for name in every_name(network) if name.endswith("bias")}
    assert trainable(network) == names_with(network, "mindpet_delta_lora") | biases


def test_a_second_call_replaces_the_first(network):
    freeze_delta(network, "lora", exclude=["head.*"])
    freeze_delta(network, "adapter")
    assert trainable(network) == names_with(network, "mindpet_delta_adapter")


def test_lists_apply_after_the_mode(network):
    freeze_delta(network, "lora", include=["*lora_a"], exclude=["*head*"])
    assert trainable(network) == {"lora.mindpet_delta_lora_b", "head.weight", "head.bias"}


def test_every_documented_method_has_a_mode():
    assert set(DOCUMENTED) == {*MARKERS, "bitfit"}


def test_a_mode_that_matches_nothing_is_an_error_and_changes_nothing():
    network = nn.SequentialCell(nn.Dense(2, 2), LoRADense(2, 2, 1, 1))
    freeze_modules(network, include=["0.weight"])
    before = trainable(network)
    for mode_name in ("adapter", ["lora", "ptuning2"]):
        with pytest.raises(ValueError, match=r"everything would be frozen.*has parameters of: lora, bitfit"):
            freeze_delta(network, mode_name)
        assert trainable(network) == before


@pytest.mark.parametrize("mode_name", ["unknown", ["lora", "unknown"]])
def test_an_unknown_mode_changes_nothing(network, mode_name):
    before = trainable(network)
    with pytest.raises(ValueError, match=r"'unknown'.*lora, adapter, low_rank_adapter, bitfit, prefix, ptuning2"):
        freeze_delta(network, mode_name)
    assert trainable(network) == before


def test_wrong_lists_change_nothing(network):
    before = trainable(network)
    for lists in ({"include": []}, {"exclude": "head"}, {"exclude": ["head", 3]}):
        with pytest.raises(TypeError):
            freeze_delta(network, "lora", **lists)
        assert trainable(network) == before


def test_names_of_bare_layers_in_capitals_are_lora_too():
    class Bare(nn.Cell):
        """Parameters named as in checkpoints whose names end in _A and _B."""

        def __init__(self):
            super().__init__()
            self.weight = LoRADense(2, 2, 1, 1).weight
            self.mindpet_delta_lora_A = LoRADense(2, 2, 1, 1).mindpet_delta_lora_a
            self.mindpet_delta_lora_B = LoRADense(2, 2, 1, 1).mindpet_delta_lora_b

    network = Bare()
    freeze_delta(network, "lora")
    assert len(network.trainable_params()) == 2
    assert not network.weight.requires_grad


# ------------------------------------------------------------------------------------------------- freeze_modules


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["plain.weight"], None, False),
        (None, ["plain.weight"], True),
        (["plain.weight"], ["head.*"], False),
        (["head.*"], ["plain.weight"], True),
        (["plain.weight"], ["plain.*"], None),  # both
        (["head.*"], ["lora.*"], None),  # neither
        (["*"], ["*weight"], None),
        (["*"], ["head*"], False),
        (["plain"], None, None),  # without a star: an exact name
        (["plain.weigh?"], None, None),  # a question mark alone makes no pattern
        (["plain*"], None, False),
        (["*weight"], None, False),
        (["*.WEIGHT"], None, None),  # case matters
        (["lain.weight"], None, None),  # the whole name
    ],
)
def test_what_include_and_exclude_mean(network, start, include, exclude, expected):
    parameter = network.plain.weight
    parameter.requires_grad = start
    freeze_modules(network, include=include, exclude=exclude)
    assert parameter.requires_grad == (start if expected is None else expected)


def test_everything_else_stays_as_it_is(network):
    before = trainable(network)
    freeze_modules(network, include=["plain.*", "norm.gamma"])
    assert trainable(network) == before - {"plain.weight", "plain.bias", "norm.gamma"}


def test_a_pattern_that_matches_nothing_warns_with_near_names(network, caplog):
    with caplog.at_level(logging.WARNING, logger="mindpet"):
        freeze_modules(network, include=["plane.weight"])
    assert "'plane.weight' matches no parameter; near it: ['plain.weight'" in caplog.text


def test_a_shared_parameter_is_found_under_each_of_its_paths():
    class Tied(nn.Cell):
        def __init__(self):
            super().__init__()
            self.first = nn.Dense(3, 3)
            self.second = nn.Dense(3, 3)
            self.second.weight = self.first.weight

    for path in ("first.weight", "second.weight"):
        network = Tied()
        freeze_modules(network, include=[path])
        assert not network.first.weight.requires_grad


# --------------------------------------------------------------------------------------------- freeze_from_config


@pytest.mark.parametrize(
    ("text", "lists"),
    [
        ("freeze: {include: ['plain.*']}", {"include": ["plain.*"]}),
        ("freeze:\n  exclude:\n    - '*head*'\n", {"exclude": ["*head*"]}),
        ("freeze: {include: ['*'], exclude: ['*lora*']}", {"include": ["*"], "exclude": ["*lora*"]}),
        ("freeze: {include: ['*weight'], exclude: }", {"include": ["*weight"]}),
        ("freeze: {include: [], exclude: ['plain.*']}", {"exclude": ["plain.*"]}),
    ],
)
def test_a_file_does_what_the_lists_in_it_do(network, tmp_path, text, lists):
    path = tmp_path / "freeze.yaml"
    path.write_text(text)
    by_hand = Network()
    for parameters in (network, by_hand):
        parameters.plain.weight.requires_grad = False
    freeze_from_config(network, str(path))
    freeze_modules(by_hand, **lists)
    assert trainable(network) == trainable(by_hand)


def test_a_refused_file_changes_nothing(network, tmp_path):
    before = trainable(network)
    path = tmp_path / "freeze.yaml"
    for text in ("", "freeze: {includes: ['*']}", "freeze: {include: [3]}", "freeze: !!python/object:builtins.dict {}"):
        path.write_text(text)
        with pytest.raises((MindPetError, TypeError)):
            freeze_from_config(network, str(path))
        assert trainable(network) == before


def test_a_tag_that_would_run_code_runs_none(network, tmp_path):
    mark = tmp_path / "mark"
    path = tmp_path / "freeze.yaml"
    path.write_text(f"freeze: !!python/object/apply:os.mkdir ['{mark}']")
    with pytest.raises(ReadYamlFileError):
        freeze_from_config(network, str(path))
    assert not mark.exists()


def test_a_bomb_of_aliases_is_refused_or_harmless(network, tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    path = tmp_path / "freeze.yaml"
    path.write_text("\n".join([*lines, "freeze: {include: *a8}"]))
    with pytest.raises((MindPetError, TypeError)) as caught:
        freeze_from_config(network, str(path))
    assert len(str(caught.value)) < 2000


def test_the_functions_are_where_the_document_says():
    assert freeze_utils.freeze_modules is freeze_modules
    assert freeze_utils.freeze_delta is freeze_delta
    assert freeze_utils.freeze_from_config is freeze_from_config


def test_a_parameter_that_has_no_gradient_stays_frozen():
    cell = nn.SequentialCell(LoRADense(4, 4, 2, 4))
    cell[0].mindpet_delta_lora_index = ms.Parameter(ms.Tensor([0, 1], ms.int64), name="mindpet_delta_lora_index")
    freeze_delta(cell, "lora")
    assert {p.name.rpartition("_")[2] for p in cell.trainable_params()} == {"a", "b"}
