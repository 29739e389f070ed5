"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.

Ben Zaken et al. 2021, arXiv:2106.10199, section 3: train the biases and nothing else. No cell is changed, so the whole
method is a pattern. The paper counts LayerNorm's shift as a bias too; MindSpore names it ``beta``, and
``freeze_delta(network, "bitfit", include_norm=True)`` trains it as well.
"""

from dataclasses import dataclass

from mindpet.delta.method import DeltaConfig, Method


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(DeltaConfig):
    """Every bias trains.

    Attributes:
        include_norm: whether LayerNorm's ``beta`` counts as a bias.
    """

    include_norm: bool = False


METHOD = Method(
    name="bitfit",
    config=BitFitConfig,
    trainable=("*bias",),
    norm_trainable=("beta",),
    paper="Ben Zaken et al. 2021, BitFit: Simple Parameter-efficient Fine-tuning, arXiv:2106.10199",
    learning_rate=0.003,
)
