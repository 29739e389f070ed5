"""Small layers of every kind that has strategies, and the usual ways to cut them over eight devices."""

import mindspore as ms

from mindpet.delta import AdapterDense, AdapterLayer, LoRADense, LowRankAdapterDense, LowRankAdapterLayer
from mindpet.parallel import ParallelConfig

IN, OUT = 32, 64
PLAIN = {"compute_dtype": ms.float32}
LAYERS = {
    "LoRADense": lambda activation="relu": LoRADense(
        IN, OUT, lora_rank=2, lora_alpha=4, lora_dropout=0.1, lora_b_init="normal", activation=activation, **PLAIN
    ),
    "AdapterDense": lambda activation="relu": AdapterDense(
        IN, OUT, bottleneck_size=8, activation=activation, non_linearity=activation, **PLAIN
    ),
    "AdapterLayer": lambda activation="relu": AdapterLayer(OUT, bottleneck_size=8, non_linearity=activation, **PLAIN),
    "LowRankAdapterDense": lambda activation="relu": LowRankAdapterDense(
        IN, OUT, reduction_factor=8, low_rank_size=2, activation=activation, non_linearity=activation, **PLAIN
    ),
    "LowRankAdapterLayer": lambda activation="relu": LowRankAdapterLayer(
        OUT, reduction_factor=8, low_rank_size=2, non_linearity=activation, **PLAIN
    ),
}
PRESETS = {
    "data": ParallelConfig(data_parallel=8),
    "rows": ParallelConfig(model_parallel=8),
    "columns": ParallelConfig(model_parallel=8, cut="columns"),
    "data and rows": ParallelConfig(data_parallel=2, model_parallel=4),
    "data and columns": ParallelConfig(data_parallel=2, model_parallel=4, cut="columns"),
}


def input_shape(layer, rows=16):
    """Of an input with so many rows."""
    return rows, layer.axis_sizes().get("in", layer.axis_sizes()["out"])


def output_parts(config):
    """Into how many parts the rows and the columns of a layer's output are cut."""
    return config.data_parallel, config.model_parallel if config.cut == "rows" else 1
