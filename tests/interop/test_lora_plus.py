"""LoRA+ against PEFT's optimizer: the same start, data and rates give the same parameters after every step."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import LoRAPlusConfig, inject, parameter_groups

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
plus = pytest.importorskip("peft.optimizers")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

SIZES, STEPS, RANK, ALPHA, RATE, RATIO, DECAY = (5, 7, 3), 8, 2, 4, 0.004, 8.0, 0.1
OURS = {"lora_A": "mindpet_delta_lora_a", "lora_B": "mindpet_delta_lora_b"}


def by_peft(weights, starts, data, optimizer):
    """Parameters by (layer, part) after each step."""
    layers = [torch.nn.Linear(*weight.shape[::-1], bias=False) for weight in weights]
    for layer, weight in zip(layers, weights):
        layer.weight.data = torch.tensor(weight)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0", "1"])
    model = peft.get_peft_model(torch.nn.Sequential(*layers), config)
    parameters = {}
    for index, layer in enumerate(model.base_model.model):
        for part in OURS:
            parameters[index, part] = getattr(layer, part)["default"].weight
            parameters[index, part].data = torch.tensor(starts[index, part])
    kind, options = {"momentum": (torch.optim.SGD, {"momentum": 0.9}), "adam": (torch.optim.Adam, {})}[optimizer]
    made = plus.create_loraplus_optimizer(
        model, kind, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY, **options
    )
    history = []
    for x, y in data:
        made.zero_grad()
        ((model(torch.tensor(x)) - torch.tensor(y)) ** 2).mean().backward()
        made.step()
        history.append({key: parameter.detach().numpy().copy() for key, parameter in parameters.items()})
    return history


def by_us(weights, starts, data, optimizer):
    layers = [nn.Dense(*weight.shape[::-1], has_bias=False) for weight in weights]
    for layer, weight in zip(layers, weights):
        layer.weight.set_data(Tensor(weight))
    config = LoRAPlusConfig(rank=RANK, alpha=ALPHA, ratio=RATIO, targets=["0", "1"])
    network = inject(nn.SequentialCell(*layers), config)
    parameters = {(index, part): getattr(network[index], name) for index in (0, 1) for part, name in OURS.items()}
    for key, parameter in parameters.items():
        parameter.set_data(Tensor(starts[key]))
    groups = parameter_groups(network, RATE, DECAY)
    made = nn.Momentum(groups, RATE, 0.9) if optimizer == "momentum" else nn.Adam(groups, RATE)
    step = nn.TrainOneStepCell(nn.WithLossCell(network, nn.MSELoss()), made).set_train()
    history = []
    for x, y in data:
        step(Tensor(x), Tensor(y))
        history.append({key: parameter.asnumpy().copy() for key, parameter in parameters.items()})
    return history


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_parameters_after_every_step_are_those_of_peft(mode, optimizer):
    generator = np.random.default_rng(4)

    def numbers(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    weights = [numbers(*shape) for shape in zip(SIZES[1:], SIZES[:-1])]
    shapes = {"lora_A": lambda w: (RANK, w.shape[1]), "lora_B": lambda w: (w.shape[0], RANK)}
    starts = {
        (index, part): 0.3 * numbers(*shape(weight))
        for index, weight in enumerate(weights)
        for part, shape in shapes.items()
    }
    data = [(numbers(6, SIZES[0]), numbers(6, SIZES[-1])) for _ in range(STEPS)]
    theirs, ours = (run(weights, starts, data, optimizer) for run in (by_peft, by_us))
    for number, (there, here) in enumerate(zip(theirs, ours, strict=True), 1):
        for key, value in there.items():
            np.testing.assert_allclose(here[key], value, atol=1e-5, err_msg=f"step {number}, {key}")
    assert any(np.abs(theirs[-1][key] - starts[key]).max() > 0.1 for key in starts)
