"""A network is tried out on noise: whether it has one row for an image, and its graph the same."""

from __future__ import annotations

import math

import torch
from torch import nn

from sktransfer.models._modules import Whole, copy_of, set_eval

_LIBRARIES = ("torch", "torchvision", "timm")  # whose networks are sound, and are traced rightly

# What may be wrong. The first is no fault of the network.
OTHER_GRAPH = (
    "written as a graph, it computes something else. Its code asks what a value is, as "
    "`isinstance(x, torch.Tensor)` does, and has another answer while it is traced, or computes in "
    "another type, as within `torch.autocast`, which no graph shows"
)
RANDOM = (
    "gives the same image other features each time, although it is in evaluation mode: its code "
    "draws random numbers, as `F.dropout(x)` does without `training=self.training`, or keeps "
    "something of earlier images. What is computed from its features is different each time, too"
)
OF_BATCH = (
    "gives an image other features beside other images: its code computes over the axis of the "
    "batch, as batch-norms without running statistics do. What is computed, and kept, for an image "
    "then depends on the images beside it. Compute over the axes of one image alone"
)
OF_THE_PAST = (
    "changes its buffers while it runs, so that the features of an image depend on the images "
    "before. Change them in training alone (`if self.training:`)"
)


def needs_trial(network: nn.Module) -> bool:
    """Tell whether some code of a network is not that of the libraries that are known."""
    return not all(
        type(module).__module__.partition(".")[0] in _LIBRARIES
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        for module in network.modules()
    )


def noise(shape: tuple[int, ...]) -> torch.Tensor:
    """Return the two images of a shape by which networks are tried out.

    The second is brighter and has more contrast: as it differs in its mean and its deviation, they
    are seen where they are taken over the batch.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *shape, generator=generator, dtype=torch.float32, device="cpu")
    images[1].mul_(1.5).add_(0.5)
    return images


def find_fault(
    network: nn.Module,
    shape: tuple[int, ...],
    device: torch.device,
    graph: nn.Module | None = None,
) -> str | None:
    """Return what is wrong with the rows of a network, or None.

    Of a sound network, one image runs through it, and two through `graph`, or through it. Copies
    run, so that nothing in it changes.

    Parameters
    ----------
    network : nn.Module
    shape : tuple of int
        Of one image.
    device : torch.device
    graph : nn.Module or None, default=None
        What was traced of it, from images to its output.
    """
    both = noise(shape).to(device)
    run = _copied(network)
    try:
        # Not by its call, which prints where it fails.
        found = run(both) if graph is None else _copied(graph).network.forward(both)
        return _compare(run, both, found) if _has_rows(found) else None
    except Exception:  # it says so, and why, where it runs
        return None


def _has_rows(output: torch.Tensor) -> bool:
    return output.ndim > 0 and len(output) == 2 and not output.is_complex()


def _compare(run: nn.Module, both: torch.Tensor, found: torch.Tensor) -> str | None:
    before = _versions(run)
    try:
        alone = run(both[:1])
    except Exception:
        run(both)  # which fails, too, if that is not for want of a second image
        return OF_BATCH
    is_changed = _versions(run) != before
    if _agree(found[:1], alone) and not is_changed:
        return None
    if not _agree(run(both[:1]), alone):
        return OF_THE_PAST if is_changed else RANDOM
    expected = run(both)
    if not _agree(found, expected):
        return OTHER_GRAPH
    return None if _agree(expected[:1], alone) else OF_BATCH


def _copied(network: nn.Module) -> Whole:
    try:
        network = copy_of(network, {id(weight): weight for weight in network.parameters()})
    except Exception:  # it holds what can't be copied
        pass
    whole = Whole(network)
    set_eval(whole)
    return whole


def _versions(network: nn.Module) -> list[int]:
    return [buffer._version for buffer in network.buffers()]


def _agree(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Tell whether two results differ by rounding alone."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not right.is_floating_point():
        return torch.equal(left, right)
    size = right.abs().nan_to_num(0, 0, 0).amax() if right.numel() else 0
    tolerance = 3 * math.sqrt(torch.finfo(right.dtype).eps) * float(size)
    return torch.allclose(left, right, rtol=0, atol=tolerance, equal_nan=True)
