"""Where MindFormers looks for a dropout layer that works on every MindSpore."""

from mindspore import nn


def get_dropout(dropout_prob: float) -> nn.Dropout:
    """A dropout layer that zeroes each entry with probability `dropout_prob`.

    >>> get_dropout(0.1).p
    0.1
    """
    return nn.Dropout(p=dropout_prob)
