"""Continuing a prompt with a causal language model: tokens, and text that comes piece by piece."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mindspore as ms
import numpy as np

from mindpet import _checks, _compat
from mindpet.models.cache import KeyValueCache
from mindpet.models.sampling import Sampling
from mindpet.models.text_pieces import StopStrings, WholeCharacters

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mindpet.models.causal import CausalLanguageModel

ENDED = -1  # in the place of a token, where a row of a batch has met its stop token


def generate(
    network: "CausalLanguageModel",
    input_ids: Any,
    *,
    max_tokens: int,
    attention_mask: Any = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
) -> Iterator[Any]:
    """The tokens that continue a prompt, one by one.

    They come without dropout, whatever state the network is in. Each row of a batch has random numbers of its own.

    Args:
        network: a causal language model of :mod:`mindpet.models`, tuned or not.
        input_ids: the prompt's tokens: ints ``(n,)``, or ``(batch, n)`` for several prompts at once.
        max_tokens: how many tokens to generate at most.
        attention_mask: 1 for a token, 0 for padding, on either side, ``(batch, n)``; None for no padding.
        temperature: see :class:`~mindpet.models.sampling.Sampling`, as for `top_k`, `top_p` and `seed`. At 0 the
            likeliest token is taken.
        top_k: draw from so many of the likeliest tokens.
        top_p: draw from the likeliest tokens that have this share of the probability together.
        stop_tokens: each of these ends its row, after it was given out.
        seed: the same seed draws the same tokens.

    Returns:
        An iterator over ints, or for ``(batch, n)`` over int32 arrays ``(batch,)``, with ``ENDED`` where a row has
        ended before.

    Raises:
        ValueError: at once: wrong arguments, all in one message; more tokens than the network has positions.

    >>> from mindpet.models import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    >>> network = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes))
    >>> len(list(generate(network, [1, 2, 3], max_tokens=4)))
    4
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    ids = np.asarray(input_ids.asnumpy() if isinstance(input_ids, ms.Tensor) else input_ids)
    rows, words = np.atleast_2d(ids), network.config.vocab_size
    mask = np.ones(rows.shape, np.int32) if attention_mask is None else np.asarray(attention_mask)
    _require_tokens(rows, mask, words, max_tokens, stop_tokens)
    cache = network.new_cache(len(rows), int(mask.sum(1).max()) + max_tokens - 1)
    steps = _steps(network, cache, rows, mask, sampling, max_tokens, stop_tokens)
    return steps if ids.ndim == 2 else (int(step[0]) for step in steps)


def _require_tokens(rows: np.ndarray, mask: np.ndarray, words: int, max_tokens: Any, stop_tokens: Any) -> None:
    problems = []
    if rows.ndim != 2 or rows.size == 0 or rows.dtype.kind not in "iu":
        problems.append(f"'input_ids' must be ints (n,) or (batch, n), but got {rows.dtype} {rows.shape}")
    elif rows.min() < 0 or rows.max() >= words:
        problems.append(f"'input_ids' must be in [0, {words}), but go from {rows.min()} to {rows.max()}")
    if mask.shape != rows.shape or not np.isin(mask, (0, 1)).all() or not mask.any(1).all():
        problems.append("'attention_mask' must be 1 or 0, of the shape of 'input_ids', with a token in each row")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, (int, np.integer)) or max_tokens < 1:
        problems.append(f"'max_tokens' must be an int of 1 or more, but got {_checks.shown(max_tokens)}")
    try:
        wrong = [stop for stop in stop_tokens if not 0 <= stop < words]
    except TypeError:
        wrong = [stop_tokens]
    if wrong:
        problems.append(f"'stop_tokens' must be ints in [0, {words}), but got {_checks.shown(wrong[0])}")
    if problems:
        raise ValueError(f"For 'generate', {'; '.join(problems)}.")


def _steps(
    network: "CausalLanguageModel",
    cache: KeyValueCache,
    rows: np.ndarray,
    mask: np.ndarray,
    sampling: Sampling,
    max_tokens: int,
    stop_tokens: Sequence[int],
) -> Iterator[np.ndarray]:
    """The next token of every row, ``(batch,)``, as often as asked for."""
    generators = [np.random.default_rng([sampling.seed, row]) for row in range(len(rows))]
    goes_on = np.ones(len(rows), bool)
    for _ in range(max_tokens):
        logits = _without_dropout(network, rows, mask, cache)
        chosen = [
            sampling.choose(row, generator) if wanted else ENDED
            for row, generator, wanted in zip(logits, generators, goes_on)
        ]
        tokens = np.array(chosen, np.int32)
        yield tokens
        goes_on = goes_on & ~np.isin(tokens, stop_tokens)
        if not goes_on.any():
            return
        rows, mask = np.where(goes_on, tokens, 0)[:, None], goes_on[:, None].astype(np.int32)


def _without_dropout(network: "CausalLanguageModel", rows: Any, mask: Any, cache: KeyValueCache) -> np.ndarray:
    """Logits ``(batch, vocabulary)`` of a step; the network is left in the state that it was in."""
    with _compat.evaluating(network) if network.training else nullcontext():  # nothing to walk through at every token
        return network.step(rows, mask, cache).asnumpy()


@dataclass
class Generation:
    """What was generated, and how long it took.

    Attributes:
        prompt: its tokens.
        tokens: those of the continuation, the one that ended it included.
        text: the continuation, without a stop string.
        stopped: why it ended: ``"end"`` of the text or turn, ``"stop"`` string, ``"max_tokens"``, ``"positions"`` when
            the network has no more, ``"interrupted"``; empty while it goes on.
        compile_seconds: for compiling, in graph mode.
        prompt_seconds: from there to the first token.
        seconds: for all other tokens.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    stopped: str = ""
    compile_seconds: float = 0.0
    prompt_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """After the first token, which is the prompt's cost; 0 when there is only one."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds else 0.0

    def as_record(self) -> dict[str, Any]:
        """For JSON, with numbers of tokens."""
        times = {name: round(getattr(self, name), 3) for name in ("compile_seconds", "prompt_seconds", "seconds")}
        counts = {"prompt_tokens": len(self.prompt), "tokens": len(self.tokens)}
        rate = {"tokens_per_second": round(self.tokens_per_second, 2)}
        return {"text": self.text, "stopped": self.stopped, **counts, **times, **rate}


class TextStream:
    """An iterator over pieces of text; see :func:`stream_text`.

    Attributes:
        result: what there is so far; complete when the iterator has ended.
    """

    def __init__(
        self,
        result: Generation,
        tokens: Iterator[int],
        ends: Sequence[int],
        limit: str,
        characters: WholeCharacters,
        stops: StopStrings,
    ):
        self.result = result
        self._tokens, self._ends, self._limit = tokens, ends, limit
        self._characters, self._stops = characters, stops
        self._stopping = False
        self._pieces = filter(None, self._run())

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.result.text += piece
        return piece

    def stop(self) -> None:
        """End after the present token; what is held back is given out then."""
        self._stopping = True

    def _run(self) -> Iterator[str]:
        for token in self._timed():
            if token in self._ends:
                self.result.stopped = "end"
                break
            yield self._stops.add(self._characters.add(token))
            if self._stops.found is not None:
                break
            if self._stopping:
                self.result.stopped = "interrupted"
                break
        self._tokens = iter(())  # lets go of the cache: what is compiled for its buffers serves the next text
        yield self._stops.add(self._characters.rest())
        yield self._stops.rest()
        if self._stops.found is not None:
            self.result.stopped = "stop"
        self.result.stopped = self.result.stopped or self._limit

    def _timed(self) -> Iterator[int]:
        """The tokens, noted in the result with the time that each took."""
        result, begun = self.result, time.perf_counter()
        for token in self._tokens:
            seconds = time.perf_counter() - begun
            if result.tokens:
                result.seconds += seconds
            else:
                result.prompt_seconds = seconds
            result.tokens.append(token)
            yield token
            begun = time.perf_counter()


def stream_text(
    network: "CausalLanguageModel",
    tokenizer: "Tokenizer",
    prompt: Sequence[int],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> TextStream:
    """The text that continues a prompt, in pieces, each as soon as it is certain.

    A piece holds whole characters, and nothing of a stop string. In graph mode the network is compiled at once, which
    is told apart from the time for the prompt.

    Args:
        network: a causal language model of :mod:`mindpet.models`, tuned or not.
        tokenizer: its tokenizer.
        prompt: the prompt's tokens.
        max_tokens: how many tokens to generate at most; fewer where the network's positions end.
        stop: strings that end the text, and are not shown.
        stop_tokens: tokens that do; see :func:`~mindpet.models.text_pieces.end_tokens`.
        temperature: as for :func:`generate`, like the others.
        top_k: as there.
        top_p: as there.
        seed: as there.

    Raises:
        ValueError: at once: wrong arguments, all in one message; a prompt longer than the network's positions.
    """
    if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
        raise ValueError(f"For 'generate', 'stop' must be strings that are not empty, but got {_checks.shown(stop)}.")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    rows = np.atleast_2d(np.asarray(prompt))
    mask = np.ones(rows.shape, np.int32)
    _require_tokens(rows, mask, network.config.vocab_size, max_tokens, stop_tokens)
    cache = network.new_cache(1, len(prompt))
    room = network.positions - int(cache.lengths[0]) - len(prompt) + 1  # the last token is not taken in any more
    limit = "max_tokens" if max_tokens <= room else "positions"
    count = min(max_tokens, room)
    cache.reserve(int(cache.lengths[0]) + len(prompt) + count - 1)
    result = Generation([int(token) for token in prompt])
    result.compile_seconds = _compile(network, cache, len(prompt), count)
    tokens = (int(step[0]) for step in _steps(network, cache, rows, mask, sampling, count, stop_tokens))
    return TextStream(result, tokens, stop_tokens, limit, WholeCharacters(tokenizer.decode), StopStrings(stop))


def _compile(network: "CausalLanguageModel", cache: KeyValueCache, prompt: int, count: int) -> float:
    """In graph mode, take in what is forgotten at once: seconds for compiling a piece of a prompt, and a token."""
    if not _compat.in_graph_mode():
        return 0.0
    begun, lengths = time.perf_counter(), cache.lengths
    for size in {min(prompt, 2), 1 if count > 1 else min(prompt, 2)}:
        _without_dropout(network, np.zeros((1, size), np.int32), None, cache)
        cache.lengths = lengths
    return time.perf_counter() - begun
