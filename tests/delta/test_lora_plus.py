"""LoRA+: B learns at a multiple of the learning rate of A, whatever the optimizer, and is saved as the LoRA it is."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import LoRAConfig, LoRAPlusConfig, inject, load_peft, parameter_groups, save_peft
from mindpet.graph import combine, load_delta, save_delta
from mindpet.graph.optimizers import rate_factors
from mindpet.train.config import TrainSection
from mindpet.train.fit import build_optimizer, learning_rates

RATIO = 4.0


def network():
    return nn.SequentialCell(nn.Dense(4, 6), nn.Tanh(), nn.Dense(6, 3))


def tuned(kind=LoRAPlusConfig, **more):
    cell = inject(network(), kind(rank=2, targets=["0"], modules_to_save=["2"], **more))
    cell[0].mindpet_delta_lora_b.set_data(Tensor(np.random.default_rng(0).standard_normal((6, 2)).astype(np.float32)))
    return cell


def steps(cell, optimizer, count=3):
    """The values of what trains before the first step and after each."""
    step = nn.TrainOneStepCell(nn.WithLossCell(cell, nn.MSELoss()), optimizer).set_train()
    generator = np.random.default_rng(1)
    x, y = (Tensor(generator.standard_normal(shape).astype(np.float32)) for shape in ((5, 4), (5, 3)))
    values = [{p.name: p.asnumpy().copy() for p in cell.trainable_params()}]
    for _ in range(count):
        step(x, y)
        values.append({p.name: p.asnumpy().copy() for p in cell.trainable_params()})
    return values


def factor(name):
    return RATIO if name.endswith("lora_b") else 1.0


RATES = learning_rates(TrainSection(warmup=2, schedule="cosine"), 0.1, 6)


@pytest.mark.parametrize("rate", [0.1, RATES, Tensor(RATES, ms.float32), nn.CosineDecayLR(0.01, 0.1, 6)], ids=type)
def test_one_step_of_gradient_descent_is_ratio_times_as_long_for_b(mode, rate):
    plain, plus = tuned(LoRAConfig), tuned(ratio=RATIO)
    for one, other in zip(plus.get_parameters(), plain.get_parameters()):
        one.set_data(other.value())
    before, after = steps(plain, nn.SGD(plain.trainable_params(), rate), 1)
    _, after_plus = steps(plus, nn.SGD(parameter_groups(plus, rate), rate), 1)
    for name, start in before.items():
        expected = start.astype(np.float64) + factor(name) * (after[name].astype(np.float64) - start)
        np.testing.assert_allclose(after_plus[name], expected, atol=1e-6, err_msg=name)
        assert np.abs(after[name] - start).max() > 1e-3


def by_hand(optimizer, decay, starts, gradients):
    """NumPy's values after each step of the run file's optimizers, in float64."""
    values = {name: value.astype(np.float64) for name, value in starts.items()}
    first, second = ({name: np.zeros_like(value) for name, value in values.items()} for _ in range(2))
    for number, each in enumerate(gradients):
        for name, gradient in each.items():
            rate = RATES[number] * factor(name)
            own = 0.0 if name.endswith("bias") else decay
            gradient = gradient.astype(np.float64)
            if optimizer != "adamw":
                gradient = gradient + own * values[name]
            if optimizer == "sgd":
                first[name] = 0.9 * first[name] + gradient if number else gradient
                values[name] = values[name] - rate * first[name]
                continue
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            if optimizer == "adamw":
                move = first[name] / (np.sqrt(second[name]) + 1e-6) + own * values[name]
                values[name] = values[name] - rate * move
            else:
                rate *= np.sqrt(1 - 0.999 ** (number + 1)) / (1 - 0.9 ** (number + 1))
                values[name] = values[name] - rate * first[name] / (np.sqrt(second[name]) + 1e-8)
    return values


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_the_optimizers_of_a_run_follow_the_schedule_at_both_rates(mode, optimizer, decay):
    cell = tuned(ratio=RATIO)
    parameters = list(cell.trainable_params())
    made = build_optimizer(TrainSection(optimizer=optimizer, weight_decay=decay), parameters, RATES, rate_factors(cell))
    assert [p.name for p in made.parameters] == [p.name for p in parameters]
    generator = np.random.default_rng(2)
    starts = {p.name: p.asnumpy().copy() for p in parameters}
    gradients = [{p.name: generator.standard_normal(p.shape).astype(np.float32) for p in parameters} for _ in range(4)]
    for each in gradients:
        made(tuple(Tensor(each[p.name]) for p in parameters))
    for name, value in by_hand(optimizer, decay, starts, gradients).items():
        np.testing.assert_allclose(cell.parameters_dict()[name].asnumpy(), value, rtol=2e-5, atol=2e-5, err_msg=name)


def test_groups_have_rates_and_decay_by_name():
    cell = tuned(ratio=RATIO)
    *groups, order = parameter_groups(cell, 0.01, weight_decay=0.1)
    found = {p.name: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found == {
        "0.mindpet_delta_lora_a": (0.01, 0.1),
        "0.mindpet_delta_lora_b": (0.04, 0.1),
        "2.weight": (0.01, 0.1),
        "2.bias": (0.01, 0.0),
    }
    assert [p.name for p in order["order_params"]] == [p.name for p in cell.trainable_params()]
    (one, _) = parameter_groups(inject(network(), LoRAConfig(rank=2, targets=["0"])), 0.01)
    assert one["lr"] == 0.01
    with pytest.raises(ValueError, match="Nothing in this Dense trains"):
        frozen = nn.Dense(2, 2)
        frozen.weight.requires_grad = frozen.bias.requires_grad = False
        parameter_groups(frozen, 0.01)


@pytest.mark.parametrize(("ratio", "error"), [(0.5, ValueError), (0, ValueError), ("16", TypeError), (True, TypeError)])
def test_the_ratio_is_checked(ratio, error):
    with pytest.raises(error, match="For 'LoRAPlusConfig', 'ratio' must be"):
        LoRAPlusConfig(ratio=ratio)


def test_peft_gets_plain_lora(tmp_path):
    cell = tuned()
    save_peft(cell, tmp_path)
    back = load_peft(fresh(cell), tmp_path)
    x = Tensor(np.ones((2, 4), np.float32))
    np.testing.assert_array_equal(back(x).asnumpy(), cell(x).asnumpy())


def test_two_are_combined_into_one(tmp_path):
    cell = tuned(ratio=RATIO)
    save_delta(cell, tmp_path / "a")
    combine([tmp_path / "a", tmp_path / "a"], tmp_path / "both", weights=[0.5, 0.5])
    x = Tensor(np.ones((2, 4), np.float32))
    np.testing.assert_allclose(load_delta(fresh(cell), tmp_path / "both")(x).asnumpy(), cell(x).asnumpy(), atol=1e-5)


def fresh(cell):
    """The base of a tuned network."""
    other = network()
    for parameter in other.get_parameters():
        parameter.set_data(cell.parameters_dict()[parameter.name].value())
    return other
