"""MindFormers imports MindPet by name, and its own adapters work with this package in that place.

Nothing of MindFormers or MindSpore is replaced here. MindFormers 1.9.0 asks for MindPet 1.0.4 and MindSpore 2.9 in its
metadata, which only pip reads: it is installed without its dependencies.
"""

import importlib
import inspect
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import mindpet
from mindpet.delta.lora import LoRADense
from mindpet.delta.ptuning2 import PrefixEncoder
from mindpet.graph.freeze_utils import freeze_delta

pytestmark = [
    pytest.mark.mindformers,
    pytest.mark.skipif(find_spec("mindformers") is None, reason="mindformers is not installed: make mindformers"),
    pytest.mark.filterwarnings("ignore"),  # importing MindFormers imports two dozen packages
]

CLASSES, SIZE, HEADS, LAYERS, TOKENS = 3, 8, 2, 2, 4


@pytest.fixture(scope="module", autouse=True)
def output(tmp_path_factory):
    """Where MindFormers writes its log, from its import on, and the configuration of an adapter."""
    directory = tmp_path_factory.mktemp("mindformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_DEFAULT_PATH", str(directory))
        yield directory


@pytest.fixture
def semi_auto_parallel():
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel")
    yield
    ms.reset_auto_parallel_context()


def dense(size):
    return nn.Dense(size, size)


def linear(size):
    from mindformers.modules.layers import Linear

    return Linear(size, size, compute_dtype=ms.float32)


def transposed_linear(size):
    """Its weight is (in, out), and its matrix product says so."""
    from mindformers.modules.layers import Linear

    return Linear(size, size, transpose_b=False, compute_dtype=ms.float32)


class Block(nn.Cell):
    def __init__(self, layer):
        super().__init__()
        self.norm = nn.LayerNorm((SIZE,))
        self.value = layer(SIZE)
        self.out = nn.Dense(SIZE, SIZE, has_bias=False, activation="tanh")

    def construct(self, x):
        return x + self.out(self.value(self.norm(x)))


class Classifier(nn.Cell):
    def __init__(self, layer=dense):
        super().__init__()
        self.query = layer(SIZE)
        self.blocks = nn.CellList([Block(layer) for _ in range(LAYERS)])
        self.head = nn.Dense(SIZE, CLASSES)

    def construct(self, x):
        x = self.query(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Attention(nn.Cell):
    """One layer of attention, with a prefix that MindFormers' own function puts before the keys and values."""

    def __init__(self, prefix_encoder, heads_before_prefix):
        super().__init__()
        from mindformers.pet import Ptuning2Adapter

        self.query, self.key, self.value = nn.Dense(SIZE, SIZE), nn.Dense(SIZE, SIZE), nn.Dense(SIZE, SIZE)
        self.head = nn.Dense(SIZE, CLASSES)
        self.prefix_encoder = prefix_encoder
        self.add_prefix = Ptuning2Adapter.add_prefix
        self.heads_before_prefix = heads_before_prefix

    def split(self, x):
        return x.reshape(x.shape[0], x.shape[1], HEADS, -1).swapaxes(1, 2)  # (batch, heads, sequence, head)

    def construct(self, x):
        query, key, value = self.query(x), self.key(x), self.value(x)  # (batch, sequence, size)
        prefix = self.prefix_encoder(x.shape[0])[0]
        if self.heads_before_prefix:
            key, value = self.add_prefix(prefix, self.split(key), self.split(value))
        else:
            key, value = self.add_prefix(prefix, key, value, 1)
            key, value = self.split(key), self.split(value)
        scores = ops.matmul(self.split(query), key.swapaxes(2, 3)) / math.sqrt(SIZE / HEADS)
        seen = ops.matmul(ops.softmax(scores, -1), value)  # (batch, heads, sequence, head)
        return self.head(seen.mean(axis=2).reshape(x.shape[0], SIZE))


def samples(rng, *shape):
    x = rng.normal(size=(16, *shape, SIZE)).astype(np.float32)
    return Tensor(x), Tensor(np.arange(16, dtype=np.int32) % CLASSES)


def with_loss(network):
    return nn.WithLossCell(network, nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean"))


def contents(network):
    return {parameter.name: parameter.asnumpy().tobytes() for parameter in network.get_parameters()}


def train(network_with_loss, x, y):
    """Three steps: the losses, and the names of the parameters that are no longer what they were, bit for bit."""
    before = contents(network_with_loss)
    adam = nn.Adam(network_with_loss.trainable_params(), learning_rate=0.01)
    step = nn.TrainOneStepCell(network_with_loss, adam).set_train()
    losses = [float(step(x, y)) for _ in range(3)]
    after = contents(network_with_loss)
    return losses, {name for name in before if after[name] != before[name]}


def strategy_of(operator):
    return operator.get_attr_dict()["in_strategy"]


def test_every_name_that_mindformers_takes_from_mindpet_is_here():
    root = Path(find_spec("mindformers").origin).parent
    taken = set()
    for file in root.rglob("*.py"):
        importer = ".".join(("mindformers", *file.relative_to(root).with_suffix("").parts))
        for home, names in re.findall(r"^\s*from (mindpet[\w.]*) import (.+)$", file.read_text("utf-8"), re.MULTILINE):
            taken |= {(importer, home, name) for name in names.split(", ")}
    assert {(home, name) for _, home, name in taken} == {
        ("mindpet.delta.lora", "LoRADense"),
        ("mindpet.delta.ptuning2", "PrefixEncoder"),
        ("mindpet.graph.freeze_utils", "freeze_delta"),
        ("mindpet.graph.freeze_utils", "freeze_modules"),
        ("mindpet.utils.version_control", "get_dropout"),
    }
    for importer, home, name in taken:
        theirs = getattr(importlib.import_module(importer), name)
        assert theirs is getattr(importlib.import_module(home), name)
        assert Path(inspect.getfile(theirs)).is_relative_to(Path(mindpet.__file__).parent)


@pytest.mark.parametrize("layer", [dense, linear, transposed_linear])
def test_lora_adapter_trains_a_plain_cell(mode, rng, layer):
    from mindformers.pet import LoraAdapter, LoraConfig

    x, y = samples(rng)
    plain, network = Classifier(layer), Classifier(layer)
    ms.load_param_into_net(network, plain.parameters_dict())

    network = LoraAdapter.get_pet_model(network, LoraConfig(target_modules="query|value|out", exclude_layers=["head"]))

    adapted = ["query", *(f"blocks.{layer}.{name}" for layer in range(LAYERS) for name in ("value", "out"))]
    deltas = {f"{path}.mindpet_delta_lora_{matrix}" for path in adapted for matrix in "ab"}
    assert {path for path, cell in network.cells_and_names() if type(cell) is LoRADense} == set(adapted)
    assert {parameter.name for parameter in network.get_parameters()} == {*contents(plain), *deltas}
    assert contents(network).items() >= contents(plain).items()
    logits = network.set_train(False)(x).asnumpy()
    np.testing.assert_array_equal(logits, plain.set_train(False)(x).asnumpy())

    LoraAdapter.freeze_pretrained_model(network, "lora")
    losses, changed = train(with_loss(network), x, y)
    assert losses[0] > losses[1] > losses[2]
    assert changed == {parameter.name for parameter in network.trainable_params()} == deltas


def test_freeze_delta_does_what_the_adapter_does():
    from mindformers.pet import LoraAdapter, LoraConfig
    from mindformers.pet.constants import PetType

    network = LoraAdapter.get_pet_model(Classifier(), LoraConfig(target_modules="query"))
    LoraAdapter.freeze_pretrained_model(network, PetType.LORA, freeze_exclude=["*head*"])
    theirs = [parameter.name for parameter in network.trainable_params()]
    freeze_delta(network, "lora", exclude=["*head*"])
    assert [parameter.name for parameter in network.trainable_params()] == theirs
    assert theirs == ["query.mindpet_delta_lora_a", "query.mindpet_delta_lora_b", "head.weight", "head.bias"]


def test_get_pet_model_trains_a_model_of_mindformers(mode, rng, output):
    """The call that MindFormers' trainer makes: adapt, freeze and describe in one."""
    from mindformers.models import PretrainedConfig, PreTrainedModel
    from mindformers.pet import LoraConfig, get_pet_model

    class Model(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config, auto_prefix=False)
            self.model = with_loss(Classifier())

        def construct(self, x, y):
            return self.model(x, y)

    network = get_pet_model(Model(PretrainedConfig()), LoraConfig(target_modules="query", lora_rank=2, lora_alpha=4))

    losses, changed = train(network, *samples(rng))
    assert losses[0] > losses[1] > losses[2]
    assert len(changed) == 2
    assert changed == {p.name for p in network.get_parameters() if "query.mindpet_delta_lora_" in p.name}
    described = json.loads((output / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["target_modules"]) == (2, 4, ["query"])


@pytest.mark.parametrize(
    ("layer", "weight", "a", "b"),
    [
        (linear, (4, 2), (1, 2), (4, 1)),
        (transposed_linear, (2, 4), (2, 1), (1, 4)),
    ],
)
def test_lora_adapter_hands_the_strategies_of_a_linear_on(semi_auto_parallel, layer, weight, a, b):
    """Rows over 2 devices, inputs over 2, outputs over 4. A run on a CPU ignores what is written down here.

    For a weight (in, out), MindFormers writes the strategies of A and B as if those were transposed as well.
    """
    from mindformers.pet import LoraAdapter, LoraConfig

    network = Classifier(layer)
    network.query.shard(((2, 2), weight), ((2, 4), (4,)))
    adapted = LoraAdapter.get_pet_model(network, LoraConfig(target_modules="query")).query

    assert strategy_of(adapted.matmul) == ((2, 2), weight)
    assert strategy_of(adapted.bias_add) == ((2, 4), (4,))
    assert strategy_of(adapted.lora_dropout.dropout) == ((2, 2),)
    assert strategy_of(adapted.lora_a_matmul) == ((2, 2), a)
    assert strategy_of(adapted.lora_b_matmul) == ((2, 1), b)
    assert strategy_of(adapted.mul) == ((2, 4), ())
    assert strategy_of(adapted.add) == ((2, 4), (2, 4))


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_encoder_trains_through_the_ptuning2_adapter(mode, rng, projection):
    from mindformers.pet import Ptuning2Adapter

    encoder = PrefixEncoder(TOKENS, LAYERS, HEADS, SIZE // HEADS, projection, 16, 0.01)  # as MindFormers' GLM2 calls it
    network = Attention(encoder, heads_before_prefix=True)
    Ptuning2Adapter.freeze_pretrained_model(network, "ptuning2")

    losses, changed = train(with_loss(network), *samples(rng, 5))
    assert losses[0] > losses[1] > losses[2]
    assert changed == {p.name for p in network.get_parameters() if "mindpet_delta_ptuning2" in p.name}


@pytest.mark.parametrize("method", ["ptuning2", "prefixtuning"])
def test_prefixes_of_mindformers_train(mode, rng, method):
    """Their encoders take our dropout and our freezing. One of their parameters is a table of indices: it stays."""
    from mindformers.modules.transformer import TransformerOpParallelConfig
    from mindformers.pet import PrefixTuningAdapter, PrefixTuningConfig, Ptuning2Adapter, Ptuning2Config

    adapter, config = {
        "ptuning2": (Ptuning2Adapter, Ptuning2Config(TOKENS, prefix_projection=True, projection_dim=16)),
        "prefixtuning": (PrefixTuningAdapter, PrefixTuningConfig(TOKENS, mid_dim=16)),
    }[method]
    sizes = SimpleNamespace(
        num_layers=LAYERS, num_heads=HEADS, hidden_size=SIZE, parallel_config=TransformerOpParallelConfig()
    )
    network = Attention(adapter.get_prefix(SimpleNamespace(config=sizes), config), heads_before_prefix=False)
    adapter.freeze_pretrained_model(network, method)

    losses, changed = train(with_loss(network), *samples(rng, 5))
    assert losses[2] < losses[0]
    theirs = {p.name for p in network.get_parameters() if f"mindpet_delta_{method}" in p.name}
    assert theirs - changed == {f"prefix_encoder.mindpet_delta_{method}_prefix"}
    assert changed < theirs


def glm2_config(**changes):
    """Small, and with LayerNorm, as MindSpore has no RmsNorm on a CPU."""
    from mindformers.models.glm2 import ChatGLM2Config

    return ChatGLM2Config(
        num_layers=LAYERS,
        padded_vocab_size=64,
        hidden_size=32,
        ffn_hidden_size=32,
        kv_channels=8,
        num_attention_heads=4,
        multi_query_group_num=2,
        seq_length=8,
        rmsnorm=False,
        param_init_type="float32",
        compute_dtype="float32",
        **changes,
    )


def test_lora_trains_glm2_of_mindformers(mode, rng):
    from mindformers.models.glm2 import ChatGLM2ForConditionalGeneration
    from mindformers.pet import LoraConfig, get_pet_model

    glm2 = ChatGLM2ForConditionalGeneration(glm2_config())
    network = get_pet_model(glm2, LoraConfig(target_modules="query_key_value|dense_h_to_4h"))

    tokens = Tensor(rng.integers(0, 64, (2, 8)).astype(np.int32))
    losses, changed = train(network, tokens, tokens)
    assert losses[0] > losses[1] > losses[2]
    assert len(changed) == LAYERS * 2 * 2
    assert changed == {p.name for p in network.get_parameters() if "mindpet_delta_lora" in p.name}


def test_glm2_of_mindformers_holds_our_prefix_encoder():
    """Built and frozen, not run.

    GLM2 of MindFormers 1.9.0 joins its prefixes, (batch, heads, tokens, head), with (batch, tokens, heads, head).
    """
    from mindformers.models.glm2.glm2 import ChatGLM2WithPtuning2
    from mindformers.pet import Ptuning2Config

    network = ChatGLM2WithPtuning2(glm2_config(pet_config=Ptuning2Config(TOKENS)))

    assert type(network.prefix_encoder) is PrefixEncoder
    names = [parameter.name for parameter in network.trainable_params()]
    assert names == ["prefix_encoder.mindpet_delta_ptuning2_embedding"]
    pairs = network.prefix_encoder(3)
    assert [(pair.shape, pair.dtype) for pair in pairs] == [((2, 3, 2, TOKENS, 8), ms.float16)] * LAYERS
