"""Near names for a misspelt one. Nothing here imports MindSpore."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
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


def beside(path: Path) -> str:
    """Of a path where nothing is: ``; near it: `` and like names in its folder, else ``; beside it: `` and a few."""
    if os.path.exists(path) or not os.path.isdir(path.parent):
        return ""
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    shown = close or names[:8]
    return f"; {'near' if close else 'beside'} it: {', '.join(shown)}" if shown else ""
