"""Adapter directories of Hugging Face PEFT, read and written without torch.

A directory has ``adapter_config.json`` (:mod:`~mindpet.interop.peft_config`) and ``adapter_model.safetensors``: LoRA
(:mod:`~mindpet.interop.peft_lora`), prefix tuning (:mod:`~mindpet.interop.peft_prefix`), virtual tokens
(:mod:`~mindpet.interop.peft_prompts`), or a method whose record says how PEFT writes it
(:mod:`~mindpet.interop.peft_methods`); together with modules that were trained whole, under the names that they have in
the base model.
"""

import os
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from mindpet import _checks, _files
from mindpet.delta.method import Method
from mindpet.delta.registry import METHODS, method_of
from mindpet.graph.freeze_utils import names_of_parameters
from mindpet.graph.inject import eject, inject, injections
from mindpet.graph.merge import merged_cells
from mindpet.graph.targets import cells_by_path
from mindpet.interop.peft_config import config_problems
from mindpet.interop.peft_lora import WRITTEN, read_lora, write_lora
from mindpet.interop.peft_methods import method_of_kind, misfits, read_method, write_method
from mindpet.interop.peft_modules import Modules, Names
from mindpet.interop.peft_prefix import read_prefix, write_prefix
from mindpet.interop.peft_prompts import KINDS as PROMPTS
from mindpet.interop.peft_prompts import read_prompts, write_prompts
from mindpet.models.causal import CausalLanguageModel
from mindpet.models.loading import PretrainedFilesError, read_safetensors


class PeftFormatError(ValueError):
    """A directory of PEFT is missing something, broken, of another network, or holds what is not here; and the reverse:
    what a network holds cannot be said in PEFT's format.
    """


def load_peft(network: nn.Cell, directory: str | Path, names: Names | None = None) -> nn.Cell:
    """Inject what a directory of PEFT holds, and set the numbers. It can be used and trained on from there.

    The targets are the modules that the file has tensors for. Numbers are converted to the dtype of the network's
    parameters. Prefix tuning becomes P-tuning v2 without a projection, and P-tuning becomes prompt tuning; through a
    projection or an encoder that PEFT trained with, training cannot go on, since only its output is saved. A multitask
    prompt runs its first task.

    Args:
        network: the base network, untouched.
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        names: for a network whose cells do not have Hugging Face's paths: from a cell's path to a module's, as a
            function or as a mapping, whose entries also hold for the cells below.

    Returns:
        The same network.

    Raises:
        TypeError: `network` is not a Cell.
        ValueError: something was injected into `network` already.
        PeftFormatError: a file is missing or broken; a key changes the mathematics in a way that is not here (a bias on
            B and others) or is unknown and not empty; tensors are missing, unexpected or misshaped. All problems are in
            one message, and the network is unchanged.
    """
    _checks.cell("load_peft", "network", network)
    if injections(network) or merged_cells(network):
        raise ValueError("For 'load_peft', 'network' must be untouched, but something was injected into it: eject it.")
    modules, directory = Modules.of(network, names), Path(directory)
    content = _files.read_json(directory / "adapter_config.json", PeftFormatError)
    if not isinstance(content, dict):
        raise PeftFormatError(f"{directory / 'adapter_config.json'} must hold an object, but has {type(content)}.")
    tensors, problems = _read_tensors(directory), config_problems(content)
    if problems:
        raise _misfit(directory, problems)
    method = method_of_kind(content["peft_type"])
    if method is not None:
        config, values = read_method(method, content, tensors, modules, problems)
    else:
        read = {"LORA": read_lora, "PREFIX_TUNING": read_prefix}.get(content["peft_type"], read_prompts)
        config, values = read(content, tensors, modules, problems)
    if problems or config is None:
        raise _misfit(directory, problems)
    try:
        inject(network, config)
    except (ValueError, TypeError) as error:
        raise _misfit(directory, [str(error)]) from error
    if method is not None and (problems := misfits(network, method, values)):
        eject(network)
        raise _misfit(directory, problems)
    parameters = {name: parameter for parameter, known in names_of_parameters(network) for name in known}
    for path, value in values.items():
        parameter = parameters[path]
        value = np.ascontiguousarray(value.reshape(parameter.shape))
        parameter.set_data(Tensor(value).astype(parameter.dtype))
    return network


def save_peft(
    network: nn.Cell,
    directory: str | Path,
    base_model: str | None = None,
    task_type: str | None = None,
    names: Names | None = None,
) -> None:
    """Write what was injected and trained as a directory that PEFT loads.

    LoRA, and each other method that PEFT has, is written as it is, together with the biases and the modules that train
    whole; LoRA-FA and QLoRA as the LoRA that they are. Prefix-Tuning and P-Tuning v2 are written as the table of their
    prompts, with no projection, and P-tuning without its encoder. Both files appear whole;
    ``adapter_config.json`` comes last.

    Args:
        network: with LoRA layers, for instance, or a filled slot for a prefix or for prompts.
        directory: made if it is not there.
        base_model: name or path of the base model, for ``base_model_name_or_path``.
        task_type: ``"SEQ_CLS"``, ``"TOKEN_CLS"``, ``"CAUSAL_LM"`` and so on. PEFT needs one for a prefix or
            for virtual tokens, so None there means ``"SEQ_CLS"`` if a ``classifier`` or a ``score`` trains; and it
            always means ``"CAUSAL_LM"`` for a causal language model of `mindpet.models`.
        names: as in :func:`load_peft`.

    Raises:
        TypeError: `network` is not a Cell, `base_model` is not text.
        ValueError: its deltas are merged into its weights.
        PeftFormatError: nothing that PEFT has was injected, or something that it has not as well.

    >>> import tempfile
    >>> from mindpet.delta import LoRAConfig
    >>> network = inject(nn.SequentialCell(nn.Dense(4, 4)), LoRAConfig(rank=2, targets=["0"]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_peft(network, directory)
    ...     other = load_peft(nn.SequentialCell(nn.Dense(4, 4)), directory)
    >>> [parameter.name for parameter in other.trainable_params()]
    ['0.mindpet_delta_lora_a', '0.mindpet_delta_lora_b']
    """
    _checks.cell("save_peft", "network", network)
    if not (base_model is None or isinstance(base_model, str)):  # names come last, unlike in load_peft
        raise TypeError(
            f"For 'save_peft', 'base_model' must be the name of a model, but got {_checks.shown(base_model)}."
        )
    if merged_cells(network):
        raise ValueError("The deltas of this network are merged into its weights: unmerge them to save them.")
    modules = Modules.of(network, names)
    problems: list[str] = []
    methods = {one.delta_method for one in cells_by_path(network).values() if hasattr(one, "delta_method")}
    selecting = [method_of(one.config) for one in injections(network)]
    methods |= {one.name for one in selecting if not one.adapt and one.peft is not None}
    if methods and (methods <= {*WRITTEN} - {"dora"} or methods == {"dora"}):
        content, tensors = write_lora(network, modules, problems)
    elif methods and methods <= {"prefix", "ptuning2"}:
        content, tensors = write_prefix(modules, problems)
    elif len(methods) == 1 and methods <= {filled.delta_method for filled in PROMPTS.values()}:
        content, tensors = write_prompts(modules, problems)
    elif len(methods) == 1 and METHODS[next(iter(methods))].peft is not None:
        content, tensors = write_method(METHODS[methods.pop()], network, modules, problems)
    else:
        there = " and ".join(sorted(methods)) or "nothing"
        known = [*WRITTEN, *(one.name for one in METHODS.values() if one.peft is not None)]
        raise PeftFormatError(
            f"A directory of PEFT holds one of its methods, but this network has {there}: of those here, PEFT has "
            f"{', '.join(known)}, the prefix and the prompt methods."
        )
    if problems:
        raise PeftFormatError("This network cannot be saved for PEFT:\n  " + "\n  ".join(problems))
    heads = {"classifier", "score"} & set(content.get("modules_to_save") or ())
    if task_type is None and content["peft_type"] in ("PREFIX_TUNING", *PROMPTS) and heads:
        task_type = "SEQ_CLS"
    if task_type is None and isinstance(network, CausalLanguageModel):
        task_type = "CAUSAL_LM"
    content |= {"base_model_name_or_path": base_model, "task_type": task_type, "inference_mode": True}
    _files.write_tensors(Path(directory) / "adapter_model.safetensors", tensors, {"format": "pt"})
    _files.write_json(Path(directory) / "adapter_config.json", dict(sorted(content.items())))


def peft_kind(method: Method) -> str:
    """PEFT's ``peft_type`` of what :func:`save_peft` writes for a method, or an empty str where PEFT has it not."""
    layers = [make.__self__ for make in method.adapt.values() if hasattr(make, "__self__")]
    if any(getattr(layer, "delta_method", None) in WRITTEN for layer in layers):
        return "LORA"
    if method.name in ("prefix", "ptuning2"):
        return "PREFIX_TUNING"
    written = {cell.delta_method: kind for kind, cell in PROMPTS.items()}
    return method.peft.kind if method.peft is not None else written.get(method.name, "")


def _misfit(directory: Path, problems: list[str]) -> PeftFormatError:
    return PeftFormatError(f"The adapter in {directory} cannot be loaded:\n  " + "\n  ".join(problems))


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    path = directory / "adapter_model.safetensors"
    if not os.path.isfile(path):
        pickled = os.path.isfile(directory / "adapter_model.bin")
        hint = "; pickled weights (adapter_model.bin) are not read: save them as safetensors" if pickled else ""
        raise PeftFormatError(f"There is no file {path}{hint}.")
    try:
        return read_safetensors(path)
    except PretrainedFilesError as error:
        raise PeftFormatError(str(error)) from error
