"""A prefix that starts from tokens is what the network makes of these tokens."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from mindpet import LoRAConfig, PrefixConfig, PTuning2Config, inject
from mindpet.models import start_prefix
from tests.models.causal import WORDS, build, logits, tokens

CONFIGS = [
    PrefixConfig(tokens=5, embed_dim=8, mid_dim=8),
    PrefixConfig(tokens=5, embed_dim=8, mid_dim=8, projection=False),
    PTuning2Config(tokens=5),
    PTuning2Config(tokens=5, projection=True, projection_dim=8),
]


@pytest.mark.exhaustive_in_graph("*-llama-*projection=True*", "*-gpt2-PrefixConfig*projection=False*")
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_network_goes_on_as_after_the_tokens(mode, family, config):
    network, ids, start = build(family), tokens(2, 6), tokens(1, 5, seed=3)[0]
    whole = logits(network, np.concatenate([np.tile(start, (2, 1)), ids], 1))[:, 5:]
    inject(network, config)
    assert np.abs(logits(network, ids) - whole).max() > 1e-2
    before = ms.get_context("mode")
    start_prefix(network, start)
    assert ms.get_context("mode") == before
    np.testing.assert_allclose(logits(network, ids), whole, atol=2e-5)


def test_few_tokens_are_taken_over_and_over():
    one, two = (inject(build("llama"), PTuning2Config(tokens=5)) for _ in range(2))
    start_prefix(one, [3, 4])
    start_prefix(two, [3, 4, 3, 4, 3])
    np.testing.assert_array_equal(logits(one, tokens(1, 4)), logits(two, tokens(1, 4)))


@pytest.mark.parametrize("wrong", [[], [1.7], [-1], [WORDS], "abc", None, [[1]]], ids=repr)
def test_what_are_no_tokens_is_refused_and_nothing_changes(wrong):
    network = inject(build("llama"), PTuning2Config(tokens=5))
    before = logits(network, tokens(1, 4))
    with pytest.raises(ValueError, match=f"'input_ids' must be ids from 0 to {WORDS - 1}, one at least"):
        start_prefix(network, wrong)
    np.testing.assert_array_equal(logits(network, tokens(1, 4)), before)


def test_what_has_no_prefix_is_refused():
    with pytest.raises(ValueError, match="this LlamaForCausalLM has none: inject one first"):
        start_prefix(inject(build("llama"), LoRAConfig(rank=2, targets=["*q_proj"])), [1])
    with pytest.raises(ValueError, match="this Dense has none"):
        start_prefix(nn.Dense(2, 2), [1])
    with pytest.raises(TypeError, match="'network' must be a mindspore.nn.Cell"):
        start_prefix(None, [1])


def test_layers_that_do_not_train_stay_so_and_no_cache_stays():
    network = inject(build("llama"), PTuning2Config(tokens=5)).set_train()
    network.model.layers[0].set_train(False)
    start_prefix(network, [1, 2])
    assert network.training
    assert not network.model.layers[0].self_attn.training
    assert not {"mindpet_step", "mindpet_buffers"} & vars(network).keys()


def test_afterwards_the_flags_that_a_graph_is_compiled_by_are_as_before():
    network = inject(build("gpt2", attn_pdrop=0.5), PTuning2Config(tokens=5)).set_train()
    before = [(cell.get_flags(), cell.phase) for _, cell in network.cells_and_names()]
    start_prefix(network, [1, 2])
    assert [(cell.get_flags(), cell.phase) for _, cell in network.cells_and_names()] == before
