"""Keys and values of tokens already seen, so that each new token costs one step.

Every layer has two buffers, one for keys and one for values, with a fixed number of slots for each row. The token at
position p of its row is in slot p, so padding takes no room, and what a token sees is every slot up to its own. The
last slot is where padding goes. In graph mode a prompt is taken in pieces of `PIECE` tokens, so that two graphs are
compiled, for a piece and for a token, whatever the prompt's length; the buffers of a cache that is gone are used
again, since a compiled graph is bound to them.
"""

import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindpet import _checks, _compat
from mindpet.graph.blocks import first_call
from mindpet.kernels.operators import FEW
from mindpet.kernels.packing import pack_weights, packed_in_use
from mindpet.models.short import short_layers_in_use

if TYPE_CHECKING:
    from mindpet.models.causal import CausalLanguageModel

PIECE = 32  # tokens of a prompt that are taken in at once in graph mode
SMALLEST = 128  # slots; sizes double from here


class KeyValueCache:
    """What :meth:`~mindpet.models.causal.CausalLanguageModel.step` remembers of each row.

    Attributes:
        batch: rows.
        lengths: tokens of each row so far, those of the prefix and virtual ones included. Lowering an entry forgets the
            last tokens.
        capacity: slots of each row, one of which is for padding.

    A `bare` one begins without the network's prefix and virtual tokens.
    """

    def __init__(self, network: "CausalLanguageModel", batch: int, length: int, bare: bool = False):
        self.batch = _checks.positive_int("new_cache", "batch", batch)
        length = _checks.positive_int("new_cache", "length", length)
        pairs, virtual = ([], 0) if bare else (_prefix_of(network), network.prompt_slot.tokens)
        tokens = pairs[0][0].shape[0] if pairs else 0
        self.lengths = np.full(self.batch, tokens, np.int32)
        self._network = network
        self.checked = True  # no token came since packed weights were compared, or a bare one's first do without
        if not bare:
            _pack(network)
        self.capacity = 0
        self.buffers: tuple[Parameter, ...] = ()
        self.reserve(tokens + virtual + length)
        parts = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        for index, part in enumerate(parts):
            rows = self._slots_of(self.buffers[index])
            rows[:, :tokens] = part.reshape(tokens, -1)
            self.buffers[index].set_data(Tensor(rows.reshape(self.buffers[index].shape)))
        self._take_in_virtual(virtual)

    def _take_in_virtual(self, count: int) -> None:
        """The virtual tokens of the network go first, without dropout."""
        if not count:
            return
        with _compat.evaluating(self._network) as network:
            advance(network, np.tile(-1 - np.arange(count), (self.batch, 1)), None, self)

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens, prefix included.

        Raises:
            ValueError: the network has fewer positions.
        """
        limit = self._network.positions
        if length > limit:
            raise ValueError(f"{length} tokens, prefix included, are more than the {limit} positions of the network.")
        if length < self.capacity:
            return
        old, held = self.buffers, self.capacity
        self.capacity = max(SMALLEST, 1 << length.bit_length())
        key = (self.batch, self.capacity)
        pool = self._network.__dict__.setdefault("mindpet_buffers", {}).setdefault(key, [])
        self.buffers = pool.pop() if pool else _new_buffers(self._network, *key)
        for index, buffer in enumerate(self.buffers):
            rows = np.zeros_like(self._slots_of(buffer))
            if old:
                rows[:, : held - 1] = self._slots_of(old[index])[:, : held - 1]
            buffer.set_data(Tensor(rows.reshape(buffer.shape)))
        weakref.finalize(self, pool.append, self.buffers).atexit = False

    def _slots_of(self, buffer: Parameter) -> np.ndarray:
        """A copy of a buffer as (batch, slots, heads * head_dim)."""
        return buffer.asnumpy().reshape((self.batch, -1, buffer.shape[-1])).copy()


class Step(_compat.GraphCell):
    """The next n tokens of every row: ids and positions ``(batch, n)`` to logits ``(batch, vocabulary)``."""

    def __init__(self, network: "CausalLanguageModel"):
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.network = network

    def construct(self, input_ids, positions, *buffers):
        batch, count = input_ids.shape
        table = self.network.head_table()
        if table is not None:  # read before keys and values are written: after that MindSpore reads a copy
            table = ops.stop_gradient(table)
        capacity = buffers[0].shape[0] // batch
        hidden = (ops.arange(capacity) > positions.expand_dims(2)).astype(ms.float32)  # (batch, n, capacity)
        starts = (ops.arange(batch) * capacity).expand_dims(1)
        slots = (starts + positions).reshape((-1, 1)).astype(ms.int32)  # (batch * n, 1)
        layers = len(buffers) // 2
        extras: tuple = ()
        for layer in range(layers):
            extras += ((buffers[layer], buffers[layers + layer], slots),)
        rows = self.network.hidden_rows(input_ids, positions, hidden.expand_dims(1), extras)
        last = rows.reshape((batch, count, -1))[:, -1]  # (batch, hidden)
        return self.network.logits_of(last, table)


def advance(network: "CausalLanguageModel", input_ids: Any, attention_mask: Any, cache: KeyValueCache) -> Tensor:
    """See :meth:`~mindpet.models.causal.CausalLanguageModel.step`."""
    ids = _as_int32(input_ids)
    mask = np.ones_like(ids) if attention_mask is None else _as_int32(attention_mask)
    if ids.ndim != 2 or ids.shape[0] != cache.batch or mask.shape != ids.shape:
        raise ValueError(
            f"For 'step', 'input_ids' and 'attention_mask' must be ({cache.batch}, n) for this cache, "
            f"but got {ids.shape} and {mask.shape}."
        )
    if not mask.any() or mask.min() < 0 or mask.max() > 1:
        raise ValueError(
            "For 'step', 'attention_mask' must be 1 for tokens and 0 for padding, with one token at least."
        )
    lengths = cache.lengths + mask.sum(1, dtype=np.int32)
    cache.reserve(int(lengths.max()))
    order = np.argsort(mask, axis=1, kind="stable")[:, -int(mask.sum(1).max()) :]  # padding to the left
    ids, mask = np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)
    positions = np.where(mask, lengths[:, None] + np.arange(-ids.shape[1], 0), cache.capacity - 1).astype(np.int32)
    size = ids.shape[1]
    if size > 1 and not cache.checked:
        _pack(network)
    cache.checked = False
    if size > 1 and _compat.in_graph_mode():
        missing, size = -size % PIECE, PIECE
        ids = np.pad(ids, ((0, 0), (missing, 0)))
        positions = np.pad(positions, ((0, 0), (missing, 0)), constant_values=cache.capacity - 1)
    step = network.step_cell()
    if step.training != network.training:  # it is around the network, which knows nothing of it
        step.set_train(network.training)
    few = size * cache.batch <= FEW
    for start in range(0, ids.shape[1], size):
        piece = (Tensor(np.ascontiguousarray(part[:, start : start + size])) for part in (ids, positions))
        with (
            first_call(step, (size, *map(id, cache.buffers))) as compiles,
            packed_in_use(network) if compiles and few else nullcontext(),
            short_layers_in_use(network) if compiles and few else nullcontext(),
        ):
            logits = step(*piece, *cache.buffers)
    cache.lengths = lengths
    return logits


def _pack(network: "CausalLanguageModel") -> None:
    """Weights are packed, and what is packed is compared with them, for each cache and prompt, not for each token."""
    as_it_is = network.tied and not hasattr(network.embedding(), "table")  # some methods change what the head reads
    if pack_weights(network, network.tied_table if as_it_is else None):
        network.forget_caches()


def _prefix_of(network: "CausalLanguageModel") -> list[list[np.ndarray]]:
    """The [key, value] of each layer, ``(tokens, heads, head_dim)``, without dropout; empty without a prefix."""
    slot = network.prefix_slot
    if not hasattr(slot, "delta_method"):
        return []
    with _compat.evaluating(slot):
        return [[part.asnumpy() for part in pair] for pair in slot()]


def _new_buffers(network: "CausalLanguageModel", batch: int, capacity: int) -> tuple[Parameter, ...]:
    slot, dtype = network.prefix_slot, next(iter(network.get_parameters())).dtype
    shape = (batch * capacity, slot.num_heads * slot.head_dim)
    return tuple(
        Parameter(ops.zeros(shape, dtype), name=f"mindpet_cache_{part}_{layer}", requires_grad=False)
        for part in ("key", "value")
        for layer in range(slot.num_layers)
    )


def _as_int32(values: Any) -> np.ndarray:
    return np.asarray(values.asnumpy() if isinstance(values, Tensor) else values).astype(np.int32)
