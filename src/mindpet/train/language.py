"""Text for a language model: reading documents, prompts and conversations, and laying their tokens into rows.

A text is a str, or a conversation: a tuple of (role, content). A document in a ``.txt`` file is cut into blocks, so
nothing of it is lost; a row that is too long loses its end. Every token but the first of a text is predicted once.
"""

import bisect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindpet.delta.r_drop import IGNORED
from mindpet.models.ends import end_of_text
from mindpet.train.config import DataSection
from mindpet.train.data import DataError, Encoded, Rows, problem_with, read_records, split_rows, unreadable


def is_plain(path: str | Path) -> bool:
    """Whether the texts of that path are documents: a ``.txt`` file or a folder of them."""
    return os.path.isdir(path) or Path(path).suffix.lower() == ".txt"


def read_texts(path: str | Path, data: DataSection) -> Rows:
    """The texts of a file or folder; what cannot be read is left out and named.

    Raises:
        DataError: nothing there, an unknown kind of file, no text that can be used.
    """
    path = Path(path)
    rows = Rows([], [])
    found = _documents(path) if is_plain(path) and os.path.exists(path) else _records(path, data)
    for where, text, problem in found:
        if problem:
            rows.broken.append(f"{where}: {problem}")
        else:
            rows.texts.append(text)
            rows.labels.append("")
    if not len(rows):
        raise DataError(f"{path} has no usable text. {rows.broken_in_words()}")
    return rows


def _documents(path: Path) -> Iterator[tuple[str, str, str]]:
    """(where, text, problem) of each file."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no .txt files: a folder for a language model holds its documents.")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            yield file.name, "", str(error)
            continue
        yield file.name, text, unreadable(text) if text.strip() else "empty"


def _records(path: Path, data: DataSection) -> Iterator[tuple[str, Any, str]]:
    keys: tuple[str, ...] = ()
    for number, record in read_records(path, "or a .txt file, or a folder of them"):
        where = f"{path.name}, line {number}"
        if isinstance(record, dict) and not keys:
            keys = text_keys(data, record)
        if isinstance(record, ValueError):
            yield where, None, str(record)
        elif len(keys) == 1 and keys[0] == (data.messages or "messages") and keys[0] != data.text:
            yield where, *_conversation(record, keys[0])
        elif problem := problem_with(record, keys or (data.text,)):
            yield where, None, problem
        elif len(keys) == 2:
            yield where, (("user", str(record[keys[0]])), ("assistant", str(record[keys[1]]))), ""
        else:
            yield where, str(record[keys[0]]), ""


def text_keys(data: DataSection, record: dict[str, Any]) -> tuple[str, ...]:
    """Where the rows of a file hold their text: one key of a text or a conversation, or those of prompt and response.

    The run file says so, or the first row does.

    >>> text_keys(DataSection(train="t"), {"prompt": "?", "response": "!"})
    ('prompt', 'response')
    """
    if data.messages is not None:
        return (data.messages,)
    if data.prompt is not None or data.response is not None:
        return data.prompt or "prompt", data.response or "response"
    for usual in (("messages",), ("prompt", "response")):
        if data.text not in record and all(key in record for key in usual):
            return usual
    return (data.text,)


def _conversation(record: Any, key: str) -> tuple[Any, str]:
    """The turns of a conversation, or what is wrong with it."""
    turns = record.get(key) if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        return None, f"'{key}' is not a list of messages"
    for number, turn in enumerate(turns, 1):
        fine = isinstance(turn, dict) and all(isinstance(turn.get(part), str) for part in ("role", "content"))
        if not fine:
            return None, f"message {number} of '{key}' is not an object with the texts 'role' and 'content'"
        wrong = unreadable(turn["role"] + turn["content"])
        if wrong:
            return None, f"message {number} of '{key}' {wrong}"
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        return None, f"'{key}' has no message of the assistant to learn"
    return tuple((turn["role"], turn["content"]) for turn in turns), ""


def split_texts(rows: Rows, holdout: float, seed: int) -> tuple[Rows, Rows]:
    """(train, held out): whole texts, equal ones on the same side. Of a single document its end is held out.

    A share of a single document is one of its characters, a number one of its lines; it is cut between two lines, or
    between two words where it has no lines.

    Raises:
        DataError: more held out than there is.
    """
    if len(rows) > 1 or not isinstance(rows.texts[0], str):
        return split_rows(rows, holdout, seed)
    text = rows.texts[0]
    if holdout >= 1:
        lines = text.splitlines(keepends=True)
        cut = sum(map(len, lines[: -int(holdout)]))
    else:
        wanted = round((1 - holdout) * len(text))
        cut = next((at for mark in "\n " if (at := text.rfind(mark, 0, wanted) + 1)), wanted)
    parts = text[:cut], text[cut:]
    if not all(part.strip() for part in parts):
        raise DataError(
            f"Cannot hold out {holdout:g} of one document of {len(text)} characters: a part would be empty."
        )
    return Rows([parts[0]], [""]), Rows([parts[1]], [""])


@dataclass(frozen=True)
class Codec:
    """Turns texts into the tokens that a model knows.

    Attributes:
        tokenizer: of the model.
        template: how it marks the turns of a conversation, or None.
        end: the token after a text.
    """

    tokenizer: Any
    template: Any
    end: int

    @classmethod
    def of(cls, pretrained: Any) -> "Codec":
        """That of a model.

        Raises:
            DataError: it has no token for the end of a text.
        """
        tokenizer = pretrained.tokenizer()
        end = end_of_text(tokenizer, pretrained.config)
        if end is None:
            raise DataError("The model has no token for the end of a text: no eos_token_id in its config.json.")
        return cls(tokenizer, pretrained.chat_template(), end)

    def encode(self, text: Any) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, whether each is to be learned). Of a conversation the assistant's turns are, with their ends.

        Raises:
            DataError: a conversation of more than a prompt and a response, and the model has no template for it.
        """
        if isinstance(text, str):
            pieces = [(self._tokens(text, True), True), ([self.end], True)]
        elif self.template is None:
            if [role for role, _ in text] != ["user", "assistant"]:
                raise DataError("The model has no chat template: give prompts and responses rather than messages.")
            pieces = [(self._tokens(text[0][1], True), False), (self._tokens(text[1][1]), True), ([self.end], True)]
        else:
            pieces = list(self._turns(text))
        ids = np.array([token for tokens, _ in pieces for token in tokens], np.int32)
        return ids, np.array([learned for tokens, learned in pieces for _ in tokens], bool)

    def _turns(self, turns: Iterable[tuple[str, str]]) -> Iterator[tuple[list[int], bool]]:
        """What is before an assistant's content is one piece, as when the model is asked; its content is the next."""
        before = self.template.begin
        for role, content in turns:
            start, end = self.template.start(role), self.template.end(role)
            if role != "assistant":
                before += start + content + end
                continue
            yield self._tokens(before + start), False
            yield self._tokens(content + end.rstrip()), True
            before = end[len(end.rstrip()) :]

    def _tokens(self, text: str, special: bool = False) -> list[int]:
        self.tokenizer.no_truncation()
        return self.tokenizer.encode(text, add_special_tokens=special).ids


def encode_texts(codec: Codec, texts: Iterable[Any], max_length: int, packing: bool, blocks: bool) -> Encoded:
    """Rows of tokens, each with the next token as its label; a text without a token to learn in them is left out.

    Args:
        codec: of the model.
        texts: strs and conversations.
        max_length: tokens in a row.
        packing: several texts in a row, told apart by their numbers 1, 2, ... in the column ``attention_mask``; else
            a text a row.
        blocks: a text that is longer goes on in further rows, rather than being cut.
    """
    samples: list[tuple[np.ndarray, np.ndarray]] = []
    cut, left_out = 0, 0
    for text in texts:
        ids, learned = codec.encode(text)
        inputs, labels = ids[:-1], np.where(learned[1:], ids[1:], IGNORED)
        before = len(samples)
        for start in range(0, len(inputs) if blocks else 1, max_length):
            part = slice(start, start + max_length)
            if (labels[part] != IGNORED).any():
                samples.append((inputs[part], labels[part]))
        if len(samples) == before:
            left_out += 1
        elif not blocks and len(inputs) > max_length:
            cut += 1
    if not samples:
        raise DataError(f"No text has a token to learn within data.max_length={max_length} tokens.")
    sizes = [len(inputs) for inputs, _ in samples]
    groups = pack(sizes, max_length) if packing else [[index] for index in range(len(samples))]
    longest = max(sum(sizes[index] for index in group) for group in groups)
    return Encoded(_columns(samples, groups, min(max_length, -(-longest // 8) * 8)), len(groups), cut, left_out)


def _columns(samples: list, groups: list[list[int]], width: int) -> dict[str, np.ndarray]:
    """One row for each group of samples, and a blank one."""
    shape = (len(groups) + 1, width)
    columns = {name: np.zeros(shape, np.int32) for name in ("input_ids", "attention_mask")}
    columns["labels"] = np.full(shape, IGNORED, np.int32)
    for row, group in enumerate(groups):
        at = 0
        for number, index in enumerate(group, 1):
            inputs, labels = samples[index]
            place = slice(at, at := at + len(inputs))
            columns["input_ids"][row, place] = inputs
            columns["labels"][row, place] = labels
            columns["attention_mask"][row, place] = number
    columns["attention_mask"][-1, 0] = 1  # the blank row attends to something
    return columns


def pack(sizes: list[int], room: int) -> list[list[int]]:
    """Which samples share a row of `room` tokens: the longest first, each in the fullest row that takes it.

    >>> pack([3, 5, 4, 2], 8)
    [[1, 0], [2, 3]]
    """
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, -group), ascending
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        at = bisect.bisect_left(free, (size, -len(groups)))
        if at < len(free):
            left, negative = free.pop(at)
            groups[-negative].append(index)
        else:
            left, negative = room, -len(groups)
            groups.append([index])
        if left > size:
            bisect.insort(free, (left - size, negative))
    return groups
