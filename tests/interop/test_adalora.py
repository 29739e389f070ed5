"""AdaLoRA against PEFT's: the same start, data and rate give the same parameters and masks after every step."""

from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import AdaLoRAConfig, inject, save_peft, wrap_optimizer
from mindpet.models import BertForSequenceClassification

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

BASE = Path(__file__).parents[1] / "golden" / "peft" / "base"
SIZES = (5, 7, 6, 4)
STEPS = 14
SCHEDULE = {"initial_steps": 2, "final_steps": 3, "interval": 2, "beta1": 0.8, "beta2": 0.7, "orthogonality": 0.3}
THEIR_NAMES = {
    "initial_steps": "tinit",
    "final_steps": "tfinal",
    "interval": "deltaT",
    "orthogonality": "orth_reg_weight",
}
PARTS = {"lora_A": "mindpet_delta_adalora_a", "lora_B": "mindpet_delta_adalora_b", "lora_E": "mindpet_delta_adalora_e"}


class Theirs(torch.nn.Module):
    """Three layers, and the loss where PEFT looks for it."""

    def __init__(self, weights):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*w.shape[::-1], bias=False) for w in weights)
        for layer, weight in zip(self.layers, weights):
            layer.weight.data = torch.tensor(weight)

    def forward(self, x, y):
        for layer in self.layers:
            x = layer(x) / torch.sqrt(1 + layer(x) ** 2)
        return SimpleNamespace(loss=((x - y) ** 2).mean())


class Ours(nn.Cell):
    """The same three layers."""

    def __init__(self, weights):
        super().__init__()
        self.layers = nn.CellList([nn.Dense(*w.shape[::-1], has_bias=False) for w in weights])
        for layer, weight in zip(self.layers, weights):
            layer.weight.set_data(Tensor(weight))

    def construct(self, x):
        for layer in self.layers:
            x = layer(x) / ms.ops.sqrt(1 + layer(x) ** 2)  # MindSpore's tanh is not exact on a CPU
        return x


def arrays(generator, *shapes):
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def by_peft(weights, starts, data, rate, decay=0.0, **schedule):
    """Parameters by (layer, part) after each step."""
    names = {THEIR_NAMES.get(name, name): value for name, value in schedule.items()}
    config = peft.AdaLoraConfig(
        target_modules=["0", "1", "2"], init_r=3, target_r=1, lora_alpha=4, total_step=STEPS, **names
    )
    model = peft.tuners.adalora.AdaLoraModel(Theirs(weights), config, "default")
    parameters = {
        (index, part): getattr(layer, part)["default"]
        for index, layer in enumerate(model.model.layers)
        for part in PARTS
    }
    for key, parameter in parameters.items():
        parameter.data = torch.tensor(starts[key])
    optimizer = torch.optim.SGD(parameters.values(), rate, momentum=0.9 if decay else 0, weight_decay=decay)
    history = []
    for step, (x, y) in enumerate(data, 1):
        optimizer.zero_grad()
        model(torch.tensor(x), torch.tensor(y)).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        history.append({key: parameter.detach().numpy().copy() for key, parameter in parameters.items()})
    return history


def by_us(weights, starts, data, rate, decay=0.0, loss_scale=1.0, **schedule):
    network = inject(Ours(weights), AdaLoRAConfig(rank=1, initial_rank=3, alpha=4, targets=["layers.*"], **schedule))
    parameters = {
        (index, part): getattr(layer, name)
        for index, layer in enumerate(network.layers)
        for part, name in PARTS.items()
    }
    for key, parameter in parameters.items():
        parameter.set_data(Tensor(starts[key]))
    if decay:
        inner = nn.Momentum(network.trainable_params(), rate, 0.9, decay, loss_scale)
    else:
        inner = nn.SGD(network.trainable_params(), rate, loss_scale=loss_scale)
    optimizer = wrap_optimizer(network, inner, STEPS)
    step = nn.TrainOneStepCell(nn.WithLossCell(network, nn.MSELoss()), optimizer, loss_scale).set_train()
    history = []
    for x, y in data:
        step(Tensor(x), Tensor(y))
        history.append({key: parameter.asnumpy().copy() for key, parameter in parameters.items()})
    return history


@pytest.mark.parametrize(
    ("more", "own"),
    [
        (SCHEDULE, {}),
        ({**SCHEDULE, "orthogonality": 0.0, "interval": 1, "initial_steps": 0}, {}),
        ({**SCHEDULE, "final_steps": 0}, {"loss_scale": 8.0}),
        (SCHEDULE, {"decay": 0.01}),
    ],
    ids=["usual", "no regularisation", "no last steps, scaled loss", "momentum and decay"],
)
def test_parameters_and_masks_after_every_step_are_those_of_peft(mode, more, own):
    generator = np.random.default_rng(3)
    weights = arrays(generator, *zip(SIZES[1:], SIZES[:-1]))
    shapes = {"lora_A": lambda w: (3, w.shape[1]), "lora_B": lambda w: (w.shape[0], 3), "lora_E": lambda w: (3, 1)}
    starts = {
        (index, part): 0.5 * arrays(generator, shape(weight))[0]
        for index, weight in enumerate(weights)
        for part, shape in shapes.items()
    }
    data = [arrays(generator, (8, SIZES[0]), (8, SIZES[-1])) for _ in range(STEPS)]
    decay = {"decay": own["decay"]} if "decay" in own else {}
    theirs, ours = (
        by_peft(weights, starts, data, 0.3, **decay, **more),
        by_us(weights, starts, data, 0.3, **own, **more),
    )
    counts = []
    for number, (there, here) in enumerate(zip(theirs, ours), 1):
        for key, value in there.items():
            np.testing.assert_allclose(here[key], value, atol=1e-5, err_msg=f"step {number}, {key}")
        zeros = {key: value == 0 for key, value in there.items() if key[1] == "lora_E"}
        assert all(np.array_equal(here[key] == 0, value) for key, value in zeros.items())
        counts.append(9 - sum(int(value.sum()) for value in zeros.values()))
    assert counts[0] == 9 or more["initial_steps"] == 0
    assert counts[-1] == 3
    assert len(set(counts)) > 2


def test_peft_reads_what_was_trained_here(tmp_path):
    network = BertForSequenceClassification.from_pretrained(BASE, num_labels=3)[0]
    inject(network, AdaLoRAConfig(rank=1, initial_rank=4, interval=1, modules_to_save=["classifier"]))
    optimizer = wrap_optimizer(network, nn.Adam(network.trainable_params(), 0.05), 8)
    step = nn.TrainOneStepCell(nn.WithLossCell(Logits(network), nn.CrossEntropyLoss()), optimizer).set_train()
    words, labels = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([0, 2])
    for _ in range(8):
        step(Tensor(words, ms.int32), Tensor(labels, ms.int32))
    save_peft(network, tmp_path, task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(
        transformers.BertForSequenceClassification.from_pretrained(BASE), str(tmp_path)
    ).eval()
    ranks = [sum(kept) for kept in theirs.peft_config["default"].rank_pattern.values()]
    assert sum(ranks) == 4
    expected = theirs(torch.tensor(words)).logits.detach().numpy()
    found = Logits(network).set_train(False)(Tensor(words, ms.int32)).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Logits(nn.Cell):
    """Of a BERT, from word ids alone."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, words):
        return self.network(words, ms.ops.ones_like(words), ms.ops.zeros_like(words))
