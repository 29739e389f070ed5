"""Parameter-efficient fine-tuning for MindSpore.

Importing this does not import MindSpore: that happens when one of the names below is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "1.1.0"

_HOMES = {
    "AdapterConfig": "mindpet.delta",
    "BitFitConfig": "mindpet.delta",
    "LoHaConfig": "mindpet.delta",
    "LoRAConfig": "mindpet.delta",
    "LowRankAdapterConfig": "mindpet.delta",
    "METHODS": "mindpet.delta",
    "MixedDeltas": "mindpet.graph",
    "PTuning2Config": "mindpet.delta",
    "ParallelConfig": "mindpet.parallel",
    "PrefixConfig": "mindpet.delta",
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
    "save_delta": "mindpet.graph",
    "save_peft": "mindpet.interop.hf_peft",
    "shard_like": "mindpet.parallel",
    "targets": "mindpet.graph",
    "transform_delta_checkpoints": "mindpet.parallel",
    "unmerge": "mindpet.graph",
    "use": "mindpet.graph",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from mindpet.delta import (  # noqa: F401
        METHODS,
        AdapterConfig,
        BitFitConfig,
        LoHaConfig,
        LoRAConfig,
        LowRankAdapterConfig,
        PrefixConfig,
        PTuning2Config,
    )
    from mindpet.graph import (  # type: ignore[no-redef]  # noqa: F401
        MixedDeltas,
        combine,
        disable,
        eject,
        inject,
        load_delta,
        merge,
        merge_and_eject,
        save_delta,
        unmerge,
        use,
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
