"""Whole models as ONNX files: an estimator of this library, or a pipeline that starts with one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sklearn.utils.validation import check_is_fitted

from sktransfer._estimators.detection import FineTunedDetector
from sktransfer._estimators.exported import (
    check_widths,
    example_rows,
    labels_of,
    network_of,
    steps_of,
)
from sktransfer._estimators.onnx_steps import step_models
from sktransfer._training.onnx_detector import detector_models
from sktransfer._training.onnx_file import OPSET, rows_model, write_onnx
from sktransfer._training.whole import check_target

__all__ = ["to_onnx"]


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
        is compared with what skl2onnx writes of it, on noise and on rows that the network makes, by
        ONNX Runtime where that is installed: other numbers are an error.

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
    each; `label` alone if it has neither, such as a `VotingClassifier` with `voting="hard"`. Of
    truth values, `label` is 0 or 1. There is `variable` of other last steps;
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
    steps = steps_of(model)
    name, first = steps[0]
    if isinstance(first, FineTunedDetector) and len(steps) == 1:
        return _write_detector(first, path)
    network = network_of(name, first, is_last=len(steps) == 1)
    tails: list[Any] = []
    labels = network.labels
    if len(steps) > 1:
        rows = example_rows(network)
        check_widths(rows, steps[1:])
        tails = step_models(steps[1:], network.output, rows)
        labels = labels_of(getattr(steps[-1][1], "classes_", None))
    model = rows_model(network.module, network.preprocessing, network.output)
    metadata = {"labels": labels, "backbone": network.name}
    return write_onnx(path, network.preprocessing, [model, *tails], metadata)


def _write_detector(detector: FineTunedDetector, path: str | os.PathLike) -> Path:
    check_is_fitted(detector, "_trainer")
    detector._validate_params()
    part = detector.trainer().part
    limits = detector.score_threshold, detector.nms_threshold, detector.max_detections
    given = detector.detector
    name = given if isinstance(given, str) else type(given).__name__
    metadata = {"labels": detector.classes_.tolist(), "backbone": name}
    return write_onnx(path, part.preprocessing, detector_models(part, *limits, OPSET), metadata)
