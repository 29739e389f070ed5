"""LLaMA-Adapter: Efficient Fine-tuning with Zero-init Attention. Zhang et al. 2023, arXiv:2303.16199.

Sections 3.1 and 3.2: the topmost layers attend to a trained prompt as well, by a softmax of its own, whose result is
multiplied by a trained gate that starts at zero.

::

    x ──┬── attention to the text ──────────────── + ── output projection (of GPT-2, as in PEFT, before the sum)
        └── queries ── attention to P ── * gate ───┘
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mindspore import Parameter
from mindspore.common.initializer import Normal, initializer

from mindpet import _checks
from mindpet.delta.adaption_slot import AdaptionSlot
from mindpet.delta.method import DeltaConfig, Method, PeftNames

if TYPE_CHECKING:
    from mindspore import nn


@dataclass(frozen=True, kw_only=True)
class AdaptionPromptConfig(DeltaConfig):
    """A prompt with a gate in the topmost attention layers.

    Attributes:
        tokens: length of the prompt of each layer.
        top_layers: how many of the targeted layers, the last ones, get a prompt; None for all. The paper takes 30 of
            the 32 of a LLaMA-7B.
    """

    tokens: int = 10
    top_layers: int | None = None

    def __post_init__(self):
        super().__post_init__()
        _checks.positive_int("AdaptionPromptConfig", "tokens", self.tokens)
        if self.top_layers is not None:
            _checks.positive_int("AdaptionPromptConfig", "top_layers", self.top_layers)

    def narrowed(self, matched: "dict[str, nn.Cell]") -> "dict[str, nn.Cell]":
        """The last `top_layers` of the cells."""
        if self.top_layers is None or not matched:
            return matched
        if self.top_layers > len(matched):
            raise ValueError(
                f"For 'AdaptionPromptConfig', 'top_layers' must be at most {len(matched)}, the number of layers that "
                f"are targeted, but got {_checks.shown(self.top_layers)}."
            )
        return dict(list(matched.items())[-self.top_layers :])


class AdaptionPrompt(AdaptionSlot):
    r"""A slot with a trained prompt and its gate.

    .. math:: A = \mathrm{softmax}(Q K^T / \sqrt{d})\, V + g\, \mathrm{softmax}(Q K_P^T / \sqrt{d})\, V_P

    Shapes: P ``(tokens, hidden)``, g ``(1,)``; calling the slot returns the two. K_P and V_P, ``(tokens, groups * d)``,
    are the keys and values that the layer's own projections make of P, without positions. P starts normally
    distributed with a deviation of 1 and g at zero, so the layer starts as it was. Cost: ``tokens * hidden + 1``
    parameters; with as many groups as heads ``4 * tokens * hidden + heads * tokens + 2 * hidden`` floating-point
    operations a row, of which each position of the text is one, and ``2 * tokens * (2 * hidden + 1) * hidden`` a call:
    the keys and values of P are made anew in every forward pass, at every token of generation too.

    Differs from the paper in the gate, which is one number for all heads and not passed through a tanh, as in PEFT.

    >>> prompt, gate = AdaptionPrompt(8, AdaptionPromptConfig(tokens=3))()
    >>> prompt.shape, gate.shape
    ((3, 8), (1,))
    """

    delta_method = "adaption_prompt"

    def __init__(self, hidden_size: int, config: AdaptionPromptConfig):
        super().__init__(hidden_size)
        start = initializer(Normal(1.0), (config.tokens, hidden_size))
        self.mindpet_delta_adaption_prompt_table = Parameter(start, name="mindpet_delta_adaption_prompt_table")
        zero = initializer("zeros", (1,))
        self.mindpet_delta_adaption_prompt_gate = Parameter(zero, name="mindpet_delta_adaption_prompt_gate")

    @classmethod
    def from_slot(cls, slot: AdaptionSlot, config: AdaptionPromptConfig) -> "AdaptionPrompt":
        """The slot, filled."""
        return cls(slot.hidden_size, config)

    def construct(self):
        return self.mindpet_delta_adaption_prompt_table, self.mindpet_delta_adaption_prompt_gate


# PEFT puts the two beside the projections of the attention, whose last name ``target_modules`` is; the slot is a cell
# below it here, which is called adaption
_ATTENTIONS = ("self_attn", "attn")  # of the networks that PEFT has it for: LLaMA, Mistral, GPT-2


def _unpack(content: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    content.pop("target_modules", None)
    return {re.sub(r"\.(adaption_(prompt|gate))$", r".adaption.\1", name): value for name, value in tensors.items()}


def _pack(content: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    packed, attentions = {}, set()
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        if part in ("adaption_prompt", "adaption_gate"):
            attention, _, slot = module.rpartition(".")
            attentions.add(attention.rpartition(".")[2] if slot == "adaption" else module)
            name, value = f"{attention}.{part}", value[None] if part == "adaption_prompt" else value
        packed[name] = value
    if not attentions <= set(_ATTENTIONS) or len(attentions) != 1:
        raise ValueError(
            f"PEFT has the adaption prompt in attentions that are called {' or '.join(_ATTENTIONS)}, here with a slot "
            f"'adaption', and not in {', '.join(sorted(attentions))}"
        )
    content["target_modules"] = attentions.pop()
    return packed


METHOD = Method(
    name="adaption_prompt",
    config=AdaptionPromptConfig,
    trainable=("*mindpet_delta_adaption_prompt*",),
    paper="Zhang et al. 2023, LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention, "
    "arXiv:2303.16199",
    adapt={AdaptionSlot: AdaptionPrompt.from_slot},
    targets=("*.adaption",),
    learning_rate=0.009,
    aliases=("llama_adapter",),
    peft=PeftNames(
        "ADAPTION_PROMPT",
        tensors={
            "adaption_prompt": "mindpet_delta_adaption_prompt_table",
            "adaption_gate": "mindpet_delta_adaption_prompt_gate",
        },
        options={"adapter_len": "tokens"},
        topmost="adapter_layers",
        lacks=("modules_to_save", "bias"),
        unpack=_unpack,
        pack=_pack,
    ),
)
