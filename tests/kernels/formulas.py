"""What the kernels compute, in NumPy and float64, and derivatives by differences."""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x):
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gated_silu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def layer_norm(x, gamma, beta, epsilon=0.1):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * gamma + beta


def rms_norm(x, weight, epsilon=0.1):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def masked_softmax(scores, mask):
    total = scores + mask
    e = np.exp(total - total.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(logits, labels):
    e = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(e).sum(-1)) - e[np.arange(len(labels)), np.maximum(labels, 0)]
    return np.where(labels < 0, 0.0, losses)


def derivative(formula, inputs, probe, index, step=1e-5):
    """d sum(formula(*inputs) probe) / d inputs[index]."""
    inputs = [np.array(value, np.float64, order="C") if value.dtype.kind == "f" else value for value in inputs]
    entries = inputs[index].reshape(-1)
    result = np.zeros_like(entries)
    for entry in range(entries.size):
        kept = entries[entry]
        sides = []
        for sign in (1, -1):
            entries[entry] = kept + sign * step
            sides.append((formula(*inputs) * probe).sum())
        entries[entry] = kept
        result[entry] = (sides[0] - sides[1]) / (2 * step)
    return result.reshape(inputs[index].shape)
