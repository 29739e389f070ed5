"""Parameter-efficient fine-tuning for MindSpore.

Importing this does not import MindSpore: that happens when one of the names below is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "1.1.0"

_HOMES = {
    "AdaLoRAConfig": "mindpet.delta",
    "AdapterConfig": "mindpet.delta",
    "AdaptionPromptConfig": "mindpet.delta",
    "BOFTConfig": "mindpet.delta",
    "AdapterFusionConfig": "mindpet.delta",
    "BitFitConfig": "mindpet.delta",
    "CompacterConfig": "mindpet.delta",
    "DoRAConfig": "mindpet.delta",
    "FourierFTConfig": "mindpet.delta",
    "HRAConfig": "mindpet.delta",
    "IA3Config": "mindpet.delta",
    "LNTuningConfig": "mindpet.delta",
    "LoHaConfig": "mindpet.delta",
    "LoKrConfig": "mindpet.delta",
    "LoRAConfig": "mindpet.delta",
    "LoRAFAConfig": "mindpet.delta",
    "LoRAPlusConfig": "mindpet.delta",
    "LowRankAdapterConfig": "mindpet.delta",
    "MAMConfig": "mindpet.delta",
    "METHODS": "mindpet.delta",
    "MiSSConfig": "mindpet.delta",
    "MixedDeltas": "mindpet.graph",
    "MultitaskPromptTuningConfig": "mindpet.delta",
    "OFTConfig": "mindpet.delta",
    "OptimizerCallback": "mindpet.graph",
    "PTuning2Config": "mindpet.delta",
    "PTuningConfig": "mindpet.delta",
    "ParallelAdapterConfig": "mindpet.delta",
    "ParallelConfig": "mindpet.parallel",
    "PrefixConfig": "mindpet.delta",
    "PromptTuningConfig": "mindpet.delta",
    "QLoRAConfig": "mindpet.delta",
    "RandLoRAConfig": "mindpet.delta",
    "SHiRAConfig": "mindpet.delta",
    "TrainableTokensConfig": "mindpet.delta",
    "VeRAConfig": "mindpet.delta",
    "accelerate": "mindpet.kernels",
    "combine": "mindpet.graph",
    "disable": "mindpet.graph",
    "eject": "mindpet.graph",
    "inject": "mindpet.graph",
    "load_delta": "mindpet.graph",
    "load_distributed_delta": "mindpet.parallel",
    "load_peft": "mindpet.interop.hf_peft",
    "merge": "mindpet.graph",
    "merge_and_eject": "mindpet.graph",
    "parameter_groups": "mindpet.graph",
    "save_delta": "mindpet.graph",
    "save_peft": "mindpet.interop.hf_peft",
    "shard_like": "mindpet.parallel",
    "targets": "mindpet.graph",
    "transform_delta_checkpoints": "mindpet.parallel",
    "unmerge": "mindpet.graph",
    "use": "mindpet.graph",
    "wrap_optimizer": "mindpet.graph",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from mindpet.delta import (  # noqa: F401
        METHODS,
        AdaLoRAConfig,
        AdapterConfig,
        AdapterFusionConfig,
        AdaptionPromptConfig,
        BitFitConfig,
        BOFTConfig,
        CompacterConfig,
        DoRAConfig,
        FourierFTConfig,
        HRAConfig,
        IA3Config,
        LNTuningConfig,
        LoHaConfig,
        LoKrConfig,
        LoRAConfig,
        LoRAFAConfig,
        LoRAPlusConfig,
        LowRankAdapterConfig,
        MAMConfig,
        MiSSConfig,
        MultitaskPromptTuningConfig,
        OFTConfig,
        ParallelAdapterConfig,
        PrefixConfig,
        PromptTuningConfig,
        PTuning2Config,
        PTuningConfig,
        QLoRAConfig,
        RandLoRAConfig,
        SHiRAConfig,
        TrainableTokensConfig,
        VeRAConfig,
    )
    from mindpet.graph import (  # type: ignore[no-redef]  # noqa: F401
        MixedDeltas,
        OptimizerCallback,
        combine,
        disable,
        eject,
        inject,
        load_delta,
        merge,
        merge_and_eject,
        parameter_groups,
        save_delta,
        unmerge,
        use,
        wrap_optimizer,
    )
    from mindpet.graph import find_targets as targets  # noqa: F401
    from mindpet.interop.hf_peft import load_peft, save_peft  # noqa: F401
    from mindpet.kernels import accelerate  # type: ignore[no-redef]  # noqa: F401
    from mindpet.parallel import (  # noqa: F401
        ParallelConfig,
        load_distributed_delta,
        shard_like,
        transform_delta_checkpoints,
    )


def __getattr__(name: str) -> Any:
    if name == "targets":  # the dry run of inject, under the shorter name
        name, home = "find_targets", _HOMES[name]
    elif name in _HOMES:
        home = _HOMES[name]
    else:
        raise AttributeError(f"module 'mindpet' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
