"""A network with the kernels in it is the same network: outputs, gradients, names, what trains."""

import copy
import os

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

import mindpet
from mindpet import AdapterConfig, BitFitConfig, LoRAConfig
from mindpet.graph.targets import cells_by_path
from mindpet.kernels import build
from mindpet.models import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from mindpet.models.head import TiedHead

pytestmark = pytest.mark.skipif(not build.available(), reason=f"no kernels here: {build.why_not()}")

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def tiny_bert(**changes):
    """The same values at every call."""
    network = BertForSequenceClassification(BertConfig(**{**SIZES, **changes}), 3)
    generator = np.random.default_rng(3)
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(generator.normal(0.1, 0.3, parameter.shape), ms.float32))
    network.set_train(False)
    return network


def randomise_deltas(network):
    generator = np.random.default_rng(4)
    for parameter in network.trainable_params():
        parameter.set_data(Tensor(generator.normal(0, 0.3, parameter.shape), ms.float32))
    return network


def batch():
    generator = np.random.default_rng(5)
    lengths = np.array([[7], [3], [5]])
    ids = generator.integers(1, 30, (3, 7))
    mask = np.arange(7)[None] < lengths
    return [Tensor(value, ms.int32) for value in (ids, mask, ids % 2)]


class LossAndLogits(nn.Cell):
    """In one graph, which is compiled once."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, *inputs):
        logits = self.network(*inputs)
        return ops.cross_entropy(logits, Tensor([0, 1, 2], ms.int32)), logits


def logits_and_gradients(network):
    weights = ms.ParameterTuple(network.trainable_params())
    (_, logits), gradients = ops.value_and_grad(LossAndLogits(network), None, weights, has_aux=True)(*batch())
    return logits.asnumpy(), {p.name: g.asnumpy() for p, g in zip(weights, gradients)}


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    assert list(found[1]) == list(expected[1])
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, atol=1e-5 * (1 + np.abs(value).max()), err_msg=name)


def fast_cells(network):
    """All but what dense layers compute, and what attention keeps for inputs that the kernel does not take."""
    found = {path: type(cell).__name__ for path, cell in cells_by_path(network).items()}
    fast = [path for path, name in found.items() if name.startswith("Fast") and name != "FastDense"]
    inner = (".matmul", ".fused_product", ".fused_branch", ".core.original.softmax")
    return [path for path in fast if not path.endswith(inner)]


def lora(network):
    return mindpet.inject(network, LoRAConfig(rank=2, targets=["*.query", "*.value"], modules_to_save=["classifier"]))


WAYS = {
    "all trains": lambda network: network,
    "LoRA": lora,
    "BitFit": lambda network: mindpet.inject(network, BitFitConfig()),
    "BitFit with norms": lambda network: mindpet.inject(network, BitFitConfig(include_norm=True)),
}


@pytest.mark.exhaustive_in_graph("*-before-LoRA", "*-after-all trains")
@pytest.mark.parametrize(
    ("order", "way"), [("before", "all trains"), ("before", "LoRA"), *(("after", way) for way in WAYS)]
)
def test_same_logits_and_gradients(order, way, mode):
    expected = logits_and_gradients(randomise_deltas(WAYS[way](tiny_bert())))
    network = tiny_bert()
    network = WAYS[way](mindpet.accelerate(network)) if order == "before" else mindpet.accelerate(WAYS[way](network))
    assert len(fast_cells(network)) == 5  # three norms, an attention and a GELU
    assert_same(logits_and_gradients(randomise_deltas(network)), expected)


class Wide(nn.Cell):
    """Dense layers whose products are worth a kernel."""

    def __init__(self, has_bias=True):
        super().__init__()
        self.up = nn.Dense(160, 300, has_bias=has_bias, activation=nn.GELU())
        self.down = nn.Dense(300, 160, has_bias=has_bias)

    def construct(self, x):
        return self.down(self.up(x))


class SquareSum(nn.Cell):
    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, x):
        return ops.square(self.network(x)).sum()


WIDE = {
    "all trains": lambda network: network,
    "BitFit": lambda network: mindpet.inject(network, BitFitConfig()),
    "LoRA": lambda network: mindpet.inject(network, LoRAConfig(rank=4, targets=["up", "down"])),
    "LoRA and biases": lambda network: mindpet.inject(network, LoRAConfig(rank=4, targets=["up", "down"], bias="all")),
    "Adapter": lambda network: mindpet.inject(network, AdapterConfig(size=8, targets=["down"])),
}


@pytest.mark.exhaustive_in_graph("*-before-True", "*-LoRA-*")
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", WIDE)
def test_products_of_dense_layers(mode, way, order, has_bias, rng):
    """In graph mode by the kernel: outputs, and gradients of inputs and weights, frozen or not."""
    if way == "BitFit" and not has_bias:
        pytest.skip("BitFit needs biases")
    networks = []
    for fast in (False, True):
        ms.set_seed(1)
        network = Wide(has_bias)
        for parameter in network.get_parameters():
            parameter.init_data()
        if fast and order == "before":
            mindpet.accelerate(network)
        randomise_deltas(WIDE[way](network))
        if fast and order == "after":
            mindpet.accelerate(network)
        networks.append(network)
    x = Tensor(rng.standard_normal((5, 10, 160)), ms.float32)
    found = []
    for network in networks:
        weights = ms.ParameterTuple(network.trainable_params())
        value, (for_x, for_weights) = ops.value_and_grad(SquareSum(network), 0, weights)(x)
        found.append((value, for_x, *for_weights))
    assert [p.name for p in networks[0].get_parameters()] == [p.name for p in networks[1].get_parameters()]
    for theirs, ours in zip(*found):
        scale = np.abs(theirs.asnumpy()).max()
        np.testing.assert_allclose(ours.asnumpy() / scale, theirs.asnumpy() / scale, atol=2e-6)
    assert any(path.endswith("matmul") for path in cells_by_path(networks[1])) == (mode == "graph")
    if mode == "graph" and order == "after":
        up = networks[1].up  # the kernel, and nothing else
        fused = up.fused_branch.fast.sum if "LoRA" in way else (up.fused_product if has_bias else up.matmul).fast
        fused.forward = None
        with pytest.raises(ValueError, match="not callable"):
            networks[1].set_train(not networks[1].training)(x)


def test_parameters_of_activations_keep_their_names(mode):
    def make():
        return nn.SequentialCell(nn.Dense(8, 8, activation="prelu"), nn.Dense(8, 8, activation="prelu"))

    names = [parameter.name for parameter in make().get_parameters()]
    assert "1.activation.w" in names
    assert [parameter.name for parameter in mindpet.accelerate(make()).get_parameters()] == names
    adapted = mindpet.inject(make(), LoRAConfig(rank=2, targets=["1"]))
    mindpet.eject(adapted)
    assert [parameter.name for parameter in adapted.get_parameters()] == names


def test_a_second_call_joins_the_branch_that_came_since_the_first(rng):
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        network = mindpet.accelerate(Wide())
        mindpet.inject(network, LoRAConfig(rank=4, targets=["up"]))
        assert network.up.fused_branch is None
        mindpet.accelerate(network)
        assert network.up.fused_branch is not None
        x = Tensor(rng.standard_normal((5, 10, 160)), ms.float32)
        network.up.fused_branch.fast.sum.forward = None
        with pytest.raises(ValueError, match="not callable"):
            network(x)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_what_runs_under_jit_in_pynative_mode_gets_the_products_too(rng):
    """Loss, and gradients of the input and of A and B, under ms.jit and as each operator by itself."""
    found = []
    for compiled in (False, True):
        ms.set_seed(1)
        network = randomise_deltas(mindpet.inject(Wide(), LoRAConfig(rank=4, targets=["up", "down"])))
        loss = mindpet.accelerate(SquareSum(network), compiled=compiled)
        assert any(path.endswith(".matmul") for path in cells_by_path(network)) == compiled
        gradient = ops.value_and_grad(loss, 0, ms.ParameterTuple(network.trainable_params()))
        x = Tensor(np.random.default_rng(5).standard_normal((5, 10, 160)), ms.float32)
        call = ms.jit(gradient) if compiled else gradient
        value, (for_x, for_weights) = call(x)
        found.append((value, for_x, *for_weights))
    for theirs, ours in zip(*found, strict=True):
        scale = np.abs(theirs.asnumpy()).max()
        np.testing.assert_allclose(ours.asnumpy() / scale, theirs.asnumpy() / scale, atol=2e-6)


@pytest.mark.parametrize(
    ("mode", "compiled", "before", "after"),
    [
        ("pynative", True, None, "0"),
        ("pynative", True, "1", "1"),
        ("pynative", None, None, None),
        ("graph", True, None, None),
    ],
    indirect=["mode"],
)
def test_a_jitted_graph_runs_when_it_is_called(mode, compiled, before, after, monkeypatch):
    """The thread that would wait for MindSpore's queue takes a core; who chose the queue keeps it."""
    monkeypatch.setenv("MS_DEV_JIT_PIPELINE", before or "")  # so that it is put back afterwards
    if before is None:
        monkeypatch.delenv("MS_DEV_JIT_PIPELINE")
    mindpet.accelerate(Wide(), compiled=compiled)
    assert os.environ.get("MS_DEV_JIT_PIPELINE") == after


@pytest.mark.parametrize("trains", [False, True])
def test_a_head_that_shares_the_table_is_a_product(mode, trains, rng):
    """Logits and the gradients of rows and table, where there is enough to multiply."""
    rows = Tensor(rng.standard_normal((60, 64)), ms.float32)
    probe = Tensor(rng.standard_normal((60, 400)), ms.float32)
    table = Parameter(Tensor(rng.standard_normal((400, 64)), ms.float32), name="table", requires_grad=trains)

    class Head(nn.Cell):
        def __init__(self):
            super().__init__()
            self.head, self.table = TiedHead(), table

        def construct(self, rows):
            return (self.head(rows, self.table) * probe).sum()

    fast = mindpet.accelerate(Head())
    assert (type(fast.head).__name__ == "FastMatMul") == (mode == "graph")
    weights = ms.ParameterTuple([table]) if trains else None
    value, gradients = ops.value_and_grad(fast, 0, weights)(rows)
    expected = (rows.asnumpy().astype(np.float64) @ table.asnumpy().T.astype(np.float64) * probe.asnumpy()).sum()
    np.testing.assert_allclose(value.asnumpy(), expected, rtol=1e-4)
    for_rows, for_table = (gradients[0], gradients[1][0]) if trains else (gradients, None)
    np.testing.assert_allclose(for_rows.asnumpy(), probe.asnumpy() @ table.asnumpy(), rtol=1e-4, atol=1e-4)
    if trains:
        np.testing.assert_allclose(for_table.asnumpy(), probe.asnumpy().T @ rows.asnumpy(), rtol=1e-4, atol=1e-4)


def test_a_compiled_network_can_be_accelerated(mode):
    network = lora(tiny_bert())
    before = logits_and_gradients(network)
    mindpet.accelerate(network)
    assert_same(logits_and_gradients(network), before)


def test_what_is_frozen_afterwards_and_thawed_gets_its_gradient(mode):
    """Whether a LayerNorm trains is not decided when the kernels come."""
    network = lora(tiny_bert())
    mindpet.accelerate(network)
    norms = [p for p in network.get_parameters() if p.name.endswith((".gamma", ".beta"))]
    for parameter in norms:
        parameter.requires_grad = True
    _, gradients = logits_and_gradients(network)
    assert all(np.abs(gradients[parameter.name]).max() > 1e-4 for parameter in norms)


def test_names_and_what_trains_stay(tmp_path):
    network = lora(tiny_bert())
    names = [(p.name, p.requires_grad) for p in network.get_parameters()]
    norms = sum(isinstance(cell, nn.LayerNorm) for cell in cells_by_path(network).values())
    assert mindpet.accelerate(network) is network
    assert [(p.name, p.requires_grad) for p in network.get_parameters()] == names
    assert [path for path, _ in network.parameters_and_names()] == [name for name, _ in names]
    assert sum(isinstance(cell, nn.LayerNorm) for cell in cells_by_path(network).values()) == norms
    ms.save_checkpoint(tiny_bert(), str(tmp_path / "base.ckpt"))
    missing, unexpected = ms.load_param_into_net(network, ms.load_checkpoint(str(tmp_path / "base.ckpt")))
    assert unexpected == []
    assert all("mindpet_delta" in name for name in missing)


def test_deltas_come_and_go_in_a_fast_network(tmp_path):
    network = mindpet.accelerate(tiny_bert())
    plain = network(*batch()).asnumpy()
    randomise_deltas(lora(network))
    tuned = network(*batch()).asnumpy()
    mindpet.save_delta(network, tmp_path / "delta")
    with mindpet.disable(network):
        assert np.abs(network(*batch()).asnumpy() - tuned).max() > 1e-3
    mindpet.merge(network)
    np.testing.assert_allclose(network(*batch()).asnumpy(), tuned, atol=1e-5)
    mindpet.unmerge(network)
    mindpet.eject(network)
    np.testing.assert_allclose(network(*batch()).asnumpy(), plain, atol=1e-6)
    mindpet.load_delta(lora(tiny_bert()), tmp_path / "delta")


def test_a_second_call_finds_what_is_new():
    network = mindpet.accelerate(nn.SequentialCell(nn.GELU(), nn.Dense(4, 4)))
    first = network[0]
    network.append(nn.GELU())
    mindpet.accelerate(network)
    assert network[0] is first
    assert fast_cells(network) == ["0", "2"]


def test_training_mode_and_shared_cells_stay():
    shared = nn.LayerNorm((4,))
    network = nn.CellList([shared, shared])
    network.set_train(True)
    mindpet.accelerate(network)
    assert network[0] is network[1]
    assert network[0].training
    assert network[0].gamma is shared.gamma


def test_a_copy_works_too(mode):
    network = mindpet.accelerate(nn.SequentialCell(nn.LayerNorm((4,)), nn.GELU()))
    x = Tensor(np.arange(8, dtype=np.float32).reshape(2, 4))
    np.testing.assert_array_equal(copy.deepcopy(network)(x).asnumpy(), network(x).asnumpy())


def test_a_network_in_float16(mode):
    """Forced before or after, it computes as without the kernels."""
    x = batch()
    expected = tiny_bert().to_float(ms.float16)(*x).asnumpy()
    before = mindpet.accelerate(tiny_bert().to_float(ms.float16))
    after = mindpet.accelerate(tiny_bert()).to_float(ms.float16)
    np.testing.assert_allclose(before(*x).asnumpy(), expected, atol=0.02)
    np.testing.assert_allclose(after(*x).asnumpy(), expected, atol=0.02)


def test_gpt2_and_its_gelu(mode):
    def make():
        network = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2))
        generator = np.random.default_rng(3)
        for parameter in network.get_parameters():
            parameter.set_data(Tensor(generator.normal(0.1, 0.3, parameter.shape), ms.float32))
        return network.set_train(False)

    ids = Tensor([[1, 2, 3, 4, 5]], ms.int32)
    fast = mindpet.accelerate(make())
    layer = [f"transformer.h.0.{name}" for name in ("ln_1", "attn.core", "ln_2", "mlp.act")]
    heads = ["losses.head", "losses.cross_entropy", "head"] if mode == "graph" else ["losses.cross_entropy"]
    assert fast_cells(fast) == [*layer, "transformer.ln_f", *heads]
    np.testing.assert_allclose(
        fast(ids, ops.ones_like(ids)).asnumpy(), make()(ids, ops.ones_like(ids)).asnumpy(), atol=1e-5
    )


def test_what_is_not_for_a_kernel_is_left_alone():
    class OwnGELU(nn.GELU):
        def construct(self, x):
            return x

    watched = nn.GELU()
    watched.register_forward_hook(lambda *_: None)
    wide = nn.LayerNorm((2, 4), begin_norm_axis=-2, begin_params_axis=-2)
    half = nn.LayerNorm((4,), dtype=ms.float16)
    network = nn.CellList([OwnGELU(), watched, wide, half, nn.LayerNorm((4,), begin_norm_axis=1, begin_params_axis=1)])
    mindpet.accelerate(network)
    assert fast_cells(network) == []


class OwnRMSNorm(nn.Cell):
    mindpet_kernel = "rms_norm"

    def __init__(self):
        super().__init__()
        self.weight, self.epsilon = Parameter(Tensor([1.0, 2.0, 3.0], ms.float32), name="weight"), 1e-6

    def construct(self, x):
        return x * ops.rsqrt(ops.square(x).mean(-1, keep_dims=True) + self.epsilon) * self.weight


class OwnSwiGLU(nn.Cell):
    mindpet_kernel = "gated_silu"

    def construct(self, gate, up):
        return gate * ops.sigmoid(gate) * up


class OwnLoss(nn.Cell):
    mindpet_kernel = "cross_entropy"

    def construct(self, logits, labels):
        return ops.cross_entropy(logits, labels, ignore_index=-100, reduction="none")


class OwnNetwork(nn.Cell):
    def __init__(self):
        super().__init__()
        self.norm, self.act, self.loss = OwnRMSNorm(), OwnSwiGLU(), OwnLoss()

    def construct(self, x, labels):
        y = self.norm(x)
        return self.loss(self.act(y, x), labels)


def test_cells_of_ones_own_name_their_kernel(mode, rng):
    x, labels = Tensor(rng.standard_normal((5, 3)), ms.float32), Tensor([0, 1, 2, -100, 1], ms.int32)

    def values(network):
        for_x, for_weights = ops.grad(network, 0, ms.ParameterTuple(network.trainable_params()))(x, labels)
        return [value.asnumpy() for value in (network(x, labels), for_x, *for_weights)]

    fast = mindpet.accelerate(OwnNetwork())
    assert fast_cells(fast) == ["norm", "act", "loss"]
    for found, right in zip(values(fast), values(OwnNetwork())):
        np.testing.assert_allclose(found, right, atol=2e-6)


class OnePlusRMSNorm(OwnRMSNorm):
    """Gemma's: the weight is what is added to 1."""

    def construct(self, x):
        return x * ops.rsqrt(ops.square(x).mean(-1, keep_dims=True) + self.epsilon) * (1.0 + self.weight)


def test_a_subclass_computes_what_it_says_itself(rng):
    x = Tensor(rng.standard_normal((5, 3)), ms.float32)
    network = nn.SequentialCell(OnePlusRMSNorm())
    expected = network(x).asnumpy()
    mindpet.accelerate(network)
    np.testing.assert_array_equal(network(x).asnumpy(), expected)
    assert fast_cells(network) == []


def test_a_misspelt_kernel_is_an_error():
    class Wrong(nn.Cell):
        mindpet_kernel = "rmsnorm"

    network = nn.SequentialCell(nn.GELU(), Wrong())
    with pytest.raises(ValueError, match="must be one of .*did you mean 'rms_norm'"):
        mindpet.accelerate(network)
    assert fast_cells(network) == []


def test_only_cells():
    with pytest.raises(TypeError, match="must be a mindspore.nn.Cell"):
        mindpet.accelerate("network")
