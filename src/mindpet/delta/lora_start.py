"""Where the branch of LoRA starts: A and B of a dense layer, by the name of the start.

- ``kaiming``: A uniform in ±1/sqrt(in), B zero (Hu et al. 2021, section 4.1, as in their code and in PEFT).
- ``gaussian``: A normal with a standard deviation of 1/r, B zero (PEFT).
- ``orthogonal``: A and B in complementary halves of a random orthogonal basis, so that B A = 0 although neither is zero
  (PEFT); r even.
- ``pissa``: the r largest singular values of W and their vectors (Meng et al. 2024, arXiv:2404.02948, section 3).
- ``olora``: the first r columns and rows of W = Q R (Büyükakyüz 2024, arXiv:2406.01775, section 3).
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Parameter, Tensor
from mindspore import dtype as mstype
from mindspore.common.initializer import HeUniform, Initializer, Normal, initializer

if TYPE_CHECKING:
    from mindpet.delta.lora import LoRAConfig

STARTS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
OF_ANY_CELL = ("kaiming", "gaussian")  # the others take W for a matrix
OF_THE_WEIGHT = ("pissa", "olora")  # B A is a part of W then, and what counts is what is added to it


def random_start(config: "LoRAConfig", owner: str) -> Initializer:
    """The start of A beside a cell that is not dense.

    Raises:
        ValueError: a start for dense layers.
    """
    if config.start not in OF_ANY_CELL:
        raise ValueError(
            f"For '{owner}', 'start' must be one of {', '.join(OF_ANY_CELL)}, but got {config.start!r}, which is for "
            "dense layers: exclude the cell, or inject it with another configuration."
        )
    return Normal(1 / config.rank) if config.start == "gaussian" else HeUniform(negative_slope=math.sqrt(5))


def branch_start(config: "LoRAConfig", weight: Parameter) -> tuple[Tensor, Tensor]:
    """A ``(rank, in)`` and B ``(out, rank)`` beside a weight ``(out, in)``, in its dtype.

    Raises:
        ValueError: a rank above the smaller side of a weight that they are taken from.
    """
    (out, into), rank, dtype = weight.shape, config.rank, weight.dtype
    if config.start in OF_ANY_CELL:
        a = initializer(random_start(config, type(config).__name__), (rank, into), dtype)
        return a, initializer("zeros", (out, rank), dtype)
    if config.start == "orthogonal":
        a, b = _orthogonal(rank, into, out)
    else:
        if rank > min(out, into):
            raise ValueError(
                f"For '{type(config).__name__}', 'rank' must be at most {min(out, into)} for the start "
                f"{config.start!r} of {weight.name}, which is {(out, into)}, but got {rank}."
            )
        matrix = weight.init_data().astype(mstype.float32).asnumpy()
        scale = config.scaled_alpha / rank
        a, b = _principal(matrix, rank, scale) if config.start == "pissa" else _leading(matrix, rank)
    return Tensor(np.ascontiguousarray(a)).astype(dtype), Tensor(np.ascontiguousarray(b)).astype(dtype)


def _orthogonal(rank: int, into: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    basis = np.linalg.qr(_normal(rank, rank))[0]
    return (_normal(into, rank // 2) @ basis[0::2]).T / 10, _normal(out, rank // 2) @ basis[1::2] / 10


def _normal(*shape: int) -> np.ndarray:
    """Standard normal numbers by MindSpore's seed."""
    return initializer(Normal(1.0), shape, mstype.float32).init_data().asnumpy()


def _principal(matrix: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B that share out the largest singular values, so that ``scale * B A`` is the nearest of that rank."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values[:rank] / scale)
    return root[:, None] * right[:rank], left[:, :rank] * root


def _leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The first rows of R and the first columns of Q."""
    q, r = np.linalg.qr(matrix)
    return r[:rank], q[:, :rank]
