"""Gradients of depthwise convolutions, where those of torch are slow on a CPU.

oneDNN computes them there. For kernels of more than 3 × 3 it has no depthwise code for the gradient
of the kernels, and in bfloat16, from a stride of two on, none for the gradient of the input. It
then takes other code, which is slower; see benchmarks/depthwise.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

_MOST = 49  # pixels of a map; in float32, on larger ones torch is as fast
_LEAST = 3  # pixels of a side: convolutions with smaller kernels on small maps are slow as well


class FastDepthwise(TorchFunctionMode):
    """Within it, depthwise convolutions are faster to train where torch has slow gradients.

    What they compute is the same up to rounding. EfficientNets, MobileNetV3 and ConvNeXt have many
    of them. Under autocast they run in its precision, as without it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Take the faster way where there is one."""
        is_layer = func is torch.conv2d and len(args) == 7 and not kwargs  # as of nn.Conv2d
        if is_layer and _is_trained_depthwise(*args):
            x, weight, bias = _as_autocast_has_them(*args[:3])
            if _is_slow(x, weight, args[3]):
                return _DepthwiseConvolution.apply(x, weight, bias, *args[3:5])
        return func(*args, **(kwargs or {}))


def _is_trained_depthwise(
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
        and _pair(dilation) == (1, 1)
        and not isinstance(padding, str)
        and x.ndim == 4
        and x.device.type == "cpu"
        and weight.requires_grad
        and torch.is_grad_enabled()
    )


def _as_autocast_has_them(*tensors: Any) -> list[Any]:
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    dtype = torch.get_autocast_dtype("cpu")
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _is_slow(x: torch.Tensor, weight: torch.Tensor, stride: Any) -> bool:
    if x.dtype != weight.dtype:
        return False
    if x.dtype == torch.bfloat16:
        return _has_large_kernel(weight) or max(_pair(stride)) > 1
    is_small = x.shape[-2] * x.shape[-1] <= _MOST
    return x.dtype == torch.float32 and _has_large_kernel(weight) and is_small


def _has_large_kernel(weight: torch.Tensor) -> bool:
    return max(weight.shape[2:]) > 3


class _DepthwiseConvolution(torch.autograd.Function):
    """A depthwise convolution whose gradients are made of what oneDNN is fast at.

    That of large kernels is one convolution, an image a channel; others are computed in float32.
    """

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
        is_ours = _has_large_kernel(weight)
        # Autograd rounds a gradient to the precision of what it belongs to.
        dtype = torch.float32 if max(ctx.stride) > 1 else x.dtype
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            grad.to(dtype),
            x.to(dtype),
            weight.to(dtype),
            [len(weight)],
            ctx.stride,
            ctx.padding,
            (1, 1),
            False,
            (0, 0),
            len(weight),
            (needs_x, needs_weight and not is_ours, False),
        )
        # With that of the bias, oneDNN would compute the kernels' as well.
        of_bias = grad.sum((0, 2, 3)) if needs_bias else None
        if needs_weight and is_ours:
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
