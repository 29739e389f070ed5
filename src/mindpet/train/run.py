"""The main job: tune, evaluate and use a network as a run file says."""

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
from mindpet.models.bert import BertForSequenceClassification
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


def prepare_rows(config: RunConfig, reporter: Reporter) -> tuple[Rows, Rows]:
    """(train, held out), with everything worth knowing about them reported."""
    data, seed = config.data, config.train.seed
    columns = (data.text, data.label, data.text_pair)
    train = read_rows(data.train, *columns)
    if train.broken:
        reporter.message(f"{data.train}: {train.broken_in_words()}")
    if data.test is None:
        train, test = split_rows(train, data.holdout, seed)
    else:
        test = read_rows(data.test, *columns)
        if test.broken:
            reporter.message(f"{data.test}: {test.broken_in_words()}")
    shared = overlapping(train, test)
    if shared:
        example = str(train.texts[shared[0]])[:60]
        what = f"{len(shared)} training rows have a text that is also held out, for instance {example!r}"
        if data.overlap == "error":
            raise DataError(f"{what}; data.overlap=drop leaves them out.")
        reporter.message(f"{what}: {'left out' if data.overlap == 'drop' else 'kept'} (data.overlap={data.overlap}).")
        if data.overlap == "drop":
            gone = set(shared)
            train = train.take([index for index in range(len(train)) if index not in gone])
    if len(set(train.labels)) < 2:
        raise DataError(f"The training rows have only the label {train.labels[0] if train.labels else '-'!r}.")
    unseen = sorted(set(test.labels) - set(train.labels))
    if unseen:
        count = sum(label in unseen for label in test.labels)
        reporter.message(
            f"{count} held-out rows have labels that no training row has ({', '.join(unseen)}): not scored."
        )
    return train, test


def prepare(config: RunConfig, reporter: Reporter) -> Prepared:
    """Read, split and tokenise the data of a run."""
    train, test = prepare_rows(config, reporter)
    labels = sorted(set(train.labels))
    tokenizer = load_tokenizer(config.model.path)
    encoded = [encode(tokenizer, rows, labels, config.data.max_length) for rows in (train, test)]
    for name, rows in zip(("training", "held-out"), encoded):
        if rows.cut:
            reporter.message(f"{rows.cut} {name} rows are longer than {config.data.max_length} tokens and are cut.")
    counts = ", ".join(f"{label} {train.labels.count(label)}" for label in labels[:12])
    reporter.message(
        f"{len(train)} rows to train on ({counts}{', ...' if len(labels) > 12 else ''}), {len(test)} held out."
    )
    return Prepared(encoded[0], encoded[1], labels)


def build_network(config: RunConfig, labels: list[str]) -> nn.Cell:
    """The pre-trained network with a new head and the run's method in it; the same at every call."""
    ms.set_seed(config.train.seed)
    np.random.seed(config.train.seed)
    # PyNative mode queues operators for a device; on a CPU the queue costs up to 4 ms each
    ms.set_context(mode=_MODES[config.train.mode], pynative_synchronize=_compat.device_target() == "CPU")
    drop = config.model.dropout
    changes = {} if drop is None else {"hidden_dropout_prob": drop, "attention_probs_dropout_prob": drop}
    network, _ = BertForSequenceClassification.from_pretrained(
        config.model.path, len(labels), config.model.pooling, **changes
    )
    if config.method.name == "full":
        return network
    given = config.method.options.get("modules_to_save") or []
    return inject(network, method_config(config.method, modules_to_save=tuple(dict.fromkeys([*given, "classifier"]))))


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
        for name in (CHECKPOINT, "report.json", "before.json"):
            (directory / name).unlink(missing_ok=True)
        _files.write_json(directory / "labels.json", prepared.labels)
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
    if not (directory / "delta" / "delta.json").is_file():
        raise RunFileError(f"{directory} has no delta yet: finish the run with mindpet finetune --resume.")
    config = load_run(directory / "run.yaml", overrides)
    labels = _files.read_json(directory / "labels.json", RunFileError)
    network = build_network(config, labels)
    load_delta(network, directory / "delta")
    network.set_train(False)
    return config, network, labels


def evaluate(
    directory: str | Path, overrides: list[str] | None = None, reporter: Reporter | None = None
) -> tuple[Scores, list[str]]:
    """Scores of a finished run on its held-out rows, or on ``data.test=FILE``; and its labels."""
    config, network, labels = load_tuned(directory, overrides)
    _, test = prepare_rows(config, reporter or Reporter())
    rows = encode(load_tokenizer(config.model.path), test, labels, config.data.max_length)
    logits = predict_logits(network, rows, config.train.batch_size)
    return score(logits, rows.columns["labels"][: rows.count]), labels


def infer(directory: str | Path, texts: list[Any]) -> list[dict[str, float]]:
    """For each text, the probability of each label, the most probable first."""
    config, network, labels = load_tuned(directory)
    rows = Rows(texts, [labels[0]] * len(texts))
    encoded = encode(load_tokenizer(config.model.path), rows, labels, config.data.max_length)
    chances = probabilities(predict_logits(network, encoded, min(config.train.batch_size, len(texts))))
    return [{labels[index]: float(row[index]) for index in np.argsort(-row)} for row in chances]


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
