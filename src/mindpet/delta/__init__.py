"""The tuning methods as layers and losses: what the user document documents."""

from mindpet.delta.adapter import AdapterConfig, AdapterDense, AdapterLayer
from mindpet.delta.bitfit import BitFitConfig
from mindpet.delta.loha import LoHaConfig, LoHaDense
from mindpet.delta.lora import LoRAConfig, LoRADense
from mindpet.delta.low_rank_adapter import LowRankAdapterConfig, LowRankAdapterDense, LowRankAdapterLayer
from mindpet.delta.method import DeltaConfig, Method
from mindpet.delta.prefix_layer import PrefixConfig, PrefixLayer
from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.delta.ptuning2 import PrefixEncoder, PTuning2Config
from mindpet.delta.r_drop import RDropLoss, rdrop_repeat
from mindpet.delta.registry import METHODS, method_named

__all__ = [
    "METHODS",
    "AdapterConfig",
    "AdapterDense",
    "AdapterLayer",
    "BitFitConfig",
    "DeltaConfig",
    "LoHaConfig",
    "LoHaDense",
    "LoRAConfig",
    "LoRADense",
    "LowRankAdapterConfig",
    "LowRankAdapterDense",
    "LowRankAdapterLayer",
    "Method",
    "PTuning2Config",
    "PrefixConfig",
    "PrefixEncoder",
    "PrefixLayer",
    "PrefixSlot",
    "RDropLoss",
    "method_named",
    "rdrop_repeat",
]
