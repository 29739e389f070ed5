"""Sizes, weights and tokenizer of a pre-trained model, whatever kind of files it comes in."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindpet import _checks, _files, _near
from mindpet.models import gguf
from mindpet.models.families import FAMILIES, Family
from mindpet.models.loading import PretrainedFilesError, read_tensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class ChatTemplate:
    r"""How a model was taught to tell the turns of a conversation apart.

    >>> CHATML.start("user") + "Hello" + CHATML.end("user")
    '<|im_start|>user\nHello<|im_end|>\n'
    """

    begin: str  # before the first turn
    before: str  # a turn, with {role}
    after: str

    def start(self, role: str) -> str:
        """What stands before a turn's content."""
        return self.before.format(role=role)

    def end(self, role: str) -> str:
        """What stands after it."""
        return self.after.format(role=role)


CHATML = ChatTemplate("", "<|im_start|>{role}\n", "<|im_end|>\n")


@dataclass(frozen=True)
class _Kind:
    """How one kind of files is read: each part by a function of the path."""

    config: Callable[[Path], dict[str, Any]]
    tensors: Callable[[Path], dict[str, np.ndarray]]
    tokenizer: Callable[[Path], "Tokenizer"]
    template: Callable[[Path], str | None]


@dataclass(frozen=True)
class Pretrained:
    """A pre-trained model on disk. Weights and tokenizer are read when they are asked for.

    Attributes:
        path: the directory or the file.
        config: the content of Hugging Face's ``config.json``, or what it would be.
    """

    path: Path
    config: dict[str, Any]
    _kind: _Kind

    @property
    def family(self) -> Family:
        """The kind of network.

        Raises:
            PretrainedFilesError: one that is not here.
        """
        name = self.config.get("model_type", "bert")
        if not isinstance(name, str) or name not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise PretrainedFilesError(
                f"{self.path} is of a {name!r}, but only {known} are here{_checks.near(name, FAMILIES)}."
            )
        return FAMILIES[name]

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights, under Hugging Face's names and in its orientation.

        Raises:
            PretrainedFilesError: missing or broken.
        """
        return self._kind.tensors(self.path)

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer.

        Raises:
            PretrainedFilesError: missing or broken.
        """
        return self._kind.tokenizer(self.path)

    def chat_template_source(self) -> str | None:
        """The chat template as the files have it, in Jinja."""
        return self._kind.template(self.path)

    def chat_template(self) -> ChatTemplate | None:
        """How turns are marked, if the model was taught conversations in a form known here: ChatML."""
        text = self.chat_template_source() or ""
        return CHATML if "<|im_start|>" in text and "<|im_end|>" in text else None


def open_pretrained(path: str | Path) -> Pretrained:
    """A directory in Hugging Face's layout, a ``.gguf`` file, or multilingual-e5-small in a file of the kind E5S1.

    Raises:
        PretrainedFilesError: nothing there, or nothing of these kinds.
    """
    path = Path(path)
    if os.path.isdir(path):
        kind = _Kind(_directory_config, read_tensors, _directory_tokenizer, _directory_template)
    else:
        kind = _kind_of_file(path)
    return Pretrained(path, kind.config(path), kind)


def family_of(path: str | Path) -> Family:
    """The kind of network that is at `path`.

    Raises:
        PretrainedFilesError: nothing there, or one that is not here.
    """
    return open_pretrained(path).family


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer of a pre-trained model.

    Raises:
        PretrainedFilesError: missing or broken.
    """
    return open_pretrained(path).tokenizer()


def chat_template(path: str | Path) -> ChatTemplate | None:
    """How a pre-trained model marks the turns of a conversation, if it does.

    Raises:
        PretrainedFilesError: nothing there.
    """
    return open_pretrained(path).chat_template()


def _kind_of_file(path: Path) -> _Kind:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except (OSError, ValueError) as error:
        hint = _near.beside(path)
        raise PretrainedFilesError(f"There is no file or directory {path} that can be read{hint}.") from error
    if magic == gguf.MAGIC:
        return _Kind(gguf.gguf_config, gguf.gguf_tensors, gguf.gguf_tokenizer, gguf.gguf_chat_template)
    if magic == b"E5S1":
        from mindpet.models.e5 import e5_config, e5_tensors, e5_tokenizer

        return _Kind(e5_config, e5_tensors, e5_tokenizer, lambda _: None)
    hint = "give its directory" if path.suffix in (".safetensors", ".json") else "it begins with neither GGUF nor E5S1"
    raise PretrainedFilesError(f"{path} is not a model that can be read: {hint}.")


def _directory_config(directory: Path) -> dict[str, Any]:
    content = _files.read_json(directory / "config.json", PretrainedFilesError)
    if not isinstance(content, dict):
        raise PretrainedFilesError(
            f"{directory / 'config.json'} must hold an object, but has {type(content).__name__}."
        )
    return content


def _directory_tokenizer(directory: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise PretrainedFilesError(f"There is no {path}: a fast tokenizer is needed.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for what it cannot parse
        raise PretrainedFilesError(f"{path} is not a tokenizer: {error}") from error


def _directory_template(directory: Path) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    path = directory / "tokenizer_config.json"
    content = _files.read_json(path, PretrainedFilesError) if path.is_file() else {}
    text = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(text, list):  # several, by name
        text = next(
            (one.get("template") for one in text if isinstance(one, dict) and one.get("name") == "default"), None
        )
    return text if isinstance(text, str) else None
