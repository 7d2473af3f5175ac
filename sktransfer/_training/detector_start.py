"""Where a detector of torchvision starts: at maps in front of what of its backbone is trained."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet

from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._engine.runner import get_runner
from sktransfer._training.detector_backbones import MapBatch, MapsBehind, parts_of
from sktransfer._training.detector_maps import BlockMaps
from sktransfer.models import Backbone
from sktransfer.models._modules import copy_of
from sktransfer.transforms import Preprocessing

_OF_SSD = (SSDFeatureExtractorVGG, SSDLiteFeatureExtractorMobileNet)


class Trunk(nn.Sequential):
    """Parts of a backbone that run one after the other, from the images on."""

    def get_classifier(self) -> tuple[()]:
        """Return the head, as networks of timm do: there is none."""
        return ()


class KnownMap(nn.Module):
    """Stands for the frozen parts of a backbone whose last map is known."""

    def forward(self, batch: MapBatch) -> torch.Tensor:
        """Return the map that came instead of images."""
        (known,) = batch.maps
        return known


def start_at_cut(
    detector: Any, unit: str, preprocessing: Preprocessing, name: str, device: torch.device
) -> BlockMaps | None:
    """Let a detector take maps at a cut of its backbone in the place of images.

    Parameters
    ----------
    detector : nn.Module
        Its backbone is changed; the parts of it behind the cut are copied.
    unit : str
        The first one that is trained, of `detector_blocks`; the cut is the last one before it.
    preprocessing : Preprocessing
    name : str
        Of the detector.
    device : torch.device
        Of the frozen blocks.

    Returns
    -------
    BlockMaps or None
        What leads to the maps; None where the detector must start from the images.
    """
    inner, parts = parts_of(detector.backbone)
    names, part = list(dict(parts.named_children())), unit.rpartition(".")[2]
    if not _run_in_order(detector.backbone, parts) or part not in names:
        return None
    network = Trunk(OrderedDict(parts.named_children())).eval()
    trunk = Backbone(network, preprocessing, name=name)
    runner = get_runner(trunk, device, "float32", "torch", image_size=preprocessing.size)
    if not runner.can_be_cut:
        return None
    frozen = FrozenBlocks(runner, preprocessing, "avg")
    cuts = {names[0]: 0, **_cuts_in_front(frozen)}
    first = max(i for i in range(1 + names.index(part)) if names[i] in cuts)
    if not (cut := cuts[names[first]]):
        return None
    positions = [cut]
    if isinstance(parts, IntermediateLayerGetter):
        behind = dict(zip(names, [*names[1:], ""], strict=True))
        if not all(behind[name] in cuts for name in parts.return_layers):
            return None
        levels = {key: cuts[behind[name]] for name, key in parts.return_layers.items()}
        detector.backbone.body = MapsBehind(frozen, cut, levels)
        positions = detector.backbone.body.positions
    else:
        rest = nn.Sequential(KnownMap(), *copy_of(nn.ModuleList([*parts.children()][first:])))
        setattr(*((detector.backbone, inner) if inner else (detector, "backbone")), rest)
    return BlockMaps(frozen, positions, list(cuts.values()))


def _run_in_order(backbone: nn.Module, parts: nn.Module) -> bool:
    """Tell whether a backbone is known to run its parts one after the other, from the images on."""
    if type(backbone) is BackboneWithFPN:
        return type(parts) is IntermediateLayerGetter
    return type(parts) is nn.Sequential and (parts is backbone or type(backbone) in _OF_SSD)


def _cuts_in_front(frozen: FrozenBlocks) -> dict[str, int]:
    """Return the positions in front of parts of a trunk, by their names; "" stands for its end.

    Not all parts have one: a norm belongs to the block in front of it.
    """
    cuts: dict[str, int] = {}
    for position in range(1, frozen.embedding):
        around = frozen.runner.trace.modules_around(position)
        before, after = (path.split(".")[0] for path in around)
        if before != after:
            cuts[after] = position
    return cuts
