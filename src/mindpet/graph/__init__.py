"""What works on any tree of Cells and knows no method by name."""

from mindpet.graph.ckpt_util import TrainableParamsCheckPoint
from mindpet.graph.deltas import DeltaFileError, load_delta, save_delta
from mindpet.graph.freeze_utils import freeze_delta, freeze_from_config, freeze_modules
from mindpet.graph.inject import inject, replace_cell
from mindpet.graph.targets import find_targets

__all__ = [
    "DeltaFileError",
    "TrainableParamsCheckPoint",
    "find_targets",
    "freeze_delta",
    "freeze_from_config",
    "freeze_modules",
    "inject",
    "load_delta",
    "replace_cell",
    "save_delta",
]
