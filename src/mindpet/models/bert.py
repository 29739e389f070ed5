"""BERT: Pre-training of Deep Bidirectional Transformers. Devlin et al. 2018, arXiv:1810.04805.

Cells have Hugging Face's paths (``bert.encoder.layer.0.attention.self.query``). Between the embeddings and the head
everything is a matrix of rows, ``(batch * seq, hidden)``: a batched product against a plain weight is many times slower
on a CPU.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal
from mindspore.nn.utils import no_init_parameters

from mindpet import _checks, _files
from mindpet.delta.adaption_slot import AdaptionSlot, attend_prompt
from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.delta.prompt_slot import PromptSlot, before_rows, ones_before
from mindpet.models.attention import DotProductAttention, attend
from mindpet.models.loading import LoadReport, Outline, PretrainedFilesError, load_tensors, require_outline

_ACTIVATIONS = {
    "gelu": lambda: nn.GELU(approximate=False),
    "gelu_new": nn.GELU,
    "gelu_pytorch_tanh": nn.GELU,
    "relu": nn.ReLU,
}


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The sizes of a BERT, under the names of Hugging Face's ``config.json``."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "max_position_embeddings", "type_vocab_size"):
            _checks.positive_int("BertConfig", name, getattr(self, name))
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"):
            _checks.rate("BertConfig", name, getattr(self, name), allow_int=True)
        _checks.non_zero_number("BertConfig", "layer_norm_eps", self.layer_norm_eps)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"For 'BertConfig', 'hidden_size' ({self.hidden_size}) must be a multiple of 'num_attention_heads' "
                f"({self.num_attention_heads})."
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"For 'BertConfig', 'hidden_act' must be one of {', '.join(_ACTIVATIONS)}, "
                f"but got {_checks.shown(self.hidden_act)}."
            )

    @classmethod
    def from_json(cls, path: Path) -> "BertConfig":
        """The configuration in a ``config.json``; keys that do not concern the network are passed over.

        Raises:
            PretrainedFilesError: not a file, not JSON, not a BERT, a feature that this network does not have.
        """
        return cls.from_content(_files.read_json(path, PretrainedFilesError), str(path))

    @classmethod
    def from_content(cls, content: Any, source: str) -> "BertConfig":
        """As :meth:`from_json`, of the content; `source` is named in errors."""
        if not isinstance(content, dict) or content.get("model_type", "bert") != "bert":
            kind = content.get("model_type") if isinstance(content, dict) else type(content).__name__
            raise PretrainedFilesError(f"{source} is of a {kind!r}, not of a BERT ('model_type': 'bert').")
        if content.get("position_embedding_type", "absolute") != "absolute":
            raise PretrainedFilesError(f"{source}: only absolute position embeddings are supported.")
        known = {entry.name for entry in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in content.items() if key in known})
        except (TypeError, ValueError) as error:
            raise PretrainedFilesError(f"{source}: {error}") from error

    def outline(self) -> Outline:
        """What these sizes mean for the files."""
        hidden, layer, embeddings = self.hidden_size, "bert.encoder.layer.", "bert.embeddings."
        shapes = {
            f"{embeddings}word_embeddings.weight": (self.vocab_size, hidden),
            f"{embeddings}position_embeddings.weight": (self.max_position_embeddings, hidden),
            f"{embeddings}token_type_embeddings.weight": (self.type_vocab_size, hidden),
            f"{layer}0.intermediate.dense.weight": (self.intermediate_size, hidden),
        }
        return Outline(layer, self.num_hidden_layers, shapes)


class BertEmbeddings(nn.Cell):
    """Word, position and segment embeddings, summed and normalised: ``(batch, seq)`` to ``(batch * seq, hidden)``.

    The first token has the position `start`. Virtual tokens `prompts`, ``(tokens, hidden)``, go before those of every
    sample: they are of type 0, and what comes out is ``(batch * (tokens + seq), hidden)``.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        start = Normal(config.initializer_range)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, embedding_table=start)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, embedding_table=start
        )
        self.positions = config.max_position_embeddings
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size, embedding_table=start)
        self.LayerNorm = nn.LayerNorm((config.hidden_size,), epsilon=config.layer_norm_eps)
        self.dropout = nn.Dropout(p=config.hidden_dropout_prob)

    def construct(self, input_ids, token_type_ids, start=0, prompts=None):
        seq, virtual = input_ids.shape[1], 0 if prompts is None else prompts.shape[0]
        before = start + virtual
        if before + seq > self.positions:
            raise ValueError(f"{seq} tokens after a prefix of {before} are more than the {self.positions} positions.")
        words = self.word_embeddings(input_ids)  # (batch, seq, hidden)
        if prompts is not None:
            words = before_rows(prompts, words)
            token_type_ids = ops.concat((ops.zeros((words.shape[0], virtual), token_type_ids.dtype), token_type_ids), 1)
            seq = virtual + seq
        total = words + self.token_type_embeddings(token_type_ids)  # (batch, seq, hidden)
        total = total + self.position_embeddings(ops.arange(start, start + seq))
        rows = total.reshape((-1, total.shape[-1]))  # (batch * seq, hidden)
        return self.dropout(self.LayerNorm(rows))


class BertSelfAttention(nn.Cell):
    """Attention of every position to every other, and to a prefix where there is one."""

    def __init__(self, config: BertConfig):
        super().__init__()
        hidden, start = config.hidden_size, Normal(config.initializer_range)
        self.query = nn.Dense(hidden, hidden, weight_init=start, bias_init="zeros")
        self.key = nn.Dense(hidden, hidden, weight_init=start, bias_init="zeros")
        self.value = nn.Dense(hidden, hidden, weight_init=start, bias_init="zeros")
        heads = config.num_attention_heads
        self.core = DotProductAttention(heads, heads, hidden // heads, config.attention_probs_dropout_prob)
        self.adaption = AdaptionSlot(hidden)
        self.head_dim = hidden // heads

    def construct(self, rows, mask, prefix):
        batch, hidden = mask.shape[0], rows.shape[-1]
        query = self.query(rows).reshape((batch, -1, hidden))
        key = self.key(rows).reshape((batch, -1, hidden))
        value = self.value(rows).reshape((batch, -1, hidden))
        mixed = attend(self.core, query, key, value, mask, prefix)
        prompt = self.adaption()
        if len(prompt) > 0:
            virtual = prompt[0].astype(rows.dtype)  # (tokens, hidden)
            mixed = mixed + attend_prompt(query, self.key(virtual), self.value(virtual), prompt[1], self.head_dim)
        return mixed.reshape((-1, hidden))


class BertOutput(nn.Cell):
    """Dense, dropout, and the residual connection with its LayerNorm."""

    def __init__(self, in_size: int, config: BertConfig):
        super().__init__()
        start = Normal(config.initializer_range)
        self.dense = nn.Dense(in_size, config.hidden_size, weight_init=start, bias_init="zeros")
        self.LayerNorm = nn.LayerNorm((config.hidden_size,), epsilon=config.layer_norm_eps)
        self.dropout = nn.Dropout(p=config.hidden_dropout_prob)

    def construct(self, rows, residual):
        return self.LayerNorm(self.dropout(self.dense(rows)) + residual)


class BertAttention(nn.Cell):
    """Self-attention and its output."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def construct(self, rows, mask, prefix):
        return self.output(self.self(rows, mask, prefix), rows)


class BertIntermediate(nn.Cell):
    """The first half of the feed-forward network."""

    def __init__(self, config: BertConfig):
        super().__init__()
        start = Normal(config.initializer_range)
        self.dense = nn.Dense(config.hidden_size, config.intermediate_size, weight_init=start, bias_init="zeros")
        self.activation = _ACTIVATIONS[config.hidden_act]()

    def construct(self, rows):
        return self.activation(self.dense(rows))


class BertLayer(nn.Cell):
    """Attention, then the feed-forward network."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def construct(self, rows, mask, prefix):
        rows = self.attention(rows, mask, prefix)
        return self.output(self.intermediate(rows), rows)


class BertEncoder(nn.Cell):
    """The layers, and the slot for prefix methods."""

    def __init__(self, config: BertConfig):
        super().__init__()
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.layer = nn.CellList([BertLayer(config) for _ in range(config.num_hidden_layers)])
        self.prefix = PrefixSlot(config.num_hidden_layers, heads, hidden // heads)

    def construct(self, rows, mask, pairs):
        if len(pairs) > 0:
            tokens = pairs[0][0].shape[0]
            visible = ops.zeros((mask.shape[0], 1, 1, tokens), mask.dtype)
            mask = ops.concat((visible, mask), -1)  # (batch, 1, 1, tokens + seq)
        for index in range(len(self.layer)):
            rows = self.layer[index](rows, mask, pairs[index] if len(pairs) > 0 else None)
        return rows


class BertPooler(nn.Cell):
    """The first position of each sample through a dense layer and tanh: (batch * seq, hidden) -> (batch, hidden)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        start = Normal(config.initializer_range)
        self.dense = nn.Dense(config.hidden_size, config.hidden_size, weight_init=start, bias_init="zeros")
        self.tanh = ops.Tanh()

    def construct(self, rows, batch):
        first = rows.reshape((batch, -1, rows.shape[-1]))[:, 0]
        return self.tanh(self.dense(first))


class BertModel(nn.Cell):
    """The encoder without a head.

    Shapes: `input_ids`, `attention_mask` (1 for a token, 0 for padding) and `token_type_ids` are ``(batch, seq)``; it
    returns the last layer ``(batch, seq, hidden)`` and the pooled first position ``(batch, hidden)``, which is a
    virtual token where there are some in its slot for prompt methods.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)
        self.prompts = PromptSlot(self.embeddings.word_embeddings)
        self.hidden_size = config.hidden_size

    def construct(self, input_ids, attention_mask, token_type_ids):
        batch = input_ids.shape[0]
        pairs = self.encoder.prefix()
        start = pairs[0][0].shape[0] if len(pairs) > 0 else 0  # as in the original, a prefix takes the first positions
        prompts = self.prompts()
        rows = self.embeddings(input_ids, token_type_ids, start, prompts)
        if prompts is not None:
            attention_mask = ones_before(attention_mask, prompts.shape[0])
        hidden_from = -1e9 if rows.dtype == mstype.float32 else -3e4
        mask = (1.0 - attention_mask.astype(rows.dtype)).reshape((batch, 1, 1, -1)) * hidden_from
        rows = self.encoder(rows, mask, pairs)
        layer = rows.reshape((batch, -1, self.hidden_size))  # (batch, seq, hidden), virtual tokens among them
        if prompts is not None:
            layer = layer[:, prompts.shape[0] :]
        return layer, self.pooler(rows, batch)


class BertForSequenceClassification(nn.Cell):
    """BERT with a dense head over its pooled first position, or over the mean of its tokens.

    Args:
        config: the sizes.
        num_labels: classes.
        pooling: ``"pooler"``, as Hugging Face's, or ``"mean"`` over the tokens that are not padding.

    Returns logits ``(batch, num_labels)``.
    """

    def __init__(self, config: BertConfig, num_labels: int = 2, pooling: str = "pooler"):
        super().__init__()
        if pooling not in ("pooler", "mean"):
            raise ValueError(f"'pooling' must be 'pooler' or 'mean', but got {_checks.shown(pooling)}.")
        num_labels = _checks.positive_int(type(self).__name__, "num_labels", num_labels)
        self.config, self.pooling = config, pooling
        self.mindpet_idle = ("bert.pooler",) if pooling == "mean" else ()  # is there for the files, and never called
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(p=config.hidden_dropout_prob)
        start = Normal(config.initializer_range)
        self.classifier = nn.Dense(config.hidden_size, num_labels, weight_init=start, bias_init="zeros")

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, num_labels: int = 2, pooling: str = "pooler", **changes: Any
    ) -> tuple["BertForSequenceClassification", LoadReport]:
        """The network with the sizes and the weights that :func:`~mindpet.models.pretrained.open_pretrained` reads.

        Args:
            directory: in Hugging Face's layout, or a file of multilingual-e5-small.
            num_labels: classes; the head starts anew when the files have none.
            pooling: see the class.
            changes: what is to differ from ``config.json``, for instance ``hidden_dropout_prob=0.0``.

        Returns:
            The network and what became of each tensor.

        Raises:
            PretrainedFilesError: a file is missing or broken, or does not fit; all problems in one message.
        """
        from mindpet.models.pretrained import open_pretrained

        pretrained = open_pretrained(directory)
        config = dataclasses.replace(BertConfig.from_content(pretrained.config, str(directory)), **changes)
        tensors = pretrained.tensors()
        require_outline(cls.__name__, config.outline(), tensors, "bert.")
        with no_init_parameters():  # random numbers for a large table take longer than reading it
            network = cls(config, num_labels, pooling)
        report = load_tensors(network, tensors, "bert.", optional=("classifier.", "bert.pooler."))
        for parameter in network.get_parameters():
            parameter.init_data()  # of what the files do not have
        return network, report

    def construct(self, input_ids, attention_mask, token_type_ids):
        hidden, pooled = self.bert(input_ids, attention_mask, token_type_ids)
        if self.pooling == "mean":
            pooled = mean_pool(hidden, attention_mask)
        return self.classifier(self.dropout(pooled))


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over the tokens that are not padding: (batch, seq, hidden) -> (batch, hidden)."""
    mask = attention_mask.astype(hidden.dtype).expand_dims(-1)  # (batch, seq, 1)
    return (hidden * mask).sum(1) / ops.maximum(mask.sum(1), 1.0)
