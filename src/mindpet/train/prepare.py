"""From the files that a run names to rows to train on and rows held out, with everything worth knowing reported."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.delta.prompt_slot import PromptSlot
from mindpet.delta.registry import method_named
from mindpet.models.pretrained import Pretrained, open_pretrained
from mindpet.train.config import RunConfig, RunFileError, foreign_keys, method_config
from mindpet.train.data import DataError, Encoded, Rows, encode, overlapping, read_rows, split_rows
from mindpet.train.language import Codec, encode_texts, is_plain, read_texts, split_texts
from mindpet.train.report import counted

if TYPE_CHECKING:
    from mindpet.train.fit import Reporter


@dataclass(frozen=True)
class Prepared:
    """A run's data, ready to train on.

    Attributes:
        task: ``"classification"`` or ``"language"``, as the model is.
        train: rows to train on.
        test: rows held out.
        labels: of a classifier, in the order of its logits; empty for a language model.
    """

    task: str
    train: Encoded
    test: Encoded
    labels: list[str]


def prepare(config: RunConfig, reporter: "Reporter") -> Prepared:
    """Read, split and tokenise the data of a run.

    Raises:
        RunFileError: keys that are of another task than the model's; texts longer than the model's positions.
        DataError, PretrainedFilesError: the inputs cannot be used.
    """
    pretrained = open_model(config)
    train, test = prepare_rows(config, pretrained.family.task, reporter)
    labels = sorted(set(train.labels)) if pretrained.family.task == "classification" else []
    files = config.data.train, config.data.test or config.data.train
    encoded = [encode_rows(pretrained, config, rows, path, labels) for rows, path in zip((train, test), files)]
    for name, rows in zip(("training", "held-out"), encoded):
        _report_lengths(rows, f"{name} {'rows' if labels else 'texts'}", config, reporter)
    if labels:
        counts = ", ".join(f"{label} {train.labels.count(label)}" for label in labels[:12])
        more = ", ..." if len(labels) > 12 else ""
        reporter.message(f"{len(train)} rows to train on ({counts}{more}), {len(test)} held out.")
    else:
        first, second = (
            f"{counted(len(rows) - found.left_out, 'text')} in {counted(found.count, 'row')} "
            f"({counted(found.labelled, 'token')} to predict)"
            for rows, found in zip((train, test), encoded)
        )
        reporter.message(f"{first} to train on; {second} held out.")
    return Prepared(pretrained.family.task, encoded[0], encoded[1], labels)


def open_model(config: RunConfig) -> Pretrained:
    """The files of a run's model, if the run fits them.

    Raises:
        RunFileError: keys of another task; texts of `data.max_length` tokens are longer than the model's positions.
        DataError: the tokenizer has more words than the model.
    """
    pretrained = open_pretrained(config.model.path)
    family, words = pretrained.family, pretrained.tokenizer().get_vocab_size()
    wrong = foreign_keys(config, family.task)
    if wrong:
        kind = "a language model" if family.task == "language" else "a classifier"
        raise RunFileError(
            f"{', '.join(wrong)}: not for {kind}, which the model in {config.model.path} becomes ({_kind(pretrained)})."
        )
    prefix = 0
    if config.method.name != "full" and {PrefixSlot, PromptSlot} & method_named(config.method.name).adapt.keys():
        prefix = method_config(config.method).tokens
    sizes = family.config.from_content(pretrained.config, str(config.model.path))  # with what config.json leaves out
    positions = getattr(sizes, family.positions)
    if config.data.max_length + prefix > positions:
        after = f" after a prefix of {prefix} tokens" if prefix else ""
        raise RunFileError(
            f"data.max_length is {config.data.max_length}{after}, but the model in {config.model.path} has "
            f"{positions} positions."
        )
    if words > sizes.vocab_size:
        raise DataError(
            f"The tokenizer in {config.model.path} has {words} words, the model has {sizes.vocab_size}: "
            "they do not belong together."
        )
    return pretrained


def prepare_rows(config: RunConfig, task: str, reporter: "Reporter") -> tuple[Rows, Rows]:
    """(train, held out)."""
    train = read_data(config.data.train, config, task, reporter)
    if config.data.test is None:
        split = split_rows if task == "classification" else split_texts
        train, test = split(train, config.data.holdout, config.train.seed)
    else:
        test = read_data(config.data.test, config, task, reporter)
        train = _without_overlap(train, test, config, reporter)
        if not len(train):
            raise DataError("Every training row is also held out: nothing is left to train on.")
    if task == "language":
        return train, test
    if len(set(train.labels)) < 2:
        raise DataError(
            f"Training needs rows of two labels at least, but all rows that are not held out, {len(train)}, have "
            f"{train.labels[0]!r}."
        )
    check_labels(test, sorted(set(train.labels)), reporter)
    return train, test


def read_data(path: str, config: RunConfig, task: str, reporter: "Reporter") -> Rows:
    """The rows of one file or folder; those left out are reported."""
    if task == "classification":
        rows = read_rows(path, config.data.text, config.data.label, config.data.text_pair)
    else:
        rows = read_texts(path, config.data)
    if rows.broken:
        reporter.message(f"{path}: {rows.broken_in_words()}")
    return rows


def check_labels(test: Rows, labels: list[str], reporter: "Reporter") -> None:
    """Report held-out rows whose label is unknown, which are not scored.

    Raises:
        DataError: no row would be scored.
    """
    unseen = sorted(set(test.labels) - set(labels))
    if not set(test.labels) & set(labels):
        raise DataError(
            f"No held-out row has a known label: they have {', '.join(unseen)}, known are {', '.join(labels)}."
        )
    if unseen:
        count = sum(label in unseen for label in test.labels)
        reporter.message(
            f"{count} held-out rows have labels that no training row has ({', '.join(unseen)}): not scored."
        )


def encode_rows(pretrained: Pretrained, config: RunConfig, rows: Rows, path: str, labels: list[str]) -> Encoded:
    """The tokens of rows that came from `path`."""
    data = config.data
    if pretrained.family.task == "classification":
        return encode(pretrained.tokenizer(), rows, labels, data.max_length)
    return encode_texts(Codec.of(pretrained), rows.texts, data.max_length, data.packing, is_plain(path))


def held_out(config: RunConfig, pretrained: Pretrained, labels: list[str], reporter: "Reporter") -> Encoded:
    """The held-out rows of a run, or those of its ``data.test``."""
    task = pretrained.family.task
    if config.data.test is None:
        _, test = prepare_rows(config, task, reporter)
    else:
        test = read_data(config.data.test, config, task, reporter)
        if task == "classification":
            check_labels(test, labels, reporter)
    encoded = encode_rows(pretrained, config, test, config.data.test or config.data.train, labels)
    _report_lengths(encoded, "held-out rows" if task == "classification" else "held-out texts", config, reporter)
    return encoded


def _report_lengths(encoded: Encoded, what: str, config: RunConfig, reporter: "Reporter") -> None:
    length = config.data.max_length
    if encoded.cut:
        reporter.message(f"{encoded.cut} {what} are longer than {length} tokens and are cut.")
    if encoded.left_out:
        reporter.message(f"{encoded.left_out} {what} have nothing to learn in their first {length} tokens: left out.")


def _without_overlap(train: Rows, test: Rows, config: RunConfig, reporter: "Reporter") -> Rows:
    shared = overlapping(train, test)
    if not shared:
        return train
    example = str(train.texts[shared[0]])[:60]
    what = f"{len(shared)} training rows have a text that is also held out, for instance {example!r}"
    if config.data.overlap == "error":
        raise DataError(f"{what}; data.overlap=drop leaves them out.")
    drop = config.data.overlap == "drop"
    reporter.message(f"{what}: {'left out' if drop else 'kept'} (data.overlap={config.data.overlap}).")
    gone = set(shared) if drop else set()
    return train.take([index for index in range(len(train)) if index not in gone])


def _kind(pretrained: Any) -> str:
    return pretrained.family.network.__name__
