"""Trained rows of an embedding. Gal et al. 2022, Textual Inversion, arXiv:2208.01618, section 4.

There one new word of a text-to-image model trains and all else is frozen; here as many rows of any embedding as named.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet import _checks
from mindpet.delta.method import DeltaConfig, Method, PeftNames


@dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(DeltaConfig):
    """Some rows of every targeted embedding train.

    Attributes:
        token_indices: the numbers of the rows, each once.
    """

    token_indices: Sequence[int] = ()

    def __post_init__(self):
        super().__post_init__()
        owner, given = type(self).__name__, self.token_indices
        numbers = isinstance(given, (list, tuple)) and all(type(one) is int and one >= 0 for one in given)
        if not numbers or not given or len(set(given)) < len(given):
            raise ValueError(
                f"For '{owner}', 'token_indices' must be a list of different numbers of rows from 0 on, one at least, "
                f"but got {_checks.shown(given)}."
            )
        object.__setattr__(self, "token_indices", tuple(given))


class TrainableTokensEmbedding(nn.Embedding):
    r"""An embedding of whose rows some are trained ones.

    .. math:: y_i = T_{k(i)} \text{ where } i \text{ is the k-th trained row, else } E_i

    Shapes: i any shape of ints, E ``(vocabulary, dim)``, T ``(tokens, dim)``, y ``(..., dim)``. T starts as the rows of
    E, so the layer starts as the embedding it replaces. Cost: ``len(token_indices) * dim`` parameters and
    ``0`` floating-point operations a row.
    """

    delta_method = "trainable_tokens"

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config: TrainableTokensConfig) -> "TrainableTokensEmbedding":
        """The same embedding, its table shared, with new rows in the dtype of the table.

        >>> config = TrainableTokensConfig(token_indices=[7])
        >>> layer = TrainableTokensEmbedding.from_embedding(nn.Embedding(10, 4), config)
        >>> layer(Tensor([[1, 7, 3]])).shape, layer.mindpet_delta_trainable_tokens.shape
        ((1, 3, 4), (1, 4))
        """
        layer = cls.__new__(cls)
        nn.Cell.__init__(layer)
        table = embedding.embedding_table
        layer.embedding_table = table
        layer.vocab_size, layer.embedding_size = table.shape
        if max(config.token_indices) >= layer.vocab_size:
            raise ValueError(
                f"For 'TrainableTokensConfig', 'token_indices' must be below {layer.vocab_size}, the number of rows, "
                f"but got {max(config.token_indices)}."
            )
        rows = np.array(config.token_indices)
        layer.mindpet_delta_trainable_tokens = Parameter(
            Tensor(table.asnumpy()[rows], table.dtype), name="mindpet_delta_trainable_tokens"
        )
        layer.rows = Tensor(rows.reshape((-1, 1)), mstype.int32)
        place = np.zeros(layer.vocab_size, np.int32)  # k + 1 for the k-th trained row, 0 for another
        place[rows] = np.arange(1, len(rows) + 1)
        layer.place = Tensor(place)
        layer.set_train(embedding.training)
        return layer

    def construct(self, ids):
        rows = ids.reshape((-1,))
        place = ops.gather(self.place, rows, 0)  # (rows,)
        trained = ops.gather(self.mindpet_delta_trainable_tokens, ops.maximum(place - 1, 0), 0)  # (rows, dim)
        out = ops.select((place > 0).reshape((-1, 1)), trained, ops.gather(self.embedding_table, rows, 0))
        return out.reshape(ids.shape + (self.embedding_size,))

    def table(self):
        """E with its trained rows, for a head that is tied to the embedding: (vocabulary, dim)."""
        return ops.tensor_scatter_update(self.embedding_table, self.rows, self.mindpet_delta_trainable_tokens)

    @property
    def base_weight(self) -> Parameter:
        """The table that a delta is added to in merging."""
        return self.embedding_table

    def delta_weight(self) -> Tensor:
        """What is added to the table, in float32: T - E in the trained rows, 0 in the others."""
        return self.table().astype(mstype.float32) - self.embedding_table.astype(mstype.float32)

    def extend_repr(self) -> str:
        """For printing."""
        return f"vocab_size={self.vocab_size}, embedding_size={self.embedding_size}, tokens={len(self.rows)}"


METHOD = Method(
    name="trainable_tokens",
    config=TrainableTokensConfig,
    trainable=("*mindpet_delta_trainable_tokens*",),
    paper="Gal et al. 2022, An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual "
    "Inversion, arXiv:2208.01618",
    adapt={nn.Embedding: TrainableTokensEmbedding.from_embedding},
    targets=("*.word_embeddings", "*.embed_tokens", "*.wte"),
    learning_rate=0.001,
    peft=PeftNames(
        "TRAINABLE_TOKENS",
        tensors={"trainable_tokens_delta": "mindpet_delta_trainable_tokens"},
        options={"token_indices": "token_indices"},
        free=("init_weights",),
        lacks=("modules_to_save",),
    ),
)
