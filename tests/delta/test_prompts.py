"""The prompt methods by themselves: their formulas in NumPy, and what is refused."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from mindpet import MultitaskPromptTuningConfig, PromptTuningConfig, PTuningConfig, inject, load_delta, save_delta
from mindpet.delta import MultitaskPromptTuning, PromptSlot, PromptTuning, PTuning


def slot():
    return PromptSlot(nn.Embedding(11, 6, embedding_table="normal"))


def named(filled):
    """The parameters in float64, by the ends of their names."""
    return {
        parameter.name.rpartition("tuning_")[2]: parameter.asnumpy().astype(float)
        for parameter in filled.get_parameters()
    }


def dense(values, layer, rows):
    return rows @ values[f"mlp.{layer}.weight"].T + values[f"mlp.{layer}.bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(values, end, rows):
    """Hochreiter and Schmidhuber's cell with a forget gate over the rows, in the order of the rows."""
    parts = [values[f"lstm.{part}_{end}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    hidden = cell = np.zeros(parts[1].shape[1])
    found = []
    for row in rows:
        gates = parts[0] @ row + parts[1] @ hidden + parts[2] + parts[3]
        take, forget, new, give = np.split(gates, 4)
        cell = sigmoid(forget) * cell + sigmoid(take) * np.tanh(new)
        hidden = sigmoid(give) * np.tanh(cell)
        found.append(hidden)
    return np.array(found)


def test_an_mlp_makes_the_tokens(mode):
    filled = PTuning.from_slot(slot(), PTuningConfig(tokens=4, encoder_hidden=5))
    values = named(filled)
    rows = np.maximum(dense(values, 0, values["embedding"]), 0)
    rows = dense(values, 4, np.maximum(dense(values, 2, rows), 0))
    np.testing.assert_allclose(filled().asnumpy(), rows, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_lstm_makes_the_tokens(mode, layers):
    filled = PTuning.from_slot(
        slot(), PTuningConfig(tokens=4, encoder="lstm", encoder_hidden=5, encoder_layers=layers)
    ).set_train(False)
    values = named(filled)
    rows = values["embedding"]
    for layer in range(layers):
        there, back = lstm(values, f"l{layer}", rows), lstm(values, f"l{layer}_reverse", rows[::-1])[::-1]
        rows = np.concatenate([there, back], 1)
    rows = dense(values, 2, np.maximum(dense(values, 0, rows), 0))
    np.testing.assert_allclose(filled().asnumpy(), rows, atol=2e-5)


def test_tokens_of_an_lstm_depend_on_each_other_and_those_of_an_mlp_do_not():
    for encoder, others in (("mlp", False), ("lstm", True)):
        filled = PTuning.from_slot(slot(), PTuningConfig(tokens=4, encoder=encoder, encoder_hidden=5))
        before = filled().asnumpy()
        table = filled.mindpet_delta_p_tuning_embedding
        changed = table.asnumpy().copy()
        changed[1] += 1
        table.set_data(ms.Tensor(changed))
        moved = np.abs(filled().asnumpy() - before).max(1) > 1e-6
        assert moved.tolist() == [others, True, others, others]


def test_dropout_is_between_the_layers_of_the_lstm():
    config = PTuningConfig(tokens=4, encoder="lstm", encoder_hidden=5, dropout=0.5)
    filled = PTuning.from_slot(slot(), config).set_train(True)
    assert not np.array_equal(filled().asnumpy(), filled().asnumpy())
    filled.set_train(False)
    np.testing.assert_array_equal(filled().asnumpy(), filled().asnumpy())


def test_tokens_of_a_task_are_the_table_times_its_matrix(mode):
    filled = MultitaskPromptTuning.from_slot(slot(), MultitaskPromptTuningConfig(tokens=4, rank=2, num_tasks=3, task=1))
    values = named(filled)
    np.testing.assert_allclose(filled().asnumpy(), values["table"] * (values["u"][1] @ values["v"][1]), atol=1e-7)


def test_only_the_task_that_runs_gets_a_gradient():
    filled = MultitaskPromptTuning.from_slot(slot(), MultitaskPromptTuningConfig(tokens=4, num_tasks=3, task=2))
    weights = ms.ParameterTuple(filled.trainable_params())
    table, u, v = (gradient.asnumpy() for gradient in ms.grad(lambda: (filled() ** 2).sum(), None, weights)())
    assert np.abs(table).max() > 0
    assert np.abs(u).max((1, 2)).astype(bool).tolist() == [False, False, True]
    assert np.abs(v).max((1, 2)).astype(bool).tolist() == [False, False, True]


class Holder(nn.Cell):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.prompts = PromptSlot(self.words)

    def construct(self):
        return self.prompts()


def test_a_delta_of_all_tasks_loads_for_another_task(tmp_path):
    network = inject(Holder(), MultitaskPromptTuningConfig(tokens=4, num_tasks=2))
    save_delta(network, tmp_path)
    other = load_delta(inject(Holder(), MultitaskPromptTuningConfig(tokens=4, num_tasks=2, task=1)), tmp_path)
    values = named(network.prompts)
    np.testing.assert_allclose(other().asnumpy(), values["table"] * (values["u"][1] @ values["v"][1]), atol=1e-7)
    assert (network.prompts.task, other.prompts.task) == (0, 1)
    with pytest.raises(AttributeError):  # a compiled network would go on with the old one
        other.prompts.task = 0
    with pytest.raises(ValueError, match="num_tasks was 2 and is 3 here"):
        load_delta(inject(Holder(), MultitaskPromptTuningConfig(tokens=4, num_tasks=3)), tmp_path)


def test_a_table_starts_with_the_words_that_are_named():
    empty = slot()
    table = empty.words.embedding_table.asnumpy()
    filled = PromptTuning.from_slot(empty, PromptTuningConfig(tokens=5, start=[7, 2]))
    np.testing.assert_array_equal(filled().asnumpy(), table[[7, 2, 7, 2, 7]])
    few = PromptTuning.from_slot(empty, PromptTuningConfig(tokens=2, start=[7, 2, 5]))
    np.testing.assert_array_equal(few().asnumpy(), table[[7, 2]])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PromptTuningConfig(tokens=0), "'tokens' must be a positive int"),
        (lambda: PromptTuningConfig(start="vocabulry"), "did you mean 'vocabulary'"),
        (lambda: PromptTuningConfig(start=[]), "'start' must be 'vocabulary', 'random' or ids"),
        (lambda: PromptTuningConfig(start=[1, -2]), "ids of words from 0 on, but got"),
        (lambda: PromptTuningConfig(start=[1.0]), "ids of words from 0 on"),
        (lambda: inject(Holder(), PromptTuningConfig(start=[3, 11])), "ids of the 11 words, but has 11"),
        (lambda: PTuningConfig(encoder="rnn"), "'encoder' must be 'mlp' or 'lstm', but got 'rnn'"),
        (lambda: PTuningConfig(encoder_hidden=0), "'encoder_hidden' must be a positive int"),
        (lambda: PTuningConfig(encoder_layers=0), "'encoder_layers' must be a positive int"),
        (lambda: PTuningConfig(dropout=0.1), "needs encoder='lstm'"),
        (lambda: PTuningConfig(dropout=0.1, encoder="lstm", encoder_layers=1), "'encoder_layers' of 2 or more"),
        (lambda: PTuningConfig(dropout=1.0, encoder="lstm"), r"'dropout' must be in \[0, 1\)"),
        (lambda: MultitaskPromptTuningConfig(num_tasks=2, task=2), "'task' must be one of 0 to 1, but got 2"),
        (lambda: MultitaskPromptTuningConfig(task=True), "'task' must be one of 0 to 0, but got True"),
        (lambda: MultitaskPromptTuningConfig(rank=0), "'rank' must be a positive int"),
    ],
)
def test_what_is_wrong_is_said(make, says):
    with pytest.raises(ValueError, match=says):
        make()
