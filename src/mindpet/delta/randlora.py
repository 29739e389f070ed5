"""RandLoRA: full-rank updates from random bases. Albert et al. 2025, arXiv:2502.00987.

::

    x ── W + alpha/r (B_1 Λ_1 A Γ_1 + ... + B_n Λ_n A Γ_n) ── + b ── σ ── y

The B and A are random, frozen, and the same for all layers; a layer takes of them what its size needs and trains the
diagonal matrices Λ and Γ. With n = smaller side / r of them the sum has full rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet import _checks
from mindpet.delta.dense import ReweightedDense
from mindpet.delta.method import ATTENTION, DeltaConfig, Method, PeftNames
from mindpet.delta.torch_random import TorchRandom, rounded_to_bfloat16


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig(DeltaConfig):
    """RandLoRA on every targeted dense layer.

    Attributes:
        rank: r of each base; the smaller it is, the more bases there are, and the more parameters.
        alpha: the delta is scaled by alpha / rank; the paper has about 20 times the rank.
        seed: of the bases, which are those that PEFT makes of it.
        sparse: bases of -1, 0 and 1, two thirds zeros.
        very_sparse: nearly all zeros: all but 1 / sqrt(smaller side); counts before `sparse`.
    """

    rank: int = 32
    alpha: float = 640.0
    seed: int = 0
    sparse: bool = False
    very_sparse: bool = False

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.positive_int(owner, "rank", self.rank)
        _checks.non_zero_number(owner, "alpha", self.alpha)
        _checks.int_from_zero(owner, "seed", self.seed)
        _checks.boolean(owner, "sparse", self.sparse)
        _checks.boolean(owner, "very_sparse", self.very_sparse)


class RandLoRADense(ReweightedDense):
    r"""A dense layer whose delta is a sum of random products of low rank, each with trained diagonal matrices.

    .. math:: y = \sigma\bigl(x (W + \tfrac{\alpha}{r} \textstyle\sum_{i=1}^n B_i \Lambda_i A \Gamma_i)^T + b\bigr)

    Shapes: x ``(..., in)``, W ``(out, in)``, y ``(..., out)``; with small and large the smaller and the larger of in
    and out, and ``n = ceil(small / rank)``: A ``(rank, 1, small)``, B ``(large, n, rank)``, Λ ``(rank, n)``, Γ
    ``(n, small)``. The sum is ``(large, small)``, and is transposed where out is small. Λ starts at zero, so the layer
    starts as the dense layer it replaces. Cost: ``-(-min(in, out) // rank) * (rank + min(in, out))`` parameters, A
    and B once for the network, and ``2 * (max(in, out) + 1) * -(-min(in, out) // rank) * rank * min(in, out)
    + 2 * in * out`` floating-point operations a call, in float32, however many rows there are.

    As in PEFT, the columns of B are counted base by base and the rows of Λ A Γ rank by rank, so that those that are
    multiplied are not always of the same i. All of them are random, and nothing is lost.

    >>> dense, config = nn.Dense(6, 4), RandLoRAConfig(rank=3)
    >>> layer = RandLoRADense.from_dense(dense, config, shared_bases([dense], config))
    >>> layer(ops.ones((3, 5, 6))).shape, layer.mindpet_delta_randlora_columns.shape
    ((3, 5, 4), (2, 4))
    """

    delta_method = "randlora"

    @classmethod
    def from_dense(
        cls, dense: nn.Dense, config: RandLoRAConfig, shared: tuple[Parameter, Parameter]
    ) -> "RandLoRADense":
        """The same dense layer, weight and bias shared, with new diagonals in the dtype of its weight."""
        layer = cls.borrow(dense)
        layer.small, layer.large = sorted((dense.in_channels, dense.out_channels))
        layer.count = math.ceil(layer.small / config.rank)
        layer.rank, layer.scale = config.rank, config.alpha / config.rank
        gamma = 1 / max(layer.count, layer.small)
        layer.add_delta("mindpet_delta_randlora_lambda", "zeros", config.rank, layer.count)
        layer.add_delta("mindpet_delta_randlora_columns", gamma, layer.count, layer.small)
        layer.mindpet_delta_randlora_base_a, layer.mindpet_delta_randlora_base_b = shared
        return layer

    def changed_weight(self, weight):
        """W + alpha / r sum B Λ A Γ: (out, in) -> (out, in); what is trained is too small for float16."""
        a = self.mindpet_delta_randlora_base_a[:, :, : self.small].astype(mstype.float32)  # (rank, 1, small)
        b = self.mindpet_delta_randlora_base_b[: self.large, : self.count].astype(mstype.float32)  # (large, n, rank)
        rows = self.mindpet_delta_randlora_lambda.astype(mstype.float32).reshape((self.rank, self.count, 1))
        a = rows * a * self.mindpet_delta_randlora_columns.astype(mstype.float32)  # (rank, n, small)
        together = self.count * self.rank
        delta = ops.matmul(b.reshape((self.large, together)), a.reshape((together, self.small))) * self.scale
        if weight.shape[0] < weight.shape[1]:
            delta = delta.transpose((1, 0))
        return weight + delta.astype(weight.dtype)


def shared_bases(cells: Sequence[nn.Dense], config: RandLoRAConfig) -> tuple[Parameter, Parameter]:
    """A and B, large enough for every layer, of standard deviation 1: uniform, or of -1, 0 and 1."""
    into, out = max(cell.in_channels for cell in cells), max(cell.out_channels for cell in cells)
    small, large = sorted((into, out))
    count, rank, random = math.ceil(small / config.rank), config.rank, TorchRandom(config.seed)

    def uniform(*shape: int) -> np.ndarray:
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return random.uniform(shape, -bound, bound, bfloat16=True)

    def ternary(*shape: int) -> np.ndarray:
        share = 1 / (2 * (math.sqrt(small) if config.very_sparse else 3))
        values = random.uniform(shape, 0, 1)
        return (values > 1 - share).astype(np.float32) - (values < share)

    def base(name: str, value: np.ndarray) -> Parameter:
        deviation = value.std(ddof=1, dtype=np.float64).astype(np.float32)
        if deviation == 0:
            raise ValueError(
                f"For 'RandLoRAConfig', the sparse base of {value.size} entries is all zeros: take another 'seed', a "
                "larger 'rank', or leave 'very_sparse' out."
            )
        if not config.sparse and not config.very_sparse:  # in bfloat16, as all that PEFT makes them of
            value = rounded_to_bfloat16(value / rounded_to_bfloat16(deviation.reshape(1)))
        else:
            value = (value / deviation).astype(np.float32)
        return Parameter(Tensor(value, cells[0].weight.dtype), name=name, requires_grad=False)

    if config.sparse or config.very_sparse:
        a, b = ternary(rank, 1, small), ternary(large, count, rank)
    else:
        a = uniform(rank, 1, small)
        b = np.concatenate([uniform(large, 1, rank) for _ in range(count)], axis=1)
    return base("mindpet_delta_randlora_base_a", a), base("mindpet_delta_randlora_base_b", b)


METHOD = Method(
    name="randlora",
    config=RandLoRAConfig,
    trainable=("*mindpet_delta_randlora_lambda", "*mindpet_delta_randlora_columns"),
    paper="Albert et al. 2025, RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models, arXiv:2502.00987",
    adapt={nn.Dense: RandLoRADense.from_dense},
    share=shared_bases,
    targets=ATTENTION,
    learning_rate=0.001,
    peft=PeftNames(
        "RANDLORA",
        tensors={
            "randlora_lambda": "mindpet_delta_randlora_lambda",
            "randlora_gamma": "mindpet_delta_randlora_columns",
        },
        options={
            "r": "rank",
            "randlora_alpha": "alpha",
            "projection_prng_key": "seed",
            "sparse": "sparse",
            "very_sparse": "very_sparse",
        },
        free=("randlora_dropout", "init_weights", "save_projection"),
        shared={"randlora_A": "mindpet_delta_randlora_base_a", "randlora_B": "mindpet_delta_randlora_base_b"},
    ),
)
