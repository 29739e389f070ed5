"""What TrainableParamsCheckPoint saves, when, and what is left when it is killed."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.train import Callback, CheckpointConfig, Model

from mindpet.delta import LoRADense
from mindpet.graph import TrainableParamsCheckPoint, freeze_delta
from tests.graph.saves_forever import network as big_network

TRAINED = {"adapted.mindpet_delta_lora_a", "adapted.mindpet_delta_lora_b", "head.weight", "head.bias"}


class Network(nn.Cell):
    def __init__(self):
        super().__init__()
        self.body = nn.Dense(4, 5)
        self.adapted = LoRADense(5, 5, 2, 4, compute_dtype=ms.float32)
        self.head = nn.Dense(5, 3)

    def construct(self, x):
        return self.head(self.adapted(self.body(x)))


def frozen_network():
    network = Network()
    freeze_delta(network, "lora", exclude=["head.*"])
    return network


def cross_entropy():
    return nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")


def dataset(steps):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(2 * steps, 4)).astype(np.float32), rng.integers(0, 3, 2 * steps).astype(np.int32)
    return ds.NumpySlicesDataset(rows, shuffle=False).batch(2)


def train(directory, config=None, network=None, epochs=1, steps=3, callbacks=(), optimizer=nn.Adam, prefix="kept"):
    """A few steps of Model.train; returns the network and the callback."""
    network = network or frozen_network()
    callback = TrainableParamsCheckPoint(str(directory), prefix, config)
    made = optimizer(network.trainable_params(), learning_rate=0.01)
    model = Model(network, cross_entropy(), made)
    model.train(epochs, dataset(steps), callbacks=[*callbacks, callback], dataset_sink_mode=False)
    return network, callback


def files(directory, suffix=".ckpt"):
    return sorted(path.name for path in Path(directory).iterdir() if path.suffix == suffix)


def momentum(parameters, learning_rate):
    return nn.Momentum(parameters, learning_rate, 0.9)


def decaying_adam(parameters, learning_rate):
    return nn.Adam(parameters, nn.ExponentialDecayLR(learning_rate, 0.9, 1))


@pytest.mark.parametrize("optimizer", [nn.Adam, momentum, decaying_adam])
def test_a_file_holds_what_trains_and_nothing_else(mode, tmp_path, optimizer):
    network, callback = train(tmp_path, optimizer=optimizer)
    saved = ms.load_checkpoint(callback.latest_ckpt_file_name)
    assert set(saved) == TRAINED
    for parameter in network.trainable_params():
        np.testing.assert_array_equal(saved[parameter.name].asnumpy(), parameter.asnumpy())


def test_base_and_delta_restore_the_outputs_bit_for_bit(mode, tmp_path, rng):
    network = frozen_network()
    ms.save_checkpoint(network, str(tmp_path / "base.ckpt"))
    _, callback = train(tmp_path / "delta", network=network)
    x = Tensor(rng.normal(size=(6, 4)), ms.float32)
    expected = network(x).asnumpy()
    fresh = Network()
    ms.load_param_into_net(fresh, ms.load_checkpoint(str(tmp_path / "base.ckpt")))
    assert (fresh(x).asnumpy() != expected).any()
    ms.load_param_into_net(fresh, ms.load_checkpoint(callback.latest_ckpt_file_name))
    np.testing.assert_array_equal(fresh(x).asnumpy(), expected)


def test_the_defaults(tmp_path):
    callback = TrainableParamsCheckPoint(str(tmp_path / "new" / "directory"))
    assert (tmp_path / "new" / "directory").is_dir()
    Model(network := frozen_network(), cross_entropy(), nn.SGD(network.trainable_params(), 0.1)).train(
        2, dataset(4), callbacks=callback, dataset_sink_mode=False
    )
    # after every step, the newest five
    names = [f"DELTA_CKP-{step}.ckpt" for step in ("1_4", "2_1", "2_2", "2_3", "2_4")]
    assert files(tmp_path / "new" / "directory") == names


# ---------------------------------------------------------------------------------------- CheckpointConfig, in full


def test_save_checkpoint_steps(tmp_path):
    train(tmp_path, CheckpointConfig(save_checkpoint_steps=2), steps=5)
    assert files(tmp_path) == ["kept-1_2.ckpt", "kept-1_4.ckpt", "kept-1_5.ckpt"]  # the last state always


class Wait(Callback):
    """Makes each step last."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def step_end(self, run_context):
        time.sleep(self.seconds)


def test_save_checkpoint_seconds(tmp_path):
    config = CheckpointConfig(save_checkpoint_steps=0, save_checkpoint_seconds=1, keep_checkpoint_max=9)
    train(tmp_path, config, steps=6, callbacks=[Wait(0.4)])
    assert 2 <= len(files(tmp_path)) <= 4
    assert files(tmp_path)[-1] == "kept-1_6.ckpt"


@pytest.mark.parametrize("maximum", [1, 2])
def test_keep_checkpoint_max(tmp_path, maximum):
    (tmp_path / "other-1_1.ckpt").write_bytes(b"somebody else's")
    train(tmp_path, CheckpointConfig(keep_checkpoint_max=maximum), epochs=2, steps=3)
    assert files(tmp_path) == [f"kept-2_{step}.ckpt" for step in (2, 3)][-maximum:] + ["other-1_1.ckpt"]


def test_keep_checkpoint_per_n_minutes(tmp_path):
    config = CheckpointConfig(keep_checkpoint_max=0, keep_checkpoint_per_n_minutes=1)
    train(tmp_path, config, steps=5)
    # of the files of one minute the first stays, beside the newest
    assert files(tmp_path) == ["kept-1_1.ckpt", "kept-1_5.ckpt"]


@pytest.mark.parametrize("integrated_save", [True, False])
def test_integrated_save(tmp_path, integrated_save):
    _, callback = train(tmp_path, CheckpointConfig(integrated_save=integrated_save))
    assert set(ms.load_checkpoint(callback.latest_ckpt_file_name)) == TRAINED


@pytest.mark.parametrize("async_save", [True, "thread", "process"])
@pytest.mark.parametrize("file_format", ["ckpt", "safetensors"])
def test_async_save(tmp_path, async_save, file_format):
    config = CheckpointConfig(async_save=async_save, keep_checkpoint_max=2, format=file_format)
    network, callback = train(tmp_path, config, steps=4)
    assert files(tmp_path, f".{file_format}") == [f"kept-1_{step}.{file_format}" for step in (3, 4)]
    saved = ms.load_checkpoint(callback.latest_ckpt_file_name, format=file_format)
    assert set(saved) == TRAINED
    for parameter in network.trainable_params():
        np.testing.assert_array_equal(saved[parameter.name].asnumpy(), parameter.asnumpy())


def test_append_info(tmp_path):
    config = CheckpointConfig(append_info=["epoch_num", "step_num", {"rate": 0.5, "note": "short"}])
    _, callback = train(tmp_path, config, epochs=2, steps=3)
    saved = ms.load_checkpoint(callback.latest_ckpt_file_name)
    assert set(saved) == TRAINED | {"epoch_num", "step_num", "rate", "note"}
    assert (int(saved["epoch_num"]), int(saved["step_num"]), float(saved["rate"])) == (2, 6, 0.5)


def test_saved_network(tmp_path):
    network = frozen_network()
    _, callback = train(tmp_path, CheckpointConfig(saved_network=network.adapted), network=network)
    saved = ms.load_checkpoint(callback.latest_ckpt_file_name)
    assert set(saved) == {name for name in TRAINED if name.startswith("adapted")}


def test_the_configuration_given_is_not_changed(tmp_path):
    network = frozen_network()
    config = CheckpointConfig(saved_network=network)
    train(tmp_path, config, network=network)
    assert config.saved_network is network


def test_format_safetensors(tmp_path):
    from safetensors.numpy import load_file

    network, callback = train(tmp_path, CheckpointConfig(format="safetensors"))
    assert callback.latest_ckpt_file_name.endswith(".safetensors")
    tensors = load_file(callback.latest_ckpt_file_name)
    assert set(tensors) == TRAINED
    for parameter in network.trainable_params():
        np.testing.assert_array_equal(tensors[parameter.name], parameter.asnumpy())


def test_crc_check(tmp_path):
    _, callback = train(tmp_path, CheckpointConfig(crc_check=True))
    path = Path(callback.latest_ckpt_file_name)
    assert set(ms.load_checkpoint(str(path), crc_check=True)) == TRAINED
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="crc"):
        ms.load_checkpoint(str(path), crc_check=True)


@pytest.mark.parametrize("enc_mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_encryption(tmp_path, enc_mode):
    key = b"0123456789ABCDEF"
    config = CheckpointConfig(enc_key=key, enc_mode=enc_mode)
    _, callback = train(tmp_path, config)
    path = callback.latest_ckpt_file_name
    assert set(ms.load_checkpoint(path, dec_key=key, dec_mode=enc_mode)) == TRAINED
    assert b"mindpet_delta_lora" not in Path(path).read_bytes()


class StopAt(Callback):
    """Something goes wrong in the third step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def step_end(self, run_context):
        if run_context.original_args().cur_step_num == self.step:
            raise RuntimeError("out of luck")


def test_exception_save(tmp_path):
    config = CheckpointConfig(save_checkpoint_steps=100, exception_save=True, append_info=["step_num"])
    network = frozen_network()
    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, config, network, steps=5, callbacks=[StopAt(3)])
    (name,) = files(tmp_path)
    assert name.endswith("-1_3_breakpoint.ckpt")
    saved = ms.load_checkpoint(str(tmp_path / name))
    assert set(saved) == TRAINED | {"step_num"}
    for parameter in network.trainable_params():
        np.testing.assert_array_equal(saved[parameter.name].asnumpy(), parameter.asnumpy())


def test_an_exception_saves_nothing_unless_asked(tmp_path):
    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, CheckpointConfig(save_checkpoint_steps=100), steps=5, callbacks=[StopAt(3)])
    assert files(tmp_path) == []


def test_one_callback_serves_two_trainings(tmp_path):
    network, callback = train(tmp_path, CheckpointConfig(keep_checkpoint_max=1), steps=2)
    model = Model(network, cross_entropy(), nn.Adam(network.trainable_params(), 0.01))
    model.train(3, dataset(2), callbacks=callback, dataset_sink_mode=False)
    assert files(tmp_path) == ["kept-3_2.ckpt"]
    saved = ms.load_checkpoint(callback.latest_ckpt_file_name)
    for parameter in network.trainable_params():
        np.testing.assert_array_equal(saved[parameter.name].asnumpy(), parameter.asnumpy())


def test_a_second_run_in_the_same_directory_keeps_the_first_ones_files(tmp_path):
    train(tmp_path, steps=1)
    first = (tmp_path / "kept-1_1.ckpt").read_bytes()
    train(tmp_path, steps=1)
    assert files(tmp_path) == ["kept-1_1.ckpt", "kept_1-1_1.ckpt"]
    assert (tmp_path / "kept-1_1.ckpt").read_bytes() == first


# ------------------------------------------------------------------------------------------------ killed in between


class FullDisk(Callback):
    """From the second step on no file may grow beyond 64 KiB."""

    def step_begin(self, run_context):
        if run_context.original_args().cur_step_num == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("file_format", ["ckpt", "safetensors"])
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, file_format):
    network = big_network()
    callback = TrainableParamsCheckPoint(
        str(tmp_path), "kept", CheckpointConfig(keep_checkpoint_max=1, format=file_format)
    )
    data = np.ones((6, 16), np.float32), np.zeros(6, np.int32)
    model = Model(network, cross_entropy(), nn.SGD(network.trainable_params(), 1e-3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(Exception, match=r"(?i)file too large|no space"):
            model.train(
                1,
                ds.NumpySlicesDataset(data, shuffle=False).batch(2),
                callbacks=[FullDisk(), callback],
                dataset_sink_mode=False,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path, f".{file_format}") == [f"kept-1_1.{file_format}"]
    saved = ms.load_checkpoint(str(tmp_path / f"kept-1_1.{file_format}"), format=file_format)
    assert set(saved) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize(
    ("file_format", "async_save"),
    [
        *(("ckpt", "no"), ("safetensors", "process")),
        *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in (("safetensors", "no"), ("ckpt", "thread"))),
    ],
)
def test_a_kill_in_the_middle_leaves_a_whole_checkpoint(tmp_path, file_format, async_save):
    script = Path(__file__).with_name("saves_forever.py")
    names = {"0.weight", "2.weight", "2.bias"}
    shapes = {parameter.name: parameter.shape for parameter in big_network().get_parameters()}
    for run, moment in enumerate((0.0, 0.07, 0.23)):
        directory = tmp_path / str(run)
        log = tmp_path / f"{run}.log"
        with log.open("w") as output:
            command = [sys.executable, str(script), str(directory), file_format, async_save]
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            try:
                deadline = time.monotonic() + 60
                while not (directory.is_dir() and len(files(directory, f".{file_format}"))):
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.01)
                time.sleep(0.2 + moment)
                assert process.poll() is None, log.read_text()
            finally:
                os.killpg(process.pid, 9)
                process.wait()
        found = files(directory, f".{file_format}")
        assert found
        for name in found:
            saved = ms.load_checkpoint(str(directory / name), format=file_format)
            assert {key: value.shape for key, value in saved.items()} == {key: shapes[key] for key in names}
