"""Pretrained networks with a new head, trained from a depth on that is a parameter."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils import Tags, check_random_state, column_or_1d
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch import nn

from sktransfer._augmentation import AUGMENTATIONS
from sktransfer._pretrained import PretrainedFeatureExtractor
from sktransfer._trainer import Settings, Trainer, unordered
from sktransfer._training import Interrupted
from sktransfer.base import (
    ImageEstimator,
    Interval,
    StrOptions,
    _fit_context,
    check_sample_weight,
    check_y,
)
from sktransfer.io import ImageSequence
from sktransfer.models import Backbone, get_model

__all__ = ["FineTunedClassifier", "FineTunedRegressor"]


class _FineTuned(ImageEstimator):
    """What the classifier and the regressor share: all but the meaning of `y`."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **ImageEstimator._parameter_constraints,
        "unfreeze": [Integral, str, list, tuple],
        "head": [StrOptions({"linear"}), list, tuple, nn.Module],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "head_epochs": [StrOptions({"auto"}), Interval(Integral, 0, None, closed="left")],
        "max_epochs": [Interval(Integral, 0, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="left")],
        "head_lr": [Interval(Real, 0, None, closed="left"), None],
        "lr_decay": [Interval(Real, 0, 1, closed="right")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "augment": [StrOptions(set(AUGMENTATIONS)), callable, None],
        "n_views": [Interval(Integral, 1, None, closed="left"), None],
        "predict_views": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "callbacks": [list, tuple, None],
        "warm_start": ["boolean"],
        "precision": [StrOptions({"float32", "bfloat16"})],
        "random_state": ["random_state"],
    }

    _kind: str
    _trainer: Trainer | None

    # ------------------------------------------------------------------------ fitting

    def _fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        encode: Callable[[Any, bool], np.ndarray],
        *,
        in_parts: bool = False,
    ) -> Self:
        """Fit or, with `in_parts` or `warm_start`, go on with what is fitted."""
        if y is None:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y "
                "is None."
            )
        goes_on = (in_parts or self.warm_start) and hasattr(self, "_trainer")
        images = self._check_images(X, reset=not goes_on)
        check_consistent_length(images, y)
        targets = encode(y, goes_on)
        weights = self._weights(y, sample_weight, images)
        rows, weights = unordered(images, targets, weights, self.n_jobs)
        images, targets = images[rows], targets[rows]
        self._check_targets(targets, in_parts)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        trainer = self._resume() if goes_on else self._new_trainer(targets, weights)
        targets = self._scaled(targets)
        stopped: Interrupted | None = None
        try:
            if in_parts:
                trainer.train_part(images, targets, weights, seed)
            else:
                trainer.train(images, targets, weights, seed, goes_on=goes_on)
        except Interrupted as error:
            stopped = error
        self._take(trainer)
        if stopped is not None:
            raise KeyboardInterrupt(str(stopped)) from None
        return self

    def _settings(self, n_outputs: int) -> Settings:
        return Settings(
            kind=self._kind,
            n_outputs=n_outputs,
            **{name: getattr(self, name) for name in Settings.taken_from_parameters()},
        )

    def _new_trainer(self, targets: np.ndarray, weights: np.ndarray | None) -> Trainer:
        n_outputs = self._begin(targets, weights)
        runner, preprocessing = self._load()
        return Trainer(runner, preprocessing, self._settings(n_outputs))

    def _resume(self) -> Trainer:
        """Return the trainer as it stands, with the parameters as they now are."""
        trainer = self._trained
        trainer.settings = self._settings(trainer.settings.n_outputs)
        return trainer

    def _take(self, trainer: Trainer) -> None:
        """Set the fitted attributes."""
        self._trainer = trainer
        self._fingerprint = trainer.frozen.runner.fingerprint
        self.block_names_ = trainer.frozen.runner.block_names
        self.unfrozen_block_names_ = [self.block_names_[i] for i in trainer.unfrozen_blocks]
        self.n_trainable_parameters_ = trainer.n_trainable_parameters
        self.history_ = trainer.net.history.to_list()
        self.n_iter_ = len(self.history_)
        self.plan_ = trainer.plan

    def _weights(self, y: Any, sample_weight: Any, images: ImageSequence) -> np.ndarray | None:
        if sample_weight is None:
            return None
        weights = check_sample_weight(
            sample_weight, images, dtype=np.float64, ensure_non_negative=True
        )
        if not weights.any():
            raise ValueError("sample_weight is zero everywhere: nothing is left to learn from.")
        return weights

    def _check_targets(self, targets: np.ndarray, in_parts: bool) -> None:
        """Raise an error if nothing can be learnt from these encoded targets."""

    def _begin(self, targets: np.ndarray, weights: np.ndarray | None) -> int:
        """Prepare a new fit; return the number of outputs."""
        return targets.shape[1]

    def _scaled(self, targets: np.ndarray) -> np.ndarray:
        return targets

    # ------------------------------------------------------------------------ what is fitted

    @property
    def _trained(self) -> Trainer:
        """The trainer; rebuilt after unpickling."""
        check_is_fitted(self, "plan_")
        if self._trainer is None:
            runner, preprocessing = self._load()
            if runner.fingerprint != self._fingerprint:
                raise ValueError(
                    f"The weights that backbone={self.backbone!r}, weights={self.weights!r} name "
                    "are not those on which this estimator was fitted (fingerprint "
                    f"{runner.fingerprint[:8]}, then {self._fingerprint[:8]}), and its trained "
                    "blocks do not fit to others. Pass the old weights by "
                    "set_params(weights='path/to/file.pth'), or fit it again."
                )
            settings = self._settings(self._n_outputs)
            self._trainer = Trainer(runner, preprocessing, settings)
            self._trainer.restore(self._state, self.history_, self.plan_)
        return self._trainer

    @property
    def net_(self) -> Any:
        """The skorch net, whose module is what follows the cut."""
        return self._trained.net

    def __getstate__(self) -> dict[str, Any]:
        # Kept is what cannot be rebuilt: the trained blocks and the head, as NumPy arrays. The
        # frozen rest is loaded again, and checked, when it is needed.
        state = super().__getstate__()
        if state.get("_trainer") is not None:
            trainer = state["_trainer"]
            state = {
                **state,
                "_trainer": None,
                "_state": trainer.state(),
                "_n_outputs": trainer.settings.n_outputs,
            }
        return state

    def to_feature_extractor(self) -> PretrainedFeatureExtractor:
        """Return a transformer whose embeddings are those of the fine-tuned network.

        Returns
        -------
        PretrainedFeatureExtractor
            On a copy of the network, with the parameters that both have.
        """
        network = self._trained.whole_network()
        own = get_model(self.backbone, self.weights)
        name = f"fine-tuned-{own.name.rpartition('/')[2]}"
        shared = PretrainedFeatureExtractor().get_params().keys() & self.get_params().keys()
        parameters = {name: getattr(self, name) for name in shared - {"weights"}}
        parameters["backbone"] = Backbone(network, own.preprocessing, name=name)
        return PretrainedFeatureExtractor(**parameters)

    def _outputs(self, X: Any) -> np.ndarray:
        """Return what the network says of each view: (n, predict_views, n_outputs)."""
        check_is_fitted(self, "plan_")
        self._validate_params()
        trainer = self._trained
        images = self._check_images(X, reset=False)
        trainer.settings = self._settings(trainer.settings.n_outputs)
        return trainer.outputs(images)


class FineTunedClassifier(ClassifierMixin, _FineTuned):
    """DOC"""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **_FineTuned._parameter_constraints,
        "class_weight": [StrOptions({"balanced"}), dict, None],
    }

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: Any = "default",
        unfreeze: Any = 1,
        head: Any = "linear",
        pooling: str = "avg",
        dropout: float = 0.0,
        head_epochs: int | str = "auto",
        max_epochs: int = 20,
        batch_size: int = 32,
        lr: float = 1e-3,
        head_lr: float | None = None,
        lr_decay: float = 1.0,
        weight_decay: float = 1e-2,
        augment: Any = None,
        n_views: int | None = None,
        predict_views: int = 1,
        class_weight: Any = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        callbacks: Any = None,
        warm_start: bool = False,
        image_shape: Any = None,
        image_size: Any = None,
        memory: Any = None,
        device: Any = "auto",
        precision: str = "float32",
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.unfreeze = unfreeze
        self.head = head
        self.pooling = pooling
        self.dropout = dropout
        self.head_epochs = head_epochs
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.head_lr = head_lr
        self.lr_decay = lr_decay
        self.weight_decay = weight_decay
        self.augment = augment
        self.n_views = n_views
        self.predict_views = predict_views
        self.class_weight = class_weight
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.callbacks = callbacks
        self.warm_start = warm_start
        self.image_shape = image_shape
        self.image_size = image_size
        self.memory = memory
        self.device = device
        self.precision = precision
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train the head, then the unfrozen blocks with it.

        Parameters
        ----------
        X : sequence of images
            See :class:`sktransfer.PretrainedFeatureExtractor`.
        y : array-like of shape (n,) or (n, n_labels)
            Labels of any type; or an indicator matrix of zeros and ones, if an image may have
            several.
        sample_weight : array-like of shape (n,), default=None
            Weights of the images; one of weight 2 counts as two of them.

        Returns
        -------
        self
        """
        return self._fit(X, y, sample_weight, self._encode)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train head and unfrozen blocks for one epoch, at a constant learning rate.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`, of some of the images.
        classes : array-like of shape (n_classes,), default=None
            All labels that will come; needed in the first call, unless `fit` came before.

        Returns
        -------
        self
        """
        if self.class_weight == "balanced":
            raise ValueError(
                "class_weight='balanced' is not known from a part of the images; pass "
                "sklearn.utils.class_weight.compute_class_weight's result as a dict."
            )
        if hasattr(self, "_trainer"):
            if classes is not None and not np.array_equal(np.unique(classes), self.classes_):
                raise ValueError(
                    f"classes={list(classes)!r} are not those of the first call to partial_fit, "
                    f"{self.classes_.tolist()}."
                )
        elif classes is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        else:
            self.classes_ = np.unique(classes)
            is_multilabel = type_of_target(y) == "multilabel-indicator"
            self._kind = "label" if is_multilabel else "class"
        return self._fit(X, y, sample_weight, lambda y, _: self._encode(y, True), in_parts=True)

    def decision_function(self, X: Any) -> np.ndarray:
        """Return what the network says before it is turned into probabilities.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n,) or (n, n_classes), float32
            Logits, the mean over the views; of two classes, by how much the second leads.
        """
        outputs = self._outputs(X).mean(1)
        is_binary = self._kind == "class" and len(self.classes_) == 2
        return outputs[:, 1] - outputs[:, 0] if is_binary else outputs

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict the probability of every class.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n, n_classes), float32
            Columns as in `classes_`; rows sum to 1, but for several labels an image.
        """
        outputs = torch.from_numpy(self._outputs(X))  # (n, predict_views, n_classes)
        is_multilabel = self._kind == "label"
        probabilities = outputs.sigmoid() if is_multilabel else outputs.softmax(2)
        return probabilities.mean(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Predict the class of images.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n,) or (n, n_labels)
            Labels as in `y`.
        """
        probabilities = self.predict_proba(X)
        if self._kind == "label":
            return (probabilities > 0.5).astype(int)
        return self.classes_[probabilities.argmax(1)]

    def _encode(self, y: Any, goes_on: bool) -> np.ndarray:
        """Turn labels into class numbers (n,), or zeros and ones (n, n_labels)."""
        y = check_y(y, multi_output=True, estimator=self)
        y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y
        check_classification_targets(y)
        is_multilabel = type_of_target(y) == "multilabel-indicator"
        if y.ndim == 2 and not is_multilabel:
            raise ValueError(
                f"y has {y.shape[1]} columns that are not zeros and ones. Several labels an "
                "image come as an indicator matrix: see sklearn's MultiLabelBinarizer."
            )
        if not goes_on:
            self._kind = "label" if is_multilabel else "class"
            self.classes_ = np.arange(y.shape[1]) if is_multilabel else np.unique(y)
        if is_multilabel:
            return y.astype(np.float32)
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(
                f"y holds the classes {unknown.tolist()}, which were not announced: the estimator "
                f"goes on with {self.classes_.tolist()}. Name all in the first call to "
                "partial_fit, classes=[...], or fit a new estimator."
            )
        return np.searchsorted(self.classes_, y)

    def _weights(self, y: Any, sample_weight: Any, images: ImageSequence) -> np.ndarray | None:
        weights = super()._weights(y, sample_weight, images)
        if self.class_weight is None:
            return weights
        of_classes = compute_sample_weight(self.class_weight, y)
        return of_classes if weights is None else weights * of_classes

    def _check_targets(self, targets: np.ndarray, in_parts: bool) -> None:
        if self._kind == "class" and not in_parts and len(np.unique(targets)) < 2:
            raise ValueError(
                f"{type(self).__name__} needs images of at least 2 classes and got 1 class: all "
                f"{len(targets)} images are {self.classes_[targets].tolist()[0]!r}."
            )

    def _begin(self, targets: np.ndarray, weights: np.ndarray | None) -> int:
        return len(self.classes_)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class FineTunedRegressor(MultiOutputMixin, RegressorMixin, _FineTuned):
    """DOC"""

    _kind = "value"

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: Any = "default",
        unfreeze: Any = 1,
        head: Any = "linear",
        pooling: str = "avg",
        dropout: float = 0.0,
        head_epochs: int | str = "auto",
        max_epochs: int = 20,
        batch_size: int = 32,
        lr: float = 1e-3,
        head_lr: float | None = None,
        lr_decay: float = 1.0,
        weight_decay: float = 1e-2,
        augment: Any = None,
        n_views: int | None = None,
        predict_views: int = 1,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        callbacks: Any = None,
        warm_start: bool = False,
        image_shape: Any = None,
        image_size: Any = None,
        memory: Any = None,
        device: Any = "auto",
        precision: str = "float32",
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.unfreeze = unfreeze
        self.head = head
        self.pooling = pooling
        self.dropout = dropout
        self.head_epochs = head_epochs
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.head_lr = head_lr
        self.lr_decay = lr_decay
        self.weight_decay = weight_decay
        self.augment = augment
        self.n_views = n_views
        self.predict_views = predict_views
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.callbacks = callbacks
        self.warm_start = warm_start
        self.image_shape = image_shape
        self.image_size = image_size
        self.memory = memory
        self.device = device
        self.precision = precision
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train the head, then the unfrozen blocks with it.

        Parameters
        ----------
        X : sequence of images
            See :class:`sktransfer.PretrainedFeatureExtractor`.
        y : array-like of shape (n,) or (n, n_outputs)
            Numbers, in any unit: they are standardised for the training.
        sample_weight : array-like of shape (n,), default=None
            Weights of the images; one of weight 2 counts as two of them.

        Returns
        -------
        self
        """
        return self._fit(X, y, sample_weight, self._encode)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train head and unfrozen blocks for one epoch, at a constant learning rate.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`, of some of the images. The first call says what is standard.

        Returns
        -------
        self
        """
        return self._fit(X, y, sample_weight, self._encode, in_parts=True)

    def predict(self, X: Any) -> np.ndarray:
        """Predict the values of images.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n,) or (n, n_outputs), float64
            In the unit of `y`.
        """
        values = self._outputs(X).mean(1) * self._scale + self._mean  # (n, n_outputs)
        return values if self._is_table else values[:, 0]

    def _encode(self, y: Any, goes_on: bool) -> np.ndarray:
        y = check_y(y, multi_output=True, y_numeric=True, estimator=self).astype(np.float64)
        n_outputs = 1 if y.ndim == 1 else y.shape[1]
        if goes_on and n_outputs != len(self._mean):
            raise ValueError(
                f"y has {n_outputs} columns, but the estimator goes on with {len(self._mean)}."
            )
        self._is_table = y.ndim == 2
        return y.reshape(len(y), n_outputs)

    def _begin(self, targets: np.ndarray, weights: np.ndarray | None) -> int:
        self._mean = np.average(targets, axis=0, weights=weights)
        deviation = np.sqrt(np.average((targets - self._mean) ** 2, axis=0, weights=weights))
        self._scale = np.where(deviation > 0, deviation, 1.0)
        return targets.shape[1]

    def _scaled(self, targets: np.ndarray) -> np.ndarray:
        return ((targets - self._mean) / self._scale).astype(np.float32)
