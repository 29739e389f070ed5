"""What a method costs: the formulas in the docstrings, against parameters and against the arithmetic compiled."""

import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import METHODS, inject
from mindpet.delta import AdaptionSlot, PrefixSlot, PromptSlot
from tests.test_contract import WIDTH, Reader, config
from tests.work import work_of

IN, OUT, WORDS = 24, 16, 11
TEXTS, SEQ = 3, 5


def ones(*shape):
    return Tensor(np.ones(shape, np.float32))


def text(seq):
    return ones(TEXTS, seq, WIDTH)


@dataclass(frozen=True)
class Place:
    """A network with a cell of some kind, and an input for it.

    Attributes:
        build: makes the network.
        path: of the cell.
        given: the input.
        rows: in it, or places in the output.
        names: what the formulas call the sizes.
    """

    build: Callable[[], nn.Cell]
    path: str
    given: Tensor
    rows: int
    names: dict[str, int]


def alone(build, given, rows, **names):
    return Place(lambda: nn.SequentialCell(OrderedDict(feed=nn.SequentialCell(build()))), "feed.0", given, rows, names)


def in_a_reader(path):
    sizes = {"hidden": WIDTH, "heads": 2, "layers": 2, "seq": SEQ}
    return Place(Reader, path, text(SEQ), TEXTS * SEQ, sizes)


NUMBERS = Tensor(np.arange(TEXTS * SEQ).reshape(TEXTS, SEQ).astype(np.int32) % WORDS)
PLACES = {
    nn.Dense: alone(lambda: nn.Dense(IN, OUT), ones(TEXTS, SEQ, IN), TEXTS * SEQ),
    nn.Embedding: alone(lambda: nn.Embedding(WORDS, 8), NUMBERS, TEXTS * SEQ, vocabulary=WORDS, dim=8),
    nn.Conv1d: alone(lambda: nn.Conv1d(IN, OUT, 2, pad_mode="valid"), ones(TEXTS, IN, 6), TEXTS * 5, kh=1, kw=2),
    nn.Conv2d: alone(
        lambda: nn.Conv2d(IN, OUT, (3, 2), pad_mode="valid"), ones(TEXTS, IN, 6, 4), TEXTS * 12, kh=3, kw=2
    ),
    PrefixSlot: in_a_reader("prefix"),
    PromptSlot: in_a_reader("prompts"),
    AdaptionSlot: in_a_reader("layers.0.adaption"),
}
OPTIONS = {  # beside those of the contract tests
    "adalora": [{"initial_rank": 5}],
    "adapter": [{"size": 7}],
    "adapter_fusion": [{"value": False}, {"adapters": 3, "size": 5}],
    "boft": [{"block_size": 4}, {"blocks": 4, "block_size": 0}],
    "compacter": [{"low_rank": False}, {"shared": False}, {"rank": 3, "phm_dim": 4, "size": 8}],
    "dora": [{"rank": 5}],
    "hra": [{"rank": 5}, {"rank": 3, "gram_schmidt": True}],
    "ia3": [{"feedforward": None}],
    "loha": [{"rank": 5}],
    "lokr": [{"rank": 1}, {"rank": 8}, {"decompose_factor": 2}, {"decompose_both": True, "rank": 1}],
    "lora": [{"rank": 5}, {"rank_pattern": {"feed.*": 3}}, {"start": "pissa"}],
    "low_rank_adapter": [{"reduction_factor": 2, "rank": 3}],
    "miss": [{"rank": 5}],
    "oft": [{"block_share": True}, {"terms": 7, "block_size": 4}, {"cayley_neumann": False}],
    "p_tuning": [{"encoder_hidden": 6}, *({"encoder": "lstm", "encoder_layers": layers} for layers in (1, 2))],
    "prefix": [{"projection": False}],
    "ptuning2": [{"projection": True}],
    "parallel_adapter": [{"size": 7}],
    "qlora": [
        {"double_quantisation": False},
        {"block_size": 100},
        {"bits": "int8", "block_size": 8, "double_quantisation": False},
    ],
    "randlora": [{"rank": 5}],
    "vera": [{"rank": 5}],
}


def cases():
    for method in METHODS.values():
        for kind in method.adapt:
            yield pytest.param(method, kind, {}, id=f"{method.name}-{kind.__name__}")
            for options in OPTIONS.get(method.name, ()) if kind in (nn.Dense, PromptSlot, PrefixSlot) else ():
                words = ",".join(f"{name}={value}" for name, value in options.items())
                yield pytest.param(method, kind, options, id=f"{method.name}-{kind.__name__}-{words}")


@pytest.mark.parametrize(("method", "kind", "options"), list(cases()))
def test_the_cost_in_the_docstring_is_what_it_is(method, kind, options):
    place = PLACES[kind]
    network = place.build()
    given = replace(config(method), targets=[place.path], **options)
    cell = dict(inject(network, given).cells_and_names())[place.path]
    formulas = cost_of(cell, given)
    names = names_in_formulas(method, place, given.at(place.path), cell)
    assert value_of(formulas.pop("parameters"), names) == sum(p.size for p in network.trainable_params())
    assert formulas, f"{type(cell).__name__} does not say how many floating-point operations it costs"
    times = {"row": place.rows, "place": place.rows, "text": TEXTS, "call": 1}
    expected = sum(times[unit] * value_of(formula, names) for unit, formula in formulas.items())
    assert work_of(network, place.given) - work_before(kind) == round(expected)


@cache
def work_before(kind):
    return work_of(PLACES[kind].build(), PLACES[kind].given)


@cache
def work_of_a_reader(seq):
    """For each text."""
    return work_of(Reader(), text(seq)) / TEXTS


HEADS = {  # of the costs of a cell that has several, to whether a configuration means it
    "with an MLP": lambda given: given.encoder == "mlp",
    "with an LSTM of L layers": lambda given: given.encoder == "lstm",
    "with a projection": lambda given: given.projection,
    "without a projection": lambda given: not given.projection,
    "": lambda given: True,
}


def cost_of(cell, given):
    """Formulas by what they are of: parameters, or operations for a row, a place, a text or a call."""
    for kind in type(cell).__mro__:
        said = " ".join((kind.__doc__ or "").split())
        costs = re.findall(r"Cost(?:, ([^:]+))?: (.*?)(?=Cost, |$)", said)
        if costs:
            (told,) = [told for head, told in costs if HEADS[head](given)]
            parameters = re.search(r"``([^`]+)`` parameters", told)
            work = re.findall(r"``([^`]+)`` (?:floating-point operations )?a (row|place|text|call)\b", told)
            assert parameters, f"{kind.__name__} does not say how many parameters it costs"
            return {"parameters": parameters[1], **{unit: formula for formula, unit in work}}
    raise AssertionError(f"{type(cell).__name__} does not say what it costs")


def names_in_formulas(method, place, given, cell):
    """What the formulas may speak of: options, sizes of the cell, functions."""
    names = {**vars(inspect.getmodule(type(cell))), **vars(given), **place.names}
    names |= {
        "n_in": IN,
        "out": OUT,
        "log2": math.log2,
        "work": work_of_a_reader,
        "ceil": math.ceil,
        "r": getattr(given, "rank", None),
    }
    names |= {"e": getattr(given, "encoder_hidden", None), "size": getattr(given, "size", getattr(cell, "size", None))}
    if method.name == "oft":
        names["k"] = cell.mindpet_delta_oft_q.shape[0]
    if method.name == "lokr":
        (names["l"], names["m"]), (names["k"], names["n"]) = cell.left, cell.right
        names |= {"low_left": cell.low_left, "low_right": cell.low_right}
    if method.name == "p_tuning":
        names["L"] = given.encoder_layers
    return names


def value_of(formula, names):
    return eval(re.sub(r"\bin\b", "n_in", formula), names)
