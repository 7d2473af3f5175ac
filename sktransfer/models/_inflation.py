"""Networks for images of other channels: the first convolution takes more of them, or fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import nn

from sktransfer._torch_state import network_lock
from sktransfer.models._modules import copy_of
from sktransfer.models._registry import Backbone

_RGB = 3
_REMEDY = (
    "pass another backbone, or a Backbone whose network takes them and whose preprocessing has a "
    "mean and a std for each."
)
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
        If the network has no convolution that takes three channels, or if something else takes
        the image as well.
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
    for name in _first_convolutions(network, backbone):
        _inflate(network, name, n_channels)
    _check_that_it_runs(network, n_channels, backbone)
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


def _first_convolutions(network: nn.Module, backbone: Backbone) -> list[str]:
    """Return the names of the convolutions that get the image, as timm says it or as they run."""
    told: Any = (getattr(network, "pretrained_cfg", None) or {}).get("first_conv") or ()
    told = [told] if isinstance(told, str) else list(told)
    modules = dict(network.named_modules())
    first = [name for name in told if _takes_rgb(modules.get(name))]
    first = first or _those_that_get_the_image(network, backbone.preprocessing.size)
    if not first:
        raise ValueError(
            f"Backbone {backbone.name!r} has no convolution (torch.nn.Conv2d of one group) that "
            f"takes 3 channels, so it can't be made to take others: {_REMEDY}"
        )
    return first


def _those_that_get_the_image(network: nn.Module, size: tuple[int, int]) -> list[str]:
    """Return the convolutions that get the image itself; else the first one that runs."""
    candidates = {module: name for name, module in network.named_modules() if _takes_rgb(module)}
    image, ran, direct = _blank(network, _RGB, size), [], []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        ran.append(candidates[module])
        if inputs and inputs[0].data_ptr() == image.data_ptr():
            direct.append(candidates[module])

    hooks = [module.register_forward_pre_hook(note) for module in candidates]
    try:
        _run(network, image)
    except Exception:  # whoever runs it says what is wrong
        ran = ran or list(candidates.values())
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(direct or ran[:1]))


def _blank(network: nn.Module, n_channels: int, size: tuple[int, int]) -> torch.Tensor:
    weight = next(network.parameters())
    return torch.zeros(2, n_channels, *size, dtype=weight.dtype, device=weight.device)


def _run(network: nn.Module, image: torch.Tensor) -> None:
    """Run a network as it predicts; nothing of it changes."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with network_lock.shared(), torch.no_grad():
            network(image)
    finally:
        for module, is_training in modes:
            module.training = is_training


def _check_that_it_runs(network: nn.Module, n_channels: int, backbone: Backbone) -> None:
    try:
        _run(network, _blank(network, n_channels, backbone.preprocessing.size))
    except Exception as error:
        raise ValueError(
            f"Backbone {backbone.name!r} can't be made to take {n_channels} channels: not its "
            f"first convolution alone wants 3 ({type(error).__name__}: {error}). It can be used if "
            f"you change it yourself: {_REMEDY}"
        ) from error


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
