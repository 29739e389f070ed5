"""QLoRA: LoRA beside a quantised weight. Dettmers et al. 2023, arXiv:2305.14314, section 3.

::

    x ──┬── codes ─ dequantise ─ W (frozen) ──┬── + ── σ ── y
        └── dropout ── A ── B ── alpha/r ─────┘

Optionally A and B start at what quantisation loses: LoftQ, Li et al. 2023, arXiv:2310.08659, algorithm 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet import _checks
from mindpet.delta import lora
from mindpet.delta.blockwise import LEVELS, Codes, Form, QuantisedProduct, dequantise, digest_of, quantise
from mindpet.delta.lora import LoRAConfig, LoRADense
from mindpet.delta.lora_start import branch_start
from mindpet.delta.method import Method

# every dense layer of a block, in BERT, LLaMA and GPT-2; no pooler and no head
LINEAR = ("*.query", "*.key", "*.value", "*.layer.*.dense", "*_proj", "*.c_attn", "*.c_proj", "*.c_fc")


@dataclass(frozen=True, kw_only=True)
class QLoRAConfig(LoRAConfig):
    """LoRA on every targeted dense layer, whose weights are quantised.

    Attributes:
        bits: what a weight becomes: ``nf4``, 4 bits on levels for normally distributed numbers, or ``int8``.
        block_size: entries with one scale; even.
        double_quantisation: whether the scales are quantised, too: 0.13 bits a weight for 0.5 in blocks of 64.
        start: where A and B start: ``kaiming``, ``gaussian`` or ``orthogonal``.
        loftq_iterations: with 0, A and B start as `start` says. Otherwise quantisation and a singular value
            decomposition of what it loses take so many turns, and A and B start at the last one (LoftQ; the paper has
            1 to 5).
    """

    bits: str = "nf4"
    block_size: int = 64
    double_quantisation: bool = True
    loftq_iterations: int = 0

    starts = ("kaiming", "gaussian", "orthogonal")

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.choice(owner, "bits", self.bits, tuple(LEVELS))
        if _checks.positive_int(owner, "block_size", self.block_size) % 2:
            raise ValueError(f"For '{owner}', 'block_size' must be even, but got {_checks.shown(self.block_size)}.")
        _checks.boolean(owner, "double_quantisation", self.double_quantisation)
        if _checks.int_from_zero(owner, "loftq_iterations", self.loftq_iterations) and self.start != "kaiming":
            raise ValueError(f"For '{owner}', 'loftq_iterations' is a start itself: leave 'start' {self.start!r} out.")


class QLoRADense(LoRADense):
    r"""A dense layer of a quantised weight, with a trainable low-rank branch beside it.

    .. math:: y = \sigma\bigl(x W^T + b + \tfrac{\alpha}{r}\, \mathrm{dropout}(x) A^T B^T\bigr)

    Shapes: x ``(..., in)``, W ``(out, in)``, b ``(out,)``, A ``(rank, in)``, B ``(out, rank)``, y ``(..., out)``. W is
    kept as codes and largest values of blocks (:mod:`mindpet.delta.blockwise`) and made anew in each call. The layer
    starts as the dense layer with the quantised weight, since B starts at zero; with LoftQ, nearer to the original one.
    Cost: ``rank * (in + out)`` parameters, ``2 * rank * (in + out) + 2 * out`` floating-point operations a row and
    ``block_size * ceil(in * out / block_size) + double_quantisation * 512 * ceil(in * out / block_size / 256)`` a call.

    The original dense layer keeps its weight until :meth:`let_go`, which :func:`mindpet.inject` calls.

    >>> from mindspore import ops
    >>> layer = QLoRADense.from_dense(nn.Dense(64, 32), QLoRAConfig(rank=2))
    >>> layer(ops.ones((3, 5, 64))).shape
    (3, 5, 32)
    >>> layer.mindpet_base_codes.shape, layer.mindpet_base_codes.dtype
    ((1024,), mindspore.uint8)
    """

    delta_method = "qlora"
    sharded = {}
    base_digest: str  # of the original weight, once it is gone

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: QLoRAConfig) -> "QLoRADense":  # type: ignore[override]
        """The same dense layer with its weight quantised, its bias shared, and a new branch in the weight's dtype."""
        layer, weight = cls.borrow(dense), dense.weight.asnumpy()
        form = Form((dense.out_channels, dense.in_channels), config.bits, config.block_size, config.double_quantisation)
        if not getattr(dense.matmul, "transpose_b", True):
            raise ValueError(f"For '{cls.__name__}', {dense.weight.name} must be (out, in), but is (in, out).")
        layer.__dict__["original_weight"] = dense.weight  # not a parameter of this layer
        del layer.weight
        layer.form, layer.base_digest, layer.product = form, "", QuantisedProduct(form)
        a, b = branch_start(config, dense.weight)
        layer._add_branch(config.rank, config.scaled_alpha, float(config.dropout), a, b, dense.weight.dtype)
        codes = quantise(weight, form)
        for turn in range(config.loftq_iterations):
            left, right = _nearest_of_rank(weight - dequantise(codes, form), config.rank)
            layer._start_at(left, right)
            if turn + 1 < config.loftq_iterations:
                codes = quantise(weight - left @ right, form)
        for name, value in vars(codes).items():
            parameter = Parameter(Tensor(value), name=f"mindpet_base_{name}", requires_grad=False)
            setattr(layer, f"mindpet_base_{name}", parameter)
        return layer

    def _start_at(self, left: np.ndarray, right: np.ndarray) -> None:
        """Let the branch add ``left right``: (out, r) and (r, in), r at most the rank."""
        scale = self.lora_alpha / self.lora_rank
        size = np.sqrt(np.linalg.norm(right, axis=1) / abs(scale))  # of both A and B, for each singular value
        missing = self.lora_rank - len(size)
        a = np.pad(right / np.where(size == 0, 1, size * abs(scale))[:, None], [(0, missing), (0, 0)])
        b = np.pad(left * size * np.sign(scale), [(0, 0), (0, missing)])
        for parameter, value in ((self.mindpet_delta_lora_a, a), (self.mindpet_delta_lora_b, b)):
            parameter.set_data(Tensor(value.astype(parameter.asnumpy().dtype)))

    @property
    def base_weight(self) -> Parameter:
        """The weight of the original layer, empty from :meth:`let_go` to :meth:`take_back`."""
        return self.original_weight

    @property
    def base_shape(self) -> tuple[int, int]:
        """Of the weight that the codes stand for."""
        return self.form.shape

    def base_value(self) -> np.ndarray:
        """The weight that the codes stand for, in the dtype of the original one."""
        codes = Codes(**{name: getattr(self, f"mindpet_base_{name}").asnumpy() for name in Codes.__annotations__})
        return dequantise(codes, self.form).astype(self.base_weight.asnumpy().dtype)

    def let_go(self) -> None:
        """Empty the original weight, so that its memory is free whoever holds it. Its digest is kept."""
        if self.base_weight.size:
            value = self.base_weight.asnumpy()
            self.base_digest = self.base_digest or digest_of(value)  # of the first one, not of what it was filled with
            self.base_weight.set_data(Tensor(np.empty(0, value.dtype)), slice_shape=True)
            self.base_weight.requires_grad = False

    def take_back(self) -> None:
        """Fill the original weight again, with what the codes stand for: what quantisation lost stays lost."""
        if not self.base_weight.size:
            self.base_weight.set_data(Tensor(self.base_value()), slice_shape=True)

    def dense_rows(self, rows):
        """X W^T + b on rows: (rows, in) -> (rows, out)."""
        absmax = self.mindpet_base_absmax, self.mindpet_base_scales, self.mindpet_base_offset
        rows = self.product(rows, self.mindpet_base_codes, *absmax)
        if self.has_bias:
            rows = self.bias_add(rows, self.cast(self.bias, self.compute_dtype))
        return rows

    def shard(self, **strategies: Any) -> None:  # type: ignore[override]
        """Not possible.

        Raises:
            TypeError: always: blocks run over the ends of rows, so that codes cannot be cut as a weight is.
        """
        raise TypeError("A QLoRADense cannot be cut over devices: use LoRADense, or data parallelism alone.")


def _nearest_of_rank(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(left, right) whose product is the nearest matrix of that rank; the rows of `right` are orthogonal.

    The singular vectors are eigenvectors of the smaller square, in float64: few digits depend on the machine.
    """
    wide = matrix.astype(np.float64)
    if wide.shape[0] <= wide.shape[1]:
        left = np.linalg.eigh(wide @ wide.T)[1][:, ::-1][:, :rank]  # (out, r)
        return left, left.T @ wide
    vectors = np.linalg.eigh(wide.T @ wide)[1][:, ::-1][:, :rank]  # (in, r)
    left = wide @ vectors
    size = np.linalg.norm(left, axis=0)
    return left / np.where(size == 0, 1, size), size[:, None] * vectors.T


def fit(here: QLoRAConfig, there: QLoRAConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As LoRA's, where the quantised weights are the same ones.

    Raises:
        ValueError: they are not.
    """
    names = ["bits", "block_size", "double_quantisation", "loftq_iterations"]
    if max(here.loftq_iterations, there.loftq_iterations) > 1:
        names += ["rank", "rank_pattern"]  # which the second quantisation depends on
    differ = [
        f"{name} was {getattr(there, name)!r} and is {getattr(here, name)!r} here"
        for name in names
        if getattr(here, name) != getattr(there, name)
    ]
    if differ:
        raise ValueError("the delta belongs to weights that were quantised otherwise: " + ", ".join(differ))
    return lora.fit(here, there, tensors)


METHOD = Method(
    name="qlora",
    config=QLoRAConfig,
    trainable=lora.METHOD.trainable,
    paper="Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314",
    adapt={nn.Dense: QLoRADense.from_dense},
    targets=LINEAR,
    fit=fit,
    learning_rate=0.001,
)
