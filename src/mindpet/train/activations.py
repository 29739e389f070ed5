r"""What a training step keeps in memory besides weights: a model of our networks' layers, tensor by tensor.

Graph mode keeps a tensor of the forward pass until the backward pass has used it. With n rows (batch times length), h
the hidden size, f the inner size, q and k the sizes of all query heads and of all key heads, a heads, s tokens, t
tokens of a prefix, a layer keeps, in numbers:

.. math::
    \text{queries, keys, values} \quad & n q + 2 n k\,(s + t) / s \\
    \text{attention weights, after softmax} \quad & n\,a\,(s + t) \\
    \text{inputs of the two norms} \quad & 2 n h \\
    \text{input of GELU, or gate and values of SwiGLU} \quad & n f \ \text{or}\ 2 n f

and, only if the weight or a low-rank branch of a dense layer trains that reads it, for the gradient of that weight:

.. math::
    x \text{: queries, keys, values} \quad & n h \\
    m \text{: output of the attention} \quad & n q \\
    y \text{: first half of the feed-forward network} \quad & n h \\
    z \text{: second half} \quad & n f

A method adds, for each adapted layer, n r (LoRA: what B reads), or n (o + 2 b) (adapters: output o of the dense layer,
bottleneck b before and after its activation). A frozen dense layer keeps nothing: its input's gradient needs only the
weight. BitFit keeps nothing besides: the gradient of a bias needs no input. Layers below the lowest one that trains
keep nothing at all.

MindSpore's own operators keep more than `mindpet.kernels` do: the exact GELU is taken apart, which keeps 3 n f in the
place of n f, and its tanh form 5 n f; SwiGLU 4 n f in the place of 2 n f; a RMSNorm whose weight trains n h besides.

The peak is the larger of two moments. At the beginning of the backward pass everything kept is there, and with it

.. math::
    \max(\text{logits, their gradient: } 2 n v; \quad \text{the gradient through the last feed-forward network: }
    n h + 2 n f \text{, or } n h + 3 n f \text{ with SwiGLU})

for v words of a language model; MindSpore's own cross entropy has 5 n v there, and on a CPU our kernel of a frozen tied
head nothing of that size. At the update nothing of that is there,
but each trained number's gradient, scaled, and the largest one unscaled. Dropout is not counted.

Cut over m devices, a tensor between a dense layer that is cut by rows and the next has its features shared out.
Nothing here imports MindSpore.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

PLACES = {  # of a dense layer in its block, by what it reads; the first that matches
    "x": ("*.query", "*.key", "*.value", "*.q_proj", "*.k_proj", "*.v_proj", "*.attn.c_attn", "*.query_key_value"),
    "m": ("*.attention.output.dense", "*.o_proj", "*.attn.c_proj", "*.self_attention.dense"),
    "y": ("*.intermediate.dense", "*.gate_proj", "*.up_proj", "*.mlp.c_fc", "*.dense_h_to_4h"),
    "z": ("*.layer.*.output.dense", "*.down_proj", "*.mlp.c_proj", "*.dense_4h_to_h"),
}
CUTS = ("rows", "columns")
FEWEST_ROWS = 48  # that the kernel of a head takes
_ALTERNATING = {"x": "rows", "m": "columns", "y": "rows", "z": "columns"}


@dataclass(frozen=True)
class LayerSizes:
    """What the model of a layer needs to know of the network.

    Attributes:
        layers: how many.
        hidden: h.
        inner: f.
        queries: q.
        keys: k.
        heads: a.
        key_heads: heads of keys and values.
        gated: whether the feed-forward network is a SwiGLU.
        rms: whether the norms are RMSNorm.
        tanh: whether GELU is in its tanh form.
        vocabulary: v, 0 for a network without a language model's head.
    """

    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    gated: bool
    rms: bool
    tanh: bool
    vocabulary: int

    def width(self, place: str) -> int:
        """Of the input of the dense layers at that place."""
        return {"x": self.hidden, "m": self.queries, "y": self.hidden, "z": self.inner}[place]


def layer_sizes(content: Mapping[str, Any]) -> LayerSizes:
    """From a ``config.json`` that :func:`mindpet.train.presets.network_sizes` takes.

    >>> from mindpet.train.presets import preset
    >>> layer_sizes(preset("llama3-8b")).keys
    1024
    """
    kind = content["model_type"]
    if kind == "gpt2":
        hidden, heads = content["n_embd"], content["n_head"]
        inner = content.get("n_inner") or 4 * hidden
        sizes = (content["n_layer"], hidden, inner, hidden, hidden, heads, heads)
        return LayerSizes(*sizes, gated=False, rms=False, tanh=True, vocabulary=content["vocab_size"])
    hidden = content["hidden_size"]
    if kind == "chatglm":
        size, groups = content["kv_channels"], content["multi_query_group_num"]
        heads = content.get("num_attention_heads") or hidden // size
        layers, inner, words = content["num_layers"], content["ffn_hidden_size"], content["padded_vocab_size"]
    else:
        heads = content["num_attention_heads"]
        size = content.get("head_dim") or hidden // heads
        groups = content.get("num_key_value_heads") or heads
        layers, inner, words = content["num_hidden_layers"], content["intermediate_size"], content["vocab_size"]
    sizes = (layers, hidden, inner, heads * size, groups * size, heads, groups)
    if kind == "bert":
        return LayerSizes(*sizes, gated=False, rms=False, tanh=False, vocabulary=0)
    return LayerSizes(*sizes, gated=True, rms=True, tanh=False, vocabulary=words)


def positions_of(content: Mapping[str, Any]) -> int | None:
    """How many tokens the network has positions for; None where rotary positions have no end that is known."""
    if content["model_type"] == "gpt2":
        return content.get("n_positions") or 1024
    return content.get("max_position_embeddings") or (512 if content["model_type"] == "bert" else None)


def place_of(path: str) -> str:
    """Which of the four inputs of a block the dense layer at `path` reads; an empty str outside of blocks.

    >>> place_of("bert.encoder.layer.3.attention.output.dense"), place_of("classifier")
    ('m', '')
    """
    found = (place for place, patterns in PLACES.items() if any(fnmatchcase(path, one) for one in patterns))
    return next(found, "")


def cut_of(place: str, cut: str | None) -> str:
    """How a dense layer is cut: as asked, or rows and columns by turns when None."""
    return cut or _ALTERNATING[place]


@dataclass(frozen=True)
class Cutting:
    """Over how many devices, and how: see :class:`mindpet.parallel.ParallelConfig`."""

    model_parallel: int = 1
    cut: str | None = None

    def input_parts(self, place: str) -> int:
        """Into how many parts the features are cut of what a dense layer reads."""
        return self.model_parallel if cut_of(place, self.cut) == "columns" else 1

    def output_parts(self, place: str) -> int:
        """The same of what it writes."""
        return self.model_parallel if cut_of(place, self.cut) == "rows" else 1


@dataclass(frozen=True)
class Trained:
    """What trains in one layer, as far as activations know.

    Attributes:
        inputs: places whose input is kept.
        norms: whether the weights of the norms train.
        extra: numbers a row that the method keeps besides, on one device.
    """

    inputs: frozenset[str] = frozenset()
    norms: bool = False
    extra: int = 0


def kept_in_layer(
    sizes: LayerSizes, trained: Trained, batch: int, seq: int, prefix: int, cutting: Cutting, kernels: bool
) -> dict[str, int]:
    """Numbers that one layer keeps for the backward pass on one device, by what they are.

    >>> small = LayerSizes(1, 96, 320, 96, 96, 4, 4, False, False, False, 0)
    >>> kept_in_layer(small, Trained(frozenset("x"), extra=16), 3, 40, 0, Cutting(), True)["GELU"] == 3 * 40 * 320
    True
    """
    rows, here = batch * seq, cutting.output_parts("x")
    # with fewer key heads than devices, several devices hold the same one
    keys = max(sizes.keys // here, sizes.keys // sizes.key_heads)
    inner = rows * sizes.inner // cutting.output_parts("y")
    norms = 2 * rows * sizes.hidden * (2 if sizes.rms and trained.norms and not kernels else 1)
    own = 4 if sizes.gated else 5 if sizes.tanh else 3  # of MindSpore's own operators
    ours = 2 if sizes.gated else 1
    return {
        "queries, keys, values": rows * sizes.queries // here + 2 * keys * batch * (seq + prefix),
        "attention weights": batch * sizes.heads // here * seq * (seq + prefix),
        "norms": norms,
        "SwiGLU" if sizes.gated else "GELU": inner * (ours if kernels else own),
        "inputs of dense layers": sum(
            rows * sizes.width(place) // cutting.input_parts(place) for place in trained.inputs
        ),
        "of the method": rows * trained.extra,
    }


def spared_by_attention(sizes: LayerSizes, trained: Trained, batch: int, seq: int, prefix: int) -> int:
    """Numbers of :func:`kept_in_layer` that our attention on a CPU does not keep: weights; it keeps m, its output."""
    kept = 0 if "m" in trained.inputs else batch * seq * sizes.queries
    return batch * sizes.heads * seq * (seq + prefix) - kept


def spared_by_head(sizes: LayerSizes, batch: int, seq: int) -> int:
    """Bytes of :func:`at_the_turn` that are not there on a CPU where the kernel of a frozen tied head takes over."""
    with_logits, without = (
        at_the_turn(each, batch, seq, Cutting(), 4, True) for each in (sizes, replace(sizes, vocabulary=0))
    )
    return with_logits - without


def at_the_turn(sizes: LayerSizes, batch: int, seq: int, cutting: Cutting, item: int, kernels: bool) -> int:
    """Bytes that are there besides what is kept when the backward pass begins, on one device."""
    rows = batch * seq
    inner = rows * sizes.inner // cutting.output_parts("y")
    through = (rows * sizes.hidden + (3 if sizes.gated else 2) * inner) * item
    # the loss is computed in float32, whatever the network computes in
    a_word = (8 if kernels else 20) + (item if item < 4 else 0)
    loss = rows * (sizes.vocabulary * a_word + sizes.hidden * item)
    return max(through, loss if sizes.vocabulary else 0)


def index_lists(sizes: LayerSizes, layers: int, batch: int, seq: int, kernels: bool) -> int:
    """Bytes that the CPU operators hold from the first step to the end, for so many layers that the backward reaches.

    MindSpore's Transpose on a CPU keeps a list of where each number comes from, 8 bytes each, and an element-wise
    operator that broadcasts (other than one number to all) keeps one for each of its two inputs. In numbers, forward
    and backward together, a layer has

    - without our kernels: transposes of q, k, v and of what is mixed, 4 n q + 4 n k, adding the mask and the gradient
      of softmax 4 n a s, exact GELU 4 n f, RMSNorm 16 n h, the rotation by cosines and sines of a LLaMA 8 n q + 8 n k.

    Besides, BERT adds its positions and takes the mean of its tokens, 6 n h. A language model makes its mask, 6 n s,
    and without our kernels computes its loss, 8 n v.
    """
    rows = batch * seq
    numbers = 0
    if not kernels:
        numbers += 8 * rows * (sizes.queries + sizes.keys) if sizes.rms else 0
        numbers += 4 * rows * (sizes.queries + sizes.keys)
        numbers += 4 * rows * sizes.heads * seq + (16 * rows * sizes.hidden if sizes.rms else 0)
        numbers += 0 if sizes.gated or sizes.tanh else 4 * rows * sizes.inner
    outside = 6 * rows * (seq if sizes.vocabulary else sizes.hidden)
    outside += 0 if kernels else 8 * rows * sizes.vocabulary
    return 8 * (layers * numbers + outside)
