"""The learning rate of a run: the run file's, or the one that its method is used to."""

from mindpet.delta.registry import method_named
from mindpet.models.prefix_start import PROJECTED_RATE
from mindpet.models.pretrained import family_of
from mindpet.train.config import RunConfig, method_config

FULL_LEARNING_RATE = 1e-4


def peak_learning_rate(config: RunConfig) -> float:
    """The run file's, or the method's own."""
    if config.train.learning_rate is not None:
        return config.train.learning_rate
    if starts_from_text(config) and method_config(config.method).projection:
        return PROJECTED_RATE
    return FULL_LEARNING_RATE if config.method.name == "full" else method_named(config.method.name).learning_rate


def with_rate(config: RunConfig) -> RunConfig:
    """The same run with its learning rate written down."""
    return config.model_copy(
        update={"train": config.train.model_copy(update={"learning_rate": peak_learning_rate(config)})}
    )


def starts_from_text(config: RunConfig) -> bool:
    """Whether the run's method is a prefix that begins as the first training tokens would."""
    wanted = config.train.prefix_start == "text" and config.method.name != "full"
    chosen = wanted and method_named(config.method.name).name in ("prefix", "ptuning2")
    return chosen and family_of(config.model.path).task == "language"
