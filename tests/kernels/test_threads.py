"""Results do not depend on how many threads compute them, nor on who else is calling."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindpet.kernels import build
from tests.kernels import direct

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no kernels here: {build.why_not()}")


def run(threads, *arguments):
    return subprocess.run(
        [sys.executable, direct.__file__, str(build.library()), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()


def test_every_kernel_is_the_same_to_the_bit():
    one = run("1")
    exported = re.findall(r"^KERNEL (\w+)\(", Path(build.__file__).with_name("source.cpp").read_text(), re.MULTILINE)
    assert sorted(one[::2]) == sorted(exported)
    for threads in ("2", "3", "7", "nonsense"):
        assert run(threads) == one


def test_callers_at_the_same_time():
    for threads in ("2", "5"):
        assert run(threads, "crowd") == run("1")


@pytest.mark.parametrize("threads", ["3", "4"])
def test_a_forked_process_computes_while_its_parents_threads_sleep_or_not(threads):
    assert run(threads, "fork") == run("1")


def test_wrong_arguments_are_refused_and_not_read():
    import ctypes

    library = ctypes.CDLL(str(build.library()))
    x, epsilon = np.zeros((2, 3), np.float32), np.ones(1, np.float32)
    wrong = [
        ("gelu_forward", (x.astype(np.float16),)),
        ("gelu_forward", (x, x)),
        ("gelu_backward", (x, x[:1])),
        ("gated_silu_forward", (x, x[:1])),
        ("gated_silu_backward", (x, x, x[:1])),
        ("layer_norm_forward", (x, x[0], x[0])),
        ("layer_norm_forward", (x, x[0, :2], x[0], epsilon)),
        ("layer_norm_forward", (x, x[0], x[0, :2], epsilon)),
        ("layer_norm_backward", (x, x[0, :2], epsilon, x)),
        ("layer_norm_backward", (x, x[0], epsilon, x[:1])),
        ("layer_norm_backward_gamma", (x, epsilon, x[:1])),
        ("rms_norm_forward", (x, x[0, :2], epsilon)),
        ("rms_norm_backward", (x, x[0, :2], epsilon, x)),
        ("rms_norm_backward", (x, x[0], epsilon, x[:1])),
        ("rms_norm_backward_weight", (x, epsilon, x[:1])),
        ("softmax_backward", (x, x[:1])),
        ("masked_softmax_forward", (x, x)),
        ("masked_softmax_forward", (x.reshape(1, 2, 1, 3), np.zeros((1, 1, 1, 2), np.float32))),
        ("masked_softmax_forward", (x.reshape(1, 2, 1, 3), np.zeros((3, 1, 1, 3), np.float32))),
        ("cross_entropy_forward", (x, np.zeros(2, np.int64))),
        ("cross_entropy_forward", (x, np.zeros(1, np.int32))),
        ("cross_entropy_backward", (x, np.zeros(1, np.int32), x[0, :2])),
        ("cross_entropy_backward", (x, np.zeros(2, np.int32), x[0, :1])),
    ]
    for name, inputs in wrong:
        with pytest.raises(ValueError, match=f"{name} returned 1"):
            direct.call(library, name, *inputs, shape=x.shape)
