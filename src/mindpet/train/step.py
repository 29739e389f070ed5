"""One optimizer step as Cells that compile: loss, gradient, accumulation, clipping, update."""

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet.delta.r_drop import IGNORED, RDropLoss, rdrop_repeat


class ClassificationLoss(nn.Cell):
    """The *sum* of the cross entropies over the rows that count, and their number.

    With `r_drop_alpha` above zero every sample passes twice, and the R-Drop loss takes the place of cross entropy.
    """

    def __init__(self, network: nn.Cell, r_drop_alpha: float = 0.0):
        super().__init__(auto_prefix=False)
        self.network = network
        self.r_drop_alpha = r_drop_alpha
        self.r_drop = RDropLoss()

    def construct(self, input_ids, attention_mask, token_type_ids, labels):
        count = (labels != IGNORED).astype(mstype.float32).sum()
        if self.r_drop_alpha > 0:
            input_ids, attention_mask, token_type_ids, labels = rdrop_repeat(
                input_ids, attention_mask, token_type_ids, labels
            )
            logits = self.network(input_ids, attention_mask, token_type_ids)
            return self.r_drop(logits.astype(mstype.float32), labels, self.r_drop_alpha) * count, count
        logits = self.network(input_ids, attention_mask, token_type_ids)
        return ops.cross_entropy(logits.astype(mstype.float32), labels, ignore_index=IGNORED, reduction="sum"), count


class TrainStep(nn.Cell):
    """Gradient, mean over the rows that count, clipping to a global norm, update. Returns (mean loss, norm)."""

    def __init__(self, loss: nn.Cell, optimizer: nn.Optimizer, clip_norm: float):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.gradient = ops.value_and_grad(loss, None, optimizer.parameters, has_aux=True)
        self.update = ClippedUpdate(optimizer, clip_norm)

    def construct(self, input_ids, attention_mask, token_type_ids, labels):
        (total, count), gradients = self.gradient(input_ids, attention_mask, token_type_ids, labels)
        norm = self.update(gradients, count)
        return ops.depend(total / count, norm), norm


class AccumulateStep(nn.Cell):
    """Adds the gradient of one small batch to buffers."""

    def __init__(self, loss: nn.Cell, optimizer: nn.Optimizer):
        super().__init__(auto_prefix=False)
        self.gradient = ops.value_and_grad(loss, None, optimizer.parameters, has_aux=True)
        self.buffers = optimizer.parameters.clone(prefix="accumulated", init="zeros")
        self.total = Parameter(Tensor(0.0, mstype.float32), name="accumulated_loss", requires_grad=False)
        self.count = Parameter(Tensor(0.0, mstype.float32), name="accumulated_count", requires_grad=False)
        self.add = ops.HyperMap()

    def construct(self, input_ids, attention_mask, token_type_ids, labels):
        (total, count), gradients = self.gradient(input_ids, attention_mask, token_type_ids, labels)
        done = self.add(ops.assign_add, self.buffers, gradients)
        done = ops.depend(ops.assign_add(self.total, total), done)
        return ops.depend(ops.assign_add(self.count, count), done)


class AppliedStep(nn.Cell):
    """One update from the buffers of an :class:`AccumulateStep`, which it empties. Returns (mean loss, norm)."""

    def __init__(self, accumulated: AccumulateStep, optimizer: nn.Optimizer, clip_norm: float):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.buffers, self.total, self.count = accumulated.buffers, accumulated.total, accumulated.count
        self.update = ClippedUpdate(optimizer, clip_norm)
        self.each = ops.HyperMap()

    def construct(self):
        mean = self.total / self.count
        norm = self.update(self.buffers, self.count)
        mean = ops.depend(mean, norm)
        emptied = self.each(_set_to_zero, ops.depend(self.buffers, norm))
        emptied = ops.depend(ops.assign(self.total, Tensor(0.0, mstype.float32)), (emptied, mean))
        emptied = ops.depend(ops.assign(self.count, Tensor(0.0, mstype.float32)), emptied)
        return ops.depend(mean, emptied), norm


class ClippedUpdate(nn.Cell):
    """Divides summed gradients by `count`, scales them to at most `clip_norm`, and updates. Returns the norm before."""

    def __init__(self, optimizer: nn.Optimizer, clip_norm: float):
        super().__init__(auto_prefix=False)
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self.each = ops.HyperMap()

    def construct(self, gradients, count):
        squares = self.each(_square_sum, gradients)
        norm = ops.sqrt(ops.addn(squares)) / count
        factor = 1.0 / count
        if self.clip_norm > 0:
            factor = factor * ops.minimum(self.clip_norm / (norm + 1e-6), Tensor(1.0, mstype.float32))
        scaled = self.each(ops.partial(_scale, factor), gradients)
        return ops.depend(norm, self.optimizer(scaled))


def _square_sum(gradient):
    return ops.square(gradient.astype(mstype.float32)).sum()


def _scale(factor, gradient):
    return gradient * factor.astype(gradient.dtype)


def _set_to_zero(buffer):
    return ops.assign(buffer, ops.zeros_like(buffer))
