"""Which regular expressions of adapters are taken: those that people write, and none that takes for ever."""

import re
import sys
import time

import pytest

from mindpet.interop.patterns import _ways, is_slow, parser

PATH = "base.encoder.layer.11.attention.self.query_and_more_to_come"
TAKEN = [
    r".*\.(q_proj|v_proj)$",
    r".*(query|value)",
    r"^(?!.*lm_head).*\.(?:q|k|v|o)_proj$",
    r"^(?:(?!vision_tower|audio).)*(?:q_proj|v_proj)$",
    r"(?:.*?(?:vision|image).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:up))",
    r"(?:a\.\d+\.q|b\.\d+\.q|c\.\d+\.q|d\.\d+\.q|e\.\d+\.q|f\.\d+\.q)",
    r"model\.layers\.([0-9]|1[0-9])\.self_attn\.[qkvo]_proj",
    r"(?:[^.]+\.){2}layers\.\d+\.self_attn\.(q|v)_proj",
    r"encoder\.(?:layer\.|\d+\.){1,2}query",
    r"transformer\.h\.(?:\d|1\d){1,2}\.attn",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    "all-linear",
]
REFUSED = [
    r"(\w+\.)*query!",
    r"(a|aa)*!",
    r"(.*)*!",
    r"(?:.{1,20}){1,20}!",
    r"(?:.|\w){20}(?:.|\w){20}!",
    r".*.*.*.*.*.*!",
    ".?" * 40 + r"\d\d",
    r"[a-z.]?" * 30 + "[0-9]{3}",
    ".{0,20}" * 10 + r"\d\d",
    "(?:.|..)" * 30 + r"\d\d",
    r"(?:(?:\w?){9}){9}!",
]


@pytest.mark.parametrize("pattern", TAKEN)
def test_what_people_write_is_taken_and_fast(pattern):
    assert not is_slow(pattern)
    begun = time.process_time()
    re.fullmatch(pattern, PATH)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_could_take_for_ever_is_refused(pattern):
    re.compile(pattern)
    assert is_slow(pattern)


WAYS = {
    "abc": 1,
    "a{2,5}": 4,
    "(?:ab|cd|e.)": 3,
    "(?:ab|cd)?": 4,
    "(?:ab|cd){3}": 8,
    "(?:ab|cd){3,4}": 32,
    "(a)?(?(1)b*|c)": 2 * 61,
    "(a)?(?(1)b*)": 2 * 61,
    "(?=a*)b": 1,
    "(?!a*)b*": 61,
}


@pytest.mark.parametrize("pattern", WAYS)
def test_ways_are_counted(pattern):
    assert 10.0 ** _ways(parser.parse(pattern)) == pytest.approx(WAYS[pattern])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="atomic groups and possessive repeats are new in Python 3.11")
def test_what_is_atomic_is_tried_in_one_way_unless_that_is_slow():
    assert not is_slow("(?>a*)b")
    assert not is_slow("a*+b")
    assert 10.0 ** _ways(parser.parse("(?>a*)b")) == 1
    assert is_slow("(?>(?:a|b|c|.){20})c")
    assert is_slow("(?:(?:a|b|c|.){20})++c")
