"""MAM: Mix-And-Match adapter. He et al. 2021, arXiv:2110.04366, section 4.6.

A short prefix in every attention layer (:mod:`mindpet.delta.prefix_layer`), and a scaled parallel adapter in every
feed-forward network (:mod:`mindpet.delta.parallel_adapter`), which gets most of the parameters. Where the adapter
stands, this differs from the paper as the parallel adapter does.
"""

from dataclasses import dataclass

from mindspore import nn

from mindpet.delta import parallel_adapter, prefix_layer
from mindpet.delta.method import Method
from mindpet.delta.parallel_adapter import ParallelAdapterConfig, ParallelAdapterDense
from mindpet.delta.prefix_layer import PrefixConfig, PrefixTuning
from mindpet.delta.prefix_slot import PrefixSlot


@dataclass(frozen=True, kw_only=True)
class MAMConfig(ParallelAdapterConfig, PrefixConfig):
    """A prefix in the slot, and a bottleneck beside every targeted dense layer.

    Attributes:
        tokens: length of the prefix.
        embed_dim: size of the embedding that the prefix's reparameterisation starts from.
        mid_dim: width of its hidden layer.
        projection: whether keys and values come out of the reparameterisation, or are trained themselves.
        dropout: probability, on the embedding of the reparameterisation, in training only.
        size: width of the bottleneck.
        scale: what the bottleneck's output is multiplied by.
        non_linearity: activation inside the bottleneck, by name.
    """

    tokens: int = 30

    def patterns(self) -> dict[str, str]:
        """With the usual targets, which no option has, a slot must be among them."""
        return super().patterns() | dict.fromkeys(prefix_layer.METHOD.targets if self.targets is None else (), "")


METHOD = Method(
    name="mam",
    config=MAMConfig,
    trainable=(*prefix_layer.METHOD.trainable, *parallel_adapter.METHOD.trainable),
    paper="He et al. 2021, Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv:2110.04366",
    adapt={PrefixSlot: PrefixTuning.from_slot, nn.Dense: ParallelAdapterDense.from_dense},
    targets=(*prefix_layer.METHOD.targets, *parallel_adapter.METHOD.targets),
    learning_rate=0.001,
)
