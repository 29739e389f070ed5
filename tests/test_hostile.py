"""Every reader of files, on files that anyone may have made: it reads them, or raises what it documents, at once.

Those that the fuzzer (``make fuzz``) found are in ``tests/hostile/<reader>``; the others are made here.
"""

import functools
import io
import json
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("resource", reason="memory is measured as Unix does it")

from fuzz.readers import READERS, outcome

import mindpet
from mindpet import _files
from mindpet.graph.deltas import DeltaFileError
from mindpet.models import open_pretrained
from mindpet.train.config import DataSection, RunFileError, load_run
from mindpet.train.data import DataError, read_rows
from mindpet.train.language import read_texts
from mindpet.utils.exceptions import ReadYamlFileError
from tests.models.causal import build

KEPT = sorted((Path(__file__).parent / "hostile").glob("*/*"))
YAML, JSON = ("run", "freeze"), ("peft_config", "jsonl", "config", "tokenizer", "index", "template")
SAFETENSORS = ("safetensors", "delta", "peft_tensors", "rank_tensors")


class Runs:
    """What a pickle runs that is opened as one."""

    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A directory for each reader, with what it needs, and a valid file."""
    made = {}

    def place(name):
        if name not in made:
            path = tmp_path_factory.mktemp(name) / READERS[name].file
            made[name] = path, next(READERS[name].seeds(path))
        return made[name]

    return place


def take(name, path, content):
    """Have the reader read those bytes; what it raised is not told, only that it was documented."""
    path.write_bytes(content)
    where, what = outcome(READERS[name], path)
    assert not where, what


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_the_fuzzer_found_stays_mended(places, kept):
    take(kept.parent.name, places(kept.parent.name)[0], kept.read_bytes())


@functools.cache
def bomb():
    """Fifty megabytes of zeros in a zip file of a thousandth of them."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.pkl", bytes(50 << 20))
    return packed.getvalue()


def opened(text, closed=""):
    return text.encode() * 100_000 + closed.encode() * 100_000


ANYWHERE = {
    "nothing": b"",
    "NUL bytes": bytes(100),
    "0xff": b"\xff" * 100,
    "UTF-16": '{"a": "é"}\n'.encode("utf-16"),
    "Latin-1": '{"text": "é", "label": 1}\n'.encode("latin-1"),
    "a mark of UTF-8 before": b'\xef\xbb\xbf{"a": 1}',
    "half a surrogate pair": b'{"\\ud800": 1, "freeze": "\\ud800", "weight_map": {"a": "\\ud800"}}',
    "brackets": opened("["),
    "brackets, closed": opened("[", "]"),
    "braces": opened('{"a":'),
    "braces, closed": opened('{"a":', "}"),
    "a long line": b"a" * (1 << 20),
    "a number of 5000 digits": b"9" * 5000,
    "a key twice": b'{"a": 1, "a": 2}',
    "numbers that are none": b'{"r": NaN, "lora_alpha": Infinity, "hidden_size": -Infinity}',
    "a pickle": pickle.dumps(Runs()),
    "an old pickle": pickle.dumps(Runs(), protocol=0),
}


@pytest.mark.parametrize("name", READERS)
def test_files_of_another_kind(places, name):
    path, seed = places(name)
    for what, content in {**ANYWHERE, "twice": seed * 2, "in UTF-16": seed.decode("latin-1").encode("utf-16")}.items():
        path.write_bytes(content)
        assert outcome(READERS[name], path) == ("", ""), what


@pytest.mark.parametrize("name", READERS)
def test_a_zip_bomb_is_not_unpacked(places, name):
    take(name, places(name)[0], bomb())


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_cut_off(places, name):
    path, seed = places(name)
    cuts = {*range(1, min(len(seed), 32)), *(len(seed) * part // 16 for part in range(1, 16)), len(seed) - 1}
    for cut in sorted(cuts):
        path.write_bytes(seed[:cut])
        assert outcome(READERS[name], path) == ("", ""), cut


@pytest.mark.parametrize("name", READERS)
def test_every_bit_of_the_beginning_may_be_wrong(places, name):
    path, seed = places(name)
    for at in range(min(len(seed), 24)):
        for bit in (1, 128):
            path.write_bytes(seed[:at] + bytes([seed[at] ^ bit]) + seed[at + 1 :])
            assert outcome(READERS[name], path) == ("", ""), (at, bit)


@pytest.mark.parametrize("name", READERS)
def test_no_file_in_its_place(places, name, tmp_path):
    path, seed = places(name)
    path.unlink(missing_ok=True)
    elsewhere = tmp_path / READERS[name].file
    elsewhere.write_bytes(seed)
    for target in (None, path, elsewhere):  # nothing, a link to itself, a link to a good file
        if target is not None:
            path.symlink_to(target)
        assert outcome(READERS[name], path) == ("", ""), target
        path.unlink(missing_ok=True)
    path.mkdir()
    found = outcome(READERS[name], path)
    path.rmdir()
    assert found == ("", "")


def test_a_freeze_file_is_no_symbolic_link(places, tmp_path):
    path, seed = places("freeze")
    (tmp_path / "real.yaml").write_bytes(seed)
    (tmp_path / "link.yaml").symlink_to(tmp_path / "real.yaml")
    READERS["freeze"].read(tmp_path / "real.yaml")
    with pytest.raises(ReadYamlFileError, match="is a symbolic link, which is refused"):
        READERS["freeze"].read(tmp_path / "link.yaml")


# --------------------------------------------------------------------------------------------------------------- YAML


def laughs(start, step):
    """Lines of which each stands for ten of the one before."""
    lines = [f"a0: &a0 {start}"] + [f"a{n}: &a{n} {step.format(', '.join([f'*a{n - 1}'] * 10))}" for n in range(1, 10)]
    return "\n".join(lines) + "\nfreeze: *a9\nmethod: *a9\n"


NOT_YAML = {
    "a call": "freeze: !!python/object/apply:os.system ['exit 1']",
    "an object": "freeze: !!python/object/new:os.system ['exit 1']",
    "a module": "method: !!python/module:os",
    "a list called a map": "method: !!map [a]",
    "a word called a map": "? !!map a\n: b",
    "a list called a set": "freeze: !!set [a]",
    "no number": "freeze: !!int x",
    "an empty number": "freeze: !!int ''",
    "no fraction": "freeze: !!float x",
    "no truth": "method: !!bool x",
    "no time": "method: !!timestamp x",
    "no month": "method: {name: 2001-13-01}",
    "no time zone": "method: {name: 2001-01-01 00:00:00 +99:99}",
    "not base 64": "method: !!binary é",
    "a number of 5000 digits": f"method: {'9' * 5000}",
    "a list for a key": "? [a]\n: b",
    "a map for a key": "? {a: b}\n: c",
    "half a surrogate pair": 'freeze: "\\ud800"',
    "a list in itself": "freeze: &a [*a]",
    "a map in itself": "method: &a {name: *a}",
    "laughs in lists": laughs("[a]", "[{}]"),
    "laughs in maps": laughs("{a: 1}", "{{k: [{}]}}"),
    "laughs in merges": laughs("{a: 1}", "{{<<: [{}]}}"),
    "an anchor of nothing": "freeze: *nothing",
    "a directive": "%YAML 9.9\n---\nfreeze: a",
    "two documents": "a: 1\n---\nb: 2",
    "a tab": "freeze:\n\t- a",
    "a control character": "freeze: \x07",
}


@pytest.mark.parametrize("reader", YAML)
@pytest.mark.parametrize("case", NOT_YAML)
def test_yaml_that_is_more_than_values(places, reader, case, tmp_path):
    path = places(reader)[0]
    take(reader, path, NOT_YAML[case].encode())
    error = {"run": RunFileError, "freeze": ReadYamlFileError}[reader]
    with pytest.raises(error, match="cannot be read as YAML"):
        READERS[reader].read(path)


def test_a_map_with_many_keys_takes_no_longer_than_another(places):
    path, _ = places("run")
    take("run", path, b"".join(b"k%d: 1\n" % number for number in range(8000)))


def test_an_override_that_looks_like_a_date_is_text():
    with pytest.raises(RunFileError, match="train.epochs: .* but got '2001-13-01'"):
        load_run(None, ["model.path=m", "data.train=d", "train.epochs=2001-13-01"])
    assert load_run(None, ["model.path=2001-13-01", "data.train=d"]).model.path == "2001-13-01"


def test_aliases_as_people_write_them_are_read(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {path: &place m}\ndata: {train: *place}\n")
    assert load_run(tmp_path / "run.yaml").data.train == "m"


# --------------------------------------------------------------------------------------------------------------- JSON

ODD = [
    None,
    True,
    -1,
    0,
    10**9,
    1 << 63,
    10**400,
    1e308,
    math.nan,
    math.inf,
    "",
    "..",
    "\0",
    "\ud800",
    [],
    {},
    [[]],
    [None],
]
ODD += [{"a": {}}, "a" * 300, "(", "a{99999999999}", "(?i)a", "(?P<a>b)|(?P<a>c)", "../../etc/passwd", "/etc/passwd"]


def spots(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from spots(value[key], (*path, key))


def put(value, path, new):
    """A copy with something else in one place."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("name", [*JSON, "run"])
def test_any_value_in_any_place(places, name):
    path, seed = places(name)
    if name == "run":
        seed = json.dumps(
            {
                "model": {"path": "m"},
                "data": {"train": "d"},
                "method": {"name": "lora", "rank_pattern": {"a": 1}, "layers": [1], "alpha": 2},
                "compare": {"seeds": [1], "settings": {"lora": {}}, "grid": [1.0]},
                "train": {"warmup": 0.1},
            }
        )
    content = json.loads(seed.splitlines()[0] if name == "jsonl" else seed)
    few = name == "peft_config"  # loading one takes a twentieth of a second
    for spot in [spot for spot in spots(content) if len(spot) < 4][: 12 if few else 60]:
        for odd in ODD[:: 6 if few else 1]:
            path.write_text(json.dumps(put(content, spot, odd)))
            assert outcome(READERS[name], path) == ("", ""), (spot, odd)


@pytest.mark.parametrize("shard", ["../x", "/etc/passwd", "..", ".", "", "a\0b", "a" * 300, "a/b"])
def test_an_index_names_files_of_its_directory_alone(places, shard):
    path, _ = places("index")
    take("index", path, json.dumps({"weight_map": {"a": shard}}).encode())
    with pytest.raises(READERS["index"].errors, match="names a file outside its directory|There is no "):
        READERS["index"].read(path)


# -------------------------------------------------------------------------------------------------------- safetensors


def framed(head, data=b""):
    text = json.dumps(head).encode() if not isinstance(head, bytes) else head
    return len(text).to_bytes(8, "little") + text + data


def entry(shape=(1,), kind="F32", offsets=(0, 4)):
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets)}


HEADS = {
    "a head longer than memory": (1 << 62).to_bytes(8, "little") + b"{}",
    "a negative head": b"\xff" * 8 + b"{}",
    "no object": framed([]),
    "nothing": framed({}),
    "a name with ..": framed({"../../x": entry()}, bytes(4)),
    "a path": framed({"/etc/passwd": entry()}, bytes(4)),
    "NUL in a name": framed({"a\0b": entry()}, bytes(4)),
    "no name": framed({"": entry()}, bytes(4)),
    "a name twice": framed(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "an axis of 2**63": framed({"a": entry([1 << 63])}, bytes(4)),
    "axes whose product is 2**64": framed({"a": entry([1 << 32, 1 << 32])}, bytes(4)),
    "no numbers on a long axis": framed({"a": entry([0, 1 << 63], offsets=(0, 0))}),
    "no numbers on a long axis, bfloat16": framed({"a": entry([0, 1 << 63], "BF16", (0, 0))}),
    "a hundred axes": framed({"a": entry([1] * 100)}, bytes(4)),
    "a hundred axes, bfloat16": framed({"a": entry([1] * 100, "BF16", (0, 2))}, bytes(2)),
    "tensors over each other": framed({"a": entry(), "b": entry()}, bytes(4)),
    "backwards": framed({"a": entry(offsets=(4, 0))}, bytes(4)),
    "past the end": framed({"a": entry([1 << 40], offsets=(0, 1 << 42))}, bytes(4)),
    "an unknown kind": framed({"a": entry(kind="X9")}, bytes(4)),
    "four bits": framed({"a": entry([2], "F4", (0, 1))}, bytes(1)),
    "eight bits": framed({"a": entry([4], "F8_E4M3")}, bytes(4)),
    "half a complex": framed({"a": entry([1], "C64", (0, 8))}, bytes(8)),
    "metadata of another kind": framed({"__metadata__": {"delta": 3}}),
    "nested metadata": framed({"__metadata__": {"delta": "[" * 100_000}}),
    "NaN": framed({"a": entry()}, struct.pack("<f", math.nan)),
    "infinity": framed({"a": entry()}, struct.pack("<f", math.inf)),
    "deep": framed(b'{"a":' * 100_000),
}


@pytest.mark.parametrize("name", SAFETENSORS)
@pytest.mark.parametrize("case", HEADS)
def test_heads_of_safetensors(places, name, case):
    take(name, places(name)[0], HEADS[case])


def rewritten(path, seed, change):
    """A delta whose description is changed."""
    path.write_bytes(seed)
    tensors, metadata = _files.read_tensors(path)
    description = json.loads(metadata["delta"])
    change(description)
    _files.write_tensors(path, tensors, {"delta": json.dumps(description)})
    return path.read_bytes()


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: ascii(odd)[:20])
def test_any_value_in_the_description_of_a_delta(places, odd):
    path, seed = places("delta")
    for key in ("format", "methods", "parameters", "base", "base_hash", "quantised"):
        take("delta", path, rewritten(path, seed, lambda description: description.update({key: odd})))
    for key in (
        "method",
        "rank",
        "alpha",
        "targets",
        "rank_pattern",
        "alpha_pattern",
        "layers",
        "bias",
        "modules_to_save",
    ):
        take("delta", path, rewritten(path, seed, lambda description: description["methods"][0].update({key: odd})))


def test_a_rank_that_no_tensor_has_takes_no_memory(places):
    path, seed = places("delta")
    content = rewritten(path, seed, lambda description: description["methods"][0].update(rank=10**9))
    take("delta", path, content)
    with pytest.raises(DeltaFileError, match="rank is 1000000000 .*no tensor in the file has an axis longer than 16"):
        mindpet.load_delta(build("llama"), path.parent)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_do_not_get_into_a_network(places, number):
    path, seed = places("delta")
    path.write_bytes(seed)
    tensors, metadata = _files.read_tensors(path)
    name = next(iter(tensors))
    tensors[name] = np.full_like(tensors[name], number)
    _files.write_tensors(path, tensors, metadata)
    with pytest.raises(DeltaFileError, match="holds NaN or infinity"):
        mindpet.load_delta(build("llama"), path.parent)


# ---------------------------------------------------------------------------------------------- checkpoints, strategies


def checkpoint(kind="Float32", shape=(2, 3), content=bytes(24), entries=1):
    from mindspore.train.checkpoint_pb2 import Checkpoint

    made = Checkpoint()
    for _ in range(entries):
        value = made.value.add(tag="a")
        value.tensor.tensor_type = kind
        value.tensor.dims.extend(shape)
        value.tensor.tensor_content = content
    return made.SerializeToString()


BROKEN = {
    "too few bytes": checkpoint(content=bytes(4)),
    "too many bytes": checkpoint(content=bytes(400)),
    "two axes below zero": checkpoint(shape=(-2, -3)),
    "a long axis": checkpoint(shape=(1 << 40, 1 << 40)),
    "no numbers": checkpoint(shape=(0,), content=b""),
    "an unknown kind": checkpoint(kind="Float99"),
    "several entries": checkpoint(entries=3),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_tensor_of_a_checkpoint_has_the_bytes_of_its_shape(places, case):
    path, _ = places("rank")
    take("rank", path, BROKEN[case])
    with pytest.raises(DeltaFileError, match="is broken: a "):
        mindpet.load_delta(build("llama"), path)


LAYOUTS = {
    "no devices": ([], [-1, -1], 0, 0),
    "2**62 devices": ([1 << 31, 1 << 31], [-1, -1], 0, 0),
    "none": ([0], [-1, -1], 0, 0),
    "an axis that is not there": ([2], [5, -1], 0, 0),
    "a cut without a step": ([2], [-1, -1], 0, 2),
    "a cut below zero": ([2], [-1, -1], -3, -3),
    "many axes": ([2], [0] * 100, 0, 0),
    "no axes": ([2], [], 0, 0),
}


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("name", [None, "", "a\nb", "99999999999999999999-a"], ids=ascii)
def test_impossible_strategies(places, case, name):
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    path, seed = places("strategy")
    strategy = ParallelStrategyMap()
    strategy.ParseFromString(seed)
    devices, axes, step, parts = LAYOUTS[case]
    item = strategy.parallel_layout_item[0]
    item.param_name = item.param_name if name is None else name
    layout = item.parallel_layouts
    del layout.dev_matrix[0].dim[:], layout.tensor_map[0].dim[:]
    layout.dev_matrix[0].dim.extend(devices)
    layout.tensor_map[0].dim.extend(axes)
    layout.opt_weight_shard_step, layout.opt_weight_shard_size = step, parts
    take("strategy", path, strategy.SerializeToString())


# ------------------------------------------------------------------------------------------------ GGUF, E5, text, paths


@pytest.mark.parametrize("tensors", [0, 1, 1 << 31, 1 << 63])
@pytest.mark.parametrize("values", [0, 1, 1 << 31, 1 << 63])
@pytest.mark.parametrize("version", [0, 2, 3, 1 << 31])
def test_counts_in_the_head_of_a_gguf_file(places, tensors, values, version):
    take("gguf", places("gguf")[0], b"GGUF" + struct.pack("<IQQ", version, tensors, values) + bytes(64))


@pytest.mark.parametrize("at", range(8, 64, 4))
@pytest.mark.parametrize("number", [0, 1, -1, 2**31 - 1, -(2**31)])
def test_counts_in_the_head_of_an_e5_file(places, at, number):
    path, seed = places("e5")
    take("e5", path, seed[:at] + struct.pack("<i", number) + seed[at + 4 :])


@pytest.mark.parametrize("name", ["csv", "tsv", "jsonl"])
def test_names_that_are_not_utf8_can_still_be_said(places, name):
    path = places(name)[0]
    take(name, path, b"t\xe9xt,t\xe9xt\nx\n" if name == "csv" else b"t\xe9xt\tlabel\nx\ty\n")
    with pytest.raises(DataError) as error:
        READERS[name].read(path)
    str(error.value).encode()


@pytest.mark.parametrize("path", ["a" * 300, "a\0b", "a/" * 5000, "nothing"], ids=["long", "NUL", "deep", "absent"])
def test_paths_that_cannot_be(path):
    section = DataSection(train="t")
    for read, error in {
        load_run: RunFileError,
        read_rows: DataError,
        lambda path: read_texts(path, section): DataError,
        lambda path: read_rows(f"{path}.csv"): DataError,
        lambda path: read_texts(f"{path}.txt", section): DataError,
        open_pretrained: mindpet.models.PretrainedFilesError,
        lambda path: mindpet.load_delta(build("llama"), path): DeltaFileError,
        lambda path: mindpet.load_delta(build("llama"), f"{path}.ckpt"): DeltaFileError,
        lambda path: mindpet.load_peft(build("llama"), path): ValueError,
    }.items():
        with pytest.raises(error):
            read(path)
