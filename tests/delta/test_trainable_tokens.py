"""Trained rows of an embedding: they replace those of the table, also in a head that is tied to it."""

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet import LoRAConfig, TrainableTokensConfig, inject, merge
from mindpet.delta import TrainableTokensEmbedding
from mindpet.interop import PeftFormatError, save_peft
from mindpet.models import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LLAMA = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
GPT2 = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
TIED = [
    lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True)),
    lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
]


def test_named_rows_are_the_trained_ones(mode, rng):
    config = TrainableTokensConfig(token_indices=[5, 0])
    layer = TrainableTokensEmbedding.from_embedding(nn.Embedding(7, 3), config)
    table = layer.embedding_table.asnumpy().copy()
    np.testing.assert_array_equal(layer.mindpet_delta_trainable_tokens.asnumpy(), table[[5, 0]])
    rows = rng.standard_normal((2, 3)).astype(np.float32)
    layer.mindpet_delta_trainable_tokens.set_data(Tensor(rows))
    table[[5, 0]] = rows
    ids = np.array([[0, 1, 5], [5, 6, 2]], np.int32)
    np.testing.assert_array_equal(layer(Tensor(ids)).asnumpy(), table[ids])
    np.testing.assert_array_equal(layer.table().asnumpy(), table)
    gradient = ops.grad(layer, None, layer.mindpet_delta_trainable_tokens)(Tensor(ids)).asnumpy()
    np.testing.assert_array_equal(gradient, [[2, 2, 2], [1, 1, 1]])  # how often each is among the ids


@pytest.mark.parametrize("build", TIED)
def test_a_tied_head_has_the_trained_rows(mode, rng, build):
    network = build().set_train(False)
    inject(network, TrainableTokensConfig(token_indices=[4, 2]))
    rows = network.trainable_params()[0]
    ids, mask = Tensor(np.array([[1, 4, 3]], np.int32)), Tensor(np.ones((1, 3), np.int32))
    before = network(ids, mask).asnumpy()
    rows.set_data(Tensor(rng.standard_normal(rows.shape).astype(np.float32)))
    after = network(ids, mask).asnumpy()
    np.testing.assert_array_equal(before[:, 0, [0, 1, 3]], after[:, 0, [0, 1, 3]])  # the first token does not see 4
    assert (before[:, 0, [2, 4]] != after[:, 0, [2, 4]]).all()
    np.testing.assert_allclose(merge(network)(ids, mask).asnumpy(), after, atol=1e-5)


@pytest.mark.parametrize("given", [(), None, [1, 1], [-1], [1.0], "12", [True]])
def test_rows_must_be_numbers(given):
    with pytest.raises(
        ValueError, match="'token_indices' must be a list of different numbers of rows from 0 on, one at least"
    ):
        TrainableTokensConfig(token_indices=given)


def test_rows_must_be_there():
    with pytest.raises(ValueError, match="'token_indices' must be below 7, the number of rows, but got 7"):
        inject(nn.SequentialCell(nn.Embedding(7, 3)), TrainableTokensConfig(token_indices=[7], targets=["0"]))


def test_beside_another_method_it_is_trained_and_not_for_peft(tmp_path):
    network = nn.SequentialCell(nn.Embedding(7, 3), nn.Dense(3, 3))
    config = TrainableTokensConfig(token_indices=[3], targets=["0"])
    inject(inject(network, config), LoRAConfig(rank=1, targets=["1"]))
    assert len(network.trainable_params()) == 3
    with pytest.raises(PeftFormatError, match="has lora and trainable_tokens"):
        save_peft(network, tmp_path)
    network = inject(nn.SequentialCell(nn.Embedding(7, 3), nn.Dense(3, 3)), config)
    network[1].weight.requires_grad = True
    with pytest.raises(
        PeftFormatError, match=r"modules_to_save would be \['1'\], and PEFT's TRAINABLE_TOKENS has none"
    ):
        save_peft(network, tmp_path)
