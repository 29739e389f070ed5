"""AdapterFusion: Non-Destructive Task Composition for Transfer Learning. Pfeiffer et al. 2020, arXiv:2005.00247.

Section 3.2: adapters that were trained apart, one for each of several tasks, stay as they are, and attention over their
outputs learns which of them to ask at each position.

::

             ┌── adapter 1 ── z₁ ──┐
    h ──┬────┼── adapter 2 ── z₂ ──┼── softmax(h Q · z K) over the adapters ── mix of z ── V ── + ── y
        │    └── adapter n ── z_n ─┘                                                            │
        └───────────────────────────────────────────────────────────────────────────────────────┘

Differs from the paper in: the term of the loss that keeps V near the identity is left to the user. As in the authors'
code, Q has a bias, and z is what an adapter adds, without its residual connection. (A bias of K, which that code has
too, would add the same to the scores of all adapters.)
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal

from mindpet import _checks, _files
from mindpet.delta.activation import build_activation
from mindpet.delta.adapter import AdapterConfig, AdapterLayer
from mindpet.delta.dense import ComputeDense
from mindpet.delta.method import FEEDFORWARD, DeltaConfig, Method


@dataclass(frozen=True, kw_only=True)
class AdapterFusionConfig(DeltaConfig):
    """Attention over adapters behind every targeted dense layer.

    Attributes:
        adapters: directories that :func:`mindpet.save_delta` wrote of networks tuned with ``adapter``, or of such runs;
            or how many new ones there are, for :func:`mindpet.load_delta` to fill.
        size: width of the bottlenecks; that of the directories where they are given.
        non_linearity: activation inside the bottlenecks, by name; that of the directories where they are given.
        value: whether the mix goes through a matrix V.
        targets: as everywhere; None takes the cells of the directories where they are given.
    """

    path: ClassVar[str] = ""  # of the cell that it holds for

    adapters: int | Sequence[str] = 2
    size: int = 64
    non_linearity: str = "gelu"
    value: bool = True

    def __post_init__(self):
        owner = type(self).__name__
        if isinstance(self.adapters, (str, Path)):
            self._read(owner, [self.adapters])
        elif isinstance(self.adapters, (list, tuple)):
            self._read(owner, list(self.adapters))
        else:
            _checks.positive_int(owner, "adapters", self.adapters)
        super().__post_init__()
        _checks.positive_int(owner, "size", self.size)
        _checks.boolean(owner, "value", self.value)
        build_activation(owner, "non_linearity", self.non_linearity, unknown=ValueError)

    def _read(self, owner: str, given: list) -> None:
        """Take over what the directories say."""
        if not given or not all(isinstance(one, (str, Path)) for one in given):
            raise TypeError(
                f"For '{owner}', 'adapters' must be directories or a number, but got {_checks.shown(self.adapters)}."
            )
        configs = [read_adapter(directory)[0] for directory in given]
        for name in ("size", "non_linearity", "targets"):
            found = [getattr(config, name) for config in configs]
            if any(value != found[0] for value in found):
                listed = " and ".join(f"{_checks.shown(value)} in {at}" for value, at in zip(found, given))
                raise ValueError(f"For '{owner}', all 'adapters' must have the same {name}, but got {listed}.")
            if name != "targets" or self.targets is None:
                object.__setattr__(self, name, found[0])
        object.__setattr__(self, "adapters", tuple(map(str, given)))

    def at(self, path: str) -> "AdapterFusionConfig":
        """The same, that knows the path."""
        here = copy.copy(self)
        object.__setattr__(here, "path", path)
        return here

    def stored(self) -> "AdapterFusionConfig":
        """With the number of the directories: what was in them is in the network now."""
        return replace(self, adapters=self.adapters if isinstance(self.adapters, int) else len(self.adapters))


class AdapterFusionDense(ComputeDense):
    r"""A dense layer followed by attention over the outputs of frozen adapters.

    .. math:: h = \sigma(x W^T + b), \quad z_i = \mathrm{bottleneck}_i(h), \quad
        p = \mathrm{softmax}_i\bigl((h Q^T + q) \cdot z_i K^T\bigr), \quad y = h + \Bigl(\sum_i p_i z_i\Bigr) V^T

    Shapes: x ``(..., in)``, W ``(out, in)``, h, z and y ``(..., out)``, Q, K and V ``(out, out)``, q ``(out,)``. Q and
    K start normal with a deviation of 0.02, q at zero, V with ones on its diagonal and 1e-6 elsewhere: the layer starts
    near the mean of its adapters. Cost: ``(2 + value) * out**2 + out`` parameters, which train, and
    ``(2 * (2 + value) * out + 2) * out + adapters * (4 * out * size + 5 * out + size)`` floating-point operations a
    row, those of the adapters among them.

    >>> layer = AdapterFusionDense.from_dense(nn.Dense(6, 8), AdapterFusionConfig(adapters=3, size=2), [])
    >>> layer(ops.ones((3, 6))).shape
    (3, 8)
    """

    delta_method = "adapter_fusion"

    @classmethod
    def from_dense(
        cls, dense: nn.Dense, config: AdapterFusionConfig, trained: list[dict[str, np.ndarray]]
    ) -> "AdapterFusionDense":
        """The same dense layer, weight and bias shared, with adapters that have the values of `trained` at its path."""
        layer = cls.borrow(dense)
        out, dtype = dense.out_channels, dense.weight.dtype
        count = config.adapters if isinstance(config.adapters, int) else len(config.adapters)
        parts = (config.size, config.non_linearity, dtype, layer.compute_dtype)
        # ``mindpet_delta_adapter_fusion`` would belong to the method 'adapter' as well: its patterns match that
        layer.mindpet_delta_fusion_adapters = nn.CellList([AdapterLayer(out, *parts) for _ in range(count)])
        for adapter, tensors in zip(layer.mindpet_delta_fusion_adapters, trained):
            _fill(adapter, tensors, config.path)
        start = Normal(0.02)
        layer.add_delta("mindpet_delta_fusion_query", start, out, out)
        layer.add_delta("mindpet_delta_fusion_query_bias", "zeros", out)
        layer.add_delta("mindpet_delta_fusion_key", start, out, out)
        layer.has_value = config.value
        if config.value:
            diagonal = np.full((out, out), 1e-6, np.float32)
            np.fill_diagonal(diagonal, 1)
            layer.mindpet_delta_fusion_value = Parameter(Tensor(diagonal, dtype), name="mindpet_delta_fusion_value")
        layer.product, layer.turned = ops.MatMul(), ops.MatMul(transpose_b=True)
        return layer

    def mix(self, hidden):
        """What is added to the dense layer's output: (rows, out) -> (rows, out)."""
        kind = hidden.dtype
        answers: tuple = ()
        for adapter in self.mindpet_delta_fusion_adapters:
            answers += (adapter.mindpet_delta_adapter_block(hidden),)
        answers = ops.stack(answers, 1)  # (rows, adapters, out)
        query = self.turned(hidden, self.mindpet_delta_fusion_query.astype(kind))
        query = query + self.mindpet_delta_fusion_query_bias.astype(kind)
        asked = self.product(query, self.mindpet_delta_fusion_key.astype(kind))  # q · z Kᵀ = q K · z, for all z at once
        scores = (answers * asked.expand_dims(1)).astype(mstype.float32).sum(-1)  # (rows, adapters)
        weights = ops.softmax(scores, -1).astype(kind).expand_dims(-1)
        mixed = (answers * weights).sum(1)  # (rows, out)
        if self.has_value:
            mixed = self.turned(mixed, self.mindpet_delta_fusion_value.astype(kind))
        return mixed

    def construct(self, x):
        hidden = self.activated(self.dense_rows(self.rows_of(x)))  # (rows, out)
        return self.shaped_like(hidden + self.mix(hidden), x)


def read_adapter(directory: str | Path) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    """The configuration and the tensors of a directory that holds one delta of the method ``adapter``, or of a run.

    Raises:
        ValueError: a file is missing or broken, or holds something else.
    """
    path, inner = Path(directory) / "delta.safetensors", _files.delta_of_a_run(directory)
    if inner and not os.path.isfile(path):
        path = inner / path.name
    tensors, metadata = _files.read_tensors(path)
    try:
        entries = _files.parse_json(metadata["delta"])["methods"]
        names = [entry.pop("method") for entry in entries]
        config = AdapterConfig(**entries[0]) if names == ["adapter"] else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a delta: its metadata has no usable description ({error}).") from error
    if config is None:
        there = " and ".join(map(str, names)) or "nothing"
        raise ValueError(f"Only adapters can be fused, each from a directory of its own, but {path} has {there}.")
    return config, tensors


def trained_adapters(cells: list[nn.Dense], config: AdapterFusionConfig) -> list[dict[str, np.ndarray]]:
    """The tensors of each directory; nothing where new adapters are asked for."""
    return [] if isinstance(config.adapters, int) else [read_adapter(one)[1] for one in config.adapters]


def _fill(adapter: AdapterLayer, tensors: dict[str, np.ndarray], path: str) -> None:
    for name, parameter in adapter.parameters_and_names():
        saved = f"{path}.mindpet_delta_adapter.{name}"
        if saved not in tensors:
            raise ValueError(f"An adapter to be fused has no {saved}{_checks.near(saved, tensors)}.")
        value, shape = tensors[saved], tuple(parameter.shape)
        if value.shape != shape:
            raise ValueError(f"{saved} has shape {value.shape} in an adapter to be fused, and {shape} here.")
        parameter.set_data(Tensor(np.ascontiguousarray(value)).astype(parameter.dtype))


METHOD = Method(
    name="adapter_fusion",
    config=AdapterFusionConfig,
    trainable=("*mindpet_delta_fusion_query*", "*mindpet_delta_fusion_key*", "*mindpet_delta_fusion_value*"),
    paper="Pfeiffer et al. 2020, AdapterFusion: Non-Destructive Task Composition, arXiv:2005.00247",
    adapt={nn.Dense: AdapterFusionDense.from_dense},
    share=trained_adapters,
    targets=FEEDFORWARD,
    learning_rate=0.00005,
)
