"""The floating-point work of a cell, counted in the graph that MindSpore compiles it to."""

import math
import re
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import mindspore as ms

_NODE = re.compile(r"^  %\w+\(.*?\) = (?:PrimFunc_|S_Prim_)?(\w+)\((?s:.*?)\n {6}: \((.*)\) -> \((.*)\)$", re.MULTILINE)
_SHAPE = re.compile(r"Tensor\[(?:B?Float|Complex)\d+\]\]?, \(([\d, ]*)\)")  # what is done with ints is no such work
_PRODUCTS = {"MatMul", "MatMulExt", "BatchMatMul"}
_EACH = {
    *("Add", "AddExt", "BiasAdd", "Sub", "SubExt", "Mul", "Muls", "Div", "Divs", "RealDiv"),
    *("Square", "Sqrt", "Maximum"),
}
_SUMS = {"ReduceSum", "SumExt"}
_NONE = {
    *("Load", "MakeTuple", "TupleGetItem", "UpdateState", "Depend", "StopGradient", "Return"),
    *("Cast", "Reshape", "ExpandDims", "Squeeze", "Transpose", "Concat", "Stack", "StridedSlice", "Split", "Tile"),
    *("BroadcastTo", "Gather", "ScatterNd", "Eye", "Real", "Select", "ReverseV2"),
    *("GeLU", "ReLU", "Tanh", "Softmax"),  # no activation is counted
}


def work_of(cell, *inputs) -> int:
    """Two for each addend of a product, one for each number that other arithmetic gives or sums."""
    return sum(by_operator(cell, *inputs).values())


def by_operator(cell, *inputs) -> Counter:
    """The same by kinds of operators. What is neither counted nor known to be no arithmetic is an error."""
    mode = ms.get_context("mode")
    path = ms.get_context("save_graphs_path")
    with TemporaryDirectory() as directory:
        ms.set_context(mode=ms.GRAPH_MODE, save_graphs=1, save_graphs_path=directory)
        try:
            cell(*inputs)
        finally:
            ms.set_context(mode=mode, save_graphs=0, save_graphs_path=path)
        (graph,) = Path(directory).rglob("*_optimize_[0-9]*.ir")
        text = graph.read_text()
    found: Counter = Counter()
    for kind, given, made in _NODE.findall(text):
        found[kind] += _work(kind, _shapes(given), _shapes(made))
    assert found, text
    return found


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(size) for size in found.split(",") if size.strip()) for found in _SHAPE.findall(text)]


def _work(kind: str, given: list[tuple[int, ...]], made: list[tuple[int, ...]]) -> int:
    if kind == "LSTM":  # of one layer and direction: its products, without the biases of its four gates and these
        (tokens, batch, _), (_, _, hidden), _, weights = given
        return 2 * tokens * batch * (math.prod(weights) - 4 * hidden)
    if kind in _NONE or not made:
        return 0
    size = math.prod(made[0])
    if kind in _PRODUCTS:
        rows = made[0][-2]
        return 2 * size * (given[0][-1] * given[0][-2] // rows)
    if kind == "Conv2D":
        return 2 * size * math.prod(given[1][1:])
    if kind == "IFFT2":
        return round(5 * size * math.log2(size))
    if kind == "MatrixInverse":
        return 2 * size * made[0][-1]
    if kind in _SUMS:
        return math.prod(given[0])
    assert kind in _EACH, f"is {kind} arithmetic? {given} -> {made}"
    return size
