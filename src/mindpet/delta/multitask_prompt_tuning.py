"""Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning. Wang et al. 2023, arXiv:2303.02861.

Section 3.2: all tasks share one table of virtual tokens; each has a low-rank matrix of its own, which scales it entry
by entry.

::

    P (tokens, hidden) ── ∘ ── before the words
                          │
          U_k V_k of task k
"""

from dataclasses import dataclass, replace
from typing import Any

from mindspore import Parameter, nn
from mindspore.common.initializer import Normal, initializer

from mindpet import _checks
from mindpet.delta.method import DeltaConfig, Method, same_configuration
from mindpet.delta.prompt_slot import PromptSlot


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuningConfig(DeltaConfig):
    """Virtual tokens that several tasks share, each with a low-rank factor of its own.

    Attributes:
        tokens: how many.
        rank: of the matrix that belongs to a task.
        num_tasks: how many tasks there are matrices for.
        task: the one that the network runs, and whose matrices get a gradient.
    """

    tokens: int = 20
    rank: int = 1
    num_tasks: int = 1
    task: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("tokens", "rank", "num_tasks"):
            _checks.positive_int("MultitaskPromptTuningConfig", name, getattr(self, name))
        if type(self.task) is not int or not 0 <= self.task < self.num_tasks:
            raise ValueError(
                f"For 'MultitaskPromptTuningConfig', 'task' must be one of 0 to {self.num_tasks - 1}, "
                f"but got {_checks.shown(self.task)}."
            )


class MultitaskPromptTuning(PromptSlot):
    r"""A slot whose virtual tokens are those of one task: :math:`P_k = P \circ (U_k V_k)`.

    Shapes: P and P_k ``(tokens, hidden)``, U ``(num_tasks, tokens, rank)``, V ``(num_tasks, rank, hidden)``. P starts
    with a deviation of 1, U and V of 0.02, so P_k starts near zero, and tuning elsewhere than at the network, which did
    not see these tokens. Cost: ``tokens * hidden + num_tasks * rank * (tokens + hidden)`` parameters,
    ``work(tokens + seq) - work(seq)`` floating-point operations a text, with the network's own work on a text of so
    many tokens, and ``(2 * rank + 1) * tokens * hidden`` a call.

    >>> MultitaskPromptTuning(nn.Embedding(11, 8), MultitaskPromptTuningConfig(tokens=3, num_tasks=2))().shape
    (3, 8)
    """

    delta_method = "multitask_prompt_tuning"

    def __init__(self, words: nn.Embedding, config: MultitaskPromptTuningConfig):
        super().__init__(words)
        self.tokens, self._task = config.tokens, config.task

        def part(name: str, deviation: float, *shape: int) -> Parameter:
            return Parameter(initializer(Normal(deviation), shape), name=name)

        tasks, rank, hidden = config.num_tasks, config.rank, self.hidden_size
        name = "mindpet_delta_multitask_prompt_tuning"
        self.mindpet_delta_multitask_prompt_tuning_table = part(f"{name}_table", 1.0, config.tokens, hidden)
        self.mindpet_delta_multitask_prompt_tuning_u = part(f"{name}_u", 0.02, tasks, config.tokens, rank)
        self.mindpet_delta_multitask_prompt_tuning_v = part(f"{name}_v", 0.02, tasks, rank, hidden)

    @classmethod
    def from_slot(cls, slot: PromptSlot, config: MultitaskPromptTuningConfig) -> "MultitaskPromptTuning":
        """The slot, filled."""
        return cls(slot.words, config)

    @property
    def task(self) -> int:
        """The number k. It is compiled in: for another one, inject anew and load the delta."""
        return self._task

    def construct(self):
        u = self.mindpet_delta_multitask_prompt_tuning_u[self._task]  # (tokens, rank)
        v = self.mindpet_delta_multitask_prompt_tuning_v[self._task]  # (rank, hidden)
        return self.mindpet_delta_multitask_prompt_tuning_table * (u @ v)


def _for_any_task(here: Any, there: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """A delta holds all tasks, whichever of them was run last."""
    return same_configuration(here, replace(there, task=here.task), tensors)


METHOD = Method(
    name="multitask_prompt_tuning",
    config=MultitaskPromptTuningConfig,
    trainable=("*mindpet_delta_multitask_prompt_tuning*",),
    paper="Wang et al. 2023, Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, arXiv:2303.02861",
    adapt={PromptSlot: MultitaskPromptTuning.from_slot},
    targets=("*prompts",),
    learning_rate=0.03,
    fit=_for_any_task,
)
