"""Build a LLaMA in the file, tune it with LoRA, and write with it.

    python examples/decoder.py

A LLaMA of 11 thousand parameters learns to count up; then LoRA on all of its dense layers learns to count down. It is
asked to go on with "12 13 14" and "14 13 12" before and after, and with the LoRA switched off. No files are needed: for
a model from a directory or a .gguf file, LlamaForCausalLM.from_pretrained takes the place of LlamaForCausalLM(sizes).
"""

import mindspore as ms
import numpy as np
from mindspore import nn, ops

import mindpet
from mindpet.models import LlamaConfig, LlamaForCausalLM, generate

NUMBERS, LENGTH = 32, 12
SIZES = LlamaConfig(
    vocab_size=NUMBERS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


def rows(step, count=16):
    """Every window of numbers that go up, or down, around a circle of 32."""
    starts = np.random.default_rng(0).permutation(NUMBERS)[:count]
    return ms.Tensor((starts[:, None] + step * np.arange(LENGTH)) % NUMBERS, ms.int32)  # (batch, seq)


def train(network, ids, steps, learning_rate):
    """The next token from those before it; the last loss."""

    def loss_of(ids):
        logits = network(ids, ops.ones_like(ids))[:, :-1]  # (batch, seq - 1, vocabulary)
        return ops.cross_entropy(logits.reshape(-1, NUMBERS), ids[:, 1:].reshape(-1))

    optimizer = nn.Adam(network.trainable_params(), learning_rate)
    gradients_of = ms.value_and_grad(loss_of, None, optimizer.parameters)

    @ms.jit
    def step(ids):
        loss, gradients = gradients_of(ids)
        return ops.depend(loss, optimizer(gradients))

    network.set_train()
    for _ in range(steps):
        loss = step(ids)
    network.set_train(False)
    return float(loss)


def goes_on(network, prompt):
    """The six likeliest tokens that follow."""
    return list(generate(network, prompt, max_tokens=6))


def main():
    ms.set_seed(1)
    network = LlamaForCausalLM(SIZES)
    loss = train(network, rows(1), 100, 1e-2)
    up, down = [12, 13, 14], [14, 13, 12]
    print(f"counts up, loss {loss:.3f}: {up} {goes_on(network, up)}, {down} {goes_on(network, down)}")
    assert goes_on(network, up) == [15, 16, 17, 18, 19, 20]

    mindpet.inject(network, mindpet.LoRAConfig(rank=8, alpha=16, targets="all-linear"))
    trained = sum(parameter.size for parameter in network.trainable_params())
    print(f"{trained:,} of {sum(parameter.size for parameter in network.get_parameters()):,} parameters train")
    loss = train(network, rows(-1), 100, 1e-2)
    print(f"counts down, loss {loss:.3f}: {down} {goes_on(network, down)}")
    assert goes_on(network, down) == [11, 10, 9, 8, 7, 6]

    with mindpet.disable(network):
        print(f"without the LoRA: {up} {goes_on(network, up)}")
        assert goes_on(network, up) == [15, 16, 17, 18, 19, 20]
    mindpet.merge_and_eject(network)
    print(f"merged: {down} {goes_on(network, down)}")
    assert goes_on(network, down) == [11, 10, 9, 8, 7, 6]


if __name__ == "__main__":
    main()
