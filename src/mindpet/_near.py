"""Near names for a misspelt one. Nothing here imports MindSpore."""

import difflib
from collections.abc import Iterable
from typing import Any


def near_names(name: Any, known: Iterable[str]) -> list[str]:
    """Up to three known names that a misspelt one may have meant.

    >>> near_names("Adaptr", ["lora", "adapter", "low_rank_adapter"])
    ['adapter']
    """
    return difflib.get_close_matches(str(name).lower(), sorted(known), n=3, cutoff=0.6)


def near(name: Any, known: Iterable[str]) -> str:
    """A space and ``(did you mean 'gelu'?)`` when a known name is close, else nothing."""
    close = near_names(name, known)
    return f" (did you mean {' or '.join(repr(entry) for entry in close)}?)" if close else ""
