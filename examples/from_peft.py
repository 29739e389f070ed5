"""Take an adapter to Hugging Face PEFT's format and back, without torch.

    python examples/from_peft.py

A LLaMA gets a LoRA of rank 4 on its queries and values, with another rank on one layer. mindpet.save_peft writes the
directory that PEFT would, mindpet.load_peft reads it into a second LLaMA with the same base weights, and the logits of
the two are compared. An adapter that PEFT has written is read in the same way.
"""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
from safetensors.numpy import load_file

import mindpet
from mindpet.models import LlamaConfig, LlamaForCausalLM

OUTPUT = Path("runs/from_peft/adapter")
SIZES = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


def main():
    ms.set_seed(1)
    ours, theirs = LlamaForCausalLM(SIZES), LlamaForCausalLM(SIZES)
    ms.load_param_into_net(theirs, ours.parameters_dict(), strict_load=True)
    ids = ms.Tensor([[3, 1, 4, 1, 5, 9, 2, 6]], ms.int32)
    mask = ms.Tensor(np.ones((1, 8)), ms.int32)
    base = theirs(ids, mask).asnumpy()

    config = mindpet.LoRAConfig(rank=4, alpha=8, targets=["*.q_proj", "*.v_proj"], rank_pattern={"model.layers.1.*": 2})
    mindpet.inject(ours, config)
    generator = np.random.default_rng(0)
    for parameter in ours.trainable_params():  # as if it had been trained: B starts at zero
        parameter.set_data(ms.Tensor(generator.normal(0, 0.1, parameter.shape), ms.float32))
    mindpet.save_peft(ours, OUTPUT)

    content = json.loads((OUTPUT / "adapter_config.json").read_text())
    for key in ("peft_type", "task_type", "r", "lora_alpha", "target_modules", "rank_pattern"):
        print(f"{key}: {content[key]}")
    for name, value in load_file(OUTPUT / "adapter_model.safetensors").items():
        print(name, value.shape)

    mindpet.load_peft(theirs, OUTPUT)
    expected, read = ours(ids, mask).asnumpy(), theirs(ids, mask).asnumpy()
    change, error = np.abs(expected - base).max(), np.abs(expected - read).max()
    print(f"logits: {change:.2f} from those of the base, {error:.1e} from those of the adapter that was read")
    assert np.allclose(expected, read, atol=1e-6)
    assert not np.allclose(expected, base, atol=1e-2)


if __name__ == "__main__":
    main()
