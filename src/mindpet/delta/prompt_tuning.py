"""Prompt Tuning: The Power of Scale for Parameter-Efficient Prompt Tuning. Lester et al. 2021, arXiv:2104.08691.

Section 2: the network sees a few trained embeddings before those of its words, and nothing else trains.

::

    P (tokens, hidden) ─┐
                        ├── positions, layers ...
    ids ── words ───────┘
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, Uniform, initializer

from mindpet import _checks
from mindpet.delta.method import DeltaConfig, Method
from mindpet.delta.prompt_slot import PromptSlot

_STARTS = ("vocabulary", "random")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(DeltaConfig):
    """Trained embeddings before those of the words.

    Attributes:
        tokens: how many.
        start: ``"vocabulary"``: the embeddings of words drawn from all; ``"random"``: normally distributed numbers; or
            ids of words whose embeddings they start with, over and over if there are fewer than `tokens`. The paper
            finds words of the task, the names of classes for instance, best, and random numbers worst (section 3.2).
    """

    tokens: int = 20
    start: str | Sequence[int] = "vocabulary"

    def __post_init__(self):
        super().__post_init__()
        _checks.positive_int("PromptTuningConfig", "tokens", self.tokens)
        if isinstance(self.start, str):
            if self.start not in _STARTS:
                raise ValueError(
                    f"For 'PromptTuningConfig', 'start' must be 'vocabulary', 'random' or ids of words, "
                    f"but got {_checks.shown(self.start)}{_checks.near(self.start, _STARTS)}."
                )
            return
        wrong = not isinstance(self.start, (list, tuple)) or not self.start
        if wrong or not all(type(word) is int and word >= 0 for word in self.start):
            raise ValueError(
                f"For 'PromptTuningConfig', 'start' must be 'vocabulary', 'random' or ids of words from 0 on, "
                f"but got {_checks.shown(self.start)}."
            )
        object.__setattr__(self, "start", tuple(self.start))


class PromptTuning(PromptSlot):
    r"""A slot with trained embeddings: the input of the first layer is :math:`[P; E]`.

    Shapes: P ``(tokens, hidden)``, which calling it returns; E, the embeddings of a sample, ``(seq, hidden)``. Tuning
    starts elsewhere than at the network, which did not see these tokens. Cost: ``tokens * hidden`` parameters
    and ``work(tokens + seq) - work(seq)`` floating-point operations a text, with the network's own work on a text of
    so many tokens.

    >>> PromptTuning(nn.Embedding(11, 8), PromptTuningConfig(tokens=3))().shape
    (3, 8)
    """

    delta_method = "prompt_tuning"

    def __init__(self, words: nn.Embedding, config: PromptTuningConfig):
        super().__init__(words)
        self.tokens = config.tokens
        self.mindpet_delta_prompt_tuning_table = Parameter(
            _start_of(words, config), name="mindpet_delta_prompt_tuning_table"
        )

    @classmethod
    def from_slot(cls, slot: PromptSlot, config: PromptTuningConfig) -> "PromptTuning":
        """The slot, filled."""
        return cls(slot.words, config)

    def construct(self):
        return self.mindpet_delta_prompt_tuning_table


def _start_of(words: nn.Embedding, config: PromptTuningConfig) -> Tensor:
    """(tokens, hidden) in float32."""
    if config.start == "random":
        return initializer(Normal(1.0), (config.tokens, words.embedding_size))
    table = words.embedding_table.init_data().asnumpy()
    if config.start == "vocabulary":
        share = initializer(Uniform(0.5), (config.tokens,)).init_data().asnumpy() + 0.5  # MindSpore's seed draws
        ids = np.minimum((share * len(table)).astype(int), len(table) - 1)
    else:
        ids = np.resize(np.array(config.start), config.tokens)
        if ids.max() >= len(table):
            raise ValueError(
                f"For 'PromptTuningConfig', 'start' must be ids of the {len(table)} words, but has {ids.max()}."
            )
    return Tensor(table[ids].astype(np.float32))


METHOD = Method(
    name="prompt_tuning",
    config=PromptTuningConfig,
    trainable=("*mindpet_delta_prompt_tuning*",),
    paper="Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv:2104.08691",
    adapt={PromptSlot: PromptTuning.from_slot},
    targets=("*prompts",),
    learning_rate=0.03,
)
