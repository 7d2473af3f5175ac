"""What of a model is written to a file, whatever its format: a network and what follows it."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn.functional import interpolate

from sktransfer._engine.augmentation import Augmentation
from sktransfer._engine.embedding import Rows
from sktransfer._engine.program import Output
from sktransfer._engine.runner import Runner
from sktransfer._estimators.base import ImageEstimator
from sktransfer._estimators.contrastive import ContrastivePretrainer
from sktransfer._estimators.detection import FineTunedDetector
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor, embedding_of
from sktransfer._estimators.pretrained_classifier import PretrainedClassifier, logits_of
from sktransfer._estimators.supervised import FineTuned
from sktransfer._torch_state import float32_by_default, network_lock
from sktransfer._training.whole import (
    OUTPUTS,
    MeanOverViews,
    PowerNormalized,
    RowsNetwork,
    augmentation_of,
    whole_with_preprocessing,
)
from sktransfer.models import Backbone
from sktransfer.models._modules import copy_of
from sktransfer.transforms import Preprocessing

N_IMAGES = 5  # by which files are compared with their models


class Frozen(NamedTuple):
    """What of a frozen network makes its rows, and all that follows them."""

    rows: list[Output]
    of_view: nn.Module  # takes the rows of one view, side by side
    augmentation: Augmentation | None  # makes the views of an image; None: the image alone
    of_mean: nn.Module  # takes the mean over the views of what `of_view` returns
    backbone: Backbone  # that the rows are those of


class ExportedNetwork(NamedTuple):
    """What leads from images of the network's size, 0 to 255, to its output."""

    preprocessing: Preprocessing
    output: str  # as it is called in the file
    runner: Runner
    module: nn.Module
    frozen: Frozen | None  # the same in two parts; None if some blocks were trained
    labels: list[Any] | None = None

    @property
    def name(self) -> str:
        """Of the backbone."""
        return self.runner.name


def steps_of(model: Any) -> list[tuple[str, Any]]:
    """Return the names and the estimators that a model consists of."""
    model = _without_shell(model)
    if not isinstance(model, Pipeline):
        return [(type(model).__name__, model)]
    named = _flattened(model)
    if not named:
        raise ValueError("The pipeline has no steps: there is nothing to export.")
    name, last = named[-1]
    if hasattr(last, "classes_") and _ends_in_passthrough(model):
        raise ValueError(
            f"The classifier {name!r} is followed by 'passthrough', so the pipeline transforms and "
            "predicts nothing, which can't be exported: leave the last step out."
        )
    return named


def _flattened(pipeline: Pipeline) -> list[tuple[str, Any]]:
    """Return the steps of a pipeline that do something, those of pipelines inside included."""
    named: list[tuple[str, Any]] = []
    for name, given in pipeline.steps:
        step = _without_shell(given)
        if isinstance(step, Pipeline):
            named += _flattened(step)
        elif not _does_nothing(step):
            named.append((name, step))
    return named


def _ends_in_passthrough(pipeline: Pipeline) -> bool:
    end = _without_shell(pipeline.steps[-1][1])
    return _ends_in_passthrough(end) if isinstance(end, Pipeline) else _does_nothing(end)


def _does_nothing(step: Any) -> bool:
    return step is None or (isinstance(step, str) and step == "passthrough")


def _without_shell(model: Any) -> Any:
    """Return what a search has found, and what is frozen."""
    while (inner := getattr(model, "best_estimator_", None)) is not None or isinstance(
        model, FrozenEstimator
    ):
        model = model.estimator if inner is None else inner
    return model


def labels_of(classes: Any) -> list[Any] | None:
    """Return labels as lists; of several targets, a list for each."""
    if classes is None:
        return None
    return [labels_of(each) for each in classes] if isinstance(classes, list) else classes.tolist()


def network_of(name: str, first: Any, is_last: bool) -> ExportedNetwork:
    """Return the network of a model's first step; an error if it has none that can be written.

    Parameters
    ----------
    name : str
        Of the step.
    first : estimator
    is_last : bool
        Whether it is the only step.
    """
    if isinstance(first, ContrastivePretrainer):
        first = first.to_feature_extractor()
    if isinstance(first, PretrainedFeatureExtractor):
        first._validate_params()
        embedding = embedding_of(first)
        behind = PowerNormalized(embedding) if first.normalize else nn.Identity()
        return _of_rows(embedding, "rows", behind)
    if isinstance(first, PretrainedClassifier) and is_last:
        return _of_rows(logits_of(first), "probabilities", nn.Softmax(1), first.classes_)
    if isinstance(first, FineTuned) and is_last:
        return _of_fine_tuned(first)
    raise TypeError(
        f"Step {name!r}, a {type(first).__name__}, can't be exported: "
        f"{_why_not(first)}. A model starts with a PretrainedFeatureExtractor or a "
        "ContrastivePretrainer, or is a PretrainedClassifier, a FineTunedClassifier, a "
        "FineTunedRegressor or a FineTunedDetector."
    )


def _of_rows(
    embedding: Rows, output: str, behind: nn.Module, labels: Any = None
) -> ExportedNetwork:
    runner, preprocessing = embedding.runner, embedding.preprocessing
    augmentation = augmentation_of(embedding)
    network = _over_views(RowsNetwork(embedding), augmentation)
    frozen = Frozen(embedding.wanted, nn.Identity(), augmentation, behind, runner.backbone)
    whole = nn.Sequential(network, behind)
    return ExportedNetwork(preprocessing, output, runner, whole, frozen, labels_of(labels))


def _of_fine_tuned(model: FineTuned) -> ExportedNetwork:
    check_is_fitted(model, "plan_")
    trainer, last = model.trainer(), model.last_layer()
    augmentation = _augmentation_of_predictions(model)
    blocks = trainer.frozen
    frozen = None
    if not len(trainer.net.module_.blocks):
        frozen = _with_head(model, blocks.rows, blocks.runner.backbone)
    return ExportedNetwork(
        blocks.preprocessing,
        OUTPUTS[trainer.settings.kind],
        blocks.runner,
        _over_views(whole_with_preprocessing(trainer, last), augmentation),
        frozen,
        labels_of(getattr(model, "classes_", None)),
    )


def frozen_again(model: FineTuned) -> Frozen:
    """Return a fine-tuned network with its trained blocks as they are now, and its head."""
    embedding = embedding_of(model.to_feature_extractor())
    return _with_head(model, embedding.wanted, embedding.runner.backbone)


def _with_head(model: FineTuned, rows: list[Output], backbone: Backbone) -> Frozen:
    head = nn.Sequential(copy_of(model.trainer().net.module_.head).cpu(), model.last_layer())
    head = head.eval().requires_grad_(False)
    return Frozen(rows, head, _augmentation_of_predictions(model), nn.Identity(), backbone)


def smooth_noise(n_channels: int, sides: tuple[int, int]) -> torch.Tensor:
    """Return uint8 images (n, c, height, width)."""
    random = np.random.RandomState(0)
    noise = random.randint(256, size=(N_IMAGES, n_channels, 9, 9)).astype(np.float32)
    return interpolate(torch.from_numpy(noise), sides, mode="bilinear").to(torch.uint8)


def rows_in_float32(network: ExportedNetwork, fitted: torch.Tensor) -> torch.Tensor:
    """Return what torch makes of images of the network's size, 0 to 255."""
    with network_lock.shared(), float32_by_default():
        return network.module(fitted)


def example_rows(network: ExportedNetwork) -> np.ndarray:
    """Return rows that a network makes of images that are noise."""
    images = smooth_noise(network.preprocessing.shape[0], network.preprocessing.size)
    return rows_in_float32(network, images).numpy()


def check_widths(rows: np.ndarray, steps: list[tuple[str, Any]]) -> None:
    """Raise an error if a step is not fitted, or was on rows of another width than it gets."""
    for name, step in steps:
        check_is_fitted(step, msg=f"Step {name!r}, a %(name)s, is not fitted: call fit first.")
    source = "the network"
    for number, (name, step) in enumerate(steps, 1):
        width = getattr(step, "n_features_in_", rows.shape[1])
        if width != rows.shape[1]:
            raise ValueError(
                f"Step {name!r}, a {type(step).__name__}, was fitted on rows of {width} features, "
                f"and {source} gives {rows.shape[1]} now: it was changed after fit. Fit the "
                "pipeline again."
            )
        if number < len(steps):
            try:
                rows, source = transformed(step, rows), f"step {name!r}"
            except Exception:  # not all steps take rows like these
                return


def transformed(step: Any, rows: np.ndarray) -> np.ndarray:
    """Return what a step makes of rows, dense and in float32, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that are of no photograph
        found = step.transform(rows)
    return np.asarray(found.toarray() if issparse(found) else found, np.float32)


def _augmentation_of_predictions(model: FineTuned) -> Augmentation | None:
    """Return what makes the views over which a prediction averages; None for the image alone."""
    predictor = model.predictor()  # with the parameters as they now are
    settings = predictor.settings
    n_views = settings.predict_views
    if n_views == 1:
        return None
    augmentation = Augmentation(settings.augment, n_views, predictor.frozen.size)
    if not augmentation.symmetries:
        raise ValueError(
            f"predict_views={n_views} averages over views that are drawn by chance, which no file "
            "can do: export it after set_params(predict_views=1), or fit it with augment='flip' or "
            "'dihedral'."
        )
    return augmentation


def _over_views(network: nn.Module, augmentation: Augmentation | None) -> nn.Module:
    return network if augmentation is None else MeanOverViews(network, augmentation)


def parameters_of(model: Any) -> list[Any]:
    """Return the values of all parameters, those of estimators inside included."""
    if isinstance(model, type) or not hasattr(model, "get_params"):
        return []
    return list(model.get_params().values())


def _why_not(first: Any) -> str:
    kind = type(first).__name__
    if isinstance(first, type):
        return f"{first.__name__} is a class: pass one of its objects"
    if kind == "PatchAnomalyDetector":
        return "it looks for neighbours in a bank of patches, which is no part of a network"
    if isinstance(first, FineTunedDetector):
        return "to_onnx writes detectors, and nothing else does"
    if isinstance(first, (PretrainedClassifier, FineTuned)):
        return "it predicts, so no step can follow it"
    if isinstance(first, ImageEstimator):
        return "estimators of this kind are not written"
    if isinstance(first, (nn.Module, Backbone)) or hasattr(first, "to_backbone"):
        return "it is a network: pass PretrainedFeatureExtractor(backbone=...) with it"
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
