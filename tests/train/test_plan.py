"""Plans: what is in memory, what is sent, what fits, and strategies that are those of built layers."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mindspore import nn
from mindspore.nn.utils import no_init_parameters
from typer.testing import CliRunner

from mindpet.cli.app import app
from mindpet.delta import AdapterDense, LoRADense, LowRankAdapterDense, method_named
from mindpet.graph import inject
from mindpet.models.families import FAMILIES
from mindpet.parallel import ParallelConfig, strategies
from mindpet.train.activations import (
    Cutting,
    LayerSizes,
    Trained,
    at_the_turn,
    index_lists,
    kept_in_layer,
    spared_by_attention,
)
from mindpet.train.cutting import strategies_of
from mindpet.train.plan import PLANNED, plan
from mindpet.train.plan_answer import amount, largest_batch, markdown_table, planned
from mindpet.train.presets import PRESETS, CellSizes
from mindpet.train.summary import summarise

AMOUNTS = {"memory": "32GB", "bandwidth": "25GB/s", "speed": "200TFLOP/s"}
DENSE = {
    "lora": lambda: LoRADense(32, 64, 4, 8),
    "adapter": lambda: AdapterDense(32, 64, bottleneck_size=8),
    "low_rank_adapter": lambda: LowRankAdapterDense(32, 64, reduction_factor=8),
}
TINY = {
    "bert": {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"intermediate_size": 24, "max_position_embeddings": 20},
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20},
    "llama": {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"intermediate_size": 24, "num_key_value_heads": 2},
}

# Tensors that MindSpore 2.10 had alive when the backward pass began, per layer, read from its own graphs:
# 3 x 40 tokens, hidden 96, inner 320 (GPT-2 384), 4 heads, LLaMA with 2 heads of keys, rank 8, float32.
BERT = LayerSizes(1, 96, 320, 96, 96, 4, 4, False, False, False, 0)
LLAMA = LayerSizes(1, 96, 320, 96, 48, 4, 2, True, True, False, 1000)
GPT2 = LayerSizes(1, 96, 384, 96, 96, 4, 4, False, False, True, 1000)
LORA2, LORA1 = Trained(frozenset("x"), extra=16), Trained(frozenset("x"), extra=8)
FULL = Trained(frozenset("xmyz"), norms=True)
ALIVE = [
    (BERT, LORA2, 0, True, 514560),
    (BERT, Trained(), 0, True, 460800),
    (BERT, Trained(extra=2 * (96 + 128)), 0, True, 675840),
    (BERT, Trained(), 20, True, 545280),  # P-tuning v2 with 20 tokens
    (BERT, LORA2, 0, False, 823680 - 1920),  # 1920 bytes are means and variances of rows
    (LLAMA, LORA2, 0, True, 622080),
    (LLAMA, FULL, 0, True, 860160),
    (LLAMA, Trained(extra=2 * (96 + 128)), 0, True, 783360),
    (LLAMA, LORA2, 0, False, 930240 - 960),
    (LLAMA, FULL, 0, False, 1260480 - 960),
    (GPT2, LORA1, 0, True, 541440),
    (GPT2, Trained(), 0, True, 491520),
    (GPT2, LORA1, 0, False, 1280640 - 1920),
]


@pytest.mark.parametrize(("sizes", "trained", "prefix", "kernels", "alive"), ALIVE)
def test_a_layer_keeps_what_mindspore_keeps(sizes, trained, prefix, kernels, alive):
    kept = kept_in_layer(sizes, trained, 3, 40, prefix, Cutting(), kernels)
    assert 4 * sum(kept.values()) == alive


def test_the_turn_is_the_loss_or_the_last_block():
    rows = 120
    assert at_the_turn(BERT, 3, 40, Cutting(), 4, True) == 4 * rows * (96 + 2 * 320)
    assert at_the_turn(LLAMA, 3, 40, Cutting(), 4, True) == 4 * rows * (96 + 2 * 1000)
    assert at_the_turn(LLAMA, 3, 40, Cutting(), 4, False) == 4 * rows * (96 + 5 * 1000)
    small = dataclasses.replace(LLAMA, vocabulary=10)
    assert at_the_turn(small, 3, 40, Cutting(), 4, True) == 4 * rows * (96 + 3 * 320)


def test_lists_of_cpu_operators():
    """As counted in MindSpore: BERT has 8 transposes of (rows, hidden), or none; LLaMA has more, or none."""
    rows = 16 * 128
    assert index_lists(BERT, 2, 16, 128, True) == 8 * 6 * rows * 96
    in_layer = index_lists(LLAMA, 3, 16, 128, True) - index_lists(LLAMA, 2, 16, 128, True)
    assert in_layer == 0
    in_layer = index_lists(LLAMA, 3, 16, 128, False) - index_lists(LLAMA, 2, 16, 128, False)
    assert in_layer >= 8 * rows * (8 * 96 + 8 * 48)
    own, ours = (index_lists(BERT, 1, 16, 128, kernels) for kernels in (False, True))
    assert own - ours == 8 * 4 * rows * (2 * 96 + 4 * 128 + 320)


def test_attention_on_a_cpu_keeps_its_output_in_the_place_of_its_weights():
    assert spared_by_attention(BERT, Trained(), 3, 40, 20) == 3 * 4 * 40 * 60 - 3 * 40 * 96
    assert spared_by_attention(BERT, Trained(frozenset("m")), 3, 40, 0) == 3 * 4 * 40 * 40
    one, own = (plan("bert-base-chinese", "lora", batch=2, seq=64, kernels=kernels) for kernels in (True, False))
    assert one.spared == 4 * 12 * (2 * 12 * 64 * 64 - 2 * 64 * 768)
    assert own.spared == 0


@pytest.mark.parametrize("cut", ["rows", "columns"])
@pytest.mark.parametrize("method", DENSE)
def test_strategies_are_those_of_built_layers(method, cut):
    layer = DENSE[method]()
    cell = CellSizes("model.layers.0.self_attn.q_proj", "dense", {"weight": (64, 32), "bias": (64,)})
    given = strategies(layer, ParallelConfig(data_parallel=2, model_parallel=4, cut=cut))
    assert strategies_of(method, cell, 2, Cutting(4, cut)) == given


def test_strategies_leave_out_a_bias_that_is_not_there():
    cell = CellSizes("model.layers.0.self_attn.q_proj", "dense", {"weight": (64, 32)})
    layer = LoRADense(32, 64, 4, 8, has_bias=False)
    assert strategies_of("lora", cell, 2, Cutting(4, "rows")) == strategies(
        layer, ParallelConfig(data_parallel=2, model_parallel=4)
    )


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("method", ["lora", "adapter", "low_rank_adapter"])
def test_the_printed_code_cuts_a_real_network(family, method):
    """It is run as pasted; then every dense layer of the blocks has what the plan says, each checked by shard."""
    content = {"model_type": family, **TINY[family]}
    options = {"low_rank_adapter": {"reduction_factor": 4}, "adapter": {"size": 4}}.get(method, {"rank": 2})
    found = planned(content, method, options, amounts=AMOUNTS, devices=8, model_parallel=4, batch=8, seq=10)
    config = FAMILIES[family].config.from_content(dict(content), "here")
    with no_init_parameters():
        network = FAMILIES[family].network(config)
        inject(network, method_named(method).config(**options))
    exec(found.code(), {"network": network})
    dense = {path: cell for path, cell in network.cells_and_names() if isinstance(cell, nn.Dense)}
    cut = [path for path, cell in dense.items() if "in_strategy" in cell.matmul.attrs and "mindpet_delta" not in path]
    wanted = {"bert": 6, "gpt2": 4, "llama": 7}[family] * 2
    assert len(cut) == wanted
    for pattern, given in found.plan.strategies.items():
        matmul = given.get("matmul") or given.get("strategy_org_dense_matmul") or given["strategy_matmul_org"]
        assert dense[pattern.replace("*", "1")].matmul.attrs["in_strategy"] == matmul


def test_one_device_has_what_the_summary_counts():
    for method in PLANNED:
        whole, found = summarise("bert-base-chinese", method), plan("bert-base-chinese", method, seq=128)
        assert found.weights + found.delta == whole.weight_bytes
        assert found.optimizer == whole.optimizer_bytes
        assert found.gradients >= whole.gradient_bytes
        assert found.data_sent == found.model_sent == 0


def test_virtual_tokens_pass_through_every_layer():
    one, other = (
        plan("bert-base-uncased", "prompt_tuning", {"tokens": count}, batch=4, seq=128 - count) for count in (20, 30)
    )
    assert (one.kept, one.flops, one.seq, other.seq) == (other.kept, other.flops, 108, 98)
    few = plan("bert-base-uncased", "prompt_tuning", {"tokens": 1}, batch=4, seq=108)
    assert 0 < few.kept["attention weights"] < one.kept["attention weights"]


def test_data_parallel_sends_the_delta_alone():
    one, full = (plan("llama-7b", method, devices=8, data_parallel=8, dtype="float16") for method in ("lora", "full"))
    assert one.data_sent == 2 * 2 * one.summary.trained * 7 / 8
    assert full.data_sent / one.data_sent == full.summary.trained / one.summary.trained > 1000
    assert one.model_sent == 0


def test_model_parallel_cuts_weights_and_sends_four_times_the_rows():
    one = plan("llama-7b", "full", dtype="float16", seq=128)
    four = plan("llama-7b", "full", dtype="float16", seq=128, model_parallel=4)
    whole = 2 * 32000 * 4096 + 65 * 4096  # embedding, head, norms
    assert four.weights == 2 * ((6738415616 - whole) // 4 + whole)
    rows = 8 * 128
    assert four.model_sent == 32 * 2 * 4 * rows * 4096 * 2 * 3 / 4  # layers, AllReduce of n h in float16
    assert four.flops < one.flops / 3


def test_cut_by_rows_and_columns():
    """LoRA on q and v of a LLaMA: A whole and B cut, or the other way; columns compute attention everywhere."""
    given = {"dtype": "float16", "seq": 128, "model_parallel": 4}
    rows, columns = (plan("llama-7b", cut=cut, **given) for cut in ("rows", "columns"))
    assert rows.delta == columns.delta == 2 * 32 * 2 * 8 * (4096 + 1024)
    assert columns.kept["attention weights"] == 4 * rows.kept["attention weights"]
    turns = plan("llama-7b", **given)
    assert turns.model_sent < min(rows.model_sent, columns.model_sent)


def test_layers_below_the_lowest_that_trains_keep_nothing():
    all_of_them = plan("gpt2", "lora", seq=128)
    upper = plan("gpt2", "lora", {"layers": [9, 10, 11]}, seq=128)
    assert upper.kept["attention weights"] == all_of_them.kept["attention weights"] / 4
    assert upper.flops < all_of_them.flops


def test_a_float16_step_keeps_half():
    half, whole = (plan("llama3-8b", dtype=dtype, seq=64) for dtype in ("float16", "float32"))
    assert {name: 2 * size for name, size in half.kept.items()} == whole.kept


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_planned(name):
    found = planned(name, "lora", amounts=AMOUNTS, devices=2, batch=2)
    assert found.plan.memory > found.plan.weights > 0
    assert 0 < found.plan.share_sent(25e9, 200e12) < 1


def test_the_largest_batch_is_the_largest_that_fits():
    given = {"data_parallel": 2, "model_parallel": 4, "seq": 2048}
    largest = largest_batch(32e9, "glm2-6b", **given)
    assert largest % 2 == 0
    assert plan("glm2-6b", batch=largest, **given).memory <= 32e9 < plan("glm2-6b", batch=largest + 2, **given).memory
    assert largest_batch(1e9, "glm2-6b", **given) == 0


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ValueError) as caught:
        plan("glm2-6b", devices=9, data_parallel=3, model_parallel=5, batch=8)
    text = str(caught.value)
    assert "devices=9 is not data_parallel=3 times model_parallel=5, which is 15" in text
    assert "batch=8 cannot be cut into data_parallel=3 equal parts" in text
    with pytest.raises(ValueError) as caught:
        plan("glm2-6b", model_parallel=5)
    text = str(caught.value)
    assert "32 attention heads cannot be shared out over model_parallel=5" in text
    assert "the 4608 output features of transformer.encoder.layers.*.self_attention.query_key_value" in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"network": "glm2-6"}, "did you mean 'glm2-6b'"),
        ({"method": "lorra"}, "did you mean 'lora'"),
        ({"cut": "row"}, "'cut' must be one of rows, columns, but is 'row' .did you mean 'rows'"),
        ({"batch": 0}, "'batch' must be a positive int, but is 0"),
        ({"devices": 8, "data_parallel": 3}, "devices=8 is not data_parallel=3"),
        ({"network": "bert-base-chinese", "seq": 600}, "600 tokens are more than the 512 positions"),
        ({"network": "gpt2", "seq": 1025}, "1025 tokens are more than the 1024 positions"),
        ({"network": {"model_type": "t5"}}, "'model_type' must be one of"),
        ({"amounts": {**AMOUNTS, "memory": "32Gb"}}, "'memory' must be .* '32Gb' .did you mean 'GB'"),
        ({"amounts": {**AMOUNTS, "speed": "fast"}}, "'speed' must be a positive number"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
    ],
)
def test_near_names(given, says):
    with pytest.raises(ValueError, match=says):
        planned(**{"network": "glm2-6b", "method": "lora", "amounts": AMOUNTS, "batch": 8, **given})


def test_amounts():
    assert amount("bandwidth", "25GB/s") == 25e9
    assert amount("memory", "512 MiB") == 2**29


def test_what_is_missing_follows_from_the_devices():
    found = planned("llama-7b", "lora", amounts=AMOUNTS, devices=8, model_parallel=2, batch=8).plan
    assert (found.data_parallel, found.model_parallel) == (4, 2)


def test_the_command_answers_without_mindspore():
    script = (
        "import sys; from mindpet.cli.app import app\n"
        "try: app(['plan', '--preset', 'glm2-6b', '--devices', '8', '--model-parallel', '4'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'mindspore' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest batch in 32 GB" in done.stdout
    assert re.search(r'"strategy_lora_b_matmul": \(\(2, 1\), \(4, 1\)\)', done.stdout)


def test_the_command_says_everything_that_is_wrong_at_once():
    done = CliRunner().invoke(app, ["plan", "--preset", "glm-6b", "--devices", "7", "--batch", "9", "--memory", "32gb"])
    assert done.exit_code == 2
    assert "did you mean 'GB'" in done.output
    assert "did you mean 'glm2-6b'" in done.output
    assert "batch=9 cannot be cut into data_parallel=7 equal parts" in done.output


def test_a_plan_of_a_run_file_takes_its_method(tmp_path):
    content = {"model_type": "bert", **TINY["bert"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        f"model: {{path: {tmp_path}}}\nmethod: {{name: adapter, size: 4}}\ndata: {{train: x.jsonl, max_length: 12}}\n"
    )
    done = CliRunner().invoke(app, ["plan", str(run_file)])
    assert done.exit_code == 0, done.output
    assert "32 x 12 tokens" in done.output  # train.batch_size and data.max_length
    trained = summarise(content, "adapter", {"size": 4}).trained
    assert re.search(rf"trains, on all devices together +{trained:,} of", done.output)
    assert "peak of a process on a CPU" in done.output


def test_the_table_in_the_documentation_is_the_present_one():
    text = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text()
    if "## Planning" not in text:
        pytest.skip("docs/parallel.md has no section on planning")
    assert markdown_table() in text


def test_a_method_whose_memory_is_not_counted_is_refused():
    with pytest.raises(ValueError, match="what 'ia3' keeps for its gradients is not counted"):
        plan("bert-base-chinese", "ia3", seq=128)
