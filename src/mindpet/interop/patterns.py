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
_FEW = 20  # times that something may be repeated, all repeats around it included, without being tried in many ways
_ATOMIC = {getattr(constants, name, None) for name in ("ATOMIC_GROUP", "POSSESSIVE_REPEAT")}  # from Python 3.11 on


def slow_to_match(pattern: str) -> str:
    """Why a regular expression could take very long, or nothing. It must be one."""
    repeats, reason = _cost(parser.parse(pattern), 1)
    return reason or (f"{repeats} repeats, more than {MOST}" if repeats > MOST else "")


def _cost(part: Any, times: int) -> tuple[int, str]:
    """How many repeats stand one after the other, and the first thing in it that takes exponential time.

    Args:
        part: a parsed expression.
        times: how often it may be repeated as a whole.
    """
    total, reason = 0, ""
    for operator, argument in part.data:
        inner: list[tuple[int, str]] = []
        if operator in (constants.MAX_REPEAT, constants.MIN_REPEAT):
            _, most, repeated = argument
            repeats, why = _cost(repeated, times * int(most))
            if times > 1 and most > 1 and times * most > _FEW:
                why = why or "a repeat within a repeat"
            inner = [(repeats + (most > _FEW), why)]
        elif operator is constants.BRANCH:
            inner = [_cost(one, times) for one in argument[1]]
            if times > 1:
                inner.append((0, "a choice within a repeat"))
        elif operator is constants.SUBPATTERN:
            inner = [_cost(argument[-1], times)]
        elif operator in (constants.ASSERT, constants.ASSERT_NOT):
            inner = [_cost(argument[1], 1)]  # what it has found is not tried in another way
        elif operator in _ATOMIC:
            inner = [_cost(argument if isinstance(argument, parser.SubPattern) else argument[-1], 1)]
        elif operator is constants.GROUPREF_EXISTS:
            inner = [_cost(one, times) for one in argument[1:] if one is not None]
        total += max((repeats for repeats, _ in inner), default=0)
        reason = reason or next((why for _, why in inner if why), "")
    return total, reason
