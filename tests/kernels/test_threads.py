"""Results do not depend on how many threads compute them, nor on who else is calling."""

import os
import re
import subprocess
import sys

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
    sources = "".join(source.read_text() for source in build._SOURCES)
    exported = re.findall(r"^KERNEL (\w+)\(", sources, re.MULTILINE)
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
    four, words, keys = np.zeros((1, 1, 1, 2), np.float32), np.zeros(8, np.int32), np.zeros(4, np.int32)
    query, counts, factors = np.zeros((1, 2, 6), np.float32), np.array([3, 1], np.int32), np.ones(2, np.float32)
    key = np.zeros((1, 2, 2), np.float32)
    attention = (query, key, key, four, words[:1], keys, counts, factors)
    others = (query[0], query, key[:, :1], four[..., :1], words[:3], keys[:3], np.array([3, 2], np.int32), factors[:1])
    # what is right but for one thing
    direct.call(library, "attention_forward", *attention, shape=query.shape)
    direct.call(library, "attention_backward", *attention, query, query, shape=query.shape, more=(key.shape, key.shape))
    direct.call(library, "dense_forward", x, x, shape=(2, 2))
    for at, other in enumerate(others):
        with pytest.raises(ValueError, match="returned 1"):
            inputs = (*attention[:at], other, *attention[at + 1 :])
            direct.call(library, "attention_forward", *inputs, shape=(other if at == 0 else query).shape)
    for inputs, more in (((query, query), (key.shape, query.shape)), ((query, key), (key.shape, key.shape))):
        with pytest.raises(ValueError, match="returned 1"):
            direct.call(library, "attention_backward", *attention, *inputs, shape=query.shape, more=more)
    with pytest.raises(ValueError, match="returned 1"):
        direct.call(library, "dense_forward", x, x[:, :2], shape=(2, 2))
    wrong = [
        ("dense_forward", (x, x[0])),
        ("dense_backward", (x, x)),
        ("dropout_apply", (x, words, keys[:3], epsilon)),
        ("dropout_apply", (x, words[:2], keys, epsilon)),
        ("dropout_apply", (x, words, np.array([1, 1, 1, 4], np.int32), epsilon)),
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
        ("square_sum", (x,)),
        ("dense_forward_bias", (x, x, np.zeros(3, np.float32))),
        ("dense_backward_weight", (x, np.zeros((3, 4), np.float32))),
        ("lora_forward", (x, x, x[:, 0], x[:1, :1], x[:, :1], x[0, :1])),
        ("lora_backward", (x, x.T, x[:, :1], x[:2])),
        ("narrow_forward", (x, x[:, :2])),
        ("narrow_backward", (x, x.T, x[:, :1], epsilon, x[:, :1])),
        ("narrow_backward_weight", (x, x[:1])),
        ("rotary_forward", (x, x, x)),
        ("cross_entropy_forward", (x, np.zeros(1, np.int32))),
        ("cross_entropy_backward", (x, np.zeros(1, np.int32), x[0, :2])),
        ("cross_entropy_backward", (x, np.zeros(2, np.int32), x[0, :1])),
    ]
    for name, inputs in wrong:
        with pytest.raises(ValueError, match=f"{name} returned 1"):
            direct.call(library, name, *inputs, shape=x.shape)
    wide, codes, factors = np.ones((6, 64), np.float32), np.zeros((12, 16), np.uint8), np.zeros((12, 2), np.float32)
    one = wide[:1]
    direct.call(library, "packed_forward", wide[:4], wide, codes, factors, shape=(4, 6))
    for inputs, shape in (
        ((wide[:5], wide, codes, factors), (5, 6)),
        ((one[:, :32], wide, codes, factors), (1, 6)),
        ((one, wide, codes[:-1], factors), (1, 6)),
        ((one, wide, codes[:, :8], factors), (1, 6)),
        ((one, wide, codes, factors[:-1]), (1, 6)),
        ((one, wide, codes, factors), (1, 7)),
        ((one[:0], wide, codes, factors), (0, 6)),
    ):
        with pytest.raises(ValueError, match="packed_forward returned 1"):
            direct.call(library, "packed_forward", *inputs, shape=shape)
    labels = np.zeros(2, np.int32)
    direct.call(library, "head_loss", x, x, labels, shape=(2,), more=[x.shape])
    for inputs, shapes in (
        ((x, x[:, :2], labels), ((2,), x.shape)),
        ((x, x, labels[:1]), ((2,), x.shape)),
        ((x, x, x[:, 0]), ((2,), x.shape)),
        ((x, x, labels), ((3,), x.shape)),
        ((x, x, labels), ((2,), x[:1].shape)),
    ):
        with pytest.raises(ValueError, match="head_loss returned 1"):
            direct.call(library, "head_loss", *inputs, shape=shapes[0], more=shapes[1:])
