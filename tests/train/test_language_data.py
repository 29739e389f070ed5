import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mindpet.models.pretrained import open_pretrained
from mindpet.models.text_pieces import end_tokens
from mindpet.train.config import DataSection
from mindpet.train.data import DataError, Rows
from mindpet.train.language import Codec, encode_texts, pack, read_texts, split_texts
from mindpet.train.step import IGNORED
from tests.tiny import stories, write_language_model, write_rows

ASKED = "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return Codec.of(open_pretrained(write_language_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def plain_codec(tmp_path_factory):
    return Codec.of(open_pretrained(write_language_model(tmp_path_factory.mktemp("model"), chat=False)))


def section(**keys):
    return DataSection(train="x", **keys)


def decoded(codec, ids):
    return codec.tokenizer.decode(list(ids), skip_special_tokens=False)


def learned_text(codec, text):
    ids, learned = codec.encode(text)
    return decoded(codec, ids), decoded(codec, ids[learned])


def test_a_text_file_is_one_document_and_a_folder_several(tmp_path):
    (tmp_path / "b.txt").write_text("two\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("one\n")
    (tmp_path / "c.txt").write_bytes(b"\xa3 five")
    (tmp_path / "d.txt").write_text(" \n")
    assert read_texts(tmp_path / "b.txt", section()).texts == ["two\n"]
    rows = read_texts(tmp_path, section())
    assert rows.texts == ["two\n", "one\n"]
    assert [line.split(":")[0] for line in rows.broken] == ["c.txt", "d.txt"]


@pytest.mark.parametrize(
    ("keys", "record", "text"),
    [
        ({}, {"text": "a"}, "a"),
        ({"text": "body"}, {"body": "a", "text": "b"}, "a"),
        ({}, {"prompt": "a", "response": "b"}, (("user", "a"), ("assistant", "b"))),
        ({"prompt": "q", "response": "a"}, {"q": "a", "a": "b", "text": "c"}, (("user", "a"), ("assistant", "b"))),
        ({}, {"messages": [{"role": "assistant", "content": "b"}]}, (("assistant", "b"),)),
        ({"messages": "chat"}, {"chat": [{"role": "assistant", "content": "b"}], "text": "c"}, (("assistant", "b"),)),
    ],
)
def test_the_keys_say_what_a_row_is(tmp_path, keys, record, text):
    path = write_rows(tmp_path / "rows.jsonl", [record])
    assert read_texts(path, section(**keys)).texts == [text]


def test_tables_hold_texts_and_pairs(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,response\na,b\n")
    (tmp_path / "rows.tsv").write_text("text\na b\n")
    assert read_texts(tmp_path / "rows.csv", section()).texts == [(("user", "a"), ("assistant", "b"))]
    assert read_texts(tmp_path / "rows.tsv", section()).texts == ["a b"]


def test_broken_rows_are_named(tmp_path):
    bad = [
        {"messages": "hello"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"text": "a"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "assistant", "content": "b"}]}, *bad])
    broken = read_texts(path, section()).broken
    assert len(broken) == len(bad)
    assert broken[0] == "rows.jsonl, line 2: 'messages' is not a list of messages"
    assert "message 1 of 'messages' is not an object with the texts" in broken[1]
    assert "no message of the assistant" in broken[2]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: d / "none.txt", "There is no file or folder"),
        (lambda d: d, "has no .txt files"),
        (lambda d: write_rows(d / "a.jsonl", [{"txt": "a"}]), "no usable text.*no 'text' \\(it has: txt\\)"),
        (lambda d: write_rows(d / "a.doc", []), "known endings"),
    ],
)
def test_what_cannot_be_used_is_explained(tmp_path, make, says):
    with pytest.raises(DataError, match=f"(?s){says}"):
        read_texts(make(tmp_path), section())


def test_the_end_of_a_single_document_is_held_out():
    lines = [f"line {number}\n" for number in range(10)]
    whole = Rows(["".join(lines)], [""])
    train, test = split_texts(whole, 0.25, seed=0)
    assert train.texts[0] + test.texts[0] == whole.texts[0]
    assert test.texts == ["".join(lines[7:])]
    assert split_texts(whole, 2, seed=0)[1].texts == ["".join(lines[8:])]
    one_line = Rows(["one two three four"], [""])
    assert split_texts(one_line, 0.5, seed=0)[1].texts == ["three four"]
    with pytest.raises(DataError, match="part would be empty"):
        split_texts(whole, 10, seed=0)


def test_of_several_documents_whole_ones_are_held_out():
    rows = Rows([f"document {number % 8}" for number in range(10)], [""] * 10)
    train, test = split_texts(rows, 0.3, seed=0)
    assert not set(train.texts) & set(test.texts)
    assert sorted(train.texts + test.texts) == sorted(rows.texts)


def test_the_blocks_of_a_document_hold_every_token_once(codec):
    text = stories(30)
    ids = [*codec.tokenizer.encode(text).ids, codec.end]
    encoded = encode_texts(codec, [text], 16, packing=True, blocks=True)
    inputs, labels, segments = (encoded.columns[name] for name in ("input_ids", "labels", "attention_mask"))
    assert (encoded.count, encoded.cut) == (-(-(len(ids) - 1) // 16), 0)
    flat = segments[: encoded.count].reshape(-1) > 0
    assert inputs[: encoded.count].reshape(-1)[flat].tolist() == ids[:-1]
    assert labels[: encoded.count].reshape(-1)[flat].tolist() == ids[1:]
    assert codec.tokenizer.id_to_token(codec.end) == "<|endoftext|>"


def test_only_the_response_is_learned_and_its_end(codec, plain_codec):
    pair = (("user", "Where?"), ("assistant", "the sea"))
    assert learned_text(codec, pair) == (f"{ASKED}the sea<|im_end|>", "the sea<|im_end|>")
    assert learned_text(plain_codec, pair) == ("Where?the sea<|endoftext|>", "the sea<|endoftext|>")


def test_labels_are_the_next_tokens_of_the_response(codec):
    pair = (("user", "Where?"), ("assistant", "the sea"))
    encoded = encode_texts(codec, [pair], 64, packing=False, blocks=False)
    ids, labels = encoded.columns["input_ids"][0], encoded.columns["labels"][0]
    counted = np.flatnonzero(labels != IGNORED)
    assert decoded(codec, ids[: counted[0] + 1]) == ASKED
    assert decoded(codec, labels[counted]) == "the sea<|im_end|>"
    assert labels[counted[:-1]].tolist() == ids[counted[1:]].tolist()


def test_every_turn_of_the_assistant_is_learned(codec):
    turns = (("system", "Be short."), ("user", "a"), ("assistant", "boat"), ("user", "b"), ("assistant", "star"))
    text, learned = learned_text(codec, turns)
    assert learned == "boat<|im_end|>star<|im_end|>"
    rendered = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert text == rendered.rstrip("\n")


def test_conversations_need_a_template(plain_codec):
    with pytest.raises(DataError, match="no chat template"):
        plain_codec.encode((("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))


def test_samples_of_a_row_have_numbers_of_their_own(codec):
    texts = ["the boat", "a star", "old"]
    apart = encode_texts(codec, texts, 32, packing=False, blocks=False)
    packed = encode_texts(codec, texts, 32, packing=True, blocks=False)
    assert (apart.count, packed.count) == (3, 1)
    segments = packed.columns["attention_mask"][0]
    assert sorted(set(segments.tolist())) == [0, 1, 2, 3]
    alone = {tuple(apart.columns["input_ids"][row][apart.columns["attention_mask"][row] > 0]) for row in range(3)}
    assert {tuple(packed.columns["input_ids"][0][segments == number]) for number in (1, 2, 3)} == alone
    assert packed.labelled == apart.labelled
    assert packed.columns["labels"][0][segments == 0].tolist() == [IGNORED] * int((segments == 0).sum())


def test_long_rows_are_cut_and_counted_and_those_without_a_response_left_out(codec):
    long = (("user", "Where? " * 30), ("assistant", "the sea"))
    short = (("user", "Where?"), ("assistant", "the sea " * 20))
    encoded = encode_texts(codec, [long, short], 40, packing=True, blocks=False)
    assert (encoded.count, encoded.cut, encoded.left_out) == (1, 1, 1)
    assert encoded.columns["input_ids"].shape[1] == 40
    with pytest.raises(DataError, match="No text has a token to learn within data.max_length=8"):
        encode_texts(codec, [long], 8, packing=True, blocks=False)


def test_a_role_that_is_not_unicode_is_a_broken_row(tmp_path):
    turns = [{"role": "us\ud83der", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": turns[1:]}])
    rows = read_texts(path, section())
    assert rows.broken == ["rows.jsonl, line 1: message 1 of 'messages' is not UTF-8"]
    assert rows.texts == [(("assistant", "b"),)]


@pytest.mark.parametrize("words", [{"</s>": 3}, {"<|end_of_text|>": 5, "</s>": 3}, {"<|endoftext|>": 7}], ids=str)
@pytest.mark.parametrize("named", [None, 4, [4, 6], "4", [], [True], 99], ids=str)
def test_what_is_learned_at_the_end_ends_what_is_generated(words, named):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 4, "c": 6, **words}, "a"))
    config = {"eos_token_id": named, "vocab_size": 8}
    pretrained = SimpleNamespace(tokenizer=lambda: tokenizer, config=config, chat_template=lambda: None)
    end = Codec.of(pretrained).end
    assert end in end_tokens(tokenizer, config)
    assert end == (words.get("<|endoftext|>") or (4 if named in (4, [4, 6]) else min(words.values(), key=ORDER.index)))


ORDER = [7, 5, 3]  # <|endoftext|>, <|end_of_text|>, </s>


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_packing_holds_every_sample_once_and_no_row_overflows(sizes):
    groups = pack(sizes, 12)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    filled = [sum(sizes[index] for index in group) for group in groups]
    assert max(filled) <= 12
    assert sum(fill <= 6 for fill in filled) <= 1  # two half-empty rows would have been one


def test_a_model_without_an_end_is_refused(tmp_path):
    model = write_language_model(tmp_path, eos_token_id=None)
    content = json.loads((tmp_path / "tokenizer.json").read_text().replace("<|endoftext|>", "<|begin|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="no token for the end of a text"):
        Codec.of(open_pretrained(model))
