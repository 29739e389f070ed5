"""What can be done around a run: look at a network before tuning it, and take the result elsewhere."""

import dataclasses
import json
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Any

from mindspore import nn

from mindpet import _checks, _files
from mindpet.delta.method import Method
from mindpet.delta.registry import METHODS, method_named, method_of
from mindpet.graph.deltas import load_delta, read_delta, save_delta
from mindpet.graph.inject import count_parameters, inject, injections
from mindpet.graph.merge import merge_and_eject
from mindpet.interop.hf_peft import load_peft, peft_kind, save_peft
from mindpet.models.loading import save_tensors
from mindpet.models.pretrained import Pretrained, family_of, open_pretrained
from mindpet.train.config import MethodSection, RunFileError, load_run, method_config, read_overrides
from mindpet.train.counters import COUNTERS
from mindpet.train.run import load_tuned, unfinished
from mindpet.train.summary import summarise
from mindpet.train.summary_table import per_cent


@dataclass(frozen=True)
class Inspection:
    """What tuning a network would mean.

    Attributes:
        method: name of the method.
        adapted: path of each adapted cell to a word on it.
        trained: what else trains: path to number of parameters.
        trainable: parameters that train.
        total: all parameters, the delta included.
        bytes_of_weights: of all parameters.
        bytes_of_training: of gradients and Adam's two moments of what trains.
        left: path of each dense layer that is not adapted.
    """

    method: str
    adapted: dict[str, str]
    trained: dict[str, int]
    trainable: int
    total: int
    bytes_of_weights: int
    bytes_of_training: int
    left: list[str]


def open_network(source: str, labels: int = 2) -> nn.Cell:
    """A network from pre-trained weights, or from ``package.module:factory``, which is called.

    Args:
        source: a directory of weights, a file of them, or a factory.
        labels: classes of a classifier's new head.

    Raises:
        RunFileError: none of them; the module or the factory is not there, or gives no Cell.
    """
    if os.path.exists(source):
        family = family_of(source)
        return family.network.from_pretrained(source, *([labels] if heads_of(source) else []))[0]
    module, colon, factory = source.partition(":")
    if not colon or not factory.isidentifier():
        raise RunFileError(f"{source!r} is neither a run file, nor a model, nor package.module:factory.")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        make = getattr(import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise RunFileError(f"{source!r} cannot be called: {error}") from error
    finally:
        sys.path.remove(here)
    network = make()
    if not isinstance(network, nn.Cell):
        raise RunFileError(f"{source!r} gives {_checks.shown(network)}, not a mindspore.nn.Cell.")
    return network


def heads_of(source: str) -> list[str]:
    """The cells that are new, and train whole, in a network from `source`: a classifier's head."""
    return ["classifier"] if os.path.exists(source) and family_of(source).task == "classification" else []


def inspect(source: str, overrides: list[str] | None = None) -> Inspection:
    """What a run file's method, or that of ``method.KEY=VALUE`` overrides, would do to a network.

    Args:
        source: a run file, a directory or file of weights, or ``package.module:factory``.
        overrides: as for a run; without a run file only the section ``method`` matters.
    """
    if source.endswith((".yaml", ".yml")):
        config = load_run(source, overrides)
        source, section = config.model.path, config.method
    else:
        section = MethodSection.model_validate(read_overrides(overrides or []).get("method", {}))
    network, heads = open_network(source), heads_of(source)
    dense = list(_dense_layers(network))
    if section.name != "full":
        inject(network, method_config(section, modules_to_save=[*dict.fromkeys([*section.saved_whole, *heads])]))
    return _describe(network, section.name, [path for path in dense if not path.startswith(tuple(heads) or "\0")])


def _describe(network: nn.Cell, method: str, dense: list[str]) -> Inspection:
    """What an injected network holds; of the paths `dense`, those that are not adapted are left."""
    adapted = {
        path: f"{type(cell).__name__}({cell.extend_repr()})"
        for one in injections(network)
        for path, cell in one.adapted.items()
    }
    parameters = list(network.get_parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return Inspection(
        method=method,
        adapted=adapted,
        trained={p.name: p.size for p in trained if not any(p.name.startswith(f"{path}.") for path in adapted)},
        trainable=sum(p.size for p in trained),
        total=count_parameters(network),
        bytes_of_weights=sum(p.size * p.itemsize for p in parameters),
        bytes_of_training=sum(3 * p.size * p.itemsize for p in trained),
        left=[path for path in dense if path not in adapted],
    )


@dataclass(frozen=True)
class Tuned:
    """A network with a delta in it, and what is known of where it comes from.

    Attributes:
        network: with the delta, not merged.
        model: path of the base model, or None for a factory's network.
        labels: of the head, in order; empty when unknown, and for a language model.
        pooling: what the head sees, ``mean`` or ``pooler``; empty when unknown, and for a language model.
    """

    network: nn.Cell
    model: str | None
    labels: list[str]
    pooling: str


def open_tuned(source: str, delta: str | Path | None = None) -> Tuned:
    """The network of a finished run (its directory or its run file), or `delta` on a model directory or a factory.

    Raises:
        RunFileError: no such run, or one that is not finished.
        DeltaFileError: the delta does not fit.
    """
    if delta is not None:
        head = read_delta(delta)[2].get("classifier.weight")
        network = load_delta(open_network(source, len(head) if head is not None else 2), delta)
        return Tuned(network, source if os.path.exists(source) else None, [], "")
    directory = Path(load_run(source).output.directory if source.endswith((".yaml", ".yml")) else source)
    if unfinished(directory) and (directory / "run.yaml").is_file():
        raise RunFileError(f"The run in {directory} is not finished: go on with mindpet finetune --resume.")
    config, network, labels = load_tuned(directory)
    return Tuned(network, config.model.path, labels, config.model.pooling if labels else "")


def merge_into(source: str, target: str | Path, delta: str | Path | None = None) -> Tuned:
    """Write the network of :func:`open_tuned` with the delta in its weights.

    A model becomes a directory in Hugging Face's layout, whatever file it came from; a factory's network becomes
    ``model.safetensors`` alone.

    Raises:
        RunFileError: `target` holds a model already; what :func:`open_tuned` raises.
        ValueError: the method cannot merge.
    """
    target = Path(target)
    _require_empty(target, "config.json", "model.safetensors", "adapter_config.json")
    tuned = open_tuned(source, delta)
    if injections(tuned.network):
        merge_and_eject(tuned.network)
    save_tensors(tuned.network, target)
    if tuned.model is not None:
        _write_model_files(tuned, target)
    return tuned


def _write_model_files(tuned: Tuned, target: Path) -> None:
    """``config.json`` and the tokenizer's files beside merged weights."""
    base, pretrained = Path(tuned.model or ""), open_pretrained(tuned.model or "")
    names = {str(index): label for index, label in enumerate(tuned.labels)}
    head = {"id2label": names, "label2id": {label: int(index) for index, label in names.items()}} if names else {}
    pooling = {"mindpet_pooling": tuned.pooling} if tuned.pooling else {}
    kind = {"architectures": [type(tuned.network).__name__]}
    _files.write_json(target / "config.json", {**pretrained.config, **kind, **pooling, **head})
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    if not (target / "tokenizer.json").exists():
        _write_tokenizer(pretrained, target)


def _write_tokenizer(pretrained: Pretrained, target: Path) -> None:
    """The tokenizer of a model in a single file, as Hugging Face keeps it in a directory."""
    tokenizer, end = pretrained.tokenizer(), pretrained.config.get("eos_token_id")
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.id_to_token(end) if isinstance(end, int) else None,
        "chat_template": pretrained.chat_template_source(),
    }
    _files.write_text(target / "tokenizer.json", tokenizer.to_str(pretty=True))
    _files.write_json(target / "tokenizer_config.json", {key: value for key, value in content.items() if value})


def export_to(source: str, target: str | Path, delta: str | Path | None = None) -> Tuned:
    """Write the delta of :func:`open_tuned` as a directory that Hugging Face PEFT loads."""
    _require_empty(target, "adapter_config.json", "config.json")
    tuned = open_tuned(source, delta)
    kinds = {"classification": "SEQ_CLS", "language": "CAUSAL_LM"}
    kind = kinds[family_of(tuned.model).task] if tuned.model else None
    save_peft(tuned.network, target, base_model=tuned.model, task_type=kind)
    return tuned


def import_adapter(adapter: str | Path, model: str, target: str | Path, labels: int | None = None) -> Inspection:
    """An adapter of Hugging Face PEFT on a model directory, saved as a delta of ours.

    Args:
        adapter: directory with ``adapter_config.json``.
        model: path of the base model.
        target: directory to write the delta to.
        labels: classes of a classifier's head; those of the adapter's own head when None.
    """
    _require_empty(target, "delta.safetensors", "config.json")
    network = open_network(model, labels or _labels_of(Path(adapter)))
    load_peft(network, adapter)
    save_delta(network, target)
    return _describe(network, method_of(injections(network)[0].config).name, [])


def _require_empty(target: str | Path, *names: str) -> None:
    there = [name for name in names if (Path(target) / name).exists()]
    if there:
        raise RunFileError(f"{target} has a {there[0]} already: choose another directory.")


def methods_table() -> list[dict[str, str]]:
    """One row for each method of the registry, for people to choose from.

    What trains is counted with the usual options on BERT-base-Chinese; of `trainable_tokens`, one row. The measured
    figures are of MiniLM: docs/methods/measured.md.
    """
    figures = measured()
    none = dict.fromkeys(figures["full"], "")
    return [_method_row(method, figures.get(method.name, none)) for method in METHODS.values()]


def measured() -> dict[str, dict[str, str]]:
    """Memory, time and accuracy of each method and of full fine-tuning, as benchmarks/parity.py put them together.

    >>> sorted(measured()["full"])
    ['R8 accuracy (%)', 'static MiB', 'step over LoRA']
    """
    return json.loads(Path(__file__).with_name("measured.json").read_text("utf-8"))


def by_whom(paper: str) -> str:
    """The authors and the year of a paper.

    >>> by_whom("Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685")
    'Hu et al. 2021'
    """
    found = re.match(r".*? \d{4}", paper)
    return found.group() if found else paper


def method_options(name: str) -> dict[str, tuple[str, str]]:
    """The options of a method: name to (default as a run file has it, meaning); for `targets` those are the usual ones.

    Raises:
        RunFileError: there is no such method.
    """
    try:
        method = method_named(name)
    except ValueError as error:
        raise RunFileError(str(error)) from error
    config, meanings = method.config, dict[str, str]()
    for kind in reversed(config.__mro__):
        text = cleandoc(kind.__doc__ or "").partition("Attributes:")[2]
        for entry in re.split(r"\n    (?=\w+: )", text)[1:]:
            option, _, meaning = entry.partition(": ")
            meanings[option] = " ".join(meaning.split())
    found = {}
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = (_in_a_run_file(default), meanings.get(field.name, ""))
    if method.adapt:
        found["targets"] = (_in_a_run_file(method.targets), found["targets"][1])
    return found


def _in_a_run_file(default: Any) -> str:
    """A default as one would write it; nothing for None.

    >>> _in_a_run_file(("*.query",)), _in_a_run_file(True), _in_a_run_file(0.1), _in_a_run_file("gelu")
    ('["*.query"]', 'true', '0.1', 'gelu')
    """
    if default is None or default is dataclasses.MISSING:
        return ""
    return default if isinstance(default, str) else json.dumps(default)


def _method_row(method: Method, figures: dict[str, str]) -> dict[str, str]:
    kinds = {kind.__name__.removesuffix("2d").removesuffix("1d") for kind in method.adapt}
    trains = ""
    if method.name in COUNTERS:
        counted = summarise(_EXAMPLE, method.name, _EXAMPLE_OPTIONS.get(method.name))
        trains = f"{counted.delta:,} ({per_cent(counted.delta / counted.base)})"
    layers = [make.__self__ for make in method.adapt.values() if hasattr(make, "__self__")]
    return {
        "method": method.name,
        "trains on BERT-base": trains,
        "adapts": ", ".join(sorted(kinds)) or "nothing: it selects",
        "merges": "yes" if any(hasattr(layer, "delta_weight") for layer in layers) else "no",
        "PEFT": peft_kind(method) or "no",
        **figures,
        "learning rate": f"{method.learning_rate:g}",
        "paper": method.paper,
    }


_EXAMPLE = "bert-base-chinese"
_EXAMPLE_OPTIONS = {"trainable_tokens": {"token_indices": (100,)}}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def _dense_layers(network: nn.Cell) -> dict[str, nn.Cell]:
    return {path: cell for path, cell in network.cells_and_names() if path and isinstance(cell, nn.Dense)}


def _labels_of(adapter: Path) -> int:
    """Rows of the head that the adapter holds, or 2."""
    from safetensors import SafetensorError, safe_open

    path = adapter / "adapter_model.safetensors"
    # what is wrong with a broken file is told when it is loaded
    with suppress(SafetensorError, OSError, IndexError), safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith("classifier.weight"):
                return file.get_slice(name).get_shape()[0]
    return 2
