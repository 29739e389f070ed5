"""The rows of a comparison: split once, written down, and read by every one of its runs."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mindpet import _files
from mindpet.models.pretrained import family_of
from mindpet.train.comparison.cells import Watcher
from mindpet.train.comparison.plan import Plan
from mindpet.train.data import DataError, Rows, overlapping, split_rows
from mindpet.train.fit import Reporter
from mindpet.train.language import is_plain, split_texts
from mindpet.train.prepare import prepare_rows


def write_splits(plan: Plan, watcher: Watcher, for_search: bool = True) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split the rows once for all runs.

    The files carry a part of the hash of their content in their names: when the data changes, so do the settings of
    all runs, and they are made anew.

    Returns:
        Values of the section ``data`` for the runs of the table, and for those of a search, if it is for one: the
        training rows split once more, without those whose text is held out. So no text that is held out for the table
        is among the latter, whatever ``data.overlap`` says.

    Raises:
        DataError: the data cannot be used.
    """
    data, task = plan.config.data, family_of(plan.config.model.path).task
    train, test = prepare_rows(plan.config, task, _Messages(watcher))
    split = split_rows if task == "classification" else split_texts
    watcher.message(f"{len(train)} texts to train on, {len(test)} held out for the table, the same for all runs.")
    train_plain, test_plain = (task == "language" and is_plain(path) for path in (data.train, data.test or data.train))
    directory = plan.directory / "data"
    keys: dict[str, Any] = {"text": "text", "label": "label", "prompt": None, "response": None, "messages": None}
    keys["text_pair"] = "text_pair" if data.text_pair else None
    paths = {
        "train": str(_write(directory, "train", train, train_plain)),
        "test": str(_write(directory, "test", test, test_plain)),
    }
    if not for_search:
        return {**keys, **paths}, None
    shared = set(overlapping(train, test))  # data.overlap=keep is about the table; what is searched on is not scored on
    if shared:
        watcher.message(f"{len(shared)} of the former are also held out; the search leaves them out.")
        train = train.take([index for index in range(len(train)) if index not in shared])
    if not len(train):
        raise DataError("Every training row is also held out: nothing is left to search a learning rate on.")
    fit, validation = split(train, plan.config.compare.validation, plan.config.train.seed)
    watcher.message(f"A search trains on {len(fit)} of the former and judges on the other {len(validation)}.")
    parts = {
        "train": str(_write(directory, "fit", fit, train_plain)),
        "test": str(_write(directory, "validation", validation, train_plain)),
    }
    return {**keys, **paths}, {**keys, **parts}


def _write(directory: Path, name: str, rows: Rows, documents: bool) -> Path:
    """The rows as JSON lines, or one .txt file for each document."""
    content = "".join(
        json.dumps(_record(text, label), ensure_ascii=False) + "\n" for text, label in zip(rows.texts, rows.labels)
    )
    path = directory / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}{'' if documents else '.jsonl'}"
    if documents:
        for number, text in enumerate(rows.texts):
            _files.write_text(path / f"{number:06}.txt", text)
    elif not path.is_file():
        _files.write_text(path, content)
    return path


def _record(text: Any, label: str) -> dict[str, Any]:
    if isinstance(text, str):
        record: dict[str, Any] = {"text": text}
    elif isinstance(text[0], str):
        record = {"text": text[0], "text_pair": text[1]}
    else:
        record = {"messages": [{"role": role, "content": content} for role, content in text]}
    return {**record, "label": label} if label else record


class _Messages(Reporter):
    """Hands what the data has to say to the watcher."""

    def __init__(self, watcher: Watcher):
        self.message = watcher.message  # type: ignore[method-assign]
