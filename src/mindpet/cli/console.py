"""The console that everything is printed on. Nothing here imports MindSpore."""

import os

from rich.console import Console

_WIDTH_OF_FILES = 200


def console_of(quiet: bool = False) -> Console:
    """As wide as the terminal; a file or a pipe has no edge, unless COLUMNS says so."""
    console = Console(quiet=quiet, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    return console
