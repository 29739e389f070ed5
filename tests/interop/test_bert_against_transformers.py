import numpy as np
import pytest
from mindspore import Tensor

from mindpet.models import BertForSequenceClassification

pytestmark = pytest.mark.interop


@pytest.mark.models
@pytest.mark.parametrize("labels", [2, 5])
def test_logits_equal_those_of_transformers(mode, minilm, tmp_path, labels):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    theirs = transformers.BertForSequenceClassification.from_pretrained(minilm, num_labels=labels).eval()
    theirs.save_pretrained(tmp_path)
    ours, report = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=labels)
    assert not report.missing
    assert not report.unexpected
    ours.set_train(False)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 30000, (3, 20))
    mask = np.ones_like(ids)
    mask[1, 12:] = 0
    kinds = (np.arange(20) > 9).astype(np.int64)[None].repeat(3, 0)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), torch.tensor(mask), torch.tensor(kinds)).logits.numpy()
    logits = ours(*(Tensor(array.astype(np.int32)) for array in (ids, mask, kinds)))
    np.testing.assert_allclose(logits.asnumpy(), expected, atol=1e-4)
