"""The main job: tune, evaluate and use a network as a run file says."""

import dataclasses
import os
import statistics
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn

from mindpet import _compat, _files
from mindpet._checks import NothingFitsError
from mindpet.graph.deltas import load_delta
from mindpet.graph.inject import count_parameters, inject
from mindpet.kernels import accelerate
from mindpet.models.prefix_start import start_prefix
from mindpet.models.pretrained import family_of, open_pretrained
from mindpet.parallel.group import join, launched
from mindpet.train import output_directory
from mindpet.train.config import RunConfig, RunFileError, as_yaml, load_run, method_config
from mindpet.train.data import DataError, Rows, encode
from mindpet.train.dropout import dropouts
from mindpet.train.fit import CannotResume, Diverged, Fit, Interrupted, Progress, Reporter, read_metrics
from mindpet.train.launch import launch
from mindpet.train.metrics import LanguageScores, Scores, predict_logits, probabilities, scorer
from mindpet.train.prepare import Prepared, held_out, open_model, prepare
from mindpet.train.rate import peak_learning_rate, starts_from_text, with_rate
from mindpet.train.report import draw_curve, peak_memory_mib, size_of

_MODES = {"graph": ms.GRAPH_MODE, "pynative": ms.PYNATIVE_MODE}


class NothingDrops(RunFileError):
    """R-Drop in a network without any dropout: a method that does not fit."""

    exit_code = NothingFitsError.exit_code


def build_network(config: RunConfig, labels: list[str]) -> nn.Cell:
    """The pre-trained network with the run's method in it, and a new head if it classifies; the same at every call.

    Raises:
        RunFileError: no pooler though one is asked for; R-Drop without any dropout (NothingDrops).
    """
    ms.set_seed(config.train.seed)
    np.random.seed(config.train.seed)
    # PyNative mode queues operators for a device; on a CPU the queue costs up to 4 ms each
    ms.set_context(mode=_MODES[config.train.mode], pynative_synchronize=_compat.device_target() == "CPU")
    network = load_network(config, labels)
    if config.method.name != "full":
        heads = () if family_of(config.model.path).task == "language" else ("classifier",)
        whole = tuple(dict.fromkeys([*config.method.saved_whole, *heads]))
        network = inject(network, method_config(config.method, modules_to_save=whole))
    if config.train.r_drop_alpha and not dropouts(network):
        own = "" if config.method.name == "full" else ", or the method's own (method.dropout=0.1 where it has one)"
        raise NothingDrops(
            "train.r_drop_alpha compares two passes with different dropout, but this network has none and they would "
            f"be equal: set model.dropout=0.1{own}."
        )
    return accelerate(network)


def load_network(config: RunConfig, labels: list[str]) -> nn.Cell:
    """The pre-trained network of a run, with a new head if it classifies.

    Raises:
        RunFileError: no pooler though one is asked for.
    """
    family, path = family_of(config.model.path), config.model.path
    changes = {}
    if config.model.dropout is not None:
        names = [entry.name for entry in dataclasses.fields(family.config) if "drop" in entry.name]
        changes = dict.fromkeys(names, config.model.dropout)
    if family.task == "language":
        return family.network.from_pretrained(path, **changes)[0]
    network, report = family.network.from_pretrained(path, len(labels), config.model.pooling, **changes)
    if config.model.pooling == "pooler" and any("pooler" in name for name in report.missing):
        raise RunFileError(f"The model in {path} has no pooler: use model.pooling=mean.")
    return network


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, whatever the working directory will be."""
    model = config.model.model_copy(update={"path": os.path.abspath(config.model.path)})
    files = {key: os.path.abspath(path) for key in ("train", "test") if (path := getattr(config.data, key)) is not None}
    data = config.data.model_copy(update=files)
    output = config.output.model_copy(update={"directory": os.path.abspath(config.output.directory)})
    return config.model_copy(update={"model": model, "data": data, "output": output})


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
        The report: scores before and after, trainable share, sizes, seconds, peak memory (of several processes the
        largest one's). `static_memory_bytes` is
        of the weights and the optimizer's state, `seconds_per_step` the median without the first step, which compiles.

    Raises:
        RunFileError: the output directory holds a run, and neither `resume` nor `overwrite` is given; or another run
            writes into it at this moment.
        DataError, PretrainedFilesError: the inputs cannot be used.
        output_directory.CannotWrite: the output directory takes no more, for want of room for instance.
        output_directory.OutOfMemory: the machine's memory did not suffice.
        Interrupted, Diverged, CannotResume: see :meth:`mindpet.train.fit.Fit.run`.
    """
    with output_directory.enough_memory(Path(config.output.directory)):
        return _finetune(config, reporter or Reporter(), resume, overwrite)


def _finetune(config: RunConfig, reporter: Reporter, resume: bool, overwrite: bool) -> dict[str, Any]:
    config = with_rate(with_absolute_paths(config))
    directory = Path(config.output.directory)
    output_directory.check(config, directory, resume, overwrite)
    if config.parallel.processes > 1 and not launched():
        prepare(config, Reporter())  # what is wrong with the data is said at once, not by each process
        return launch(config, reporter, resume, overwrite)
    begun = time.monotonic()
    group = join()
    if group.size > config.train.batch_size:
        raise RunFileError(f"train.batch_size={config.train.batch_size} is less than a row for {group.size} processes.")
    prepared = prepare(config, reporter)
    network = build_network(config, prepared.labels)
    if starts_from_text(config) and not resume:
        columns = prepared.train.columns
        start_prefix(network, columns["input_ids"][:-1][columns["attention_mask"][:-1] != 0])
    trainable = sum(parameter.size for parameter in network.trainable_params())
    total = count_parameters(network)
    weights = sum(parameter.size * parameter.itemsize for parameter in network.get_parameters())
    reporter.message(
        f"{config.method.name} on {config.model.path}: {trainable:,} of {total:,} parameters train "
        f"({trainable / total:.2%})." + (" Compiling takes 5 to 60 seconds." if config.train.mode == "graph" else "")
    )
    rows = prepared.train, prepared.test
    scores = scorer(network, prepared.task, group)
    fit = Fit(network, config.train, peak_learning_rate(config), *rows, directory, scores, reporter, group=group)
    group.wait()  # all have looked at the directory
    with ExitStack() as held:
        output_directory.enter(held, config, directory, resume, overwrite, group)
        progress, before, records = _fit(fit, config, prepared, resume, trainable / total)
        peak = group.gather(np.array([peak_memory_mib()])).max()
        if not group.leads:
            group.wait()
            return _files.read_json(directory / "report.json")
        scored = [record for record in records if "evaluation_loss" in record]
        kept = progress.best_step if config.train.keep_best and progress.best_step else progress.step
        after = next((record for record in reversed(scored) if record["step"] == kept), scored[-1])
        elapsed = fit.earlier_seconds + time.monotonic() - begun
        report = {
            "method": config.method.name,
            "before": before,
            "after": {key: after[key] for key in before},
            "step": progress.step,
            "kept_step": kept,
            "task": prepared.task,
            "rows": {"train": prepared.train.count, "test": prepared.test.count},
            "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
            "processes": group.size,
            "delta_bytes": size_of(directory / "delta"),
            "model_bytes": size_of(Path(config.model.path)),
            "static_memory_bytes": weights + fit.state_bytes,
            "seconds_per_step": _usual_seconds(records),
            "seconds": {"training": round(progress.seconds, 1), "whole": round(elapsed, 1)},
            "peak_memory_mib": round(float(peak)),
        }
        if prepared.task == "language":
            report["tokens"] = {"train": prepared.train.labelled, "test": prepared.test.labelled}
        _files.write_json(directory / "report.json", report)
        group.wait()
        return report


def _fit(
    fit: Fit, config: RunConfig, prepared: Prepared, resume: bool, share: float
) -> tuple[Progress, dict[str, float], list[dict[str, Any]]]:
    """Train. Returns how far it got, the scores before, and the records of the metrics (of the leading process)."""
    directory, leads = fit.directory, fit.group.leads
    if not resume:
        if leads:
            output_directory.begin(directory, prepared)
        before = fit.evaluate().as_record()
        if leads:
            _files.write_json(directory / "before.json", before)
            _files.write_text(directory / "run.yaml", as_yaml(config))
    else:
        before = _files.read_json(directory / "before.json", CannotResume)

    def draw() -> list[dict[str, Any]]:
        records = read_metrics(directory / "metrics.jsonl") if leads else []
        if records:
            draw_curve(records, directory / "curve.png", _title(config, share))
        return records

    try:
        progress = fit.run(resume)
    except BaseException as error:
        with suppress(Exception):  # the run's own error is the one to tell
            draw()
        if isinstance(error, (Interrupted, Diverged)):
            fit.group.wait()  # the first process has still to draw
        raise
    return progress, before, draw()


def read_run(directory: Path, overrides: list[str] | None = None) -> RunConfig:
    """The configuration of a run that has a delta.

    Raises:
        RunFileError: not the directory of a run, or no delta yet.
    """
    if not (directory / "run.yaml").is_file():
        raise RunFileError(f"{directory} is not the directory of a run: it has no run.yaml.")
    if not (directory / "delta" / "delta.safetensors").is_file():
        raise RunFileError(f"{directory} has no delta yet: finish the run with mindpet finetune --resume.")
    return load_run(directory / "run.yaml", overrides)


def load_tuned(directory: str | Path, overrides: list[str] | None = None) -> tuple[RunConfig, nn.Cell, list[str]]:
    """A finished run: its configuration, its network with the delta in it, the labels of a classifier.

    Raises:
        RunFileError: not the directory of a run.
    """
    directory = Path(directory)
    config = read_run(directory, overrides)
    language = family_of(config.model.path).task == "language"
    labels = [] if language else _files.read_json(directory / "labels.json", RunFileError)
    network = build_network(config, labels)
    load_delta(network, directory / "delta")
    network.set_train(False)
    return config, network, labels


def unfinished(directory: str | Path) -> str:
    """A sentence on a run that has a delta but did not end, or nothing."""
    directory = Path(directory)
    if (directory / "report.json").is_file() or not (directory / "delta" / "delta.safetensors").is_file():
        return ""
    return (
        f"The run in {directory} is not finished; its best delta so far is used. Go on with mindpet finetune --resume."
    )


def evaluate(
    directory: str | Path, overrides: list[str] | None = None, reporter: Reporter | None = None
) -> tuple[Scores | LanguageScores, list[str]]:
    """Scores of a finished run on its held-out rows, or on ``data.test=FILE``; and its labels.

    Raises:
        DataError: the data has changed, so that its held-out rows are not known any more.
    """
    config, network, labels = load_tuned(directory, overrides)
    pretrained = open_model(config)
    rows = held_out(config, pretrained, labels, reporter or Reporter())
    known = _files.read_json(Path(directory) / "data.json", RunFileError).get("held_out")
    if config.data.test is None and rows.digest() != known:
        raise DataError(
            f"{config.data.train} has changed since the run, so which rows were held out is not known any more: name a "
            "file with data.test=FILE."
        )
    return scorer(network, pretrained.family.task)(rows, config.train.batch_size), labels


def infer(directory: str | Path, texts: list[str], overrides: list[str] | None = None) -> list[dict[str, float]]:
    """For each text, the probability of each label, the most probable first.

    A run on pairs (``data.text_pair``) takes the two texts with a tab between them.

    Raises:
        RunFileError: not the directory of a finished run, or of a language model's.
    """
    if family_of(read_run(Path(directory), overrides).model.path).task == "language":
        raise RunFileError(f"{directory} holds a language model, which does not classify: mindpet generate {directory}")
    config, network, labels = load_tuned(directory, overrides)
    inputs: list[Any] = list(texts)
    if config.data.text_pair:
        inputs = [tuple(text.split("\t")) for text in texts]
        wrong = next((text for text, pair in zip(texts, inputs) if len(pair) != 2), None)
        if wrong is not None:
            raise DataError(f"This run is on pairs of texts: put a tab between the two, unlike in {wrong[:60]!r}.")
    tokenizer, rows = open_pretrained(config.model.path).tokenizer(), Rows(inputs, [labels[0]] * len(inputs))
    encoded = encode(tokenizer, rows, labels, config.data.max_length)
    chances = probabilities(predict_logits(network, encoded, min(config.train.batch_size, len(inputs))))
    return [{labels[index]: float(row[index]) for index in np.argsort(-row)} for row in chances]


def _usual_seconds(records: list[dict[str, Any]]) -> float:
    """The median over the steps, without the first, which compiles, if there are others."""
    seconds = [record["seconds"] for record in records if "seconds" in record]
    return statistics.median(seconds[1:] or seconds)


def _title(config: RunConfig, share: float) -> str:
    return f"{config.method.name} on {Path(config.model.path).name}: {share:.2%} of the parameters train"
