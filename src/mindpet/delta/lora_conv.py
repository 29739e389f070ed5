"""LoRA beside a convolution. Hu et al. 2021, arXiv:2106.09685, section 4.1, with patches of the image as the input.

::

    x ──┬── convolution with the frozen kernel W ──────────────────────────────────┬── + ── y
        └── dropout ── convolution with A (kernel of the same size) ── 1x1 with B ─┘
"""

from typing import TYPE_CHECKING, Any

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import initializer

from mindpet.delta.lora_start import random_start
from mindpet.utils.version_control import get_dropout

if TYPE_CHECKING:
    from mindpet.delta.lora import LoRAConfig

_SIZES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "pad_mode",
    "padding",
    "dilation",
    "group",
    "has_bias",
)


class LoRAConv2d(nn.Conv2d):
    r"""A two-dimensional convolution with a trainable branch through `rank` channels.

    .. math:: y = W * x + b + \tfrac{\alpha}{r}\, B * (A * \mathrm{dropout}(x))

    Shapes: x ``(batch, in, h, w)``, W ``(out, in, kh, kw)``, A ``(rank, in, kh, kw)``, B ``(out, rank, 1, 1)``; A has
    the strides, padding and dilation of W. B starts at zero, so the layer starts as the convolution that it replaces.
    Cost: ``rank * (in * kh * kw + out)`` parameters and ``2 * rank * (in * kh * kw + out) + 2 * out`` floating-point
    operations a place of the output.

    >>> from mindpet.delta.lora import LoRAConfig
    >>> layer = LoRAConv2d.from_conv(nn.Conv2d(3, 8, 3), LoRAConfig(rank=2))
    >>> layer(ops.ones((1, 3, 5, 5))).shape, layer.mindpet_delta_lora_a.shape
    ((1, 8, 5, 5), (2, 3, 3, 3))
    """

    delta_method = "lora"

    @classmethod
    def from_conv(cls, conv: Any, config: "LoRAConfig") -> "LoRAConv2d":
        """The same convolution, weight, bias and operator shared, with a new branch in the dtype of its weight.

        Raises:
            ValueError: a grouped convolution, or one whose channels come last; a start for dense layers.
        """
        if conv.group != 1 or conv.data_format != "NCHW":
            raise ValueError(
                f"LoRA adapts convolutions with one group and channels first, but got {conv.group} groups and "
                f"{conv.data_format}."
            )
        layer = cls.__new__(cls)
        nn.Cell.__init__(layer)
        for name in (*_SIZES, "conv2d", "bias_add"):
            setattr(layer, name, getattr(conv, name))
        layer.weight = conv.weight
        layer.bias = conv.bias if conv.has_bias else None
        rank, dtype = config.rank, conv.weight.dtype
        a_shape, b_shape = (rank, *conv.weight.shape[1:]), (conv.out_channels, rank, 1, 1)
        start = random_start(config, cls.__name__)
        layer.mindpet_delta_lora_a = Parameter(initializer(start, a_shape, dtype), name="mindpet_delta_lora_a")
        layer.mindpet_delta_lora_b = Parameter(initializer("zeros", b_shape, dtype), name="mindpet_delta_lora_b")
        layer.conv_a = ops.Conv2D(rank, conv.kernel_size, 1, conv.pad_mode, conv.padding, conv.stride, conv.dilation)
        layer.conv_b = ops.Conv2D(conv.out_channels, 1)
        layer.lora_dropout = get_dropout(float(config.dropout))
        layer.lora_rank, layer.lora_alpha = rank, config.scaled_alpha
        layer.scaling = config.scaled_alpha / rank
        layer.set_train(conv.training)
        return layer

    def adapted(self, x):
        """Convolution, bias and branch of images: (batch, in, h, w) -> (batch, out, h', w')."""
        out = self.conv2d(x, self.weight)
        if self.has_bias:
            out = self.bias_add(out, self.bias)
        branch = self.conv_a(self.lora_dropout(x), self.mindpet_delta_lora_a)  # (batch, rank, h', w')
        return out + self.conv_b(branch, self.mindpet_delta_lora_b) * self.scaling

    def construct(self, x):
        return self.adapted(x)

    @property
    def base_weight(self) -> Parameter:
        """The kernel that a delta is added to in merging."""
        return self.weight

    def delta_weight(self) -> Tensor:
        """What the branch adds to W: ``alpha / rank * B A``, in the shape of W."""
        a, b = (p.astype(mstype.float32) for p in (self.mindpet_delta_lora_a, self.mindpet_delta_lora_b))
        product = ops.matmul(b.reshape((b.shape[0], -1)), a.reshape((a.shape[0], -1)))
        return product.reshape((b.shape[0], *a.shape[1:])) * self.scaling

    def extend_repr(self) -> str:
        """For printing."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.lora_rank}"


class LoRAConv1d(LoRAConv2d, nn.Conv1d):
    """A one-dimensional convolution with the branch of :class:`LoRAConv2d`, on images one pixel high.

    Shapes: x ``(batch, in, w)``, W ``(out, in, 1, k)``, A ``(rank, in, 1, k)``, B ``(out, rank, 1, 1)``.
    """

    def construct(self, x):
        return self.adapted(x.expand_dims(2)).squeeze(2)
