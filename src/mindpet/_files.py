"""Files that appear whole or not at all: written beside their place, flushed, then renamed into it."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` when the block ends well and goes away when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class NotWrittenError(OSError):
    """A file that could not be written, for want of room for instance."""


def delta_of_a_run(directory: Path | str) -> Path | None:
    """The directory of the delta in that of a run, or None where there is none."""
    inner = Path(directory) / "delta"
    return inner if os.path.isfile(inner / "delta.safetensors") else None


def remove_leftovers(directory: Path, *names: str) -> None:
    """What :func:`whole_file` has begun of these files, in processes that were killed; nobody may be writing now."""
    for name in names:
        for left in directory.glob(f".{name}.????????.tmp"):
            if left.is_file():
                left.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """The whole text, in UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Indented JSON with a newline at its end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path | str, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """A safetensors file.

    Raises:
        NotWrittenError: it cannot be.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with whole_file(path) as temporary:
        try:
            save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise NotWrittenError(f"{path} cannot be written: {error}") from error


def read_tensors(
    path: Path | str, wrong: Callable[[str], Exception] = ValueError
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, or the error that `wrong` makes of what is the matter."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        raise wrong(f"There is no file {path}.")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    # AttributeError: NumPy has no such kind of numbers, of eight or four bits for instance
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise wrong(f"{path} cannot be read as safetensors: {error}") from error


def read_json(path: Path | str, wrong: Callable[[str], Exception] = ValueError) -> Any:
    """The content of a JSON file, or the error that `wrong` makes of what is the matter with it."""
    path = Path(path)
    if not os.path.isfile(path):
        raise wrong(f"There is no file {path}.")
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise wrong(f"{path} cannot be read as JSON: {error}") from error


def parse_json(text: str) -> Any:
    """The value of a text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has text that UTF-8 has not, such as half a surrogate pair.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def is_unicode(text: str) -> bool:
    """Whether it can be written in UTF-8: there is no half of a pair of surrogates in it."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
