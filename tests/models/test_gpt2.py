"""GPT-2 against its formulas in NumPy, its configuration, and the orientation of its files."""

import json
import math

import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from mindpet import LoRAConfig, PTuning2Config, inject, merge
from mindpet.models import GPT2LMHeadModel, PretrainedFilesError
from mindpet.models.gpt2 import GELUTanh
from mindpet.models.loading import save_tensors
from tests.models.causal import GPT2, fill, logits, tokens, write


def reference(tensors, ids, prefix=None):
    """Logits in float64, straight from the paper, with the weights as the file has them, (in, out): 4 heads of 4."""

    def dense(x, name):
        return x @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def norm(x, name):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    start = 0 if prefix is None else len(prefix[0][0])
    positions = start + np.arange(len(ids))
    x = tensors["transformer.wte.weight"][ids].astype(float) + tensors["transformer.wpe.weight"][positions]
    for layer in range(GPT2["n_layer"]):
        at = f"transformer.h.{layer}."
        parts = np.split(dense(norm(x, f"{at}ln_1"), f"{at}attn.c_attn"), 3, -1)
        q, k, v = (part.reshape(len(ids), 4, 4) for part in parts)
        if prefix is not None:
            k, v = np.concatenate([prefix[layer][0], k]), np.concatenate([prefix[layer][1], v])
        scores = np.einsum("ihd,jhd->hij", q, k) / 2.0
        scores = np.where(np.arange(len(k)) > positions[:, None], -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + dense(np.einsum("hij,jhd->ihd", weights, v).reshape(len(ids), 16), f"{at}attn.c_proj")
        wide = dense(norm(x, f"{at}ln_2"), f"{at}mlp.c_fc")
        wide = wide / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
        x = x + dense(wide, f"{at}mlp.c_proj")
    return norm(x, "transformer.ln_f") @ tensors["transformer.wte.weight"].T


@pytest.mark.parametrize("filled", [False, True], ids=["plain", "with a prefix"])
def test_logits_equal_the_formulas(mode, tmp_path, filled):
    network, ids = write(tmp_path, "gpt2"), tokens(1, 9)
    prefix = None
    if filled:
        fill(inject(network, PTuning2Config(tokens=3)))
        prefix = [[part.asnumpy() for part in pair] for pair in network.transformer.prefix()]
    expected = reference(load_file(tmp_path / "model.safetensors"), ids[0], prefix)
    np.testing.assert_allclose(logits(network, ids)[0], expected, atol=1e-4)


def test_gelu_is_its_tanh_form(mode):
    x = np.linspace(-9, 9, 2001)
    expected = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(GELUTanh()(Tensor(x.astype(np.float32))).asnumpy(), expected, atol=2e-6)


def test_files_hold_dense_weights_as_in_by_out(tmp_path):
    network = write(tmp_path, "gpt2")
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    np.testing.assert_array_equal(
        tensors["transformer.h.0.mlp.c_proj.weight"].T, network.transformer.h[0].mlp.c_proj.weight.asnumpy()
    )


def test_a_merged_network_is_saved_as_the_files_have_it(tmp_path):
    network, ids = write(tmp_path, "gpt2"), tokens(1, 5)
    fill(inject(network, LoRAConfig(rank=2)))
    expected = logits(network, ids)
    save_tensors(merge(network), tmp_path)
    again, _ = GPT2LMHeadModel.from_pretrained(tmp_path)
    np.testing.assert_allclose(logits(again.set_train(False), ids), expected, atol=1e-5)


def test_names_without_the_prefix_and_masks_load_as_well(tmp_path):
    network, ids = write(tmp_path, "gpt2"), tokens(1, 5)
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    masks = {f"h.{layer}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for layer in range(2)}
    save_file({**tensors, **masks}, tmp_path / "model.safetensors")
    again, report = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert not report.unexpected
    np.testing.assert_array_equal(logits(again.set_train(False), ids), logits(network, ids))


def test_a_weight_the_other_way_round_is_reported(tmp_path):
    write(tmp_path, "gpt2")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file({**tensors, name: np.ascontiguousarray(tensors[name].T)}, tmp_path / "model.safetensors")
    with pytest.raises(PretrainedFilesError, match=r"c_fc.weight is \(64, 16\) in the files, \(16, 64\) here"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, but only False"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False, but only True"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"activation_function": "swish"}, "'activation_function' must be one of gelu_new"),
        ({"n_head": 5}, r"'n_embd' \(16\) must be a multiple of 'n_head' \(5\)"),
        ({"resid_pdrop": 1.5}, "resid_pdrop"),
        ({"model_type": "gptj"}, "is of a 'gptj', not of a 'gpt2'"),
    ],
    ids=str,
)
def test_what_is_not_here_is_refused_by_name(tmp_path, content, says):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **GPT2, **content}))
    with pytest.raises(PretrainedFilesError, match=says):
        GPT2LMHeadModel.from_pretrained(tmp_path)
