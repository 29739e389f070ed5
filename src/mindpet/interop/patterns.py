r"""Regular expressions that come in files: Python's engine takes exponential time for some, so those are refused.

>>> slow_to_match(r".*\.(query|value)$"), slow_to_match(r"(\w+\.)*query")
('', 'a repeat within a repeat')
"""

import sys
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as constants
    from re import _parser as parser
else:
    import sre_constants as constants
    import sre_parse as parser

MOST = 5  # repeats one after the other: of n letters, they are tried in up to n**5 ways
_FEW = 20  # times that something may be repeated without counting as a repeat


def slow_to_match(pattern: str) -> str:
    """Why a regular expression could take very long, or nothing. It must be one."""
    counted = _Counted()
    counted.walk(parser.parse(pattern), False)
    if counted.repeats > MOST:
        counted.reason = counted.reason or f"{counted.repeats} repeats, more than {MOST}"
    return counted.reason


class _Counted:
    """The repeats of a parsed expression, and the first thing in it that takes exponential time."""

    def __init__(self) -> None:
        self.repeats, self.reason = 0, ""

    def walk(self, node: Any, repeated: bool) -> None:
        """Through everything in it; `repeated` says whether it is itself repeated."""
        if isinstance(node, parser.SubPattern):
            parts: Any = node.data
            for operator, argument in parts:
                if operator in (constants.MAX_REPEAT, constants.MIN_REPEAT) and argument[1] > _FEW:
                    self.repeats += 1
                    if repeated:
                        self.reason = self.reason or "a repeat within a repeat"
                    self.walk(argument[2], True)
                    continue
                if repeated and operator in (constants.BRANCH, constants.GROUPREF):
                    self.reason = self.reason or "a choice within a repeat"
                self.walk(argument, repeated)
        elif isinstance(node, (list, tuple)):
            for each in node:
                self.walk(each, repeated)
