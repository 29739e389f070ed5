"""Where a network takes virtual tokens before its own: the small protocol behind the prompt methods.

A network that prompt methods can tune holds one :class:`PromptSlot` around its table of words and calls it once in
``construct``. What comes back, if anything does, goes before the embeddings of every sample::

    self.prompts = PromptSlot(self.words)
    ...
    hidden = self.words(input_ids)                 # (batch, seq, hidden)
    prompts = self.prompts()                       # (tokens, hidden) or None
    if prompts is not None:
        hidden = before_rows(prompts, hidden)      # (batch, tokens + seq, hidden)

Positions, token types and masks are those of tokens + seq then: virtual tokens are of type 0 and never hidden. Prompts
depend on no input, so that a cache of keys and values takes them in once, before there is a token.
"""

from mindspore import Tensor, nn, ops

from mindpet import _checks


class PromptSlot(nn.Cell):
    """An empty slot: no virtual tokens. The prompt methods replace it by one that has some.

    Attributes:
        words: the network's table of words, which keeps its own place in the network.
        hidden_size: features of a token.
        tokens: virtual tokens.

    >>> PromptSlot(nn.Embedding(11, 8))() is None
    True
    """

    tokens = 0

    def __init__(self, words: nn.Embedding):
        super().__init__()
        if not isinstance(words, nn.Embedding):
            raise TypeError(f"For 'PromptSlot', 'words' must be an nn.Embedding, but got {_checks.shown(words)}.")
        self.__dict__["words"] = words  # beside the cells of the slot: its parameters are the network's
        self.hidden_size = words.embedding_size

    def construct(self):
        return None


def before_rows(prompts: Tensor, rows: Tensor) -> Tensor:
    """(tokens, hidden), the same for every sample, before (batch, seq, hidden), in the dtype of that.

    >>> before_rows(ops.ones((3, 8)), ops.ones((2, 5, 8))).shape
    (2, 8, 8)
    """
    shape = (rows.shape[0], *prompts.shape)
    return ops.concat((ops.broadcast_to(prompts.astype(rows.dtype).expand_dims(0), shape), rows), 1)


def ones_before(mask: Tensor, tokens: int) -> Tensor:
    """So many ones before (batch, seq)."""
    return ops.concat((ops.ones((mask.shape[0], tokens), mask.dtype), mask), 1)
