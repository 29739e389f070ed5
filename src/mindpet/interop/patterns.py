r"""Regular expressions that come in files: Python's engine takes exponential time for some.

>>> is_slow(r".*\.(query|value)$"), is_slow(r"(\w+\.)*query")
(False, True)
"""

import math
import sys
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as constants
    from re import _parser as parser
else:
    import sre_constants as constants
    import sre_parse as parser

MOST = 8.1  # of the ways in which a path is tried at most, the decimal logarithm: four `.*` and a few choices
_LETTERS = 60  # of a long path
_ATOMIC = {getattr(constants, name, None) for name in ("ATOMIC_GROUP", "POSSESSIVE_REPEAT")}  # from Python 3.11 on


def is_slow(pattern: str) -> bool:
    """Whether a regular expression, which it must be, could try a path in far too many ways."""
    return _ways(parser.parse(pattern)) > MOST


def _ways(part: Any) -> float:
    """The logarithm of the number of ways in which a parsed expression can be tried, at most.

    What stands one after the other multiplies, alternatives add up, and a repeat has a way for each length it can have,
    each time in all the ways of what it repeats.
    """
    total = 0.0
    for operator, argument in part.data:
        if operator in (constants.MAX_REPEAT, constants.MIN_REPEAT):
            least, most, repeated = int(argument[0]), min(int(argument[1]), _LETTERS), argument[2]
            total += max(most, 1) * _ways(repeated) + math.log10(max(most - least, 0) + 1)
        elif operator is constants.BRANCH:
            each = [_ways(one) for one in argument[1]]
            total += max(each) + math.log10(sum(10.0 ** (ways - max(each)) for ways in each))
        elif operator is constants.SUBPATTERN:
            total += _ways(argument[-1])
        elif operator in (constants.ASSERT, constants.ASSERT_NOT):
            total += _once(_ways(argument[1]))
        elif operator in _ATOMIC:
            total += _once(_ways(argument if isinstance(argument, parser.SubPattern) else argument[-1]))
        elif operator is constants.GROUPREF_EXISTS:
            total += max(_ways(one) for one in argument[1:] if one is not None)
    return total


def _once(ways: float) -> float:
    """Of what is not tried in another way when it has matched: nothing, unless it is slow by itself."""
    return ways if ways > MOST else 0.0
