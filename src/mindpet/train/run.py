"""The main job: tune, evaluate and use a network as a run file says."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import yaml
from mindspore import nn

from mindpet import _compat, _files
from mindpet.delta.registry import method_named
from mindpet.graph.deltas import load_delta
from mindpet.graph.inject import inject
from mindpet.models.bert import BertConfig, BertForSequenceClassification
from mindpet.train.config import RunConfig, RunFileError, as_yaml, load_run, method_config
from mindpet.train.data import DataError, Encoded, Rows, encode, load_tokenizer, overlapping, read_rows, split_rows
from mindpet.train.fit import CHECKPOINT, CannotResume, Fit, Reporter, read_metrics
from mindpet.train.metrics import Scores, predict_logits, probabilities, score
from mindpet.train.report import draw_curve, peak_memory_mib, size_of

FULL_LEARNING_RATE = 1e-4
_MODES = {"graph": ms.GRAPH_MODE, "pynative": ms.PYNATIVE_MODE}


@dataclass(frozen=True)
class Prepared:
    """A run's data, ready to train on."""

    train: Encoded
    test: Encoded
    labels: list[str]


def read_data(path: str, config: RunConfig, reporter: Reporter) -> Rows:
    """The rows of one file or folder; those left out are reported."""
    rows = read_rows(path, config.data.text, config.data.label, config.data.text_pair)
    if rows.broken:
        reporter.message(f"{path}: {rows.broken_in_words()}")
    return rows


def prepare_rows(config: RunConfig, reporter: Reporter) -> tuple[Rows, Rows]:
    """(train, held out), with everything worth knowing about them reported."""
    train = read_data(config.data.train, config, reporter)
    if config.data.test is None:
        train, test = split_rows(train, config.data.holdout, config.train.seed)
    else:
        test = read_data(config.data.test, config, reporter)
        train = _without_overlap(train, test, config, reporter)
    if len(set(train.labels)) < 2:
        raise DataError(
            f"Training needs rows of two labels at least, but there are {len(train)} rows of {len(set(train.labels))}."
        )
    check_labels(test, sorted(set(train.labels)), reporter)
    return train, test


def check_labels(test: Rows, labels: list[str], reporter: Reporter) -> None:
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


def check_lengths(config: RunConfig, tokenizer: Any) -> None:
    """Whether texts of `data.max_length` tokens of this tokenizer fit the model.

    Raises:
        RunFileError: they are longer than the model's positions.
        DataError: the tokenizer has more words than the model.
    """
    sizes = BertConfig.from_json(Path(config.model.path) / "config.json")
    prefix = 0 if config.method.name == "full" else getattr(method_config(config.method), "tokens", 0)
    if config.data.max_length + prefix > sizes.max_position_embeddings:
        after = f" after a prefix of {prefix} tokens" if prefix else ""
        raise RunFileError(
            f"data.max_length is {config.data.max_length}{after}, but the model in {config.model.path} has "
            f"{sizes.max_position_embeddings} positions."
        )
    if tokenizer.get_vocab_size() > sizes.vocab_size:
        raise DataError(
            f"The tokenizer in {config.model.path} has {tokenizer.get_vocab_size()} words, the model has "
            f"{sizes.vocab_size}: they do not belong together."
        )


def prepare(config: RunConfig, reporter: Reporter) -> Prepared:
    """Read, split and tokenise the data of a run."""
    tokenizer = load_tokenizer(config.model.path)
    check_lengths(config, tokenizer)
    train, test = prepare_rows(config, reporter)
    labels = sorted(set(train.labels))
    encoded = [encode(tokenizer, rows, labels, config.data.max_length) for rows in (train, test)]
    for name, rows in zip(("training", "held-out"), encoded):
        if rows.cut:
            reporter.message(f"{rows.cut} {name} rows are longer than {config.data.max_length} tokens and are cut.")
    counts = ", ".join(f"{label} {train.labels.count(label)}" for label in labels[:12])
    more = ", ..." if len(labels) > 12 else ""
    reporter.message(f"{len(train)} rows to train on ({counts}{more}), {len(test)} held out.")
    return Prepared(encoded[0], encoded[1], labels)


def build_network(config: RunConfig, labels: list[str]) -> nn.Cell:
    """The pre-trained network with a new head and the run's method in it; the same at every call."""
    ms.set_seed(config.train.seed)
    np.random.seed(config.train.seed)
    # PyNative mode queues operators for a device; on a CPU the queue costs up to 4 ms each
    ms.set_context(mode=_MODES[config.train.mode], pynative_synchronize=_compat.device_target() == "CPU")
    drop = config.model.dropout
    changes = {} if drop is None else {"hidden_dropout_prob": drop, "attention_probs_dropout_prob": drop}
    network, report = BertForSequenceClassification.from_pretrained(
        config.model.path, len(labels), config.model.pooling, **changes
    )
    if config.model.pooling == "pooler" and any("pooler" in name for name in report.missing):
        raise RunFileError(f"The model in {config.model.path} has no pooler: use model.pooling=mean.")
    if config.method.name == "full":
        return network
    given = config.method.saved_whole
    return inject(network, method_config(config.method, modules_to_save=tuple(dict.fromkeys([*given, "classifier"]))))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, whatever the working directory will be."""
    model = config.model.model_copy(update={"path": os.path.abspath(config.model.path)})
    files = {key: os.path.abspath(path) for key in ("train", "test") if (path := getattr(config.data, key)) is not None}
    data = config.data.model_copy(update=files)
    output = config.output.model_copy(update={"directory": os.path.abspath(config.output.directory)})
    return config.model_copy(update={"model": model, "data": data, "output": output})


def peak_learning_rate(config: RunConfig) -> float:
    """The run file's, or the method's own."""
    if config.train.learning_rate is not None:
        return config.train.learning_rate
    return FULL_LEARNING_RATE if config.method.name == "full" else method_named(config.method.name).learning_rate


def finetune(
    config: RunConfig, reporter: Reporter | None = None, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Tune as `config` says and leave everything in its output directory.

    Args:
        config: the run.
        reporter: is told what happens.
        resume: go on from the last save in the output directory.
        overwrite: start anew although the output directory holds a run.

    Returns:
        The report: scores before and after, trainable share, sizes, seconds, peak memory.

    Raises:
        RunFileError: the output directory holds a run, and neither `resume` nor `overwrite` is given.
        DataError, PretrainedFilesError: the inputs cannot be used.
        Interrupted, Diverged, CannotResume: see :meth:`mindpet.train.fit.Fit.run`.
    """
    reporter = reporter or Reporter()
    config = with_absolute_paths(config)
    directory = Path(config.output.directory)
    _check_directory(config, directory, resume, overwrite)
    begun = time.monotonic()
    prepared = prepare(config, reporter)
    network = build_network(config, prepared.labels)
    trainable = sum(parameter.size for parameter in network.trainable_params())
    total = sum(parameter.size for parameter in network.get_parameters())
    reporter.message(
        f"{config.method.name} on {config.model.path}: {trainable:,} of {total:,} parameters train "
        f"({trainable / total:.2%}). Compiling takes a few seconds."
    )
    fit = Fit(network, config.train, peak_learning_rate(config), prepared.train, prepared.test, directory, reporter)
    directory.mkdir(parents=True, exist_ok=True)
    if not resume:
        for name in ("run.yaml", CHECKPOINT, "report.json", "before.json", "metrics.jsonl", "curve.png"):
            (directory / name).unlink(missing_ok=True)
        for name in ("delta.safetensors", "delta.json"):
            (directory / "delta" / name).unlink(missing_ok=True)
        _files.write_json(directory / "labels.json", prepared.labels)
        _files.write_json(directory / "data.json", {"held_out": prepared.test.digest()})
        before = fit.evaluate().as_record()
        _files.write_json(directory / "before.json", before)
        _files.write_text(directory / "run.yaml", as_yaml(config))
    else:
        before = _files.read_json(directory / "before.json", CannotResume)
    try:
        progress = fit.run(resume)
    finally:
        records = read_metrics(directory / "metrics.jsonl")
        if records:
            draw_curve(records, directory / "curve.png", _title(config, trainable / total))
    scored = [record for record in records if "accuracy" in record]
    kept = progress.best_step if config.train.keep_best and progress.best_step else progress.step
    after = next((record for record in reversed(scored) if record["step"] == kept), scored[-1])
    report = {
        "method": config.method.name,
        "before": before,
        "after": {key: after[key] for key in before},
        "step": progress.step,
        "kept_step": kept,
        "rows": {"train": prepared.train.count, "test": prepared.test.count},
        "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
        "delta_bytes": size_of(directory / "delta"),
        "model_bytes": size_of(Path(config.model.path)),
        "seconds": {"training": round(progress.seconds, 1), "whole": round(time.monotonic() - begun, 1)},
        "peak_memory_mib": round(peak_memory_mib()),
    }
    _files.write_json(directory / "report.json", report)
    return report


def load_tuned(directory: str | Path, overrides: list[str] | None = None) -> tuple[RunConfig, nn.Cell, list[str]]:
    """A finished run: its configuration, its network with the delta in it, its labels.

    Raises:
        RunFileError: not the directory of a run.
    """
    directory = Path(directory)
    if not (directory / "run.yaml").is_file():
        raise RunFileError(f"{directory} is not the directory of a run: it has no run.yaml.")
    if not (directory / "delta" / "delta.safetensors").is_file():
        raise RunFileError(f"{directory} has no delta yet: finish the run with mindpet finetune --resume.")
    config = load_run(directory / "run.yaml", overrides)
    labels = _files.read_json(directory / "labels.json", RunFileError)
    network = build_network(config, labels)
    load_delta(network, directory / "delta")
    network.set_train(False)
    return config, network, labels


def unfinished(directory: str | Path) -> str:
    """A sentence on a run that has a delta but did not end, or nothing."""
    if (Path(directory) / "report.json").is_file():
        return ""
    return (
        f"The run in {directory} is not finished; its best delta so far is used. Go on with mindpet finetune --resume."
    )


def evaluate(
    directory: str | Path, overrides: list[str] | None = None, reporter: Reporter | None = None
) -> tuple[Scores, list[str]]:
    """Scores of a finished run on its held-out rows, or on ``data.test=FILE``; and its labels."""
    reporter = reporter or Reporter()
    config, network, labels = load_tuned(directory, overrides)
    tokenizer = load_tokenizer(config.model.path)
    check_lengths(config, tokenizer)
    if config.data.test is not None:
        test = read_data(config.data.test, config, reporter)
        check_labels(test, labels, reporter)
    else:
        _, test = prepare_rows(config, reporter)
    rows = encode(tokenizer, test, labels, config.data.max_length)
    known = _files.read_json(Path(directory) / "data.json", RunFileError).get("held_out")
    if config.data.test is None and rows.digest() != known:
        raise DataError(
            f"{config.data.train} has changed since the run, so which rows were held out is not known any more: name a "
            "file with data.test=FILE."
        )
    logits = predict_logits(network, rows, config.train.batch_size)
    return score(logits, rows.columns["labels"][: rows.count]), labels


def infer(directory: str | Path, texts: list[str], overrides: list[str] | None = None) -> list[dict[str, float]]:
    """For each text, the probability of each label, the most probable first.

    A run on pairs (``data.text_pair``) takes the two texts with a tab between them.
    """
    config, network, labels = load_tuned(directory, overrides)
    inputs: list[Any] = list(texts)
    if config.data.text_pair:
        inputs = [tuple(text.split("\t")) for text in texts]
        wrong = next((text for text, pair in zip(texts, inputs) if len(pair) != 2), None)
        if wrong is not None:
            raise DataError(f"This run is on pairs of texts: put a tab between the two, unlike in {wrong[:60]!r}.")
    encoded = encode(
        load_tokenizer(config.model.path), Rows(inputs, [labels[0]] * len(inputs)), labels, config.data.max_length
    )
    chances = probabilities(predict_logits(network, encoded, min(config.train.batch_size, len(inputs))))
    return [{labels[index]: float(row[index]) for index in np.argsort(-row)} for row in chances]


def _without_overlap(train: Rows, test: Rows, config: RunConfig, reporter: Reporter) -> Rows:
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


def _title(config: RunConfig, share: float) -> str:
    return f"{config.method.name} on {Path(config.model.path).name}: {share:.2%} of the parameters train"


def _check_directory(config: RunConfig, directory: Path, resume: bool, overwrite: bool) -> None:
    there = directory / "run.yaml"
    if not resume:
        if there.exists() and not overwrite:
            raise RunFileError(
                f"{directory} holds a run already: go on with --resume, start anew with --overwrite, or choose another "
                "output.directory."
            )
        return
    if not there.is_file():
        raise CannotResume(f"{directory} has no run.yaml: there is nothing to go on from.")
    if (directory / "report.json").is_file():
        raise CannotResume(f"The run in {directory} is finished; see its report.json.")
    old, new = yaml.safe_load(there.read_text(encoding="utf-8")), yaml.safe_load(as_yaml(config))
    changed = [
        f"{section}.{key}: it was {old.get(section, {}).get(key)!r}, now {new.get(section, {}).get(key)!r}"
        for section in ("model", "method", "data", "train")
        for key in sorted({*old.get(section, {}), *new.get(section, {})})
        if old.get(section, {}).get(key) != new.get(section, {}).get(key)
    ]
    if changed:
        raise CannotResume(f"The run in {directory} was begun with other settings:\n  " + "\n  ".join(changed))
