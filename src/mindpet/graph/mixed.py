"""One batch, several deltas: each row of it uses the one that it asks for."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet import _checks
from mindpet.delta.dense import ComputeDense, is_plain_dense
from mindpet.delta.lora import LoRADense
from mindpet.graph.deltas import loaded_deltas
from mindpet.graph.inject import MARKER, SUSPENDED, injections, replace_cells, require_in_place
from mindpet.graph.targets import cells_by_path


class _LoRABank(ComputeDense):
    """A dense layer with the LoRA branches of all deltas, of which each sample takes one.

    Shapes: A ``(deltas, rank, in)``, B ``(deltas, out, rank)``, `rows` ``(batch,)``; x has ``batch * k`` rows.
    """

    def fill(self, layer: LoRADense, a: np.ndarray, b: np.ndarray, rows: Parameter) -> None:
        """Take the branches; those of one name have the same index in A and in B."""
        self.a = Parameter(Tensor(a), name="mindpet_mixed_a", requires_grad=False)
        self.b = Parameter(Tensor(b), name="mindpet_mixed_b", requires_grad=False)
        self.rows, self.scaling = rows, layer.scaling
        self.batch_matmul = ops.BatchMatMul(transpose_b=True)

    def construct(self, x):
        rows = self.rows_of(x)  # (batch * k, in)
        groups = self.reshape(rows, (self.rows.shape[0], -1, self.in_channels))  # (batch, k, in)
        a = self.cast(ops.gather(self.a, self.rows, 0), self.compute_dtype)  # (batch, rank, in)
        b = self.cast(ops.gather(self.b, self.rows, 0), self.compute_dtype)  # (batch, out, rank)
        branch = self.batch_matmul(self.batch_matmul(groups, a), b)  # (batch, k, out)
        out = self.dense_rows(rows) + self.reshape(branch, (-1, self.out_channels)) * self.scaling
        if self.activation_flag:
            out = self.activation(out)
        return self.shaped_like(out, x)


class _DenseBank(ComputeDense):
    """A dense layer that every delta has a weight and a bias of its own for: a head.

    Shapes: W ``(deltas, out, in)``, b ``(deltas, out)``, `rows` ``(batch,)``; x has ``batch * k`` rows.
    """

    def fill(self, weight: np.ndarray, bias: np.ndarray | None, rows: Parameter) -> None:
        """Take the weights and biases of all deltas."""
        self.weights = Parameter(Tensor(weight), name="mindpet_mixed_weights", requires_grad=False)
        if bias is not None:
            self.biases = Parameter(Tensor(bias), name="mindpet_mixed_biases", requires_grad=False)
        self.rows = rows
        self.batch_matmul = ops.BatchMatMul(transpose_b=True)

    def construct(self, x):
        groups = self.reshape(self.rows_of(x), (self.rows.shape[0], -1, self.in_channels))  # (batch, k, in)
        weight = self.cast(ops.gather(self.weights, self.rows, 0), self.compute_dtype)  # (batch, out, in)
        out = self.batch_matmul(groups, weight)  # (batch, k, out)
        if self.has_bias:
            out = out + self.cast(ops.gather(self.biases, self.rows, 0), self.compute_dtype).expand_dims(1)
        out = self.reshape(out, (-1, self.out_channels))
        if self.activation_flag:
            out = self.activation(out)
        return self.shaped_like(out, x)


class MixedDeltas:
    """A network whose batch rows each use a delta of their own, by the names that they were loaded under.

    Each row gets what it would get alone. Deltas must be of LoRA on dense layers, with or without dense heads. Within
    the block the network holds the numbers of all of them; afterwards it is as it was.

    Args:
        network: with deltas loaded by :func:`load_delta`.

    Raises:
        ValueError: no delta is loaded; a delta holds something else than LoRA on dense layers and dense heads.

    >>> from mindpet.delta import LoRAConfig
    >>> from mindpet.graph import inject, load_delta, save_delta
    >>> import tempfile
    >>> network = inject(nn.SequentialCell(nn.Dense(4, 4)), LoRAConfig(rank=2, targets=["*"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_delta(network, folder)
    ...     _ = load_delta(network, folder, name="a")
    >>> with MixedDeltas(network) as mixed:
    ...     print(mixed(["a", None, "a"], ops.ones((3, 4))).shape)
    (3, 4)
    """

    def __init__(self, network: nn.Cell):
        require_in_place("MixedDeltas", network)
        self.network = network
        self.deltas = loaded_deltas(network)
        if not self.deltas:
            raise ValueError("No delta is loaded: load_delta(network, directory, name=...) first.")
        self.names: list[str | None] = [*self.deltas, None]  # the last is the base
        self.rows = Parameter(Tensor(np.zeros(1, np.int32)), name="mindpet_mixed_rows", requires_grad=False)
        self.base = {p.name: value for one in injections(network) for p, value in one.values}
        cells = cells_by_path(network)
        self.originals: dict[str, nn.Cell] = {}
        self.banks: dict[str, Any] = {}
        trained = {name for tensors in self.deltas.values() for name in tensors}
        for path in dict.fromkeys(name.rpartition(".")[0] for name in trained):
            self.originals[path] = cells[path]
            self.banks[path] = self._bank(path, cells[path])

    def __enter__(self) -> "MixedDeltas":
        require_in_place("MixedDeltas", self.network)
        replace_cells(self.network, self.banks)
        vars(self.network)[SUSPENDED] = "MixedDeltas"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        vars(self.network).pop(SUSPENDED)
        replace_cells(self.network, self.originals)

    def __call__(self, names: Sequence[str | None], *inputs: Any) -> Any:
        """The network's output; `names` has one name, or None for the base, for each row of the batch."""
        if vars(self.network).get(SUSPENDED) != "MixedDeltas":
            raise RuntimeError("Rows can be mixed inside the block only: with MixedDeltas(network) as mixed: ...")
        if inputs and len(names) != inputs[0].shape[0]:
            raise ValueError(f"There are {len(names)} names for a batch of {inputs[0].shape[0]} rows.")
        unknown = sorted({str(name) for name in names if name not in self.names})
        if unknown:
            known = [name for name in self.names if name]
            raise ValueError(
                f"No delta is called {unknown[0]!r}: there are {', '.join(known)}{_checks.near(unknown[0], known)}."
            )
        index = Tensor(np.array([self.names.index(name) for name in names], np.int32))
        if index.shape == self.rows.shape:
            self.rows.set_data(index)
        else:  # another batch size is another graph
            self.rows = Parameter(index, name="mindpet_mixed_rows", requires_grad=False)
            for bank in self.banks.values():
                bank.rows = self.rows
            replace_cells(self.network, self.banks)
        return self.network(*inputs)

    def _bank(self, path: str, cell: nn.Cell) -> nn.Cell:
        if type(cell) is LoRADense:
            if any(f"{path}.bias" in tensors for tensors in self.deltas.values()):
                raise ValueError(f"{path} has a bias that trains: rows can only be mixed for LoRA with bias='none'.")
            a, b = (self._stack(f"{path}.mindpet_delta_lora_{letter}", None) for letter in "ab")
            bank = _LoRABank.borrow(cell.plain())
            bank.fill(cell, a, b, self.rows)
        elif is_plain_dense(cell) and MARKER not in path:
            bank = _DenseBank.borrow(cell)
            bias = self._stack(f"{path}.bias", cell.bias) if cell.has_bias else None
            bank.fill(self._stack(f"{path}.weight", cell.weight), bias, self.rows)
        else:
            raise ValueError(
                f"{path} is a {type(cell).__name__}: rows can only be mixed for LoRA on dense layers and dense heads."
            )
        bank.set_train(cell.training)
        return bank

    def _stack(self, name: str, present: Parameter | None) -> np.ndarray:
        """The numbers of that parameter in each delta, and the base's: those before the injection, or zeros."""
        if present is None:
            values = [tensors[name] for tensors in self.deltas.values()]
            return np.stack([*values, np.zeros_like(values[0])])
        base = self.base.get(name, present.asnumpy())  # of a weight as well of which only the bias trains
        return np.stack([*(tensors.get(name, base) for tensors in self.deltas.values()), base])
