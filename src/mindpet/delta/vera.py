"""VeRA: vector-based random matrix adaptation. Kopiczko et al. 2024, arXiv:2310.11454, section 3.1.

::

    x ──┬── W (frozen) ────────────────────── + b ──┬── + ── σ ── y
        └── dropout ── A ── ∘ d ── B ── ∘ b ────────┘

A and B are random, frozen, and the same for all layers; each layer takes of them what its size needs and trains the
two vectors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet import _checks
from mindpet.delta.dense import BranchDense
from mindpet.delta.method import ATTENTION, DeltaConfig, Method, PeftNames
from mindpet.delta.torch_random import TorchRandom


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(DeltaConfig):
    """VeRA on every targeted dense layer.

    Attributes:
        rank: r, rows of A and columns of B.
        dropout: probability, on the branch's input, in training only.
        d_initial: where every entry of d starts.
        seed: of A and B, which are those that PEFT makes of it.
    """

    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.positive_int(owner, "rank", self.rank)
        _checks.rate(owner, "dropout", self.dropout, allow_int=True)
        _checks.non_zero_number(owner, "d_initial", self.d_initial)
        _checks.int_from_zero(owner, "seed", self.seed)


class VeRADense(BranchDense):
    r"""A dense layer with a branch of two frozen random matrices and two trained vectors.

    .. math:: y = \sigma\bigl(x W^T + b + b_v \circ ((d \circ (\mathrm{dropout}(x) A^T)) B^T)\bigr)

    Shapes: x ``(..., in)``, W ``(out, in)``, A the first ``in`` columns of ``(rank, widest in)``, B the first ``out``
    rows of ``(widest out, rank)``, d ``(rank,)``, b_v ``(out,)``, y ``(..., out)``. b_v starts at zero, so the layer
    starts as the dense layer it replaces. Cost: ``rank + out`` parameters, A and B once for the network, and
    ``2 * rank * (in + out) + rank + 2 * out`` floating-point operations a row.

    >>> dense, config = nn.Dense(6, 4), VeRAConfig(rank=2)
    >>> layer = VeRADense.from_dense(dense, config, shared_matrices([dense], config))
    >>> layer(ops.ones((3, 5, 6))).shape
    (3, 5, 4)
    """

    delta_method = "vera"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: VeRAConfig, shared: tuple[Parameter, Parameter]) -> "VeRADense":
        """The same dense layer, weight and bias shared, with new vectors in the dtype of its weight."""
        layer = cls.borrow(dense)
        layer.add_delta("mindpet_delta_vera_lambda_b", "zeros", dense.out_channels)
        layer.add_delta("mindpet_delta_vera_lambda_d", config.d_initial, config.rank)
        layer.mindpet_delta_vera_a, layer.mindpet_delta_vera_b = shared
        layer.dropout = nn.Dropout(p=float(config.dropout))
        layer.product = ops.MatMul(transpose_b=True)
        return layer

    def branch(self, rows):
        """b_v ∘ ((d ∘ (x A^T)) B^T): (rows, in) -> (rows, out)."""
        kind = self.compute_dtype
        a = self.cast(self.mindpet_delta_vera_a[:, : self.in_channels], kind)  # (rank, in)
        b = self.cast(self.mindpet_delta_vera_b[: self.out_channels], kind)  # (out, rank)
        inner = self.product(self.dropout(rows), a) * self.cast(self.mindpet_delta_vera_lambda_d, kind)  # (rows, rank)
        return self.product(inner, b) * self.cast(self.mindpet_delta_vera_lambda_b, kind)  # (rows, out)

    def delta_weight(self) -> Tensor:
        """(b_v ∘ B) (d ∘ A), where b_v scales rows and d columns of B: in float32, in the shape of W."""
        a = self.mindpet_delta_vera_a[:, : self.in_channels].astype(mstype.float32)
        b = self.mindpet_delta_vera_b[: self.out_channels].astype(mstype.float32)
        right = b * self.mindpet_delta_vera_lambda_d.astype(mstype.float32)  # (out, rank)
        return self.mindpet_delta_vera_lambda_b.astype(mstype.float32).reshape((-1, 1)) * ops.matmul(right, a)


def shared_matrices(cells: Sequence[nn.Dense], config: VeRAConfig) -> tuple[Parameter, Parameter]:
    """A and B, large enough for every layer, uniform as Kaiming's for ReLU: A by its columns, B by the rank."""
    into, out = max(cell.in_channels for cell in cells), max(cell.out_channels for cell in cells)
    random = TorchRandom(config.seed)

    def matrix(name: str, rows: int, columns: int) -> Parameter:
        bound = math.sqrt(6 / columns)
        value = Tensor(random.uniform((rows, columns), -bound, bound), cells[0].weight.dtype)
        return Parameter(value, name=name, requires_grad=False)

    return matrix("mindpet_delta_vera_a", config.rank, into), matrix("mindpet_delta_vera_b", out, config.rank)


METHOD = Method(
    name="vera",
    config=VeRAConfig,
    trainable=("*mindpet_delta_vera_lambda*",),
    paper="Kopiczko et al. 2024, VeRA: Vector-based Random Matrix Adaptation, arXiv:2310.11454",
    adapt={nn.Dense: VeRADense.from_dense},
    share=shared_matrices,
    targets=ATTENTION,
    learning_rate=0.01,
    peft=PeftNames(
        "VERA",
        tensors={
            "vera_lambda_b": "mindpet_delta_vera_lambda_b",
            "vera_lambda_d": "mindpet_delta_vera_lambda_d",
        },
        options={"r": "rank", "vera_dropout": "dropout", "d_initial": "d_initial", "projection_prng_key": "seed"},
        free=("init_weights", "save_projection"),
        shared={"vera_A": "mindpet_delta_vera_a", "vera_B": "mindpet_delta_vera_b"},
    ),
)
