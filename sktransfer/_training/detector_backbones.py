"""What feeds a detector: the blocks of its backbone, and maps of them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from sktransfer._engine.cut_network import as_map, layout_of
from sktransfer._engine.frozen import FrozenBlocks
from sktransfer.models._modules import copy_of

_MIN_STRIDE = 6  # of a map on which objects are looked for
_LEVELS = 3  # maps of the backbone that are taken


def detector_blocks(detector: nn.Module) -> dict[str, nn.Module]:
    """Return the units of a detector's backbone that hold weights, in order.

    A backbone without any is a unit itself.
    """
    backbone: Any = detector.backbone
    inner, parts = parts_of(backbone)
    named = {f"{inner}.{name}".strip("."): part for name, part in parts.named_children()}
    units = {name: part for name, part in named.items() if any(True for _ in part.parameters())}
    return units or {"backbone": backbone}


def parts_of(backbone: nn.Module) -> tuple[str, nn.Module]:
    """Return the module whose children are the parts of a backbone, and its name in the backbone.

    It has no name, "", where it is the backbone itself.
    """
    inner = next((name for name in ("body", "features") if hasattr(backbone, name)), "")
    return inner, (getattr(backbone, inner) if inner else backbone)


def map_positions(frozen: FrozenBlocks) -> list[int]:
    """Return the cuts whose maps are taken: the last of each size, the smallest three sizes.

    Raises
    ------
    ValueError
        If no block has a map that is small enough.
    """
    last: dict[int, int] = {}
    for position in range(1, frozen.embedding):
        if (size := stride(frozen, position)) >= _MIN_STRIDE:
            last[size] = position
    if not last:
        raise ValueError(
            f"Backbone {frozen.runner.name!r} has no block whose result is a map of at most an "
            "eighth of the image's sides, on which objects could be looked for."
        )
    return sorted(last.values())[-_LEVELS:]


def stride(frozen: FrozenBlocks, position: int) -> int:
    rows, _ = _grid(frozen, position)
    return round(frozen.size[0] / rows) if rows else 0


def _grid(frozen: FrozenBlocks, position: int) -> tuple[int, int]:
    """Return rows and columns of a map; zeros of what is none."""
    shape = frozen.runner.shape(position, frozen.size)
    layout = layout_of(shape, frozen.size)
    if layout == "map":
        return shape[1], shape[2]
    if layout == "map_last":
        return shape[0], shape[1]
    if layout == "tokens":
        n = shape[0] - frozen.runner.n_prefix(position)
        rows = round(math.sqrt(n * frozen.size[0] / frozen.size[1]))
        return (rows, n // rows) if rows and n % rows == 0 else (0, 0)
    return 0, 0


def _map_at(x: torch.Tensor, frozen: FrozenBlocks, position: int) -> torch.Tensor:
    """Turn what the network has at a position into (n, c, h, w)."""
    layout = layout_of(x.shape[1:], frozen.size)
    return as_map(x, layout, frozen.runner.n_prefix(position), frozen.size)


@dataclass(frozen=True)
class MapBatch:
    """Images of which the maps of a backbone are known: what its detector takes in their place.

    Parameters
    ----------
    maps : list of tensors (n, c, h, w)
    size : tuple of (int, int)
        Height and width of the images.
    """

    maps: list[torch.Tensor]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.maps[0]), 3, *self.size

    def __len__(self) -> int:
        return len(self.maps[0])

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield a tensor of the size of each image; it has no pixels."""
        yield from torch.empty(self.shape, device="meta")


class Given(nn.Module):
    """Stands for a backbone whose maps are there already."""

    def forward(self, batch: MapBatch) -> OrderedDict[str, torch.Tensor]:
        """Return the maps that came instead of images."""
        return OrderedDict((str(i), x) for i, x in enumerate(batch.maps))


class MapsBehind(nn.Module):
    """What of a backbone follows a cut: from maps that are known to those that are taken.

    Parameters
    ----------
    frozen : FrozenBlocks
        Of the shared network; its blocks behind the cut are copied.
    cut : int
    levels : mapping of str to int
        The names of the maps, in order, and their positions.

    Attributes
    ----------
    positions : list of int
        Where the maps come from that it takes: the cut, and those in front of it.
    """

    def __init__(self, frozen: FrozenBlocks, cut: int, levels: Mapping[str, int]) -> None:
        super().__init__()
        self.cut, self.levels, last = cut, dict(levels), max(levels.values())
        self.positions = sorted({cut, *(p for p in levels.values() if p < cut)})
        self.__dict__["frozen"] = frozen  # not a part of this module: neither saved nor trained
        segments = [frozen.runner.segment(i, frozen.size) for i in range(cut, last)]
        self.blocks = copy_of(nn.ModuleList(segments))

    def forward(self, batch: MapBatch | torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Return maps (n, c, h, w), of maps at the positions or, with cut 0, of images."""
        given = batch.maps if isinstance(batch, MapBatch) else [batch]
        known = dict(zip(self.positions, given, strict=True))
        x = known[self.cut]
        for position, block in enumerate(self.blocks, self.cut + 1):
            x = known[position] = block(x)
        frozen = self.__dict__["frozen"]
        return OrderedDict((name, _map_at(known[p], frozen, p)) for name, p in self.levels.items())


class Pyramid(MapsBehind):
    """The trained blocks of a backbone, and a feature pyramid on maps of it.

    Parameters
    ----------
    frozen, cut
        See `MapsBehind`.
    levels : list of int
        Positions of the maps.
    width : int
        Channels of the pyramid.
    extra_blocks : nn.Module
        Makes smaller maps of the last one.
    """

    def __init__(
        self, frozen: FrozenBlocks, cut: int, levels: list[int], width: int, extra_blocks: Any
    ) -> None:
        super().__init__(frozen, cut, {str(position): position for position in levels})
        self.out_channels = width
        channels = []
        for position in levels:
            blank = torch.empty(1, *frozen.runner.shape(position, frozen.size), device="meta")
            channels.append(_map_at(blank, frozen, position).shape[1])
        self.pyramid = FeaturePyramidNetwork(channels, width, extra_blocks)

    def forward(self, batch: MapBatch | torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Return the levels of the pyramid."""
        return self.pyramid(super().forward(batch))
