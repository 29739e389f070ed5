"""GGUF files: a tiny one of our own making, broken ones, and the real SmolLM2."""

import contextlib

import gguf
import numpy as np
import pytest

from mindpet.models import LlamaForCausalLM, PretrainedFilesError, chat_template, family_of, load_tokenizer
from mindpet.models.gguf import gguf_config, gguf_tensors
from mindpet.models.loading import hugging_face_name
from tests.models.causal import LLAMA, WORDS, build, logits, tokens

CHATML = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VOCABULARY = ["<|im_start|>", "<|im_end|>", *"abcdefghijklmno", "Ġ", "1", "2", "ab", "Ġab", "abc"]
VOCABULARY += [f"<{number}>" for number in range(WORDS - len(VOCABULARY))]


def stored_name(name):
    for there, here in NAMES.items():
        name = name.replace(there, here)
    return name.replace("model.layers.", "blk.")


def write(path, family="llama", kind=gguf.GGMLQuantizationType.F32, metadata=None, tensors=None):
    """A GGUF file of the random network that `build` makes."""
    network = build(family)
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {
        "context_length": LLAMA["max_position_embeddings"],
        "embedding_length": LLAMA["hidden_size"],
        "feed_forward_length": LLAMA["intermediate_size"],
        "block_count": LLAMA["num_hidden_layers"],
        "attention.head_count": LLAMA["num_attention_heads"],
        "attention.head_count_kv": LLAMA["num_key_value_heads"],
        "rope.dimension_count": 4,
    }
    values = {f"llama.{key}": value for key, value in numbers.items()}
    values |= {"llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.rope.freq_base": 10000.0}
    values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": VOCABULARY}
    values |= {"tokenizer.ggml.token_type": [3, 3] + [1] * (WORDS - 2), "tokenizer.ggml.eos_token_id": 1}
    values |= {"tokenizer.ggml.merges": ["a b", "Ġ ab", "ab c"], "tokenizer.chat_template": CHATML}
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in {**values, **(metadata or {})}.items():
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for parameter in network.get_parameters():
        value = parameter.asnumpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(parameter.name.split(".")[-2])
        if heads:  # interleaved: the rows 0, 2, 1, 3 of each head of 4
            value = value.reshape(heads, 2, 2, -1).swapaxes(1, 2).reshape(value.shape)
        name = stored_name(hugging_face_name(parameter.name))
        if value.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return network


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_a_network_comes_back(tmp_path, family):
    network = write(tmp_path / "tiny.gguf", family)
    again, report = LlamaForCausalLM.from_pretrained(tmp_path / "tiny.gguf")
    assert not report.missing
    assert not report.unexpected
    assert again.config == network.config
    for here, there in zip(again.get_parameters(), network.get_parameters()):
        np.testing.assert_array_equal(here.asnumpy(), there.asnumpy())


def test_half_precision_is_widened(tmp_path):
    network = write(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType.F16)
    again, _ = LlamaForCausalLM.from_pretrained(tmp_path / "tiny.gguf")
    assert {value.dtype for value in gguf_tensors(tmp_path / "tiny.gguf").values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(logits(again, tokens(1, 5)), logits(network, tokens(1, 5)), atol=0.05)


def test_the_tokenizer_is_byte_level_bpe_with_single_digits(tmp_path):
    write(tmp_path / "tiny.gguf")
    tokenizer = load_tokenizer(tmp_path / "tiny.gguf")
    found = tokenizer.encode("<|im_start|>abc ab12<|im_end|>")
    assert found.tokens == ["<|im_start|>", "abc", "Ġab", "1", "2", "<|im_end|>"]
    assert found.ids == [VOCABULARY.index(token) for token in found.tokens]
    assert tokenizer.decode(found.ids) == "abc ab12"
    assert tokenizer.get_vocab_size() == WORDS


def test_a_first_token_is_added_where_the_file_says_so(tmp_path):
    write(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0})
    tokenizer = load_tokenizer(tmp_path / "tiny.gguf")
    assert tokenizer.encode("ab").tokens == ["<|im_start|>", "ab"]
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]


def test_sizes_read_as_a_config(tmp_path):
    write(tmp_path / "tiny.gguf")
    assert gguf_config(tmp_path / "tiny.gguf").items() >= {**LLAMA, "eos_token_id": 1, "rms_norm_eps": 1e-6}.items()
    assert family_of(tmp_path / "tiny.gguf").name == "llama"
    template = chat_template(tmp_path / "tiny.gguf")
    assert template.start("user") + "hi" + template.end("user") == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_file_that_changed_is_read_anew(tmp_path):
    write(tmp_path / "tiny.gguf")
    assert not gguf_config(tmp_path / "tiny.gguf")["tie_word_embeddings"]
    write(tmp_path / "tiny.gguf", "llama, tied")
    assert gguf_config(tmp_path / "tiny.gguf")["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"general.architecture": "phi"}, None),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"llama.rope.dimension_count": 2}, "llama.rope.dimension_count is 2"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.embedding_length": None}, "says nothing of 'llama.embedding_length'"),
        ({"llama.block_count": "two"}, "'llama.block_count' has an unusable value, 'two'"),
        ({"llama.attention.head_count": 3}, "llama.rope.dimension_count is 4 .*, only 5 is"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"llama.block_count": 3}, r"missing in the files: model\.layers\.2"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(tmp_path, metadata, says):
    if says is None:
        gguf_writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "phi")
        gguf_writer.write_header_to_file()
        gguf_writer.write_kv_data_to_file()
        gguf_writer.close()
        says = "holds a 'phi'"
    else:
        write(tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(PretrainedFilesError, match=says):
        LlamaForCausalLM.from_pretrained(tmp_path / "tiny.gguf")


def test_tensors_that_are_not_here_are_named(tmp_path):
    write(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": np.ones(2, np.float32)})
    with pytest.raises(PretrainedFilesError, match=r"not supported: rope_freqs\.weight"):
        LlamaForCausalLM.from_pretrained(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"tokenizer.ggml.model": "llama"}, "a tokenizer 'llama'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "'qwen2'; read are 'gpt2' with gpt-2 or smollm"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "2 tokens, 1 of them different"),
        ({"tokenizer.ggml.merges": ["z z"]}, "its tokenizer is broken"),
        ({"tokenizer.ggml.merges": None}, "says nothing of 'tokenizer.ggml.merges'"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 99}, "99"),
    ],
    ids=str,
)
def test_other_tokenizers_are_refused_by_name(tmp_path, metadata, says):
    write(tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(PretrainedFilesError, match=says):
        load_tokenizer(tmp_path / "tiny.gguf")


def test_wherever_a_file_ends_it_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    write(path)
    whole = path.read_bytes()
    for size in (4, 7, 20, 100, 400, len(whole) // 4, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(PretrainedFilesError):
            LlamaForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16], ids=["f32", "f16"])
def test_cut_at_any_place_neither_sizes_nor_weights_nor_words_are_read(tmp_path, kind):
    path = tmp_path / "tiny.gguf"
    write(path, kind=kind)
    whole = path.read_bytes()
    head = gguf.GGUFReader(path).data_offset
    places = [*range(4, head, max(1, head // 40)), head - 1, head, head + 1, (head + len(whole)) // 2, len(whole) - 40]
    for size in places:
        path.write_bytes(whole[:size])
        for read in (gguf_config, gguf_tensors, load_tokenizer):
            with pytest.raises(PretrainedFilesError):
                read(path)


def test_random_damage_is_refused_or_read_but_never_another_error(tmp_path):
    path, generator = tmp_path / "tiny.gguf", np.random.default_rng(3)
    write(path)
    whole = bytearray(path.read_bytes())
    for _ in range(40):
        damaged = bytearray(whole)
        for place in generator.integers(4, 2500, 3):
            damaged[place] = generator.integers(0, 256)
        path.unlink()
        path.write_bytes(damaged)
        for read in (gguf_tensors, load_tokenizer):
            with contextlib.suppress(PretrainedFilesError):
                read(path)


@pytest.mark.models
def test_the_real_file(smollm2):
    config, tokenizer = gguf_config(smollm2), load_tokenizer(smollm2)
    assert config["rope_theta"] == 100000.0
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["eos_token_id"]) == (9, 3, 2)
    text = "The year 2024: naïve 雪, done.\n"
    found = tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>")
    assert found.tokens[:2] == ["<|im_start|>", "user"]
    assert found.tokens.count("2") == 2
    assert tokenizer.decode(found.ids) == f"user\n{text}"
    assert chat_template(smollm2).start("system") == "<|im_start|>system\n"
