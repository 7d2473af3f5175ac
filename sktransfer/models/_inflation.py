"""Networks for images of other channels: the first convolution takes more of them, or fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import nn

from sktransfer.models._modules import copy_of
from sktransfer.models._registry import Backbone

_RGB = 3
# Names of attributes that say how many channels a module takes, in timm's, transformers' and
# torch's; some compare them with an image.
_COUNTS = ("num_channels", "in_chans", "in_channels")


def inflated(backbone: Backbone, n_channels: int) -> Backbone:
    """Return a copy of a network that takes images of another number of channels.

    The weights of its first convolution are those of timm's `adapt_input_conv`: the three channels
    are repeated in turn and scaled by 3 / n_channels, so that its sums keep their size; for a
    single channel they are added up. Means and standard deviations follow.

    Raises
    ------
    ValueError
        If the network has no convolution that takes three channels.
    """
    own = len(backbone.preprocessing.mean)
    if n_channels == own:
        return backbone
    if own != _RGB:
        raise ValueError(
            f"Backbone {backbone.name!r} takes {own} channels, and only networks for 3 can be made "
            f"to take {n_channels}: pass one of those, or n_channels={own}."
        )
    network: Any = copy_of(backbone.network)
    if _changes_its_input(network):
        network.transform_input = False
    for name in _first_convolutions(network, backbone.name):
        _inflate(network, name, n_channels)
    mean, std = channel_statistics(backbone, n_channels)
    preprocessing = replace(backbone.preprocessing, mean=mean, std=std)
    name = f"{backbone.name}_{n_channels}_channels"
    return replace(backbone, network=network, preprocessing=preprocessing, name=name)


def channel_statistics(
    backbone: Backbone, n_channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the network's own mean and standard deviation, repeated as `inflated` does it."""
    mean, std = backbone.preprocessing.mean, backbone.preprocessing.std
    if n_channels == len(mean):
        return mean, std
    if _changes_its_input(backbone.network):
        mean = std = (0.5,) * _RGB
    return _repeated(mean, n_channels), _repeated(std, n_channels)


def _changes_its_input(network: Any) -> bool:
    """Tell whether a network of torchvision brings images to mean and deviation 0.5 by itself."""
    return bool(getattr(network, "transform_input", False))


def _first_convolutions(network: nn.Module, title: str) -> list[str]:
    """Return the names of the convolutions that get the image, as timm says it or as they come."""
    told: Any = (getattr(network, "pretrained_cfg", None) or {}).get("first_conv") or ()
    told = [told] if isinstance(told, str) else list(told)
    modules = dict(network.named_modules())
    first = [name for name in told if _takes_rgb(modules.get(name))]
    first = first or [name for name, module in modules.items() if _takes_rgb(module)][:1]
    if not first:
        raise ValueError(
            f"Backbone {title!r} has no convolution (torch.nn.Conv2d) that takes 3 channels, so it "
            "can't be made to take others: pass another backbone, or a Backbone whose network "
            "takes them and whose preprocessing has a mean and a std for each."
        )
    return first


def _takes_rgb(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Conv2d) and module.in_channels == _RGB and module.groups == 1


def _inflate(network: nn.Module, name: str, n_channels: int) -> None:
    """Replace the weights of a convolution, and what its owners say of their channels."""
    convolution: Any = network.get_submodule(name)
    with torch.no_grad():
        weight = adapt_input_conv(n_channels, convolution.weight.detach().clone())
        convolution.weight = nn.Parameter(weight.contiguous())
    path = name.split(".")
    for owner in (network.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)):
        for count in _COUNTS:
            if getattr(owner, count, None) == _RGB:
                setattr(owner, count, n_channels)


def _repeated(values: Sequence[float], n_channels: int) -> tuple[float, ...]:
    """Return a number for each channel, in turn as the weights are; of a single one, the mean."""
    if n_channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[i % len(values)] for i in range(n_channels))
