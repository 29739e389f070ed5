"""Networks that can be tuned out of the box, and the reading of their weights."""

from mindpet.models.bert import BertConfig, BertForSequenceClassification, BertModel, mean_pool
from mindpet.models.families import Family
from mindpet.models.generation import Generation, TextStream, generate, stream_text
from mindpet.models.gpt2 import GPT2Config, GPT2LMHeadModel
from mindpet.models.llama import LlamaConfig, LlamaForCausalLM
from mindpet.models.loading import LoadReport, PretrainedFilesError
from mindpet.models.prefix_start import start_prefix
from mindpet.models.pretrained import (
    ChatTemplate,
    Pretrained,
    chat_template,
    family_of,
    load_tokenizer,
    open_pretrained,
)

__all__ = [
    "BertConfig",
    "BertForSequenceClassification",
    "BertModel",
    "ChatTemplate",
    "Family",
    "GPT2Config",
    "GPT2LMHeadModel",
    "Generation",
    "LlamaConfig",
    "LlamaForCausalLM",
    "LoadReport",
    "Pretrained",
    "PretrainedFilesError",
    "TextStream",
    "chat_template",
    "family_of",
    "generate",
    "load_tokenizer",
    "mean_pool",
    "open_pretrained",
    "start_prefix",
    "stream_text",
]
