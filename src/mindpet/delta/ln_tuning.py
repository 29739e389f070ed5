"""LayerNorm tuning. Zhao et al. 2023, Tuning LayerNorm in Attention, arXiv:2312.11420, section 2.

Train the scale and the shift of every norm and nothing else. No cell is changed, so the whole method is a pattern.
"""

from dataclasses import dataclass

from mindpet.delta.method import DeltaConfig, Method, PeftNames


@dataclass(frozen=True, kw_only=True)
class LNTuningConfig(DeltaConfig):
    """Every norm trains, or those that `targets`, `exclude` and `layers` leave."""


METHOD = Method(
    name="ln_tuning",
    config=LNTuningConfig,
    trainable=("*gamma", "*beta", "*norm.weight"),  # MindSpore's norms, and an RMSNorm by its name
    paper="Zhao et al. 2023, Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, "
    "arXiv:2312.11420",
    learning_rate=0.001,
    peft=PeftNames("LN_TUNING", tensors={}, options={}, selected="ln_tuning_layers"),
)
