"""LLaMA: Open and Efficient Foundation Language Models. Touvron et al. 2023, arXiv:2302.13971, section 2.2.

RMSNorm before each block (Zhang and Sennrich 2019, arXiv:1910.07467), rotary positions (Su et al. 2021,
arXiv:2104.09864), SwiGLU (Shazeer 2020, arXiv:2002.05202), and groups of queries that share a key and a value (Ainslie
et al. 2023, arXiv:2305.13245). Cells have Hugging Face's paths (``model.layers.0.self_attn.q_proj``).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import initializer

from mindpet import _checks
from mindpet.delta.adaption_slot import AdaptionSlot, attend_prompt
from mindpet.delta.prefix_slot import PrefixSlot
from mindpet.delta.prompt_slot import PromptSlot
from mindpet.models.attention import DotProductAttention, attend
from mindpet.models.causal import CausalLanguageModel, embedded, read_config, start_of, table_of, to_add
from mindpet.models.head import CrossEntropy, HeadLoss, TiedHead
from mindpet.models.loading import Outline, PretrainedFilesError
from mindpet.models.short import short_attention, short_mlp


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The sizes of a LLaMA, under the names of Hugging Face's ``config.json``.

    None for `num_key_value_heads` is one for each query head, and for `head_dim` the hidden size over the heads.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # set below
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "max_position_embeddings"):
            _checks.positive_int("LlamaConfig", name, getattr(self, name))
        if self.head_dim is None:
            _multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _multiple("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        if _checks.positive_int("LlamaConfig", "head_dim", self.head_dim) % 2:
            raise ValueError(f"For 'LlamaConfig', 'head_dim' must be even, but got {_checks.shown(self.head_dim)}.")
        for name in ("rms_norm_eps", "rope_theta"):
            _checks.non_zero_number("LlamaConfig", name, getattr(self, name))
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            _checks.boolean("LlamaConfig", name, getattr(self, name))
        if self.hidden_act != "silu":
            raise ValueError(
                f"For 'LlamaConfig', 'hidden_act' must be 'silu', but got {_checks.shown(self.hidden_act)}."
            )
        _checks.rate("LlamaConfig", "attention_dropout", self.attention_dropout, allow_int=True)

    @classmethod
    def from_content(cls, content: dict[str, Any], source: str) -> "LlamaConfig":
        """The configuration in the content of a ``config.json``; what does not concern the network is passed over.

        Raises:
            PretrainedFilesError: not a LLaMA, or one with a feature that this network does not have.
        """
        parts = [content.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
        if not all(isinstance(part, dict) for part in parts):
            raise PretrainedFilesError(f"{source}: rope_parameters and rope_scaling must be objects or null.")
        rope = {**parts[0], **parts[1]}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise PretrainedFilesError(
                f"{source}: rotary positions of the type {kind!r} (rope_scaling) are not supported, only plain ones."
            )
        if content.get("sliding_window"):
            raise PretrainedFilesError(f"{source}: attention in a sliding_window is not supported.")
        if "rope_theta" in rope:
            content = {"rope_theta": rope["rope_theta"], **content}
        return read_config(cls, content, source, {entry.name for entry in dataclasses.fields(cls)}, "llama")

    def outline(self) -> Outline:
        """What these sizes mean for the files."""
        hidden, layer = self.hidden_size, "model.layers."
        shapes = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            f"{layer}0.self_attn.q_proj.weight": (self.num_attention_heads * self.head_dim, hidden),
            f"{layer}0.self_attn.k_proj.weight": (self.num_key_value_heads * self.head_dim, hidden),
            f"{layer}0.mlp.up_proj.weight": (self.intermediate_size, hidden),
        }
        return Outline(layer, self.num_hidden_layers, shapes)


def _multiple(name: str, value: int, of_name: str, of: int) -> None:
    if value % of:
        raise ValueError(f"For 'LlamaConfig', '{name}' ({value}) must be a multiple of '{of_name}' ({of}).")


class RMSNorm(nn.Cell):
    r"""Scaled to a root mean square of 1, then by a weight: :math:`y = w\, x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`.

    Shapes: x and y ``(..., hidden)``, w ``(hidden,)``. It is computed in float32.
    """

    mindpet_kernel = "rms_norm"  # what mindpet.kernels.accelerate replaces it by

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = Parameter(initializer("ones", (size,)), name="weight")
        self.epsilon = epsilon
        self.mean = ops.ReduceMean(keep_dims=True)
        self.rsqrt = ops.Rsqrt()

    def construct(self, x):
        wide = x.astype(mstype.float32)
        scaled = wide * self.rsqrt(self.mean(wide * wide, -1) + self.epsilon)
        return scaled.astype(x.dtype) * self.weight


class SwiGLU(nn.Cell):
    r"""A gate over values: :math:`y = \mathrm{silu}(g)\, u`, with :math:`\mathrm{silu}(g) = g / (1 + e^{-g})`."""

    mindpet_kernel = "gated_silu"

    def __init__(self):
        super().__init__()
        self.sigmoid = ops.Sigmoid()

    def construct(self, gate, up):
        return gate * self.sigmoid(gate) * up


class Rotary(nn.Cell):
    r"""Turns the pairs (x_i, x_{i + d/2}) of each head by angles that grow with the position.

    .. math:: \phi_{p,i} = p\, \theta^{-2i/d}

    Called with positions ``(batch, n)`` it gives cosines and signed sines for :class:`Turn`, each ``(batch, n, 1, d)``.
    """

    def __init__(self, size: int, theta: float):
        super().__init__()
        self.speeds = Tensor([theta ** (-2.0 * i / size) for i in range(size // 2)], mstype.float32)

    def construct(self, positions, dtype):
        angles = positions.astype(mstype.float32).expand_dims(-1) * self.speeds  # (batch, n, d / 2)
        cos, sin = ops.cos(angles).astype(dtype), ops.sin(angles).astype(dtype)
        return ops.concat((cos, cos), -1).expand_dims(2), ops.concat((-sin, sin), -1).expand_dims(2)


class Turn(nn.Cell):
    """Rotate ``(batch, n, heads, d)`` by what :class:`Rotary` gives: x cos + (the other half of x) sin."""

    mindpet_kernel = "rotary"

    def construct(self, x, cos, sin):
        half = x.shape[-1] // 2
        swapped = ops.concat((x[..., half:], x[..., :half]), -1)
        return x * cos + swapped * sin


class LlamaAttention(nn.Cell):
    """Attention of every token to those it may see; each key and value serves a group of query heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = _dense(hidden, self.heads * self.head_dim, config.attention_bias, config)
        self.k_proj = _dense(hidden, self.kv_heads * self.head_dim, config.attention_bias, config)
        self.v_proj = _dense(hidden, self.kv_heads * self.head_dim, config.attention_bias, config)
        self.o_proj = _dense(self.heads * self.head_dim, hidden, config.attention_bias, config)
        self.core = DotProductAttention(self.heads, self.kv_heads, self.head_dim, config.attention_dropout)
        self.adaption = AdaptionSlot(hidden)
        self.turn = Turn()

    def construct(self, rows, mask, cos, sin, extra):
        batch = mask.shape[0]
        query = self.turned(self.q_proj(rows), batch, cos, sin)  # (batch, seq, heads * dim)
        key = self.turned(self.k_proj(rows), batch, cos, sin)  # (batch, seq, kv_heads * dim)
        value = self.v_proj(rows).reshape((batch, -1, self.kv_heads * self.head_dim))
        mixed = attend(self.core, query, key, value, mask, extra)
        prompt = self.adaption()
        if len(prompt) > 0:
            virtual = prompt[0].astype(rows.dtype)  # (tokens, hidden)
            mixed = mixed + attend_prompt(query, self.k_proj(virtual), self.v_proj(virtual), prompt[1], self.head_dim)
        return self.o_proj(mixed.reshape((-1, self.heads * self.head_dim)))

    def turned(self, rows, batch, cos, sin):
        """Rotate every head of (batch * seq, heads * head_dim), as (batch, seq, heads * head_dim)."""
        parts = rows.reshape((batch, -1, rows.shape[-1] // self.head_dim, self.head_dim))
        return self.turn(parts, cos, sin).reshape((batch, -1, rows.shape[-1]))


class LlamaMLP(nn.Cell):
    """The feed-forward network."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = _dense(hidden, wide, config.mlp_bias, config)
        self.up_proj = _dense(hidden, wide, config.mlp_bias, config)
        self.down_proj = _dense(wide, hidden, config.mlp_bias, config)
        self.act = SwiGLU()

    def construct(self, rows):
        return self.down_proj(self.act(self.gate_proj(rows), self.up_proj(rows)))


class LlamaDecoderLayer(nn.Cell):
    """Attention, then the feed-forward network, each on normalised rows and added to what came in."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.short_attention: Any = None  # for a few rows: see mindpet.models.short
        self.short_mlp: Any = None

    def construct(self, rows, mask, cos, sin, extra):
        if self.short_attention is not None and self.short_attention.takes_few_of(rows, mask, cos, extra):
            rows = self.short_attention(rows, mask, cos, sin, extra)
        else:
            rows = rows + self.self_attn(self.input_layernorm(rows), mask, cos, sin, extra)
        if self.short_mlp is not None and self.short_mlp.takes_few(rows):
            return self.short_mlp(rows)
        return rows + self.mlp(self.post_attention_layernorm(rows))

    def shortened(self):
        """What can stand for its two halves, or None; in training nothing does."""
        first = second = None
        if self.training:
            return first, second
        if type(self.self_attn) is LlamaAttention and type(self.self_attn.adaption) is AdaptionSlot:
            first = short_attention(self.input_layernorm, self.self_attn)
        if type(self.mlp) is LlamaMLP:
            second = short_mlp(self.post_attention_layernorm, self.mlp)
        return first, second


class LlamaModel(nn.Cell):
    """The embedding, the layers, the last norm, and the slots for prefix and prompt methods."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        start = start_of(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, embedding_table=start)
        self.layers = nn.CellList([LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.head_dim, config.rope_theta)
        self.prefix = PrefixSlot(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        self.prompts = PromptSlot(self.embed_tokens)

    def construct(self, input_ids, positions, hidden, extras):
        rows = embedded(self.embed_tokens, input_ids.reshape(-1), self.prompts())  # (batch * seq, hidden)
        cos, sin = self.rotary(positions, rows.dtype)
        mask = to_add(hidden, rows.dtype)
        for index in range(len(self.layers)):
            rows = self.layers[index](rows, mask, cos, sin, extras[index] if len(extras) > 0 else None)
        return self.norm(rows)


class LlamaForCausalLM(CausalLanguageModel):
    """LLaMA with its head, which may share the embedding's table.

    See :class:`~mindpet.models.causal.CausalLanguageModel` for inputs, generation and loading.

    >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    >>> network = LlamaForCausalLM(LlamaConfig(vocab_size=11, num_key_value_heads=2, **sizes))
    >>> network(ops.ones((2, 5), mstype.int32), ops.ones((2, 5), mstype.int32)).shape
    (2, 5, 11)
    """

    gives_losses = True  # where it gets labels, see the base class; a subclass says it again
    base_prefix = "model."
    config_class = LlamaConfig
    not_weights = ("rotary_emb.inv_freq",)

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.positions = config, config.max_position_embeddings
        self.model = LlamaModel(config)
        self.tied = config.tie_word_embeddings
        self.losses = HeadLoss() if self.tied else CrossEntropy()
        if self.tied:
            self.head = TiedHead()
        else:
            self.lm_head = _dense(config.hidden_size, config.vocab_size, False, config)

    @property
    def prefix_slot(self) -> PrefixSlot:
        """At ``model.prefix``."""
        return self.model.prefix

    @property
    def prompt_slot(self) -> PromptSlot:
        """At ``model.prompts``."""
        return self.model.prompts

    def construct(self, input_ids, attention_mask, labels=None):
        return self.predict(input_ids, attention_mask, self.model.prefix(), self.model.prompts.tokens, labels)

    def hidden_rows(self, input_ids, positions, hidden, extras):
        return self.model(input_ids, positions, hidden, extras)

    def embedding(self) -> nn.Cell:
        return self.model.embed_tokens

    def head_table(self):
        return table_of(self.model.embed_tokens) if self.tied else None


def _dense(in_size: int, out_size: int, has_bias: bool, config: LlamaConfig) -> nn.Dense:
    start = start_of(config)
    return nn.Dense(in_size, out_size, weight_init=start, bias_init="zeros", has_bias=has_bias)
