"""The tuning methods as layers and losses: what the user document documents."""

from mindpet.delta.adalora import AdaLoRAConfig, AdaLoRADense, AdaLoRAOptimizer
from mindpet.delta.adapter import AdapterConfig, AdapterDense, AdapterLayer
from mindpet.delta.adapter_fusion import AdapterFusionConfig, AdapterFusionDense
from mindpet.delta.adaption_prompt import AdaptionPrompt, AdaptionPromptConfig
from mindpet.delta.adaption_slot import AdaptionSlot
from mindpet.delta.bitfit import BitFitConfig
from mindpet.delta.boft import BOFTConfig, BOFTDense
from mindpet.delta.compacter import CompacterConfig, CompacterDense
from mindpet.delta.dora import DoRAConfig, DoRADense
from mindpet.delta.fourierft import FourierFTConfig, FourierFTDense
from mindpet.delta.hra import HRAConfig, HRADense
from mindpet.delta.ia3 import IA3Config, IA3Dense
from mindpet.delta.ln_tuning import LNTuningConfig
from mindpet.delta.loha import LoHaConfig, LoHaDense
from mindpet.delta.lokr import LoKrConfig, LoKrDense
from mindpet.delta.lora import LoRAConfig, LoRADense
from mindpet.delta.lora_fa import LoRAFAConfig, LoRAFADense
from mindpet.delta.lora_plus import LoRAPlusConfig
from mindpet.delta.low_rank_adapter import LowRankAdapterConfig, LowRankAdapterDense, LowRankAdapterLayer
from mindpet.delta.mam import MAMConfig
from mindpet.delta.method import DeltaConfig, Method
from mindpet.delta.miss import MiSSConfig, MiSSDense
from mindpet.delta.multitask_prompt_tuning import MultitaskPromptTuning, MultitaskPromptTuningConfig
from mindpet.delta.oft import OFTConfig, OFTDense
from mindpet.delta.p_tuning import PTuning, PTuningConfig
from mindpet.delta.parallel_adapter import ParallelAdapterConfig, ParallelAdapterDense
from mindpet.delta.prefix_layer import PrefixConfig, PrefixLayer
from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.delta.prompt_slot import PromptSlot
from mindpet.delta.prompt_tuning import PromptTuning, PromptTuningConfig
from mindpet.delta.ptuning2 import PrefixEncoder, PTuning2Config
from mindpet.delta.qlora import QLoRAConfig, QLoRADense
from mindpet.delta.r_drop import RDropLoss, rdrop_repeat
from mindpet.delta.randlora import RandLoRAConfig, RandLoRADense
from mindpet.delta.registry import METHODS, method_named
from mindpet.delta.shira import SHiRAConfig, SHiRADense
from mindpet.delta.trainable_tokens import TrainableTokensConfig, TrainableTokensEmbedding
from mindpet.delta.vera import VeRAConfig, VeRADense

__all__ = [
    "METHODS",
    "AdaLoRAConfig",
    "AdaLoRADense",
    "AdaLoRAOptimizer",
    "AdapterConfig",
    "AdapterDense",
    "AdapterFusionConfig",
    "AdapterFusionDense",
    "AdapterLayer",
    "AdaptionPrompt",
    "AdaptionPromptConfig",
    "AdaptionSlot",
    "BOFTConfig",
    "BOFTDense",
    "BitFitConfig",
    "CompacterConfig",
    "CompacterDense",
    "DeltaConfig",
    "DoRAConfig",
    "DoRADense",
    "FourierFTConfig",
    "FourierFTDense",
    "HRAConfig",
    "HRADense",
    "IA3Config",
    "IA3Dense",
    "LNTuningConfig",
    "LoHaConfig",
    "LoHaDense",
    "LoKrConfig",
    "LoKrDense",
    "LoRAConfig",
    "LoRADense",
    "LoRAFAConfig",
    "LoRAFADense",
    "LoRAPlusConfig",
    "LowRankAdapterConfig",
    "LowRankAdapterDense",
    "LowRankAdapterLayer",
    "MAMConfig",
    "Method",
    "MiSSConfig",
    "MiSSDense",
    "MultitaskPromptTuning",
    "MultitaskPromptTuningConfig",
    "OFTConfig",
    "OFTDense",
    "PTuning",
    "PTuning2Config",
    "PTuningConfig",
    "ParallelAdapterConfig",
    "ParallelAdapterDense",
    "PrefixConfig",
    "PrefixEncoder",
    "PrefixLayer",
    "PrefixSlot",
    "PromptSlot",
    "PromptTuning",
    "PromptTuningConfig",
    "QLoRAConfig",
    "QLoRADense",
    "RDropLoss",
    "RandLoRAConfig",
    "RandLoRADense",
    "SHiRAConfig",
    "SHiRADense",
    "TrainableTokensConfig",
    "TrainableTokensEmbedding",
    "VeRAConfig",
    "VeRADense",
    "method_named",
    "rdrop_repeat",
]
