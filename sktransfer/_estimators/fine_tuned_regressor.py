"""Numbers of images, learnt by a pretrained network from a depth on that is a parameter."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import MultiOutputMixin, RegressorMixin
from torch import nn

from sktransfer._estimators.base import _fit_context, atomic, check_y, takes_dask
from sktransfer._estimators.labels import refuse_missing
from sktransfer._estimators.supervised import FineTuned
from sktransfer._training.export import Affine

__all__ = ["FineTunedRegressor"]


class FineTunedRegressor(MultiOutputMixin, RegressorMixin, FineTuned):
    """Predict numbers of images by a pretrained network whose last blocks are trained.

    Cut, phases, memory and views are those of :class:`FineTunedClassifier`. The loss is the mean
    squared error of standardised targets.

    Parameters
    ----------
    backbone, weights, unfreeze : default="efficientnet_lite0", "default", 1
        The network, its weights, and what of it is trained; see :class:`FineTunedClassifier`.
    head, pooling, dropout : default="linear", "avg", 0.0
        What turns activations into numbers.
    head_epochs : int or "auto", default="auto"
        As for the classifier, with a ridge regression, the same alone and as a start.
    max_epochs, batch_size, lr, head_lr, lr_decay, weight_decay : \
            default=10, 32, 5e-4, None, 0.85, 0.01
        The second phase.
    augment, n_views, predict_views : default=None, None, 1
        Other views of the images.
    early_stopping, validation_fraction, n_iter_no_change : default=False, 0.1, 5
        When to stop.
    callbacks, warm_start : default=None, False
        For skorch; and whether `fit` goes on.
    image_shape, image_size, memory, device, precision, runtime, n_jobs, random_state, verbose : \
            default=None, None, None, "auto", "float32", "auto", None, None, 0
        The input, and how to compute.

    Attributes
    ----------
    net_, history_, n_iter_, block_names_, unfrozen_block_names_, n_trainable_parameters_, \
            plan_, depth_search_
        As of :class:`FineTunedClassifier`.
    n_features_in_, feature_names_in_
        Of `X`, if it has columns.

    See Also
    --------
    FineTunedClassifier : The same for classes, where all parameters are described.

    Examples
    --------
    >>> import numpy as np
    >>> from sktransfer import FineTunedRegressor
    >>> X = np.linspace(0, 1, 20)[:, None, None] * np.ones((20, 32, 32))      # from black to white
    >>> y = np.linspace(-40, 60, 20)
    >>> model = FineTunedRegressor(unfreeze=0, image_size=64).fit(X[::2], y[::2])
    >>> bool(model.score(X[1::2], y[1::2]) > 0.5)
    True
    """

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
        max_epochs: int = 10,
        batch_size: int | str = 32,
        lr: float = 5e-4,
        head_lr: float | None = None,
        lr_decay: float = 0.85,
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
        runtime: str = "auto",
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
        self.runtime = runtime
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    @atomic
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
        return self._fit(X, y, sample_weight)

    @_fit_context(prefer_skip_nested_validation=True)
    @atomic
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
        return self._fit(X, y, sample_weight, in_parts=True)

    @takes_dask(lambda self: self._values(np.empty((0, 1, len(self._mean)), np.float32)))
    def predict(self, X: Any) -> np.ndarray:
        """Predict the values of images.

        Parameters
        ----------
        X : sequence of images, or dask collection of them

        Returns
        -------
        ndarray of shape (n,) or (n, n_outputs), float64
            In the unit of `y`.
        """
        return self._values(self._outputs(X))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the coefficient of determination R² on images.

        Parameters
        ----------
        X : sequence of images
        y : array-like of shape (n,) or (n, n_outputs)
            Numbers as in `fit`.
        sample_weight : array-like of shape (n,), default=None

        Returns
        -------
        float
        """
        refuse_missing(y)
        return super().score(X, y, sample_weight)

    def _values(self, outputs: np.ndarray) -> np.ndarray:
        values = outputs.mean(1) * self._scale + self._mean  # (n, n_outputs)
        return values if self._is_table else values[:, 0]

    def _last_layer(self) -> nn.Module:
        return Affine(self._scale, self._mean)

    def _encode(self, y: Any, is_known: bool) -> np.ndarray:
        y = check_y(y, multi_output=True, y_numeric=True, estimator=self).astype(np.float64)
        n_outputs = 1 if y.ndim == 1 else y.shape[1]
        if is_known and n_outputs != len(self._mean):
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
