"""Parameter-efficient fine-tuning for MindSpore.

Importing this does not import MindSpore: that happens when one of the names below is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "1.1.0"

_HOMES = {
    "LoRAConfig": "mindpet.delta",
    "AdapterConfig": "mindpet.delta",
    "LowRankAdapterConfig": "mindpet.delta",
    "BitFitConfig": "mindpet.delta",
    "PrefixConfig": "mindpet.delta",
    "PTuning2Config": "mindpet.delta",
    "METHODS": "mindpet.delta",
    "inject": "mindpet.graph",
    "save_delta": "mindpet.graph",
    "load_delta": "mindpet.graph",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from mindpet.delta import (  # noqa: F401
        METHODS,
        AdapterConfig,
        BitFitConfig,
        LoRAConfig,
        LowRankAdapterConfig,
        PrefixConfig,
        PTuning2Config,
    )
    from mindpet.graph import inject, load_delta, save_delta  # type: ignore[no-redef]  # noqa: F401


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mindpet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
