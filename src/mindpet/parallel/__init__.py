"""Cutting adapted layers over devices: named ways to do it, so that nobody need write tuples."""

from mindpet.parallel.checkpoints import DistributedLoad, load_distributed_delta, transform_delta_checkpoints
from mindpet.parallel.config import ParallelConfig, strategies
from mindpet.parallel.network import shard_like

__all__ = [
    "DistributedLoad",
    "ParallelConfig",
    "load_distributed_delta",
    "shard_like",
    "strategies",
    "transform_delta_checkpoints",
]
