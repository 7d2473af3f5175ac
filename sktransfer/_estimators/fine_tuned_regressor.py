"""Numbers of images, learnt by a pretrained network from a depth on that is a parameter."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import MultiOutputMixin, RegressorMixin
from torch import nn

from sktransfer._estimators.base import _fit_context, atomic, check_y, takes_dask
from sktransfer._estimators.supervised import FineTuned
from sktransfer._missing import refuse_missing
from sktransfer._training.whole import Affine

__all__ = ["FineTunedRegressor"]


class FineTunedRegressor(MultiOutputMixin, RegressorMixin, FineTuned):
    """Predict numbers of images by a pretrained network whose last blocks are trained.

    Cut, phases, memory and views are those of :class:`FineTunedClassifier`. The loss is the mean
    squared error of standardised targets.

    Parameters
    ----------
    backbone : str, torch.nn.Module, Backbone or fitted estimator, default="efficientnet_lite0"
        The network; see :class:`PretrainedFeatureExtractor`.
    weights : str, path or None, default="default"
        The weights of a network that is given by its name; None for random ones.
    unfreeze : int, str or list of str, default=1
        What is trained besides the head; see :class:`FineTunedClassifier`.
    head : "linear", tuple of int, or torch.nn.Module, default="linear"
        What turns an embedding into numbers.
    layer : int, str or list of these, default="auto"
        What the head sees: the last layer, another one or several, as `"all"`; see
        :class:`FineTunedClassifier`.
    pooling : {"avg", "max", "token", "flatten"} or tuple of these, default="avg"
        How the activations of a layer become a row, where the network has not pooled them.
    dropout : float in [0, 1), default=0.0
        Share of an embedding's features, and of the hidden layers', that training leaves out.
    head_epochs : int or "auto", default="auto"
        Epochs that train the head alone. `"auto"` sets a linear head to the optimum of a ridge
        regression on the embeddings. With ``unfreeze=0``, or on several layers, how much it is
        regularised is chosen by cross-validation.
    max_epochs : int, default=10
        Epochs that train the unfrozen blocks and the head.
    batch_size : int or "auto", default=32
        Images of a training step, and those that frozen blocks take at once. `"auto"`: 32 of a
        step, and as many as suit the device.
    lr : float, default=5e-4
        Learning rate of the pretrained layers: that of the last unfrozen block.
    head_lr : float, default=None
        Learning rate of the new layers, which are the head; None for `lr`.
    lr_decay : float in (0, 1], default=0.85
        Factor of the learning rate from each unfrozen block to the one in front of it.
    weight_decay : float, default=0.01
        AdamW's; of matrices and kernels, not of biases and norms.
    augment : {"flip", "dihedral", "auto"}, callable or None, default=None
        Other views of the images; see :class:`FineTunedClassifier`.
    n_views : int, default=None
        Fixed views of each image, itself included.
    predict_views : int, default=1
        Views over which a prediction averages.
    early_stopping : bool, default=False
        Whether to hold out a part of the images, and stop when the loss on it no longer falls.
    validation_fraction : float in (0, 1), default=0.1
        The share of the images that is held out.
    n_iter_no_change : int, default=5
        Epochs without a lower loss after which training stops.
    callbacks : list of skorch.callbacks.Callback, default=None
        For the training of the unfrozen blocks.
    warm_start : bool, default=False
        Whether another call of `fit` goes on with what the last one trained.
    image_shape : tuple of (height, width) or (height, width, channels), default=None
        Shape of an image if `X` has flat rows; None if `X` holds images.
    image_size : int or tuple of (height, width), default=None
        Size in pixels at which images enter the network; None for the size of its weights.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep the results of frozen blocks on disk.
    device : str or torch.device, default="auto"
        `"auto"` takes a CUDA device if there is one, else the CPU.
    precision : {"auto", "float32", "bfloat16", "int8"}, default="float32"
        What the network computes in. `"auto"` is `"float32"`, but trains in bfloat16 where that is
        faster; `"int8"` is for ``unfreeze=0`` alone. See :class:`FineTunedClassifier`.
    runtime : {"auto", "torch", "openvino"}, default="auto"
        What the frozen blocks run on; see :class:`PretrainedFeatureExtractor`.
    n_jobs : int, default=None
        Threads that read and decode images. None or -1: one a core.
    random_state : int, RandomState instance or None, default=None
        Seed of all that is random.
    verbose : int, default=0
        1 shows one progress bar, 2 the plan and skorch's table of epochs as well.

    Attributes
    ----------
    net_ : skorch.NeuralNet
        Its `module_` is what lies behind the cut.
    history_ : list of dict
        What skorch recorded of each epoch that trained the blocks.
    n_iter_ : int
        Number of these epochs.
    block_names_ : list of str
        All blocks of the network, in order.
    unfrozen_block_names_ : list of str
        The blocks that were trained.
    n_trainable_parameters_ : int
        Number of parameters that were trained, those of the head included.
    plan_ : Plan
        What is kept and what recomputed; its text is one line.
    depth_search_ : dict
        Of ``unfreeze="auto"``; see :class:`FineTunedClassifier`.
    n_features_in_ : int
        Number of columns of `X`, if it has any.
    feature_names_in_ : ndarray of str
        Name of the column, if `X` is a data frame.

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
        layer: Any = "auto",
        pooling: Any = "avg",
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
        self.layer = layer
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
    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> Self:
        """Train the head, then the unfrozen blocks with it.

        Parameters
        ----------
        X : sequence of images
            See :class:`sktransfer.PretrainedFeatureExtractor`.
        y : array-like of shape (n,) or (n, n_outputs)
            Numbers, in any unit: they are standardised for the training.
        sample_weight : array-like of shape (n,), default=None
            Weights of the images. One of weight 2 counts as two of them; two that are equal, with
            equal values, count as one of weight 2. An epoch shows each image once, whatever its
            weight.
        groups : array-like of shape (n,), default=None
            The group of each image, which no split inside `fit` tears apart; see
            :class:`FineTunedClassifier`.

        Returns
        -------
        self
        """
        return self._fit(X, y, sample_weight, groups)

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

    def last_layer(self) -> nn.Module:
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
