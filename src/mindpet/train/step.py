"""One optimizer step as Cells that compile: loss, gradient, accumulation, clipping, update."""

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet._compat import GraphCell
from mindpet.delta.r_drop import IGNORED, RDropLoss, rdrop_repeat
from mindpet.kernels import accelerate
from mindpet.models.head import CrossEntropy


class SummedLoss(nn.Cell):
    r"""The *sum* of the cross entropies over the labels that count, and their number.

    With `r_drop_alpha` above zero every sample passes twice, in one batch with masks of dropout of its own for each
    copy, and the R-Drop loss takes the place of cross entropy.

    Shapes: the columns are the network's inputs and the labels, ``(N,)`` for logits ``(N, C)`` or ``(N, T)`` for
    logits ``(N, T, C)``. A label of -100 does not count. A network that `gives_losses` gets the labels too.
    """

    def __init__(self, network: nn.Cell, r_drop_alpha: float = 0.0):
        super().__init__(auto_prefix=False)
        self.network, self.by_network = network, "gives_losses" in vars(type(network))
        self.r_drop_alpha = r_drop_alpha
        self.r_drop = RDropLoss()
        self.cross_entropy = CrossEntropy()

    def construct(self, *columns):
        labels = columns[-1]
        count = (labels != IGNORED).astype(mstype.float32).sum()
        if self.r_drop_alpha > 0:
            columns = rdrop_repeat(*columns)
            logits = self.network(*columns[:-1]).astype(mstype.float32)  # (2N, C) or (2N, T, C)
            return self.r_drop(logits, columns[-1], self.r_drop_alpha) * count, count
        if self.by_network and not (self.network.fp16 or self.network.bf16):  # what `to_float` sets: losses are float32
            return self.network(*columns).sum(), count
        logits = self.network(*columns[:-1]).astype(mstype.float32)
        rows = logits.reshape((-1, logits.shape[-1]))  # (N, C) or (N * T, C)
        return self.cross_entropy(rows, labels.reshape((-1,))).sum(), count


class SummedScores(GraphCell):
    """What a language model's scores are made of: the sum of the cross entropies, the hits, the labels that count."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)
        self.network = network
        self.cross_entropy = CrossEntropy()

    def construct(self, *columns):
        logits = self.network(*columns[:-1]).astype(mstype.float32)
        rows, labels = logits.reshape((-1, logits.shape[-1])), columns[-1].reshape((-1,))
        counted = labels != IGNORED
        hits = ops.logical_and(ops.equal(rows.argmax(-1).astype(mstype.int32), labels), counted)
        loss = self.cross_entropy(rows, labels).sum()
        return loss, hits.astype(mstype.float32).sum(), counted.astype(mstype.float32).sum()


class SummedOverProcesses(nn.Cell):
    """Gradients, loss and count summed over all processes, in one message; as they are where there is one process."""

    def __init__(self, processes: int):
        super().__init__(auto_prefix=False)
        self.processes = processes
        if processes > 1:
            self.all_reduce = ops.AllReduce()

    def construct(self, gradients, total, count):
        if self.processes == 1:
            return gradients, total, count
        flat: tuple = ()
        for gradient in gradients:
            flat += (gradient.astype(mstype.float32).reshape((-1,)),)
        summed = self.all_reduce(ops.concat((*flat, total.reshape((1,)), count.reshape((1,)))))
        outputs: tuple = ()
        begin = 0
        for gradient in gradients:
            end = begin + gradient.size
            outputs += (summed[begin:end].reshape(gradient.shape).astype(gradient.dtype),)
            begin = end
        return outputs, summed[begin], summed[begin + 1]


class TrainStep(GraphCell):
    """Gradient, mean over the labels that count, clipping to a global norm, update. Returns (mean loss, norm)."""

    def __init__(self, loss: nn.Cell, optimizer: nn.Optimizer, clip_norm: float, processes: int = 1):
        super().__init__(auto_prefix=False)
        self.optimizer, self.loss = optimizer, loss  # the loss is here for its parameters: see compiled.py
        self.gradient = ops.value_and_grad(loss, None, optimizer.parameters, has_aux=True)
        self.sum = SummedOverProcesses(processes)
        self.update = ClippedUpdate(optimizer, clip_norm)

    def construct(self, *columns):
        (total, count), gradients = self.gradient(*columns)
        gradients, total, count = self.sum(gradients, total, count)
        norm = self.update(gradients, count)
        return ops.depend(total / count, norm), norm


class AccumulateStep(GraphCell):
    """Adds the gradient of one small batch to buffers."""

    def __init__(self, loss: nn.Cell, optimizer: nn.Optimizer):
        super().__init__(auto_prefix=False)
        self.loss = loss  # for its parameters: see compiled.py
        self.gradient = ops.value_and_grad(loss, None, optimizer.parameters, has_aux=True)
        self.buffers = optimizer.parameters.clone(prefix="accumulated", init="zeros")
        self.total = Parameter(Tensor(0.0, mstype.float32), name="accumulated_loss", requires_grad=False)
        self.count = Parameter(Tensor(0.0, mstype.float32), name="accumulated_count", requires_grad=False)
        self.add = ops.HyperMap()

    def construct(self, *columns):
        (total, count), gradients = self.gradient(*columns)
        done = self.add(ops.assign_add, self.buffers, gradients)
        done = ops.depend(ops.assign_add(self.total, total), done)
        return ops.depend(ops.assign_add(self.count, count), done)


class AppliedStep(GraphCell):
    """One update from the buffers of an :class:`AccumulateStep`, which it empties. Returns (mean loss, norm)."""

    def __init__(self, accumulated: AccumulateStep, optimizer: nn.Optimizer, clip_norm: float, processes: int = 1):
        super().__init__(auto_prefix=False)
        self.sum = SummedOverProcesses(processes)
        self.optimizer = optimizer
        self.buffers, self.total, self.count = accumulated.buffers, accumulated.total, accumulated.count
        self.update = ClippedUpdate(optimizer, clip_norm)
        self.each = ops.HyperMap()

    def construct(self):
        gradients, total, count = self.sum(self.buffers, self.total, self.count)
        mean = total / count
        norm = self.update(gradients, count)
        mean = ops.depend(mean, norm)
        emptied = self.each(_set_to_zero, ops.depend(self.buffers, norm))
        emptied = ops.depend(ops.assign(self.total, Tensor(0.0, mstype.float32)), (emptied, mean))
        emptied = ops.depend(ops.assign(self.count, Tensor(0.0, mstype.float32)), emptied)
        return ops.depend(mean, emptied), norm


class SquareSum(nn.Cell):
    """The sum of the squares of a Tensor's entries, in float32."""

    mindpet_kernel = "square_sum"

    def construct(self, x):
        return ops.square(x.astype(mstype.float32)).sum()


class SumOfSquares(nn.Cell):
    """The sum of the squares of all entries of several Tensors."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.of_one = SquareSum()

    def construct(self, tensors):
        sums: tuple = ()
        for tensor in tensors:
            sums += (self.of_one(tensor),)
        return ops.addn(sums)


class ClippedUpdate(nn.Cell):
    """Divides summed gradients by `count`, scales them to at most `clip_norm`, and updates. Returns the norm before."""

    def __init__(self, optimizer: nn.Optimizer, clip_norm: float):
        super().__init__(auto_prefix=False)
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self.each = ops.HyperMap()
        self.sum_of_squares = accelerate(SumOfSquares())

    def construct(self, gradients, count):
        norm = ops.sqrt(self.sum_of_squares(gradients)) / count
        factor = 1.0 / count
        if self.clip_norm > 0:
            factor = factor * ops.minimum(self.clip_norm / (norm + 1e-6), Tensor(1.0, mstype.float32))
        scaled = self.each(ops.partial(_scale, factor), gradients)
        return ops.depend(norm, self.optimizer(scaled))


def _scale(factor, gradient):
    return gradient * factor.astype(gradient.dtype)


def _set_to_zero(buffer):
    return ops.assign(buffer, ops.zeros_like(buffer))
