"""The usual ways to cut a layer, and the strategies that follow for each of its operators.

::

    W (out, in)     rows                 columns
                 ┌─────────┐           ┌───┬───┐
                 │ device 0│           │ 0 │ 1 │
                 ├─────────┤           │   │   │
                 │ device 1│           │   │   │
                 └─────────┘           └───┴───┘
    input        whole                 cut
    output       cut                   whole, after an AllReduce of partial sums
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindpet import _checks
from mindpet.delta.activation import normalised_axes
from mindpet.delta.ptuning2 import PrefixEncoder
from mindpet.delta.strategy import input_axes, operator_of

_CUTS = ("rows", "columns")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a layer is cut over ``data_parallel * model_parallel`` devices.

    Attributes:
        data_parallel: into how many parts the batch is cut. It must divide the rows of the input: batch times length.
        model_parallel: into how many parts the weight is cut.
        cut: ``rows`` cuts the rows of W ``(out, in)``, so the output features are shared out: what Megatron-LM, which
            writes W transposed, calls column-parallel. ``columns`` cuts its columns, so the input features are.

    Raises:
        TypeError: a number that is not an int.
        ValueError: a number below 1, another word for `cut`.

    >>> ParallelConfig(data_parallel=2, model_parallel=4).devices
    8
    """

    data_parallel: int = 1
    model_parallel: int = 1
    cut: str = "rows"

    def __post_init__(self):
        _checks.positive_int("ParallelConfig", "data_parallel", self.data_parallel)
        _checks.positive_int("ParallelConfig", "model_parallel", self.model_parallel)
        if self.cut not in _CUTS:
            raise ValueError(
                f"For 'ParallelConfig', 'cut' must be one of {', '.join(_CUTS)}, "
                f"but got {_checks.shown(self.cut)}{_checks.near(self.cut, _CUTS)}."
            )

    @property
    def devices(self) -> int:
        """How many devices that takes."""
        return self.data_parallel * self.model_parallel

    @property
    def parts(self) -> dict[str, int]:
        """Into how many parts each axis of a layer is cut; those that are not named stay whole."""
        return {"rows": self.data_parallel, "out" if self.cut == "rows" else "in": self.model_parallel}


def strategies(layer: Any, config: ParallelConfig) -> dict[str, Any]:
    """The arguments of ``layer.shard`` for one of the usual ways to cut it.

    Cut by rows, LoRA's B is cut with W and A is whole; by columns, A is cut with W and B is whole. A bottleneck is
    never cut: by rows, the products on both sides of it are cut with the output of the layer; by columns, every device
    computes the adapter whole for its part of the batch. An activation that normalises over the features, such as
    Softmax, has them whole.

    Args:
        layer: a LoRADense, AdapterDense, AdapterLayer, LowRankAdapterDense, LowRankAdapterLayer or PrefixEncoder.
        config: how to cut it. The heads of a PrefixEncoder are cut either way.

    Raises:
        TypeError: another layer.

    >>> from mindpet.delta import LoRADense
    >>> layer = LoRADense(8, 16, lora_rank=2, lora_alpha=4, has_bias=False)
    >>> given = strategies(layer, ParallelConfig(data_parallel=2, model_parallel=4))
    >>> given["strategy_org_dense_matmul"], given["strategy_lora_b_matmul"]
    (((2, 1), (4, 1)), ((2, 1), (4, 1)))
    >>> layer.shard(**given)
    """
    if not isinstance(config, ParallelConfig):
        raise TypeError(f"For 'strategies', 'config' must be a ParallelConfig, but got {_checks.shown(config)}.")
    if isinstance(layer, PrefixEncoder):
        return {"data_parallel": config.data_parallel, "model_parallel": config.model_parallel}
    return strategies_of_parts(layer, config.parts)


def strategies_of_parts(layer: Any, parts: Mapping[str, int]) -> dict[str, Any]:
    """The same for any number of parts of any axis: rows of the input, in, out, rank, bottleneck."""
    if not hasattr(type(layer), "sharded"):
        raise TypeError(f"For 'strategies', 'layer' must be one that has strategies, but got {_checks.shown(layer)}.")
    given = {}
    for argument, entry in layer.sharded.items():
        operator = operator_of(layer, entry)
        if operator is None:
            continue
        strategy = tuple(tuple(parts.get(name, 1) for name in axes) for axes in input_axes(operator, entry))
        if entry.activation:
            whole = normalised_axes(operator)
            strategy = (tuple(1 if axis in whole else cut for axis, cut in enumerate(strategy[0])),)
        given[argument] = strategy
    return given
