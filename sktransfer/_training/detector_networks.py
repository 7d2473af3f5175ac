"""Networks that detect objects: torchvision's with a new predictor, or new ones on a backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models import detection, get_model_builder, get_model_weights, list_models
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._torch_state import call_seeded
from sktransfer._training.detector_backbones import MapBatch, Pyramid, stride
from sktransfer.models._fitting import load_state, without_prefix
from sktransfer.models._hub import downloading
from sktransfer.models._state_files import read_state_dict, weights_path
from sktransfer.transforms import Preprocessing

NEW = ("fcos", "retinanet", "faster_rcnn")  # what is built on a backbone
_FAMILIES = (FasterRCNN, RetinaNet, FCOS, SSD)
_N_COCO = 91  # categories of a detector of torchvision that is not told their number
_PRIOR = 0.01  # of an object at any one place: focal losses start from it
_GROUPS = 32  # of the group norms in torchvision's FCOS
_N_CONVS = 2  # of the towers of a new FCOS
# Those of torchvision's detectors whose published weights belong to batch-norms that are constants,
# with their epsilon. Its builders make these only if they read the file themselves, as a pickle.
_FROZEN_NORMS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": 1e-5,
    "fasterrcnn_mobilenet_v3_large_fpn": 1e-5,
    "fasterrcnn_resnet50_fpn": 0.0,
    "fcos_resnet50_fpn": 1e-5,
    "retinanet_resnet50_fpn": 0.0,
}


# ------------------------------------------------------------------------------ published ones


def list_detectors() -> list[str]:
    """Return the names of torchvision's detectors of boxes."""
    names = list_models(module=detection)
    return [name for name in names if not name.startswith(("maskrcnn", "keypointrcnn"))]


def load_detector(name: str, weights: Any, seed: int = 0) -> nn.Module:
    """Return a detector of torchvision with its weights: default, a published name, a file, None.

    `seed` is that of the random weights that None asks for.

    Raises
    ------
    ValueError
        If the name, or that of the weights, is not known, or a file does not fit.
    """
    if name not in list_detectors():
        raise ValueError(
            f"detector={name!r} is not known. Pass one of {', '.join(NEW)}, for a new one on "
            f"`backbone`, or one of torchvision's: {', '.join(list_detectors())}."
        )
    builder, path = get_model_builder(name), weights_path(weights)

    def create(**options: Any) -> nn.Module:
        return call_seeded(seed, lambda: builder(weights=None, weights_backbone=None, **options))

    if path is not None:
        return _with_state(create, name, read_state_dict(path), path)
    if weights is None:
        return create()
    published = get_model_weights(name)
    if isinstance(weights, str) and weights == "default":
        weights = published.DEFAULT
    if isinstance(weights, str) and weights not in published.__members__:
        raise ValueError(
            f"weights={weights!r} are not published for {name!r}; there are "
            f"{', '.join(published.__members__)}, 'default', a path to a state dict, or None."
        )
    chosen = published[weights] if isinstance(weights, str) else weights
    remedy = f"detector={NEW[0]!r} is built on a backbone, and the default one needs no download."
    with downloading(name, chosen.url, remedy):
        state = chosen.get_state_dict(progress=False, check_hash=True, weights_only=True)
    return with_published_norms(name, _with_state(create, name, state, chosen))


def _with_state(
    create: Callable[..., nn.Module], name: str, state: Mapping[str, torch.Tensor], source: Any
) -> nn.Module:
    """Load a state dict, of whatever number of categories, into a new detector."""
    network = create()
    expected = network.state_dict()
    # Published files were saved from batch-norms that do not count their batches.
    counters = {k: v for k, v in expected.items() if k.endswith(".num_batches_tracked")}
    state = {**counters, **without_prefix(state, expected)[0]}
    other = [k for k, v in expected.items() if k in state and v.shape != state[k].shape]
    if other and expected[other[0]].ndim and len(state[other[0]]):
        n_classes = _N_COCO * len(state[other[0]]) // len(expected[other[0]])
        network = create(num_classes=max(2, n_classes))
    return load_state(create, network, state, name, source)


def with_published_norms(name: str, network: nn.Module) -> nn.Module:
    """Make batch-norms constants where torchvision's published detector of this name has them."""
    if (eps := _FROZEN_NORMS.get(name)) is None:
        return network
    for parent in list(network.modules()):
        for key, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(norm.num_features, eps)
                frozen.load_state_dict(norm.state_dict())
                setattr(parent, key, frozen)
    return network


def check_family(detector: nn.Module) -> nn.Module:
    """Raise TypeError if a module is no detector whose predictor could be cut off."""
    if not isinstance(detector, _FAMILIES):
        raise TypeError(
            "detector must be a name or one of torchvision's FasterRCNN, RetinaNet, FCOS and SSD, "
            f"got {type(detector).__name__}. Pass a classification network as `backbone`."
        )
    return detector


def first_label(detector: nn.Module) -> int:
    """Return the number that the detector gives to the first category: some have a background."""
    return int(isinstance(detector, (FasterRCNN, SSD)))


def replace_predictor(detector: Any, n_classes: int) -> Sequence[nn.Module]:
    """Cut the predictor off, put one for other categories in its place, and return what is new."""
    if isinstance(detector, FasterRCNN):
        width = detector.roi_heads.box_predictor.cls_score.in_features
        detector.roi_heads.box_predictor = FastRCNNPredictor(width, n_classes + 1)
        return [detector.roi_heads.box_predictor]
    head: Any = detector.head.classification_head
    if isinstance(detector, SSD):
        new = [_resized(part, head.num_columns, n_classes + 1) for part in head.module_list]
        for i, (part, layer) in enumerate(zip(head.module_list, new, strict=True)):
            if isinstance(part, nn.Conv2d):
                head.module_list[i] = layer
            else:
                part[-1] = layer
        head.num_columns = n_classes + 1
        return new
    head.cls_logits = _resized(head.cls_logits, head.num_classes, n_classes)
    nn.init.constant_(head.cls_logits.bias, -math.log((1 - _PRIOR) / _PRIOR))
    head.num_classes = n_classes
    return [head.cls_logits]


def _resized(part: nn.Module, n_old: int, n_new: int) -> nn.Conv2d:
    """Return a new convolution like the last one of `part`, for other categories."""
    old: Any = part if isinstance(part, nn.Conv2d) else part[-1]  # type: ignore[index]
    n_outputs = old.out_channels // n_old * n_new
    size = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    new = nn.Conv2d(old.in_channels, n_outputs, **size)
    nn.init.normal_(new.weight, std=0.01)
    assert new.bias is not None
    nn.init.zeros_(new.bias)
    return new


def detector_preprocessing(detector: nn.Module, image_size: Any) -> Preprocessing:
    """Return what a detector wants images to be: a square, the image in its middle."""
    given: Any = detector.transform
    side = tuple(given.fixed_size[::-1]) if given.fixed_size else (given.min_size[-1],) * 2
    size = side if image_size is None else image_size
    return boxed(
        Preprocessing(mean=tuple(given.image_mean), std=tuple(given.image_std)).with_size(size)
    )


def boxed(preprocessing: Preprocessing) -> Preprocessing:
    """Return preprocessing that shows whole images, at their own proportions."""
    settings = {name: getattr(preprocessing, name) for name in ("interpolation", "mean", "std")}
    return Preprocessing(preprocessing.size, preprocessing.size, "border", **settings)


# ------------------------------------------------------------------------------ new ones


def new_detector(
    kind: str, frozen: FrozenBlocks, cut: int, levels: list[int], width: int, n_classes: int
) -> nn.Module:
    """Build a detector on maps of a backbone.

    Parameters
    ----------
    kind : {"fcos", "retinanet", "faster_rcnn"}
    frozen, cut, levels, width
        See `Pyramid`.
    n_classes : int
        Without the background.
    """
    if width % _GROUPS:
        raise ValueError(f"width={width}: it must be a multiple of {_GROUPS}, for its norms.")
    strides = [stride(frozen, position) for position in levels]
    if kind == "faster_rcnn":
        pyramid = Pyramid(frozen, cut, levels, width, LastLevelMaxPool())
        sizes = tuple((4 * side,) for side in [*strides, 2 * strides[-1]])
        return FasterRCNN(
            pyramid,
            rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            box_roi_pool=MultiScaleRoIAlign([str(p) for p in levels], 7, 2),
            box_head=TwoMLPHead(49 * width, 4 * width),
            box_predictor=FastRCNNPredictor(4 * width, n_classes + 1),
        )
    pyramid = Pyramid(frozen, cut, levels, width, LastLevelP6P7(width, width))
    strides += [2 * strides[-1], 4 * strides[-1]]
    if kind == "fcos":
        anchors = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides))
        head: nn.Module = FCOSHead(width, 1, n_classes, _N_CONVS)
        return FCOS(pyramid, n_classes, anchor_generator=anchors, head=head)
    octave = tuple(tuple(round(4 * s * 2 ** (i / 3)) for i in range(3)) for s in strides)
    anchors = AnchorGenerator(octave, ((0.5, 1.0, 2.0),) * len(strides))
    head = RetinaNetHead(width, anchors.num_anchors_per_location()[0], n_classes)
    return RetinaNet(pyramid, n_classes, anchor_generator=anchors, head=head)


class AsGiven(nn.Module):
    """Stands for a detector's resizing: a batch comes at its size, boxes are mapped elsewhere."""

    def forward(self, batch: MapBatch | torch.Tensor, targets: Any = None) -> tuple[ImageList, Any]:
        """Return the batch, as a detector hands it on to its backbone."""
        size = (int(batch.shape[-2]), int(batch.shape[-1]))
        return ImageList(batch, [size] * len(batch)), targets

    def postprocess(self, detections: Any, *sizes: Any) -> Any:
        """Return the boxes as they are."""
        return detections
