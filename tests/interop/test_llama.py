"""transformers and PEFT as oracles for LLaMA: grouped queries, tied and untied heads, biases, the real SmolLM2."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpet import LoRAConfig, PrefixConfig, inject
from mindpet.interop import load_peft, save_peft
from mindpet.models import LlamaForCausalLM, open_pretrained
from tests.interop.causal import peft, their_logits, torch, with_delta
from tests.models.causal import LLAMA, fill, logits, tokens

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

VARIANTS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "another head_dim": {"head_dim": 6, "rope_theta": 500.0},
    "no groups": {"num_key_value_heads": 4},
}


def write(directory, **changes):
    """A random LLaMA that transformers saved."""
    torch.manual_seed(4)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "initializer_range": 0.3, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write(tmp_path_factory.mktemp("base"))


def ours(directory):
    network, report = LlamaForCausalLM.from_pretrained(directory)
    assert not report.missing
    assert not report.unexpected
    return network.set_train(False)


def theirs(directory):
    return transformers.LlamaForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(mode, tmp_path, variant):
    network, ids = ours(write(tmp_path, **VARIANTS[variant])), tokens(3, 20)
    mask = np.ones_like(ids)
    mask[1, 14:] = 0
    found, expected = logits(network, ids, mask), their_logits(theirs(tmp_path), ids, mask)
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-4)


def test_what_is_not_here_is_refused_by_name(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    write(tmp_path, rope_parameters=rope)
    with pytest.raises(ValueError, match=r"'linear' \(rope_scaling\) are not supported"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["k_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
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
    assert isinstance(back, peft.PeftModelForCausalLM)
    np.testing.assert_allclose(their_logits(back, ids), expected, atol=1e-4)


def test_lora_trained_here_computes_the_same_in_peft(base, tmp_path):
    network, ids = fill(inject(ours(base), LoRAConfig(rank=3, alpha=4))), tokens(2, 9)
    save_peft(network, tmp_path)
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path).eval()
    np.testing.assert_allclose(their_logits(back, ids), logits(network, ids), atol=1e-4)


def test_prefix_of_peft_computes_the_same(mode, base, tmp_path):
    ids = tokens(2, 9)
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = with_delta(theirs(base), config, std=0.8)
    expected = their_logits(model, ids)
    model.save_pretrained(tmp_path)
    network = load_peft(ours(base), tmp_path).set_train(False)
    np.testing.assert_allclose(logits(network, ids), expected, atol=1e-4)


def test_prefix_trained_here_computes_the_same_in_peft(base, tmp_path):
    network, ids = fill(inject(ours(base), PrefixConfig(tokens=5, embed_dim=8, mid_dim=8))), tokens(2, 9)
    save_peft(network.set_train(False), tmp_path)
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path).eval()
    np.testing.assert_allclose(their_logits(back, ids), logits(network, ids), atol=1e-4)


@pytest.mark.models
@pytest.mark.slow
def test_the_real_network_computes_what_transformers_does(smollm2):
    pretrained = open_pretrained(smollm2)
    config = {key: value for key, value in pretrained.config.items() if key != "architectures"}
    tensors = {name: torch.tensor(value) for name, value in pretrained.tensors().items()}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    model.tie_weights()
    ids = np.array([pretrained.tokenizer().encode("The capital of France is Paris, and 1024 is 2 to the 10th.").ids])
    network, _ = LlamaForCausalLM.from_pretrained(smollm2)
    found = network.set_train(False)(Tensor(ids.astype(np.int32)), ms.ops.ones(ids.shape, ms.int32)).asnumpy()
    np.testing.assert_allclose(found, their_logits(model.eval(), ids), atol=1e-3)
