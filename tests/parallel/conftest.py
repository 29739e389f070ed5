"""Tests that compile for several devices skip, and say so, where this MindSpore does not let them."""

import pytest

from tests.parallel import device_name


@pytest.fixture(scope="session")
def compiler():
    """What a test asks for that uses the parallel compiler."""
    name = device_name.read()
    if name != "CPU":
        pytest.skip(f"the parallel compiler of this MindSpore cannot be reached: read {name!r} for the device name")
