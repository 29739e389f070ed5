"""LoRA beside an embedding. Hu et al. 2021, arXiv:2106.09685, section 4.1, with one-hot rows as the input.

A one-hot input selects a column of A, so no product with the vocabulary is computed.
"""

from typing import TYPE_CHECKING

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal, initializer

from mindpet.delta.lora_start import random_start

if TYPE_CHECKING:
    from mindpet.delta.lora import LoRAConfig


class LoRAEmbedding(nn.Embedding):
    r"""An embedding with a trainable low-rank table beside its own.

    .. math:: y_i = E_i + \tfrac{\alpha}{r}\, (A_{:,i})^T B^T

    Shapes: i any shape of ints, E ``(vocabulary, dim)``, A ``(rank, vocabulary)``, B ``(dim, rank)``, y ``(..., dim)``.
    A starts at zero and B normal, so the layer starts as the embedding it replaces. Cost:
    ``rank * (vocabulary + dim)`` parameters and ``2 * (rank + 1) * dim`` floating-point operations a row.
    """

    delta_method = "lora"

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config: "LoRAConfig") -> "LoRAEmbedding":
        """The same embedding, its table shared, with a new branch in the dtype of the table.

        Raises:
            ValueError: a start for dense layers. (``gaussian`` starts as ``kaiming`` does here.)

        >>> from mindpet.delta.lora import LoRAConfig
        >>> layer = LoRAEmbedding.from_embedding(nn.Embedding(10, 4), LoRAConfig(rank=2))
        >>> layer(Tensor([[1, 2, 3]])).shape
        (1, 3, 4)
        """
        random_start(config, cls.__name__)
        layer = cls.__new__(cls)
        nn.Cell.__init__(layer)
        layer.embedding_table = embedding.embedding_table
        layer.vocab_size, layer.embedding_size = embedding.embedding_table.shape
        dtype = embedding.embedding_table.dtype
        layer.mindpet_delta_lora_a = Parameter(
            initializer("zeros", (config.rank, layer.vocab_size), dtype), name="mindpet_delta_lora_a"
        )
        layer.mindpet_delta_lora_b = Parameter(
            initializer(Normal(1.0), (layer.embedding_size, config.rank), dtype), name="mindpet_delta_lora_b"
        )
        layer.lora_rank, layer.lora_alpha = config.rank, config.scaled_alpha
        layer.scaling = config.scaled_alpha / config.rank
        layer.matmul = ops.MatMul(transpose_b=True)
        layer.set_train(embedding.training)
        return layer

    def construct(self, ids):
        rows = ids.reshape((-1,))
        out = ops.gather(self.embedding_table, rows, 0)  # (rows, dim)
        branch = ops.gather(self.mindpet_delta_lora_a, rows, 1).transpose((1, 0))  # (rows, rank)
        out = out + self.matmul(branch, self.mindpet_delta_lora_b) * self.scaling
        return out.reshape(ids.shape + (self.embedding_size,))

    @property
    def base_weight(self) -> Parameter:
        """The table that a delta is added to in merging."""
        return self.embedding_table

    def delta_weight(self) -> Tensor:
        """What the branch adds to the table: ``alpha / rank * (B A)^T``, shape ``(vocabulary, dim)``."""
        a, b = (p.astype(mstype.float32) for p in (self.mindpet_delta_lora_a, self.mindpet_delta_lora_b))
        return ops.matmul(b, a).transpose((1, 0)) * self.scaling

    def extend_repr(self) -> str:
        """For printing."""
        return f"vocab_size={self.vocab_size}, embedding_size={self.embedding_size}, rank={self.lora_rank}"
