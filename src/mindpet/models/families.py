"""The kinds of networks here, by the ``model_type`` of Hugging Face."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindspore import nn

from mindpet.models.bert import BertConfig, BertForSequenceClassification
from mindpet.models.gpt2 import GPT2Config, GPT2LMHeadModel
from mindpet.models.llama import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Family:
    """One kind of network.

    Attributes:
        name: Hugging Face's ``model_type``.
        task: ``"classification"`` or ``"language"``.
        network: the class; it has ``from_pretrained``.
        config: the class of its sizes; it has ``from_content(content, source)``.
        positions: the key of a ``config.json`` that says how many tokens fit.
    """

    name: str
    task: str
    network: type[nn.Cell]
    config: Any
    positions: str = "max_position_embeddings"

    def max_positions(self, content: Mapping[str, Any]) -> int:
        """How many tokens fit into a network with that ``config.json``."""
        return getattr(self.config.from_content(dict(content), "config.json"), self.positions)


FAMILIES = {
    family.name: family
    for family in (
        Family("bert", "classification", BertForSequenceClassification, BertConfig),
        Family("llama", "language", LlamaForCausalLM, LlamaConfig),
        Family("gpt2", "language", GPT2LMHeadModel, GPT2Config, "n_positions"),
    )
}
