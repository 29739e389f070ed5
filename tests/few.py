"""Which cases of a test `make test` runs, and which are for `make exhaustive` alone."""

import pytest


def mostly_exhaustive(values, *few):
    """Each value as a case, exhaustive unless it is one of these few."""
    assert all(each in values for each in few), few
    return [pytest.param(each, marks=() if each in few else pytest.mark.exhaustive) for each in values]
