"""VeRA: matrices that all layers share and slice, and files of PEFT's that hold only their seed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor, nn
from safetensors.numpy import load_file, save_file

from mindpet import VeRAConfig, inject, load_peft, save_peft
from mindpet.interop import PeftFormatError
from mindpet.models import BertForSequenceClassification

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"


def network():
    return nn.SequentialCell(nn.Dense(6, 4), nn.ReLU(), nn.Dense(4, 9, has_bias=False))


def test_layers_of_different_sizes_share_the_matrices_and_slice_them(rng):
    cell = network()
    weights = [cell[index].weight.asnumpy().astype(np.float64) for index in (0, 2)]
    bias = cell[0].bias.asnumpy()
    inject(cell, VeRAConfig(rank=3, targets=["0", "2"]))
    assert cell[0].mindpet_delta_vera_a is cell[2].mindpet_delta_vera_a
    a, b = (getattr(cell[0], f"mindpet_delta_vera_{name}").asnumpy() for name in "ab")
    assert (a.shape, b.shape) == ((3, 6), (9, 3))
    vectors = {}
    for index, out in ((0, 4), (2, 9)):
        vectors[index] = rng.standard_normal(out), rng.standard_normal(3)
        cell[index].mindpet_delta_vera_lambda_b.set_data(Tensor(vectors[index][0].astype(np.float32)))
        cell[index].mindpet_delta_vera_lambda_d.set_data(Tensor(vectors[index][1].astype(np.float32)))
    full = [
        weight + np.diag(vectors[index][0]) @ b[:out] @ np.diag(vectors[index][1]) @ a[:, :into]
        for weight, (index, out, into) in zip(weights, ((0, 4, 6), (2, 9, 4)))
    ]
    x = rng.standard_normal((5, 6))
    expected = np.maximum(x @ full[0].T + bias, 0) @ full[1].T
    np.testing.assert_allclose(cell(Tensor(x.astype(np.float32))).asnumpy(), expected, atol=1e-4)
    np.testing.assert_allclose(cell[2].delta_weight().asnumpy(), full[1] - weights[1], atol=1e-5)


def test_the_shared_matrices_are_in_the_network_once_and_do_not_train():
    cell = inject(network(), VeRAConfig(rank=3, targets=["0", "2"]))
    names = [p.name for p in cell.get_parameters() if "vera" in p.name]
    assert [name for name in names if "lambda" not in name] == ["0.mindpet_delta_vera_a", "0.mindpet_delta_vera_b"]
    assert sum(p.size for p in cell.trainable_params()) == (3 + 4) + (3 + 9)


def test_a_file_without_the_matrices_is_read_by_its_seed(tmp_path):
    def logits(directory):
        bert = BertForSequenceClassification.from_pretrained(GOLDEN / "base", num_labels=3)[0].set_train(False)
        inputs = json.loads((GOLDEN / "base" / "expected.json").read_text())["inputs"]
        return load_peft(bert, directory)(*(Tensor(np.array(rows, np.int32)) for rows in inputs.values())).asnumpy()

    directory = tmp_path / "seed"
    shutil.copytree(GOLDEN / "vera", directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if name not in ("base_model.vera_A", "base_model.vera_B")}
    assert len(kept) == len(tensors) - 2
    save_file(kept, directory / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(PeftFormatError, match="missing in the file: vera_A"):
        logits(directory)
    content = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**content, "save_projection": False}))
    np.testing.assert_array_equal(logits(directory), logits(GOLDEN / "vera"))


def test_files_name_layers_in_another_order_than_the_network(tmp_path, rng):
    def build():
        return nn.SequentialCell([nn.Dense(4, 4) for _ in range(12)])

    names = {str(index): f"layer.{index}" for index in range(12)}  # layer.10 comes before layer.2 in a file
    cell = inject(build(), VeRAConfig(rank=2, targets=["2", "10"]))
    for parameter in cell.trainable_params():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    save_peft(cell, tmp_path, names=names)
    back = load_peft(build(), tmp_path, names=names)
    for index in (2, 10):
        np.testing.assert_array_equal(back[index].delta_weight().asnumpy(), cell[index].delta_weight().asnumpy())


def test_two_injections_with_matrices_of_their_own_are_not_one_adapter_of_peft(tmp_path):
    cell = network()
    inject(cell, VeRAConfig(rank=3, targets=["0"]))
    inject(cell, VeRAConfig(rank=3, targets=["2"]))
    with pytest.raises(PeftFormatError, match="not one and the same for all layers"):
        save_peft(cell, tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "'rank' must be a positive int"),
        ({"dropout": 1.0}, "'dropout' must be in"),
        ({"d_initial": 0}, "'d_initial' must be finite and not 0"),
        ({"seed": -1}, "'seed' must be an int from 0 on"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(ValueError, match=says):
        VeRAConfig(**options)
