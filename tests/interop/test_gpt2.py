"""transformers and PEFT as oracles for GPT-2, whose dense weights are stored transposed there."""

import numpy as np
import pytest

from mindpet import LoRAConfig, PTuning2Config, inject, merge
from mindpet.interop import load_peft, save_peft
from mindpet.models import GPT2LMHeadModel
from mindpet.models.loading import save_tensors
from tests.interop.causal import peft, their_logits, torch, with_delta
from tests.models.causal import GPT2, NO_DROPOUT, fill, logits, tokens

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


def write(directory, **changes):
    """A random GPT-2 that transformers saved."""
    torch.manual_seed(4)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **NO_DROPOUT, **changes))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("ln_" in name and "weight" in name), std=0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write(tmp_path_factory.mktemp("base"))


def ours(directory):
    network, report = GPT2LMHeadModel.from_pretrained(directory)
    assert not report.missing
    assert not report.unexpected
    return network.set_train(False)


def theirs(directory):
    return transformers.GPT2LMHeadModel.from_pretrained(directory).eval()


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, {"activation_function": "relu", "n_inner": 20}], ids=str
)
def test_logits_equal_those_of_transformers(mode, tmp_path, changes):
    network, ids = ours(write(tmp_path, **changes)), tokens(3, 20)
    mask = np.ones_like(ids)
    mask[1, 14:] = 0
    found, expected = logits(network, ids, mask), their_logits(theirs(tmp_path), ids, mask)
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-4)


def test_a_bare_transformer_loads_as_well(base, tmp_path):
    theirs(base).transformer.save_pretrained(tmp_path)
    np.testing.assert_array_equal(logits(ours(tmp_path), tokens(1, 5)), logits(ours(base), tokens(1, 5)))


def test_what_is_merged_and_saved_here_computes_the_same_there(base, tmp_path):
    network, ids = (
        fill(inject(ours(base), LoRAConfig(rank=3, targets=["*.c_attn", "*.c_proj", "*.c_fc"]))),
        tokens(2, 9),
    )
    expected = logits(network, ids)
    save_tensors(merge(network), tmp_path)
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    np.testing.assert_allclose(their_logits(theirs(tmp_path), ids), expected, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "bias": "lora_only"},
        {
            "target_modules": ["c_attn"],
            "fan_in_fan_out": True,
            "modules_to_save": ["0.attn.c_proj", "1.mlp.c_fc", "ln_f"],
        },
    ],
)
def test_lora_of_peft_computes_the_same_and_back(base, tmp_path, options):
    ids = tokens(2, 9)
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options)
    model = with_delta(theirs(base), config, std=0.4)
    expected = their_logits(model, ids)
    model.save_pretrained(tmp_path / "theirs")
    network = load_peft(ours(base), tmp_path / "theirs")
    np.testing.assert_allclose(logits(network, ids), expected, atol=1e-4)
    save_peft(network, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours").eval()
    assert back.peft_config["default"].fan_in_fan_out
    np.testing.assert_allclose(their_logits(back, ids), expected, atol=1e-4)


def test_prefix_of_peft_computes_the_same(mode, base, tmp_path):
    ids = tokens(2, 9)
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = with_delta(theirs(base), config, std=0.8)
    expected = their_logits(model, ids)
    model.save_pretrained(tmp_path / "theirs")
    network = load_peft(ours(base), tmp_path / "theirs").set_train(False)
    np.testing.assert_allclose(logits(network, ids), expected, atol=1e-4)


def test_prefix_trained_here_computes_the_same_in_peft(base, tmp_path):
    network, ids = fill(inject(ours(base), PTuning2Config(tokens=4))), tokens(2, 9)
    save_peft(network.set_train(False), tmp_path)
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path).eval()
    np.testing.assert_allclose(their_logits(back, ids), logits(network, ids), atol=1e-4)
