"""What causal language models share: who sees whom, where a prefix or a cache enters, and how they are loaded and run.

A network has ``(batch * seq, hidden)`` rows between its embedding and its head, as BERT here does. What an attention
layer is given besides is its `extra`: nothing, the (key, value) of a prefix, or the (keys, values, slots) of a cache.
The virtual tokens of a prompt have ids too, -1, -2 and so on, and are tokens like others from the embedding on.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal

from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.delta.prompt_slot import PromptSlot
from mindpet.models.cache import KeyValueCache, Step, advance
from mindpet.models.loading import LoadReport, PretrainedFilesError, load_tensors, require_outline

if TYPE_CHECKING:
    from typing_extensions import Self


class CausalLanguageModel(nn.Cell):
    """A network that predicts the next token; a subclass has the layers.

    ``network(input_ids, attention_mask)`` returns logits ``(batch, seq, vocabulary)``. Both inputs are int32
    ``(batch, seq)``. `attention_mask` holds the number of each token's segment, 0 for padding, on either side. A token
    sees itself, the earlier tokens of its segment, and the prefix or the virtual tokens where there are some. Positions
    count from the beginning of each segment, after those. Given `labels` too, int32 ``(batch, seq)``, it returns the
    cross entropy of each position with its label, ``(batch, seq)``, 0 where that is -100: what follows it in a text.
    """

    fp16 = bf16 = False  # flags that `to_float` sets

    base_prefix = ""  # the beginning of the names of everything but the head
    config_class: Any = None
    transposed: tuple[str, ...] = ()  # patterns of weights that Hugging Face stores as (in, out)
    not_weights: tuple[str, ...] = ()  # ends of tensor names that some files have besides

    config: Any
    positions: int
    tied: bool

    @classmethod
    def from_pretrained(cls, path: str | Path, **changes: Any) -> "tuple[Self, LoadReport]":
        """The network whose configuration and weights are at `path`.

        Args:
            path: a directory in Hugging Face's layout, or a ``.gguf`` file.
            changes: what is to differ from the configuration, for instance ``attention_dropout=0.1``.

        Returns:
            The network and what became of each tensor.

        Raises:
            PretrainedFilesError: a file is missing or broken, or does not fit; all problems in one message.
        """
        from mindpet.models.pretrained import open_pretrained

        pretrained = open_pretrained(path)
        config = dataclasses.replace(cls.config_class.from_content(pretrained.config, str(path)), **changes)
        tensors = pretrained.tensors()
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)  # the embedding once more
        for name in [name for name in tensors if cls.not_weights and name.endswith(cls.not_weights)]:
            del tensors[name]
        require_outline(cls.__name__, config.outline(), tensors, cls.base_prefix)
        network = cls(dataclasses.replace(config, initializer_range=0.0))  # random numbers take long, and are not used
        network.config = config
        return network, load_tensors(network, tensors, cls.base_prefix)

    def new_cache(self, batch: int, length: int) -> KeyValueCache:
        """An empty cache for `batch` rows of about `length` tokens, prompt and continuation together.

        The prefix of the network and its virtual tokens, where there are some, are in it already. It grows when more
        tokens come; each size is compiled once in graph mode.

        Raises:
            ValueError: more tokens than the network has positions.
        """
        return KeyValueCache(self, batch, length)

    def step(self, input_ids: Any, attention_mask: Any, cache: KeyValueCache) -> Tensor:
        """Take in the next tokens of every row, a whole prompt or one token, and predict the one after.

        Args:
            input_ids: ints ``(batch, n)``, NumPy or Tensor.
            attention_mask: 1 for a token, 0 for padding, on either side, ``(batch, n)``; None for no padding.
            cache: from :meth:`new_cache`; it remembers the tokens.

        Returns:
            Logits ``(batch, vocabulary)`` after each row's last token. A row of padding alone is not changed, and its
            logits mean nothing.

        Raises:
            ValueError: shapes that do not fit, segments, more tokens than positions.
        """
        return advance(self, input_ids, attention_mask, cache)

    def step_cell(self) -> Step:
        """The Cell that :meth:`step` runs; there is one, so that what it compiled stays."""
        if "mindpet_step" not in self.__dict__:
            self.__dict__["mindpet_step"] = Step(self)  # beside the cells of the network: it is around them
        return self.__dict__["mindpet_step"]

    def forget_caches(self) -> None:
        """Let the cell of :meth:`step` and the buffers of caches that are gone go."""
        self.__dict__.pop("mindpet_step", None)
        self.__dict__.pop("mindpet_buffers", None)

    @property
    def prefix_slot(self) -> PrefixSlot:
        """Where a prefix is, or could be; its sizes are those of all keys and values."""
        raise NotImplementedError

    @property
    def prompt_slot(self) -> PromptSlot:
        """Where virtual tokens are, or could be."""
        raise NotImplementedError

    @property
    def tied_table(self) -> Parameter | None:
        """The embedding's table, where the head multiplies with it too."""
        return self.prompt_slot.words.embedding_table if self.tied else None

    def hidden_rows(self, input_ids, positions, hidden, extras):
        """The last layer, normalised, as rows: ids and positions ``(batch, n)`` to ``(batch * n, hidden)``.

        Args:
            input_ids: tokens; virtual ones are -1, -2 and so on.
            positions: where each stands.
            hidden: 1 where a key is hidden from a token, else 0, ``(batch, 1, n, keys)``.
            extras: for each layer what :func:`mindpet.models.attention.attend` takes, or empty.
        """
        raise NotImplementedError

    def head_table(self):
        """The table that a tied head multiplies with, or None."""
        raise NotImplementedError

    def logits_of(self, rows, table):
        """The head: ``(rows, hidden)`` to ``(rows, vocabulary)``, with what :meth:`head_table` gives."""
        return self.head(rows, table) if self.tied else self.lm_head(rows)

    def embedding(self) -> nn.Cell | None:
        """The embedding of the tokens, with what a method has put into it; None where a subclass does not say."""
        return None

    @property
    def head_is_frozen(self) -> bool:
        """Whether the head is tied to an embedding in which nothing trains."""
        words = self.embedding()
        return self.tied and words is not None and not any(each.requires_grad for each in words.get_parameters())

    def losses_of(self, rows, labels):
        """What rows ``(n, hidden)`` lose against labels ``(n,)``, float32 ``(n,)``."""
        if self.tied:
            return self.losses(rows, self.head_table(), labels)
        return self.losses(self.lm_head(rows).astype(mstype.float32), labels)

    def predict(self, input_ids, attention_mask, pairs, virtual, labels=None):
        """Logits ``(batch, seq, vocabulary)``, with the (key, value) of a prefix for each layer, or none.

        They are of the given tokens; so many `virtual` ones go before them. With labels it is losses ``(batch, seq)``.
        """
        batch, seq = input_ids.shape
        start = pairs[0][0].shape[0] if len(pairs) > 0 else 0
        before = start + virtual
        if before + seq > self.positions:
            raise ValueError(f"{seq} tokens after a prefix of {before} are more than the {self.positions} positions.")
        positions, hidden = segments(attention_mask)
        if virtual > 0:
            input_ids = ops.concat((virtual_ids(batch, virtual, input_ids.dtype), input_ids), 1)
            positions, hidden = after_virtual(virtual, positions, hidden)
        if len(pairs) > 0:  # everybody sees the prefix
            hidden = ops.concat((ops.zeros((batch, 1, virtual + seq, start), hidden.dtype), hidden), -1)
        rows = self.hidden_rows(input_ids, positions + start, hidden, pairs)
        if virtual > 0:
            rows = rows.reshape((batch, virtual + seq, -1))[:, virtual:].reshape((batch * seq, -1))
        if labels is not None:
            return self.losses_of(rows, labels.reshape((-1,))).reshape((batch, seq))
        return self.logits_of(rows, self.head_table()).reshape((batch, seq, -1))


def segments(attention_mask):
    """Positions in the segments ``(batch, seq)``, and what is hidden (1) from whom, ``(batch, 1, seq, seq)``.

    >>> positions, hidden = segments(Tensor([[0, 1, 1, 2, 2]]))
    >>> positions.asnumpy().tolist(), hidden.asnumpy().sum(-1).tolist()
    ([[0, 0, 1, 0, 1]], [[[5.0, 4.0, 3.0, 4.0, 3.0]]])
    """
    order = ops.arange(attention_mask.shape[1])
    seen = (attention_mask.expand_dims(2) == attention_mask.expand_dims(1)).astype(mstype.float32)  # (batch, seq, seq)
    seen = seen * (order.expand_dims(1) >= order).astype(mstype.float32)
    seen = seen * (attention_mask != 0).astype(mstype.float32).expand_dims(1)
    positions = ops.maximum(seen.sum(-1) - 1.0, 0.0).astype(mstype.int32)
    return positions, (1.0 - seen).expand_dims(1)


def virtual_ids(batch, count, dtype):
    """The ids of virtual tokens, (batch, count): -1, -2, ..."""
    return ops.broadcast_to((-1 - ops.arange(count)).astype(dtype), (batch, count))


def after_virtual(count, positions, hidden):
    """What :func:`segments` gives, with so many virtual tokens before it: everybody sees them, they see each other.

    >>> positions, hidden = after_virtual(2, *segments(Tensor([[1, 1, 2]])))
    >>> positions.asnumpy().tolist(), hidden.asnumpy().sum(-1).tolist()
    ([[0, 1, 2, 3, 2]], [[[4.0, 3.0, 2.0, 1.0, 2.0]]])
    """
    batch, _, seq, _ = hidden.shape
    order = ops.arange(count)
    later = ops.broadcast_to((order.expand_dims(1) < order).astype(hidden.dtype), (batch, 1, count, count))
    first = ops.concat((later, ops.ones((batch, 1, count, seq), hidden.dtype)), -1)
    rest = ops.concat((ops.zeros((batch, 1, seq, count), hidden.dtype), hidden), -1)
    places = ops.broadcast_to(order.astype(positions.dtype), (batch, count))
    return ops.concat((places, positions + count), 1), ops.concat((first, rest), 2)


def embedded(words, ids, prompts):
    """The embeddings of ids ``(n,)``, ``(n, hidden)``; those of -1, -2 and so on are the rows of `prompts`, if any."""
    if prompts is None:
        return words(ids)
    rows = words(ops.maximum(ids, 0))  # (n, hidden)
    virtual = ops.gather(prompts.astype(rows.dtype), ops.maximum(-1 - ids, 0), 0)  # (n, hidden)
    return ops.where((ids < 0).expand_dims(1), virtual, rows)


def table_of(words):
    """The table of an embedding as a head reads it that is tied to it: with the rows that train, where some do."""
    return words.table() if hasattr(words, "table") else words.embedding_table


def to_add(hidden, dtype):
    """What to add to attention scores: 0, or where `hidden` is 1 next to minus infinity."""
    return hidden.astype(dtype) * (-1e9 if dtype == mstype.float32 else -3e4)


def start_of(config):
    """How weights start: normally distributed."""
    return Normal(config.initializer_range) if config.initializer_range else "zeros"


def read_config(config_class: Any, content: dict[str, Any], source: str, known: set[str], model_type: str) -> Any:
    """The dataclass made of those keys of a ``config.json`` that it has.

    Raises:
        PretrainedFilesError: of another kind of model, or values that the dataclass refuses.
    """
    kind = content.get("model_type", model_type)
    if kind != model_type:
        raise PretrainedFilesError(f"{source} is of a {kind!r}, not of a {model_type!r}.")
    try:
        return config_class(**{key: value for key, value in content.items() if key in known})
    except (TypeError, ValueError) as error:
        raise PretrainedFilesError(f"{source}: {error}") from error
