"""LoRA+: Efficient Low Rank Adaptation of Large Models. Hayou et al. 2024, arXiv:2402.12354, section 4.

::

    x ──┬── W (frozen) ────────────────────┬── + ── σ ── y
        └── dropout ── A ── B ── alpha/r ──┘
                       │    └─ learns at ratio * learning rate
                       └─ learns at the learning rate
"""

from dataclasses import dataclass, replace

from mindpet import _checks
from mindpet.delta import lora


@dataclass(frozen=True, kw_only=True)
class LoRAPlusConfig(lora.LoRAConfig):
    """LoRA, whose B learns at `ratio` times the learning rate of A and of everything else.

    It takes an optimizer with groups: a run makes one, and a script does with :func:`mindpet.parameter_groups`.

    Attributes:
        ratio: learning rate of B over that of A, at least 1.
    """

    ratio: float = 16.0

    def __post_init__(self):
        super().__post_init__()
        if _checks.non_zero_number(type(self).__name__, "ratio", self.ratio) < 1:
            raise ValueError(f"For 'LoRAPlusConfig', 'ratio' must be at least 1, but got {_checks.shown(self.ratio)}.")


def rate(config: LoRAPlusConfig, name: str) -> float:
    """The factor of the learning rate of the parameter of that name.

    >>> [rate(LoRAPlusConfig(), f"0.query.mindpet_delta_lora_{part}") for part in "ab"]
    [1.0, 16.0]
    """
    return config.ratio if name.endswith("mindpet_delta_lora_b") else 1.0


METHOD = replace(
    lora.METHOD,
    name="lora_plus",
    config=LoRAPlusConfig,
    paper="Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv:2402.12354",
    learning_rate=0.0002,
    rate=rate,
)
