"""MAM is a prefix and parallel adapters, under one name."""

import numpy as np
import pytest
from mindspore import Tensor

from mindpet import MAMConfig, ParallelAdapterConfig, PrefixConfig, inject, save_peft
from mindpet.interop import PeftFormatError
from mindpet.models import BertConfig, BertForSequenceClassification
from tests.oracles import randomise

PREFIX = {"tokens": 4, "embed_dim": 3, "mid_dim": 5}
BESIDE = {"size": 6, "scale": 2.0, "non_linearity": "tanh"}
IDS = Tensor(np.arange(8, dtype=np.int32).reshape(2, 4))


def network():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=20, max_position_embeddings=12, **sizes)
    return BertForSequenceClassification(config).set_train(False)


@pytest.mark.parametrize("projection", [True, False])
def test_it_is_the_two_methods_together(rng, projection):
    one = randomise(inject(network(), MAMConfig(**PREFIX, projection=projection, **BESIDE)), rng, 0.3)
    two = inject(network(), PrefixConfig(**PREFIX, projection=projection))
    inject(two, ParallelAdapterConfig(**BESIDE))
    values = {parameter.name: parameter for parameter in one.get_parameters()}
    assert list(values) == [parameter.name for parameter in two.get_parameters()]
    assert [p.name for p in one.trainable_params()] == [p.name for p in two.trainable_params()]
    for parameter in two.get_parameters():
        parameter.set_data(values[parameter.name].value())
    mask, types = Tensor(np.ones((2, 4), np.int32)), Tensor(np.zeros((2, 4), np.int32))
    np.testing.assert_array_equal(one(IDS, mask, types).asnumpy(), two(IDS, mask, types).asnumpy())


def test_peft_has_no_such_method(tmp_path):
    with pytest.raises(PeftFormatError, match="this network has parallel_adapter and prefix"):
        save_peft(inject(network(), MAMConfig()), tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokens": 0}, "'tokens' must be a positive int"),
        ({"size": -2}, "'size' must be a positive int"),
        ({"projection": 1}, "'projection' must be a bool"),
        ({"scale": 0}, "'scale' must be finite and not 0"),
        ({"dropout": 1.0}, "'dropout' must be in"),
    ],
)
def test_wrong_values_are_refused(options, says):
    with pytest.raises((TypeError, ValueError), match=f"For 'MAMConfig', {says}"):
        MAMConfig(**options)
