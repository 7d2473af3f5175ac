"""Whole models as ONNX files: an estimator of this library, or a pipeline that starts with one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sklearn.base import is_classifier
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sktransfer._estimators.contrastive import ContrastivePretrainer
from sktransfer._estimators.detection import FineTunedDetector
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor, embedding_of
from sktransfer._estimators.pretrained_classifier import PretrainedClassifier, logits_of
from sktransfer._estimators.supervised import FineTuned
from sktransfer._optional import load_optional
from sktransfer._training.onnx_detector import detector_models
from sktransfer._training.onnx_file import (
    OPSET,
    OPSET_ML,
    RowsNetwork,
    rows_model,
    write_onnx,
)
from sktransfer._training.whole import OUTPUTS, check_target, whole_with_preprocessing
from sktransfer.transforms import Preprocessing

__all__ = ["to_onnx"]

_EXTRA = "'sktransfer[onnx]'"


class _Network(NamedTuple):
    """What leads from images of the network's size to its output, and how that is called."""

    preprocessing: Preprocessing
    output: str
    name: str  # of the backbone
    models: Callable[[], list[Any]]  # as ONNX; it takes a while
    labels: list[Any] | None = None


def to_onnx(model: Any, path: str | os.PathLike) -> Path:
    """Write a whole model to an ONNX file, from images of any size to predictions.

    Needs ``pip install 'sktransfer[onnx]'`` here, and nothing of this library, nor of
    scikit-learn, where the file is used.

    Parameters
    ----------
    model : estimator
        A fitted pipeline of a :class:`PretrainedFeatureExtractor` (or
        :class:`ContrastivePretrainer`) and steps of scikit-learn that skl2onnx knows: scalers,
        `PCA`, `SVC`, `LogisticRegression`, `KNeighborsClassifier` and many more. Or one of this
        library alone: an extractor, a :class:`PretrainedClassifier`, a fine-tuned classifier or
        regressor. Of a fitted search its best estimator is taken.
    path : path
        Of the file, `.onnx`.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    ValueError, TypeError
        If a step can't be exported; the message names it and says why.

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
    has no probabilities, a column for each class; `variable` of other last steps; `probabilities`
    or `values` of a network of this library; `rows` of an extractor alone. The metadata have the
    labels of the columns as a JSON list under `labels`.

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
    model = getattr(model, "best_estimator_", model)
    steps = _steps(model)
    name, first = steps[0]
    network = _network(name, first, is_last=len(steps) == 1)
    tails: list[Any] = []
    labels = network.labels
    if len(steps) > 1:
        tails = _tails(steps[1:], network.output)
        classes = getattr(steps[-1][1], "classes_", None)
        labels = None if classes is None else classes.tolist()
    metadata = {"labels": labels, "backbone": network.name}
    return write_onnx(path, network.preprocessing, [*network.models(), *tails], metadata)


def _steps(model: Any) -> list[tuple[str, Any]]:
    """Return the names and the estimators that a model consists of."""
    if not isinstance(model, Pipeline):
        return [(type(model).__name__, model)]
    named: list[tuple[str, Any]] = []
    for name, step in model.steps:
        if step is None or step == "passthrough":
            continue
        inner = _steps(step) if isinstance(step, Pipeline) else [(name, step)]
        named += inner
    if not named:
        raise ValueError("The pipeline has no steps: there is nothing to export.")
    return named


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

    listed = None if labels is None else labels.tolist()
    return _Network(preprocessing, output, name, models, listed)


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
    return "it takes no images"


# ------------------------------------------------------------------------------ scikit-learn's


def _tails(steps: list[tuple[str, Any]], given: str) -> list[Any]:
    """Return each step behind the network as an ONNX model, which takes what the last one gives.

    One by one: an error is that of a step, and skl2onnx does not know all pipelines whose steps it
    knows.
    """
    for name, step in steps:
        check_is_fitted(step, msg=f"Step {name!r}, a %(name)s, is not fitted: call fit first.")
    for module in ("skl2onnx", "onnx"):
        load_optional(module, "to_onnx of a pipeline", _EXTRA)
    models = []
    for number, (name, step) in enumerate(steps, 1):
        if number < len(steps) and is_classifier(step):
            raise ValueError(
                f"Step {name!r}, a {type(step).__name__}, can't be exported: it is a classifier in "
                "front of other steps, and skl2onnx writes its predictions, not what it transforms."
            )
        try:
            model = _converted(step, given)
        except Exception as error:
            raise ValueError(
                f"Step {name!r}, a {type(step).__name__}, can't be exported: skl2onnx says: "
                f"{_first_line(error)}"
            ) from error
        if number < len(steps):
            inner = f"{name}_{number}"
            model, given = _renamed(model, model.graph.output[-1].name, inner), inner
        models.append(model)
    return models


def _converted(step: Any, given: str) -> Any:
    """Return a step as an ONNX model that takes float32 rows."""
    import skl2onnx
    from skl2onnx.common.data_types import FloatTensorType

    rows = [(given, FloatTensorType([None, step.n_features_in_]))]
    versions = {"": OPSET, "ai.onnx.ml": OPSET_ML}

    def convert(options: Any) -> Any:
        return skl2onnx.convert_sklearn(
            step, initial_types=rows, target_opset=versions, options=options
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of attributes that scikit-learn will rename one day
        if not hasattr(step, "classes_"):
            return convert(None)
        try:
            model = convert({id(step): {"zipmap": False}})  # else it returns dicts
        except Exception as error:
            if "zipmap" not in str(error):
                raise
            model = convert(None)  # it has no such option, and returns none
    return model if hasattr(step, "predict_proba") else _renamed(model, "probabilities", "scores")


def _renamed(model: Any, name: str, new: str) -> Any:
    """Return a model of which one output has another name."""
    for node in model.graph.node:
        node.output[:] = [new if output == name else output for output in node.output]
        node.input[:] = [new if given == name else given for given in node.input]
    for output in model.graph.output:
        output.name = new if output.name == name else output.name
    return model


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
