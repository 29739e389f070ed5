"""The budget of AdaLoRA. Zhang et al. 2023, arXiv:2303.10512, sections 3.1 to 3.3, algorithm 1."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

if TYPE_CHECKING:
    from mindpet.delta.adalora import AdaLoRAConfig

PARTS = ("mindpet_delta_adalora_a", "mindpet_delta_adalora_b", "mindpet_delta_adalora_e")
_A, _B = 0, 1  # numbers of the parts that are regularised


def budgets(config: "AdaLoRAConfig", layers: int, steps: int) -> tuple[np.ndarray, np.ndarray, int]:
    """For each step, the first being 1: how many singular values stay, whether they are chosen anew; the last choice.

    >>> from mindpet.delta.adalora import AdaLoRAConfig
    >>> stay, chosen, last = budgets(AdaLoRAConfig(rank=1, initial_rank=4, interval=2), layers=2, steps=10)
    >>> stay.tolist(), chosen.nonzero()[0].tolist(), last
    ([8, 8, 5, 3, 2, 2, 2, 2, 2, 2, 2], [2, 4, 6, 7], 7)
    """
    first, last = _number(config.initial_steps, steps), steps - _number(config.final_steps, steps)
    if first >= last:
        raise ValueError(
            f"For 'AdaLoRAConfig', initial_steps={config.initial_steps} and final_steps={config.final_steps} leave "
            f"none of {steps} steps for the budget to fall in: lower them."
        )
    most, least = layers * config.initial_rank, layers * config.rank
    stay, chosen = np.full(steps + 1, most, np.int32), np.zeros(steps + 1, np.int32)
    for step in range(first + 1, steps + 1):
        left = max(0.0, 1 - (step - first) / (last - first))
        stay[step] = int((most - least) * left**3 + least)
        chosen[step] = step == last or (step < last and step % config.interval == 0)
    return stay, chosen, last


def _number(given: float, steps: int) -> int:
    """Of steps: a share of all below 1, or their number."""
    return int(given) if given >= 1 else round(given * steps)


class AdaLoRAOptimizer(nn.Optimizer):
    r"""An optimizer around another, which gives the singular values of all layers their budget.

    To the gradients it adds those of the regularisation, the mean over all A and B of ``||A A^T - I||`` and
    ``||B^T B - I||`` in the Frobenius norm. After the step it updates, for each entry w of A, B and e,

    .. math:: I = |w\, \nabla w|, \quad \bar I \gets \beta_1 \bar I + (1 - \beta_1) I, \quad
        \bar U \gets \beta_2 \bar U + (1 - \beta_2) |I - \bar I|, \quad s = \bar I\, \bar U

    The importance of a singular value is its s and the means of s over its row of A and over its column of B. Those of
    the least importance in all layers together, as many as are beyond the budget, are set to zero. One may come back
    until the last choice, and is held at zero after it. All of this is in the graph; its state is parameters, beside
    those of the other optimizer.

    Differs from the paper, as PEFT does: the norms are not squared, and w is the entry after the step, not before it.

    Args:
        optimizer: what makes the steps.
        cells: path to the AdaLoRADense there.
        config: of these cells.
        steps: how many there will be.

    Raises:
        ValueError: A, B or e of a cell does not train under `optimizer`; the schedule leaves no step.
    """

    def __init__(self, optimizer: nn.Optimizer, cells: Mapping[str, Any], config: "AdaLoRAConfig", steps: int):
        nn.Cell.__init__(self, auto_prefix=False)  # nn.Optimizer's would make a second learning rate and counter
        self.optimizer, self.loss_scale = optimizer, optimizer.loss_scale
        for name in ("parameters", "learning_rate", "dynamic_lr", "is_group", "is_group_lr", "global_step"):
            setattr(self, name, getattr(optimizer, name))  # what a training loop and its callbacks ask for
        index = {id(parameter): number for number, parameter in enumerate(optimizer.parameters)}
        unique = {id(cell): path for path, cell in cells.items()}
        layers = {path: [index.get(id(getattr(cells[path], part)), -1) for part in PARTS] for path in unique.values()}
        frozen = [path for path, numbers in layers.items() if -1 in numbers]
        if frozen:
            raise ValueError(f"For 'adalora', A, B and e of {frozen[0]} must all train under the optimizer.")
        self.layers = tuple(tuple(numbers) for numbers in layers.values())  # of A, B and e among the parameters
        parts = {number: part for numbers in self.layers for part, number in enumerate(numbers)}
        self.parts = tuple(parts.get(number, -1) for number in range(len(index)))
        self.rank, self.beta1, self.beta2 = config.initial_rank, config.beta1, config.beta2
        self.strength = config.orthogonality / (2 * len(layers)) * self.loss_scale
        stay, chosen, self.last = budgets(config, len(layers), steps)
        self.steps = steps
        self.beyond, self.chosen = Tensor(len(layers) * self.rank - stay), Tensor(chosen)
        self.sensitivity, self.uncertainty = (
            self._averages("sensitivity", layers),
            self._averages("uncertainty", layers),
        )
        first = next(iter(layers))  # another injection has other layers
        self.mask = Parameter(Tensor(np.ones(len(layers) * self.rank, np.float32)), f"adalora_mask.{first}", False)
        self.step = Parameter(Tensor(np.zeros(1, np.int32)), f"adalora_step.{first}", False)

    def get_lr_parameter(self, param: Any) -> Any:
        """The learning rate of a parameter, from the optimizer within."""
        return self.optimizer.get_lr_parameter(param)

    def _averages(self, name: str, layers: dict[str, list[int]]) -> ParameterTuple:
        """Zeros for each layer: (r, in + out + 1), beside each singular value its row of A and its column of B."""
        sizes = {path: sum(self.parameters[number].size for number in numbers) for path, numbers in layers.items()}
        return ParameterTuple(
            Parameter(Tensor(np.zeros((self.rank, size // self.rank), np.float32)), f"adalora_{name}.{path}", False)
            for path, size in sizes.items()
        )

    def construct(self, gradients):
        gradients = self.regularised(gradients)
        done = self.optimizer(gradients)
        step = ops.assign_add(self.step, Tensor([1], mstype.int32))
        now = ops.minimum(step, self.steps)
        beyond, chosen = ops.gather(self.beyond, now, 0), ops.gather(self.chosen, now, 0) > 0
        scores = self.importance(gradients, step < self.last)  # (layers * r,)
        least = ops.gather(ops.sort(scores)[0], ops.maximum(beyond - 1, 0), 0)
        stays = ops.logical_or(scores > least, beyond == 0).astype(mstype.float32)
        mask = ops.where(chosen, stays, self.mask)
        ops.assign(self.mask, mask)
        masked = ops.logical_or(chosen, step > self.last)
        for index in range(len(self.layers)):
            values = self.parameters[self.layers[index][2]]  # (r, 1)
            own = mask[index * self.rank : (index + 1) * self.rank].reshape((-1, 1)).astype(values.dtype)
            ops.assign(values, ops.where(masked, values * own, values))
        return done

    def regularised(self, gradients):
        """The gradients with those of the regularisation: (A A^T - I) A / ||A A^T - I||, and so for B^T."""
        result: tuple = ()
        for index in range(len(gradients)):
            gradient, part = gradients[index], self.parts[index]
            if self.strength > 0 and part in (_A, _B):
                rows = self.parameters[index].astype(mstype.float32)
                rows = rows.T if part == _B else rows  # (r, in) or (r, out)
                excess = ops.matmul(rows, rows.T) - ops.eye(self.rank, self.rank, mstype.float32)
                norm = ops.maximum(ops.sqrt(ops.square(excess).sum()), 1e-30)
                added = ops.matmul(excess, rows) * (2 * self.strength / norm)
                gradient = gradient + (added.T if part == _B else added).astype(gradient.dtype)
            result += (gradient,)
        return result

    def importance(self, gradients, learns):
        """The importance of each singular value, layer by layer; the averages move on where they still learn."""
        scores: tuple = ()
        for index in range(len(self.layers)):
            a, b, e = self.layers[index]
            mean, spread = self.sensitivity[index], self.uncertainty[index]
            parts = (self.product(a, gradients), self.product(b, gradients).T, self.product(e, gradients))
            now = ops.concat(parts, 1) / self.loss_scale  # (r, in + out + 1)
            new_mean = self.beta1 * mean + (1 - self.beta1) * now
            new_spread = self.beta2 * spread + (1 - self.beta2) * ops.abs(now - new_mean)
            new_mean, new_spread = ops.where(learns, new_mean, mean), ops.where(learns, new_spread, spread)
            ops.assign(mean, new_mean)
            ops.assign(spread, new_spread)
            score, width = new_mean * new_spread, parts[0].shape[1]
            scores += (score[:, :width].mean(1) + score[:, width:-1].mean(1) + score[:, -1],)
        return ops.concat(scores)

    def product(self, number, gradients):
        """I of a parameter."""
        return ops.abs(self.parameters[number].astype(mstype.float32) * gradients[number].astype(mstype.float32))
