"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, arXiv:2106.09685, section 4.1.

::

    x ──┬── W (frozen) ────────────────────┬── + ── σ ── y
        └── dropout ── A ── B ── alpha/r ──┘
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import HeUniform, initializer

from mindpet import _checks
from mindpet.delta.dense import ComputeDense
from mindpet.delta.lora_conv import LoRAConv1d, LoRAConv2d
from mindpet.delta.lora_embedding import LoRAEmbedding
from mindpet.delta.lora_start import OF_THE_WEIGHT, STARTS, branch_start
from mindpet.delta.method import ATTENTION, Method, RankedConfig
from mindpet.delta.strategy import Sharded, shard_operators
from mindpet.utils.version_control import get_dropout


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(RankedConfig):
    """LoRA on every targeted dense layer.

    Attributes:
        rank: r, rows of A and columns of B.
        alpha: the branch is scaled by alpha / rank.
        dropout: probability, on the branch's input, in training only.
        rank_stabilised: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
        rank_pattern: path patterns to another rank; the first that matches counts.
        alpha_pattern: path patterns to another alpha.
        start: where A and B start: ``kaiming``, ``gaussian``, ``orthogonal``, ``pissa`` or ``olora``
            (`mindpet.delta.lora_start`). The network starts as it was with each of them.
        bias: biases that train as well: ``none``, ``lora_only`` for those of the adapted cells, or ``all``, the shifts
            of the norms among them.
    """

    dropout: float = 0.0
    rank_stabilised: bool = False
    start: str = "kaiming"
    bias: str = "none"

    starts: ClassVar[tuple[str, ...]] = STARTS

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.rate(owner, "dropout", self.dropout, allow_int=True)
        _checks.boolean(owner, "rank_stabilised", self.rank_stabilised)
        _checks.choice(owner, "start", self.start, self.starts)
        _checks.choice(owner, "bias", self.bias, ("none", "lora_only", "all"))
        odd = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank % 2]
        if self.start == "orthogonal" and odd:
            raise ValueError(f"For '{owner}', 'rank' must be even for the start 'orthogonal', but got {odd[0]}.")
        negative = [alpha for alpha in (self.alpha, *self.alpha_pattern.values()) if alpha < 0]
        if self.start == "pissa" and negative:
            raise ValueError(f"For '{owner}', 'alpha' must be above 0 for the start 'pissa', but got {negative[0]}.")

    @property
    def scaled_alpha(self) -> float:
        """The alpha for which ``alpha / rank`` is the scale, rank-stabilised or not."""
        return self.alpha * math.sqrt(self.rank) if self.rank_stabilised else self.alpha


class LoRADense(ComputeDense):
    r"""A dense layer with a trainable low-rank branch beside its weight.

    .. math:: y = \sigma\bigl(x W^T + b + \tfrac{\alpha}{r}\, \mathrm{dropout}(x) A^T B^T\bigr)

    Shapes: x ``(..., in)``, W ``(out, in)``, b ``(out,)``, A ``(rank, in)``, B ``(out, rank)``, y ``(..., out)``.
    B starts at zero, so the layer starts as the dense layer it replaces. Cost: ``rank * (in + out)`` parameters
    and ``2 * rank * (in + out) + 2 * out`` floating-point operations a row.

    Args:
        in_channels: size of the input's last axis.
        out_channels: size of the output's last axis.
        lora_rank: r, rows of A and columns of B.
        lora_alpha: the branch is scaled by ``lora_alpha / lora_rank``; not 0.
        lora_dropout: probability of zeroing an input of the branch, in [0, 1), in training only.
        lora_a_init: start of A: a Tensor ``(rank, in)``, a name, an Initializer or a number.
        lora_b_init: start of B: a Tensor ``(out, rank)``, a name, an Initializer or a number.
        param_init_type: dtype of the parameters.
        compute_dtype: dtype of the products; bfloat16 where the device has it.
        weight_init: start of W.
        bias_init: start of b.
        has_bias: whether b exists.
        activation: σ, by name, as a Cell or as a Primitive.

    Raises:
        TypeError: an argument of the wrong type, an int for `lora_dropout` included.
        ValueError: an int that is not positive, `lora_alpha` of 0, `lora_dropout` outside [0, 1), an initial Tensor of
            another shape.
        KeyError: an activation that MindSpore does not know.

    >>> from mindspore import ops
    >>> layer = LoRADense(6, 4, lora_rank=2, lora_alpha=4)
    >>> layer(ops.ones((3, 5, 6))).shape
    (3, 5, 4)
    >>> layer.mindpet_delta_lora_a.shape, layer.mindpet_delta_lora_b.shape
    ((2, 6), (4, 2))
    """

    delta_method = "lora"
    untransposed = True
    sharded = {
        "strategy_org_dense_matmul": Sharded("matmul", "rows in, out in"),
        "strategy_org_bias_add": Sharded("bias_add", "rows out, out"),
        "strategy_lora_dropout": Sharded("lora_dropout.dropout", "rows in"),
        "strategy_lora_a_matmul": Sharded("lora_a_matmul", "rows in, rank in"),
        "strategy_lora_b_matmul": Sharded("lora_b_matmul", "rows rank, out rank"),
        "strategy_lora_mul": Sharded("mul", "rows out, "),
        "strategy_lora_add": Sharded("add", "rows out, rows out"),
        "strategy_activation": Sharded("activation", "rows out", activation=True),
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        lora_rank: int,
        lora_alpha: int | float,
        lora_dropout: float = 0.0,
        lora_a_init: Any = HeUniform(negative_slope=math.sqrt(5)),  # noqa: B008
        lora_b_init: Any = "zeros",
        param_init_type: Any = mstype.float32,
        compute_dtype: Any = mstype.float16,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
    ):
        super().__init__(
            in_channels, out_channels, weight_init, bias_init, has_bias, activation, param_init_type, compute_dtype
        )
        self._add_branch(lora_rank, lora_alpha, lora_dropout, lora_a_init, lora_b_init, param_init_type)

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: LoRAConfig) -> "LoRADense":
        """The same dense layer, weight and bias shared, with a new branch in the dtype of its weight."""
        layer = (LoRAStartDense if config.start in OF_THE_WEIGHT else cls).borrow(dense)
        a, b = branch_start(config, dense.weight)
        layer._add_branch(config.rank, config.scaled_alpha, float(config.dropout), a, b, dense.weight.dtype)
        return layer

    def _add_branch(self, rank: int, alpha: float, dropout: float, a_init: Any, b_init: Any, dtype: Any) -> None:
        owner = type(self).__name__
        rank = _checks.positive_int(owner, "lora_rank", rank)
        _checks.non_zero_number(owner, "lora_alpha", alpha)
        _checks.rate(owner, "lora_dropout", dropout)
        a_shape, b_shape = (rank, self.in_channels), (self.out_channels, rank)
        _checks.init_value(owner, "lora_a_init", a_init, a_shape)
        _checks.init_value(owner, "lora_b_init", b_init, b_shape)
        self.lora_rank, self.lora_alpha = rank, alpha
        self.mindpet_delta_lora_a = Parameter(initializer(a_init, a_shape, dtype), name="mindpet_delta_lora_a")
        self.mindpet_delta_lora_b = Parameter(initializer(b_init, b_shape, dtype), name="mindpet_delta_lora_b")
        self.scaling = Tensor(alpha / rank, self.compute_dtype)
        self.lora_dropout = get_dropout(dropout)
        self.lora_a_matmul = ops.MatMul(transpose_b=True)
        self.lora_b_matmul = ops.MatMul(transpose_b=True)
        self.mul = ops.Mul()
        self.add = ops.Add()
        self.fused_branch: Any = None  # a Cell that computes all of it at once: see mindpet.kernels.accelerate

    def construct(self, x):
        rows = self.rows_of(x)  # (rows, in)
        a = self.cast(self.mindpet_delta_lora_a, self.compute_dtype)
        b = self.cast(self.mindpet_delta_lora_b, self.compute_dtype)
        if self.fused_branch is not None and self.fused_branch.multiplies(rows, self.weight):
            out = self.fused_branch(rows, self.weight, self.bias, a, b)
        else:
            branch = self.lora_a_matmul(self.lora_dropout(rows), a)  # (rows, rank)
            branch = self.lora_b_matmul(branch, b)  # (rows, out)
            out = self.add(self.dense_rows(rows), self.mul(branch, self.scaling))
        return self.shaped_like(self.activated(out), x)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.mindpet_delta_lora_a, self.mindpet_delta_lora_b

    def delta_weight(self) -> Tensor:
        """What the branch adds to W: ``alpha / rank * B A``, in the shape of W and the dtype of B.

        W is ``(out, in)``, or ``(in, out)`` where another toolkit has put in a product that does not transpose it.
        """
        a, b = (matrix.astype(mstype.float32) for matrix in self.factors())
        delta = ops.matmul(b, a) * (self.lora_alpha / self.lora_rank)
        if not getattr(self.matmul, "transpose_b", True):
            delta = delta.transpose((1, 0))
        return delta.astype(self.mindpet_delta_lora_b.dtype)

    def shard(
        self,
        strategy_org_dense_matmul: tuple | None = None,
        strategy_org_bias_add: tuple | None = None,
        strategy_lora_dropout: tuple | None = None,
        strategy_lora_a_matmul: tuple | None = None,
        strategy_lora_b_matmul: tuple | None = None,
        strategy_lora_mul: tuple | None = None,
        strategy_lora_add: tuple | None = None,
        strategy_activation: tuple | None = None,
    ) -> None:
        """Say how each operator is cut over the devices, in semi-auto or auto parallel mode.

        Each strategy is a tuple with one tuple for each input of the operator; None leaves the operator as it is.
        All matrix products have ``transpose_b=True``. Strategies of operators that this layer does not have (no bias,
        no activation) are ignored. :func:`mindpet.parallel.strategies` gives them all for a few usual cases.

        Raises:
            TypeError: a strategy that is not a tuple of tuples of ints.
            ValueError: a strategy with too many or too few tuples or numbers, a number below 1, one that does not
                divide its axis, more devices than there are; LogSoftmax as the activation, in a parallel mode. Whether
                the batch can be cut shows when the network is compiled.
        """
        shard_operators(self, locals())

    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the axes that strategies cut, but for the rows of the input."""
        return {"in": self.in_channels, "out": self.out_channels, "rank": self.lora_rank}


class LoRAStartDense(LoRADense):
    r"""LoRA whose branch starts at a part of the weight, and adds what it has moved away from it.

    .. math:: y = \sigma\bigl(x W^T + b + \tfrac{\alpha}{r}\, (\mathrm{dropout}(x) A^T B^T - x A_0^T B_0^T)\bigr)

    Shapes: as in :class:`LoRADense`; A0 and B0, frozen, are A and B as they started, and -B0 is what is kept. That is
    the paper's residual weight W - alpha / r B0 A0 with the branch beside it, but W stays what it was in the files: so
    other deltas fit it, and merging, ejecting and saving go as with any LoRA. It starts as the dense layer it replaces,
    but for dropout. Cost: ``rank * (in + out)`` parameters that train, as many that do not, and
    ``4 * rank * (in + out) + 3 * out`` floating-point operations a row.

    >>> layer = LoRADense.from_dense(nn.Dense(6, 4), LoRAConfig(rank=2, start="pissa"))
    >>> [parameter.name for parameter in layer.get_parameters() if not parameter.requires_grad]
    ['mindpet_delta_start_lora_a', 'mindpet_delta_start_lora_b']
    """

    def _add_branch(self, rank: int, alpha: float, dropout: float, a_init: Any, b_init: Any, dtype: Any) -> None:
        super()._add_branch(rank, alpha, dropout, a_init, b_init, dtype)
        # names that freezing does not take for LoRA's, and saving does
        self.mindpet_delta_start_lora_a = Parameter(a_init.copy(), "mindpet_delta_start_lora_a", False)
        self.mindpet_delta_start_lora_b = Parameter(-b_init, "mindpet_delta_start_lora_b", False)

    def construct(self, x):
        rows = self.rows_of(x)  # (rows, in)
        branch = self.lora_dropout(rows)
        branch = self.lora_a_matmul(branch, self.cast(self.mindpet_delta_lora_a, self.compute_dtype))  # (rows, rank)
        branch = self.lora_b_matmul(branch, self.cast(self.mindpet_delta_lora_b, self.compute_dtype))  # (rows, out)
        start = self.lora_a_matmul(rows, self.cast(self.mindpet_delta_start_lora_a, self.compute_dtype))
        start = self.lora_b_matmul(start, self.cast(self.mindpet_delta_start_lora_b, self.compute_dtype))
        out = self.add(self.dense_rows(rows), self.mul(self.add(branch, start), self.scaling))
        return self.shaped_like(self.activated(out), x)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and A0 in one, B and -B0 in one: a plain branch of twice the rank and the same scale."""
        a = ops.concat((self.mindpet_delta_lora_a, self.mindpet_delta_start_lora_a), 0)  # (2 * rank, in)
        return a, ops.concat((self.mindpet_delta_lora_b, self.mindpet_delta_start_lora_b), 1)  # (out, 2 * rank)


def fit(here: LoRAConfig, there: LoRAConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same deltas for layers of a rank that is at least theirs, and of another alpha: exactly.

    Columns of zeros fill up B, and rows as at the start of a training A, so that the added ranks can go on to train; B
    takes up the ratio of the two scales.
    """
    fitted = {}
    for name, value in tensors.items():
        path, _, last = name.rpartition(".")
        ours, theirs = here.at(path), there.at(path)
        missing = ours.rank - theirs.rank
        if last in ("mindpet_delta_lora_a", "mindpet_delta_start_lora_a") and missing > 0:
            bound = 1 / math.sqrt(value[0].size)
            rows = np.random.default_rng(0).uniform(-bound, bound, (missing, *value.shape[1:]))
            value = np.concatenate([value, rows.astype(value.dtype)])
        elif last in ("mindpet_delta_lora_b", "mindpet_delta_start_lora_b") and missing >= 0:
            ratio = (theirs.scaled_alpha / theirs.rank) / (ours.scaled_alpha / ours.rank)
            value = value if ratio == 1 else (value * ratio).astype(value.dtype)
            value = np.pad(value, [(0, 0), (0, missing)] + [(0, 0)] * (value.ndim - 2))
        fitted[name] = value
    return fitted


METHOD = Method(
    name="lora",
    config=LoRAConfig,
    trainable=("*mindpet_delta_lora_[abAB]",),
    paper="Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685",
    adapt={
        nn.Dense: LoRADense.from_dense,
        nn.Embedding: LoRAEmbedding.from_embedding,
        nn.Conv1d: LoRAConv1d.from_conv,
        nn.Conv2d: LoRAConv2d.from_conv,
    },
    targets=ATTENTION,
    fit=fit,
    learning_rate=0.001,
)
