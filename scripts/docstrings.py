"""What the docstrings have of reStructuredText, in Markdown, for mkdocstrings: roles, formulas and examples.

mkdocs.yml names this file as an extension of griffe, which reads the docstrings.
"""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
_MATH = re.compile(r":math:`([^`]+)`", re.DOTALL)
_FORMULA = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*|(?=\n\1 +\S)))*)", re.MULTILINE)
_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n *\S.*)*", re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring with formulas and examples in fenced blocks, and names in code.

    >>> as_markdown("As :func:`~mindpet.graph.merge`, with :math:`W + B A`.")
    'As `mindpet.graph.merge`, with `W + B A`.'
    """
    text = _ROLE.sub(r"`\1`", text)
    text = _MATH.sub(lambda found: f"`{' '.join(found[1].split())}`", text)
    text = _FORMULA.sub(lambda found: _fenced("tex", found[1], found[2].strip().splitlines()), text)
    return _EXAMPLE.sub(lambda found: _fenced("pycon", found[1], found[0].strip().splitlines()), text)


def _fenced(language: str, margin: str, lines: list[str]) -> str:
    body = [line.removeprefix(margin).strip() if language == "tex" else line.removeprefix(margin) for line in lines]
    return "\n".join(margin + line if line else "" for line in ["", f"```{language}", *filter(None, body), "```"])


class MarkdownDocstrings(griffe.Extension):
    """Every docstring goes through :func:`as_markdown` before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
