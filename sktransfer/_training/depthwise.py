"""Gradients of depthwise kernels on small maps, where those of torch are slow on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

_MOST = 49  # pixels of a map; on larger ones torch is as fast
_LEAST = 3  # pixels of a side: convolutions with smaller kernels on small maps are slow as well


class FastDepthwise(TorchFunctionMode):
    """Within it, depthwise convolutions of more than 3 × 3 on small maps are faster to train.

    What they compute is the same up to rounding. EfficientNets and MobileNetV3 have many of them in
    their last blocks, whose maps are small where images are.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Take the faster way where there is one."""
        is_layer = func is torch.conv2d and len(args) == 7 and not kwargs  # as of nn.Conv2d
        if is_layer and _is_slow(*args):
            return _DepthwiseConvolution.apply(*args[:5])
        return func(*args, **(kwargs or {}))


def _is_slow(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> bool:
    return (
        groups == len(weight) == x.shape[1]
        and max(weight.shape[2:]) > 3
        and x.shape[-2] * x.shape[-1] <= _MOST
        and _pair(dilation) == (1, 1)
        and not isinstance(padding, str)
        and x.ndim == 4
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and weight.requires_grad
        and torch.is_grad_enabled()
    )


class _DepthwiseConvolution(torch.autograd.Function):
    """A depthwise convolution whose kernels' gradient is one convolution, an image a channel."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, stride: Any, padding: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = _pair(stride), _pair(padding)
        return torch.conv2d(x, weight, bias, ctx.stride, ctx.padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_x, _, of_bias = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [len(weight)],
            ctx.stride,
            ctx.padding,
            (1, 1),
            False,
            (0, 0),
            len(weight),
            (needs_x, False, needs_bias),
        )
        of_weight = None
        if needs_weight:
            of_weight = kernel_gradient(x, grad, weight.shape[2:], ctx.stride, ctx.padding)
        return of_x, of_weight, of_bias, None, None


def kernel_gradient(
    x: torch.Tensor,
    grad: torch.Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    """Return the gradient of the kernels of a depthwise convolution.

    Entry (i, j) of a kernel's is the sum over all outputs (h, w) of
    ``grad[h, w] * x[h * stride + i, w * stride + j]``: a convolution of `x` by `grad`, whose
    dilation is the stride; each channel of each image is one by itself.

    Parameters
    ----------
    x : tensor of shape (n, c, height, width)
        What came in.
    grad : tensor of shape (n, c, h, w)
        Of what came out.
    size, stride, padding : tuple of (int, int)
        Of the convolution.

    Returns
    -------
    tensor of shape (c, 1, *size)
    """
    n, c, height, width = grad.shape
    more = [max(0, _LEAST - height), max(0, _LEAST - width)]  # rows and columns of zeros
    if any(more):
        grad = F.pad(grad, (0, more[1], 0, more[0]))
        x = F.pad(x, (0, more[1] * stride[1], 0, more[0] * stride[0]))
    gradient = F.conv2d(
        x.reshape(1, n * c, *x.shape[2:]),
        grad.reshape(n * c, 1, *grad.shape[2:]),
        padding=padding,
        dilation=stride,
        groups=n * c,
    )[..., : size[0], : size[1]]
    return gradient.reshape(n, c, 1, *size).sum(0)
