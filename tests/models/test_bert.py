import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from mindpet import PrefixConfig, PTuning2Config, inject
from mindpet.models import BertConfig, BertForSequenceClassification, PretrainedFilesError, mean_pool
from tests.tiny import SIZES, write_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


def batch(rows=2, length=7, padding=0):
    generator = np.random.default_rng(1)
    ids = generator.integers(4, SIZES["vocab_size"], (rows, length)).astype(np.int32)
    ids = np.pad(ids, ((0, 0), (0, padding)))
    mask = np.pad(np.ones((rows, length), np.int32), ((0, 0), (0, padding)))
    return [Tensor(array) for array in (ids, mask, np.zeros_like(ids))]


def reference(tensors, ids, mask, prefix=()):
    """The last layer in float64 NumPy, straight from the paper: post-norm, exact GELU, heads of size 8."""
    erf = np.vectorize(__import__("math").erf)

    def dense(x, name):
        return x @ tensors[f"{name}.weight"].T.astype(float) + tensors[f"{name}.bias"]

    def norm(x, name):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    x = (
        tensors["embeddings.word_embeddings.weight"][ids].astype(float)
        + tensors["embeddings.position_embeddings.weight"][len(prefix[0][0]) if len(prefix) else 0 :][: ids.shape[1]]
        + tensors["embeddings.token_type_embeddings.weight"][0]
    )
    x = norm(x, "embeddings.LayerNorm")
    for layer in range(SIZES["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        q, k, v = (
            dense(x, f"{at}attention.self.{name}").reshape(*ids.shape, 2, 8).transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        visible = mask[:, None, None, :].astype(bool)
        if len(prefix):
            key, value = (
                np.broadcast_to(part.transpose(1, 0, 2), (len(ids), 2, len(part), 8)) for part in prefix[layer]
            )
            k, v = np.concatenate([key, k], 2), np.concatenate([value, v], 2)
            visible = np.concatenate([np.ones((len(ids), 1, 1, key.shape[2]), bool), visible], -1)
        scores = np.where(visible, q @ k.transpose(0, 1, 3, 2) / np.sqrt(8), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        mixed = mixed.transpose(0, 2, 1, 3).reshape(*ids.shape, 16)
        x = norm(dense(mixed, f"{at}attention.output.dense") + x, f"{at}attention.output.LayerNorm")
        wide = dense(x, f"{at}intermediate.dense")
        wide = wide * 0.5 * (1 + erf(wide / np.sqrt(2)))
        x = norm(dense(wide, f"{at}output.dense") + x, f"{at}output.LayerNorm")
    return x


def test_hidden_states_equal_the_formula(mode, directory):
    network, _ = BertForSequenceClassification.from_pretrained(directory)
    network.set_train(False)
    ids, mask, kinds = batch(padding=3)
    hidden, _ = network.bert(ids, mask, kinds)
    expected = reference(load_file(directory / "model.safetensors"), ids.asnumpy(), mask.asnumpy())
    np.testing.assert_allclose(hidden.asnumpy()[:, :7], expected[:, :7], atol=2e-5)


@pytest.mark.exhaustive_in_graph("*-config0")
@pytest.mark.parametrize(
    "config",
    [
        PrefixConfig(tokens=3),
        PrefixConfig(tokens=3, projection=False),
        PTuning2Config(tokens=3),
        PTuning2Config(tokens=3, projection=True),
    ],
)
def test_a_prefix_is_seen_by_every_position(mode, directory, config):
    network, _ = BertForSequenceClassification.from_pretrained(directory)
    network.set_train(False)
    inject(network, config)
    ids, mask, kinds = batch(padding=2)
    hidden, _ = network.bert(ids, mask, kinds)
    pairs = [[part.asnumpy() for part in pair] for pair in network.bert.encoder.prefix()]
    expected = reference(load_file(directory / "model.safetensors"), ids.asnumpy(), mask.asnumpy(), pairs)
    np.testing.assert_allclose(hidden.asnumpy()[:, :7], expected[:, :7], atol=2e-5)


def test_more_tokens_than_positions_are_an_error(mode, directory):
    network, _ = BertForSequenceClassification.from_pretrained(directory)
    inject(network, PTuning2Config(tokens=30))
    with pytest.raises(ValueError, match="7 tokens after a prefix of 30 are more than the 32 positions"):
        network(*batch())


def test_padding_changes_nothing(mode, directory):
    network, _ = BertForSequenceClassification.from_pretrained(directory, pooling="mean")
    network.set_train(False)
    short, long = (network(*batch(padding=padding)).asnumpy() for padding in (0, 6))
    np.testing.assert_allclose(short, long, atol=1e-5)


def test_float16_gives_nearly_the_same(mode, directory):
    whole, half = (BertForSequenceClassification.from_pretrained(directory)[0] for _ in range(2))
    for parameter in half.get_parameters():
        parameter.set_dtype(ms.float16)
    hidden = [network.bert.set_train(False)(*batch(padding=2))[0] for network in (whole, half)]
    assert hidden[1].dtype == ms.float16
    np.testing.assert_allclose(hidden[1].asnumpy(), hidden[0].asnumpy(), atol=3e-2)


def test_cells_have_hugging_face_paths(directory):
    network, _ = BertForSequenceClassification.from_pretrained(directory)
    names = {parameter.name for parameter in network.get_parameters()}
    assert "bert.encoder.layer.0.attention.self.query.weight" in names
    assert "bert.encoder.layer.1.output.LayerNorm.gamma" in names
    assert all(path == parameter.name for path, parameter in network.parameters_and_names())


def test_a_new_head_is_reported(directory):
    _, report = BertForSequenceClassification.from_pretrained(directory, num_labels=3)
    assert report.missing == ["classifier.weight", "classifier.bias"]
    assert not report.misshaped


def test_names_with_the_prefix_load_as_well(directory, tmp_path):
    write_model(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    save_file({f"bert.{name}": value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    plain, _ = BertForSequenceClassification.from_pretrained(directory)
    prefixed, report = BertForSequenceClassification.from_pretrained(tmp_path)
    assert not report.unexpected
    for one, other in zip(plain.bert.get_parameters(), prefixed.bert.get_parameters()):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())


def test_every_problem_is_in_one_report(directory, tmp_path):
    write_model(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["extra"] = np.zeros(2, np.float32)
    del tensors["embeddings.LayerNorm.bias"]
    tensors["encoder.layer.0.output.dense.bias"] = np.zeros(5, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PretrainedFilesError) as error:
        BertForSequenceClassification.from_pretrained(tmp_path)
    message = str(error.value)
    assert "missing in the files: bert.embeddings.LayerNorm.beta" in message
    assert "unexpected in the files: extra" in message
    assert "bert.encoder.layer.0.output.dense.bias is (5,) in the files, (16,) here" in message


def test_bfloat16_weights_are_widened(directory, tmp_path):
    write_model(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    header, data, offset = {}, b"", 0
    for name, value in tensors.items():
        raw = (value.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [offset, offset + len(raw)]}
        data, offset = data + raw, offset + len(raw)
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    network, _ = BertForSequenceClassification.from_pretrained(tmp_path)
    expected = tensors["embeddings.word_embeddings.weight"]
    table = network.bert.embeddings.word_embeddings.embedding_table.asnumpy()
    np.testing.assert_allclose(table, expected, rtol=2**-7)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "There is no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"not safetensors"), "cannot be read as safetensors"),
        (lambda d: (d / "config.json").unlink(), "There is no file"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "not of a BERT"),
        (lambda d: (d / "config.json").write_text('{"hidden_size": 7}'), "multiple of 'num_attention_heads'"),
    ],
)
def test_broken_directories_are_named(tmp_path, break_it, says):
    write_model(tmp_path)
    break_it(tmp_path)
    with pytest.raises(PretrainedFilesError, match=says):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_hidden_size_must_fit_the_heads():
    with pytest.raises(ValueError, match="multiple of 'num_attention_heads'"):
        BertConfig(hidden_size=10, num_attention_heads=3)


@pytest.mark.models
def test_real_weights_give_the_reference_cosines(mode, minilm):
    from mindpet.models.pretrained import load_tokenizer

    tokenizer = load_tokenizer(minilm)
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    texts = ["That is a happy person", "That is a very happy person", "Today is a sunny day"]
    encodings = tokenizer.encode_batch(texts)
    ids, mask = (
        Tensor(np.array([getattr(e, name) for e in encodings], np.int32)) for name in ("ids", "attention_mask")
    )
    network, _ = BertForSequenceClassification.from_pretrained(minilm)
    network.set_train(False)
    hidden, _ = network.bert(ids, mask, ms.ops.zeros_like(ids))
    vectors = mean_pool(hidden, mask).asnumpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[0] @ vectors[1:].T, [0.943, 0.257], atol=0.002)
