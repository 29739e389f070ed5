"""CPU kernels for the operators that dominate a training step there. Importing this compiles nothing."""

from mindpet.kernels.accelerate import accelerate
from mindpet.kernels.build import available, why_not

__all__ = ["accelerate", "available", "why_not"]
