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


def rotary(x, cos, sin):
    return x * cos + np.roll(x, x.shape[-1] // 2, -1) * sin


def layer_norm(x, gamma, beta, epsilon=0.1):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * gamma + beta


def rms_norm(x, weight, epsilon=0.1):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def masked_softmax(scores, mask):
    total = scores + mask
    e = np.exp(total - total.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept(words, keys, rows, columns):
    """The mask of dropout, 0 or 1: in 32 bits that wrap around."""
    a, b, threshold, rank = (int(key) for key in keys)
    with np.errstate(over="ignore"):
        row = words[rank * rows : (rank + 1) * rows].astype(np.int32) * np.int32(a)
        word = row[:, np.newaxis] * words[-columns:].astype(np.int32) + np.int32(b)
    return (word >= threshold).astype(np.float64)


def dropout(x, words, keys, factor=1.25):
    return x * kept(words, keys, x.size // x.shape[-1], x.shape[-1]).reshape(x.shape) * factor


def product(x, weight):
    return x @ weight.T


def biased_product(x, weight, bias):
    return x @ weight.T + bias


def lora(x, weight, bias, a, b, scale=0.7):
    return x @ weight.T + bias + scale * x @ a.T @ b.T


def product_slopes(probe, x, weight, bias=None, a=None, b=None, scale=0.7):
    """Derivatives of sum(lora(...) probe) with respect to each input, or as many as there are."""
    if a is None:
        return probe @ weight, probe.T @ x, probe.sum(0)
    inner = scale * probe @ b
    return probe @ weight + inner @ a, probe.T @ x, probe.sum(0), inner.T @ x, scale * probe.T @ (x @ a.T)


def attention(query, key, value, mask, words, keys, heads=6, groups=2, scale=0.3, factor=1.25):
    batch, queries, dim = query.shape[0], query.shape[1], query.shape[2] // heads

    def split(x):
        return x.reshape(batch, x.shape[1], -1, dim).transpose(0, 2, 1, 3)

    key, value = (split(part).repeat(heads // groups, 1) for part in (key, value))
    weights = masked_softmax(split(query) @ key.transpose(0, 1, 3, 2) * scale, mask)
    if words.size > 1:
        weights = weights * kept(words, keys, batch * heads * queries, key.shape[2]).reshape(weights.shape) * factor
    return (weights @ value).transpose(0, 2, 1, 3).reshape(batch, queries, -1)


def cross_entropy(logits, labels):
    e = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(e).sum(-1)) - e[np.arange(len(labels)), np.maximum(labels, 0)]
    return np.where(labels < 0, 0.0, losses)


def head_loss(rows, table, labels):
    return cross_entropy(rows @ table.T, labels)


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
