"""The methods, by name. A new one is a file beside this and a line here."""

from mindpet import _checks
from mindpet.delta import adapter, bitfit, lora, low_rank_adapter, prefix_layer, ptuning2
from mindpet.delta.method import DeltaConfig, Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (lora, adapter, low_rank_adapter, prefix_layer, ptuning2, bitfit)
}


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
        f"There is no method {name!r}: the known ones are {', '.join(METHODS)}{_checks.near(name, METHODS)}."
    )


def method_of(config: DeltaConfig) -> Method:
    """The method that a configuration belongs to."""
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    known = ", ".join(method.config.__name__ for method in METHODS.values())
    raise TypeError(f"{_checks.shown(config)} is not the configuration of a method: use one of {known}.")
