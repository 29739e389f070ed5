"""A tuned language model, taken to PyTorch: as an adapter of PEFT, and merged."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpet.models.pretrained import open_pretrained
from mindpet.train import artifacts, run
from mindpet.train.config import load_run
from tests.tiny import stories, write_language_model

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def tuned(request, tmp_path_factory):
    """The base model, the directory of a LoRA run on it, inputs, and the tuned network's logits on them."""
    folder = tmp_path_factory.mktemp("tuned")
    model = write_language_model(folder / "model", tie_word_embeddings=request.param)
    (folder / "story.txt").write_text(stories(60))
    settings = [
        f"model.path={model}",
        f"data.train={folder / 'story.txt'}",
        f"output.directory={folder / 'out'}",
        "data.max_length=32",
        "method.rank=4",
        "method.targets=['*_proj']",
        "train.max_steps=6",
        "train.mode=pynative",
        "train.learning_rate=0.03",
    ]
    run.finetune(load_run(None, settings))
    ids = np.random.default_rng(0).integers(3, 290, (2, 12)).astype(np.int32)
    network = run.load_tuned(folder / "out")[1]
    yield model, folder / "out", ids, network(Tensor(ids), Tensor(np.ones_like(ids))).asnumpy()
    ms.set_context(mode=ms.PYNATIVE_MODE)


def logits_there(network, ids):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return network.eval()(torch.tensor(ids.astype(np.int64))).logits.numpy()


def test_an_exported_run_gives_equal_logits_in_peft(tuned, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model, directory, ids, expected = tuned
    artifacts.export_to(str(directory), tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    there = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert there.peft_config["default"].task_type == "CAUSAL_LM"
    np.testing.assert_allclose(logits_there(there, ids), expected, atol=2e-4)
    with there.disable_adapter():
        assert np.abs(logits_there(there, ids) - expected).max() > 0.05


def test_a_merged_run_loads_in_transformers_with_equal_logits(tuned, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, directory, ids, expected = tuned
    artifacts.merge_into(str(directory), tmp_path / "merged")
    there, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    np.testing.assert_allclose(logits_there(there, ids), expected, atol=2e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    turns = [{"role": "user", "content": "Where?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    ours = open_pretrained(model).tokenizer()
    assert tokenizer(text)["input_ids"] == ours.encode(text).ids
