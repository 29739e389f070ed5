"""Cutting adapted layers over devices: named ways to do it, so that nobody need write tuples."""

from mindpet.parallel.config import ParallelConfig, strategies
from mindpet.parallel.network import shard_like

__all__ = ["ParallelConfig", "shard_like", "strategies"]
