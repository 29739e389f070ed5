"""The run file: what it may say, where it comes from, and what is wrong with it, all problems at once."""

import difflib
import logging
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mindpet import _yaml
from mindpet._methods import MODULES

METHOD_NAMES = (*MODULES, "full")
_log = logging.getLogger("mindpet")


class RunFileError(ValueError):
    """A run file, or an override of it, is wrong; the message lists every problem."""

    exit_code = 2


Count = Annotated[int, Field(strict=True)]  # true and 3.0 are no counts


class _Loader(_yaml.Loader):
    """Safe YAML in which 1e-3 is a number, as people write it, and a key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names = [name for name, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        seen = set()
        for name in (name for name in names if isinstance(name, yaml.ScalarNode)):  # others are refused below
            key = self.construct_object(name)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", name.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelSection(_Section):
    """The network to tune."""

    path: str = Field(
        description="directory with config.json, model.safetensors and tokenizer.json; or a .gguf or e5 .bin file"
    )
    pooling: Literal["pooler", "mean"] = Field(
        "mean", description="what a classifier's head sees: the pooler's output or the mean of the tokens"
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="dropout of the network; its own when empty")


class MethodSection(BaseModel):
    """How to tune it. Further keys are the method's own, for instance rank, alpha, dropout, targets for lora."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("lora", description=f"one of {', '.join(METHOD_NAMES)}; further keys are the method's own")

    @property
    def options(self) -> dict[str, Any]:
        """The method's own keys."""
        return dict(self.model_extra or {})

    @property
    def saved_whole(self) -> list[str]:
        """What the file names under ``modules_to_save``, one pattern or several."""
        given = self.options.get("modules_to_save") or []
        return [given] if isinstance(given, str) else list(given)


class DataSection(_Section):
    """Text: JSON lines, CSV, TSV, .txt files, or one folder per label. The model decides the task."""

    train: str = Field(
        description="a .jsonl, .csv or .tsv file; a folder with one folder of .txt files per label, for a classifier; "
        "a .txt file or a folder of them, for a language model"
    )
    test: str | None = Field(
        None, description="held-out data in one of the same forms; when empty, 'holdout' is taken from 'train'"
    )
    holdout: float = Field(
        0.2,
        gt=0,
        description="how much of 'train' to hold out when 'test' is empty: a share below 1, or a number of rows; "
        "of a single .txt file its end, a share or a number of lines",
    )
    text: str = Field("text", description="key or column of the text")
    text_pair: str | None = Field(None, description="classifier: key or column of a second text, for tasks on pairs")
    label: str = Field("label", description="classifier: key or column of the label")
    prompt: str | None = Field(None, description="language model: key of the prompt, which is not learned")
    response: str | None = Field(None, description="language model: key of the response, which is")
    messages: str | None = Field(
        None, description="language model: key of a list of {role, content}; what the assistant says is learned"
    )
    packing: bool = Field(
        True, description="language model: several texts in a row of max_length tokens, unseen by each other"
    )
    max_length: Count = Field(128, ge=4, description="tokens in a row; longer texts are cut, .txt files into blocks")
    overlap: Literal["drop", "keep", "error"] = Field(
        "drop", description="what to do with training rows whose text is also held out"
    )


class TrainSection(_Section):
    """The training itself."""

    epochs: Count = Field(5, ge=1, description="passes over the training data")
    max_steps: Count | None = Field(None, ge=1, description="stop after so many steps, whatever 'epochs' says")
    batch_size: Count = Field(32, ge=1, description="samples in a forward pass, of all processes together")
    accumulate: Count = Field(
        1, ge=1, description="forward passes in a step: the gradient is the mean over all of them"
    )
    learning_rate: float | None = Field(None, gt=0, description="the method's own sensible one when empty")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="how the learning rate goes down after the warm-up"
    )
    warmup: float = Field(
        0.06, ge=0, description="steps in which it goes up: a share of all below 1, or a number of steps"
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="adam, adamw (decoupled decay, no bias correction, as in BERT), sgd (momentum 0.9)"
    )
    weight_decay: float = Field(0.0, ge=0, description="on all trained weights but biases and norms")
    clip_norm: float = Field(1.0, ge=0, description="largest norm of the whole gradient; 0 never clips")
    prefix_start: Literal["text", "random"] = Field(
        "text",
        description="language model, prefix and ptuning2: where they start, at the keys and values of the first "
        "training tokens or at random numbers",
    )
    r_drop_alpha: float = Field(
        0.0, ge=0, description="above 0: two passes a sample and the R-Drop loss with this weight"
    )
    evaluate_every: Count | None = Field(None, ge=1, description="steps between evaluations; once an epoch when empty")
    save_every: Count = Field(50, ge=1, description="steps between saves that --resume can go on from")
    early_stopping: Count | None = Field(
        None, ge=1, description="stop after so many evaluations without a better accuracy, or perplexity"
    )
    keep_best: bool = Field(True, description="keep the delta of the best evaluation rather than of the last step")
    seed: Count = Field(0, ge=0, le=2**32 - 1, description="of everything random: split, order, start, dropout")
    mode: Literal["graph", "pynative"] = Field(
        "graph", description="graph compiles first and is faster; pynative is easier to debug"
    )


class ParallelSection(_Section):
    """Several processes that train together, each on its part of every batch; the result is that of one."""

    processes: Count = Field(
        1, ge=1, description="how many; above 1 they are started on this machine. Under msrun, msrun says how many"
    )


class OutputSection(_Section):
    """Where the results go."""

    directory: str = Field(
        "runs/latest", description="run.yaml, metrics.jsonl, curve.png, report.json and the delta appear here"
    )


class CompareSection(_Section):
    """What `mindpet compare` runs; `mindpet finetune` takes no notice of it."""

    methods: list[str] = Field(
        [], description="for instance [lora, full, lora+r_drop]; the six of the user document and full when empty"
    )
    seeds: list[Count] = Field([0, 1, 2], min_length=1, description="one run of each method for each of them")
    settings: dict[str, dict[str, Any]] = Field(
        {}, description="of one method only: {lora: {method.rank: 4, train.learning_rate: 1e-3}}"
    )
    grid: list[Annotated[float, Field(gt=0)]] = Field(
        [0.3, 1.0, 3.0], min_length=1, description="what --search tries: factors of each method's learning rate"
    )
    validation: float = Field(
        0.1, gt=0, lt=1, description="share of the training rows on which --search judges a learning rate"
    )


class RunConfig(_Section):
    """A whole run file."""

    model: ModelSection
    method: MethodSection = MethodSection()
    data: DataSection
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    output: OutputSection = OutputSection()
    compare: CompareSection = CompareSection()

    @model_validator(mode="after")
    def _whole_rows(self) -> "RunConfig":
        if self.data.holdout >= 1 and self.data.holdout != int(self.data.holdout):
            raise ValueError("data.holdout must be a share below 1 or a whole number of rows")
        if self.data.messages is not None and (self.data.prompt is not None or self.data.response is not None):
            raise ValueError("data.messages goes without data.prompt and data.response: a row is one or the other")
        if self.parallel.processes > self.train.batch_size:
            raise ValueError(
                f"parallel.processes={self.parallel.processes} is more than the {self.train.batch_size} rows of a "
                "batch (train.batch_size), of which each process takes a part"
            )
        return self


def load_run(path: str | Path | None, overrides: list[str] | None = None) -> RunConfig:
    """The run that a file and ``key=value`` overrides describe: overrides go over the file, the file over defaults.

    Raises:
        RunFileError: with every problem: a file that is not there or not YAML, unknown keys with near names, values of
            the wrong kind, an override that is not ``section.key=value``.
    """
    content = _read(Path(path)) if path is not None else {}
    problems: list[str] = []
    _forget_other_method(content, overrides or ())
    _apply_overrides(content, overrides or (), problems)
    try:
        config = RunConfig.model_validate(content)
        problems += method_problems(config.method)
    except ValidationError as error:
        problems += [_in_words(entry) for entry in error.errors()]
        with suppress(ValidationError):
            problems += method_problems(MethodSection.model_validate(content.get("method", {})))
    if problems:
        where = f" in {path}" if path else ""
        raise RunFileError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''}{where}:\n  " + "\n  ".join(problems)
        )
    return config


def foreign_keys(config: RunConfig, task: str) -> list[str]:
    """The keys of a run file that say something, and concern another task than that of its model."""
    owners = {
        "classification": ("data.text_pair", "data.label", "model.pooling"),
        "language": ("data.prompt", "data.response", "data.messages", "data.packing", "train.prefix_start"),
    }
    found = []
    for name in (name for other, names in owners.items() if other != task for name in names):
        section, _, key = name.partition(".")
        fields = getattr(config, section)
        if getattr(fields, key) != type(fields).model_fields[key].default:
            found.append(name)
    return found


def read_overrides(overrides: list[str]) -> dict[str, Any]:
    """``section.key=value`` words as sections of a run file.

    Raises:
        RunFileError: a word is not of that form.
    """
    content: dict[str, Any] = {}
    problems: list[str] = []
    _apply_overrides(content, overrides, problems)
    if problems:
        raise RunFileError("\n".join(problems))
    return content


def _forget_other_method(content: dict[str, Any], overrides: Iterable[str]) -> None:
    """An override of ``method.name`` leaves nothing of the file's method: its options are not the new one's."""
    wanted = next((word.partition("=")[2] for word in overrides if word.startswith("method.name=")), None)
    section = content.get("method")
    if wanted is None or not isinstance(section, dict) or section.get("name", "lora") == wanted:
        return
    content["method"] = {}
    given = {word.partition("=")[0] for word in overrides}
    others = [str(key) for key in section if key != "name" and f"method.{key}" not in given]
    if others and wanted in METHOD_NAMES:
        of = section.get("name", "lora")
        _log.warning(
            "The file's options of %s are left out, %s has its own defaults: %s", of, wanted, ", ".join(others)
        )


def _apply_overrides(content: dict[str, Any], overrides: Iterable[str], problems: list[str]) -> None:
    for override in overrides:
        key, equals, value = override.partition("=")
        parts = key.strip().split(".")
        if not equals or len(parts) != 2 or not all(parts):
            problems.append(f"{override!r} is not section.key=value, for instance train.epochs=3")
            continue
        try:
            parsed = _yaml.parse(value, _Loader)
        except yaml.YAMLError:
            parsed = value
        section = content.setdefault(parts[0], {})
        if not isinstance(section, dict):
            problems.append(f"{parts[0]} is not a section")
            continue
        section[parts[1]] = parsed


def method_problems(section: MethodSection) -> list[str]:
    """What is wrong with the method's name or its own keys."""
    if section.name == "full":
        return [f"method.{key}: 'full' has no options of its own" for key in section.options]
    try:
        method_config(section)
    except (TypeError, ValueError) as error:
        return [f"method: {error}"]
    return []


def method_config(section: MethodSection, **more: Any) -> Any:
    """The configuration object of the section's method (not for ``full``).

    Raises:
        TypeError, ValueError: an unknown method, an unknown key, a wrong value.
    """
    import dataclasses

    from mindpet.delta.registry import METHODS, method_named

    names = {alias for method in METHODS.values() for alias in (method.name, *method.aliases)}
    if section.name.lower() not in names:
        close = difflib.get_close_matches(section.name.lower(), METHOD_NAMES, n=2)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise ValueError(
            f"name: there is no method {section.name!r}{hint}; the known ones are {', '.join(METHOD_NAMES)}"
        )
    kind = method_named(section.name).config
    known = [entry.name for entry in dataclasses.fields(kind)]
    wrong = [key for key in section.options if key not in known]
    if wrong:
        nearest = [difflib.get_close_matches(key, known, n=1) for key in wrong]
        listed = ", ".join(key + (f" (did you mean {near[0]!r}?)" if near else "") for key, near in zip(wrong, nearest))
        raise ValueError(f"'{section.name}' has no option {listed}; its options are {', '.join(known)}")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in section.options.items()}
    return kind(**{**options, **more})


def settings_of(config: RunConfig) -> dict[str, Any]:
    """All that makes two runs the same, as JSON has it."""
    return config.model_dump(mode="json", include={"model", "method", "data", "train"})


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What makes two runs different, in words."""
    before, now = settings_of(old), settings_of(new)
    return [
        f"{section}.{key}: it was {before[section].get(key)!r}, now {now[section].get(key)!r}"
        for section in before
        for key in sorted({*before[section], *now[section]})
        if before[section].get(key) != now[section].get(key)
    ]


def as_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults filled in; the section `compare` only where it says something."""
    content = config.model_dump()
    if config.compare == CompareSection():
        del content["compare"]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def template(model: str = "path/to/model", train: str = "path/to/train.jsonl") -> str:
    """A run file with every key, its default, and what it means."""
    lines = ["# A run of `mindpet finetune`. Every key may be overridden: mindpet finetune run.yaml train.epochs=3", ""]
    given = {("model", "path"): model, ("data", "train"): train}
    for name, section in RunConfig.model_fields.items():
        kind: Any = section.annotation
        lines += [f"{name}:  # {(kind.__doc__ or '').strip().splitlines()[0]}"]
        for key, field in kind.model_fields.items():
            value = given.get((name, key), None if field.is_required() else field.default)
            shown = yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()
            lines.append(f"  {key}: {'' if value is None else shown}".rstrip().ljust(34) + f"  # {field.description}")
        if name == "method":
            lines += [
                "  rank: 8".ljust(34) + "  # lora: rows of A",
                "  alpha: 16".ljust(34) + "  # lora: scale is alpha / rank",
            ]
        lines.append("")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    if os.path.isdir(path):
        raise RunFileError(f"{path} is a directory, and no run file; that of a run is {path / 'run.yaml'}.")
    if not os.path.isfile(path):
        close = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*")] if os.path.isdir(path.parent) else []
        )
        raise RunFileError(f"There is no run file {path}{'; near it: ' + ', '.join(close) if close else ''}.")
    content = _yaml.read(path, RunFileError, _Loader)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RunFileError(f"{path} must be a mapping with the sections {', '.join(RunConfig.model_fields)}.")
    # an empty section or key means its default
    return {
        key: {k: v for k, v in value.items() if v is not None}
        if isinstance(value, dict)
        else (value if value is not None else {})
        for key, value in content.items()
    }


def _in_words(entry: Any) -> str:
    where = ".".join(str(part) for part in entry["loc"]) or "the run file"
    if entry["type"] == "extra_forbidden":
        *parents, key = entry["loc"]
        model: Any = RunConfig
        for parent in parents:
            model = model.model_fields[parent].annotation
        return f"{where}: there is no such key{_near(str(key), list(model.model_fields))}"
    if entry["type"] == "missing":
        return f"{where}: is needed"
    given = repr(entry["input"])
    return f"{where}: {entry['msg'].removeprefix('Value error, ')}" + (
        f", but got {given}" if len(given) < 80 and entry["loc"] else ""
    )


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(entry) for entry in close)}?" if close else f"; known: {', '.join(known)}"
