"""GPT-2: Language Models are Unsupervised Multitask Learners. Radford et al. 2019, section 2.3.

Learned positions, LayerNorm before each block and after the last, the tanh form of GELU, one dense layer for query, key
and value. Cells have Hugging Face's paths (``transformer.h.0.attn.c_attn``). The dense layers store ``(out, in)``;
Hugging Face's files hold them as ``(in, out)``, and are read and written so.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mindspore import nn, ops

from mindpet import _checks
from mindpet.delta.adaption_slot import AdaptionSlot, attend_prompt
from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.delta.prompt_slot import PromptSlot
from mindpet.models.attention import DotProductAttention, attend
from mindpet.models.causal import CausalLanguageModel, embedded, read_config, start_of, table_of, to_add
from mindpet.models.head import CrossEntropy, HeadLoss, TiedHead
from mindpet.models.loading import Outline, PretrainedFilesError


class GELUTanh(nn.Cell):
    r"""GELU's tanh form, without the tanh, which is coarse on a CPU: :math:`\tfrac12(1 + \tanh z) = \sigma(2z)`.

    .. math:: y = x\, \sigma\bigl(2\sqrt{2/\pi}\,(x + 0.044715\, x^3)\bigr)
    """

    mindpet_kernel = "gelu_tanh"  # what mindpet.kernels.accelerate replaces it by

    def __init__(self):
        super().__init__()
        self.sigmoid = ops.Sigmoid()
        self.scale = 2.0 * math.sqrt(2.0 / math.pi)

    def construct(self, x):
        return x * self.sigmoid(self.scale * x * (1.0 + 0.044715 * x * x))


_ACTIVATIONS = {
    "gelu_new": GELUTanh,
    "gelu_pytorch_tanh": GELUTanh,
    "gelu": lambda: nn.GELU(approximate=False),
    "relu": nn.ReLU,
}
# what would compute something else, and the value with which it does not
_PLAIN = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The sizes of a GPT-2, under the names of Hugging Face's ``config.json``.

    None for `n_inner` is four times the hidden size.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = None  # type: ignore[assignment]  # set below
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self):
        if self.n_inner is None:
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            _checks.positive_int("GPT2Config", name, getattr(self, name))
        if self.n_embd % self.n_head:
            raise ValueError(
                f"For 'GPT2Config', 'n_embd' ({self.n_embd}) must be a multiple of 'n_head' ({self.n_head})."
            )
        if self.activation_function not in _ACTIVATIONS:
            raise ValueError(
                f"For 'GPT2Config', 'activation_function' must be one of {', '.join(_ACTIVATIONS)}, "
                f"but got {_checks.shown(self.activation_function)}."
            )
        _checks.non_zero_number("GPT2Config", "layer_norm_epsilon", self.layer_norm_epsilon)
        _checks.boolean("GPT2Config", "tie_word_embeddings", self.tie_word_embeddings)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            _checks.rate("GPT2Config", name, getattr(self, name), allow_int=True)

    @classmethod
    def from_content(cls, content: dict[str, Any], source: str) -> "GPT2Config":
        """The configuration in the content of a ``config.json``; what does not concern the network is passed over.

        Raises:
            PretrainedFilesError: not a GPT-2, or one with a feature that this network does not have.
        """
        for key, plain in _PLAIN.items():
            if content.get(key, plain) is not plain:
                raise PretrainedFilesError(f"{source}: {key} is {content[key]!r}, but only {plain!r} is supported.")
        return read_config(cls, content, source, {entry.name for entry in dataclasses.fields(cls)}, "gpt2")

    def outline(self) -> Outline:
        """What these sizes mean for the files."""
        hidden, layer = self.n_embd, "transformer.h."
        shapes = {
            "transformer.wte.weight": (self.vocab_size, hidden),
            "transformer.wpe.weight": (self.n_positions, hidden),
            f"{layer}0.mlp.c_fc.weight": (hidden, self.n_inner),
        }
        return Outline(layer, self.n_layer, shapes)


class GPT2Attention(nn.Cell):
    """Attention of every token to those it may see."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.heads, self.head_dim = config.n_head, config.n_embd // config.n_head
        self.c_attn = _dense(config.n_embd, 3 * config.n_embd, config)
        self.c_proj = _dense(config.n_embd, config.n_embd, config)
        self.resid_dropout = nn.Dropout(p=config.resid_pdrop)
        self.core = DotProductAttention(self.heads, self.heads, self.head_dim, config.attn_pdrop)
        self.adaption = AdaptionSlot(config.n_embd)

    def construct(self, rows, mask, extra):
        batch, width = mask.shape[0], self.heads * self.head_dim
        parts = self.c_attn(rows).reshape((batch, -1, 3 * width))
        query, key, value = parts[..., :width], parts[..., width : 2 * width], parts[..., 2 * width :]
        mixed = attend(self.core, query, key, value, mask, extra)  # (batch, seq, heads * head_dim)
        mixed = self.resid_dropout(self.c_proj(mixed.reshape((-1, width))))
        prompt = self.adaption()
        if len(prompt) > 0:  # past the output projection, where PEFT has it
            virtual = self.c_attn(prompt[0].astype(rows.dtype))  # (tokens, 3 * width)
            key, value = virtual[:, width : 2 * width], virtual[:, 2 * width :]
            found = attend_prompt(query, key, value, prompt[1], self.head_dim)
            mixed = mixed + found.reshape((-1, width))
        return mixed


class GPT2MLP(nn.Cell):
    """The feed-forward network."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = _dense(config.n_embd, config.n_inner, config)
        self.c_proj = _dense(config.n_inner, config.n_embd, config)
        self.act = _ACTIVATIONS[config.activation_function]()
        self.dropout = nn.Dropout(p=config.resid_pdrop)

    def construct(self, rows):
        return self.dropout(self.c_proj(self.act(self.c_fc(rows))))


class GPT2Block(nn.Cell):
    """Attention, then the feed-forward network, each on normalised rows and added to what came in."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm((config.n_embd,), epsilon=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config)
        self.ln_2 = nn.LayerNorm((config.n_embd,), epsilon=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def construct(self, rows, mask, extra):
        rows = rows + self.attn(self.ln_1(rows), mask, extra)
        return rows + self.mlp(self.ln_2(rows))


class GPT2Model(nn.Cell):
    """The embeddings, the layers, the last norm, and the slots for prefix and prompt methods."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        start = start_of(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, embedding_table=start)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd, embedding_table=start)
        self.drop = nn.Dropout(p=config.embd_pdrop)
        self.h = nn.CellList([GPT2Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm((config.n_embd,), epsilon=config.layer_norm_epsilon)
        self.prefix = PrefixSlot(config.n_layer, config.n_head, config.n_embd // config.n_head)
        self.prompts = PromptSlot(self.wte)
        self.last = config.n_positions - 1

    def construct(self, input_ids, positions, hidden, extras):
        places = ops.minimum(positions, self.last).reshape(-1)  # in a cache, padding stands behind everything
        words = embedded(self.wte, input_ids.reshape(-1), self.prompts())  # (batch * seq, hidden)
        rows = self.drop(words + self.wpe(places))
        mask = to_add(hidden, rows.dtype)
        for index in range(len(self.h)):
            rows = self.h[index](rows, mask, extras[index] if len(extras) > 0 else None)
        return self.ln_f(rows)


class GPT2LMHeadModel(CausalLanguageModel):
    """GPT-2 with its head, which shares the embedding's table.

    See :class:`~mindpet.models.causal.CausalLanguageModel` for inputs, generation and loading.

    >>> from mindspore import int32
    >>> network = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    >>> network(ops.ones((2, 5), int32), ops.ones((2, 5), int32)).shape
    (2, 5, 11)
    """

    gives_losses = True  # where it gets labels, see the base class; a subclass says it again
    base_prefix = "transformer."
    config_class = GPT2Config
    transposed = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight")
    not_weights = (".attn.bias", ".attn.masked_bias")

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config, self.positions = config, config.n_positions
        self.transformer = GPT2Model(config)
        self.tied = config.tie_word_embeddings
        self.losses = HeadLoss() if self.tied else CrossEntropy()
        if self.tied:
            self.head = TiedHead()
        else:
            start = start_of(config)
            self.lm_head = nn.Dense(config.n_embd, config.vocab_size, weight_init=start, has_bias=False)

    @property
    def prefix_slot(self) -> PrefixSlot:
        """At ``transformer.prefix``."""
        return self.transformer.prefix

    @property
    def prompt_slot(self) -> PromptSlot:
        """At ``transformer.prompts``."""
        return self.transformer.prompts

    def construct(self, input_ids, attention_mask, labels=None):
        return self.predict(
            input_ids, attention_mask, self.transformer.prefix(), self.transformer.prompts.tokens, labels
        )

    def hidden_rows(self, input_ids, positions, hidden, extras):
        return self.transformer(input_ids, positions, hidden, extras)

    def embedding(self) -> nn.Cell:
        return self.transformer.wte

    def head_table(self):
        return table_of(self.transformer.wte) if self.tied else None


def _dense(in_size: int, out_size: int, config: GPT2Config) -> nn.Dense:
    return nn.Dense(in_size, out_size, weight_init=start_of(config), bias_init="zeros")
