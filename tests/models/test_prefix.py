"""What holds for a prefix in every network: its length, its start, and where it is not."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import PrefixConfig, PTuning2Config, inject
from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.graph import disable, replace_cell
from mindpet.models import BertConfig, BertForSequenceClassification
from tests.models.causal import build, logits, tokens

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
CONFIGS = [
    PrefixConfig(tokens=3, embed_dim=8, mid_dim=8),
    PrefixConfig(tokens=3, embed_dim=8, mid_dim=8, projection=False),
    PTuning2Config(tokens=3),
    PTuning2Config(tokens=3, projection=True, projection_dim=8),
]


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=31, **BERT), 3).set_train(False)


def outputs(network, ids):
    if isinstance(network, BertForSequenceClassification):
        ids = Tensor(ids)
        return network(ids, ms.ops.ones_like(ids), ms.ops.zeros_like(ids)).asnumpy()
    return logits(network, ids)


NETWORKS = {"bert": (bert, "bert.encoder.prefix"), "llama": (lambda: build("llama"), "model.prefix")}


class FirstTokens(nn.Cell):
    """The first n tokens of another prefix."""

    def __init__(self, prefix, count):
        super().__init__()
        self.prefix, self.count = prefix, count
        self.num_layers, self.num_heads, self.head_dim = prefix.num_layers, prefix.num_heads, prefix.head_dim

    def construct(self):
        pairs = ()
        for key, value in self.prefix():
            pairs += ((key[: self.count], value[: self.count]),)
        return pairs


@pytest.mark.parametrize("kind", NETWORKS)
def test_without_a_token_a_prefix_changes_nothing(kind):
    make, path = NETWORKS[kind]
    network, ids = make(), tokens(2, 5)
    before = outputs(network, ids)
    inject(network, PTuning2Config(tokens=3))
    prefix = dict(network.cells_and_names())[path]
    assert np.abs(outputs(network, ids) - before).max() > 1e-4
    replace_cell(network, path, FirstTokens(prefix, 0))
    np.testing.assert_allclose(outputs(network, ids), before, atol=1e-6)


@pytest.mark.exhaustive_in_graph("*llama-PrefixConfig*projection=True*")
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("kind", NETWORKS)
def test_out_of_its_slot_a_prefix_changes_nothing(mode, kind, config):
    make, _ = NETWORKS[kind]
    network, ids = make(), tokens(2, 5)
    before = outputs(network, ids)
    inject(network, config)
    with disable(network):
        np.testing.assert_array_equal(outputs(network, ids), before)
    assert np.abs(outputs(network, ids) - before).max() > 1e-5


@pytest.mark.exhaustive_in_graph("*projection=True*")
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_every_parameter_of_a_prefix_gets_a_gradient(mode, config):
    network, ids = inject(bert(), config), Tensor(tokens(2, 5))
    arguments = ids, ms.ops.ones_like(ids), ms.ops.zeros_like(ids)
    parameters = list(network.trainable_params())
    gradients = ms.grad(network, None, parameters)(*arguments)
    assert all(np.abs(gradient.asnumpy()).max() > 0 for gradient in gradients)


def test_a_prefix_without_projection_starts_where_the_projection_would():
    ms.set_seed(0)
    slot = PrefixSlot(2, 4, 4)
    from mindpet.delta.prefix_layer import PrefixTuning

    trained = PrefixTuning.from_slot(slot, PrefixConfig(tokens=5, projection=False))
    assert {parameter.shape for parameter in trained.trainable_params()} == {(5, 16)}
    assert len(trained.trainable_params()) == 4  # a key and a value for each layer
    key, value = trained()[0]
    assert key.shape == value.shape == (5, 4, 4)
    assert not np.allclose(key.asnumpy(), value.asnumpy())
