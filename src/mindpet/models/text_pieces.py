"""From tokens to text as they come: nothing is given out before it is certain, and nothing is taken back."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mindpet.models.ends import OF_TEXT, OF_TURN, end_of_text, named_ends

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are no character, or none yet


class WholeCharacters:
    """Decodes tokens one by one; a token may hold a part of a character, which waits for the rest.

    Tokens are decoded together with those before them, since what a token means may depend on them: bytes of the same
    character, a space that is dropped at the beginning of a text. Only the tokens since the last time that everything
    was certain, and the group before these, are decoded again.

    >>> words = {0: b"caf", 1: bytes([0xC3]), 2: bytes([0xA9]) + b"!"}
    >>> characters = WholeCharacters(lambda ids: b"".join(words[token] for token in ids).decode(errors="replace"))
    >>> [characters.add(token) for token in (0, 1, 2)]
    ['caf', '', 'é!']
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._tokens: list[int] = []
        self._group = 0  # where the last group begins whose text is not given out whole
        self._given = 0  # characters of the tokens' text that are given out

    def add(self, token: int) -> str:
        """What has become certain with this token."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        certain = text.rstrip(HALF)
        piece, self._given = certain[self._given :], max(self._given, len(certain))
        if piece and certain == text:
            self._tokens = self._tokens[self._group :]
            self._group, self._given = len(self._tokens), len(self._decode(self._tokens))
        return piece

    def rest(self) -> str:
        """What was held back: bytes that did not become a character."""
        piece = self._decode(self._tokens)[self._given :]
        self._given += len(piece)
        return piece


class StopStrings:
    r"""Ends a text before the first of some strings, which may be spread over several pieces.

    What may be the beginning of one is held back until it is clear.

    >>> stops = StopStrings(["\n\n"])
    >>> [stops.add(piece) for piece in ("one\n", "two\n", "\nthree")]
    ['one', '\ntwo', '']
    >>> stops.found
    '\n\n'
    """

    def __init__(self, strings: Iterable[str]):
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """What can be shown with this piece; nothing comes after a stop string."""
        if self.found is not None:
            return ""
        text = self._held + piece
        places = [(text.find(string), string) for string in self._strings if string in text]
        if places:
            at, self.found = min(places)
            self._held = ""
            return text[:at]
        held = max((_beginning(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        piece, self._held = self._held, ""
        return piece


def _beginning(text: str, string: str) -> int:
    """How long the longest end of `text` is that `string` begins with, `string` itself aside."""
    return next((size for size in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:size])), 0)


def end_tokens(tokenizer: "Tokenizer", config: dict[str, Any]) -> list[int]:
    """The tokens that end a text or a turn.

    They are those named in a ``config.json``, special ones with usual names, and the one that tuning teaches.
    """
    learned = end_of_text(tokenizer, config)
    found = [*named_ends(config), *([] if learned is None else [learned])]
    added = tokenizer.get_added_tokens_decoder()
    found += [number for number, token in added.items() if token.special and token.content in OF_TEXT + OF_TURN]
    return sorted(number for number in set(found) if 0 <= number < config.get("vocab_size", number + 1))
