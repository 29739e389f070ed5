"""AdaLoRA's optimizer against NumPy in float64: regularisation, importance, budget; around each optimizer of a run."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from mindpet import AdaLoRAConfig, LoRAConfig, OptimizerCallback, inject, load_peft, save_peft, wrap_optimizer
from mindpet.delta.adalora_optimizer import PARTS, budgets
from mindpet.models import BertForSequenceClassification
from mindpet.train.config import TrainSection
from mindpet.train.fit import build_optimizer

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
STEPS = 12
CONFIG = AdaLoRAConfig(
    rank=1, initial_rank=3, initial_steps=2, final_steps=3, interval=2, targets=["0", "2"], modules_to_save=["3"]
)


def network(config=CONFIG, dtype=ms.float32):
    cell = nn.SequentialCell(nn.Dense(4, 6), nn.ReLU(), nn.Dense(6, 5), nn.Dense(5, 2))
    for parameter in cell.get_parameters():
        parameter.set_dtype(dtype)
    inject(cell, config)
    generator = np.random.default_rng(1)
    for parameter in cell.trainable_params():
        start = 0.5 * generator.standard_normal(parameter.shape)
        parameter.set_data(Tensor(start, parameter.dtype))
    return cell


def regularisation(matrix):
    """The gradient of the Frobenius norm of M M^T - I."""
    excess = matrix @ matrix.T - np.eye(len(matrix))
    return 2 * excess @ matrix / np.linalg.norm(excess)


def sections(optimizer):
    return TrainSection(optimizer=optimizer, weight_decay=0.1), np.linspace(0.1, 0.01, STEPS).tolist()


@pytest.mark.exhaustive_in_graph
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_each_step_is_the_inner_optimizer_s_and_the_budget_s(mode, optimizer):
    cell = network()
    trained = list(cell.trainable_params())
    ours = wrap_optimizer(cell, build_optimizer(sections(optimizer)[0], trained, sections(optimizer)[1]), STEPS)
    twins = {p.name: Parameter(p.value().copy(), name=p.name) for p in trained}
    inner = build_optimizer(sections(optimizer)[0], list(twins.values()), sections(optimizer)[1])
    layers = [[f"{path}.{part}" for part in PARTS] for path in ("0", "2")]
    mean = {name: np.zeros(twins[name].shape) for names in layers for name in names}
    spread, masks = {name: value.copy() for name, value in mean.items()}, {}
    generator, counts = np.random.default_rng(2), []
    for step in range(1, STEPS + 1):
        gradients = {name: generator.standard_normal(twin.shape).astype(np.float32) for name, twin in twins.items()}
        ours(tuple(Tensor(value) for value in gradients.values()))
        for a, b, _ in layers:
            gradients[a] = gradients[a] + CONFIG.orthogonality / 4 * regularisation(twins[a].asnumpy())
            gradients[b] = gradients[b] + CONFIG.orthogonality / 4 * regularisation(twins[b].asnumpy().T).T
        inner(tuple(Tensor(value.astype(np.float32)) for value in gradients.values()))
        if step < STEPS - 3:
            for name in mean:
                now = np.abs(twins[name].asnumpy() * gradients[name])
                mean[name] = 0.85 * mean[name] + 0.15 * now
                spread[name] = 0.85 * spread[name] + 0.15 * np.abs(now - mean[name])
        if step in (4, 6, 8, 9):
            score = {name: mean[name] * spread[name] for name in mean}
            scores = [score[e][:, 0] + score[a].mean(1) + score[b].mean(0) for a, b, e in layers]
            budget = int(4 * (1 - (step - 2) / 7) ** 3 + 2)
            least = np.sort(np.concatenate(scores))[6 - budget - 1]
            masks = {e: (value > least)[:, None] for (_, _, e), value in zip(layers, scores)}
        if step in (4, 6, 8) or step >= 9:
            for name, mask in masks.items():
                ms.ops.assign(twins[name], Tensor(np.where(mask, twins[name].asnumpy(), 0), ms.float32))
        for parameter in trained:
            np.testing.assert_allclose(
                parameter.asnumpy(), twins[parameter.name].asnumpy(), atol=2e-6, err_msg=f"{step} {parameter.name}"
            )
        counts.append(sum(np.count_nonzero(cell.parameters_dict()[e].asnumpy()) for _, _, e in layers))
    assert counts == [6, 6, 6, 3, 6, 2, 6, 2, 2, 2, 2, 2]


def test_the_budget_falls_as_a_cube():
    """Equation 12 of the paper, with every number of steps given or as a share."""
    config = AdaLoRAConfig(rank=2, initial_rank=10, initial_steps=5, final_steps=0.25, interval=5)
    stay, chosen, last = budgets(config, layers=3, steps=100)
    assert last == 75
    assert (stay[:6] == 30).all()
    assert (stay[75:] == 6).all()
    for step in range(6, 75):
        assert stay[step] == int(6 + 24 * (1 - (step - 5) / 70) ** 3)
    assert chosen.nonzero()[0].tolist() == list(range(10, 76, 5))
    whole, _, _ = budgets(AdaLoRAConfig(rank=3, initial_rank=3), layers=2, steps=10)
    assert (whole == 6).all()


@pytest.mark.parametrize("steps", range(1, 30))
def test_the_default_schedule_fits_every_length_of_run(steps):
    stay, chosen, last = budgets(AdaLoRAConfig(), layers=1, steps=steps)
    assert chosen[last]
    assert stay[last] == 8
    assert (np.diff(stay) <= 0).all()


def test_a_rank_that_does_not_fall_masks_nothing(mode):
    cell = network(AdaLoRAConfig(rank=3, initial_rank=3, interval=1, initial_steps=0, targets=["0", "2"]))
    optimizer = wrap_optimizer(cell, nn.SGD(cell.trainable_params(), 0.1), 3)
    for _ in range(5):  # more steps than were announced
        optimizer(tuple(Tensor(np.ones(p.shape, np.float32)) for p in cell.trainable_params()))
    assert all(np.count_nonzero(cell[at].mindpet_delta_adalora_e.asnumpy()) == 3 for at in (0, 2))


def test_float16_trains_and_keeps_the_budget(mode):
    cell = network(dtype=ms.float16)
    optimizer = wrap_optimizer(cell, nn.SGD(cell.trainable_params(), 0.05), STEPS)
    step = nn.TrainOneStepCell(nn.WithLossCell(cell, nn.MSELoss()), optimizer).set_train()
    x, y = (Tensor(np.random.default_rng(0).standard_normal(shape), ms.float16) for shape in ((8, 4), (8, 2)))
    losses = [float(step(x, y)) for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    assert sum(np.count_nonzero(cell[at].mindpet_delta_adalora_e.asnumpy()) for at in (0, 2)) == 2


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_mindspore_s_own_loop_trains_with_it(mode, scale):
    cell, data = network(), rows_of(STEPS)
    inner = nn.Adam(cell.trainable_params(), [0.01] * STEPS, loss_scale=scale)
    optimizer = wrap_optimizer(cell, inner, STEPS)
    manager = ms.amp.FixedLossScaleManager(scale, drop_overflow_update=False)
    model = ms.train.Model(cell, nn.MSELoss(), optimizer, loss_scale_manager=manager)
    model.train(1, data, dataset_sink_mode=False)
    assert optimizer.step.asnumpy() == optimizer.global_step.asnumpy() == STEPS
    assert sum(np.count_nonzero(cell[at].mindpet_delta_adalora_e.asnumpy()) for at in (0, 2)) == 2


def rows_of(steps):
    generator = np.random.default_rng(0)
    rows = [(generator.standard_normal(4).astype(np.float32), np.ones(2, np.float32)) for _ in range(3 * steps)]
    return ms.dataset.GeneratorDataset(rows, ["x", "y"], shuffle=False).batch(3)


@pytest.mark.exhaustive_in_graph("*-2")
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_callback_gives_the_budget_for_as_many_steps_as_there_will_be(mode, epochs):
    cells = network(), network()
    ms.load_param_into_net(cells[1], cells[0].parameters_dict())
    inner = [nn.Adam(cell.trainable_params(), 0.01) for cell in cells]
    wrapped = ms.train.Model(cells[0], nn.MSELoss(), wrap_optimizer(cells[0], inner[0], STEPS))
    wrapped.train(epochs, rows_of(STEPS // epochs), dataset_sink_mode=False)
    model, data = ms.train.Model(cells[1], nn.MSELoss(), inner[1]), rows_of(STEPS // epochs)
    model.train(epochs, data, callbacks=OptimizerCallback(), dataset_sink_mode=False)
    for one, other in zip(cells[0].get_parameters(), cells[1].get_parameters()):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy(), err_msg=one.name)
    for _ in range(2):  # goes on, with what is left
        model.train(1, data, callbacks=OptimizerCallback(), dataset_sink_mode=False)
    assert inner[1].global_step.asnumpy() == STEPS + 2 * (STEPS // epochs)
    assert sum(np.count_nonzero(cells[1][at].mindpet_delta_adalora_e.asnumpy()) for at in (0, 2)) == 2


def test_the_callback_works_on_a_model_that_has_trained_without_it_or_with_a_wrapped_optimizer(mode):
    cell, data = network(), rows_of(STEPS)
    model = ms.train.Model(cell, nn.MSELoss(), nn.Adam(cell.trainable_params(), 0.01))
    model.train(1, data, dataset_sink_mode=False)
    model.train(1, data, callbacks=OptimizerCallback(), dataset_sink_mode=False)
    assert sum(np.count_nonzero(cell[at].mindpet_delta_adalora_e.asnumpy()) for at in (0, 2)) == 2
    cell = network()
    optimizer = wrap_optimizer(cell, nn.Adam(cell.trainable_params(), 0.01), STEPS)
    model = ms.train.Model(cell, nn.MSELoss(), optimizer)
    model.train(1, rows_of(STEPS), callbacks=OptimizerCallback(), dataset_sink_mode=False)
    assert optimizer.step.asnumpy() == STEPS
    assert sum(np.count_nonzero(cell[at].mindpet_delta_adalora_e.asnumpy()) for at in (0, 2)) == 2
    with pytest.raises(ValueError, match="'optimizer' is wrapped already"):
        wrap_optimizer(cell, optimizer, STEPS)


def test_the_callback_says_what_it_cannot_work_with():
    def train(cell, optimizer):
        model = ms.train.Model(cell, nn.MSELoss(), optimizer)
        model.train(1, rows_of(4), callbacks=OptimizerCallback(), dataset_sink_mode=False)

    plain = nn.SequentialCell(nn.Dense(4, 2))
    with pytest.raises(ValueError, match="nothing is injected into the model's network"):
        train(plain, nn.SGD(plain.trainable_params(), 0.1))
    with pytest.raises(ValueError, match="must have an optimizer, but its WithLossCell has none"):
        train(network(), None)
    cell = network()
    with pytest.raises(ValueError, match="leave none of 4 steps"):
        train(cell, nn.SGD(cell.trainable_params(), 0.1))


def test_an_optimizer_that_misses_a_part_is_refused():
    cell = network()
    some = [p for p in cell.trainable_params() if p.name != "2.mindpet_delta_adalora_b"]
    with pytest.raises(ValueError, match="A, B and e of 2 must all train"):
        wrap_optimizer(cell, nn.SGD(some, 0.1), STEPS)
    everything = nn.SGD(cell.trainable_params(), 0.1)
    with pytest.raises(ValueError, match="leave none of 4 steps"):
        wrap_optimizer(cell, everything, 4)
    with pytest.raises(ValueError, match="'steps' must be a positive int"):
        wrap_optimizer(cell, everything, 0)
    with pytest.raises(TypeError, match=r"'optimizer' must be a mindspore.nn.Optimizer"):
        wrap_optimizer(cell, nn.Dense(2, 2), 4)
    plain = inject(nn.SequentialCell(nn.Dense(4, 4)), LoRAConfig(targets=["0"]))
    optimizer = nn.SGD(plain.trainable_params(), 0.1)
    assert wrap_optimizer(plain, optimizer, 4) is optimizer


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 13}, "'rank' must be at most initial_rank=12, but got 13"),
        ({"interval": 0}, "'interval' must be a positive int"),
        ({"beta1": 0.0}, "'beta1' must be finite and not 0"),
        ({"beta2": 1.0}, r"'beta2' must be in \[0, 1\)"),
        ({"alpha": 0}, "'alpha' must be above 0"),
        ({"alpha": "8"}, "'alpha' must be an int or a float"),
        ({"orthogonality": -0.1}, "'orthogonality' must be at least 0"),
        ({"final_steps": float("nan")}, "'final_steps' must be at least 0"),
        ({"dropout": 1.5}, "'dropout' must be in"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises((TypeError, ValueError), match=f"For 'AdaLoRAConfig', {says}"):
        AdaLoRAConfig(**options)


def bert():
    return BertForSequenceClassification.from_pretrained(GOLDEN / "base", num_labels=3)[0].set_train(False)


def test_what_has_no_budget_is_not_in_peft_s_file(tmp_path):
    save_peft(load_peft(bert(), GOLDEN / "adalora"), tmp_path)
    theirs, ours = (json.loads((at / "adapter_config.json").read_text()) for at in (GOLDEN / "adalora", tmp_path))
    assert ours["rank_pattern"] == theirs["rank_pattern"]
    untrained = inject(bert(), AdaLoRAConfig())
    save_peft(untrained, tmp_path / "untrained")
    assert json.loads((tmp_path / "untrained" / "adapter_config.json").read_text())["rank_pattern"] is None
    back = load_peft(bert(), tmp_path / "untrained")
    assert back.bert.encoder.layer[0].attention.self.query.mindpet_delta_adalora_a.shape == (12, 8)
