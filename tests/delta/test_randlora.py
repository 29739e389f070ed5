"""RandLoRA: the sum of random products, its full rank, and files of PEFT's that hold only the seed of the bases."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor, nn
from safetensors.numpy import load_file, save_file

from mindpet import RandLoRAConfig, inject, load_peft
from mindpet.delta.randlora import shared_bases
from mindpet.models import BertForSequenceClassification

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"


def formula(cell, large, small, rank):
    """Sum over what is multiplied, column by column, in float64."""
    count = -(-small // rank)
    a, b, rows, columns = (
        getattr(cell, f"mindpet_delta_randlora_{name}").asnumpy().astype(np.float64)
        for name in ("base_a", "base_b", "lambda", "columns")
    )
    delta = np.zeros((large, small))
    for place in range(count * rank):
        left = b[:large, place // rank, place % rank]  # base by base
        right = rows[place // count, place % count] * a[place // count, 0, :small] * columns[place % count]
        delta += np.outer(left, right)
    return delta


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers_of_different_sizes_share_the_bases_and_slice_them(mode, rng, rank):
    network = nn.SequentialCell(nn.Dense(6, 4), nn.ReLU(), nn.Dense(4, 9, has_bias=False))
    weights = [network[index].weight.asnumpy().astype(np.float64) for index in (0, 2)]
    bias = network[0].bias.asnumpy()
    inject(network, RandLoRAConfig(rank=rank, alpha=2, targets=["0", "2"]))
    assert network[0].mindpet_delta_randlora_base_a is network[2].mindpet_delta_randlora_base_a
    for parameter in network.trainable_params():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    wide, tall = formula(network[0], 6, 4, rank) * 2 / rank, formula(network[2], 9, 4, rank) * 2 / rank
    x = rng.standard_normal((5, 6))
    expected = np.maximum(x @ (weights[0] + wide.T).T + bias, 0) @ (weights[1] + tall).T
    np.testing.assert_allclose(network(Tensor(x.astype(np.float32))).asnumpy(), expected, atol=1e-4, rtol=1e-4)


def test_the_delta_is_of_full_rank(rng):
    network = inject(nn.SequentialCell(nn.Dense(10, 8)), RandLoRAConfig(rank=3, alpha=3, targets=["0"]))
    for parameter in network.trainable_params():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    assert np.linalg.matrix_rank(network[0].delta_weight().asnumpy(), tol=1e-3) == 8


@pytest.mark.parametrize("case", ["randlora", "randlora_sparse"])
def test_a_file_without_the_bases_is_read_by_its_seed(tmp_path, case):
    def logits(directory):
        bert = BertForSequenceClassification.from_pretrained(GOLDEN / "base", num_labels=3)[0].set_train(False)
        inputs = json.loads((GOLDEN / "base" / "expected.json").read_text())["inputs"]
        return load_peft(bert, directory)(*(Tensor(np.array(rows, np.int32)) for rows in inputs.values())).asnumpy()

    directory = tmp_path / "seed"
    shutil.copytree(GOLDEN / case, directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if name[-1] not in "AB"}
    save_file(kept, directory / "adapter_model.safetensors", {"format": "pt"})
    content = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**content, "save_projection": False}))
    np.testing.assert_allclose(logits(directory), logits(GOLDEN / case), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "zeros"), [({"sparse": True}, 2 / 3), ({"very_sparse": True}, 1 - 1 / 8), ({}, 0)], ids=str
)
def test_bases_have_a_standard_deviation_of_one(options, zeros):
    bases = [base.asnumpy() for base in shared_bases([nn.Dense(128, 64)], RandLoRAConfig(rank=8, **options))]
    assert [base.shape for base in bases] == [(8, 1, 64), (128, 8, 8)]
    for base in bases:
        assert abs(base.std() - 1) < 0.01
        assert abs(base.mean()) < 0.1
        assert abs((base == 0).mean() - zeros) < 0.05
        assert len(np.unique(base)) == 3 if zeros else abs(np.abs(base).max() - np.sqrt(3)) < 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "'rank' must be a positive int"),
        ({"alpha": 0}, "'alpha' must be finite and not 0"),
        ({"seed": -1}, "'seed' must be an int from 0 on"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(ValueError, match=says):
        RandLoRAConfig(**options)
    with pytest.raises(TypeError, match="'sparse' must be a bool"):
        RandLoRAConfig(sparse=1)
