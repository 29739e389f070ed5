"""FourierFT: a delta with few frequencies. Gao et al. 2024, arXiv:2405.03003, section 3.

::

    x ── W + scaling · Re IDFT( c at random places, 0 elsewhere ) ── + b ── σ ── y

The places are the same for all layers of a size; they come from a seed and are not saved.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal

from mindpet import _checks
from mindpet.delta.dense import ReweightedDense
from mindpet.delta.method import ATTENTION, DeltaConfig, Method, PeftNames
from mindpet.delta.torch_random import TorchRandom


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(DeltaConfig):
    """FourierFT on every targeted dense layer.

    Attributes:
        frequencies: n, how many coefficients of the spectrum train in each layer.
        scaling: factor of the delta; the paper has 100 to 150 for BERT's kind and 300 for LLaMA.
        seed: of the places, which are those that PEFT makes of it.
        start_at_zero: start the coefficients at zero instead of normal, so that tuning starts at the network as it was.
    """

    frequencies: int = 1000
    scaling: float = 150.0
    seed: int = 777
    start_at_zero: bool = False

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        _checks.positive_int(owner, "frequencies", self.frequencies)
        _checks.non_zero_number(owner, "scaling", self.scaling)
        _checks.int_from_zero(owner, "seed", self.seed)
        _checks.boolean(owner, "start_at_zero", self.start_at_zero)


class FourierFTDense(ReweightedDense):
    r"""A dense layer whose delta is the real part of an inverse Fourier transform of a sparse trained spectrum.

    .. math:: y = \sigma\bigl(x (W + s\, \mathrm{Re}\, \mathrm{IDFT}(S))^T + b\bigr), \quad S_{p_i q_i} = c_i

    Shapes: x ``(..., in)``, W and S ``(out, in)``, c ``(frequencies,)``, y ``(..., out)``. The transform is NumPy's
    ``ifft2``, with 1 / (out in) before the sum. c starts standard normal, as in the paper: the layer starts a little
    beside the dense layer it replaces. Cost: ``frequencies`` parameters and
    ``(5 * log2(in * out) + 2) * in * out`` floating-point operations a call, in float32, however many rows there are.

    >>> layer = FourierFTDense.from_dense(nn.Dense(6, 4), FourierFTConfig(frequencies=5))
    >>> layer(ops.ones((3, 5, 6))).shape
    (3, 5, 4)
    """

    delta_method = "fourierft"

    @classmethod
    def from_dense(cls, dense: nn.Dense, config: FourierFTConfig) -> "FourierFTDense":
        """The same dense layer, weight and bias shared, with a new spectrum in the dtype of its weight."""
        layer = cls.borrow(dense)
        out, into = dense.out_channels, dense.in_channels
        if config.frequencies > out * into:
            raise ValueError(
                f"For 'FourierFTConfig', 'frequencies' must be at most {out * into}, the entries of a weight of shape "
                f"{(out, into)}, but got {config.frequencies}."
            )
        start = "zeros" if config.start_at_zero else Normal(1.0)
        layer.add_delta("mindpet_delta_fourierft_spectrum", start, config.frequencies)
        layer.places = Tensor(places(out, into, config.frequencies, config.seed))  # (frequencies, 2)
        layer.scaling = config.scaling
        return layer

    def changed_weight(self, weight):
        """W + scaling Re IDFT(S): (out, in) -> (out, in); there is no transform in float16."""
        values = self.mindpet_delta_fourierft_spectrum.astype(mstype.float32)
        spectrum = ops.scatter_nd(self.places, values, weight.shape)  # (out, in)
        delta = ops.real(ops.ifft2(spectrum)) * self.scaling
        return weight + delta.astype(weight.dtype)


@lru_cache(maxsize=8)  # most layers of a network are of few sizes
def places(out: int, into: int, count: int, seed: int) -> np.ndarray:
    """Row and column of each coefficient, all different: (count, 2). They are those of PEFT."""
    found = TorchRandom(seed).permutation(out * into, count)
    return np.stack([found // into, found % into], axis=1).astype(np.int32)


METHOD = Method(
    name="fourierft",
    config=FourierFTConfig,
    trainable=("*mindpet_delta_fourierft*",),
    paper="Gao et al. 2024, Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv:2405.03003",
    adapt={nn.Dense: FourierFTDense.from_dense},
    targets=ATTENTION,
    learning_rate=0.05,
    peft=PeftNames(
        "FOURIERFT",
        tensors={"fourierft_spectrum": "mindpet_delta_fourierft_spectrum"},
        options={"n_frequency": "frequencies", "scaling": "scaling", "random_loc_seed": "seed"},
        fixed={"n_frequency_pattern": {}},
        free=("init_weights",),
    ),
)
