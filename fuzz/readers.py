"""Every reader of files, and what it may do with a file that anyone may have made.

It may read it, or raise what it documents. `outcome` says what else it did: another exception, a message that cannot be
written in UTF-8, more than two seconds of the processor, more than a quarter of a gigabyte, a file opened for writing
elsewhere, a class that pickle looked up, a process. ``python -m fuzz`` makes up files for the readers, and
``tests/test_hostile.py`` has them read those in ``tests/hostile``.
"""

import contextlib
import dis
import functools
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOG_v", "4")  # MindSpore's own log: only what is critical

import numpy as np
from gguf import GGMLQuantizationType
from mindspore import nn, save_checkpoint
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap
from tests import tiny
from tests.models import causal, test_e5, test_gguf

import mindpet
from mindpet import _files
from mindpet.delta.adapter_fusion import read_adapter
from mindpet.delta.method import Method
from mindpet.delta.registry import METHODS
from mindpet.graph.deltas import DeltaFileError
from mindpet.graph.freeze_utils import freeze_from_config
from mindpet.graph.inject import eject, inject, injections
from mindpet.interop.hf_peft import PeftFormatError, load_peft, peft_kind, save_peft
from mindpet.models import PretrainedFilesError, chat_template, e5, family_of, gguf, load_tokenizer, open_pretrained
from mindpet.models.ends import end_of_text
from mindpet.models.loading import read_safetensors, read_tensors
from mindpet.parallel import load_distributed_delta
from mindpet.train.config import DataSection, RunFileError, as_yaml, load_run, template
from mindpet.train.data import DataError, read_rows
from mindpet.train.language import read_texts

SECONDS, BYTES = 2.0, 1 << 28  # of the processor, and of memory
_FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect")
_watching: list[tuple[str, list[str]]] = []  # (where files may be written, what was done that must not be)


@dataclass(frozen=True)
class Reader:
    """One reader of files.

    Attributes:
        file: what the bytes are called.
        read: takes the path of that file.
        errors: what it may raise. A ValueError or a TypeError must come from a ``raise`` in this package.
        seeds: makes small valid files; beside the path that it gets it puts what `read` needs.
    """

    file: str
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[Path], Iterator[bytes]] = field(repr=False)


def outcome(reader: Reader, path: Path) -> tuple[str, str]:
    """(where, what) is wrong with how the file was taken: both empty where it was read or refused as documented."""
    held, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    where, what = "", ""
    with _watched(path.parent) as done:
        try:
            reader.read(path)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            place, meant = _origin(error)
            if not isinstance(error, reader.errors) or not (meant or type(error) not in (ValueError, TypeError)):
                where, what = f"{type(error).__name__} at {place}", "".join(traceback.format_exception(error))
            elif str(error) != str(error).encode(errors="replace").decode():
                where, what = f"message at {place}", f"it cannot be written: {str(error)!r:.300}"
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024
    if not where and done:
        where = what = done[0]
    elif not where and seconds > SECONDS:
        where, what = "time", f"{seconds:.1f} seconds"
    elif not where and grown > BYTES:
        where, what = "memory", f"{grown >> 20} MB"
    return where, what


def _origin(error: BaseException) -> tuple[str, bool]:
    """The last place of this package that an error came through, and whether it was raised there on purpose."""
    place, meant = "?", False
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        ours = "/mindpet/" in code.co_filename
        place = f"{Path(code.co_filename).name}:{trace.tb_lineno}" if ours else place
        meant = ours and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
        trace = trace.tb_next
    return place, meant


@contextlib.contextmanager
def _watched(place: Path) -> Iterator[list[str]]:
    if _audit not in _hooks:
        _hooks.append(_audit)
        sys.addaudithook(_audit)  # there is no way to take it out again
    done: list[str] = []
    _watching.append((str(place), done))
    try:
        yield done
    finally:
        _watching.pop()


_hooks: list[Callable] = []


def _audit(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    place, done = _watching[-1]
    if event == "open":
        path, mode, flags = arguments
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else "w" in str(mode)
        if writes and not str(path).startswith((place, tempfile.gettempdir(), "/dev/null")):
            done.append(f"writes {path}")
    elif event in _FORBIDDEN:
        done.append(event)


# ---------------------------------------------------------------------------------------------------- how each is read


def _each(*calls: Callable[[], Any], errors: type[Exception] = PretrainedFilesError) -> None:
    """All of the calls, whatever a documented error stops; the first such error in the end."""
    first = None
    for call in calls:
        try:
            call()
        except errors as error:
            first = first or error
    if first is not None:
        raise first


@functools.cache
def _network(method: str = "") -> nn.Cell:
    network = causal.build("llama")
    return inject(network, METHODS[method].config()) if method else network


def _into(load: Callable[[nn.Cell], Any]) -> None:
    """Load into the same network as before, which a failure must leave as it was."""
    network = _network()
    before = [(parameter.name, parameter.requires_grad) for parameter in network.get_parameters()]
    try:
        load(network)
    finally:
        loaded = sys.exc_info()[0] is None
        if injections(network):
            eject(network)
            assert loaded, "a delta that was refused is in the network"
        network.__dict__.pop("mindpet_deltas", None)
        for parameter, (_, trains) in zip(network.get_parameters(), before):
            parameter.requires_grad = trains


def _gguf(path: Path) -> None:
    gguf._parsed.cache_clear()
    _each(*(lambda one=one: one(path) for one in (_config, gguf.gguf_tensors, load_tokenizer, chat_template)))


def _config(path: Path) -> None:
    place = path if path.suffix in (".gguf", ".bin") else path.parent
    family_of(place).max_positions(open_pretrained(place).config)


def _tokenizer(path: Path) -> None:
    end_of_text(load_tokenizer(path.parent), {})


def _delta(path: Path) -> None:
    _each(lambda: _into(lambda network: mindpet.load_delta(network, path.parent)), errors=DeltaFileError)
    read_adapter(path.parent)


def _peft(path: Path) -> None:
    """The tensors beside a configuration are of the kind that it names, where there are some."""
    for kind in (path.parent / "kinds").glob("*.safetensors") if path.suffix == ".json" and path.is_file() else ():
        if f'"{kind.stem}"'.encode() in path.read_bytes():
            shutil.copy(kind, path.parent / "adapter_model.safetensors")
    _into(lambda network: load_peft(network, path.parent))


def _rows(path: Path) -> None:
    def said(rows: Any) -> None:
        "".join([*rows.broken, *rows.labels, *map(str, rows.texts)]).encode()

    section = DataSection(train=str(path))
    _each(lambda: said(read_rows(path)), lambda: said(read_texts(path, section)), errors=DataError)


def _rank(path: Path) -> None:
    network = _network("lora")
    _each(
        lambda: mindpet.load_delta(network, path),
        lambda: load_distributed_delta(network, delta=path),
        errors=DeltaFileError,
    )


def _strategy(path: Path) -> None:
    files = [path.parent / "rank_0.ckpt", path.parent / "rank_1.ckpt"]
    load_distributed_delta(_network("lora"), delta=files, delta_strategy=path)


# ------------------------------------------------------------------------------------------------------ valid files


def _run_files(path: Path) -> Iterator[bytes]:
    yield template("m", "d").encode()
    yield as_yaml(load_run(None, ["model.path=m", "data.train=d"])).encode()
    sections = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "method": {"name": "lora", "rank": 4}}
    sections |= {"compare": {"methods": ["lora"], "settings": {"lora": {"train.learning_rate": 1e-3}}}}
    yield json.dumps(sections).encode()
    for name, method in METHODS.items():
        with contextlib.suppress(ValueError):  # some have no usual configuration
            yield json.dumps({**sections, "method": {"name": name, **asdict(method.config())}}).encode()


def _freeze_files(path: Path) -> Iterator[bytes]:
    yield b"freeze:\n  include: ['*bias', \"0.weight\"]\n  exclude:\n  - '*gamma'\n"
    yield b'{"freeze": {"include": ["*"]}}'


def _tensor_files(path: Path) -> Iterator[bytes]:
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.zeros((), np.int64), "c": np.ones((0, 2), np.float16)}
    _files.write_tensors(path, tensors, {"format": "pt"})
    yield path.read_bytes()
    yield path.read_bytes().replace(b'"F16"', b'"U16"')


def _tuned() -> Iterator[tuple[Method, nn.Cell]]:
    """A small network with each of the methods that can be in it."""
    for method in METHODS.values():
        with contextlib.suppress(ValueError, TypeError):
            yield method, inject(causal.build("llama"), method.config())


def _delta_files(path: Path) -> Iterator[bytes]:
    for _, network in _tuned():
        mindpet.save_delta(network, path.parent)
        yield path.read_bytes()


def _peft_files(path: Path) -> Iterator[bytes]:
    (path.parent / "kinds").mkdir(exist_ok=True)
    for method, network in _tuned():
        if kind := peft_kind(method):
            save_peft(network, path.parent)
            shutil.copy(path.parent / "adapter_model.safetensors", path.parent / "kinds" / f"{kind}.safetensors")
            yield path.read_bytes()


def _lora_files(path: Path) -> Iterator[bytes]:
    save_peft(inject(causal.build("llama"), METHODS["lora"].config()), path.parent)
    yield path.read_bytes()


def _gguf_files(path: Path) -> Iterator[bytes]:
    for kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        test_gguf.write(path, kind=kind)
        yield path.read_bytes()


def _e5_files(path: Path) -> Iterator[bytes]:
    yield test_e5.write_file(path, test_e5.tensors_of(np.random.default_rng(0))).read_bytes()


def _rank_files(path: Path) -> Iterator[bytes]:
    values = [{"name": p.name, "data": p} for p in _network("lora").trainable_params()]
    save_checkpoint(values, str(path), format=path.suffix[1:])
    yield path.read_bytes()


def _strategy_files(path: Path) -> Iterator[bytes]:
    trained = _network("lora").trainable_params()
    for rank in (0, 1):
        save_checkpoint([{"name": p.name, "data": p} for p in trained], str(path.parent / f"rank_{rank}.ckpt"))
    content = ParallelStrategyMap(current_stage=1)
    content.parallel_strategy_item.add(node_name="operator").parallel_strategys.stage = 0
    for parameter in trained[:3]:
        layout = content.parallel_layout_item.add(param_name=parameter.name).parallel_layouts
        layout.dev_matrix.add().dim.extend([2])
        layout.tensor_map.add().dim.extend([-1] * parameter.ndim)
        layout.param_split_shape.add()
        layout.field, layout.opt_weight_shard_step, layout.opt_weight_shard_size = 0, 0, 0
    yield content.SerializeToString()


def _lines(path: Path) -> Iterator[bytes]:
    yield b'{"text": "one", "label": 1}\n{"text": "two", "label": "b"}\n'
    yield b'{"prompt": "?", "response": "!"}\n'
    yield b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def _tables(path: Path) -> Iterator[bytes]:
    mark = b"\t" if path.suffix == ".tsv" else b","
    yield b"text" + mark + b"label\n" + b'"one, ""two"""' + mark + b"1\n"


def _plain(path: Path) -> Iterator[bytes]:
    yield "one\ntwo é\n".encode()


def _configs(path: Path) -> Iterator[bytes]:
    for kind, sizes in {"bert": tiny.SIZES, "llama": causal.LLAMA, "gpt2": causal.GPT2}.items():
        yield json.dumps({"model_type": kind, "eos_token_id": 2, **sizes}).encode()


def _tokenizers(path: Path) -> Iterator[bytes]:
    tiny.write_model(path.parent)
    yield path.read_bytes()
    for file, write in (("a.gguf", _gguf_files), ("a.bin", _e5_files)):
        next(write(path.parent / file))
        yield load_tokenizer(path.parent / file).to_str().encode()


def _indices(path: Path) -> Iterator[bytes]:
    tiny.write_model(path.parent)
    yield b'{"weight_map": {"a": "model.safetensors"}}'


def _templates(path: Path) -> Iterator[bytes]:
    tiny.write_model(path.parent)
    yield b'{"chat_template": [{"name": "default", "template": "<|im_start|>"}]}'
    yield b'{"chat_template": "<|im_start|> <|im_end|>"}'


def _shared(path: Path) -> None:
    _each(lambda: _files.read_tensors(path, PretrainedFilesError), lambda: read_safetensors(path))


READERS = {
    "run": Reader("run.yaml", load_run, (RunFileError,), _run_files),
    "freeze": Reader(
        "freeze.yaml", lambda path: freeze_from_config(_network(), str(path)), (TypeError, ValueError), _freeze_files
    ),
    "safetensors": Reader("model.safetensors", _shared, (PretrainedFilesError,), _tensor_files),
    "delta": Reader("delta.safetensors", _delta, (ValueError,), _delta_files),
    "peft_config": Reader("adapter_config.json", _peft, (PeftFormatError,), _peft_files),
    "peft_tensors": Reader("adapter_model.safetensors", _peft, (PeftFormatError,), _lora_files),
    "gguf": Reader("model.gguf", _gguf, (PretrainedFilesError,), _gguf_files),
    "e5": Reader(
        "model.bin",
        lambda path: _each(*(lambda one=one: one(path) for one in (_config, e5.e5_tensors, load_tokenizer))),
        (PretrainedFilesError,),
        _e5_files,
    ),
    "strategy": Reader("strategy.ckpt", _strategy, (DeltaFileError,), _strategy_files),
    "rank": Reader("rank_0.ckpt", _rank, (DeltaFileError,), _rank_files),
    "rank_tensors": Reader("rank_0.safetensors", _rank, (DeltaFileError,), _rank_files),
    "jsonl": Reader("rows.jsonl", _rows, (DataError,), _lines),
    "csv": Reader("rows.csv", _rows, (DataError,), _tables),
    "tsv": Reader("rows.tsv", _rows, (DataError,), _tables),
    "txt": Reader("text.txt", lambda path: read_texts(path, DataSection(train="t")), (DataError,), _plain),
    "config": Reader("config.json", _config, (PretrainedFilesError,), _configs),
    "tokenizer": Reader("tokenizer.json", _tokenizer, (PretrainedFilesError,), _tokenizers),
    "index": Reader(
        "model.safetensors.index.json", lambda path: read_tensors(path.parent), (PretrainedFilesError,), _indices
    ),
    "template": Reader(
        "tokenizer_config.json", lambda path: chat_template(path.parent), (PretrainedFilesError,), _templates
    ),
}
