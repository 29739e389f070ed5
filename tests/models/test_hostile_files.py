"""Small files that ask for much, and JSON of other kinds than it must be: refused at once, by name."""

import json
import os
import subprocess
import sys

import pytest

from mindpet.models import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM, PretrainedFilesError
from mindpet.models.families import FAMILIES
from mindpet.models.loading import read_tensors
from mindpet.models.pretrained import family_of
from tests.models import test_gguf
from tests.models.causal import GPT2, LLAMA, write
from tests.tiny import SIZES, write_model

TINY = {
    "bert": (BertForSequenceClassification, SIZES),
    "llama": (LlamaForCausalLM, LLAMA),
    "gpt2": (GPT2LMHeadModel, GPT2),
}
IN_LITTLE_MEMORY = """
import resource, sys
from mindpet.models import open_pretrained
import mindspore, gguf
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 29), held + (1 << 29)))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from mindpet.models import PretrainedFilesError
from mindpet.models.families import FAMILIES
try:
    FAMILIES[sys.argv[2]].network.from_pretrained(sys.argv[1])
except PretrainedFilesError as error:
    sys.exit(f"refused: {error}"[:2000])
"""


def refusal(path, family):
    """What a process with half a gigabyte and a minute says of the files."""
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, str(path), family],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1:], done.stderr
    start = done.stderr.rfind("refused: ")
    assert start >= 0, done.stderr[-2000:]
    return done.stderr[start:]


def string(text):
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
@pytest.mark.parametrize("kind", [0, 8], ids=["of bytes", "of strings"])
def test_an_array_longer_than_its_file_does_not_take_all_memory(tmp_path, kind):
    array = string("a") + (9).to_bytes(4, "little") + kind.to_bytes(4, "little") + (1 << 62).to_bytes(8, "little")
    counts = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + counts + array + bytes(40))
    assert (tmp_path / "tiny.gguf").stat().st_size < 100
    said = refusal(tmp_path / "tiny.gguf", "llama")
    assert "cannot be read as GGUF, or ends too early: it has 89 bytes" in said


def test_arrays_within_arrays_without_end_are_refused(tmp_path):
    nested = ((9).to_bytes(4, "little") + (1).to_bytes(8, "little")) * 3000
    counts = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    content = b"GGUF" + (3).to_bytes(4, "little") + counts + string("a") + (9).to_bytes(4, "little") + nested
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(PretrainedFilesError, match="cannot be read as GGUF"):
        family_of(tmp_path / "tiny.gguf")


def test_tensors_of_a_gguf_file_must_not_share_their_bytes(tmp_path):
    path = tmp_path / "tiny.gguf"
    test_gguf.write(path)
    content = bytearray(path.read_bytes())
    for name in ("blk.0.attn_norm.weight", "blk.1.attn_norm.weight"):  # each (16,): all at the offset 0
        at = content.index(string(name)) + 8 + len(name) + 4 + 8 + 4
        content[at : at + 8] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(PretrainedFilesError, match=r"tensors that overlap: .*attn_norm\.weight at \d+ begins within"):
        LlamaForCausalLM.from_pretrained(path)


def directory_of(kind, path, changes):
    if kind == "bert":
        write_model(path)
    else:
        write(path, kind)
    (path / "config.json").write_text(json.dumps({"model_type": kind, **TINY[kind][1], **changes}))
    return path


ABSURD = [
    ("bert", {"num_hidden_layers": 10**7}, r"missing in the files: bert\.encoder\.layer\.2\.attention.*10000000 are"),
    ("bert", {"intermediate_size": 10**9}, r"intermediate\.dense\.weight is \(32, 16\) in the files, \(1000000000, 16"),
    ("bert", {"hidden_size": 10**9}, r"word_embeddings\.weight is \(40, 16\) in the files, \(40, 1000000000\) here"),
    ("bert", {"vocab_size": 10**10}, r"word_embeddings\.weight is \(40, 16\) in the files, \(10000000000, 16\) here"),
    ("bert", {"max_position_embeddings": 10**10}, r"position_embeddings\.weight is \(32, 16\)"),
    ("bert", {"type_vocab_size": 10**10}, r"token_type_embeddings\.weight is \(2, 16\)"),
    ("llama", {"num_hidden_layers": 10**7}, r"missing in the files: model\.layers\.2\.self_attn.*10000000 are"),
    ("llama", {"intermediate_size": 10**9}, r"mlp\.up_proj\.weight is \(24, 16\)"),
    ("llama", {"hidden_size": 4 * 10**9}, r"embed_tokens\.weight is \(31, 16\)"),
    ("llama", {"vocab_size": 10**10}, r"embed_tokens\.weight is \(31, 16\)"),
    ("llama", {"head_dim": 10**9}, r"q_proj\.weight is \(16, 16\).*k_proj\.weight is \(8, 16\)"),
    ("gpt2", {"n_layer": 10**7}, r"missing in the files: transformer\.h\.2\.attn.*10000000 are expected, 2 are there"),
    ("gpt2", {"n_inner": 10**9}, r"mlp\.c_fc\.weight is \(16, 64\) in the files, \(16, 1000000000\) here"),
    ("gpt2", {"n_positions": 10**10}, r"wpe\.weight is \(200, 16\)"),
]


@pytest.mark.parametrize(("kind", "changes", "says"), ABSURD, ids=str)
def test_absurd_sizes_are_held_against_the_tensors_before_anything_is_built(tmp_path, kind, changes, says):
    with pytest.raises(PretrainedFilesError, match=f"(?s){says}"):
        TINY[kind][0].from_pretrained(directory_of(kind, tmp_path, changes))


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"llama.block_count": 10**7}, r"model\.layers\.2\..*10000000 are expected, 2 are there"),
        ({"llama.feed_forward_length": 10**9}, r"mlp\.up_proj\.weight is \(24, 16\)"),
    ],
    ids=str,
)
def test_so_are_those_of_a_gguf_file(tmp_path, metadata, says):
    test_gguf.write(tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(PretrainedFilesError, match=f"(?s){says}"):
        LlamaForCausalLM.from_pretrained(tmp_path / "tiny.gguf")


def test_a_layer_number_of_absurd_length_is_no_layer(tmp_path):
    from safetensors.numpy import load_file, save_file

    write(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    moved = {name.replace("layers.1.", f"layers.{'1' * 5000}."): value for name, value in tensors.items()}
    save_file(moved, tmp_path / "model.safetensors")
    with pytest.raises(PretrainedFilesError, match=r"missing in the files: model\.layers\.1\."):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [[], 3, *({"weight_map": table} for table in ([], {"a": 1}, None))], ids=str)
def test_an_index_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(PretrainedFilesError, match="'weight_map' names a file for each tensor"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("kind", [[], {}, 3, None], ids=str)
def test_a_model_type_of_another_kind_is_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(PretrainedFilesError, match="but only bert, llama, gpt2 are here"):
        family_of(tmp_path)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("value", ["many", [], {}, True, -1, 1e400], ids=str)
def test_no_value_in_a_configuration_gives_another_error(tmp_path, kind, value):
    directory_of(kind, tmp_path, {})
    sizes = json.loads((tmp_path / "config.json").read_text())
    for key in FAMILIES[kind].config.__dataclass_fields__:
        (tmp_path / "config.json").write_text(json.dumps({**sizes, key: value}))
        try:
            TINY[kind][0].from_pretrained(tmp_path)
        except PretrainedFilesError:
            continue
        assert key == "initializer_range" or (kind, key, value) in READABLE


# in the eyes of Python -1 is a number, and true is a boolean where one is meant
READABLE = {
    *(("llama", key, True) for key in ("attention_bias", "mlp_bias", "tie_word_embeddings")),
    *((kind, key, -1) for kind, key in (("llama", "rms_norm_eps"), ("llama", "rope_theta"))),
    *((kind, key, -1) for kind, key in (("bert", "layer_norm_eps"), ("gpt2", "layer_norm_epsilon"))),
    ("gpt2", "tie_word_embeddings", True),
}
