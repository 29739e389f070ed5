"""What works on any tree of Cells and knows no method by name."""

from mindpet.graph.ckpt_util import TrainableParamsCheckPoint
from mindpet.graph.combine import combine
from mindpet.graph.deltas import DeltaFileError, load_delta, loaded_deltas, save_delta, use
from mindpet.graph.freeze_utils import freeze_delta, freeze_from_config, freeze_modules
from mindpet.graph.inject import disable, eject, inject, replace_cell, target_report
from mindpet.graph.merge import merge, merge_and_eject, unmerge
from mindpet.graph.mixed import MixedDeltas
from mindpet.graph.optimizers import OptimizerCallback, parameter_groups, wrap_optimizer
from mindpet.graph.targets import find_targets

__all__ = [
    "DeltaFileError",
    "MixedDeltas",
    "OptimizerCallback",
    "TrainableParamsCheckPoint",
    "combine",
    "disable",
    "eject",
    "find_targets",
    "freeze_delta",
    "freeze_from_config",
    "freeze_modules",
    "inject",
    "load_delta",
    "loaded_deltas",
    "merge",
    "merge_and_eject",
    "parameter_groups",
    "replace_cell",
    "save_delta",
    "target_report",
    "unmerge",
    "use",
    "wrap_optimizer",
]
