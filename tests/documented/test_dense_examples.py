"""The examples of LoRA, Adapter, Low-Rank Adapter and BitFit, with their ellipses filled in."""

import mindspore.nn as nn
import pytest

from mindpet.delta import AdapterDense, AdapterLayer, LoRADense, LowRankAdapterDense, LowRankAdapterLayer
from mindpet.graph import freeze_delta
from tests.documented.tuning import assert_restores, cross_entropy, rows_and_labels, tune

SIZE = 1 * 28 * 28


class NetworkWithLoRADense(nn.Cell):
    def __init__(self):
        super().__init__()
        # replace Dense Layer with LoRADense
        dense1 = LoRADense(in_channels=1 * 28 * 28, out_channels=512, lora_rank=8, lora_alpha=16)
        # if distributed training is required, invoke shard method
        dense1.shard(
            strategy_org_dense_matmul=((2, 1), (4, 1)),
            strategy_org_bias_add=((2, 4), (4,)),
            strategy_lora_dropout=((2, 1),),
            strategy_lora_a_matmul=((2, 1), (1, 1)),
            strategy_lora_b_matmul=((2, 1), (4, 1)),
            strategy_lora_mul=((2, 4), ()),
            strategy_lora_add=((2, 4), (2, 4)),
            strategy_activation=((2, 4), (2, 4)),
        )
        self.dense1 = dense1
        self.head = nn.Dense(512, 3)

    def construct(self, x):
        return self.head(self.dense1(x))


class NetworkWithAdapterDense(nn.Cell):
    def __init__(self):
        super().__init__()
        # replace Dense Layer with AdapterDense
        dense1 = AdapterDense(in_channels=1 * 28 * 28, out_channels=512, bottleneck_size=64)

        # the document misspells strategy_residual_add
        with pytest.raises(TypeError, match="strategy_residential_add"):
            dense1.shard(strategy_residential_add=((2, 1), (2, 1)))

        # if distributed training is required, invoke shard method
        dense1.shard(
            strategy_matmul_org=((2, 4), (1, 4)),
            strategy_bias_org=((2, 1), (1,)),
            strategy_activation_org=((2, 1),),
            strategy_matmul_down_sampler=((2, 1), (1, 1)),
            strategy_bias_down_sampler=((2, 1), (1,)),
            strategy_non_linearity=((2, 1),),
            strategy_matmul_up_sampler=((2, 1), (1, 1)),
            strategy_bias_up_sampler=((2, 1), (1,)),
            strategy_residual_add=((2, 1), (2, 1)),
        )
        self.dense1 = dense1
        self.head = nn.Dense(512, 3)

    def construct(self, x):
        return self.head(self.dense1(x))


class NetworkWithAdapterLayer(nn.Cell):
    def __init__(self):
        super().__init__()
        # original Dense Layer
        self.dense = nn.Dense(in_channels=1 * 28 * 28, out_channels=512)

        # insert into Adapter Layer with AdapterLayer
        adapter_layer = AdapterLayer(hidden_size=512, bottleneck_size=64)

        # the document misspells strategy_residual_add
        with pytest.raises(TypeError, match="strategy_residential_add"):
            adapter_layer.shard(strategy_residential_add=((2, 1), (2, 1)))

        # if distributed training is required, invoke shard method
        # set origin dense shard method here
        # set AdapterLayer shard method below
        adapter_layer.shard(
            strategy_matmul_down_sampler=((2, 1), (1, 1)),
            strategy_bias_down_sampler=((2, 1), (1,)),
            strategy_non_linearity=((2, 1),),
            strategy_matmul_up_sampler=((2, 1), (1, 1)),
            strategy_bias_up_sampler=((2, 1), (1,)),
            strategy_residual_add=((2, 1), (2, 1)),
        )
        self.adapter_layer = adapter_layer
        self.head = nn.Dense(512, 3)

    def construct(self, input_tensor):
        # in model construct method
        dense_output = self.dense(input_tensor)
        adapter_layer_output = self.adapter_layer(dense_output)
        return self.head(adapter_layer_output)


class NetworkWithLowRankAdapterDense(nn.Cell):
    def __init__(self):
        super().__init__()
        # replace Dense Layer with LowRankAdapterDense
        dense1 = LowRankAdapterDense(in_channels=1 * 28 * 28, out_channels=512, reduction_factor=8)

        # if distributed training is required, invoke shard method
        dense1.shard(
            strategy_matmul_org=((2, 4), (1, 4)),
            strategy_bias_org=((2, 1), (1,)),
            strategy_activation_org=((2, 1),),
            strategy_matmul_down_sampler_weight=((1, 1), (1, 1)),
            strategy_matmul_down_sampler_input=((2, 1), (1, 1)),
            strategy_bias_down_sampler=((2, 1), (1,)),
            strategy_non_linearity=((2, 1),),
            strategy_matmul_up_sampler_weight=((1, 1), (1, 1)),
            strategy_matmul_up_sampler_input=((2, 1), (1, 1)),
            strategy_bias_up_sampler=((2, 1), (1,)),
            strategy_residual_add=((2, 1), (2, 1)),
        )
        self.dense1 = dense1
        self.head = nn.Dense(512, 3)

    def construct(self, x):
        return self.head(self.dense1(x))


class NetworkWithLowRankAdapterLayer(nn.Cell):
    def __init__(self):
        super().__init__()
        # original Dense Layer
        self.dense = nn.Dense(in_channels=1 * 28 * 28, out_channels=512)

        # insert LowRankAdapter Layer with LowRankAdapterLayer
        low_rank_adapter_layer = LowRankAdapterLayer(hidden_size=512, reduction_factor=8, low_rank_size=1)

        # if distributed training is required, invoke shard method
        # set origin dense shard method here
        # set LowRankAdapterLayer shard method below
        low_rank_adapter_layer.shard(
            strategy_matmul_down_sampler_weight=((1, 1), (1, 1)),
            strategy_matmul_down_sampler_input=((2, 1), (1, 1)),
            strategy_bias_down_sampler=((2, 1), (1,)),
            strategy_non_linearity=((2, 1),),
            strategy_matmul_up_sampler_weight=((1, 1), (1, 1)),
            strategy_matmul_up_sampler_input=((2, 1), (1, 1)),
            strategy_bias_up_sampler=((2, 1), (1,)),
            strategy_residual_add=((2, 1), (2, 1)),
        )
        self.low_rank_adapter_layer = low_rank_adapter_layer
        self.head = nn.Dense(512, 3)

    def construct(self, input_tensor):
        # in model construct method
        dense_output = self.dense(input_tensor)
        adapter_layer_output = self.low_rank_adapter_layer(dense_output)
        return self.head(adapter_layer_output)


class NetworkForBitFit(nn.Cell):
    def __init__(self):
        super().__init__()
        self.dense1 = nn.Dense(1 * 28 * 28, 512)
        self.head = nn.Dense(512, 3)

    def construct(self, x):
        return self.head(self.dense1(x))


def freeze_for_lora(network):
    # freeze all cells except LoRA and head
    freeze_delta(model=network, mode="lora", exclude=["*head*"])


def freeze_for_adapter(network):
    # freeze all cell except Adapter and head
    freeze_delta(model=network, mode="adapter", exclude=["*head*"])


def freeze_for_low_rank_adapter(network):
    # freeze all cell except LowRankAdapter and head
    freeze_delta(model=network, mode="low_rank_adapter", exclude=["*head*"])


def freeze_for_bitfit(network):
    # freeze all cell except bias and head
    freeze_delta(model=network, mode="bitfit", exclude=["*head*"])


EXAMPLES = [
    (NetworkWithLoRADense, freeze_for_lora, 2),
    (NetworkWithAdapterDense, freeze_for_adapter, 4),
    (NetworkWithAdapterLayer, freeze_for_adapter, 4),
    (NetworkWithLowRankAdapterDense, freeze_for_low_rank_adapter, 6),
    (NetworkWithLowRankAdapterLayer, freeze_for_low_rank_adapter, 6),
    (NetworkForBitFit, freeze_for_bitfit, 1),
]


@pytest.mark.parametrize(
    ("make", "freeze", "delta_parameters"), EXAMPLES, ids=[make.__name__ for make, _, _ in EXAMPLES]
)
def test_the_example_trains_saves_and_restores(mode, rng, tmp_path, make, freeze, delta_parameters):
    x, labels = rows_and_labels(rng, SIZE)
    outcome = tune(make(), freeze, (x, labels), tmp_path, cross_entropy())
    heads = {name for name in outcome.trained if name.startswith("head")}
    assert heads == {"head.weight", "head.bias"}
    assert len(outcome.trained - heads) == delta_parameters
    assert outcome.changed == outcome.trained
    assert set(outcome.saved) == outcome.trained
    assert_restores(outcome, make(), x)


def test_the_imports_of_the_document_are_the_same_things():
    import mindpet.delta.adapter
    import mindpet.delta.lora
    import mindpet.delta.low_rank_adapter
    import mindpet.graph.ckpt_util
    import mindpet.graph.freeze_utils
    from mindpet.graph import TrainableParamsCheckPoint

    assert mindpet.delta.lora.LoRADense is LoRADense
    assert mindpet.delta.adapter.AdapterDense is AdapterDense
    assert mindpet.delta.adapter.LowRankAdapterDense is LowRankAdapterDense
    assert mindpet.delta.low_rank_adapter.LowRankAdapterLayer is LowRankAdapterLayer
    assert mindpet.graph.freeze_utils.freeze_delta is freeze_delta
    assert mindpet.graph.ckpt_util.TrainableParamsCheckPoint is TrainableParamsCheckPoint
