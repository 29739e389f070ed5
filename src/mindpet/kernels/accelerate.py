"""Put the kernels into a network that nobody edits."""

from collections.abc import Callable
from typing import Any

from mindspore import dtype as mstype
from mindspore import nn, ops

from mindpet import _checks, _compat
from mindpet.delta.dense import ComputeDense
from mindpet.delta.lora import LoRADense
from mindpet.graph.inject import replace_cells, require_in_place
from mindpet.graph.targets import cells_by_path
from mindpet.kernels import build, cells

_BY_NAME: dict[str, Callable[[Any], nn.Cell]] = {
    "gelu_tanh": cells.FastGELUTanh,
    "masked_softmax": cells.FastMaskedSoftmax,
    "attention": cells.FastAttention,
    "rms_norm": cells.FastRMSNorm,
    "rotary": cells.FastRotary,
    "gated_silu": cells.FastGatedSiLU,
    "product": cells.FastMatMul,
    "cross_entropy": cells.FastCrossEntropy,
    "head_loss": cells.FastHeadLoss,
    "quantised_product": cells.FastQuantisedProduct,
    "square_sum": cells.FastSquareSum,
}


def accelerate(network: nn.Cell, *, compiled: bool | None = None) -> nn.Cell:
    """Let fast CPU kernels compute what MindSpore's operators are slow at, in place.

    Parameters, their names, checkpoints and what trains stay as they are; so do results, up to rounding. It can be
    called before or after :func:`mindpet.inject`; a second call finds what came since the first. Where the kernels
    cannot be used (another device, no compiler, ``MINDPET_KERNELS=0``, semi-auto parallel mode) the network is returned
    as it is. Inputs that are not float32, or in graph mode of a shape that is not known when the graph is compiled
    (``set_inputs`` with None), go to MindSpore's operators. The kernels have first derivatives only: set
    ``MINDPET_KERNELS=0`` for second ones. Dense layers become Cells of another class: keep no references to them, and
    set a LoRA layer's `lora_dropout` and `scaling` before.

    Replaced are ``nn.GELU``, ``nn.LayerNorm`` over one last axis, the product of each ``nn.Dense``, with its bias and a
    LoRA branch without dropout (if it is `compiled`: PyNative would compute gradients of frozen weights), and each
    Cell whose class says by an attribute ``mindpet_kernel`` what it computes. A subclass does not inherit it, since it
    may compute something else: it names its kernel again.

    - ``"gelu_tanh"``: ``construct(x)`` is the tanh form of GELU;
    - ``"masked_softmax"``: ``construct(scores, mask)`` is softmax(scores + mask) over the last of four axes; no
      gradient goes to the mask;
    - ``"attention"``: as :class:`mindpet.models.attention.DotProductAttention`. In training with dropout the kernel
      takes it only under :class:`mindpet.train.dropout.DropoutKeys`, as in a run;
    - ``"rms_norm"``: ``construct(x)``, with `weight` and `epsilon`;
    - ``"rotary"``: ``construct(x, cos, sin)`` is x cos + swap(x) sin, where swap exchanges the halves of the last axis;
      no gradient goes to cos and sin;
    - ``"gated_silu"``: ``construct(gate, up)`` is silu(gate) * up;
    - ``"product"``: ``construct(x, weight)`` is x weight^T by an operator `matmul`; taken if it is `compiled`;
    - ``"cross_entropy"``: ``construct(logits, labels)`` is the loss of each row, 0 where the label is negative;
    - ``"head_loss"``: as :class:`mindpet.models.head.HeadLoss`; taken if it is `compiled`, and the Cell that it is in
      says by `head_is_frozen` that nothing in the table trains;
    - ``"square_sum"``: ``construct(x)`` is the sum of the squares of all entries; no gradient goes through it;
    - ``"quantised_product"``: as :class:`mindpet.delta.blockwise.QuantisedProduct`, with its `form`.

    Args:
        network: any Cell, a loss around a network too.
        compiled: whether it will run in a graph: in graph mode, or in PyNative mode within ``ms.jit``. None for what
            the mode is now. Where there are kernels, True in PyNative mode sets ``MS_DEV_JIT_PIPELINE=0`` in the
            environment, unless it is set: the thread that waits for a jitted graph would take a core from it.

    Returns:
        The same network.

    Raises:
        TypeError: `network` is not a Cell.
        ValueError: deltas are merged or held out of the network now; a ``mindpet_kernel`` that there is not.

    >>> from mindspore import nn
    >>> network = accelerate(nn.SequentialCell(nn.Dense(4, 4), nn.LayerNorm((4,))))
    >>> [parameter.name for parameter in network.get_parameters()]
    ['0.weight', '0.bias', '1.gamma', '1.beta']
    """
    require_in_place("accelerate", network)
    if compiled is None:
        compiled = _compat.in_graph_mode()
    if _compat.in_parallel_compile_mode() or not build.available():
        return network
    if compiled:
        _compat.run_jitted_graphs_at_once()
    made: dict[int, nn.Cell] = {}  # a Cell that two paths share stays one Cell

    def fast(cell: nn.Cell, make: Callable[[Any], nn.Cell]) -> nn.Cell:
        if id(cell) not in made:
            made[id(cell)] = make(cell)
            _compat.copy_recompute(cell, made[id(cell)])
        return made[id(cell)]

    dense = {}
    paths = cells_by_path(network)
    for path, cell in paths.items():  # what is refused is refused before anything changes
        _replacement(path, cell, paths.get(path.rpartition(".")[0], network), compiled)
        if compiled and _has_plain_bias(cell):
            dense[path] = fast(cell, cells.FastDense)
    if dense:
        replace_cells(network, dense)
    replacements = {}
    done: tuple[str, ...] = ()  # what is fast already, with all that is in it
    paths = cells_by_path(network)
    for path, cell in paths.items():
        if path.startswith(done):
            continue
        if isinstance(cell, cells.Fast):
            done = (*done, f"{path}.")
        make = _replacement(path, cell, paths.get(path.rpartition(".")[0], network), compiled)
        if make is None or _compat.forced_dtype(cell) is not None or _compat.has_hooks(cell):
            continue
        replacements[path] = fast(cell, make)
        done = (*done, f"{path}.")
    products = [_accelerate_product(cell) for cell in (network, *paths.values()) if compiled]
    if replacements:
        replace_cells(network, replacements)
    elif any(products):
        _compat.forget_compiled(network)
    return network


def _has_plain_bias(cell: nn.Cell) -> bool:
    """Whether it is a dense layer of MindSpore's own whose product and bias a kernel can compute at once."""
    if type(cell) is not nn.Dense or not _adds_plain_bias(cell) or _compat.has_hooks(cell):
        return False
    return _is_plain_product(cell) and _compat.forced_dtype(cell) is None and cell.weight.dtype == mstype.float32


def _is_plain_product(cell: Any) -> bool:
    """Whether it is x W^T and not cut."""
    product = _original_product(cell)
    if type(product) is not ops.MatMul:
        return False
    return product.transpose_b and not product.transpose_a and _compat.strategy_of(product) is None


def _original_product(cell: nn.Cell) -> Any:
    """The operator x W^T, that behind a kernel of an earlier call too."""
    product = getattr(cell, "matmul", None)
    return product.original if isinstance(product, cells.FastMatMul) else product


def _adds_plain_bias(cell: Any) -> bool:
    """Whether there is a bias, in float32, and its sum is not cut."""
    return cell.has_bias and cell.bias.dtype == mstype.float32 and _compat.strategy_of(cell.bias_add) is None


def _accelerate_product(cell: nn.Cell) -> bool:
    """The products of a dense layer."""
    if not isinstance(cell, nn.Dense) or not _is_plain_product(cell) or _compat.forced_dtype(cell) is not None:
        return False
    changed = False
    plain_bias = _adds_plain_bias(cell)
    if isinstance(cell, ComputeDense) and plain_bias and cell.fused_product is None:
        cell.fused_product, changed = cells.FastBiasedProduct(), True
    whole = plain_bias or not cell.has_bias
    if type(cell) is LoRADense and whole and cell.fused_branch is None and _has_plain_branch(cell):
        cell.fused_branch, changed = cells.FastLoRA(cell.lora_alpha / cell.lora_rank, cell.out_channels), True
    if not isinstance(cell.matmul, cells.FastMatMul):
        cell.matmul, changed = cells.FastMatMul(cell.matmul), True
    return changed


def _has_plain_branch(layer: LoRADense) -> bool:
    """Whether it is the branch of the paper without dropout, and not cut."""
    operators = layer.lora_a_matmul, layer.lora_b_matmul, layer.mul, layer.add
    plain = type(layer.lora_dropout) is nn.Dropout and layer.lora_dropout.p == 0
    return plain and all(_compat.strategy_of(each) is None for each in operators)


def _replacement(path: str, cell: nn.Cell, holder: nn.Cell, compiled: bool) -> Callable[[Any], nn.Cell] | None:
    """What makes the fast Cell for this one, which is a child of the `holder`."""
    if type(cell) is nn.GELU:
        return cells.FastGELU
    if type(cell) is nn.LayerNorm:
        return cells.FastLayerNorm if _last_axis_only(cell) else None
    name = vars(type(cell)).get("mindpet_kernel")
    if name is not None and name not in _BY_NAME:
        raise ValueError(
            f"The 'mindpet_kernel' of the {type(cell).__name__} at {path!r} must be one of {', '.join(_BY_NAME)}, "
            f"but is {_checks.shown(name)}{_checks.near(name, _BY_NAME)}."
        )
    if name == "attention" and not cells.is_plain_attention(cell):
        return None
    if name == "product" and not (compiled and _is_plain_product(cell)):
        return None
    if name == "head_loss" and not (compiled and getattr(holder, "head_is_frozen", False)):
        return None
    return _BY_NAME[name] if name else None


def _last_axis_only(norm: Any) -> bool:
    one_axis = len(norm.normalized_shape) == 1 and norm.begin_norm_axis == -1 and norm.begin_params_axis == -1
    return one_axis and norm.gamma.dtype == mstype.float32 and norm.beta.dtype == mstype.float32
