"""AdaLoRA: adaptive budget allocation. Zhang et al. 2023, arXiv:2303.10512, sections 3.1 to 3.3, algorithm 1.

::

    x ──┬── W (frozen) ─────────────────────────┬── + ── σ ── y
        └── dropout ── A ── ∘ E ── B ── alpha/r ┘

B, E and A are a singular value decomposition of the delta in the making (the paper's P, Λ and Q). All layers share a
budget of singular values. It falls while training goes on, and the least important of them all are set to zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal

from mindpet import _checks
from mindpet.delta.adalora_optimizer import PARTS, AdaLoRAOptimizer
from mindpet.delta.dense import BranchDense
from mindpet.delta.method import ATTENTION, DeltaConfig, Method, PeftNames
from mindpet.utils.version_control import get_dropout


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(DeltaConfig):
    """AdaLoRA on every targeted dense layer.

    The budget is kept by the optimizer: a run makes such a one, and a script does with :func:`mindpet.wrap_optimizer`.

    Attributes:
        rank: singular values that a layer has on average in the end.
        initial_rank: r, those that each layer has in the beginning.
        alpha: the branch is scaled by alpha / initial_rank.
        dropout: probability, on the branch's input, in training only.
        initial_steps: steps before the budget falls: a share of all below 1, or a number of steps.
        final_steps: steps after it has fallen, in which the choice stays: the same.
        interval: steps between two choices of what stays.
        beta1: of the moving average of the sensitivities.
        beta2: of the moving average of how uncertain they are.
        orthogonality: weight of the regularisation that holds A and B near orthogonal matrices.
    """

    rank: int = 8
    initial_rank: int = 12
    alpha: float = 8.0
    dropout: float = 0.0
    initial_steps: float = 0.1
    final_steps: float = 0.3
    interval: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        for name in ("rank", "initial_rank", "interval"):
            _checks.positive_int(owner, name, getattr(self, name))
        _checks.rate(owner, "dropout", self.dropout, allow_int=True)
        for name in ("beta1", "beta2"):
            _checks.non_zero_number(owner, name, _checks.rate(owner, name, getattr(self, name)))
        for name in ("alpha", "initial_steps", "final_steps", "orthogonality"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"For '{owner}', '{name}' must be an int or a float, but got {_checks.shown(value)}.")
            if not 0 <= value < float("inf") or (name == "alpha" and value == 0):
                least = "above 0" if name == "alpha" else "at least 0"
                raise ValueError(f"For '{owner}', '{name}' must be {least}, but got {_checks.shown(value)}.")
        if self.rank > self.initial_rank:
            raise ValueError(
                f"For '{owner}', 'rank' must be at most initial_rank={self.initial_rank}, but got {self.rank}."
            )


class AdaLoRADense(BranchDense):
    r"""A dense layer with a branch that is a singular value decomposition in the making.

    .. math:: y = \sigma\bigl(x W^T + b + \tfrac{\alpha}{r}\, (\mathrm{dropout}(x) A^T \circ e^T) B^T\bigr)

    Shapes: x ``(..., in)``, W ``(out, in)``, A ``(r, in)``, e ``(r, 1)``, B ``(out, r)``, y ``(..., out)``; r is the
    initial rank, and a singular value e_i that the budget has no room for is 0. e starts at zero, so the layer starts
    as the dense layer it replaces. Cost: ``initial_rank * (in + out + 1)`` parameters,
    ``2 * initial_rank * (in + out) + initial_rank + out`` floating-point operations a row and ``initial_rank`` a call.

    >>> layer = AdaLoRADense.from_dense(nn.Dense(6, 4), AdaLoRAConfig(rank=1, initial_rank=2))
    >>> layer(ops.ones((3, 5, 6))).shape, layer.mindpet_delta_adalora_e.shape
    ((3, 5, 4), (2, 1))
    """

    delta_method = "adalora"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: AdaLoRAConfig) -> "AdaLoRADense":
        """The same dense layer, weight and bias shared, with a new delta in the dtype of its weight."""
        layer = cls.borrow(dense)
        rank, start = config.initial_rank, Normal(0.02)
        shapes = ((rank, dense.in_channels), (dense.out_channels, rank), (rank, 1))
        for name, shape, init in zip(PARTS, shapes, (start, start, "zeros")):
            layer.add_delta(name, init, *shape)
        layer.scale = config.alpha / (rank + 1e-5)  # as PEFT computes it
        layer.dropout = get_dropout(float(config.dropout))
        return layer

    def branch(self, rows):
        """(x A^T ∘ e^T) B^T, scaled: (rows, in) -> (rows, out)."""
        a = self.mindpet_delta_adalora_a.astype(rows.dtype)
        b = self.mindpet_delta_adalora_b.astype(rows.dtype)
        e = self.mindpet_delta_adalora_e.astype(rows.dtype)
        inner = ops.matmul(self.dropout(rows), a.T) * (e.T * self.scale)  # (rows, r)
        return ops.matmul(inner, b.T)

    def delta_weight(self) -> Tensor:
        """What the branch adds to W: ``alpha / r * B (A ∘ e)``, in the shape of W and the dtype of B."""
        a, b, e = (getattr(self, name).astype(mstype.float32) for name in PARTS)
        return (ops.matmul(b, a * e) * self.scale).astype(self.mindpet_delta_adalora_b.dtype)


def unpack(content: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Triplets of zeros where PEFT left out those without a budget, which its ``rank_pattern`` lists."""
    full = {}
    for name, value in tensors.items():
        module, dot, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        stays = (content.get("rank_pattern") or {}).get(f"{module}.lora_E")
        if dot and isinstance(stays, list) and value.ndim == 2:
            rows, stays = (value.T if part == "B" else value), np.array(stays, bool)
            if len(rows) == stays.sum():
                whole = np.zeros((len(stays), rows.shape[1]), value.dtype)
                whole[stays] = rows
                value = whole.T if part == "B" else whole
        full[name] = value
    return full


def pack(content: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the triplets whose singular value is 0; all of them where every one is, before training."""
    stays = {name.removesuffix("E"): value[:, 0] != 0 for name, value in tensors.items() if name.endswith(".lora_E")}
    content["total_step"] = 1  # PEFT wants a number, for a schedule that is over
    content["rank_pattern"] = None
    if not any(each.any() for each in stays.values()) or all(each.all() for each in stays.values()):
        return dict(tensors)
    names = {name: f"{name.removeprefix('base_model.model.')}E" for name in stays}
    content["rank_pattern"] = {names[name]: each.tolist() for name, each in stays.items()}

    def kept(name: str, value: np.ndarray) -> np.ndarray:
        each = stays.get(name[:-1])
        return value if each is None else value[:, each] if name.endswith("B") else value[each]

    return {name: kept(name, value) for name, value in tensors.items()}


METHOD = Method(
    name="adalora",
    config=AdaLoRAConfig,
    trainable=("*mindpet_delta_adalora*",),
    paper="Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, "
    "arXiv:2303.10512",
    adapt={nn.Dense: AdaLoRADense.from_dense},
    targets=ATTENTION,
    learning_rate=0.002,
    optimizer=AdaLoRAOptimizer,
    peft=PeftNames(
        "ADALORA",
        tensors=dict(zip(("lora_A", "lora_B", "lora_E"), PARTS)),
        options={
            "init_r": "initial_rank",
            "target_r": "rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "deltaT": "interval",
            "beta1": "beta1",
            "beta2": "beta2",
            "orth_reg_weight": "orthogonality",
        },
        fixed={
            **dict.fromkeys(("ensure_weight_tying", "lora_bias", "use_dora", "use_qalora"), False),
            **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication")),
            **dict.fromkeys(("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora")),
        },
        free=(
            *("corda_config", "eva_config", "init_lora_weights", "loftq_config", "lora_ga_config", "megatron_config"),
            *("megatron_core", "qalora_group_size", "r", "runtime_config", "tfinal", "tinit", "total_step"),
            *("use_rslora", "velora_config"),
        ),
        unpack=unpack,
        pack=pack,
    ),
)
