"""LoRA that starts at a part of the weight: it starts and trains as in PEFT. It, and LoRA-FA, as plain LoRA there."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import LoRAConfig, LoRAFAConfig, inject
from mindpet.interop import load_peft, save_peft
from tests.interop.test_hf_peft import (
    LABELS,
    Loss,
    assert_close,
    base,
    batch,
    forward,
    our_logits,
    ours,
    peft,
    tensors,
    their_logits,
    theirs,
    torch,
    trained_here,
)

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
__all__ = ["base"]  # a fixture

TARGETS = ["*.query", "*.dense"]
THERE = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "dense"]}


def matrices(network):
    return {name: p.asnumpy() for name, p in network.parameters_and_names() if "mindpet_delta" in name}


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_it_starts_and_trains_as_in_peft(base, start, stabilised):
    config = LoRAConfig(rank=4, alpha=6, targets=TARGETS, start=start, rank_stabilised=stabilised)
    network = inject(ours(base), config)
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(**THERE, init_lora_weights=start, use_rslora=stabilised))
    found = matrices(network)
    there = {name: p.detach().numpy() for name, p in model.named_parameters() if "lora_" in name}
    assert 2 * len(there) == len(found)
    for name, value in there.items():
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        letter = "a" if "lora_A" in name else "b"
        same = np.abs if start == "pissa" else lambda matrix: matrix  # singular vectors have either sign
        here, near = found[f"{module}.mindpet_delta_lora_{letter}"], 2e-5 if start == "pissa" else 1e-5
        np.testing.assert_allclose(same(here), same(value), atol=near)  # PEFT's singular vectors are float32's
    assert_close(our_logits(network), our_logits(ours(base)), f"{start} at the start")

    descent = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.005)
    step = nn.TrainOneStepCell(Loss(network), nn.SGD(network.trainable_params(), 0.005))
    for _ in range(4):
        descent.zero_grad()
        forward(model, labels=torch.tensor(LABELS)).loss.backward()
        descent.step()
        step(*(Tensor(array.astype(np.int32)) for array in (*batch(), LABELS)))
    assert np.abs(our_logits(network) - our_logits(ours(base))).max() > 0.1
    assert_close(our_logits(network), their_logits(model), f"{start} after four steps")


CASES = {
    "pissa": LoRAConfig(rank=4, alpha=6, targets=TARGETS, rank_pattern={"*.query": 3}, start="pissa"),
    "olora": LoRAConfig(rank=4, alpha=6, targets=TARGETS, alpha_pattern={"*.query": 3}, start="olora"),
    "rank-stabilised": LoRAConfig(rank=4, alpha=6, targets=TARGETS, rank_stabilised=True, start="pissa"),
    "LoRA-FA": LoRAFAConfig(rank=4, alpha=6, targets=TARGETS, bias="lora_only"),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_and_load_peft_read_what_is_written_as_plain_lora(mode, base, tmp_path, case):
    network = trained_here(base, [CASES[case]])
    expected = our_logits(network)
    assert np.abs(expected - our_logits(ours(base))).max() > 0.02
    save_peft(network, tmp_path, base_model=str(base))
    model = peft.PeftModel.from_pretrained(theirs(base), tmp_path).eval()
    assert_close(their_logits(model), expected, f"{case}, here to there, {mode}")
    assert_close(our_logits(load_peft(ours(base), tmp_path)), expected, f"{case}, back, {mode}")
    twice = 1 if case == "LoRA-FA" else 2
    a = next(value for name, value in tensors(tmp_path).items() if name.endswith("pooler.dense.lora_A.weight"))
    assert a.shape[0] == twice * 4


def test_two_starts_in_one_network_are_written_with_the_rank_of_each(base, tmp_path):
    configs = [LoRAConfig(rank=4, targets=["*.query"], start="olora"), LoRAConfig(rank=2, targets=["*.value"])]
    network = trained_here(base, configs)
    save_peft(network, tmp_path)
    model = peft.PeftModel.from_pretrained(theirs(base), tmp_path).eval()
    assert_close(their_logits(model), our_logits(network), "two starts")
