"""Tokens chosen from logits, and text that appears only when it is certain. Nothing here trusts the cache."""

import mindspore as ms
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds

from mindpet import LoRAConfig, PrefixConfig, inject
from mindpet.models.generation import ENDED, generate, stream_text
from mindpet.models.sampling import NotFiniteError, Sampling
from mindpet.models.text_pieces import StopStrings, WholeCharacters, end_tokens
from tests.models.causal import WORDS, build, fill, logits, tokens

PROMPT = tokens(1, 6)[0].tolist()


def last_logits(network, ids):
    """By the whole network, without a cache; padded to one length, so that graph mode compiles once."""
    width = 24
    row = np.pad(ids, (0, width - len(ids)))[None]
    return logits(network, row, np.arange(width)[None] < len(ids))[0, len(ids) - 1]


def softmax(values):
    exponents = np.exp(values.astype(np.float64) - values.max())
    return exponents / exponents.sum()


def prepared(kind, method):
    network = build(kind, 1)
    changes = {"lora": LoRAConfig(rank=2), "prefix": PrefixConfig(tokens=3, embed_dim=8, mid_dim=8)}
    return fill(inject(network, changes[method])) if method else network


CASES = [("llama", None), ("gpt2, untied", None), ("llama", "lora"), ("gpt2, untied", "prefix"), ("llama", "prefix")]


@pytest.mark.exhaustive_in_graph("*-gpt2, untied-prefix")
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_greedy_takes_the_likeliest_token_of_the_full_network(mode, kind, method):
    network = prepared(kind, method)
    found = list(generate(network, PROMPT, max_tokens=8))
    assert len(set(found)) > 1
    for count, token in enumerate(found):
        assert token == last_logits(network, PROMPT + found[:count]).argmax()


def test_greedy_is_what_generation_with_dropout_gives_and_training_goes_on():
    network = build("gpt2, untied", 1, attn_pdrop=0.5, embd_pdrop=0.5)
    expected = list(generate(network, PROMPT, max_tokens=6))
    network.set_train(True)
    assert list(generate(network, PROMPT, max_tokens=6)) == expected
    assert all(cell.training for _, cell in network.cells_and_names())


def test_sampled_tokens_are_in_the_nucleus_and_among_the_top(mode):
    network = build("llama", 1)
    found = []
    for seed in range(6):
        new = list(generate(network, PROMPT, max_tokens=5, temperature=1.5, top_k=6, top_p=0.8, seed=seed))
        found.append(new)
        for count, token in enumerate(new):
            values = last_logits(network, PROMPT + new[:count]) / 1.5
            best = sorted(range(WORDS), key=lambda word: -values[word])[:6]
            chances = softmax(values[best])
            assert token in best
            # those that are likelier do not fill the nucleus; the margin is for the cache's rounding
            assert chances[: best.index(token)].sum() < 0.8 + 1e-4
    assert len({tuple(new) for new in found}) > 3


def test_the_same_seed_draws_the_same_tokens():
    network = build("gpt2", 1)
    one, again, other = (
        list(generate(network, PROMPT, max_tokens=12, temperature=1.0, seed=seed)) for seed in (4, 4, 5)
    )
    assert one == again != other


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1, None, None), (0.5, 4, None), (2.0, None, 0.6)])
def test_many_draws_follow_the_distribution(temperature, top_k, top_p, rng):
    values = rng.standard_normal(12).astype(np.float32)
    chances = softmax(values / temperature)
    order = np.argsort(-chances)
    left = order[:top_k]
    if top_p:
        left = order[: np.searchsorted(np.cumsum(chances[order]), top_p) + 1]
    expected = np.zeros(12)
    expected[left] = chances[left] / chances[left].sum()
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    draws = 20000
    counts = np.bincount([sampling.choose(values, rng) for _ in range(draws)], minlength=12)
    assert counts[expected == 0].sum() == 0
    drawn = expected > 0
    square = ((counts - draws * expected)[drawn] ** 2 / (draws * expected[drawn])).sum()
    assert square < 30  # 11 degrees of freedom at most: beyond this once in 600 times


def test_the_edges_of_sampling(rng):
    values = np.array([2.0, 5.0, 5.0, 1.0], np.float32)
    for sampling in (
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=1e-300, top_k=1),
    ):
        assert [sampling.choose(values, rng) for _ in range(5)] == [1] * 5  # one of two equal ones, always the same
    assert sorted(Sampling(temperature=1.0, top_k=99, top_p=1.0).candidates(values)[0]) == [0, 1, 2, 3]
    with pytest.raises(NotFiniteError):
        Sampling().choose(np.array([0.0, np.nan]), rng)


def test_rows_of_a_batch_are_as_if_alone(mode):
    network = build("llama", 1)
    prompts = [tokens(1, 6)[0], tokens(1, 3, seed=2)[0]]
    options = {"max_tokens": 7, "temperature": 1.0, "seed": 3}
    alone = [list(generate(network, row, **options)) for row in prompts]
    padded = np.stack([np.pad(row, (6 - len(row), 0)) for row in prompts])
    mask = np.array([[1] * 6, [0] * 3 + [1] * 3])
    together = np.array(list(generate(network, padded, attention_mask=mask, **options)))
    assert together.shape == (7, 2)
    assert together[:, 0].tolist() == alone[0]
    greedy = [list(generate(network, row, max_tokens=7)) for row in prompts]
    stop = greedy[1][2]
    first = greedy[1].index(stop) + 1
    found = np.array(list(generate(network, padded, attention_mask=mask, max_tokens=7, stop_tokens=[stop])))
    assert found[:first, 1].tolist() == greedy[1][:first]
    assert (found[first:, 1] == ENDED).all()
    if stop not in greedy[0]:
        assert found[:, 0].tolist() == greedy[0]


def test_a_stop_token_is_given_out_and_ends():
    network = build("llama", 1)
    all_of_them = list(generate(network, PROMPT, max_tokens=8))
    stop = all_of_them[3]
    end = all_of_them.index(stop) + 1
    assert list(generate(network, PROMPT, max_tokens=8, stop_tokens=[stop])) == all_of_them[:end]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_tokens": 0}, "'max_tokens' must be an int of 1 or more, but got 0"),
        ({"max_tokens": True}, "'max_tokens'"),
        ({"temperature": -1}, "'temperature' must be a number of 0 or more, but got -1"),
        ({"temperature": float("nan"), "seed": -1}, "'temperature'.*'seed'"),
        ({"temperature": 1, "top_p": 1.5, "top_k": 0}, "'top_k'.*'top_p' must be a number above 0"),
        ({"top_p": 0.9}, "takes a 'temperature' above 0"),
        ({"stop_tokens": [WORDS], "max_tokens": "3"}, f"'max_tokens'.*'stop_tokens' must be ints in \\[0, {WORDS}\\)"),
        ({"stop_tokens": 3}, "'stop_tokens'"),
        ({"input_ids": []}, "'input_ids' must be ints"),
        ({"input_ids": [1.5]}, "'input_ids' must be ints"),
        ({"input_ids": [3, WORDS]}, f"go from 3 to {WORDS}"),
        ({"attention_mask": [[0, 0]], "input_ids": [[1, 2]]}, "'attention_mask'"),
        ({"max_tokens": 196}, "201 tokens, prefix included, are more than the 200 positions"),
    ],
)
def test_wrong_arguments_are_refused_at_once(changes, says):
    with pytest.raises(ValueError, match=says):
        generate(build("llama", 1), **{"input_ids": PROMPT, "max_tokens": 2, **changes})


def words_tokenizer(words):
    """Byte-level pieces, one a token; what is not UTF-8 by itself may be a piece too."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = byte_names()
    vocabulary = {"".join(names[byte] for byte in word): number for number, word in enumerate(words)}
    assert len(vocabulary) == len(words)
    tokenizer = Tokenizer(kinds.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    return tokenizer


def byte_names():
    """The letter that stands for each byte: itself where it can be printed, else the next from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    following = iter(range(256, 512))
    return [chr(byte) if byte in printed else chr(next(following)) for byte in range(256)]


def pieces_of(words, numbers=None):
    characters = WholeCharacters(words_tokenizer(words).decode)
    found = [characters.add(number) for number in (range(len(words)) if numbers is None else numbers)]
    return [*found, characters.rest()]


def test_halves_of_characters_wait_for_each_other():
    wave, euro = "🌊".encode(), "€".encode()
    words = [b"sea ", wave[:1], wave[1:3], wave[3:] + b"!", b" " + euro[:2], euro[2:] + wave[:2], wave[2:]]
    assert pieces_of(words) == ["sea ", "", "", "🌊!", " ", "€", "🌊", ""]
    assert pieces_of([b"a", wave[:2]]) == ["a", "", "\ufffd"]
    assert pieces_of([wave[:2], b"b"]) == ["", "\ufffdb", ""]


def test_pieces_add_up_to_the_whole_text_whatever_the_bytes(rng):
    words = [bytes([byte]) for byte in range(256)] + ["é€🌊".encode()[at : at + 3] for at in (0, 2, 4, 6)]
    tokenizer = words_tokenizer(words)
    likely = [*b"ab \xc3\xa9\xe2\x82\xac\xf0\x9f\x8c\x8a", *range(256, 260)]
    for _ in range(50):
        numbers = rng.choice(likely, 40).tolist()
        assert "".join(pieces_of(words, numbers)) == tokenizer.decode(numbers)


def test_a_space_that_a_decoder_drops_at_the_beginning_is_kept_between_pieces():
    tokenizer = Tokenizer(kinds.WordLevel({"▁one": 0, "▁two": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4}, "▁one"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    characters = WholeCharacters(tokenizer.decode)
    numbers = [0, 1, 2, 3, 4, 2, 3, 4, 1]
    found = [characters.add(number) for number in numbers]
    assert found == ["one", " two", "", "", "€", "", "", "€", " two"]


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["END"], ["a E", "ND b"], ["a ", ""], "END"),
        (["END"], ["a E", "N", "E", "N", "D"], ["a ", "", "EN", "", ""], "END"),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], "aab"),
        (["\n\n", "User:"], ["one\n", "two\nUs", "er: x\n\n"], ["one", "\ntwo\n", ""], "User:"),
        (["END"], ["EN"], [""], None),
    ],
)
def test_stop_strings_over_several_pieces_are_never_shown(stops, pieces, shown, found):
    reader = StopStrings(stops)
    assert [reader.add(piece) for piece in pieces] == shown
    assert reader.found == found
    assert reader.rest() == ("EN" if found is None else "")


@pytest.fixture
def letters():
    """A tokenizer with a letter or a half of a character for each word of the random networks."""
    words = [bytes([97 + number]) for number in range(26)]
    words += ["é".encode()[:1], "é".encode()[1:], b" ", b"\n", b"."]
    return words_tokenizer(words)


def test_text_is_streamed_until_a_stop_string(mode, letters):
    network = build("gpt2", 1)
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 1}
    stream = stream_text(network, letters, PROMPT, **options)
    whole = "".join(stream)
    drawn = list(generate(network, PROMPT, **options))
    assert stream.result.text == whole == letters.decode(drawn)
    assert (stream.result.prompt, stream.result.tokens, stream.result.stopped) == (PROMPT, drawn, "max_tokens")
    assert stream.result.prompt_seconds > 0
    assert stream.result.tokens_per_second == pytest.approx(29 / stream.result.seconds)
    assert (stream.result.compile_seconds > 0) == (mode == "graph")
    stop = whole[10:13]
    stopped = stream_text(network, letters, PROMPT, stop=["not there", stop], **options)
    assert "".join(stopped) == whole[: whole.index(stop)]
    assert stopped.result.stopped == "stop"
    assert len(stopped.result.tokens) < 30


def test_text_ends_with_an_end_token_the_positions_or_a_request(letters):
    network = build("llama", 1)
    drawn = list(generate(network, PROMPT, max_tokens=30, temperature=2.0))
    end = drawn[8]
    stream = stream_text(network, letters, PROMPT, max_tokens=30, temperature=2.0, stop_tokens=[end])
    assert "".join(stream) == letters.decode(drawn[: drawn.index(end)])
    assert stream.result.stopped == "end"
    small = build("llama", 1, max_position_embeddings=10)
    stream = stream_text(small, letters, PROMPT, max_tokens=30)
    assert "".join(stream) == letters.decode(stream.result.tokens)
    assert (len(stream.result.tokens), stream.result.stopped) == (5, "positions")  # the last is not taken in
    stream = stream_text(network, letters, PROMPT, max_tokens=30, temperature=2.0)
    next(stream)
    count = len(stream.result.tokens)
    stream.stop()
    assert len("".join(stream)) <= 2
    assert (len(stream.result.tokens), stream.result.stopped) in ((count, "interrupted"), (count + 1, "interrupted"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"stop": "END"}, "'stop' must be strings"), ({"stop": [""]}, "'stop'"), ({"prompt": [3] * 201}, "200 positions")],
)
def test_wrong_arguments_for_text(letters, changes, says):
    with pytest.raises(ValueError, match=says):
        stream_text(build("llama", 1), letters, **{"prompt": PROMPT, "max_tokens": 2, **changes})


def test_graph_mode_compiles_once_for_texts_one_after_the_other(letters):
    end = list(generate(build("llama", 1), PROMPT, max_tokens=3))[-1]
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        network = build("llama", 1)
        texts = []
        for _ in range(3):  # the stream before is still there, and has ended early
            stream = stream_text(network, letters, PROMPT, max_tokens=30, stop_tokens=[end])
            texts.append(("".join(stream), stream.result.compile_seconds))
        assert texts[0][0] == texts[1][0] == texts[2][0]
        assert max(seconds for _, seconds in texts[1:]) < texts[0][1] / 3
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_the_tokens_that_end_a_text_or_a_turn():
    tokenizer = Tokenizer(kinds.WordLevel({"a": 0, "</s>": 1, "<|im_end|>": 2, "b": 3}, "a"))
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("</s>", special=False)])
    assert end_tokens(tokenizer, {"eos_token_id": 3}) == [2, 3]
    assert end_tokens(tokenizer, {"eos_token_id": [0, 3]}) == [0, 2, 3]
    assert end_tokens(tokenizer, {}) == [1, 2]  # tuning teaches it, for want of another


@pytest.mark.models
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    from mindpet.train.writing import open_writer

    writer = open_writer(str(smollm2))
    stream = writer.write(writer.tokens_of("The capital of France is", "raw"), max_tokens=4, stop=["."])
    assert "".join(stream) == " Paris"
    stream = writer.write(writer.tokens_of("What is the capital of France?"), max_tokens=20)
    assert "Paris" in "".join(stream)
    assert (writer.form, stream.result.stopped) == ("chat", "end")
