"""Counting without a network: the same numbers as the built one, and those of the user document."""

import dataclasses
import math
import subprocess
import sys

import pytest
from mindspore.nn.utils import no_init_parameters

from mindpet.delta import METHODS, method_named
from mindpet.graph import inject
from mindpet.graph.inject import count_parameters
from mindpet.models.families import FAMILIES
from mindpet.train.counters import ALIASES, COUNTERS
from mindpet.train.presets import PRESETS, network_sizes, preset
from mindpet.train.summary import summarise
from mindpet.train.summary_table import summary_table
from tests.few import mostly_exhaustive

TINY = {
    "bert": {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    | {"intermediate_size": 24, "max_position_embeddings": 20},
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 20},
    "llama": {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"intermediate_size": 24, "num_key_value_heads": 2},
}
CASES = [
    ("lora", {}),
    ("lora", {"rank": 3, "targets": "all-linear"}),
    ("lora", {"targets": ["all-linear"], "layers": [0, 2]}),
    ("lora", {"targets": ["*"], "exclude": ["*.1.*"], "rank_pattern": {"*.2.*": 5}}),
    ("lora", {"bias": "all", "targets": "all-linear"}),
    ("lora", {"bias": "lora_only", "start": "olora", "rank_pattern": {"*.2.*": 5}}),
    ("dora", {"rank": 3, "targets": "all-linear", "bias": "lora_only"}),
    ("lora_fa", {"rank": 3, "targets": "all-linear"}),
    ("qlora", {"rank": 3}),
    ("qlora", {"targets": "all-linear", "bits": "int8", "block_size": 10, "double_quantisation": False}),
    ("adapter", {"size": 5}),
    ("adapter", {"targets": "all-linear", "layers": 1}),
    ("low_rank_adapter", {"reduction_factor": 3, "rank": 2}),
    ("bitfit", {}),
    ("bitfit", {"include_norm": True}),
    ("prefix", {"tokens": 4, "embed_dim": 6, "mid_dim": 5}),
    ("ptuning2", {"tokens": 4}),
    ("prefix", {"tokens": 4, "projection": False}),
    ("ptuning2", {"tokens": 4, "projection": True, "projection_dim": 7}),
    ("prompt_tuning", {"tokens": 4, "start": "random"}),
    ("p_tuning", {"tokens": 4, "encoder_hidden": 6}),
    ("p_tuning", {"tokens": 4, "encoder": "lstm", "encoder_hidden": 6, "encoder_layers": 3, "dropout": 0.1}),
    ("multitask_prompt_tuning", {"tokens": 4, "rank": 2, "num_tasks": 3, "task": 1}),
    ("adaption_prompt", {"tokens": 4}),
    ("adaption_prompt", {"tokens": 3, "top_layers": 2}),
    ("adaption_prompt", {"top_layers": 1, "layers": [0, 1]}),
    ("ia3", {"targets": "all-linear", "feedforward": ["*.2.*"]}),
    ("parallel_adapter", {"size": 5}),
    ("mam", {"tokens": 4, "size": 5, "embed_dim": 6, "mid_dim": 5}),
    ("mam", {"tokens": 4, "projection": False, "targets": ["*prefix", "all-linear"]}),
    ("adapter_fusion", {"adapters": 3, "size": 4}),
    ("adapter_fusion", {"size": 4, "value": False, "targets": "all-linear"}),
    ("compacter", {"size": 6, "phm_dim": 2, "rank": 3}),
    ("compacter", {"size": 4, "low_rank": False, "shared": False}),
    ("parallel_adapter", {"size": 3, "targets": "all-linear"}),
    ("ln_tuning", {}),
    ("ln_tuning", {"layers": [0, 2], "exclude": ["*.attention.*"]}),
    ("bitfit", {"layers": [1]}),
    ("bitfit", {"targets": "all-linear"}),
    ("trainable_tokens", {"token_indices": [7, 2, 3]}),
    ("hra", {"rank": 3}),
    ("oft", {"block_size": 4, "targets": "all-linear"}),
    ("oft", {"blocks": 2, "block_share": True}),
    ("boft", {"blocks": 2, "butterfly_factors": 2}),
    ("miss", {"rank": 5}),
    ("vera", {"rank": 5}),
    ("vera", {"rank": 3, "targets": "all-linear", "layers": [0, 2]}),
    ("lokr", {"rank": 1, "targets": "all-linear"}),
    ("lokr", {"rank": 1, "decompose_both": True, "decompose_factor": 4, "rank_pattern": {"*.2.*": 3}}),
    ("fourierft", {"frequencies": 7}),
    ("randlora", {"rank": 3, "targets": "all-linear"}),
    ("randlora", {"rank": 5, "sparse": True}),
    ("shira", {"rank": 2}),
    ("full", {}),
]


NEEDED = {"trainable_tokens": {"token_indices": [7, 2]}}  # by methods that have no usual value for it


def build(content, labels=2):
    """The real network of a config.json, without values."""
    family = FAMILIES[content["model_type"]]
    with no_init_parameters():
        config = family.config.from_content(dict(content), "here")
        return family.network(config, labels) if family.task == "classification" else family.network(config)


def count(parameters):
    return sum(math.prod(parameter.shape) for parameter in parameters)


def assert_same(content, method, options, labels=2):
    """The arithmetic is what building and injecting gives; returns the summary."""
    network = build(content, labels)
    head = ["classifier"] if content["model_type"] == "bert" else []
    before = count(network.get_parameters())
    adapted = []
    if method != "full":
        given = {**options, "modules_to_save": [*options.get("modules_to_save", []), *head]}
        inject(network, method_named(method).config(**given))
        adapted = [path for one in vars(network)["mindpet_injections"] for path in one.adapted]
    found = summarise(content, method, options, labels=labels)
    heads = [parameter for parameter in network.get_parameters() if parameter.name.startswith("classifier.")]
    assert list(found.adapted) == adapted
    assert found.trained == count(network.trainable_params())
    assert found.total == count_parameters(network)
    if method == "qlora":
        assert found.weight_bytes == sum(p.size * p.itemsize for p in network.get_parameters())
    assert found.base + found.head == before
    if not any(path.startswith("classifier") for path in adapted):
        assert found.head == count(heads)
    return found


FAMILY_CASES = [  # each of one family, and the rest where time is no matter
    pytest.param(name, *case, marks=[] if index % len(TINY) == place else pytest.mark.exhaustive)
    for place, name in enumerate(TINY)
    for index, case in enumerate(CASES)
]


@pytest.mark.parametrize(("family", "method", "options"), FAMILY_CASES, ids=lambda value: str(value))
def test_arithmetic_equals_the_built_network(family, method, options):
    content = {"model_type": family, **TINY[family]}
    if method == "bitfit" and family == "llama":
        content["attention_bias"] = True  # without, there is no bias
    assert_same(content, method, options)


def test_a_network_without_biases_has_nothing_for_bitfit():
    content = {"model_type": "llama", **TINY["llama"]}
    with pytest.raises(ValueError, match="everything would be frozen"):
        inject(build(content), method_named("bitfit").config())
    with pytest.raises(ValueError, match="llama has no bias"):
        summarise(content, "bitfit")


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "gpt2", **TINY["gpt2"], "n_inner": 20, "tie_word_embeddings": False},
        {"model_type": "llama", **TINY["llama"], "tie_word_embeddings": True, "attention_bias": True},
        {"model_type": "llama", **TINY["llama"], "head_dim": 6, "mlp_bias": True, "num_key_value_heads": 1},
        {"model_type": "bert", **TINY["bert"], "type_vocab_size": 5},
    ],
)
@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_every_size_of_a_configuration_counts(content, method):
    assert_same(content, method, {}, labels=7)


def test_cells_trained_whole_count_once():
    found = assert_same({"model_type": "bert", **TINY["bert"]}, "lora", {"modules_to_save": ["pooler"]})
    assert found.delta == found.added + 16 * 16 + 16


@pytest.mark.parametrize("method", mostly_exhaustive([*METHODS, "full"], "lora", "low_rank_adapter", "prefix", "full"))
def test_arithmetic_equals_bert_base(method):
    assert_same(preset("bert-base-chinese"), method, NEEDED.get(method, {}), labels=15)


def test_every_method_can_be_counted_with_its_own_defaults():
    assert set(COUNTERS) == set(METHODS)
    assert {alias: method.name for method in METHODS.values() for alias in method.aliases} == ALIASES
    for name, method in METHODS.items():
        counter = COUNTERS[name]
        defaults = {
            entry.name: entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()
            for entry in dataclasses.fields(method.config)
        }
        shared = {"targets", "exclude", "layers", "modules_to_save"}
        assert set(counter.options) | set(counter.others) == set(defaults) - shared
        assert counter.options == {option: defaults[option] for option in counter.options}
        usual = [pattern for family in FAMILIES for pattern in counter.targets.get(family, ())]
        assert set(method.targets) == set(usual)  # a record lists them for all networks that are here


# Parameters as published with the weights, with BERT's pooler and without any head but a language model's own.
PUBLISHED = {
    "bert-base-chinese": 102_267_648,
    "bert-base-uncased": 109_482_240,
    "minilm": 22_713_216,
    "multilingual-e5-small": 117_653_760,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "glm2-6b": 6_243_584_000,
}


def test_presets_have_their_published_sizes():
    assert {name: summarise(name, "full").base for name in PRESETS} == PUBLISHED


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", COUNTERS)
def test_every_method_can_be_counted_in_every_preset(name, method):
    if method == "bitfit" and not any("bias" in cell.shapes for cell in network_sizes(PRESETS[name], 0).cells):
        with pytest.raises(ValueError, match="has no bias"):
            summarise(name, method)
        return
    found = summarise(name, method, NEEDED.get(method, {}))
    assert 0 < found.share < 0.25


@pytest.mark.parametrize(
    ("method", "options", "per_cent", "static"),
    [
        ("lora", {"rank": 8}, 0.30, 456 / 1360),
        ("adapter", {"size": 64}, 2.28, 480 / 1360),  # the document's 2.33 % is of the base
        ("low_rank_adapter", {"reduction_factor": 32, "rank": 1}, 0.07, 456 / 1360),
        ("bitfit", {}, 0.09, 456 / 1360),
    ],
)
def test_the_document_on_bert_base_chinese(method, options, per_cent, static):
    found = summarise("bert-base-chinese", method, options, labels=15)
    assert round(100 * found.share, 2) == per_cent
    assert found.static_bytes / found.full_static_bytes == pytest.approx(static, abs=0.004)


def test_the_document_on_the_other_shares():
    assert round(100 * summarise("bert-base-chinese", "low_rank_adapter", labels=15).share, 3) == 0.067
    assert round(100 * summarise("bert-base-chinese", "adapter", labels=15).share_of_base, 2) == 2.33
    glm = summarise("glm2-6b", "ptuning2", {"tokens": 128}, optimizer="adamw")
    assert round(100 * glm.share, 2) == 0.03
    # weights in float16 and two float32 moments: 59544 MiB, where the document measured 60056
    assert glm.full_static_bytes / 2**20 == pytest.approx(60056, rel=0.01)
    assert glm.static_bytes / 2**20 == pytest.approx(12992, rel=0.09)


def test_the_prefix_on_gpt2_large():
    """The document states 10 tokens, 4.35 % and 4208 of 11024 MB, but neither embed_dim nor mid_dim."""
    plausible = (64, 128, 256, 512, 768, 800, 1024, 1280)
    sizes = [(embed, mid) for embed in plausible for mid in plausible]
    found = [summarise("gpt2-large", "prefix", {"tokens": 10, "embed_dim": e, "mid_dim": m}) for e, m in sizes]
    shares = [round(100 * share, 2) for one in found for share in (one.share, one.share_of_base)]
    assert 4.35 not in shares
    nearest = min(found, key=lambda one: abs(one.share_of_base - 0.0435))
    assert round(100 * nearest.share_of_base, 2) == 4.33  # embed_dim 1024, mid_dim 256
    assert nearest.static_bytes / nearest.full_static_bytes == pytest.approx(4208 / 11024, abs=0.006)


def test_memory_is_weights_moments_and_gradients():
    content = {"model_type": "llama", **TINY["llama"]}
    found = summarise(content, "lora", {"rank": 2}, optimizer="sgd", dtype="float16")
    assert found.weight_bytes == 2 * found.total
    assert found.gradient_bytes == 2 * found.trained
    assert found.optimizer_bytes == 4 * found.trained
    assert found.static_bytes == found.weight_bytes + found.optimizer_bytes
    assert found.full_static_bytes == (2 + 4) * found.base
    full = summarise(content, "full", optimizer="adamw")
    assert full.static_bytes == full.full_static_bytes == 12 * full.base


def test_a_table_is_for_reading():
    (row,) = summary_table("bert-base-chinese", ["lora"], labels=15)
    assert row == {
        "method": "lora", "trains": "306,447", "share": "0.30%", "weights": "391", "optimizer": "2.34",
        "static": "394", "of full": "33.6%",
    }  # fmt: skip


def test_options_in_a_table_are_those_of_the_method_by_whatever_name():
    for name, asked in (("lora", "LoRA"), ("LoRA", "lora"), ("prefixtuning", "prefix"), ("prefix", "PrefixTuning")):
        option = {"rank": 2} if name.lower() == "lora" else {"tokens": 3}
        (row,) = summary_table("minilm", [asked], {name: option})
        assert row["trains"] == f"{summarise('minilm', asked, option).trained:,}"
    with pytest.raises(ValueError, match="match no cell"):
        summary_table("minilm", ["LoRA"], {"lora": {"targets": ["*.nothing"]}})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("bert-base-chines",), "did you mean 'bert-base-chinese'"),
        (("gpt2", "lorra"), "'method' must be one of .* 'lorra' .did you mean 'lora'"),
        (("gpt2", "lora", {"rnk": 3}), "'lora' has no option 'rnk' .did you mean 'rank'"),
        (("gpt2", "lora", {"rank": 0}), "'rank' must be a positive int, but is 0"),
        (("gpt2", "lora", {"rank": True}), "'rank' must be of the kind of 8, but is True"),
        (("gpt2", "lora", {"rank_pattern": {"*": "x"}}), "the rank of '.' must be a positive int, but is 'x'"),
        (("gpt2", "lora", {"layers": "all"}), "'layers' must be numbers, but is 'all'"),
        (("gpt2", "lora", {"targets": ["*.c_atn"]}), "match no cell .*'..c_atn' .did you mean 'c_attn'"),
        (("gpt2", "lora", {"exclude": ["*.nothing"]}), "match no cell .*nothing"),
        (("gpt2", "lora", {"layers": [99]}), "match no cell"),
        (("gpt2", "lora", {"modules_to_save": ["score"]}), "No parameter lies below 'score'"),
        (("gpt2", "full", {"rank": 3}), "'full' has no option 'rank'"),
        (("gpt2", "low_rank_adapter", {"reduction_factor": 10_000}), "must be at most 768"),
        (({"model_type": "bert", "hidden_size": 0},), "'vocab_size' is missing, 'hidden_size' is 0"),
        (({"model_type": "bert", **TINY["bert"], "num_attention_heads": 3},), "is not a multiple of"),
        (({"model_type": "bert", **TINY["bert"], "type_vocab_size": "x"},), "'type_vocab_size' is 'x'"),
        (({"model_type": "t5"},), "'model_type' must be one of bert"),
        (({},), "'model_type' must be one of bert"),
        (({"model_type": []},), "'model_type' must be one of bert, .*, but got .."),
        (([],), "content of a config.json must be an object, but is .."),
        (("gpt2", "lora", {"targets": []}), "'targets' must name a cell at least"),
    ],
)
def test_what_is_wrong_is_said(arguments, says):
    with pytest.raises(ValueError, match=says):
        summarise(*arguments)


def test_other_choices_are_named():
    with pytest.raises(ValueError, match="'optimizer' must be one of adam, adamw, sgd"):
        summarise("gpt2", optimizer="lion")
    with pytest.raises(ValueError, match="'dtype' must be one of float32"):
        summarise("gpt2", dtype="int8")
    with pytest.raises(ValueError, match="'labels' is -1"):
        summarise("minilm", labels=-1)


def test_no_mindspore_is_imported():
    code = "import sys, mindpet.train.summary as s; s.summarise('llama-70b'); print('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
