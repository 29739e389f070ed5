"""The documented formulas in NumPy and float64: what layers and losses are compared with."""

import numpy as np
from mindspore import Tensor, nn

NP_ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def difference(ours, theirs):
    """The largest difference of two arrays of one shape; NaN where one of them is."""
    assert np.shape(ours) == np.shape(theirs)
    return float(np.abs(ours - np.asarray(theirs)).max(initial=0))


class OnEach(nn.Cell):
    """One layer on several inputs: several shapes behind one compilation."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def construct(self, *inputs):
        outputs = ()
        for x in inputs:
            outputs += (self.layer(x),)
        return outputs


def randomise(cell, rng, scale=1.0):
    """Give every parameter values of its own, none of them zero, and return the cell."""
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(scale * rng.normal(size=parameter.shape), parameter.dtype))
    return cell


def values(cell):
    """Every parameter in float64, by its path."""
    return {path: parameter.asnumpy().astype(np.float64) for path, parameter in cell.parameters_and_names()}


def inputs_of_every_rank(rng, size, dtype=np.float32):
    return [rng.normal(size=(*lead, size)).astype(dtype) for lead in ((), (5,), (2, 3), (2, 2, 3))]


def dense(x, p, activation=None):
    out = x @ p["weight"].T + p.get("bias", 0.0)
    return NP_ACTIVATIONS[activation](out)


def lora(x, p, scale, activation=None):
    branch = scale * x @ p["mindpet_delta_lora_a"].T @ p["mindpet_delta_lora_b"].T
    return NP_ACTIVATIONS[activation](dense(x, p) + branch)


def adapter(x, p, non_linearity):
    down = "mindpet_delta_adapter_block.mindpet_delta_adapter_down_sampler."
    up = "mindpet_delta_adapter_block.mindpet_delta_adapter_up_sampler."
    inner = NP_ACTIVATIONS[non_linearity](x @ p[down + "weight"].T + p[down + "bias"])
    return x + inner @ p[up + "weight"].T + p[up + "bias"]


def low_rank_adapter(x, p, non_linearity):
    def sampler(rows, name):
        marker = f"mindpet_delta_low_rank_adapter_{name}_sampler."
        left = p[marker + "mindpet_delta_low_rank_adapter_weight_left"]
        right = p[marker + "mindpet_delta_low_rank_adapter_weight_right"]
        return rows @ left @ right + p[marker + "bias"]

    return x + sampler(NP_ACTIVATIONS[non_linearity](sampler(x, "down")), "up")


def below(p, path):
    """The parameters below one path, by the rest of their paths."""
    return {name[len(path) + 1 :]: value for name, value in p.items() if name.startswith(path + ".")}


def prefix(p):
    """Key and value of a PrefixLayer, through its network."""
    first, second = below(p, "mindpet_delta_prefixtuning_in"), below(p, "mindpet_delta_prefixtuning_out")
    rows = np.tanh(p["mindpet_delta_prefixtuning_embedding"] @ first["weight"].T + first["bias"])
    return np.split(rows @ second["weight"].T + second["bias"], 2, axis=1)


def prompts(p, layers, heads, channels):
    """The prompts of a PrefixEncoder, ``(tokens, layers * 2, heads, channels)``."""
    table = p["mindpet_delta_ptuning2_embedding"]
    if "mindpet_delta_ptuning2_in.weight" in p:
        first, second = below(p, "mindpet_delta_ptuning2_in"), below(p, "mindpet_delta_ptuning2_out")
        table = np.tanh(table @ first["weight"].T + first["bias"]) @ second["weight"].T + second["bias"]
    return table.reshape(len(table), layers * 2, heads, channels)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def r_drop(logits, probabilities, alpha, counts=None):
    """Mean cross entropy, plus alpha times the mean over the pairs of (KL(p||q) + KL(q||p)) / 4.

    `counts` says which positions count; each pair of equal positions counts or does not, together.
    """
    log_p = log_softmax(np.asarray(logits, np.float64))
    counts = np.ones(log_p.shape[:-1]) if counts is None else counts.astype(np.float64)
    entropy = -(probabilities * log_p).sum(-1) * counts
    p, q = np.exp(log_p[0::2]), np.exp(log_p[1::2])
    forth = (p * (log_p[0::2] - log_p[1::2])).sum(-1)
    back = (q * (log_p[1::2] - log_p[0::2])).sum(-1)
    pairs = (forth + back) / 4 * counts[0::2]
    return entropy.sum() / counts.sum() + alpha * pairs.sum() / counts[0::2].sum()


def one_hot(index, classes):
    return np.eye(classes)[index]


def central_differences(function, array, step=1e-5):
    """The gradient of a scalar function of one float64 array, entry by entry."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = function()
        array[index] = kept - step
        gradient[index] = (above - function()) / (2 * step)
        array[index] = kept
    return gradient
