import copy

import pytest
import torch
from torch import nn

from sktransfer._training.depthwise import FastDepthwise
from sktransfer.models import get_model


def gradients(layer, x, mode=None):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    if mode is None:
        y = layer(x)
    else:
        with mode:
            y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())


@pytest.mark.parametrize("side", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [5, (5, 3), 7])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_torch(side, stride, kernel, bias):
    torch.manual_seed(0)
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (height // 2, width // 2)
    layer = nn.Conv2d(6, 6, kernel, stride, padding, groups=6, bias=bias)
    x = torch.randn(3, 6, side, side + 1)
    for found, expected in zip(
        gradients(layer, x, FastDepthwise()), gradients(layer, x), strict=True
    ):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def nodes(y):
    """Return the names of all backward functions behind a tensor."""
    found, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(node for node, _ in node.next_functions)
    return [type(node).__name__ for node in found]


@pytest.mark.parametrize(
    ("layer", "side", "is_ours"),
    [
        (nn.Conv2d(4, 4, 5, groups=4), 7, True),
        (nn.Conv2d(4, 4, 5, groups=4), 8, False),  # torch is fast there
        (nn.Conv2d(4, 4, 3, groups=4), 7, False),  # and there
        (nn.Conv2d(4, 8, 5, groups=4), 7, False),
        (nn.Conv2d(4, 4, 5), 7, False),
        (nn.Conv2d(4, 4, 5, groups=4, padding=2, dilation=2), 7, False),
        (nn.Conv2d(4, 4, 5, groups=4, padding="same"), 7, False),
        (nn.Conv2d(4, 4, 5, groups=4).requires_grad_(False), 7, False),
        (nn.Conv2d(4, 4, 5, groups=4).double(), 7, False),
    ],
)
def test_what_is_left_to_torch(layer, side, is_ours):
    x = torch.ones(2, 4, side, side, dtype=layer.weight.dtype, requires_grad=True)
    with FastDepthwise():
        assert is_taken(layer(x)) == is_ours
    assert not is_taken(layer(x))


def is_taken(y):
    return any("Depthwise" in name for name in nodes(y))


@pytest.mark.parametrize(
    ("layer", "is_ours"),
    [
        (nn.Conv2d(4, 4, 5, groups=4), True),
        (nn.Conv2d(4, 4, 3, 2, groups=4), True),
        (nn.Conv2d(4, 4, 3, groups=4), False),  # torch is fast there
        (nn.Conv2d(4, 4, 3, 2), False),
    ],
)
def test_what_is_left_to_torch_under_autocast(layer, is_ours):
    x = torch.ones(2, 4, 20, 20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), FastDepthwise():
        y = layer(x)
    assert is_taken(y) == is_ours
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(("kernel", "stride"), [(5, 1), (7, 1), (5, 2), (3, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", [3, 12])
def test_under_autocast_gradients_are_as_near_to_exact_ones_as_those_of_torch(
    kernel, stride, bias, side
):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6, bias=bias)
    x = torch.randn(3, 6, side, side)
    exact = gradients(copy.deepcopy(layer).double(), x.double())

    def errors(mode=None):
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(layer, x, mode)
        assert [y.dtype for y in found] == [torch.bfloat16, *[torch.float32] * (len(found) - 1)]
        return [((y - z).norm() / z.norm()).item() for y, z in zip(found, exact, strict=True)]

    for ours, torchs in zip(errors(FastDepthwise()), errors(), strict=True):
        assert ours <= max(1.5 * torchs, 0.01)


def test_a_function_without_options_is_left_to_torch():
    x, weight = torch.ones(2, 1, 7, 7), torch.ones(1, 1, 5, 5, requires_grad=True)
    with FastDepthwise():
        assert nn.functional.conv2d(x, weight).shape == (2, 1, 3, 3)


def test_a_whole_network():
    network = copy.deepcopy(get_model("efficientnet_lite0").network)  # that one is shared
    part = nn.Sequential(network.blocks[4], network.blocks[5]).requires_grad_(True).eval()
    x = torch.randn(2, 80, 6, 6, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(
        gradients(part, x, FastDepthwise()), gradients(part, x), strict=True
    ):
        torch.testing.assert_close(
            found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
        )
