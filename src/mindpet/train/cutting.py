"""How a network's layers are cut over devices: what that sends, and the strategies to write. MindSpore is not imported.

The same as :mod:`mindpet.parallel` gives for built layers; the tests hold the two together.
"""

from typing import Any

from mindpet._near import near
from mindpet.train.activations import CUTS, Cutting, LayerSizes, cut_of, place_of
from mindpet.train.presets import CellSizes, NetworkSizes

_DENSE = {"matmul": "rows in, out in", "bias": "rows out, out"}
_AXES = {  # argument of shard to the axes of its operator's inputs
    "lora": {
        "strategy_org_dense_matmul": "rows in, out in",
        "strategy_org_bias_add": "rows out, out",
        "strategy_lora_dropout": "rows in",
        "strategy_lora_a_matmul": "rows in, rank in",
        "strategy_lora_b_matmul": "rows rank, out rank",
        "strategy_lora_mul": "rows out, ",
        "strategy_lora_add": "rows out, rows out",
    },
    "adapter": {
        "strategy_matmul_org": "rows in, out in",
        "strategy_bias_org": "rows out, out",
        "strategy_matmul_down_sampler": "rows out, bottleneck out",
        "strategy_bias_down_sampler": "rows bottleneck, bottleneck",
        "strategy_non_linearity": "rows bottleneck",
        "strategy_matmul_up_sampler": "rows bottleneck, out bottleneck",
        "strategy_bias_up_sampler": "rows out, out",
        "strategy_residual_add": "rows out, rows out",
    },
    "low_rank_adapter": {
        "strategy_matmul_org": "rows in, out in",
        "strategy_bias_org": "rows out, out",
        "strategy_matmul_down_sampler_weight": "out rank, rank bottleneck",
        "strategy_matmul_down_sampler_input": "rows out, out bottleneck",
        "strategy_bias_down_sampler": "rows bottleneck, bottleneck",
        "strategy_non_linearity": "rows bottleneck",
        "strategy_matmul_up_sampler_weight": "bottleneck rank, rank out",
        "strategy_matmul_up_sampler_input": "rows bottleneck, bottleneck out",
        "strategy_bias_up_sampler": "rows out, out",
        "strategy_residual_add": "rows out, rows out",
    },
}
_OF_BIAS = ("strategy_org_bias_add", "strategy_bias_org", "bias")


def strategies_of(method: str, cell: CellSizes, data_parallel: int, cutting: Cutting) -> dict[str, tuple]:
    """The arguments of ``shard`` of an adapted dense layer; of its two operators, for one that is not adapted.

    >>> cell = CellSizes("layer.query", "dense", {"weight": (16, 8)})
    >>> strategies_of("lora", cell, 2, Cutting(4))["strategy_lora_b_matmul"]
    ((2, 1), (4, 1))
    """
    by_rows = cut_of(place_of(cell.path), cutting.cut) == "rows"
    parts = {"rows": data_parallel, "out" if by_rows else "in": cutting.model_parallel}
    table = _AXES.get(method, _DENSE)
    return {
        argument: tuple(tuple(parts.get(axis, 1) for axis in names.split()) for names in axes.split(","))
        for argument, axes in table.items()
        if argument not in _OF_BIAS or "bias" in cell.shapes
    }


def local_size(cell: CellSizes, name: str, cutting: Cutting) -> int:
    """Numbers of a parameter of the network on one device: dense layers of the blocks are cut, all else is whole."""
    size = 1
    for axis in cell.shapes[name]:
        size *= axis
    place = place_of(cell.path) if cell.kind == "dense" else ""
    if place and (name == "weight" or cut_of(place, cutting.cut) == "rows"):
        return size // cutting.model_parallel
    return size


def local_delta(method: str, cell: CellSizes, added: int, given: dict[str, Any], rank: int, cutting: Cutting) -> int:
    """Numbers that the method adds at a cell, on one device: LoRA's A or B is cut, and an adapter if cut by rows."""
    parts = cutting.model_parallel
    place = place_of(cell.path) if cell.kind == "dense" else ""
    if parts == 1 or not place:
        return added
    out, inputs = cell.shapes["weight"]
    by_rows = cut_of(place, cutting.cut) == "rows"
    if method == "lora":
        return rank * (inputs + out // parts if by_rows else inputs // parts + out)
    if by_rows and method == "adapter":
        return 2 * given["size"] * out // parts + given["size"] + out // parts
    if by_rows and method == "low_rank_adapter":
        width = out // given["reduction_factor"]
        return 2 * rank * (out // parts + width) + width + out // parts
    return added


def problems_of_numbers(
    batch: int, seq: int, devices: int | None, data_parallel: int, model_parallel: int, cut: str | None
) -> list[str]:
    """Everything that is wrong with them by themselves."""
    numbers = {"batch": batch, "seq": seq, "data_parallel": data_parallel, "model_parallel": model_parallel}
    if devices is not None:
        numbers["devices"] = devices
    found = [
        f"'{name}' must be a positive int, but is {value!r}"
        for name, value in numbers.items()
        if type(value) is not int or value <= 0
    ]
    if cut is not None and cut not in CUTS:
        found.append(f"'cut' must be one of {', '.join(CUTS)}, but is {cut!r}{near(cut, CUTS)}")
    if found:
        return found
    if devices is not None and devices != data_parallel * model_parallel:
        product = f"data_parallel={data_parallel} times model_parallel={model_parallel}"
        found.append(f"devices={devices} is not {product}, which is {data_parallel * model_parallel}")
    if batch % data_parallel:
        found.append(f"batch={batch} cannot be cut into data_parallel={data_parallel} equal parts")
    return found


def problems_of(network: NetworkSizes, sizes: LayerSizes, cutting: Cutting) -> list[str]:
    """Everything that cannot be cut into so many parts."""
    parts = cutting.model_parallel
    if parts == 1:
        return []
    found = []
    if cutting.output_parts("x") > 1:
        if sizes.heads % parts:
            found.append(f"{sizes.heads} attention heads cannot be shared out over model_parallel={parts}")
        if sizes.key_heads % parts and parts % sizes.key_heads:
            found.append(f"{sizes.key_heads} heads of keys and values do not fit model_parallel={parts}")
    for path, cell in dense_layers(network).items():
        by_rows = cut_of(place_of(cell.path), cutting.cut) == "rows"
        size = cell.shapes["weight"][0 if by_rows else 1]
        if size % parts:
            what = "output" if by_rows else "input"
            found.append(f"the {size} {what} features of {path} cannot be cut into model_parallel={parts} equal parts")
    return found


def dense_layers(network: NetworkSizes) -> dict[str, CellSizes]:
    """The dense layers of the first block, by a pattern that matches them in all blocks."""
    found: dict[str, CellSizes] = {}
    for cell in network.cells:
        if cell.kind == "dense" and place_of(cell.path):
            found.setdefault(pattern_of(cell.path), cell)
    return found


def pattern_of(path: str) -> str:
    """A path with a star for the number of its layer.

    >>> pattern_of("model.layers.3.mlp.up_proj")
    'model.layers.*.mlp.up_proj'
    """
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def reduced(size: float, devices: int) -> float:
    """Bytes that each device sends in a ring AllReduce of `size` bytes: 2 (d - 1) / d of them."""
    return 2 * size * (devices - 1) / devices


def own_sums(method: str, cell: CellSizes, given: dict[str, Any], rank: int, cutting: Cutting) -> int:
    """Numbers a row of the method's own partial sums at an adapted dense layer, forward and backward.

    LoRA adds up the r numbers between A and B, forward where A is cut, backward where B is; an adapter that is cut by
    rows its bottleneck, both ways.
    """
    by_rows = cut_of(place_of(cell.path), cutting.cut) == "rows"
    if method == "lora":
        return rank
    if by_rows and method == "adapter":
        return 2 * given["size"]
    if by_rows and method == "low_rank_adapter":
        return 2 * (cell.shapes["weight"][0] // given["reduction_factor"])
    return 0


def sent_in_layer(sizes: LayerSizes, own: int, rows: int, item: int, cutting: Cutting) -> float:
    """Bytes that each device sends for model parallelism in one layer, forward and backward.

    With n rows, o the outputs and i the inputs of a dense layer, m devices:

    - rows and columns by turns: after the attention and after the feed-forward network the partial sums of n h are
      added up (AllReduce), and in the backward pass the gradients of their inputs, n h each;
    - by rows: the outputs of the attention, its dense layer and both halves of the feed-forward network are gathered,
      (m - 1) / m of each; backward, the gradients of all inputs are partial sums: AllReduce of n i;
    - by columns: the outputs of all dense layers are partial sums: AllReduce of n o; backward, the gradients of
      their inputs are gathered.

    `own` are the method's own partial sums, in numbers a row.
    """
    parts = cutting.model_parallel
    if parts == 1:
        return 0.0
    hidden, inner, queries, keys = sizes.hidden, sizes.inner, sizes.queries, sizes.keys
    wide = (2 if sizes.gated else 1) * inner
    gathered, summed = {
        None: (0, 4 * hidden),
        "rows": (queries + hidden + inner + hidden, 2 * hidden + queries + inner),
        "columns": (2 * hidden + queries + inner, queries + 2 * keys + hidden + wide + hidden),
    }[cutting.cut]
    return rows * item * (gathered * (parts - 1) / parts + reduced(summed + own, parts))
