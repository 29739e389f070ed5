"""YAML from files that anyone may have made: plain values alone, no text that UTF-8 has not, nothing that grows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mindpet._files import is_unicode

_DEEP = 100
_FEW = 10_000  # values that a file may have come to through its aliases, however small it is
# what PyYAML raises besides its own errors, for instance for 2001-13-01, !!bool x and !!int of nothing
_STRAY = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class Loader(yaml.SafeLoader):
    """Safe YAML, not nested deeply, whose aliases neither contain themselves nor make a small file a large one."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth >= _DEEP:  # PyYAML takes the longer for a bracket the more are open
            raise yaml.composer.ComposerError(None, None, f"it is nested more than {_DEEP} deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        sizes: dict[int, int] = {}
        if node is not None and _size(node, sizes) > max(_FEW, 10 * len(sizes)):
            raise yaml.composer.ComposerError(None, None, f"its aliases stand for {sizes[id(node)]} values")
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and not is_unicode(value):
            raise yaml.constructor.ConstructorError(None, None, "half a surrogate pair is no text", node.start_mark)
        return value


def _size(node: Any, sizes: dict[int, int]) -> int:
    """How many values there are with every alias written out."""
    if id(node) not in sizes:
        sizes[id(node)] = 0  # while it is counted
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        sizes[id(node)] = 1 + sum(
            _size(one, sizes) for part in parts for one in (part if isinstance(part, tuple) else (part,))
        )
    if not sizes[id(node)]:
        raise yaml.composer.ComposerError(None, None, "an alias stands for what it is in", node.start_mark)
    return sizes[id(node)]


def parse(text: str, loader: type[Loader] = Loader) -> Any:
    """The value of a text.

    Raises:
        yaml.YAMLError: it is not YAML, or more than plain values.

    >>> parse("{rank: 8, targets: [query]}")
    {'rank': 8, 'targets': ['query']}
    """
    try:
        return yaml.load(text, loader)
    except _STRAY as error:
        raise yaml.YAMLError(f"a value cannot be read ({type(error).__name__}: {error})") from error


def read(path: Path | str, wrong: Callable[[str], Exception], loader: type[Loader] = Loader) -> Any:
    """The value in a file, or the error that `wrong` makes of what is the matter with it."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"), loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise wrong(f"{path} cannot be read as YAML: {error}") from error
