"""The training loop: steps, evaluations, saves, and going on where a run stopped."""

import hashlib
import json
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet import _files
from mindpet.graph.deltas import delta_parameters, save_delta
from mindpet.graph.optimizers import grouped, rate_factors, wrap_optimizer
from mindpet.kernels import accelerate
from mindpet.parallel.group import ALONE, Group
from mindpet.train.compiled import compile_once
from mindpet.train.config import TrainSection
from mindpet.train.data import Encoded
from mindpet.train.dropout import DropoutKeys
from mindpet.train.metrics import LanguageScores, Scorer, Scores
from mindpet.train.processes import on_signals
from mindpet.train.step import AccumulateStep, AppliedStep, SummedLoss, TrainStep

CHECKPOINT = "checkpoint.safetensors"


class Interrupted(RuntimeError):
    """The run was asked to stop; everything up to the present step is saved."""

    exit_code = 130


class Diverged(RuntimeError):
    """The loss is not a finite number any more."""


class CannotResume(RuntimeError):
    """There is nothing to go on from, or it belongs to another run."""

    exit_code = 2


class Reporter:
    """Is told what happens. This one says nothing; the command line's draws a progress bar."""

    def start(self, done: int, total: int) -> None:
        """Training begins, `done` of `total` steps are behind."""

    def step(self, record: dict[str, Any]) -> None:
        """A step is done: step, epoch, loss, learning_rate, gradient_norm, samples_per_second."""

    def evaluation(self, record: dict[str, Any], best: bool) -> None:
        """The held-out rows were scored: step, evaluation_loss, and accuracy and macro_f1, or perplexity and
        token_accuracy.
        """

    def message(self, text: str) -> None:
        """Anything else worth a line."""

    def stop(self) -> None:
        """Training is over, well or not."""


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: optimizer steps done.
        epoch: the pass it is in.
        batch: batches done in that pass.
        forward: forward passes done, which numbers the dropout masks.
        best: merit of the best evaluation so far, see :mod:`mindpet.train.metrics`.
        best_step: when it was.
        waited: evaluations since then.
        seconds: time spent training.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    forward: int = 0
    best: list[float] | None = None
    best_step: int = 0
    waited: int = 0
    seconds: float = 0.0


def learning_rates(config: TrainSection, peak: float, total: int) -> list[float]:
    """The rate of each step: up linearly over the warm-up, then as `schedule` says.

    >>> from mindpet.train.config import TrainSection
    >>> [round(rate, 2) for rate in learning_rates(TrainSection(warmup=2), 1.0, 6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warm = int(config.warmup) if config.warmup >= 1 else round(config.warmup * total)
    rates = []
    for step in range(total):
        done = (step - warm) / max(1, total - warm)
        if step < warm:
            factor = (step + 1) / warm
        elif config.schedule == "linear":
            factor = 1.0 - done
        elif config.schedule == "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * done))
        else:
            factor = 1.0
        rates.append(peak * factor)
    return rates


def build_optimizer(
    config: TrainSection,
    parameters: list[Parameter],
    rates: list[float],
    factors: Mapping[str, float] | None = None,
) -> nn.Optimizer:
    """The optimizer of the run file; biases and norms are not decayed, and `factors` of the rates are by name."""
    groups: Any = parameters
    rate = Tensor(np.array(rates, np.float32))
    if config.weight_decay or factors:
        groups = [
            {"params": group, "weight_decay": decay} | ({} if factor == 1 else {"lr": rate * factor})
            for (factor, decay), group in grouped(parameters, factors or {}, config.weight_decay).items()
        ] + [{"order_params": parameters}]
    if config.optimizer == "sgd":
        return nn.Momentum(groups, rate, momentum=0.9)
    if config.optimizer == "adamw":
        return nn.AdamWeightDecay(groups, rate)
    return nn.Adam(groups, rate)


class Fit:
    """Trains a network on encoded rows and keeps everything in one directory.

    Args:
        network: with its trainable parameters chosen; takes the columns of the rows but the last, the labels.
        config: section ``train`` of the run file.
        peak_rate: highest learning rate.
        train: rows to train on.
        test: rows held out.
        directory: where metrics, checkpoint and delta go.
        scorer: scores the network on the held-out rows.
        reporter: is told what happens.
        save: writes the delta of the best evaluation; given the network and a directory.
        group: the processes that train together; the first of them writes and reports.
    """

    def __init__(
        self,
        network: nn.Cell,
        config: TrainSection,
        peak_rate: float,
        train: Encoded,
        test: Encoded,
        directory: Path,
        scorer: Scorer,
        reporter: Reporter | None = None,
        save: Callable[[nn.Cell, Path], None] = partial(save_delta, hash_weights=True),  # noqa: B008
        group: Group = ALONE,
    ):
        self.network, self.config, self.train, self.test = network, config, train, test
        self.directory, self.reporter, self.save = directory, reporter or Reporter(), save
        self.scorer, self.group = scorer, group
        self.tokens = (train.columns["attention_mask"] > 0).sum(1)  # in each row
        self.batches = -(-train.count // config.batch_size)
        self.steps_per_epoch = -(-self.batches // config.accumulate)
        self.total = config.max_steps or self.steps_per_epoch * config.epochs
        self.rates = learning_rates(config, peak_rate, self.total)
        self.keys = DropoutKeys(network, config.seed, config.batch_size, group)
        parameters = list(network.trainable_params())
        inner = build_optimizer(config, parameters, self.rates, rate_factors(network))
        self.optimizer = wrap_optimizer(network, inner, self.total)
        loss = accelerate(SummedLoss(network, config.r_drop_alpha))
        if config.accumulate == 1:
            self.one_step = TrainStep(loss, self.optimizer, config.clip_norm, group.size)
        else:
            self.accumulate = AccumulateStep(loss, self.optimizer)
            self.apply = AppliedStep(self.accumulate, self.optimizer, config.clip_norm, group.size)
        self.progress, self.saved_step = Progress(), 0
        self.earlier_seconds = 0.0  # of training, before this run went on
        self.digest = f"{train.digest()} {test.digest()}"
        self._stop: str | None = None

    def run(self, resume: bool = False) -> Progress:
        """Train until the steps are done, early stopping says so, or somebody interrupts.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after the present step was saved.
            Diverged: the loss is not finite; the last save is left as it was.
            CannotResume: `resume` without a checkpoint, or with one that does not fit.
        """
        metrics = self.directory / "metrics.jsonl"
        if resume:
            self._restore()
            kept = [line for line in read_metrics(metrics) if line["step"] <= self.progress.step]
            self.group.wait()  # until all have read it
        if self.group.leads:
            _files.write_text(metrics, "".join(json.dumps(line) + "\n" for line in kept) if resume else "")
        if not resume:
            self._save()  # from here on a kill can be resumed
        if self.group.size > 1:
            self.group.require_same(self._trained_digest(), "model or seed")
        try:
            place = metrics if self.group.leads else os.devnull
            with _stop_on_signals(self), open(place, "a", encoding="utf-8") as log:
                self.reporter.start(self.progress.step, self.total)
                for record in self._steps(log):
                    self.reporter.step(record)
        finally:
            self.reporter.stop()
        if self.group.leads and not (self.config.keep_best and self.progress.best_step):
            self.save(self.network, self.directory / "delta")
        return self.progress

    def _steps(self, log: Any) -> Iterator[dict[str, Any]]:
        progress, config = self.progress, self.config
        while progress.step < self.total and not self._patience_is_over():
            order = np.random.default_rng([config.seed, progress.epoch, 3]).permutation(self.train.count)
            batches = self.train.batches(order, config.batch_size, progress.batch, self.group)
            self.network.set_train(True)
            begun, samples, tokens = time.monotonic(), 0, 0
            for batch in batches:
                self.keys.set_step(progress.forward)
                rows = tuple(batch.values())
                chosen = order[progress.batch * config.batch_size :][: config.batch_size]
                progress.forward += 1
                progress.batch += 1
                samples += len(chosen)
                tokens += int(self.tokens[chosen].sum())
                if config.accumulate == 1:
                    self._compile(self.one_step, *rows)
                    loss, norm = self.one_step(*rows)
                else:
                    self._compile(self.accumulate, *rows)
                    self.accumulate(*rows)
                    if progress.batch % config.accumulate and progress.batch < self.batches:
                        continue
                    self._compile(self.apply)
                    loss, norm = self.apply()
                value = float(loss)  # waits for the step
                seconds = time.monotonic() - begun
                progress.seconds += seconds
                self._require_finite(value, "loss", progress.step + 1)
                self._require_finite(float(norm), "gradient", progress.step + 1)
                record = {
                    "step": progress.step + 1,
                    "epoch": progress.epoch + 1,
                    "loss": value,
                    "learning_rate": self.rates[progress.step],
                    "gradient_norm": float(norm),
                    "seconds": round(seconds, 4),
                    "samples_per_second": round(samples / seconds, 1),
                    "tokens_per_second": round(tokens / seconds, 1),
                }
                progress.step += 1
                _log(log, record)
                yield record
                if self._after_step(log):
                    return
                begun, samples, tokens = time.monotonic(), 0, 0
            progress.epoch, progress.batch = progress.epoch + 1, 0

    def _after_step(self, log: Any) -> bool:
        """Evaluate and save when it is time; whether training is to end here."""
        progress, config = self.progress, self.config
        end = progress.step == self.total
        at_epoch_end = progress.batch == self.batches
        due = progress.step % config.evaluate_every == 0 if config.evaluate_every else at_epoch_end
        enough = False
        if due or end:
            scores = self.evaluate()
            self._require_finite(scores.loss, "held-out loss", progress.step)
            best = progress.best is None or scores.merit > progress.best
            progress.waited = 0 if best else progress.waited + 1
            record = {"step": progress.step, **scores.as_record()}
            if best:
                progress.best, progress.best_step = scores.merit, progress.step
                if config.keep_best and self.group.leads:
                    self.save(self.network, self.directory / "delta")
            _log(log, record)
            self.reporter.evaluation(record, best)
            enough = self._patience_is_over()
        stop = self.group.any(self._stop is not None)
        if stop or end or enough or progress.step % config.save_every == 0:
            self._save()
        if stop:
            self.group.wait()  # the first process has still to save
            raise Interrupted(
                f"Stopped after step {progress.step} of {self.total}; it is saved.\n"
                f"Go on with: mindpet finetune {shlex.quote(str(self.directory / 'run.yaml'))} --resume"
            )
        if enough and not end:
            self.reporter.message(
                f"Early stopping: nothing better than step {progress.best_step} in {progress.waited} evaluations."
            )
        return end or enough

    def _patience_is_over(self) -> bool:
        return self.config.early_stopping is not None and self.progress.waited >= self.config.early_stopping

    def _require_finite(self, value: float, name: str, step: int) -> None:
        if not math.isfinite(value):
            raise Diverged(
                f"The {name} became {value} at step {step}. The save of step {self.saved_step} is intact. Try a lower "
                f"train.learning_rate than {max(self.rates):g}, a longer train.warmup, or train.clip_norm=1."
            )

    def evaluate(self) -> Scores | LanguageScores:
        """Scores on the held-out rows."""
        scores = self.scorer(self.test, self.config.batch_size)
        self.network.set_train(True)
        return scores

    @property
    def state_bytes(self) -> int:
        """Of what the optimizer keeps: Adam's two moments, mostly."""
        return sum(p.size * p.itemsize for name, p in self._state().items() if name.startswith("optimizer/"))

    def _state(self) -> dict[str, Parameter]:
        trained = {f"network/{parameter.name}": parameter for parameter in self._tuned()}
        known = {id(parameter) for parameter in trained.values()}
        own = {f"optimizer/{p.name}": p for p in self.optimizer.get_parameters() if id(p) not in known}
        return {**trained, **own}

    def _tuned(self) -> list[Parameter]:
        """What trains, and what the method added that does not."""
        trained = list(self.optimizer.parameters)
        known = {id(parameter) for parameter in trained}
        return trained + [p for p in delta_parameters(self.network) if id(p) not in known]

    def _trained_digest(self) -> str:
        total = hashlib.sha256(self.digest.encode())
        for parameter in self._tuned():
            total.update(parameter.asnumpy().tobytes())
        return total.hexdigest()

    def _save(self) -> None:
        if self.group.leads:
            tensors = {name: parameter.asnumpy() for name, parameter in self._state().items()}
            state = {**asdict(self.progress), "total": self.total, "data": self.digest}
            _files.write_tensors(self.directory / CHECKPOINT, tensors, {"state": json.dumps(state)})
        self.saved_step = self.progress.step

    def _restore(self) -> None:
        path = self.directory / CHECKPOINT
        if not path.is_file():
            raise CannotResume(f"There is no {path} to go on from: no step was saved before the run stopped.")
        anew = "Begin anew with --overwrite."
        tensors, metadata = _files.read_tensors(path, lambda what: CannotResume(f"{what} {anew}"))
        try:
            state = _files.parse_json(metadata["state"])
            total, data = state.pop("total"), state.pop("data")
            if isinstance(state["best"], float):  # of a run before a loss decided between equal accuracies
                state["best"] = [state["best"]]
            progress = Progress(**state)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CannotResume(f"{path} cannot be read: {error}. {anew}") from error
        here = self._state()
        differ = sorted(tensors.keys() ^ here.keys())
        # Adam's powers of beta are vectors of one number at first and numbers after a step: sizes are compared
        differ += [name for name in tensors.keys() & here.keys() if tensors[name].size != here[name].size]
        if differ:
            raise CannotResume(f"{path} is of another network or optimizer: {', '.join(differ[:5])} do not fit.")
        if total != self.total:
            raise CannotResume(f"{path} is of a run with another number of steps.")
        if data != self.digest:
            raise CannotResume(f"The data has changed since the run in {self.directory} began.")
        for name, value in tensors.items():
            here[name].set_data(Tensor(value.reshape(here[name].shape)))
        self.progress, self.earlier_seconds = progress, progress.seconds
        self.saved_step = self.progress.step

    def _compile(self, cell: nn.Cell, *rows: Any) -> None:
        """Before a call of a step: at the first one, batches are all of one shape."""
        if compile_once(cell, *rows) and rows:  # of the two graphs of an accumulated step the large one
            self.reporter.message("The step was compiled by an earlier run.")

    def stop(self, reason: str) -> None:
        """Ask the loop to save and end after the present step."""
        self._stop = reason


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(_files.parse_json(line))
            except ValueError:
                break
    return records


def _log(log: Any, record: dict[str, Any]) -> None:
    log.write(json.dumps(record) + "\n")
    log.flush()


def _stop_on_signals(fit: Fit) -> AbstractContextManager[None]:
    """The first SIGINT or SIGTERM ends the run after its present step; the second ends it at once."""

    def handle(number: int, before: dict[int, Any]) -> None:
        signal.signal(number, before[number])
        fit.stop(signal.Signals(number).name)
        fit.reporter.message("Finishing the present step, then saving...")

    return on_signals(handle)
