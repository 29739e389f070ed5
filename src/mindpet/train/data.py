"""Rows of text: reading, splitting, tokenising for a classifier, batching."""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import mindspore.dataset as msds
import numpy as np

from mindpet._files import is_unicode
from mindpet._near import beside, near
from mindpet.delta.r_drop import IGNORED
from mindpet.parallel.group import ALONE, Group

_NAMED = 5  # broken rows that are named; the rest is counted


class DataError(ValueError):
    """Data that cannot be used: missing, empty, or nothing readable in it."""


@dataclass(frozen=True)
class Rows:
    """Labelled texts and what could not be read.

    Attributes:
        texts: a str, or a pair of them, for each row.
        labels: as str.
        broken: where and why, one line for each row that was left out.
    """

    texts: list[Any]
    labels: list[str]
    broken: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Any) -> "Rows":
        """The rows at `indices`."""
        return Rows([self.texts[i] for i in indices], [self.labels[i] for i in indices])

    def broken_in_words(self) -> str:
        """The first broken rows, and how many there are; empty when there is none."""
        if not self.broken:
            return ""
        more = f"\n  and {len(self.broken) - _NAMED} more" if len(self.broken) > _NAMED else ""
        total = len(self.broken)
        return f"{total} row{'s' if total > 1 else ''} left out:\n  " + "\n  ".join(self.broken[:_NAMED]) + more


def read_rows(path: str | Path, text: str = "text", label: str = "label", pair: str | None = None) -> Rows:
    """Labelled rows from a file or folder; broken ones are left out and named.

    Raises:
        DataError: nothing there, an unknown kind of file, no row that can be used.
    """
    path = Path(path)
    if os.path.isdir(path):
        rows = _folder(path)
    else:
        rows = _from_records(path, read_records(path, "or a folder per label"), text, label, pair)
    if not len(rows):
        raise DataError(f"{path} has no usable row. {rows.broken_in_words() or 'It has none at all.'}")
    return rows


def read_records(path: Path, otherwise: str) -> Iterator[tuple[int, Any]]:
    """(line, record) of each row of a file; in the place of a row that cannot be read, a ValueError that says why.

    Raises:
        DataError: no file there, or none of the known kinds; `otherwise` says what else may be given.
    """
    readers = {".jsonl": _json_lines, ".csv": _table, ".tsv": _table}
    if not os.path.exists(path):
        raise DataError(f"There is no file or folder {path}{beside(path)}.")
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} has none of the known endings: {', '.join(readers)}, {otherwise}.")
    return readers[path.suffix.lower()](path)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield number, ValueError(f"not UTF-8: {error}")
            except (ValueError, RecursionError) as error:
                yield number, ValueError(f"not JSON: {error}")


def _table(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows under a header. A TSV has no quotes, as is usual; a CSV may quote fields, and lines within them."""
    csv.field_size_limit(1 << 24)
    tabs = path.suffix.lower() == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, **options)
        header: list[str] | None = None
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines = reader.line_num - number + 1
                what = f", which takes this and the {lines - 1} lines after it" if lines > 1 else ""
                yield number, ValueError(f"{error}{what}")
                continue
            if header is None:
                twice = sorted(name for name, count in Counter(cells).items() if count > 1)
                if twice:
                    raise DataError(f"{path} has two columns with the same name: {_printable(twice)}.")
                wrong = next(filter(None, map(unreadable, cells)), "")
                if wrong:
                    raise DataError(f"{path} {wrong}: its header is {_printable(cells)}.")
                header = cells
            elif cells and len(cells) != len(header):
                yield number, ValueError(f"{len(cells)} fields where the header has {len(header)}")
            elif cells:
                yield number, dict(zip(header, cells))


def _from_records(path: Path, records: Iterator[tuple[int, Any]], text: str, label: str, pair: str | None) -> Rows:
    rows = Rows([], [])
    for number, record in records:
        keys = [key for key in (text, pair, label) if key]
        problem = str(record) if isinstance(record, ValueError) else problem_with(record, keys)
        if problem:
            rows.broken.append(f"{path.name}, line {number}: {problem}")
            continue
        first = str(record[text])
        rows.texts.append((first, str(record[pair])) if pair else first)
        rows.labels.append(_label(record[label]))
    return rows


def _label(value: Any) -> str:
    """The same str for the same label in JSON and in a table: true, 1, news."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def problem_with(record: Any, keys: Iterable[str]) -> str:
    """Why a record does not hold a text under each of the keys; empty when it does."""
    if not isinstance(record, dict):
        return f"not an object but {type(record).__name__}"
    for key in keys:
        if key not in record:
            return f"no '{key}' (it has: {_printable(record) or 'nothing'}){near(key, map(str, islice(record, 50)))}"
        value = record[key]
        if value is None or isinstance(value, (dict, list)):
            return f"'{key}' is {'null' if value is None else 'not a text'}"
        if not str(value).strip():
            return f"'{key}' is empty"
        wrong = unreadable(str(value))
        if wrong:
            return f"'{key}' {wrong}"
    return ""


def unreadable(text: str) -> str:
    """Why it cannot be a text that was written in UTF-8; empty when it can."""
    if not is_unicode(text):
        return "is not UTF-8"
    return "has NUL characters, as UTF-16 and what is no text have" if "\0" in text else ""


def _printable(names: Iterable[Any]) -> str:
    """Names in a row; what a terminal should not get is escaped as Python does."""
    return ", ".join(name if name.isprintable() else repr(name)[1:-1] for name in map(str, names))


def _folder(path: Path) -> Rows:
    rows = Rows([], [])
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
    if not folders:
        raise DataError(f"{path} has no folders: it must hold one folder of .txt files for each label.")
    for folder in folders:
        for file in sorted(folder.glob("*.txt")):
            try:
                content = file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                rows.broken.append(f"{folder.name}/{file.name}: {error}")
                continue
            wrong = unreadable(content) if content else "empty"
            if wrong:
                rows.broken.append(f"{folder.name}/{file.name}: {wrong}")
                continue
            rows.texts.append(content)
            rows.labels.append(folder.name)
    return rows


def split_rows(rows: Rows, holdout: float, seed: int) -> tuple[Rows, Rows]:
    """(train, held out). Rows with the same text stay on the same side.

    Raises:
        DataError: more held out than there is.
    """
    wanted = int(holdout) if holdout >= 1 else max(1, round(holdout * len(rows)))
    if wanted >= len(rows):
        raise DataError(f"Cannot hold out {wanted} of {len(rows)} rows: nothing would be left to train on.")
    groups: dict[Any, list[int]] = {}
    for index, text in enumerate(rows.texts):
        groups.setdefault(text, []).append(index)
    members = list(groups.values())
    held: list[int] = []
    for group in np.random.default_rng([seed, 2]).permutation(len(members)):
        if len(held) + len(members[group]) <= wanted:
            held += members[group]
    if not held:
        raise DataError(
            f"None of {len(rows)} rows could be held out: the same {len(members)} texts repeat in all of them."
        )
    chosen = set(held)
    return rows.take([i for i in range(len(rows)) if i not in chosen]), rows.take(sorted(held))


def overlapping(train: Rows, test: Rows) -> list[int]:
    """Indices of the training rows whose text is also held out."""
    held = set(test.texts)
    return [index for index, text in enumerate(train.texts) if text in held]


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows of one length, and one blank row more, at index `count`, that fills up the last batch.

    Attributes:
        columns: the network's inputs ``(count + 1, length)``, and last the labels: ``(count + 1,)`` of a classifier,
            ``(count + 1, length)`` of a language model.
        count: rows that count.
        cut: texts that were longer than they may be.
        left_out: texts of a language model that have no token to learn within the length.
    """

    columns: dict[str, np.ndarray]
    count: int
    cut: int
    left_out: int = 0

    @property
    def labelled(self) -> int:
        """Labels that count: of rows, or of a language model's tokens."""
        return int((self.columns["labels"] != IGNORED).sum())

    def digest(self) -> str:
        """A hash of all that is in it: a resumed run must go on with the same."""
        total = hashlib.sha256()
        for name in sorted(self.columns):
            total.update(self.columns[name].tobytes())
        return total.hexdigest()

    def batches(
        self, order: np.ndarray, batch_size: int, skip: int = 0, group: Group = ALONE
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches of `batch_size` rows in that order, through MindSpore's pipeline, the first `skip` left out.

        Of each batch only the part of this process of `group`.
        """
        if skip * batch_size >= len(order):
            return
        part = group.part_of(batch_size)
        wanted = np.asarray(order[skip * batch_size :], np.int64)
        filled = np.pad(wanted, (0, -len(wanted) % batch_size), constant_values=self.count).reshape(-1, batch_size)
        filled = np.pad(filled, ((0, 0), (0, group.size * part - batch_size)), constant_values=self.count)
        chosen = filled[:, group.rank * part : (group.rank + 1) * part].reshape(-1)
        rows = {name: values[chosen] for name, values in self.columns.items()}
        pipeline = msds.NumpySlicesDataset(rows, shuffle=False, num_parallel_workers=1)
        yield from pipeline.batch(part).create_dict_iterator(num_epochs=1, output_numpy=False)


def encode(tokenizer: Any, rows: Rows, labels: list[str], max_length: int, length: int | None = None) -> Encoded:
    """Token ids padded to one length: `length`, or the longest row rounded up to a multiple of 8.

    A label that is not among `labels` becomes the label that counts for nothing.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    natural = [len(entry.ids) for entry in tokenizer.encode_batch(rows.texts)]
    limit = min(length or max_length, max_length)
    tokenizer.enable_truncation(limit)
    encodings = tokenizer.encode_batch(rows.texts)
    longest = max((len(entry.ids) for entry in encodings), default=1)
    width = length or min(max_length, -(-longest // 8) * 8)
    shape = (len(rows) + 1, width)
    columns = {name: np.zeros(shape, np.int32) for name in ("input_ids", "attention_mask", "token_type_ids")}
    for index, entry in enumerate(encodings):
        size = len(entry.ids)
        columns["input_ids"][index, :size] = entry.ids
        columns["attention_mask"][index, :size] = entry.attention_mask
        columns["token_type_ids"][index, :size] = entry.type_ids
    columns["attention_mask"][-1, 0] = 1  # the blank row attends to something
    number = {label: index for index, label in enumerate(labels)}
    columns["labels"] = np.array([number.get(label, IGNORED) for label in rows.labels] + [IGNORED], np.int32)
    return Encoded(columns, len(rows), sum(size > limit for size in natural))
