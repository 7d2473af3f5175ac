"""Detectors of objects, pretrained, for categories of one's own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._engine.runner import get_runner, resolve_device
from sktransfer._estimators.base import ImageEstimator, Interval, _fit_context
from sktransfer._memory.memory import check_memory
from sktransfer._threads import n_threads
from sktransfer._torch_state import Chance, chance_lock, ready_to_train
from sktransfer._training.detection import (
    BlockMaps,
    DetectorMaps,
    DetectorPart,
    Examples,
    FlatMaps,
    Pixels,
    Source,
    make_detector_net,
    rows_of,
)
from sktransfer._training.detectors import (
    NEW,
    Given,
    boxed,
    check_family,
    detector_blocks,
    detector_preprocessing,
    load_detector,
    map_positions,
    new_detector,
    replace_predictor,
)
from sktransfer._training.net import Interrupted, Schedule, train
from sktransfer.io import ImageSequence
from sktransfer.io._boxes import (
    Objects,
    check_inside,
    check_objects,
    encode,
    find_classes,
    image_sizes,
    letterbox,
)
from sktransfer.io._coco import coco_scores
from sktransfer.models import Backbone
from sktransfer.models._modules import copy_of
from sktransfer.models._weights import file_beside, fingerprint, load_state, read_state_dict
from sktransfer.transforms import Preprocessing

__all__ = ["FineTunedDetector"]

_SIDE = 320  # pixels of a new detector's input
_CHUNK = 64  # images that a prediction holds at once
_SHAPE = ("detector", "unfreeze", "width", "image_size")  # of what a fit trains


class FineTunedDetector(ImageEstimator):
    """Find objects of one's own categories in images, by a pretrained network.

    Either a detector of torchvision, whose predictor is cut off and replaced; or a new detector on
    a pretrained classification network: the maps at the end of its blocks, one of each size, feed
    a feature pyramid. What is frozen runs once for each image, with a `memory` once for all folds
    and later runs, and only what lies behind is trained, by :mod:`skorch`.

    Parameters
    ----------
    detector : str or torch.nn.Module, default="fcos"
        `"fcos"`, `"retinanet"` or `"faster_rcnn"`: a new one on `backbone`. Or a detector of
        torchvision by its name (`"fasterrcnn_mobilenet_v3_large_320_fpn"`, `"retinanet_*"`,
        `"fcos_*"`, `"ssd*"`), or such a module, that is copied; `backbone` then counts for nothing.
    backbone : str, torch.nn.Module or Backbone, default="efficientnet_lite0"
        A name of :func:`sktransfer.list_models`, or a network; see
        :class:`PretrainedFeatureExtractor`.
    weights : str, path or None, default="default"
        Of the detector, if it is one of torchvision's, else of the backbone: `"default"` for the
        best published, another published name, a path to a state dict (of any number of
        categories), or None: random ones. Only then do the statistics of trained batch-norms move.
    unfreeze : int, str, default=0
        What is trained besides the new layers. 0: nothing, so of a detector of torchvision the
        predictor alone, and of a new one the feature pyramid and the head. A number `k`: the last k
        blocks of the backbone as well, and all that follows them; the name of a block, or a prefix
        of several: from there on; `"all"`.
    width : int, default=128
        Channels of the feature pyramid of a new detector, a multiple of 32, at least 64.
    max_epochs : int, default=20
        Passes over the images.
    batch_size : int, default=8
        Images a step of the training.
    lr : float, default=1e-3
        Learning rate of the new layers, by AdamW; it rises over a tenth of the steps and falls to
        zero by a cosine.
    backbone_lr : float, default=1e-4
        The same of all other layers that are trained.
    weight_decay : float, default=1e-4
        Of all trained layers.
    score_threshold : float, default=0.05
        Objects of a lower score, 0 to 1, are not predicted.
    nms_threshold : float, default=0.5
        Of boxes of a category that overlap more (intersection over union), the best is left.
    max_detections : int, default=100
        Objects that are predicted in an image, at most.
    callbacks : list or None, default=None
        For skorch.
    warm_start : bool, default=False
        Whether `fit` goes on with what is fitted, for the same categories.
    image_shape : tuple of int, default=None
        Height, width and perhaps channels of images in flat rows.
    image_size : int or tuple of (int, int), default=None
        Height and width of the network's input, into which an image is fitted whole, at its own
        proportions. None for 320, or for what the detector of torchvision was made for.
    memory : str, path, joblib.Memory or None, default=None
        Where the results of frozen blocks are kept, one entry an image.
    device : str or torch.device, default="auto"
        Where to compute; `"auto"` takes a GPU if there is one.
    runtime : {"auto", "torch", "openvino"}, default="auto"
        What runs the frozen blocks of a backbone; torchvision's detectors run on torch.
    n_jobs : int, default=None
        Threads that read and decode images; None for all cores.
    random_state : int, RandomState instance or None, default=None
        Of the new layers, the weights of `weights=None`, the order of the images, and what
        detectors draw.
    verbose : int, default=0
        1 for a progress bar, 2 for skorch's table as well.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The categories.
    net_ : skorch.NeuralNet
        Whose module holds the detector. After unpickling it is there once it is trained again.
    history_ : list of dict
        Of each epoch: `epoch`, `train_loss`, `dur` in seconds.
    n_iter_ : int
        Epochs trained.
    block_names_ : list of str
        The blocks of the backbone up to the last map that is taken.
    unfrozen_block_names_ : list of str
        Those of them that are trained.
    n_trainable_parameters_ : int
    n_features_in_, feature_names_in_
        Of `X`, if it has columns.

    See Also
    --------
    sktransfer.load_coco : Images and boxes of a file in COCO's format.
    sktransfer.inspection.DetectionDisplay : Images with their boxes.
    sktransfer.metrics.coco_scores : Average precision in full.

    Notes
    -----
    The new detectors are FCOS [1]_, RetinaNet [2]_ and Faster R-CNN [3]_, their losses those of
    torchvision. Maps are kept in half precision; without a memory they lie in RAM or, if large, in
    a temporary file for the length of a fit. From `unfreeze=1` on, all of a detector of torchvision
    runs anew in each epoch; of a backbone, what follows the cut. Images are not augmented: pass
    more of them.

    References
    ----------
    .. [1] Tian et al., FCOS: fully convolutional one-stage object detection, ICCV 2019.
    .. [2] Lin et al., Focal loss for dense object detection, ICCV 2017.
    .. [3] Ren et al., Faster R-CNN: towards real-time object detection with region proposal
       networks, NeurIPS 2015.

    Examples
    --------
    >>> import numpy as np
    >>> from sktransfer import FineTunedDetector
    >>> X = np.full((4, 64, 64, 3), 60, np.uint8)
    >>> X[:, 16:48, 8:40] = 220                                     # a bright square in each
    >>> y = [{"boxes": [[8, 16, 40, 48]], "labels": ["square"]}] * 4
    >>> model = FineTunedDetector(image_size=64, width=64, max_epochs=2, random_state=0).fit(X, y)
    >>> found = model.predict(X[:1])[0]
    >>> sorted(found), found["boxes"].shape[1], model.classes_.tolist()
    (['boxes', 'labels', 'scores'], 4, ['square'])
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **{
            name: allowed
            for name, allowed in ImageEstimator._parameter_constraints.items()
            if name not in ("pooling", "precision")
        },
        "detector": [str, nn.Module],
        "unfreeze": [Interval(Integral, 0, None, closed="left"), str],
        "width": [Interval(Integral, 64, None, closed="left")],
        "max_epochs": [Interval(Integral, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="left")],
        "backbone_lr": [Interval(Real, 0, None, closed="left")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "score_threshold": [Interval(Real, 0, 1, closed="left")],
        "nms_threshold": [Interval(Real, 0, 1, closed="both")],
        "max_detections": [Interval(Integral, 1, None, closed="left")],
        "callbacks": [list, tuple, None],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
    }

    classes_: np.ndarray
    _part: DetectorPart | None
    _shape: dict[str, Any]

    def __init__(
        self,
        detector: Any = "fcos",
        backbone: Any = "efficientnet_lite0",
        *,
        weights: Any = "default",
        unfreeze: Any = 0,
        width: int = 128,
        max_epochs: int = 20,
        batch_size: int = 8,
        lr: float = 1e-3,
        backbone_lr: float = 1e-4,
        weight_decay: float = 1e-4,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        callbacks: Any = None,
        warm_start: bool = False,
        image_shape: Any = None,
        image_size: Any = None,
        memory: Any = None,
        device: Any = "auto",
        runtime: str = "auto",
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.detector = detector
        self.backbone = backbone
        self.weights = weights
        self.unfreeze = unfreeze
        self.width = width
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.backbone_lr = backbone_lr
        self.weight_decay = weight_decay
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.callbacks = callbacks
        self.warm_start = warm_start
        self.image_shape = image_shape
        self.image_size = image_size
        self.memory = memory
        self.device = device
        self.runtime = runtime
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.non_deterministic = self.random_state is None
        return tags

    # ------------------------------------------------------------------------ fitting

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any) -> Self:
        """Train the new layers and, as `unfreeze` says, some that come before them.

        Parameters
        ----------
        X : sequence of n images
            Of any sizes; see :class:`sktransfer.PretrainedFeatureExtractor`.
        y : sequence of n dicts
            `boxes`, (k, 4), x1, y1, x2, y2 in pixels of the upright image, with x1 < x2 and
            y1 < y2; and `labels`, (k,), of any one type that can be sorted. An image without
            objects has empty ones. Boxes that leave their image by a pixel at most are clipped.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            That name the row of `y`: keys that are missing, boxes that are empty, reversed, not
            finite or outside their image, or if there is no object at all.
        """
        return self._fit(X, y, in_parts=False)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any) -> Self:
        """Train for one epoch, at a constant learning rate.

        Parameters
        ----------
        X, y
            As in `fit`, of some of the images. The first call says which categories there are.

        Returns
        -------
        self
        """
        return self._fit(X, y, in_parts=True)

    def _fit(self, X: Any, y: Any, *, in_parts: bool) -> Self:
        if y is None:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y "
                "is None."
            )
        goes_on = (in_parts or self.warm_start) and hasattr(self, "_part")
        images = self._check_images(X, reset=not goes_on)
        objects = check_objects(y, len(images))
        classes = self.classes_ if goes_on else find_classes(objects)
        numbers = encode(objects, classes)
        sizes = image_sizes(images, n_threads(self.n_jobs))
        objects = check_inside(objects, sizes)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        chance, fitting = Chance(seed), threading.Lock()
        with fitting, ready_to_train(fitting):
            part = self._resume() if goes_on else self._begin(len(classes), chance)
            self.classes_ = classes
            targets = _targets(part, objects, numbers, sizes)
            try:
                self._train(part, images, targets, chance, in_parts)
            except Interrupted:
                raise KeyboardInterrupt(
                    f"fit was interrupted after {self.n_iter_} epochs, whose detector is kept."
                ) from None
        return self

    def _begin(self, n_classes: int, chance: Chance) -> DetectorPart:
        """Return a new detector."""
        self._shape = {name: getattr(self, name) for name in _SHAPE}
        for name in ("net_", "_part", "_state"):
            self.__dict__.pop(name, None)
        self.history_: list[dict[str, Any]] = []
        self._in_parts = False
        self._weights_seed = chance.seed
        return self._build(n_classes, chance)

    def _resume(self) -> DetectorPart:
        """Return the detector as it stands."""
        for name, fitted in self._shape.items():
            if (value := getattr(self, name)) is not fitted and value != fitted:
                raise ValueError(
                    f"{name} has changed from {fitted!r} to {value!r} since the first fit, with "
                    "which warm_start and partial_fit go on. Set it back, or fit a new estimator, "
                    "as sklearn.base.clone makes it."
                )
        return self._trained

    def _train(
        self,
        part: DetectorPart,
        images: ImageSequence,
        targets: list[dict[str, torch.Tensor]],
        chance: Chance,
        in_parts: bool,
    ) -> None:
        n_epochs = 1 if in_parts else self.max_epochs
        with part.progress.shown(len(images) * (1 + n_epochs), self.verbose):
            part.examples = Examples(self._maps(part, images), targets)
            if not (in_parts and self._in_parts and hasattr(self, "net_")):
                n_steps = n_epochs * -(-len(images) // self.batch_size)
                schedule = None if in_parts else Schedule(n_steps)
                self.net_ = self._new_net(part, schedule, chance.seed)
            self._in_parts = in_parts
            before = len(self.net_.history)
            rows = rows_of(len(images))
            try:
                train(self.net_, rows, n_epochs, chance, progress=part.progress, stage="training")
            finally:
                del part.examples
                self._take(part, self.net_.history[before:])

    def _new_net(self, part: DetectorPart, schedule: Schedule | None, seed: int) -> Any:
        return make_detector_net(
            part,
            part.parameter_groups(self.lr, self.backbone_lr, self.weight_decay),
            max_epochs=self.max_epochs,
            batch_size=self.batch_size,
            callbacks=self.callbacks or [],
            schedule=schedule,
            seed=seed,
            progress=part.progress,
            verbose=self.verbose,
        )

    def _take(self, part: DetectorPart, epochs: Sequence[Any]) -> None:
        """Set the fitted attributes."""
        self._part = part
        known = len(self.history_)
        self.history_ = self.history_ + [
            {"epoch": i, "train_loss": epoch["train_loss"], "dur": epoch.get("dur")}
            for i, epoch in enumerate(epochs, known + 1)
            if "train_loss" in epoch
        ]
        self.n_iter_ = len(self.history_)
        self.block_names_ = part.block_names
        self.unfrozen_block_names_ = part.block_names[part.n_frozen :]
        trained = (p for p in part.parameters() if p.requires_grad)
        self.n_trainable_parameters_ = sum(p.numel() for p in trained)

    # ------------------------------------------------------------------------ what is fitted

    def _build(self, n_classes: int, chance: Chance) -> DetectorPart:
        detector = self._shape["detector"]
        is_new = isinstance(detector, str) and detector in NEW
        building = threading.Lock()
        with building, ready_to_train(building):
            build = self._build_new if is_new else self._build_cut
            return build(n_classes, chance)

    def _build_new(self, n_classes: int, chance: Chance) -> DetectorPart:
        """Put a new detector on the backbone."""
        backbone, shape = self._backbone(), self._shape
        size = _SIDE if shape["image_size"] is None else shape["image_size"]
        preprocessing = boxed(backbone.preprocessing.with_size(size))
        sizes = {"image_size": preprocessing.size}
        runner = get_runner(backbone, self.device, "float32", self.runtime, **sizes)
        runner.trace  # noqa: B018 raises an error that says why a network can't be cut
        frozen = FrozenBlocks(runner, preprocessing, "avg")
        taken = map_positions(frozen)
        names = runner.block_names[: taken[-1]]
        cut = n_frozen_blocks(shape["unfreeze"], names)
        with chance_lock, chance.in_torch():
            detector: Any = new_detector(
                shape["detector"], frozen, cut, taken, shape["width"], n_classes
            )
        for parameter in detector.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        source: Source = Pixels(preprocessing, runner.device)
        if cut:
            source = BlockMaps(frozen, detector.backbone.positions)
        return DetectorPart(
            detector.to(runner.device),
            source,
            preprocessing,
            names,
            cut,
            pretrained=[detector.backbone.blocks],
            moves_statistics=self.weights is None,
            fingerprint=runner.fingerprint,
        )

    def _build_cut(self, n_classes: int, chance: Chance) -> DetectorPart:
        """Replace the predictor of a detector that is there."""
        shape, given = self._shape, self._shape["detector"]
        is_name = isinstance(given, str)
        if is_name:
            detector: Any = load_detector(given, self.weights, self._weights_seed)
        else:
            detector = copy_of(check_family(given))
            if (path := file_beside(self.weights, type(given).__name__)) is not None:
                load_state(None, detector, read_state_dict(path), type(given).__name__, path)
        digest = fingerprint(detector)
        preprocessing = detector_preprocessing(detector, shape["image_size"])
        blocks = detector_blocks(detector)
        n_frozen = n_frozen_blocks(shape["unfreeze"], list(blocks))
        with chance_lock, chance.in_torch():
            new = replace_predictor(detector, n_classes)
        detector.requires_grad_(n_frozen < len(blocks))
        frozen = list(blocks.values())[:n_frozen] if n_frozen < len(blocks) else []
        for part in frozen:
            part.requires_grad_(False)
        for part in new:
            part.requires_grad_(True)
        device = resolve_device(self.device)
        source: Source = Pixels(preprocessing, device)
        if n_frozen == len(blocks):
            name = given if is_name else type(given).__name__
            whole = Backbone(FlatMaps(detector.backbone).eval(), preprocessing, name=name)
            source = DetectorMaps(get_runner(whole, device, "float32", "torch"), preprocessing)
            detector.backbone = Given()
        new_ones = {id(p) for part in new for p in part.parameters()}
        others = nn.ParameterList(p for p in detector.parameters() if id(p) not in new_ones)
        return DetectorPart(
            detector.to(device),
            source,
            preprocessing,
            list(blocks),
            n_frozen,
            pretrained=[others],
            moves_statistics=is_name and self.weights is None,
            fingerprint=digest,
        )

    @property
    def _trained(self) -> DetectorPart:
        """What is fitted; rebuilt after unpickling."""
        check_is_fitted(self, "_part")
        if self._part is None:
            part = self._build(len(self.classes_), Chance(0))
            if part.fingerprint != self._fingerprint:
                raise ValueError(
                    f"The weights that detector={self.detector!r}, backbone={self.backbone!r} and "
                    f"weights={self.weights!r} name are not those on which this estimator was "
                    f"fitted (fingerprint {part.fingerprint[:8]}, then {self._fingerprint[:8]}). "
                    "Pass the old ones by set_params(weights='path/to/file.pth'), or fit it again."
                )
            part.load_trained_state(self._state)
            self._part = part
        return self._part

    def __getstate__(self) -> dict[str, Any]:
        # Kept is what cannot be rebuilt: the trained layers, as NumPy arrays.
        state = super().__getstate__()
        if (part := state.get("_part")) is not None:
            state = {**state, "_part": None, "_state": part.trained_state()}
            state["_fingerprint"] = part.fingerprint
            state.pop("net_", None)
        return state

    def _prepare(self) -> None:
        self._trained  # noqa: B018 restores it

    # ------------------------------------------------------------------------ prediction

    def _maps(self, part: DetectorPart, images: ImageSequence) -> list[np.ndarray]:
        """Run what is frozen."""
        part.progress.stage("frozen blocks")
        outs = part.source.empty(len(images))
        part.source.fill(
            images,
            outs,
            memory=check_memory(self.memory),
            n_jobs=self.n_jobs,
            progress=part.progress,
        )
        return outs

    def predict(self, X: Any) -> list[dict[str, np.ndarray]]:
        """Find the objects of images.

        Parameters
        ----------
        X : sequence of n images

        Returns
        -------
        list of n dicts
            `boxes`, float32 (k, 4), x1, y1, x2, y2 in pixels of the image; `labels` (k,), of
            `classes_`; `scores`, float32 (k,), 0 to 1, falling.
        """
        check_is_fitted(self, "_part")
        self._validate_params()
        images, part = self._check_images(X, reset=False), self._trained
        part.limit(self.score_threshold, self.nms_threshold, self.max_detections)
        found: list[dict[str, np.ndarray]] = []
        with part.progress.shown(len(images), self.verbose):
            for first in range(0, len(images), _CHUNK):
                chunk = images[first : first + _CHUNK]
                sizes = image_sizes(chunk, n_threads(self.n_jobs))
                boxes = part.detect(self._maps(part, chunk), self.batch_size)
                found += [
                    self._prediction(part.preprocessing, own, size)
                    for own, size in zip(boxes, sizes.tolist(), strict=True)
                ]
        return found

    def _prediction(
        self, preprocessing: Preprocessing, found: dict[str, np.ndarray], size: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Turn what is found in the network's input into boxes of the image, and labels."""
        height, width = size
        scale, offset = letterbox(preprocessing, height, width)
        boxes = np.clip((found["boxes"] - offset) / scale, 0, [width, height, width, height])
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)  # others lie beside the image
        return {
            "boxes": boxes[kept].astype(np.float32),
            "labels": self.classes_[found["labels"][kept]],
            "scores": found["scores"][kept],
        }

    def score(self, X: Any, y: Any) -> float:
        """Return COCO's mean average precision.

        Needs ``pip install 'sktransfer[detection]'``; see :func:`sktransfer.metrics.coco_scores`.

        Parameters
        ----------
        X, y
            As in `fit`; the categories are those of `classes_`.

        Returns
        -------
        float
            0 to 1, the mean over categories and over overlaps of 0.5 to 0.95.
        """
        check_is_fitted(self, "_part")
        images = self._check_images(X, reset=False)
        objects = check_objects(y, len(images))
        encode(objects, self.classes_)
        objects = check_inside(objects, image_sizes(images, n_threads(self.n_jobs)))
        return coco_scores([found._asdict() for found in objects], self.predict(X))["map"]


def n_frozen_blocks(unfreeze: int | str, names: Sequence[str]) -> int:
    """Return how many blocks `unfreeze` leaves frozen."""
    if unfreeze == "all":
        return 0
    if not isinstance(unfreeze, str):
        if unfreeze > len(names):
            raise ValueError(
                f"unfreeze={unfreeze}, but the detector uses {len(names)} blocks of the backbone. "
                "Pass at most so many, or 'all'."
            )
        return len(names) - int(unfreeze)
    for i, name in enumerate(names):
        if name == unfreeze or name.startswith(f"{unfreeze}."):
            return i
    raise ValueError(
        f"unfreeze={unfreeze!r} is no block, nor 'all' or a number. Blocks: {', '.join(names)}."
    )


def _targets(
    part: DetectorPart, objects: Sequence[Objects], numbers: Sequence[np.ndarray], sizes: np.ndarray
) -> list[dict[str, torch.Tensor]]:
    """Turn objects into what the detector is trained on: boxes in its input, its own numbers."""
    found = []
    for own, labels, (height, width) in zip(objects, numbers, sizes.tolist(), strict=True):
        scale, offset = letterbox(part.preprocessing, height, width)
        boxes = torch.from_numpy((own.boxes * scale + offset).astype(np.float32))
        found.append(
            {
                "boxes": boxes.to(part.device),
                "labels": torch.from_numpy(labels + part.first_label).to(part.device),
            }
        )
    return found
