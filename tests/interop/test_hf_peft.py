"""Hugging Face PEFT itself as the oracle: what it trained computes the same here, and what was trained here, there."""

import inspect

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet import BitFitConfig, DoRAConfig, LoRAConfig, PrefixConfig, PTuning2Config, QLoRAConfig, inject
from mindpet.interop import load_peft, save_peft
from mindpet.models import BertForSequenceClassification

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
LABELS = np.array([0, 1, 2, 1])

LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
THEIRS = {
    "query and value": LORA,
    "all-linear": {**LORA, "target_modules": "all-linear"},
    "rank-stabilised": {**LORA, "use_rslora": True},
    "patterns": {
        **LORA,
        "rank_pattern": {"0.attention.self.query": 3, "value": 2},
        "alpha_pattern": {r"layer\.\d\.attention\.self\.query": 3, "^bert.encoder.layer.1.attention.self.value": 10},
    },
    "patterns, rank-stabilised": {
        **LORA,
        "use_rslora": True,
        "rank_pattern": {"value": 2},
        "alpha_pattern": {"query": 9},
    },
    "bias of adapted modules": {**LORA, "bias": "lora_only"},
    "all biases": {**LORA, "bias": "all"},
    "no task type": {**LORA, "task_type": None},
    "modules saved whole": {
        **LORA,
        "task_type": None,
        "modules_to_save": ["pooler", "0.output.LayerNorm", "classifier"],
    },
    "embeddings": {
        **LORA,
        "target_modules": ["word_embeddings", "position_embeddings", "token_type_embeddings", "key"],
    },
    "embedding saved whole": {**LORA, "modules_to_save": ["word_embeddings"]},
    "regular expression": {**LORA, "target_modules": r".*layer\.1\..*(query|dense)"},
    "one layer": {**LORA, "layers_to_transform": [1], "layers_pattern": "layer"},
    "excluded": {**LORA, "exclude_modules": ["0.attention.self.query"]},
    "dropout": {**LORA, "lora_dropout": 0.2},
    "DoRA": {**LORA, "use_dora": True, "use_rslora": True, "target_modules": "all-linear"},
    "prefix": {"num_virtual_tokens": 5, "task_type": "SEQ_CLS"},
    "prefix with projection": {
        "num_virtual_tokens": 5,
        "task_type": "SEQ_CLS",
        "prefix_projection": True,
        "encoder_hidden_size": 8,
    },
}

QUERY_VALUE = ["*.query", "*.value"]
HEAD = ["classifier"]
OURS = {
    "query and value": [LoRAConfig(rank=4, alpha=6, targets=QUERY_VALUE, modules_to_save=HEAD)],
    "all-linear": [LoRAConfig(rank=4, targets="all-linear")],
    "rank-stabilised": [LoRAConfig(rank=4, alpha=6, rank_stabilised=True, targets=QUERY_VALUE, modules_to_save=HEAD)],
    "patterns": [
        LoRAConfig(
            rank=4, targets=QUERY_VALUE, rank_pattern={"*.0.*query": 3}, alpha_pattern={"*.value": 5, "*.1.*query": 2.5}
        )
    ],
    "two ranks in two calls": [
        LoRAConfig(rank=4, targets=["*.query"]),
        LoRAConfig(rank=2, rank_stabilised=True, targets=["*.value"], modules_to_save=HEAD),
    ],
    "bias of adapted modules": [
        LoRAConfig(rank=4, targets=QUERY_VALUE, modules_to_save=["*.query.bias", "*.value.bias", "classifier"])
    ],
    "bias='lora_only'": [LoRAConfig(rank=4, targets=QUERY_VALUE, modules_to_save=HEAD, bias="lora_only")],
    "all biases": [LoRAConfig(rank=4, targets=QUERY_VALUE, modules_to_save=HEAD), BitFitConfig(include_norm=True)],
    "bias='all'": [LoRAConfig(rank=4, targets=QUERY_VALUE, modules_to_save=HEAD, bias="all")],
    "orthogonal start": [LoRAConfig(rank=4, targets=QUERY_VALUE, start="orthogonal")],
    "DoRA": [DoRAConfig(rank=4, targets=["*.query", "*.dense"], rank_pattern={"*.0.*": 2}, modules_to_save=HEAD)],
    "some biases": [LoRAConfig(rank=4, targets=QUERY_VALUE), BitFitConfig()],
    "modules saved whole": [
        LoRAConfig(
            rank=4, targets=["*.0.*.key"], modules_to_save=["pooler", "*.1.output.LayerNorm.gamma", "classifier"]
        )
    ],
    "embeddings": [LoRAConfig(rank=4, targets=["*_embeddings", "*.key"], modules_to_save=HEAD)],
    "prefix-tuning": [PrefixConfig(tokens=5, embed_dim=8, mid_dim=8, modules_to_save=HEAD)],
    "prefix-tuning-without-projection": [PrefixConfig(tokens=5, projection=False, modules_to_save=HEAD)],
    "p-tuning v2": [PTuning2Config(tokens=5, modules_to_save=HEAD)],
    "p-tuning v2 with projection": [PTuning2Config(tokens=5, projection=True, projection_dim=8, modules_to_save=HEAD)],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random BERT that transformers wrote."""
    torch.manual_seed(3)
    directory = tmp_path_factory.mktemp("base")
    transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)).save_pretrained(
        directory
    )
    return directory


def ours(base):
    network, report = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    assert not report.missing
    return network.set_train(False)


def theirs(base):
    model = transformers.BertForSequenceClassification.from_pretrained(base)
    backbone = model.bert.forward
    if "past_key_values" not in inspect.signature(backbone).parameters:  # newer transformers call it so
        model.bert.forward = lambda *inputs, past_key_values=None, **more: backbone(
            *inputs, cache=past_key_values, **more
        )
        model.bert.forward.__signature__ = inspect.Signature(
            [inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY)]
        )
    return model.eval()


def batch():
    generator = np.random.default_rng(0)
    ids = generator.integers(0, SIZES["vocab_size"], (4, 9))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask, (np.arange(9) > 4).astype(np.int64)[None].repeat(4, 0)


def our_logits(network):
    return network(*(Tensor(array.astype(np.int32)) for array in batch())).asnumpy()


def their_logits(model):
    with torch.no_grad():
        return forward(model).logits.numpy()


def forward(model, **more):
    ids, mask, kinds = (torch.tensor(array) for array in batch())
    return model(input_ids=ids, attention_mask=mask, token_type_ids=kinds, **more)


def trained_by_peft(base, options):
    torch.manual_seed(5)
    kind = peft.PrefixTuningConfig if "num_virtual_tokens" in options else peft.LoraConfig
    model = peft.get_peft_model(theirs(base), kind(**options))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(4):
        optimizer.zero_grad()
        forward(model.train(), labels=torch.tensor(LABELS)).loss.backward()
        optimizer.step()
    return model.eval()


class Loss(nn.Cell):
    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, ids, mask, kinds, labels):
        return ops.cross_entropy(self.network(ids, mask, kinds), labels)


def trained_here(base, configs):
    network = ours(base)
    for config in configs:
        inject(network, config)
    step = nn.TrainOneStepCell(Loss(network), nn.Adam(network.trainable_params(), 0.03))
    arrays = [Tensor(array.astype(np.int32)) for array in (*batch(), LABELS)]
    for _ in range(4):
        step(*arrays)
    return network.set_train(False)


def assert_close(actual, expected, title):
    print(f"largest difference of logits, {title}: {np.abs(actual - expected).max():.1e}")
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", THEIRS)
def test_what_peft_trained_computes_the_same_here(mode, base, tmp_path, case):
    model = trained_by_peft(base, THEIRS[case])
    expected, untuned = their_logits(model), their_logits(theirs(base))
    assert np.abs(expected - untuned).max() > 0.02
    model.save_pretrained(tmp_path)
    network = load_peft(ours(base), tmp_path)
    assert_close(our_logits(network), expected, f"{case}, there to here, {mode}")


@pytest.mark.parametrize("case", OURS)
def test_what_was_trained_here_computes_the_same_in_peft_and_comes_back_bit_for_bit(
    mode, base, tmp_path, case, recwarn
):
    network = trained_here(base, OURS[case])
    expected = our_logits(network)
    assert np.abs(expected - our_logits(ours(base))).max() > 0.02
    task = "SEQ_CLS" if case in ("all biases", "bias='all'") else None
    save_peft(network, tmp_path / "ours", base_model=str(base), task_type=task)
    model = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours").eval()
    assert not [str(entry.message) for entry in recwarn if issubclass(entry.category, peft.utils.warning.PeftWarning)]
    assert not [str(entry.message) for entry in recwarn if "adapter keys" in str(entry.message)]
    assert_close(their_logits(model), expected, f"{case}, here to there, {mode}")

    model.save_pretrained(tmp_path / "theirs")
    back = load_peft(ours(base), tmp_path / "theirs")
    if not any(isinstance(config, PrefixConfig) or getattr(config, "projection", False) for config in OURS[case]):
        before, after = ({p.name: p.asnumpy() for p in cell.get_parameters()} for cell in (network, back))
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)
        np.testing.assert_array_equal(our_logits(back), expected)
    save_peft(back, tmp_path / "again")
    theirs_again, ours_again = tensors(tmp_path / "theirs"), tensors(tmp_path / "again")
    for name, value in ours_again.items():
        np.testing.assert_array_equal(theirs_again[name], value, err_msg=name)
    twice = (".modules_to_save.", ".original_module.")  # with bias="all" PEFT writes the bias of the head three times
    assert all(name in ours_again or any(part in name for part in twice) for name in theirs_again)


@pytest.mark.parametrize("options", [{}, {"bits": "int8", "block_size": 16}, {"loftq_iterations": 1}])
def test_qlora_is_peft_s_lora_beside_the_weights_that_its_codes_stand_for(mode, base, tmp_path, options):
    network = trained_here(base, [QLoRAConfig(rank=4, alpha=6, targets=["*.query", "*.output.dense"], **options)])
    expected = our_logits(network)
    save_peft(network, tmp_path / "ours", base_model=str(base))
    adapted = {path: cell for path, cell in network.cells_and_names() if hasattr(cell, "base_value")}
    plain = theirs(base)
    for path, cell in adapted.items():
        plain.get_submodule(path).weight.data = torch.tensor(cell.base_value())
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "ours", is_trainable=True).eval()
    assert len(adapted) == 6
    np.testing.assert_allclose(their_logits(model), expected, atol=1e-5)
    forward(model, labels=torch.tensor(LABELS)).loss.backward()
    parameters = network.trainable_params()
    arrays = [Tensor(array.astype(np.int32)) for array in (*batch(), LABELS)]
    gradients = ops.grad(Loss(network), None, ms.ParameterTuple(parameters))(*arrays)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        path, _, last = parameter.name.rpartition(".")
        layer = model.get_submodule(f"base_model.model.{path}")
        there = {"mindpet_delta_lora_a": layer.lora_A, "mindpet_delta_lora_b": layer.lora_B}[last]["default"].weight
        np.testing.assert_allclose(gradient.asnumpy(), there.grad.numpy(), atol=1e-5, err_msg=parameter.name)


def tensors(directory):
    from safetensors.numpy import load_file

    return load_file(directory / "adapter_model.safetensors")


def test_float16_adapters_take_the_dtype_of_the_network(base, tmp_path):
    model = trained_by_peft(base, LORA)
    expected = their_logits(model)
    model.half().save_pretrained(tmp_path)
    network = load_peft(ours(base), tmp_path)
    assert {parameter.dtype for parameter in network.get_parameters()} == {ms.float32}
    np.testing.assert_allclose(our_logits(network), expected, atol=1e-2)


def test_bfloat16_adapters_are_widened(base, tmp_path):
    model = trained_by_peft(base, LORA)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    network = load_peft(ours(base), tmp_path)
    value = model.base_model.model.bert.encoder.layer[1].attention.self.query.lora_A["default"].weight
    here = dict(network.parameters_and_names())["bert.encoder.layer.1.attention.self.query.mindpet_delta_lora_a"]
    np.testing.assert_array_equal(here.asnumpy(), value.detach().float().numpy())


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"init_lora_weights": "pissa"}])
def test_what_is_not_here_is_refused(base, tmp_path, options):
    peft.get_peft_model(theirs(base), peft.LoraConfig(**LORA, **options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=next(iter(options))):
        load_peft(ours(base), tmp_path)


def test_a_foreign_network_is_read_by_its_names_in_both_directions(mode, tmp_path, rng):
    """Convolutions, an embedding and a dense layer whose weight is stored transposed there (GPT-2's Conv1D)."""

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(7, 4)
            self.body = torch.nn.ModuleDict({"line": torch.nn.Conv1d(4, 6, 3), "plane": torch.nn.Conv2d(6, 6, (1, 3))})
            self.head = transformers.pytorch_utils.Conv1D(5, 6)

        def forward(self, ids):
            x = self.body["line"](self.words(ids).transpose(1, 2))
            return self.head(self.body["plane"](x.unsqueeze(2)).mean((2, 3)))

    class Ours(nn.Cell):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.trunk = nn.CellList(
                [
                    nn.Conv1d(4, 6, 3, pad_mode="valid", has_bias=True),
                    nn.Conv2d(6, 6, (1, 3), pad_mode="valid", has_bias=True),
                ]
            )
            self.output = nn.Dense(6, 5)

        def construct(self, ids):
            x = self.trunk[0](self.table(ids).transpose((0, 2, 1)))
            return self.output(self.trunk[1](x.expand_dims(2)).mean((2, 3)))

    def make_ours():
        state = {name: value.numpy() for name, value in base.items()}
        network = Ours()
        network.table.embedding_table.set_data(Tensor(state["words.weight"]))
        for cell, name in zip(network.trunk, ("body.line", "body.plane")):
            cell.weight.set_data(Tensor(state[f"{name}.weight"].reshape(cell.weight.shape)))
            cell.bias.set_data(Tensor(state[f"{name}.bias"]))
        network.output.weight.set_data(Tensor(np.ascontiguousarray(state["head.weight"].T)))
        network.output.bias.set_data(Tensor(state["head.bias"]))
        return network

    def make_theirs():
        model = Theirs()
        model.load_state_dict(base)
        return model

    names = {"table": "words", "trunk": "body", "trunk.0": "body.line", "trunk.1": "body.plane", "output": "head"}
    base = {name: value.clone() for name, value in Theirs().state_dict().items()}
    ids = rng.integers(0, 7, (3, 8))
    options = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["words", "line", "plane", "head"], fan_in_fan_out=True)
    model = peft.get_peft_model(make_theirs(), options).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).numpy()
    model.save_pretrained(tmp_path / "theirs")
    network = load_peft(make_ours(), tmp_path / "theirs", names)
    np.testing.assert_allclose(network(Tensor(ids.astype(np.int32))).asnumpy(), expected, atol=1e-5)

    with pytest.raises(TypeError, match="'base_model' must be the name of a model, but got {"):
        save_peft(network, tmp_path / "ours", names)  # in the place that load_peft has for it
    save_peft(network, tmp_path / "ours", names=lambda path: names.get(path, path))
    back = peft.PeftModel.from_pretrained(make_theirs(), tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.tensor(ids)).numpy(), expected, atol=1e-5)
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
