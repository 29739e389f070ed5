"""Hugging Face PEFT as the oracle for virtual tokens in language models, and for the encoder of P-tuning, which no file
holds.
"""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from mindpet import MultitaskPromptTuningConfig, PromptTuningConfig, PTuningConfig, inject, load_delta, save_delta
from mindpet.interop import load_peft, save_peft
from mindpet.models.generation import generate
from tests.interop import test_gpt2, test_llama
from tests.interop.causal import peft, their_logits, torch, with_delta
from tests.models.causal import fill, logits, tokens

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

FAMILIES = {"llama": test_llama, "gpt2": test_gpt2}
COMMON = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """The module of its tests, and a random base model that transformers saved."""
    module = FAMILIES[request.param]
    return module, module.write(tmp_path_factory.mktemp("base"))


def padded(ids):
    """Padding on the right, where PEFT counts positions as we do."""
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    return mask


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(**COMMON),
        peft.PromptEncoderConfig(**COMMON, encoder_hidden_size=8),
        peft.PromptEncoderConfig(**COMMON, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"),
    ],
    ids=lambda config: f"{config.peft_type.value}",
)
def test_virtual_tokens_of_peft_compute_the_same_and_back(family, tmp_path, config):
    module, base = family
    ids = tokens(2, 9)
    mask = padded(ids)
    model = with_delta(module.theirs(base), config, std=0.8)
    expected = their_logits(model, ids, mask)[:, 4:]
    model.save_pretrained(tmp_path / "theirs")
    network = load_peft(module.ours(base), tmp_path / "theirs").set_train(False)
    np.testing.assert_allclose(logits(network, ids, mask)[mask == 1], expected[mask == 1], atol=1e-4)
    save_peft(network, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(module.theirs(base), tmp_path / "ours").eval()
    assert isinstance(back, peft.PeftModelForCausalLM)
    np.testing.assert_allclose(their_logits(back, ids, mask)[:, 4:], expected, atol=1e-4)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_what_an_encoder_made_here_computes_the_same_in_peft(family, tmp_path, encoder):
    module, base = family
    config = PTuningConfig(tokens=4, encoder=encoder, encoder_hidden=8)
    network, ids = fill(inject(module.ours(base), config)), tokens(2, 9)
    save_peft(network, tmp_path)
    back = peft.PeftModel.from_pretrained(module.theirs(base), tmp_path).eval()
    assert back.peft_config["default"].peft_type == "P_TUNING"
    np.testing.assert_allclose(their_logits(back, ids)[:, 4:], logits(network, ids), atol=1e-4)


def test_the_second_task_of_peft(family, tmp_path):
    module, base = family
    ids = tokens(2, 9)
    config = peft.MultitaskPromptTuningConfig(**COMMON, num_tasks=3, num_ranks=2)
    model = with_delta(module.theirs(base), config, std=0.8)
    with torch.no_grad():
        expected = model(torch.tensor(ids.astype(np.int64)), task_ids=torch.tensor([1, 1])).logits.numpy()[:, 4:]
    model.save_pretrained(tmp_path / "theirs")
    save_delta(load_peft(module.ours(base), tmp_path / "theirs"), tmp_path / "delta")
    config = MultitaskPromptTuningConfig(tokens=4, num_tasks=3, rank=2, task=1)
    network = load_delta(inject(module.ours(base), config), tmp_path / "delta")
    np.testing.assert_allclose(logits(network, ids), expected, atol=1e-4)


def test_a_table_starts_as_peft_starts_one_with_words(family):
    """Words that start a table are the same here as words in a text."""
    module, base = family
    network, ids = module.ours(base), tokens(2, 9)
    inject(network, PromptTuningConfig(tokens=3, start=[5, 7, 1]))
    text = np.concatenate([np.tile(np.array([5, 7, 1], np.int32), (2, 1)), ids], 1)
    np.testing.assert_allclose(logits(network, ids), their_logits(module.theirs(base), text)[:, 3:], atol=1e-4)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_gradients_through_an_encoder_are_those_of_peft(family, encoder):
    module, base = family
    config = PTuningConfig(tokens=4, encoder=encoder, encoder_hidden=8)
    network = inject(module.ours(base), config)
    kind = peft.PromptEncoderConfig(
        **COMMON, encoder_hidden_size=8, encoder_reparameterization_type=encoder.upper(), encoder_num_layers=2
    )
    model = with_delta(module.theirs(base), kind, std=0.5)
    theirs = {
        name.rpartition("default.")[2]: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    weights = {parameter.name.rpartition("p_tuning_")[2]: parameter for parameter in network.trainable_params()}
    names = {name: theirs_of(name) for name in weights}
    assert set(names.values()) == set(theirs)
    for name, parameter in weights.items():
        parameter.set_data(Tensor(theirs[names[name]].detach().numpy()))
    ids = tokens(2, 9)
    with torch.enable_grad():
        (model(torch.tensor(ids.astype(np.int64))).logits[:, 4:] ** 2).mean().backward()

    def loss(rows, mask):
        return (network(rows, mask) ** 2).mean()

    given = Tensor(ids), ops.ones_like(Tensor(ids))
    found = ms.grad(loss, None, ms.ParameterTuple(weights.values()))(*given)
    for name, gradient in zip(weights, found):
        expected = theirs[names[name]].grad.numpy()
        largest = np.abs(expected).max()
        np.testing.assert_allclose(gradient.asnumpy(), expected, atol=1e-5 * max(1.0, largest), err_msg=name)
        print(f"{encoder} {name}: {np.abs(gradient.asnumpy() - expected).max():.1e} of {largest:.1e}")


def theirs_of(name):
    """PEFT's name of a parameter of the encoder."""
    if name == "embedding":
        return "embedding.weight"
    part, _, rest = name.partition(".")
    return f"{part}_head.{rest}"


def test_greedy_output_is_that_of_peft(family, tmp_path):
    module, base = family
    network, ids = fill(inject(module.ours(base), PromptTuningConfig(tokens=4))), tokens(1, 5)
    save_peft(network, tmp_path)
    back = peft.PeftModel.from_pretrained(module.theirs(base), tmp_path).eval()
    given = torch.tensor(ids.astype(np.int64))
    # with its cache, and transformers 5, PEFT 0.21.2 generates other tokens than it does without
    more = {"max_new_tokens": 6, "do_sample": False, "use_cache": False, "eos_token_id": None, "pad_token_id": 0}
    expected = back.generate(input_ids=given, attention_mask=torch.ones_like(given), **more)[0, -6:].tolist()
    assert list(generate(network, ids[0], max_tokens=6)) == expected
