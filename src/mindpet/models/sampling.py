"""Choosing the next token from a network's logits.

Nucleus (top-p) sampling, top-k sampling and temperature: The Curious Case of Neural Text Degeneration. Holtzman et al.
2019, arXiv:1904.09751, sections 3.1 to 3.3.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindpet import _checks


class NotFiniteError(RuntimeError):
    """A network gives infinities, or what is not a number."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    r"""How a token is drawn.

    With logits z and temperature T > 0, a token has the probability :math:`p_i \propto e^{z_i / T}`. `top_k` leaves the
    k likeliest tokens. Of these, `top_p` leaves the smallest set of the likeliest whose probabilities add up to p or
    more, which holds one token at least. What is left is scaled to add up to 1.

    Attributes:
        temperature: 0 takes the likeliest token, always; 1 is the network's own distribution, more is flatter.
        top_k: so many tokens at most, or None.
        top_p: a share of the probability above 0, up to 1, or None.
        seed: of the random numbers; the same seed draws the same tokens.

    Raises:
        ValueError: wrong values; all of them in one message.

    >>> logits = np.log([0.5, 0.3, 0.15, 0.05])
    >>> tokens, chances = Sampling(temperature=1.0, top_p=0.7).candidates(logits)
    >>> tokens.tolist(), chances.round(3).tolist()
    ([0, 1], [0.625, 0.375])
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        problems = [
            f"'{name}' must be {right}, but got {_checks.shown(value)}"
            for name, value, fine, right in (
                ("temperature", self.temperature, _is_number(self.temperature), "a number of 0 or more"),
                ("top_k", self.top_k, self.top_k is None or _is_count(self.top_k, 1), "an int of 1 or more, or None"),
                (
                    "top_p",
                    self.top_p,
                    self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1),
                    "a number above 0 and up to 1, or None",
                ),
                ("seed", self.seed, _is_count(self.seed, 0), "an int of 0 or more"),
            )
            if not fine
        ]
        if not problems and self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            problems = [
                "'top_k' and 'top_p' choose among several tokens, which takes a 'temperature' above 0 (1.0, say)"
            ]
        if problems:
            raise ValueError(f"For 'generate', {'; '.join(problems)}.")

    def candidates(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be drawn, the likeliest first where `top_k` or `top_p` is set, and their probabilities.

        Args:
            logits: ``(vocabulary,)``; the temperature must be above 0.

        Returns:
            Two arrays ``(candidates,)``; the probabilities add up to 1.
        """
        tokens = np.arange(len(logits))
        if self.top_k is not None or self.top_p is not None:
            tokens = np.argsort(-logits, kind="stable")[: self.top_k]
        wide = logits[tokens].astype(np.float64)
        with np.errstate(over="ignore"):  # a temperature next to 0 leaves the likeliest token
            chances = np.exp((wide - wide.max()) / self.temperature)
        chances /= chances.sum()
        if self.top_p is not None:
            before = np.cumsum(chances) - chances  # the probability of all that are likelier
            kept = max(1, int((before < self.top_p).sum()))
            tokens, chances = tokens[:kept], chances[:kept] / chances[:kept].sum()
        return tokens, chances

    def choose(self, logits: np.ndarray, generator: np.random.Generator) -> int:
        """The next token, from logits ``(vocabulary,)``.

        Raises:
            NotFiniteError: logits that are no finite numbers.
        """
        if not np.isfinite(logits).all():
            raise NotFiniteError("The network's logits are not finite: its weights, or its delta's, are broken.")
        if self.temperature == 0:
            return int(logits.argmax())
        tokens, chances = self.candidates(logits)
        at = int(np.searchsorted(np.cumsum(chances), generator.random(), side="right"))
        return int(tokens[min(at, len(tokens) - 1)])  # the sum may be a rounding error below 1


def _is_number(value: Any) -> bool:
    return (
        not isinstance(value, bool)
        and isinstance(value, (int, float, np.number))
        and bool(math.isfinite(value) and value >= 0)
    )


def _is_count(value: Any, least: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, np.integer)) and bool(value >= least)
