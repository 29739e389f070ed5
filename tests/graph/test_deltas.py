import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet import LoRAConfig, inject, load_delta, save_delta
from mindpet.delta import LoRADense
from mindpet.graph import DeltaFileError


def network():
    return nn.SequentialCell(nn.Dense(6, 6), nn.ReLU(), nn.Dense(6, 3))


def tuned(seed=3):
    """A network whose delta is not the one it started with."""
    cell = inject(network(), LoRAConfig(rank=2, targets=["0"], modules_to_save=["2"]))
    generator = np.random.default_rng(seed)
    for parameter in cell.trainable_params():
        parameter.set_data(Tensor(generator.standard_normal(parameter.shape).astype(np.float32)))
    return cell


def base_of(cell):
    return {p.name: ms.Parameter(p.value(), name=p.name) for p in cell.get_parameters() if "delta" not in p.name}


def test_a_delta_goes_into_an_untouched_network(mode, tmp_path, rng):
    ours = tuned()
    save_delta(ours, tmp_path)
    other = network()
    ms.load_param_into_net(other, base_of(ours))
    load_delta(other, tmp_path)
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    np.testing.assert_array_equal(other(x).asnumpy(), ours(x).asnumpy())
    assert {p.name for p in other.trainable_params()} == {p.name for p in ours.trainable_params()}
    assert json.loads((tmp_path / "delta.json").read_text())["methods"][0]["rank"] == 2


def test_every_misfit_is_in_one_message(tmp_path):
    save_delta(tuned(), tmp_path)
    other = inject(nn.SequentialCell(nn.Dense(6, 6), nn.ReLU(), nn.Dense(6, 4)), LoRAConfig(rank=3, targets=["0", "2"]))
    with pytest.raises(DeltaFileError) as error:
        load_delta(other, tmp_path)
    message = str(error.value)
    assert "0.mindpet_delta_lora_a: the file has shape (2, 6), the network (3, 6)" in message
    assert "2.weight: the file has shape (3, 6), the network (4, 6)" in message
    assert "not in the file: 2.mindpet_delta_lora_a" in message


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda d: (d / "delta.json").unlink(), "There is no file"),
        (lambda d: (d / "delta.safetensors").unlink(), "There is no file"),
        (lambda d: (d / "delta.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: (d / "delta.json").write_text("[]"), "is not a delta of format 1"),
        (
            lambda d: (d / "delta.json").write_text('{"format": 1, "methods": [{"method": "loar"}]}'),
            "did you mean 'lora'",
        ),
        (lambda d: (d / "delta.safetensors").write_bytes(b"x" * 20), "cannot be read as safetensors"),
    ],
)
def test_broken_directories_are_named(tmp_path, break_it, says):
    save_delta(tuned(), tmp_path)
    break_it(tmp_path)
    with pytest.raises(DeltaFileError, match=says):
        load_delta(network(), tmp_path)


def test_nothing_to_save_is_an_error(tmp_path):
    cell = network()
    for parameter in cell.get_parameters():
        parameter.requires_grad = False
    with pytest.raises(ValueError, match="Nothing in this network trains"):
        save_delta(cell, tmp_path)


@pytest.mark.parametrize("names", ["ab", "AB"])
def test_a_bare_layer_takes_both_spellings_of_its_names(tmp_path, names, rng):
    layer = LoRADense(4, 3, 2, 4, compute_dtype=ms.float32)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip(names, [(2, 4), (3, 2)])}
    saved = [{"name": f"mindpet_delta_lora_{name}", "data": Tensor(value)} for name, value in values.items()]
    ms.save_checkpoint(saved, str(tmp_path / "delta.ckpt"))
    load_delta(layer, tmp_path / "delta.ckpt")
    np.testing.assert_array_equal(layer.mindpet_delta_lora_a.asnumpy(), values[names[0]])
    np.testing.assert_array_equal(layer.mindpet_delta_lora_b.asnumpy(), values[names[1]])
