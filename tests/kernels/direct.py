"""The compiled functions called without MindSpore. ``python direct.py LIBRARY`` prints a digest for each kernel.

With ``crowd`` as well, eight threads call them at the same time; with ``fork``, forked processes do.
"""

import ctypes
import hashlib
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def call(library, name, *inputs, shape, more=()):
    """What the Custom operator of that name returns; with `more` shapes, all its outputs as one vector."""
    outputs = [np.empty(one, np.float32) for one in (shape, *more)]
    arrays = [np.ascontiguousarray(value) for value in inputs] + outputs
    count = len(arrays)
    shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
    code = getattr(library, name)(
        count,
        (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays]),
        (ctypes.c_int * count)(*[array.ndim for array in arrays]),
        (ctypes.c_void_p * count)(*[ctypes.addressof(each) for each in shapes]),
        (ctypes.c_char_p * count)(*[str(array.dtype).encode() for array in arrays]),
        None,
        None,
    )
    if code:
        raise ValueError(f"{name} returned {code}")
    return np.concatenate([each.reshape(-1) for each in outputs]) if more else outputs[0]


def digests(library):
    """Every kernel at a size that all threads share."""
    generator = np.random.default_rng(0)
    rows, columns = 1501, 131
    x, up, dy = (generator.standard_normal((rows, columns), np.float32) for _ in range(3))
    weight, bias = (generator.standard_normal(columns, np.float32) for _ in range(2))
    epsilon = np.array([1e-5], np.float32)
    scores, slopes = (generator.standard_normal((4, 6, 64, 64), np.float32) for _ in range(2))
    mask = generator.standard_normal((4, 1, 1, 64), np.float32)
    turns = np.ascontiguousarray(slopes[:, :, :1])
    labels = generator.integers(-1, columns, rows).astype(np.int32)
    losses = generator.standard_normal(rows, np.float32)
    square = np.ascontiguousarray(up[:columns])
    same, last = (rows, columns), (columns,)
    words = generator.integers(-(2**31), 2**31, 1 << 12).astype(np.int32)
    keys = np.array([77, 99, -(2**30), 0], np.int32)
    query = generator.standard_normal((3, 150, 120), np.float32)
    key, value = (generator.standard_normal((3, 70, 40), np.float32) for _ in range(2))
    hidden = generator.standard_normal((3, 1, 1, 70), np.float32)
    attention = (query, key, value, hidden, words, keys, np.array([6, 2], np.int32), np.array([0.2, 1.3], np.float32))
    quantised = (up[:, :128].reshape(-1)[:64].view(np.uint8), losses[:8].copy())  # 8 blocks of 64 entries, in 256 bytes
    tables = (epsilon, epsilon, *(generator.standard_normal(shape, np.float32) for shape in ((256, 2), 256)))
    codes = generator.integers(0, 256, (4500, 16)).astype(np.uint8)
    pairs = generator.standard_normal((4500, 2), np.float32)
    few, plain = (dy[:4, :96], weight[:96], epsilon), up[:70, :96]
    turned = (generator.standard_normal((2, 2, 1, 32), np.float32) for _ in range(2))
    held = (generator.standard_normal((400, 64), np.float32) for _ in range(2))
    slots, seen = np.array([[7], [180], [399], [200]], np.int32), generator.standard_normal((1, 6, 1, 200), np.float32)
    counts = np.array([6, 2], np.int32), np.array([0.2, 1.0], np.float32)
    cached = (pairs[:384].reshape(4, 192), x[4:8, :64], x[8:12, :64], *turned, *held, slots, seen, *counts)
    calls = {
        "gelu_forward": ((x,), same),
        "gelu_backward": ((x, dy), same),
        "gelu_tanh_forward": ((x,), same),
        "gelu_tanh_backward": ((x, dy), same),
        "gated_silu_forward": ((x, up), same),
        "gated_silu_backward": ((x, up, dy), same),
        "rotary_forward": ((scores, turns, turns), scores.shape),
        "rotary_backward": ((scores, turns, turns), scores.shape),
        "layer_norm_forward": ((x, weight, bias, epsilon), same),
        "layer_norm_backward": ((x, weight, epsilon, dy), same),
        "layer_norm_backward_gamma": ((x, epsilon, dy), last),
        "sum_of_rows": ((dy,), last),
        "rms_norm_forward": ((x, weight, epsilon), same),
        "rms_norm_backward": ((x, weight, epsilon, dy), same),
        "rms_norm_backward_weight": ((x, epsilon, dy), last),
        "masked_softmax_forward": ((scores, mask), scores.shape),
        "softmax_backward": ((scores, slopes), scores.shape),
        "cross_entropy_forward": ((x, labels), (rows,)),
        "cross_entropy_backward": ((x, labels, losses), same),
        "head_loss": ((x[:99], np.concatenate([up, dy]), labels[:99]), (99,), ((99, columns),)),
        "dropout_apply": ((x, words, keys, epsilon), same),
        "dense_forward": ((x, up), (rows, rows)),
        "dense_forward_bias": ((x, up, losses), (rows, rows)),
        "dense_backward": ((x.T, x), (columns, columns)),
        "dense_backward_weight": ((x, dy), (columns, columns)),
        "lora_forward": ((x, up, losses, dy[:, :9], up[:, :9], epsilon), (rows, rows)),
        "lora_backward": ((x, square, dy[:, :9], up[:9]), same),
        "narrow_forward": ((x, up[:9]), (rows, 9)),
        "narrow_backward": ((x, square[:, :9], dy[:, :9], epsilon), (rows, 9), ((columns, 9),)),
        "narrow_backward_weight": ((dy[:, :9], x), (9, columns)),
        "square_sum": ((x,), (1,)),
        "quantised_forward": ((dy[:, :32], *quantised, *tables, np.array([16, 32, 64], np.int32)), (rows, 16)),
        "quantised_backward": ((dy[:, :16], *quantised, *tables, np.array([16, 32, 64], np.int32)), (rows, 32)),
        "packed_forward": ((dy[:4, :96], up[:1500, :96], codes, pairs), (4, 1500)),
        "few_onto": ((dy[:4, :96], codes, pairs, np.tile(losses[:1500], (4, 1))), (4, 1500)),
        "few_three": ((*few, codes, pairs, codes[:300], pairs[:300], plain, plain), (4, 1500), ((4, 100), (4, 70))),
        "few_gated": ((*few, codes, pairs, codes[::-1], pairs[::-1]), (4, 1500)),
        "cached_attention": (cached, (4, 192)),
        "attention_forward": (attention, query.shape),
        "attention_backward": ((*attention, query, query), query.shape, (key.shape, key.shape)),
    }
    return {
        name: hashlib.sha256(call(library, name, *inputs, shape=shape, more=more).tobytes()).hexdigest()[:16]
        for name, (inputs, shape, more) in ((name, (*each, ())[:3]) for name, each in calls.items())
    }


def fork(library, expected):
    """Fork when one of the threads has just worked and the others sleep: the child inherits them as waiting."""
    call(library, "gelu_forward", np.ones((400, 8192), np.float32), shape=(400, 8192))  # wakes all
    two = np.ones((2, 40_000), np.float32), np.ones(40_000, np.float32), np.ones(1, np.float32)
    call(library, "rms_norm_forward", *two, shape=two[0].shape)  # two chunks: wakes one
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for threads it does not have
        os._exit(0 if digests(library) == expected else 1)
    status = os.waitpid(child, 0)[1]
    if status:
        sys.exit("the forked process " + ("hangs" if status == signal.SIGALRM else "disagrees"))


def main():
    library = ctypes.CDLL(sys.argv[1])
    found = digests(library)
    if "crowd" in sys.argv:
        with ThreadPoolExecutor(8) as pool:
            crowd = list(pool.map(lambda _: digests(library), range(24)))
        if any(each != found for each in crowd):
            sys.exit("threads disagree")
    if "fork" in sys.argv:
        for _ in range(20):
            fork(library, found)
    for name, digest in found.items():
        print(name, digest)


if __name__ == "__main__":
    main()
