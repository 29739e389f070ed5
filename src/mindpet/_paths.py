"""What a pattern or a number means on the paths of cells and parameters. Nothing here imports MindSpore."""

from collections.abc import Sequence


def in_layers(path: str, layers: Sequence[int] | None) -> bool:
    """Whether the first number in a path is among `layers`; None is all of them.

    >>> in_layers("encoder.layer.3.output.0", [3]), in_layers("classifier", [0]), in_layers("classifier", None)
    (True, False, True)
    """
    return layers is None or layer_of(path) in layers


def layer_of(path: str) -> int | None:
    """The first number in a path, None where there is none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def forms_below(pattern: str) -> tuple[str, ...]:
    """The patterns of a parameter itself, and of what lies below a cell named by its path or by the end of it.

    >>> forms_below("classifier")
    ('classifier', 'classifier.*', '*.classifier.*')
    """
    return pattern, f"{pattern}.*", f"*.{pattern}.*"
