"""What each method would train in one network, and the memory that takes: arithmetic, no weights are read."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mindpet import _files
from mindpet.train.config import METHOD_NAMES, RunFileError
from mindpet.train.counters import method_key
from mindpet.train.presets import PRESETS, preset
from mindpet.train.summary import Summary, summarise


def sizes_of(source: str | None, name: str | None) -> tuple[str, dict[str, Any]]:
    """(title, content of its ``config.json``) of a model's directory or file, or of a network known by `name`.

    Raises:
        RunFileError: neither or both are given; there is no such model, or no such name; its config.json holds
            something else than an object.
        PretrainedFilesError: the model's files cannot be read.

    >>> sizes_of(None, "llama-7b")[1]["hidden_size"]
    4096
    """
    if (source is None) == (name is None):
        known = ", ".join(PRESETS)
        raise RunFileError(f"Give a run file, a model, or --preset with one of {known}.")
    if name is not None:
        try:
            return name, preset(name)
        except ValueError as error:
            raise RunFileError(str(error)) from None
    path = Path(str(source))
    if (path / "config.json").is_file():
        content = _files.read_json(path / "config.json", RunFileError)
        if not isinstance(content, dict):
            raise RunFileError(f"{path / 'config.json'} must be an object with the network's sizes, not {content!r}.")
        return path.name, content
    if not path.exists():
        hint = f" Do you mean --preset {source}?" if source in PRESETS else ""
        raise RunFileError(f"There is no run file or model {source}.{hint}")
    from mindpet.models.pretrained import open_pretrained

    return path.name, dict(open_pretrained(path).config)


def summary_table(
    network: str | Mapping[str, Any],
    methods: Iterable[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    optimizer: str = "adam",
    dtype: str | None = None,
    labels: int = 2,
) -> list[dict[str, str]]:
    """A row for each method; one that finds nothing in the network to adapt has a row that says so.

    Args:
        network: as :func:`mindpet.train.summary.summarise` takes it.
        methods: names; all of them and full fine-tuning when empty.
        options: for each method its own.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        dtype: of the weights; the network's usual one when None.
        labels: classes of a classifier's head.

    Raises:
        ValueError: an unknown method, optimizer or dtype, a network whose sizes cannot be counted.
    """
    options = {method_key(name): own for name, own in (options or {}).items()}
    given: dict[str, Any] = {"optimizer": optimizer, "dtype": dtype, "labels": labels}
    summarise(network, "full", **given)  # what is wrong for all of them is an error, not a row
    rows = []
    for method in list(methods) or METHOD_NAMES:
        try:
            rows.append(_row(summarise(network, method, options.get(method_key(method)), **given)))
        except ValueError as error:
            if method_key(method) not in METHOD_NAMES or method_key(method) in options:
                raise
            rows.append({"method": method, **dict.fromkeys(_COLUMNS, ""), "trains": f"does not apply: {error}"})
    return rows


_COLUMNS = ("trains", "share", "weights", "optimizer", "static", "of full")


def _row(found: Summary) -> dict[str, str]:
    weights, state, static = (
        _mebibytes(size) for size in (found.weight_bytes, found.optimizer_bytes, found.static_bytes)
    )
    values = (
        f"{found.trained:,}",
        per_cent(found.share),
        weights,
        state,
        static,
        f"{100 * found.static_bytes / found.full_static_bytes:.1f}%",
    )
    return {"method": found.method, **dict(zip(_COLUMNS, values))}


def per_cent(share: float) -> str:
    """A share for a table.

    >>> per_cent(0.003018), per_cent(0.00012345), per_cent(1.0)
    ('0.30%', '0.0123%', '100%')
    """
    if share == 1:
        return "100%"
    return f"{100 * share:.2f}%" if share >= 1e-3 else f"{100 * share:.3g}%"


def _mebibytes(size: int) -> str:
    value = size / (1 << 20)
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
