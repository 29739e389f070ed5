"""Writing with a language model: a run, a model, or a model with a delta, asked in the form that it knows."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import mindspore as ms
from mindspore import nn

from mindpet import _compat
from mindpet._files import is_unicode
from mindpet.kernels import accelerate
from mindpet.models.generation import TextStream, stream_text
from mindpet.models.pretrained import ChatTemplate, Pretrained, open_pretrained
from mindpet.models.text_pieces import end_tokens
from mindpet.train.artifacts import open_network, open_tuned
from mindpet.train.config import RunConfig, RunFileError, load_run
from mindpet.train.data import DataError, read_records
from mindpet.train.language import is_plain, text_keys
from mindpet.train.run import load_tuned, read_run

Form = Literal["chat", "raw"]


@dataclass(frozen=True)
class Writer:
    """A network and what is needed to ask it.

    Attributes:
        read: reads its weights, when the network is first asked for: mistakes in a prompt are told before.
        tokenizer: its tokenizer.
        template: how it marks turns, or None.
        form: ``chat`` when a prompt is a user's turn by default, ``raw`` when it is a beginning.
        why: the reason of that.
        ends: tokens that end its texts and turns.
    """

    read: Callable[[], nn.Cell]
    tokenizer: Any
    template: ChatTemplate | None
    form: Form
    why: str
    ends: list[int]

    @cached_property
    def network(self) -> nn.Cell:
        """The network, on evaluation."""
        return self.read()

    def tokens_of(self, prompt: str, form: Form | None = None, system: str | None = None) -> list[int]:
        """The tokens to continue, laid out as in training.

        Args:
            prompt: what the user says, or the beginning of a text.
            form: instead of the writer's own.
            system: a turn of the system before the user's.

        Raises:
            ValueError: an empty prompt, one that is not Unicode; chat without a template; `system` without chat.
        """
        form = form or self.form
        problems = []
        if not prompt or not is_unicode(prompt + (system or "")):
            problems.append("the prompt is empty" if not prompt else "the prompt is not UTF-8")
        if form == "chat" and self.template is None:
            problems.append("the model has no chat template: leave --chat away")
        if form == "raw" and system is not None:
            problems.append("a system text belongs to a conversation, but the prompt is continued as it is (raw)")
        if problems:
            raise ValueError(f"This prompt cannot be used: {'; '.join(problems)}.")
        self.tokenizer.no_truncation()
        if form == "raw" or self.template is None:
            return self.tokenizer.encode(prompt).ids
        turns = [("system", system)] if system is not None else []
        text = "".join(
            self.template.start(role) + content + self.template.end(role)
            for role, content in [*turns, ("user", prompt)]
        )
        text = self.template.begin + text + self.template.start("assistant")
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def write(self, tokens: list[int], **options: Any) -> TextStream:
        """The continuation of :meth:`tokens_of`; options as for :func:`~mindpet.models.generation.stream_text`."""
        return stream_text(self.network, self.tokenizer, tokens, stop_tokens=self.ends, **options)


def open_writer(source: str, delta: str | Path | None = None, mode: str = "pynative") -> Writer:
    """The language model of a run, or at a path, with `delta` in it if one is given.

    Args:
        source: the directory of a run or its run file, a directory of a model, or a ``.gguf`` file.
        delta: a directory; a run has its own.
        mode: ``pynative`` or ``graph``.

    Raises:
        RunFileError: no such run; a run and a delta; a classifier.
        PretrainedFilesError, DeltaFileError: files are missing or do not fit.
    """
    if source.endswith((".yaml", ".yml")):
        source = load_run(source).output.directory
    there = [name for name in ("run.yaml", "config.json") if os.path.isfile(os.path.join(source, name))]
    if os.path.isdir(source) and not there:
        raise RunFileError(f"{source} holds neither a run nor a model: it has no run.yaml and no config.json.")
    if "run.yaml" in there:
        if delta is not None:
            raise RunFileError(f"{source} is a run, which has its own delta: give its model with --delta, or no delta.")
        config = read_run(Path(source))
        pretrained = _language_model(config.model.path, source, "run")

        def read() -> nn.Cell:
            return load_tuned(source, [f"train.mode={mode}"])[1]

        form, why = _form_of_run(config, pretrained.chat_template())
    else:
        pretrained = _language_model(source, source, "model")

        def read() -> nn.Cell:
            # as for a run: without the queue, PyNative mode is faster on a CPU
            ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
            ms.set_context(pynative_synchronize=_compat.device_target() == "CPU")
            network = open_network(source) if delta is None else open_tuned(source, delta).network
            return accelerate(network).set_train(False)

        known = pretrained.chat_template() is not None
        form = "chat" if known else "raw"
        why = "the model has a chat template" if known else "the model has no chat template that is known here"
    tokenizer = pretrained.tokenizer()
    ends = end_tokens(tokenizer, pretrained.config)
    return Writer(read, tokenizer, pretrained.chat_template(), form, why, ends)


def _language_model(path: str, source: str, kind: str) -> Pretrained:
    pretrained = open_pretrained(path)
    if pretrained.family.task != "language":
        what = f"mindpet infer {source}" if kind == "run" else "mindpet finetune tunes it, mindpet infer asks it"
        raise RunFileError(f"The {kind} in {source} is a classifier, which does not write text: {what}.")
    return pretrained


def _form_of_run(config: RunConfig, template: ChatTemplate | None) -> tuple[Form, str]:
    """Conversations, prompts and responses are turns where the model has a template; other texts are plain."""
    data = config.data
    if template is None:
        return "raw", "the model has no chat template that is known here"
    if is_plain(data.train):
        return "raw", "the run was on plain text"
    record: Any = {}
    if data.messages is None and data.prompt is None and data.response is None:
        try:
            record = next(record for _, record in read_records(Path(data.train), "") if isinstance(record, dict))
        except (DataError, OSError, StopIteration):
            return "chat", "the model has a chat template, and the run's data is not there any more to say otherwise"
    if text_keys(data, record) == (data.text,):
        return "raw", "the run was on plain text"
    return "chat", "the run was on conversations"
