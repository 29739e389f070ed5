"""From the last rows of a causal language model to its logits, or at once to its losses."""

from mindspore import dtype as mstype
from mindspore import nn, ops

from mindpet.delta.r_drop import IGNORED


class TiedHead(nn.Cell):
    """Logits by the embedding's table: rows ``(n, hidden)`` and table ``(vocabulary, hidden)`` to rows table^T."""

    mindpet_kernel = "product"  # what mindpet.kernels.accelerate replaces it by

    def __init__(self):
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, rows, table):
        return self.matmul(rows, table)


class CrossEntropy(nn.Cell):
    """The cross entropy of each row: logits ``(N, C)`` and labels ``(N,)`` to ``(N,)``, 0 where the label is -100."""

    mindpet_kernel = "cross_entropy"

    def construct(self, logits, labels):
        return ops.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


class HeadLoss(nn.Cell):
    """The cross entropy of each row by a tied head: rows ``(n, hidden)``, its table, labels ``(n,)`` to ``(n,)``."""

    mindpet_kernel = "head_loss"

    def __init__(self):
        super().__init__()
        self.head, self.cross_entropy = TiedHead(), CrossEntropy()

    def construct(self, rows, table, labels):
        return self.cross_entropy(self.head(rows, table).astype(mstype.float32), labels)
