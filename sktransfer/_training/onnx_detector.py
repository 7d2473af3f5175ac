"""Detectors as ONNX graphs: from images of the network's size to boxes, and on to the image."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import nn

from sktransfer._torch_state import cpu_by_default
from sktransfer._training.detector_backbones import MapBatch
from sktransfer._training.detector_maps import DetectorMaps, FlatMaps, Pixels, RecomputedMaps
from sktransfer._training.detector_part import DetectorPart
from sktransfer._training.whole import call_exporter
from sktransfer.models._modules import copy_of

_ALL = -1.0  # a score that every box exceeds
_FOUND = ["found", "numbers", "certainties"]
_IN_IMAGE = """
in_image (float[k,4] found, int64[k] numbers, float[k] certainties,
          double[4] scale, double[4] offset, double[4] ends)
=> (float[m,4] boxes, int64[m] labels, float[m] scores)
{
 zero = Constant <value = double {0.0}> ()
 at0 = Constant <value_ints = [0]> ()
 axis1 = Constant <value_ints = [1]> ()
 at2 = Constant <value_ints = [2]> ()
 at4 = Constant <value_ints = [4]> ()
 found64 = Cast <to = 11> (found)
 moved = Sub (found64, offset)
 scaled = Div (moved, scale)
 positive = Max (scaled, zero)
 clipped = Min (positive, ends)
 starts = Slice (clipped, at0, at2, axis1)
 stops = Slice (clipped, at2, at4, axis1)
 extends = Less (starts, stops)
 extends_int = Cast <to = 7> (extends)
 extends_both = ReduceMin <keepdims = 0> (extends_int, axis1)
 is_inside = Cast <to = 9> (extends_both)
 kept = Compress <axis = 0> (clipped, is_inside)
 boxes = Cast <to = 1> (kept)
 labels = Compress <axis = 0> (numbers, is_inside)
 scores = Compress <axis = 0> (certainties, is_inside)
}
"""


class _MapsOfBlocks(nn.Module):
    """What leads from normalised images to maps of frozen blocks, rounded as they are kept."""

    def __init__(self, frozen: Any, positions: list[int]) -> None:
        super().__init__()
        blocks = [frozen.runner.segment(i, frozen.size) for i in range(max(positions))]
        self.blocks = copy_of(nn.ModuleList(blocks))
        self.__dict__["frozen"], self.positions = frozen, positions

    def forward(self, x: torch.Tensor) -> MapBatch:
        frozen, maps = self.__dict__["frozen"], []
        for position, block in enumerate(self.blocks, 1):
            x = block(x)
            if position in self.positions:
                maps.append(frozen.round(x))
        return MapBatch(maps, frozen.size)


class _MapsOfDetector(nn.Module):
    """What leads from normalised images to the maps of a detector's frozen backbone."""

    def __init__(self, network: FlatMaps, size: tuple[int, int]) -> None:
        super().__init__()
        self.network, self.size = copy_of(network), size

    def forward(self, x: torch.Tensor) -> MapBatch:
        return MapBatch(self.network.maps(x), self.size)


class _WholeDetector(nn.Module):
    """From one image of the network's size, 0 to 255, to boxes in it, numbers and scores.

    The score that boxes must have is given: with none of them, torch would not see what
    becomes of boxes.
    """

    def __init__(self, part: DetectorPart, nms: float, most: int) -> None:
        super().__init__()
        own = part.copied()
        own.limit(_ALL, nms, most)
        self.detector: Any = own.detector
        self.detector.backbone = nn.Sequential(_start_of(part.source), self.detector.backbone)
        self.__dict__["preprocessing"] = part.preprocessing
        self.first_label = part.first_label
        self.cpu().eval().requires_grad_(False)

    def forward(self, fitted: torch.Tensor, score: torch.Tensor) -> tuple[torch.Tensor, ...]:
        owner: Any = getattr(self.detector, "roi_heads", self.detector)
        owner.score_thresh = score
        (found,) = self.detector(self.__dict__["preprocessing"].normalize(fitted.clone()))
        return found["boxes"], found["labels"] - self.first_label, found["scores"]


def _start_of(source: Any) -> nn.Module:
    """Return what a detector with this source has in front of its backbone."""
    if isinstance(source, DetectorMaps):
        network: Any = source.runner.network
        return _MapsOfDetector(network, source.preprocessing.size)
    if isinstance(source, Pixels) and not isinstance(source, RecomputedMaps):
        return nn.Identity()
    return _MapsOfBlocks(source.frozen, source.positions)


def detector_models(part: DetectorPart, score: float, nms: float, most: int, opset: int) -> Any:
    """Return a detector as an ONNX model, and one that brings its boxes into the image's pixels.

    Parameters
    ----------
    part : DetectorPart
    score, nms, most
        See `DetectorPart.limit`.
    opset : int
        Of ONNX.

    Returns
    -------
    list of onnx.ModelProto
        The first one takes `fitted` (1, c, h, w), the other what that one finds, and where the
        image lies in the network's input, which `preprocessing_model` tells.
    """
    import onnx
    from onnx import numpy_helper, parser

    whole = _WholeDetector(part, nms, most)
    random = torch.Generator().manual_seed(0)
    noise = 255 * torch.rand(1, *part.preprocessing.shape, generator=random, device="cpu")
    file: Any = io.BytesIO()

    def export() -> None:
        with cpu_by_default():
            torch.onnx.export(
                whole,
                (noise, torch.tensor(_ALL)),
                file,
                dynamo=False,  # the other exporter can't follow what depends on numbers of boxes
                opset_version=opset,
                input_names=["fitted", "score"],
                output_names=_FOUND,
                dynamic_axes={name: {0: "k"} for name in _FOUND},
            )

    call_exporter(export)
    model = onnx.load_from_string(file.getvalue())
    model.graph.initializer.append(numpy_helper.from_array(np.array(score, np.float32), "score"))
    del model.graph.input[1]
    head = f'<ir_version: {model.ir_version}, opset_import: ["" : {opset}]>'
    return [model, parser.parse_model(f"{head} {_IN_IMAGE}")]
