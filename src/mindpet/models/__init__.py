"""Networks that can be tuned out of the box, and the reading of their weights."""

from mindpet.models.bert import BertConfig, BertForSequenceClassification, BertModel, mean_pool
from mindpet.models.loading import LoadReport, PretrainedFilesError

__all__ = [
    "BertConfig",
    "BertForSequenceClassification",
    "BertModel",
    "LoadReport",
    "PretrainedFilesError",
    "mean_pool",
]
