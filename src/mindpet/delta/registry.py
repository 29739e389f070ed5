"""The methods, by name: a METHOD record from each of the modules that `mindpet._methods` lists."""

from importlib import import_module

from mindpet import _checks
from mindpet._methods import MODULES
from mindpet.delta.method import DeltaConfig, Method

METHODS: dict[str, Method] = {name: import_module(f"mindpet.delta.{module}").METHOD for name, module in MODULES.items()}


def method_named(name: str) -> Method:
    """The method of that name or alias, in any case.

    Raises:
        TypeError: not a str.
        ValueError: unknown; the message names the known ones.
    """
    _checks.string("method_named", "name", name)
    for method in METHODS.values():
        if name.lower() in (method.name, *method.aliases):
            return method
    raise ValueError(
        f"There is no method {name!r}{_checks.near(name, METHODS)}; the known ones are {', '.join(METHODS)}."
    )


def method_of(config: DeltaConfig) -> Method:
    """The method that a configuration belongs to."""
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    known = ", ".join(method.config.__name__ for method in METHODS.values())
    raise TypeError(f"{_checks.shown(config)} is not the configuration of a method: use one of {known}.")
