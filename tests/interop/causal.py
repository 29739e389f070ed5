"""What the comparisons of LLaMA and GPT-2 with transformers and PEFT share."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


def their_logits(model, ids, mask=None):
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(np.asarray(mask))
        return model(torch.tensor(ids.astype(np.int64)), attention_mask=mask).logits.numpy()


def with_delta(model, config, std):
    """The model of transformers with an adapter of PEFT in it, all of it random numbers."""
    model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()
