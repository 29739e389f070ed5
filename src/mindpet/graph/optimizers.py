"""What the injected methods ask of the optimizer: learning rates of their own, and steps of their own."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.nn.learning_rate_schedule import LearningRateSchedule
from mindspore.train import Callback, RunContext

from mindpet import _checks, _compat
from mindpet.delta.registry import method_of
from mindpet.graph.inject import injections

_WRAPPED = "mindpet_wrapped"
_NOT_DECAYED = ("bias", "beta", "gamma")
Rate: TypeAlias = float | Sequence[float] | Tensor | LearningRateSchedule


class _Times(LearningRateSchedule):
    """A schedule, multiplied."""

    def __init__(self, schedule: LearningRateSchedule, factor: float):
        super().__init__()
        self.schedule, self.factor = schedule, factor

    def construct(self, global_step):
        return self.schedule(global_step) * self.factor


def parameter_groups(network: nn.Cell, learning_rate: Rate, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """What trains, in groups for an optimizer of `mindspore.nn`, each with the learning rate that its method gives it.

    LoRA+ gives B a higher one; without such a method all have the same. Biases and norms are not decayed.

    Args:
        network: with the methods injected.
        learning_rate: one number; one for each step, as a list or as a Tensor; or a schedule of `mindspore.nn`.
        weight_decay: of everything else.

    Raises:
        TypeError: `network` is not a Cell.
        ValueError: nothing in it trains.

    >>> from mindpet import LoRAPlusConfig, inject
    >>> network = inject(nn.SequentialCell(nn.Dense(4, 4)), LoRAPlusConfig(rank=2, targets=["0"]))
    >>> optimizer = nn.Adam(parameter_groups(network, 0.001))
    >>> [round(float(optimizer.get_lr_parameter(p).asnumpy()), 5) for p in network.trainable_params()]
    [0.001, 0.016]
    """
    _checks.cell("parameter_groups", "network", network)
    parameters = list(network.trainable_params())
    if not parameters:
        raise ValueError(f"Nothing in this {type(network).__name__} trains.")
    groups = [
        {"params": group, "lr": _times(learning_rate, factor), "weight_decay": decay}
        for (factor, decay), group in grouped(parameters, rate_factors(network), weight_decay).items()
    ]
    return [*groups, {"order_params": parameters}]


def wrap_optimizer(network: nn.Cell, optimizer: nn.Optimizer, steps: int) -> nn.Optimizer:
    """The optimizer with what the injected methods do at each step: AdaLoRA's budget, for instance.

    Args:
        network: with the methods injected.
        optimizer: of what trains in it.
        steps: how many there will be.

    Returns:
        An optimizer around it, or itself where no method asks for one.

    Raises:
        TypeError: `network` is not a Cell, `optimizer` not an optimizer of `mindspore.nn`.
        ValueError: `steps` is not positive; a method cannot work with this optimizer, or in so few steps; the optimizer
            is wrapped already.

    >>> from mindpet import AdaLoRAConfig, inject
    >>> network = inject(nn.SequentialCell(nn.Dense(4, 4)), AdaLoRAConfig(targets=["0"]))
    >>> optimizer = wrap_optimizer(network, nn.Adam(network.trainable_params(), 0.001), steps=100)
    >>> step = nn.TrainOneStepCell(nn.WithLossCell(network, nn.MSELoss()), optimizer)
    """
    _checks.cell("wrap_optimizer", "network", network)
    _checks.positive_int("wrap_optimizer", "steps", steps)
    if not isinstance(optimizer, nn.Optimizer):
        raise TypeError(
            f"For 'wrap_optimizer', 'optimizer' must be a mindspore.nn.Optimizer, but got {_checks.shown(optimizer)}."
        )
    if hasattr(optimizer, _WRAPPED):
        raise ValueError("For 'wrap_optimizer', 'optimizer' is wrapped already: give the one within.")
    for one in injections(network):
        make = method_of(one.config).optimizer
        if make is not None:
            optimizer = make(optimizer, one.adapted, one.config, steps)
            setattr(optimizer, _WRAPPED, True)
    return optimizer


class OptimizerCallback(Callback):
    """:func:`wrap_optimizer` for ``Model.train``: AdaLoRA's budget, for as many steps as there will be.

    When training begins, it puts around the model's optimizer what the injected methods do at each step. As every
    callback, it sees neither gradients nor what the loss depends on: so the budget itself is kept by the optimizer.
    Where no method asks for anything, or the optimizer is wrapped already, it changes nothing: training that goes on
    with the same model goes on with its present budget.

    Raises:
        ValueError: when training begins: what :func:`wrap_optimizer` raises; the model has no optimizer; nothing is
            injected into its network.

    >>> import mindspore as ms
    >>> from mindpet import AdaLoRAConfig, inject
    >>> network = inject(nn.SequentialCell(nn.Dense(4, 4)), AdaLoRAConfig(rank=1, initial_rank=2, targets=["0"]))
    >>> rows = ms.dataset.NumpySlicesDataset((np.eye(4, dtype=np.float32),) * 2, ["x", "y"]).batch(2)
    >>> model = ms.train.Model(network, nn.MSELoss(), nn.Adam(network.trainable_params(), 0.001))
    >>> model.train(10, rows, callbacks=[OptimizerCallback()], dataset_sink_mode=False)
    >>> np.count_nonzero(network[0].mindpet_delta_adalora_e.asnumpy())
    1
    """

    def on_train_begin(self, run_context: RunContext) -> None:
        """Wrap the optimizer of the model that begins to train."""
        known = run_context.original_args()
        step = known.train_network
        if not isinstance(getattr(step, "optimizer", None), nn.Optimizer):
            raise ValueError(
                f"For 'OptimizerCallback', the model must have an optimizer, but its {type(step).__name__} has none."
            )
        network = next((cell for _, cell in step.cells_and_names() if injections(cell)), None)
        if network is None:
            raise ValueError("For 'OptimizerCallback', nothing is injected into the model's network: inject first.")
        if not hasattr(step.optimizer, _WRAPPED):
            wrapped = wrap_optimizer(network, step.optimizer, known.epoch_num * known.batch_num)
            if wrapped is not step.optimizer:
                step.optimizer = wrapped
                _compat.forget_compiled(step)  # of an earlier training without this


def rate_factors(network: nn.Cell) -> dict[str, float]:
    """The factor of the learning rate of each parameter, by name, for which it is not 1."""
    factors = {}
    for one in injections(network):
        rate = method_of(one.config).rate
        if rate is not None:
            names = {p.name: p for cell in one.adapted.values() for p in cell.get_parameters() if p.requires_grad}
            factors.update({name: rate(one.config, name) for name in names})
    return {name: factor for name, factor in factors.items() if factor != 1}


def grouped(
    parameters: Sequence[Parameter], factors: Mapping[str, float], weight_decay: float
) -> dict[tuple[float, float], list[Parameter]]:
    """The parameters by (factor of the learning rate, weight decay)."""
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for parameter in parameters:
        decay = 0.0 if parameter.name.endswith(_NOT_DECAYED) else weight_decay
        groups.setdefault((factors.get(parameter.name, 1.0), decay), []).append(parameter)
    return groups


def _times(rate: Rate, factor: float) -> Rate:
    if isinstance(rate, LearningRateSchedule):
        return rate if factor == 1 else _Times(rate, factor)
    if isinstance(rate, (int, float)):
        return rate * factor
    values = rate.asnumpy() if isinstance(rate, Tensor) else np.array(rate)
    return Tensor((values * factor).astype(np.float32))
