"""Detectors of objects, pretrained, for categories of one's own."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sktransfer._engine.augmentation import AUGMENTATIONS
from sktransfer._estimators.base import (
    Interval,
    StrOptions,
    _fit_context,
    atomic,
    is_dask,
    takes_dask,
)
from sktransfer._estimators.trained_detector import TrainedDetector
from sktransfer._threads import n_threads
from sktransfer.io._boxes import check_inside, check_objects, encode, image_sizes
from sktransfer.io._coco import coco_scores

__all__ = ["FineTunedDetector"]


class FineTunedDetector(TrainedDetector):
    """Find objects of one's own categories in images, by a pretrained network.

    Either a detector of torchvision, whose predictor is cut off and replaced; or a new detector on
    a pretrained classification network: the maps at the end of its blocks, one of each size, feed
    a feature pyramid. What is frozen runs once for each image, with a `memory` once for all folds
    and later runs, and only what lies behind is trained, by :mod:`skorch`.

    Parameters
    ----------
    backbone : str, torch.nn.Module, Backbone or fitted estimator, default="efficientnet_lite0"
        The network that a new detector stands on; see :class:`PretrainedFeatureExtractor`.
    detector : str or torch.nn.Module, default="fcos"
        `"fcos"`, `"retinanet"` or `"faster_rcnn"`: a new one on `backbone`. Or a detector of
        torchvision by its name (`"fasterrcnn_mobilenet_v3_large_320_fpn"`, `"retinanet_*"`,
        `"fcos_*"`, `"ssd*"`), or such a module, that is copied; `backbone` then counts for nothing.
    weights : str, path or None, default="default"
        Of the detector, if it is one of torchvision's, else of the backbone: `"default"` for the
        best published, another published name, a path to a state dict (of any number of
        categories), or None: random ones. Only then do the statistics of trained batch-norms move.
        Beside a network that you pass yourself, `"default"` and None leave its weights as they are.
    unfreeze : int, str or list of str, default=0
        What is trained besides the new layers. 0: nothing, so of a detector of torchvision the
        predictor alone, and of a new one the feature pyramid and the head. A number `k`: the last k
        blocks of the backbone as well, and all that follows them; the name of a block in
        `block_names_`, or a prefix of several (`"layer4"`): from there to the end; `"all"`; or a
        list of names or prefixes: these blocks and no others. `"auto"` of
        :class:`FineTunedClassifier` compares scores on labels of images, so it is refused.
    width : int, default=128
        Channels of the feature pyramid of a new detector, a multiple of 32, at least 64.
    max_epochs : int, default=20
        Passes over the images.
    batch_size : int or "auto", default="auto"
        Images of a step. `"auto"`: 8, and frozen blocks take as many as suit the device. A step
        that does not fit into the memory is an error: the loss counts all boxes of a step, so it
        can't be taken in parts.
    lr : float, default=1e-4
        Learning rate of the pretrained layers that are trained, for AdamW. It rises over a tenth of
        the steps and falls to zero by a cosine.
    head_lr : float or None, default=1e-3
        Learning rate of the new layers; None for `lr`.
    weight_decay : float, default=1e-4
        AdamW's; of all trained layers.
    augment : {"flip", "dihedral", "auto"}, callable or None, default=None
        Other views of the images, in which boxes move with the picture. `"flip"`: mirrored left
        to right; `"dihedral"`: turned by quarters and mirrored, for images without an upright
        direction; `"auto"`: mirrored, and changed in their colours by torchvision's `ColorJitter`;
        or a callable that gets an image, uint8 (3, height, width), and a dict of its `boxes` and
        `labels`, and returns both, such as transforms of :mod:`torchvision.transforms.v2` that
        take boxes. With frozen maps an image has a fixed set of views, each kept by itself, and
        training takes them in turns. Where epochs start from the images, each draws new ones.
    n_views : int, default=None
        Fixed views of each image, itself included; None for all 2 of "flip", all 8 of "dihedral"
        (4 if images are not square), and 4 of a random augmentation.
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
        `"auto"` takes a CUDA device if there is one, else the CPU.
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
    torchvision.

    What lies in front of the first trained block runs once for each image, and each epoch starts
    from the maps at this cut. They are kept in half precision; without a memory they lie in RAM or,
    if large, in a temporary file for the length of a fit. A memory keeps small maps on the way as
    well, so a fit that unfreezes more runs no block again. Of a detector of torchvision,
    `unfreeze=0` starts behind the whole backbone with its pyramid, which runs once more for it.
    Where the maps fit neither into RAM nor onto the disk, each epoch starts from the images and
    runs the frozen blocks again. So it does with a backbone of which it is not known whether one
    block follows another: one whose class is not torchvision's `BackboneWithFPN`, that
    of its SSD or SSDlite, or :class:`torch.nn.Sequential`.

    All is computed in float32: in half precision the corners of boxes would be pixels off. There is
    no `sample_weight`, as the loss is one of all boxes of a step, in which no image has a share of
    its own: pass an image twice that counts as two.

    After a fit, another `device`, `runtime`, `memory` or threshold holds from the next prediction
    on. Another value of what the trained layers depend on (`backbone`, `weights`, `detector`,
    `unfreeze`, `width`, `image_size`) holds for a fit that starts anew. A fit that fails leaves the
    detector as it was. Ctrl-C keeps what was learnt until then, in a first fit and in one that goes
    on; a fit that starts anew then leaves the detector as the earlier fit left it.

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
            for name, allowed in TrainedDetector._parameter_constraints.items()
            if name not in ("pooling", "precision")
        },
        "detector": [str, nn.Module],
        "unfreeze": [Integral, str, list, tuple],
        "width": [Interval(Integral, 64, None, closed="left")],
        "max_epochs": [Interval(Integral, 0, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="left")],
        "head_lr": [Interval(Real, 0, None, closed="left"), None],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "augment": [StrOptions(set(AUGMENTATIONS)), callable, None],
        "n_views": [Interval(Integral, 1, None, closed="left"), None],
        "score_threshold": [Interval(Real, 0, 1, closed="left")],
        "nms_threshold": [Interval(Real, 0, 1, closed="both")],
        "max_detections": [Interval(Integral, 1, None, closed="left")],
        "callbacks": [list, tuple, None],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        detector: Any = "fcos",
        weights: Any = "default",
        unfreeze: Any = 0,
        width: int = 128,
        max_epochs: int = 20,
        batch_size: int | str = "auto",
        lr: float = 1e-4,
        head_lr: float | None = 1e-3,
        weight_decay: float = 1e-4,
        augment: Any = None,
        n_views: int | None = None,
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
        self.backbone = backbone
        self.detector = detector
        self.weights = weights
        self.unfreeze = unfreeze
        self.width = width
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.head_lr = head_lr
        self.weight_decay = weight_decay
        self.augment = augment
        self.n_views = n_views
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
    @atomic
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
    @atomic
    def partial_fit(self, X: Any, y: Any) -> Self:
        """Train for one epoch, at a constant learning rate.

        Parameters
        ----------
        X, y
            As in `fit`, of some of the images. The first call says which categories there are.

        Returns
        -------
        self

        Notes
        -----
        Each call takes the parameters as they are: another `lr`, `batch_size` or `augment` holds
        from the next one on.
        """
        return self._fit(X, y, in_parts=True)

    # ------------------------------------------------------------------------ prediction

    def predict(self, X: Any) -> Any:
        """Find the objects of images.

        Parameters
        ----------
        X : sequence of n images, or dask collection of them

        Returns
        -------
        list of n dicts
            `boxes`, float32 (k, 4), x1, y1, x2, y2 in pixels of the image; `labels` (k,), of
            `classes_`; `scores`, float32 (k,), 0 to 1, falling. Of a dask collection a lazy dask
            array of these dicts, of shape (n,).
        """
        predictions = self._predict_array(X)
        return predictions if is_dask(X) else list(predictions)

    @takes_dask(lambda self: np.empty(0, object))
    def _predict_array(self, X: Any) -> np.ndarray:
        """Return what `predict` returns as an array of dicts (n,)."""
        check_is_fitted(self, "_trainer")
        self._validate_params()
        images = self._check_images(X, reset=False)
        array = np.empty(len(images), object)
        for i, objects in enumerate(self.predictor().find(images)):
            array[i] = {**objects, "labels": self.classes_[objects["labels"]]}
        return array

    def score(self, X: Any, y: Any) -> float:
        """Return COCO's mean average precision.

        Needs ``pip install '.[detection]'``; see :func:`sktransfer.metrics.coco_scores`.

        Parameters
        ----------
        X, y
            As in `fit`; the categories are those of `classes_`.

        Returns
        -------
        float
            0 to 1, the mean over categories and over overlaps of 0.5 to 0.95.
        """
        check_is_fitted(self, "_trainer")
        images = self._check_images(X, reset=False)
        objects = check_objects(y, len(images))
        encode(objects, self.classes_)
        objects = check_inside(objects, image_sizes(images, n_threads(self.n_jobs)))
        return coco_scores([truth._asdict() for truth in objects], self.predict(X))["map"]
