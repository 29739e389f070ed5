"""Where a prefix starts: at the keys and values of real tokens. Li and Liang 2021, arXiv:2101.00190, section 7.4.

A prefix of random numbers takes attention away from the text, and a short run spends its steps on getting back to where
the network was. The keys and values of a text are ones that the network knows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet import _checks, _compat
from mindpet.delta.prefix_layer import PrefixTuning
from mindpet.delta.ptuning2 import PTuning2
from mindpet.models.cache import KeyValueCache

if TYPE_CHECKING:
    from mindpet.models.causal import CausalLanguageModel

PROJECTED_RATE = 1e-4  # a learning rate for a reparameterised prefix that starts so; the paper takes 5e-5


def start_prefix(network: "CausalLanguageModel", input_ids: Sequence[int]) -> None:
    r"""Let the prefix of a language model be what its layers make of some tokens.

    The prefix of layer l becomes :math:`(K_l, V_l)`, the keys and values of `input_ids`, each ``(tokens, heads *
    head_dim)``. Where a reparameterisation makes the prefix, its embedding is scaled so that what goes into the tanh
    has a deviation of 1, and its last layer is solved for them: with U ``(tokens,
    mid)`` the output of its tanh, :math:`[W_2, b_2] = \mathrm{argmin} \| [U, 1] [W_2, b_2]^T - (K_l, V_l) \|`, of the
    solutions the smallest; it is exact where mid + 1 is at least the number of tokens.

    Args:
        network: with Prefix-Tuning or P-Tuning v2 in it.
        input_ids: tokens, over and over if they are fewer than those of the prefix.

    Raises:
        TypeError: `network` is not a Cell.
        ValueError: the network has no prefix; `input_ids` is empty, or has others than ids of words.
    """
    _checks.cell("start_prefix", "network", network)
    slot = getattr(network, "prefix_slot", None)
    if not isinstance(slot, (PrefixTuning, PTuning2)):
        raise ValueError(
            f"For 'start_prefix', 'network' must be a language model with a prefix, but this "
            f"{type(network).__name__} has none: inject one first."
        )
    ids, words = np.asarray(input_ids), network.config.vocab_size
    if not ids.size or ids.ndim > 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= words:
        raise ValueError(
            f"For 'start_prefix', 'input_ids' must be ids from 0 to {words - 1}, one at least, "
            f"but got {_checks.shown(input_ids)}."
        )
    prefix = isinstance(slot, PrefixTuning)
    tokens = slot.heads_shape[0] if prefix else slot.encoder.pre_seq_len
    pairs = _keys_and_values(network, np.resize(ids.astype(np.int32), tokens))
    if prefix:
        for layer, (key, value) in zip(slot.layers, pairs):
            if slot.projection:
                table, first = layer.mindpet_delta_prefixtuning_embedding, layer.mindpet_delta_prefixtuning_in
                _solve(table, first, layer.mindpet_delta_prefixtuning_out, np.concatenate((key, value), 1))
            else:
                _set(layer.mindpet_delta_prefixtuning_past_key, key)
                _set(layer.mindpet_delta_prefixtuning_past_value, value)
        return
    encoder = slot.encoder
    wanted = np.concatenate([part for pair in pairs for part in pair], 1)  # (tokens, layers * 2 * heads * head_dim)
    if encoder.prefix_projection:
        table = encoder.mindpet_delta_ptuning2_embedding
        _solve(table, encoder.mindpet_delta_ptuning2_in, encoder.mindpet_delta_ptuning2_out, wanted)
    else:
        _set(encoder.mindpet_delta_ptuning2_embedding, wanted)


def _keys_and_values(network: "CausalLanguageModel", ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each layer, (tokens, heads * head_dim), without the prefix that is there; operator by operator."""
    with _compat.pynative_mode(), _compat.evaluating(network):
        cache = KeyValueCache(network, 1, len(ids), bare=True)
        network.step(ids[None], None, cache)
        rows = [buffer.asnumpy()[: len(ids)].astype(np.float32) for buffer in cache.buffers]
    network.forget_caches()  # what is to train needs none
    return list(zip(rows[: len(rows) // 2], rows[len(rows) // 2 :]))


def _solve(table: Parameter, first: nn.Dense, second: nn.Dense, wanted: np.ndarray) -> None:
    """Let ``second(tanh(first(table)))`` be `wanted`, in float64."""
    rows, weight, bias = (p.asnumpy().astype(np.float64) for p in (table, first.weight, first.bias))
    rows /= (rows @ weight.T).std() or 1.0  # the smaller it is inside the tanh, the more a step changes the prefix
    inner = np.tanh(rows @ weight.T + bias)
    solution = np.linalg.lstsq(np.pad(inner, ((0, 0), (0, 1)), constant_values=1.0), wanted, rcond=None)[0]
    _set(table, rows)
    _set(second.weight, solution[:-1].T)
    _set(second.bias, solution[-1])


def _set(parameter: Parameter, value: np.ndarray) -> None:
    _compat.set_value(parameter, Tensor(np.ascontiguousarray(value, np.float32)))
