"""The trainable shares of the document's tables, counted on networks of those sizes.

The parameters of the big networks have shapes and no memory: nothing here is computed.
"""

import math

import pytest
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

import mindpet
from mindpet.delta import AdapterConfig, BitFitConfig, LoRAConfig, LowRankAdapterConfig, PrefixEncoder
from mindpet.graph import freeze_delta
from mindpet.models.bert import BertConfig, BertForSequenceClassification

BERT_BASE_CHINESE = 102_267_648
CLASSES = 15


def count(parameters):
    return sum(math.prod(parameter.shape) for parameter in parameters)


@pytest.fixture
def bert():
    with no_init_parameters():
        network = BertForSequenceClassification(BertConfig(vocab_size=21128), CLASSES)
    assert count(network.bert.get_parameters()) == BERT_BASE_CHINESE
    assert count(network.get_parameters()) == BERT_BASE_CHINESE + 768 * CLASSES + CLASSES
    return network


def share(network):
    """(delta + head) / everything, in per cent."""
    return 100 * count(network.trainable_params()) / count(network.get_parameters())


def test_lora_of_rank_8_on_query_and_value_trains_0_30_per_cent(bert):
    mindpet.inject(bert, LoRAConfig(rank=8, alpha=16, modules_to_save=["classifier"]))
    delta = [parameter for parameter in bert.trainable_params() if "mindpet_delta" in parameter.name]
    assert count(delta) == 12 * 2 * 8 * (768 + 768)
    assert round(share(bert), 2) == 0.30


def test_two_adapters_of_size_64_a_layer_are_2_33_per_cent_of_the_base_model(bert):
    mindpet.inject(bert, AdapterConfig(size=64))
    delta = count(bert.trainable_params())
    assert delta == 12 * 2 * (2 * 768 * 64 + 768 + 64)
    assert round(100 * delta / BERT_BASE_CHINESE, 2) == 2.33


def test_two_low_rank_adapters_a_layer_train_0_067_per_cent(bert):
    mindpet.inject(bert, LowRankAdapterConfig(reduction_factor=32, rank=1, modules_to_save=["classifier"]))
    delta = [parameter for parameter in bert.trainable_params() if "mindpet_delta" in parameter.name]
    assert count(delta) == 12 * 2 * (2 * (768 + 24) + 768 + 24)
    assert round(share(bert), 3) == 0.067


def test_bitfit_trains_0_09_per_cent(bert):
    mindpet.inject(bert, BitFitConfig(modules_to_save=["classifier"]))
    biases = 12 * (4 * 768 + 3072 + 768) + 768  # attention, the two layers behind it, the pooler
    assert count(bert.trainable_params()) == biases + 768 * CLASSES + CLASSES
    assert round(share(bert), 2) == 0.09


class Glm2Layer(nn.Cell):
    """The weights of one layer of GLM2-6B: 32 query heads and 2 of keys and values, each 128 wide."""

    def __init__(self):
        super().__init__()
        self.norms = nn.CellList([nn.Dense(4096, 1, has_bias=False), nn.Dense(4096, 1, has_bias=False)])
        self.qkv = nn.Dense(4096, (32 + 2 * 2) * 128)
        self.dense = nn.Dense(4096, 4096, has_bias=False)
        self.up = nn.Dense(4096, 2 * 13696, has_bias=False)
        self.down = nn.Dense(13696, 4096, has_bias=False)


class Glm2(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(65024, 4096)
        self.layers = nn.CellList([Glm2Layer() for _ in range(28)])
        self.norm = nn.Dense(4096, 1, has_bias=False)
        self.output = nn.Dense(4096, 65024, has_bias=False)


def test_p_tuning_v2_with_128_tokens_trains_0_03_per_cent():
    with no_init_parameters():
        network = Glm2()
    assert round(count(network.get_parameters()) / 1e9, 2) == 6.24
    network.prefix_encoder = PrefixEncoder(128, 28, 2, 128, False, 128, 0.0)
    freeze_delta(network, "ptuning2")
    assert count(network.trainable_params()) == 128 * 28 * 2 * 2 * 128
    assert round(share(network), 2) == 0.03
