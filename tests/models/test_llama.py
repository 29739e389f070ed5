"""LLaMA against its formulas in NumPy, its configuration, and the real SmolLM2."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from mindpet import LoRAConfig, PTuning2Config, inject
from mindpet.models import LlamaConfig, LlamaForCausalLM, PretrainedFilesError, load_tokenizer
from tests.models.causal import LLAMA, fill, logits, tokens, write


def reference(tensors, ids, prefix=None):
    """Logits in float64, straight from the papers: 4 query heads and 2 of keys and values, of size 4."""

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * tensors[f"{name}.weight"]

    def turned(x, positions):
        angles = positions[:, None, None] * 10000.0 ** (-np.arange(2) / 2.0)  # (seq, 1, 2)
        first, second = x[..., :2], x[..., 2:]
        return np.concatenate(
            [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
        )

    start = 0 if prefix is None else len(prefix[0][0])
    positions = start + np.arange(len(ids))
    x = tensors["model.embed_tokens.weight"][ids].astype(float)
    for layer in range(LLAMA["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        h = norm(x, f"{at}input_layernorm")
        q, k, v = (
            (h @ tensors[f"{at}self_attn.{name}_proj.weight"].T).reshape(len(ids), -1, 4) for name in ("q", "k", "v")
        )
        q, k = turned(q, positions), turned(k, positions)
        if prefix is not None:
            k, v = np.concatenate([prefix[layer][0], k]), np.concatenate([prefix[layer][1], v])
        mixed = []
        for head in range(4):
            scores = q[:, head] @ k[:, head // 2].T / 2.0
            scores = np.where(np.arange(len(k)) > positions[:, None], -np.inf, scores)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ v[:, head // 2])
        x = x + np.concatenate(mixed, -1) @ tensors[f"{at}self_attn.o_proj.weight"].T
        h = norm(x, f"{at}post_attention_layernorm")
        gate, up = (h @ tensors[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ tensors[f"{at}mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("filled", [False, True], ids=["plain", "with a prefix"])
def test_logits_equal_the_formulas(mode, tmp_path, filled):
    network, ids = write(tmp_path, "llama"), tokens(1, 9)
    prefix = None
    if filled:
        fill(inject(network, PTuning2Config(tokens=3)))
        prefix = [[part.asnumpy() for part in pair] for pair in network.model.prefix()]
    expected = reference(load_file(tmp_path / "model.safetensors"), ids[0], prefix)
    np.testing.assert_allclose(logits(network, ids)[0], expected, atol=1e-4)


def test_a_second_copy_of_a_tied_table_is_passed_over(tmp_path):
    write(tmp_path, "llama, tied")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, tmp_path / "model.safetensors"
    )
    _, report = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not report.unexpected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' .rope_scaling. are not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": "linear"}, "must be objects or null"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"hidden_act": "gelu"}, "'hidden_act' must be 'silu'"),
        ({"num_key_value_heads": 3}, r"'num_attention_heads' \(4\) must be a multiple of 'num_key_value_heads' \(3\)"),
        ({"hidden_size": 18}, r"'hidden_size' \(18\) must be a multiple of 'num_attention_heads' \(4\)"),
        ({"head_dim": 5}, "'head_dim' must be even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"vocab_size": None}, "vocab_size"),
        ({"model_type": "mistral"}, "is of a 'mistral', not of a 'llama'"),
    ],
    ids=str,
)
def test_what_is_not_here_is_refused_by_name(tmp_path, content, says):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA, **content}))
    with pytest.raises(PretrainedFilesError, match=says):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_rope_is_read_under_its_old_and_its_new_name():
    old = LlamaConfig.from_content({**LLAMA, "rope_theta": 500.0, "rope_scaling": None}, "old")
    new = LlamaConfig.from_content({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "new")
    assert old == new
    assert old.rope_theta == 500.0


def test_changes_must_have_names(tmp_path):
    write(tmp_path, "llama")
    assert LlamaForCausalLM.from_pretrained(tmp_path, attention_dropout=0.5)[0].config.attention_dropout == 0.5
    with pytest.raises(TypeError, match="hidden_dropout_prob"):
        LlamaForCausalLM.from_pretrained(tmp_path, hidden_dropout_prob=0.5)


def test_files_of_another_size_are_reported(tmp_path):
    write(tmp_path, "llama")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA, "num_hidden_layers": 3}))
    with pytest.raises(
        PretrainedFilesError, match=r"missing in the files: model\.layers\.2\.self_attn\.q_proj\.weight"
    ):
        LlamaForCausalLM.from_pretrained(tmp_path)


def padded_logits(network, ids, width=24):
    """Of one text, padded to one width for all texts, since graph mode compiles each."""
    mask = np.arange(width)[None] < len(ids)
    return logits(network, np.pad(ids, (0, width - len(ids)))[None], mask)[0, : len(ids)]


def perplexity(network, tokenizer, text):
    ids = np.array(tokenizer.encode(text).ids)
    found = padded_logits(network, ids)[:-1].astype(np.float64)
    found -= found.max(-1, keepdims=True)
    likely = found - np.log(np.exp(found).sum(-1, keepdims=True))
    return np.exp(-likely[np.arange(len(likely)), ids[1:]].mean())


@pytest.mark.exhaustive
@pytest.mark.models
@pytest.mark.slow
def test_the_real_network_knows_the_capital_of_france_and_english(mode, smollm2):
    tokenizer = load_tokenizer(smollm2)
    network, report = LlamaForCausalLM.from_pretrained(smollm2)
    assert not report.missing
    assert not report.unexpected
    network.set_train(False)
    prompt = np.array([tokenizer.encode("The capital of France is").ids], np.int32)
    cache, found = network.new_cache(1, 32), []
    step = network.step(prompt, None, cache)
    for _ in range(6):
        found.append(int(step.asnumpy().argmax()))
        step = network.step([found[-1:]], None, cache)
    assert tokenizer.decode(found).startswith(" Paris")
    anew = padded_logits(network, np.concatenate([prompt[0], found]))
    np.testing.assert_array_equal(anew.argmax(-1)[prompt.size - 1 : -1], found)

    plain = "The capital of France is Paris, and the capital of Germany is Berlin."
    words = plain.split()
    np.random.default_rng(0).shuffle(words)
    assert 2 < perplexity(network, tokenizer, plain) < 8
    assert perplexity(network, tokenizer, " ".join(words)) > 500


@pytest.mark.models
@pytest.mark.slow
def test_the_real_network_can_be_tuned(smollm2):
    network, _ = LlamaForCausalLM.from_pretrained(smollm2)
    inject(network, LoRAConfig(rank=8))
    names = {parameter.name for parameter in network.trainable_params()}
    assert len(names) == 30 * 2 * 2
    ids = Tensor(np.array([load_tokenizer(smollm2).encode("Thou art a summer's day").ids], np.int32))
    ones = ms.ops.ones_like(ids)

    def loss():
        found = network(ids, ones)[0, :-1]
        return ms.ops.cross_entropy(found, ids[0, 1:])

    weights = network.trainable_params()
    value, gradients = ms.value_and_grad(loss, None, weights)()
    ups = [np.abs(g.asnumpy()).max() for p, g in zip(weights, gradients) if p.name.endswith("lora_b")]
    assert np.isfinite(value.asnumpy())
    assert min(ups) > 0
