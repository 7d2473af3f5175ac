"""Whole models as ONNX files: an estimator of this library, or a pipeline that starts with one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sktransfer._estimators.base import ImageEstimator
from sktransfer._estimators.contrastive import ContrastivePretrainer
from sktransfer._estimators.detection import FineTunedDetector
from sktransfer._estimators.onnx_steps import parameters_of, step_models
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor, embedding_of
from sktransfer._estimators.pretrained_classifier import PretrainedClassifier, logits_of
from sktransfer._estimators.supervised import FineTuned
from sktransfer._training.onnx_detector import detector_models
from sktransfer._training.onnx_file import (
    OPSET,
    RowsNetwork,
    rows_model,
    write_onnx,
)
from sktransfer._training.whole import OUTPUTS, check_target, whole_with_preprocessing
from sktransfer.transforms import Preprocessing

__all__ = ["to_onnx"]


class _Network(NamedTuple):
    """What leads from images of the network's size to its output, and how that is called."""

    preprocessing: Preprocessing
    output: str
    name: str  # of the backbone
    models: Callable[[], list[Any]]  # as ONNX; it takes a while
    labels: list[Any] | None = None


def to_onnx(model: Any, path: str | os.PathLike) -> Path:
    """Write a whole model to an ONNX file, from images of any size to predictions.

    Needs ``pip install '.[onnx]'`` here, and nothing of this library, nor of
    scikit-learn, where the file is used.

    Parameters
    ----------
    model : estimator
        A fitted pipeline of a :class:`PretrainedFeatureExtractor` (or
        :class:`ContrastivePretrainer`) and steps of scikit-learn that skl2onnx knows: scalers,
        `PCA`, `SVC`, `LogisticRegression`, `KNeighborsClassifier` and many more. Or one of this
        library alone: an extractor, a :class:`PretrainedClassifier`, a fine-tuned classifier,
        regressor or detector. Of a fitted search its best estimator is taken.
    path : path
        Of the file, `.onnx`.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    ValueError, TypeError
        If a step can't be exported; the message names it and says why. Each step of scikit-learn
        is compared with what skl2onnx writes of it, on some rows, by ONNX Runtime where that is
        installed: other numbers are an error.

    See Also
    --------
    FineTunedClassifier.to_onnx : Without scaling and cropping in the file.

    Notes
    -----
    The input `images` is uint8 (n, channels, height, width), RGB unless the network takes others,
    of any size: scaling, cropping and normalisation are part of the graph. All images of a call
    have one size. Scaling is that of this library to the pixel, but for one in ten thousand, which
    is off by 1 of 255, and for images whose sides differ more than sixteenfold. EXIF rotation and
    transparency are of files, so whoever decodes them sees to that. Of a network with a
    `value_range`, 0 and 255 stand for its ends.

    The outputs are `label` and `probabilities` of a classifier of scikit-learn, or `scores` if it
    has no probabilities, what `decision_function` says: of two classes one column, else one for
    each. Of truth values, `label` is 0 or 1. There is `variable` of other last steps;
    `probabilities` or `values` of a network of this library; `rows` of an extractor alone. The
    metadata have the labels of the columns as a JSON list under `labels`.

    Of a detector there are `boxes` (k, 4), x1, y1, x2, y2 in pixels of the image, `labels` (k,),
    places in the metadata's list, and `scores` (k,), falling: what `predict` says with the
    thresholds of the time of the export. A call takes one image.

    All computes in float32, whatever `precision` says.

    Examples
    --------
    >>> import tempfile
    >>> from torch import nn
    >>> from sktransfer import PretrainedFeatureExtractor, to_onnx
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> extractor = PretrainedFeatureExtractor(network, image_size=32)
    >>> to_onnx(extractor, tempfile.mkdtemp() + "/model.onnx").name
    'model.onnx'
    """
    check_target(path)
    steps = _steps(model)
    name, first = steps[0]
    network = _network(name, first, is_last=len(steps) == 1)
    tails: list[Any] = []
    labels = network.labels
    if len(steps) > 1:
        tails = step_models(steps[1:], network.output)
        labels = _labels(getattr(steps[-1][1], "classes_", None))
    metadata = {"labels": labels, "backbone": network.name}
    return write_onnx(path, network.preprocessing, [*network.models(), *tails], metadata)


def _steps(model: Any) -> list[tuple[str, Any]]:
    """Return the names and the estimators that a model consists of."""
    model = _without_shell(model)
    if not isinstance(model, Pipeline):
        return [(type(model).__name__, model)]
    named: list[tuple[str, Any]] = []
    for name, given in model.steps:
        if given is None or given == "passthrough":
            continue
        step = _without_shell(given)
        named += _steps(step) if isinstance(step, Pipeline) else [(name, step)]
    if not named:
        raise ValueError("The pipeline has no steps: there is nothing to export.")
    return named


def _without_shell(model: Any) -> Any:
    """Return what a search has found, and what is frozen."""
    while (inner := getattr(model, "best_estimator_", None)) is not None or isinstance(
        model, FrozenEstimator
    ):
        model = model.estimator if inner is None else inner
    return model


def _labels(classes: Any) -> list[Any] | None:
    """Return labels as lists; of several targets, a list for each."""
    if classes is None:
        return None
    return [_labels(each) for each in classes] if isinstance(classes, list) else classes.tolist()


def _network(name: str, first: Any, is_last: bool) -> _Network:
    if isinstance(first, ContrastivePretrainer):
        first = first.to_feature_extractor()
    if isinstance(first, PretrainedFeatureExtractor):
        first._validate_params()
        embedding = embedding_of(first)
        rows = RowsNetwork(embedding, first.normalize, nn.Identity())
        return _of_module(rows, embedding.preprocessing, "rows", embedding.runner.name)
    if isinstance(first, PretrainedClassifier) and is_last:
        embedding = logits_of(first)
        rows = RowsNetwork(embedding, False, nn.Softmax(1))
        what = embedding.preprocessing, "probabilities", embedding.runner.name
        return _of_module(rows, *what, first.classes_)
    if isinstance(first, FineTuned) and is_last:
        check_is_fitted(first, "plan_")
        trainer = first.trainer()
        whole = whole_with_preprocessing(trainer, first._last_layer())
        frozen, output = trainer.frozen, OUTPUTS[trainer.settings.kind]
        what = frozen.preprocessing, output, frozen.runner.name
        return _of_module(whole, *what, getattr(first, "classes_", None))
    if isinstance(first, FineTunedDetector) and is_last:
        return _of_detector(first)
    raise TypeError(
        f"Step {name!r}, a {type(first).__name__}, can't be exported: "
        f"{_why_not(first)}. A model starts with a PretrainedFeatureExtractor or a "
        "ContrastivePretrainer, or is a PretrainedClassifier, a FineTunedClassifier, a "
        "FineTunedRegressor or a FineTunedDetector."
    )


def _of_module(
    module: nn.Module, preprocessing: Preprocessing, output: str, name: str, labels: Any = None
) -> _Network:
    def models() -> list[Any]:
        return [rows_model(module, preprocessing, output)]

    return _Network(preprocessing, output, name, models, _labels(labels))


def _of_detector(first: FineTunedDetector) -> _Network:
    check_is_fitted(first, "_trainer")
    first._validate_params()
    part = first.trainer().part
    limits = first.score_threshold, first.nms_threshold, first.max_detections
    name = first.detector if isinstance(first.detector, str) else type(first.detector).__name__

    def models() -> list[Any]:
        return detector_models(part, *limits, OPSET)

    return _Network(part.preprocessing, "boxes", name, models, first.classes_.tolist())


def _why_not(first: Any) -> str:
    kind = type(first).__name__
    if kind == "PatchAnomalyDetector":
        return "it looks for neighbours in a bank of patches, which is no part of a network"
    if hasattr(first, "refit"):
        return "it has no best_estimator_: it is not fitted, or refit=False"
    if isinstance(first, FeatureUnion):
        return "it joins rows of several steps; one extractor takes several layers and poolings"
    if any(isinstance(value, ImageEstimator) for value in parameters_of(first)):
        return (
            "the network is inside of it. Fit it behind the network instead: "
            f"make_pipeline(PretrainedFeatureExtractor(), {kind}(...))"
        )
    return "it takes no images"
