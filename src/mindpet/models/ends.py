"""The tokens that end a text or a turn: what a network learns to say at the end, and what stops it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")
OF_TURN = ("<|im_end|>", "<|eot_id|>")


def named_ends(config: Mapping[str, Any]) -> list[int]:
    """Those that a ``config.json`` names, in its order; what is no token of the model is passed over.

    >>> named_ends({"eos_token_id": [2, 0, 11, None], "vocab_size": 11})
    [2, 0]
    """
    named = config.get("eos_token_id")
    numbers = named if isinstance(named, list) else [named]
    found = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
    return [number for number in found if 0 <= number < config.get("vocab_size", number + 1)]


def end_of_text(tokenizer: "Tokenizer", config: Mapping[str, Any]) -> int | None:
    """The one to learn at the end of a text.

    A model for conversations names the end of a turn, so the first of the usual names goes before, the others after.
    """
    known = [tokenizer.token_to_id(name) for name in OF_TEXT]
    ends = [number for number in (known[0], *named_ends(config), *known[1:]) if number is not None]
    return ends[0] if ends else None
