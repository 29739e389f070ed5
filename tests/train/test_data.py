import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindpet.models.pretrained import load_tokenizer
from mindpet.train.data import DataError, Rows, encode, overlapping, read_rows, split_rows
from mindpet.train.step import IGNORED
from tests.tiny import write_model, write_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_model(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"text": "a b", "label": 1}\n\n{"text": "c, d", "label": "x"}\n'),
        ("rows.csv", 'label,text\n1,a b\nx,"c, d"\n'),
        ("rows.tsv", "text\tlabel\na b\t1\nc, d\tx\n"),
    ],
)
def test_each_format_gives_the_same_rows(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    rows = read_rows(path)
    assert (rows.texts, rows.labels, rows.broken) == (["a b", "c, d"], ["1", "x"], [])


def test_a_folder_per_label(tmp_path):
    for label, text in (("x", "one"), ("y", "two")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.txt").write_text(text + "\n")
    (tmp_path / "y" / "2.txt").write_bytes(b"\xa3 five")
    rows = read_rows(tmp_path)
    assert (rows.texts, rows.labels) == (["one", "two"], ["x", "y"])
    assert len(rows.broken) == 1
    assert "y/2.txt" in rows.broken[0]


def test_broken_rows_are_named_by_line_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = [
        "{",
        "[1]",
        '{"text": "a"}',
        '{"text": "", "label": 1}',
        '{"text": {}, "label": 1}',
        '{"txt": "a", "label": 1}',
    ]
    path.write_text('{"text": "good", "label": "1"}\n' + "\n".join(bad) + "\n")
    rows = read_rows(path)
    assert rows.texts == ["good"]
    assert len(rows.broken) == len(bad)
    assert rows.broken[0].startswith("rows.jsonl, line 2: not JSON")
    assert "line 4: no 'label' (it has: text)" in rows.broken[2]
    meant = write_rows(tmp_path / "meant.jsonl", [{"comment": "a", "label": "b"}])
    with pytest.raises(DataError, match=r"no 'coment' \(it has: comment, label\) \(did you mean 'comment'\?\)"):
        read_rows(meant, text="coment")
    assert "and 1 more" in rows.broken_in_words()


def test_a_csv_row_with_too_few_fields_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\ngood,1\nonly\n")
    rows = read_rows(path)
    assert rows.broken == ["rows.csv, line 3: 1 fields where the header has 2"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: d / "none.jsonl", "There is no file or folder"),
        (lambda d: d, "no folders"),
        (lambda d: _write(d / "rows.xlsx", "x"), "known endings"),
        (lambda d: _write(d / "rows.jsonl", '{"a": 1}\n'), "no usable row.*no 'text'"),
        (lambda d: _write(d / "rows.csv", ""), "no usable row. It has none at all"),
        (
            lambda d: _write(d / "rows.csv", "text,label\na,b\n", "utf-16"),
            r"is not UTF-8: its header is \\udcff\\udcfet",
        ),
        (
            lambda d: _write(d / "rows.csv", "text,label\na,b\n", "utf-16-le"),
            "has NUL|contains NUL",
        ),
        (lambda d: _write(d / "rows.csv", "text,label\na\0b,c\n"), "line 2: .*NUL"),
        (
            lambda d: _write(d / "rows.jsonl", '{"text": "a\\u0000b", "label": "c"}'),
            "line 1: 'text' has NUL",
        ),
        (lambda d: _write(d / "news" / "a.txt", "a\0b").parents[1], "news/a.txt: has NUL characters"),
        (lambda d: _write(d / "rows.csv", "a\x1b[31m,label\nb,c\n"), r"no 'text' \(it has: a\\x1b\[31m, label\)"),
    ],
)
def test_data_that_cannot_be_used_is_explained(tmp_path, make, says):
    with pytest.raises(DataError, match=f"(?s){says}"):
        read_rows(make(tmp_path))


def _write(path, content, encoding="utf-8"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding=encoding)
    return path


@given(st.lists(st.integers(0, 30), min_size=3, max_size=60), st.integers(1, 20), st.integers(0, 5))
def test_a_split_keeps_equal_texts_on_one_side(numbers, holdout, seed):
    rows = Rows([str(n) for n in numbers], ["x"] * len(numbers))
    smallest = min(numbers.count(number) for number in numbers)
    if holdout >= len(rows) or smallest > holdout:
        with pytest.raises(DataError):
            split_rows(rows, holdout, seed)
        return
    train, test = split_rows(rows, holdout, seed)
    assert sorted(train.texts + test.texts) == sorted(rows.texts)
    assert not overlapping(train, test)
    assert len(test) <= holdout
    if len(set(numbers)) == len(numbers):
        assert len(test) == holdout
    assert split_rows(rows, holdout, seed)[1].texts == test.texts


def test_overlapping_rows_are_found():
    assert overlapping(Rows(["a", "b", "c"], ["x"] * 3), Rows(["c", "z"], ["x"] * 2)) == [2]


def test_encoding_pads_cuts_and_counts(tokenizer):
    rows = Rows(["boat", "boat wave fish tide sail the old new near under over and"], ["sea", "land"])
    encoded = encode(tokenizer, rows, ["land", "sea"], max_length=10)
    ids, mask = encoded.columns["input_ids"], encoded.columns["attention_mask"]
    assert ids.shape == (3, 10)
    assert mask.sum(1).tolist() == [3, 10, 1]
    assert ids[0, :3].tolist() == [2, tokenizer.token_to_id("boat"), 3]
    assert encoded.columns["labels"].tolist() == [1, 0, IGNORED]
    assert encoded.cut == 1


def test_pairs_get_segment_ids(tokenizer):
    encoded = encode(tokenizer, Rows([("boat", "wave")], ["x"]), ["x"], 16)
    assert encoded.columns["token_type_ids"][0, :6].tolist() == [0, 0, 0, 1, 1, 0]


def test_an_unknown_label_does_not_count(tokenizer):
    assert encode(tokenizer, Rows(["boat"], ["?"]), ["x"], 8).columns["labels"][0] == IGNORED


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_batches_follow_the_order_and_fill_up_with_rows_that_do_not_count(tokenizer, skip):
    rows = Rows(["boat", "wave", "fish", "tide", "sail"], list("abcde"))
    encoded = encode(tokenizer, rows, list("abcde"), 8)
    order = np.array([4, 2, 0, 1, 3])
    labels = [batch["labels"].asnumpy().tolist() for batch in encoded.batches(order, 2, skip)]
    assert labels == [[4, 2], [0, 1], [3, IGNORED]][skip:]


def test_quotes_are_letters_in_a_tsv_and_quotes_in_a_csv(tmp_path):
    tsv = _write(tmp_path / "rows.tsv", 'text\tlabel\n"Hello\t1\nworld"\t2\n')
    assert read_rows(tsv).texts == ['"Hello', 'world"']
    csv_file = _write(tmp_path / "rows.csv", 'text,label\n"two\nlines",1\n"open,2\nnever closed,3\n')
    rows = read_rows(csv_file)
    assert rows.texts == ["two\nlines"]
    assert len(rows.broken) == 1
    assert rows.broken[0].startswith("rows.csv, line 4: ")
    assert "lines after it" in rows.broken[0]


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="two columns with the same name: text"):
        read_rows(_write(tmp_path / "rows.csv", "text,label,text\na,1,b\n"))


def test_labels_mean_the_same_in_every_format(tmp_path):
    content = "".join(
        f'{{"text": "a{i}", "label": {label}}}\n' for i, label in enumerate(["true", "1.0", '" x "', "2"])
    )
    assert read_rows(_write(tmp_path / "rows.jsonl", content)).labels == ["true", "1", "x", "2"]
    assert read_rows(_write(tmp_path / "rows.csv", "text,label\na,true\nb, 1\n")).labels == ["true", "1"]


def test_what_is_not_unicode_is_a_broken_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = '\ufeff{"text": "good \ufffd", "label": 1}\n'.encode()
    path.write_bytes(good + b'{"text": "caf\xe9", "label": 1}\n' + rb'{"text": "bad \ud83d", "label": 1}' + b"\n")
    rows = read_rows(path)
    assert rows.texts == ["good \ufffd"]
    assert ["not UTF-8" in problem for problem in rows.broken] == [True, True]
    table = tmp_path / "rows.csv"
    table.write_bytes(b"text,label\ngood,1\ngood too,caf\xe9\n")
    assert "'label' is not UTF-8" in read_rows(table).broken[0]


def test_a_number_of_absurd_length_is_a_broken_row(tmp_path):
    path = _write(tmp_path / "rows.jsonl", '{"text": "a", "label": 1}\n{"text": ' + "9" * 5000 + ', "label": 1}\n')
    assert len(read_rows(path).broken) == 1
