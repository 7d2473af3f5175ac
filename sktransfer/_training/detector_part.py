"""What of a detector is trained: a network of torchvision's behind the maps of frozen blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sktransfer._engine.device import check_readable, resolve_device
from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._engine.runner import get_runner
from sktransfer._torch_state import (
    call_seeded,
    cpu_by_default,
    float32_by_default,
    network_lock,
    trained_tensors,
)
from sktransfer._training.cut import trained_blocks
from sktransfer._training.depthwise import FastDepthwise
from sktransfer._training.detector_backbones import Given, detector_blocks, map_positions
from sktransfer._training.detector_maps import BlockMaps, DetectorMaps, FlatMaps, Pixels, Source
from sktransfer._training.detector_networks import (
    AsGiven,
    boxed,
    check_family,
    detector_preprocessing,
    first_label,
    load_detector,
    new_detector,
    replace_predictor,
)
from sktransfer._training.detector_start import start_at_cut
from sktransfer.models import Backbone
from sktransfer.models._fitting import load_state
from sktransfer.models._modules import copy_of
from sktransfer.models._state_files import file_beside, read_state_dict
from sktransfer.models._weights import fingerprint
from sktransfer.transforms import Preprocessing

_SIDE = 320  # pixels of a new detector's input
_OWNER = "the detector uses"  # in errors, in front of the number of blocks


class DetectorPart(nn.Module):
    """What follows the frozen maps: a detector whose backbone takes them.

    Parameters
    ----------
    detector : nn.Module
        One of torchvision's, with `requires_grad` set on what is trained.
    source : Pixels, BlockMaps or DetectorMaps
    preprocessing : Preprocessing
    block_names : list of str
        Of the backbone.
    unfrozen : frozenset of int
        Numbers of these blocks that are trained.
    pretrained : list of nn.Module
        Where the layers are that are not new.
    moves_statistics : bool
        Whether batch-norms among the trained layers use, and update, statistics of the batch.
    fingerprint : str
        Of the pretrained network.
    """

    def __init__(
        self,
        detector: Any,
        source: Source,
        preprocessing: Preprocessing,
        block_names: Sequence[str],
        unfrozen: frozenset[int],
        *,
        pretrained: Sequence[nn.Module],
        moves_statistics: bool,
        fingerprint: str,
    ) -> None:
        super().__init__()
        detector.transform = AsGiven()
        self.detector, self.moves_statistics = detector, moves_statistics
        self.source, self.preprocessing = source, preprocessing
        self.block_names, self.unfrozen = list(block_names), unfrozen
        self.fingerprint = fingerprint
        self.first_label = first_label(detector)
        of_pretrained = {id(p) for part in pretrained for p in part.parameters()}
        self._pretrained = {n for n, p in self.named_parameters() if id(p) in of_pretrained}

    def forward(self, stored: list[torch.Tensor], targets: Any = None) -> Any:
        """Return the losses by name while it trains, else boxes, labels and scores."""
        with network_lock.shared(), float32_by_default(), cpu_by_default(), FastDepthwise():
            return self.detector(self.source.unpack(stored), targets if self.training else None)

    def train(self, mode: bool = True) -> DetectorPart:
        """Set the mode; what is frozen stays in eval mode, so its statistics never move."""
        super().train(mode)
        for module in self.detector.modules():
            direct = list(module.parameters(recurse=False))
            is_trained = any(parameter.requires_grad for parameter in direct)
            if isinstance(module, _BatchNorm) and not (is_trained and self.moves_statistics):
                module.eval()
        for module in self.detector.backbone.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()  # with the dropout in it
        return self

    @property
    def n_trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def rated_parts(self, lr: float, head_lr: float) -> list[tuple[list[nn.Parameter], float]]:
        """Return the parameters, new ones first, with their learning rates."""
        new = [p for name, p in self.named_parameters() if name not in self._pretrained]
        old = [p for name, p in self.named_parameters() if name in self._pretrained]
        return [(new, head_lr), (old, lr)]

    def copied(self) -> DetectorPart:
        """Return a copy of all but the frozen blocks."""
        frozen = [vars(module).get("frozen") for module in self.detector.modules()]
        shared = (self.source, self.preprocessing, *frozen)
        return copy_of(self, {id(value): value for value in shared})

    def limit(self, score: float, nms: float, most: int) -> None:
        """Say which objects are found: of what score and overlap, and how many."""
        # Torchvision's detectors keep these themselves; no call takes them.
        owner: Any = getattr(self.detector, "roi_heads", self.detector)
        owner.score_thresh, owner.nms_thresh, owner.detections_per_img = score, nms, most

    def detect(self, stored: list[np.ndarray], batch_size: int) -> list[dict[str, np.ndarray]]:
        """Return boxes in the input, numbers of the categories from 0, and scores."""
        self.eval()
        detections = []
        with torch.no_grad():
            for first in range(0, len(stored[0]), batch_size):
                batch = [torch.from_numpy(part[first : first + batch_size]) for part in stored]
                detections += self(batch)
        return [
            {
                "boxes": image["boxes"].cpu().numpy(),
                "labels": image["labels"].cpu().numpy() - self.first_label,
                "scores": image["scores"].cpu().numpy(),
            }
            for image in detections
        ]

    def trained_state(self) -> dict[str, np.ndarray]:
        """Return what cannot be rebuilt."""
        check_readable(next(self.parameters()).device)
        return {name: value.cpu().numpy().copy() for name, value in self._trained_values().items()}

    def _trained_values(self) -> dict[str, torch.Tensor]:
        trained = {name for name, p in self.detector.named_parameters() if p.requires_grad}
        if self.moves_statistics:
            trained |= {name for name, _ in self.detector.named_buffers()}
        state = self.detector.state_dict()
        return {name: value for name, value in state.items() if name in trained}

    def load_trained_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `trained_state` returned."""
        values = self.detector.state_dict()
        values.update(trained_tensors(state, self._trained_values()))
        self.detector.load_state_dict(values)


# ------------------------------------------------------------------------------ ways to make one


def part_on_backbone(
    shape: Mapping[str, Any],
    backbone: Backbone,
    n_classes: int,
    *,
    device: Any,
    runtime: str,
    moves_statistics: bool,
    seed: int,
) -> DetectorPart:
    """Put a new detector on a backbone.

    Parameters
    ----------
    shape : mapping
        `detector`, one of `NEW`, `unfreeze`, `width` and `image_size` of `FineTunedDetector`.
    backbone : Backbone
    n_classes : int
    device, runtime
        Of the frozen blocks.
    moves_statistics : bool
        See `DetectorPart`.
    seed : int
        Of the new layers.
    """
    size = _SIDE if shape["image_size"] is None else shape["image_size"]
    preprocessing = boxed(backbone.preprocessing.with_size(size))
    runner = get_runner(backbone, device, "float32", runtime, image_size=preprocessing.size)
    runner.trace  # noqa: B018 raises an error that says why a network can't be cut
    frozen = FrozenBlocks(runner, preprocessing, "avg")
    levels = map_positions(frozen)
    names = runner.block_names[: levels[-1]]
    unfrozen = trained_blocks(shape["unfreeze"], names, _OWNER)
    cut = min(unfrozen, default=len(names))
    detector: Any = call_seeded(
        seed,
        lambda: new_detector(shape["detector"], frozen, cut, levels, shape["width"], n_classes),
    )
    for parameter in detector.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for number, block in enumerate(detector.backbone.blocks, cut):
        if number not in unfrozen:
            block.requires_grad_(False)
    source: Source = Pixels(preprocessing, runner.device)
    if cut:
        source = BlockMaps(frozen, detector.backbone.positions, range(1, cut))
    return DetectorPart(
        detector.to(runner.device),
        source,
        preprocessing,
        names,
        unfrozen,
        pretrained=[detector.backbone.blocks],
        moves_statistics=moves_statistics,
        fingerprint=runner.fingerprint,
    )


def part_of_detector(
    shape: Mapping[str, Any],
    weights: Any,
    n_classes: int,
    *,
    device: Any,
    moves_statistics: bool,
    seed: int,
) -> DetectorPart:
    """Replace the predictor of a detector of torchvision, or of the user's, by a new one.

    The parameters are those of `part_on_backbone`; `weights` are the detector's.
    """
    given = shape["detector"]
    detector, name = _given_detector(given, weights, seed)
    digest = fingerprint(detector)
    preprocessing = detector_preprocessing(detector, shape["image_size"])
    blocks = detector_blocks(detector)
    unfrozen = trained_blocks(shape["unfreeze"], list(blocks), _OWNER)
    new = call_seeded(seed, lambda: replace_predictor(detector, n_classes))
    detector.requires_grad_(bool(unfrozen))
    for number, block in enumerate(blocks.values()):
        if number not in unfrozen:
            block.requires_grad_(False)
    for part in new:
        part.requires_grad_(True)
    place = resolve_device(device)
    first = list(blocks)[min(unfrozen)] if unfrozen else None
    source = _start_behind_frozen(detector, first, preprocessing, name, place)
    new_ones = {id(p) for part in new for p in part.parameters()}
    others = nn.ParameterList(p for p in detector.parameters() if id(p) not in new_ones)
    return DetectorPart(
        detector.to(place),
        source,
        preprocessing,
        list(blocks),
        unfrozen,
        pretrained=[others],
        moves_statistics=moves_statistics,
        fingerprint=digest,
    )


def _start_behind_frozen(
    detector: Any, first: str | None, preprocessing: Preprocessing, name: str, device: torch.device
) -> Source:
    """Take what lies in front of the first trained unit, if there is one, out of a detector.

    Return what leads to the maps that it then takes, or its images if nothing can be taken out.
    """
    if first is None:
        maps = Backbone(FlatMaps(detector.backbone).eval(), preprocessing, name=name)
        detector.backbone = Given()
        return DetectorMaps(get_runner(maps, device, "float32", "torch"), preprocessing)
    source = start_at_cut(detector, first, preprocessing, name, device)
    return Pixels(preprocessing, device) if source is None else source


def _given_detector(given: Any, weights: Any, seed: int) -> tuple[Any, str]:
    """Return a detector that is named, or a copy of one that is given, and its name."""
    if isinstance(given, str):
        return load_detector(given, weights, seed), given
    detector, name = copy_of(check_family(given)).cpu(), type(given).__name__
    if (path := file_beside(weights, name)) is not None:
        load_state(None, detector, read_state_dict(path), name, path)
    return detector, name
