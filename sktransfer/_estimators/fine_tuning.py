"""Pretrained networks with a new head, trained from a depth on that is a parameter."""

from __future__ import annotations

import os
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils import Tags, check_random_state, column_or_1d
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch import nn

from sktransfer._engine.augmentation import AUGMENTATIONS
from sktransfer._estimators.base import (
    Interval,
    StrOptions,
    _fit_context,
    check_sample_weight,
    check_y,
    takes_dask,
)
from sktransfer._estimators.labels import plain_labels, refuse_missing
from sktransfer._estimators.trained import TrainedEstimator
from sktransfer._training.depth_search import search_depth
from sktransfer._training.settings import Settings, unordered
from sktransfer._training.trainer import Trainer
from sktransfer._training.whole import Affine, export_onnx
from sktransfer.io import ImageSequence

__all__ = ["FineTunedClassifier", "FineTunedRegressor"]


class _FineTuned(TrainedEstimator):
    """What the classifier and the regressor share: all but the meaning of `y`."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **TrainedEstimator._parameter_constraints,
        "head": [StrOptions({"linear"}), list, tuple, nn.Module],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "head_epochs": [StrOptions({"auto"}), Interval(Integral, 0, None, closed="left")],
        "augment": [StrOptions(set(AUGMENTATIONS)), callable, None],
        "n_views": [Interval(Integral, 1, None, closed="left"), None],
        "predict_views": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
    }

    _kind: str

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
        y = self._check_given(y)
        if in_parts and self.unfreeze == "auto" and not hasattr(self, "_trainer"):
            raise ValueError(
                "unfreeze='auto' can't be searched for on a part of the images: call fit first, "
                "or pass a number of blocks."
            )
        goes_on = (in_parts or self.warm_start) and hasattr(self, "_trainer")
        images = self._check_images(X, reset=not goes_on)
        check_consistent_length(images, y)
        targets = encode(y, goes_on)
        weights = self._weights(y, sample_weight, images)
        found = images, targets, weights
        # With a part held out, a repeated image could be in both.
        repeats = not self.early_stopping
        rows, weights = unordered(images, targets, weights, self.n_jobs, repeats)
        images, targets = images[rows], targets[rows]
        self._check_targets(targets, in_parts)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        if not goes_on:
            self._keep_shape()
            self._choose_depth(*found, seed)
        trainer = self._resume() if goes_on else self._begin_trainer(targets, weights)
        targets = self._scaled(targets)
        self._train(trainer, images, targets, weights, seed, in_parts=in_parts, goes_on=goes_on)
        return self

    def _choose_depth(
        self, images: ImageSequence, targets: np.ndarray, weights: np.ndarray | None, seed: int
    ) -> None:
        """Search for the depth, if it is to be searched for."""
        self.__dict__.pop("depth_search_", None)  # of an earlier fit
        if self.unfreeze != "auto":
            return
        rows, weights = unordered(images, targets, weights, self.n_jobs, repeats=False)
        self.depth_search_ = search_depth(self, images[rows], targets[rows], weights, seed)
        if self.verbose:
            depths = ", ".join(map(str, self.depth_search_["depths"]))
            print(f"unfreeze='auto' took {self.depth_search_['unfreeze']} of {depths}")

    def _check_given(self, y: Any) -> Any:
        """Return `y` in a container that scikit-learn takes; raise an error if it misses some."""
        if y is None:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y "
                "is None."
            )
        refuse_missing(y)
        return y

    def _settings(self, n_outputs: int) -> Settings:
        settings = super()._settings(n_outputs)
        if settings.unfreeze == "auto":
            settings.unfreeze = self.depth_search_["unfreeze"]
        return settings

    def _begin_trainer(self, targets: np.ndarray, weights: np.ndarray | None) -> Trainer:
        return self._new_trainer(self._begin(targets, weights))

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

    def to_onnx(self, path: str | os.PathLike) -> Path:
        """Write the whole network, frozen and trained blocks and the head, to an ONNX file.

        Needs ``pip install 'sktransfer[onnx]'`` here, and nothing of this library where the file
        is used.

        Parameters
        ----------
        path : path
            Of the file, `.onnx`. Weights of more than 2 GB go to a second one beside it.

        Returns
        -------
        pathlib.Path

        Raises
        ------
        ValueError
            If torch can't export the network, or there is no such folder.

        Notes
        -----
        The input `images` is uint8 RGB (n, 3, height, width) with any n, resized and cropped as
        the file's metadata says under `preprocessing` (the size is fixed); normalisation is part
        of the graph. The output is `probabilities` (n, n_classes), their names a JSON list under
        `labels`; or, of a regressor, `values` (n, n_outputs) in the unit of `y`. It computes in
        float32, and takes the image itself, whatever `precision` and `predict_views`.
        """
        check_is_fitted(self, "plan_")
        classes = getattr(self, "classes_", None)
        labels = None if classes is None else classes.tolist()
        return export_onnx(self._trained, path, self._last_layer(), labels)

    def _last_layer(self) -> nn.Module:
        """Return what turns the head's outputs into predictions."""
        return nn.Sigmoid() if self._kind == "label" else nn.Softmax(1)

    def _outputs(self, X: Any) -> np.ndarray:
        """Return what the network says of each view: (n, predict_views, n_outputs)."""
        check_is_fitted(self, "plan_")
        self._validate_params()
        trainer = self._trained
        images = self._check_images(X, reset=False)
        trainer.settings = self._settings(trainer.settings.n_outputs)
        return trainer.outputs(images)


class FineTunedClassifier(ClassifierMixin, _FineTuned):
    """Classify images by a pretrained network whose last blocks are trained with a new head.

    The network is cut in front of the first unfrozen block. What lies before the cut is frozen: it
    runs once for each image, and with a `memory` once for all folds, candidates and later runs.
    What lies behind it is trained, by :mod:`skorch`, in two phases: first the head alone, on the
    embeddings of the pretrained network; then the unfrozen blocks together with it, at a learning
    rate that rises over the first tenth of the steps and falls to zero by a cosine.

    Parameters
    ----------
    backbone : str, torch.nn.Module, Backbone or fitted estimator, default="efficientnet_lite0"
        A name of :func:`sktransfer.list_models`, a network, or an estimator that trained one; see
        :class:`PretrainedFeatureExtractor`.
    weights : str, path or None, default="default"
        `"default"` for the best published weights, another published name, a path to a state dict,
        or None: random weights, to train from scratch. Only then do the statistics of
        batch-norms move, and is the first phase left out.
    unfreeze : int, str or list of str, default=1
        What is trained besides the head. A number of blocks from the end, 0 for the head alone;
        the name of a block in `block_names_`, or a prefix of several (`"layer4"`): from there to
        the end; `"all"`; or a list of names or prefixes: these blocks and no others. `"auto"`: a
        number found by a search inside the training images, see Notes.
    head : "linear", tuple of int, or torch.nn.Module, default="linear"
        What turns an embedding into logits: a linear layer; hidden layers of these sizes with
        ReLU, and a linear layer; or a module, which is copied.
    pooling : {"avg", "max", "token", "flatten"}, default="avg"
        How the last activations become an embedding, where the network has not pooled them.
    dropout : float in [0, 1), default=0.0
        Share of an embedding's features, and of the hidden layers', that training leaves out.
    head_epochs : int or "auto", default="auto"
        Epochs of the first phase. `"auto"` sets a linear head to the optimum of a regularised
        logistic regression on the embeddings, which is all there is to do with ``unfreeze=0``, and
        else a start that is regularised ten times more; another head gets `max_epochs` of them,
        unless it is all that is trained.
    max_epochs : int, default=10
        Epochs of the second phase.
    batch_size : int or "auto", default=32
        Images of a step. `"auto"`: 32, and frozen blocks take as many as suit the device. Where a
        step does not fit into the memory, it is taken in parts, with a warning.
    lr : float, default=5e-4
        Learning rate of the last unfrozen block, for AdamW.
    head_lr : float, default=None
        Learning rate of the head; None for that of the last block.
    lr_decay : float in (0, 1], default=0.85
        Factor of the learning rate from each unfrozen block to the one in front of it.
    weight_decay : float, default=0.01
        AdamW's; of matrices and kernels, not of biases and norms.
    augment : {"flip", "dihedral", "auto"}, callable or None, default=None
        Other views of the images. `"flip"`: mirrored left to right; `"dihedral"`: turned by
        quarters and mirrored, for images without an upright direction; `"auto"`: mirrored, and
        changed by torchvision's `TrivialAugmentWide`; or any callable on uint8 tensors (3, height,
        width), such as transforms of :mod:`torchvision.transforms.v2`. With frozen blocks an image
        has a fixed set of views, each kept by itself, and training takes them in turns. With
        nothing frozen every epoch draws new ones.
    n_views : int, default=None
        Fixed views of each image, itself included; None for all 2 of "flip", all 8 of "dihedral"
        (4 if images are not square), and 4 of a random augmentation.
    predict_views : int, default=1
        Views over which a prediction averages, the image itself being the first.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes; `"balanced"`: inversely proportional to their numbers.
    early_stopping : bool, default=False
        Whether to hold out a part of the images, stop when the loss on it has not fallen for some
        epochs, and take the weights of the best one.
    validation_fraction : float in (0, 1), default=0.1
        This part; a stratified one.
    n_iter_no_change : int, default=5
        These epochs.
    callbacks : list of skorch.callbacks.Callback, default=None
        For the second phase: skorch's own or yours. `Checkpoint` and `LoadInitState` save and
        resume; one that raises KeyboardInterrupt ends the training.
    warm_start : bool, default=False
        Whether another call of `fit` goes on with what the last one trained.
    image_shape : tuple of (height, width) or (height, width, channels), default=None
        Shape of an image if `X` has flat rows; None if `X` holds images.
    image_size : int or tuple of (height, width), default=None
        Size in pixels at which images enter the network; None for the size of its weights.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep the results of frozen blocks on disk. `plan_` says which. A
        :class:`PretrainedFeatureExtractor` of the same network shares them.
    device : str or torch.device, default="auto"
        `"auto"` takes a CUDA device if there is one, else the CPU.
    precision : {"float32", "bfloat16"}, default="float32"
        What the network computes in. Weights are float32 in any case, and activations at the cut
        are kept in half precision.
    runtime : {"auto", "torch", "openvino"}, default="auto"
        What the frozen blocks run on; see :class:`PretrainedFeatureExtractor`. Training is
        torch's.
    n_jobs : int, default=None
        Threads that read and decode images. None or -1: one a core.
    random_state : int, RandomState instance or None, default=None
        Seed of all that is random. The order of the rows, `n_jobs` and `memory` change nothing.
    verbose : int, default=0
        1 shows one progress bar, 2 the plan and skorch's table of epochs as well.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels.
    net_ : skorch.NeuralNet
        Its `module_` is what lies behind the cut.
    history_ : list of dict
        What skorch recorded of each epoch of the second phase: `train_loss`, `valid_loss`, ...
    n_iter_ : int
        Number of these epochs.
    block_names_ : list of str
        All blocks of the network, in order. Empty if it has none or can't be traced: then it is
        all or nothing.
    unfrozen_block_names_ : list of str
        Those that were trained.
    n_trainable_parameters_ : int
        Number of parameters that were trained, those of the head included.
    plan_ : Plan
        What is kept and what recomputed; its text is one line.
    depth_search_ : dict
        Of ``unfreeze="auto"``. `"unfreeze"`: the depth taken; `"best"`: that of the best score;
        `"threshold"`: one standard error less than this score; `"depths"`: the candidates;
        `"shares"`: of the network's operations, what lies in their trained blocks;
        `"cv_results_"`: those of :class:`sklearn.model_selection.HalvingGridSearchCV`.
    n_features_in_ : int
        Number of columns of `X`, if it has any.
    feature_names_in_ : ndarray of str
        Name of the column, if `X` is a data frame.

    Raises
    ------
    ValueError, TypeError
        In `fit`: for an image that can't be read, naming its row, file and reason; for a depth
        that the network does not have, naming its blocks; and for a loss that is not finite.
    KeyboardInterrupt
        In `fit`, on Ctrl-C. It says how far training came; the estimator is fitted so far, and
        goes on with ``warm_start=True``.

    See Also
    --------
    FineTunedRegressor : The same for numbers.
    PretrainedFeatureExtractor : Embeddings for any other classifier.

    Notes
    -----
    A frozen block is always in evaluation mode: its weights and its batch-norm statistics never
    move. In an unfrozen block the weights move, the statistics stay those of the pretraining.

    Pickles hold the trained blocks and the head. The frozen rest is loaded again by its name when
    it is needed, and must be what it was.

    ``unfreeze="auto"`` compares 0, 1, 2, 4, ... blocks, up to two thirds of the network's
    operations, by `score` in three folds of the training images, weighted as they are; class
    weights count as well, so that ``class_weight="balanced"`` compares by balanced accuracy.
    Successive halving trains all for a third of `max_epochs`, and the best third of them three
    times as long: its resource is epochs, as how deep to train depends on the number of images.
    The shallowest depth within one standard error of the best is taken, and trained on all images.
    Frozen blocks run once for each image and all of the search, in a temporary folder if there is
    no `memory`. `callbacks` are for the training that follows it. Without two images of every
    class there is nothing to compare: 0 is taken, with a warning.

    References
    ----------
    Kumar, Raghunathan, Jones, Ma and Liang, "Fine-tuning can distort pretrained features and
    underperform out-of-distribution" (2022), for the two phases. Lee, Chen, Tajwar, Kumar, Yao,
    Liang and Finn, "Surgical fine-tuning improves adaptation to distribution shifts" (2023), for
    lists of blocks. Nakandala and Kumar, "Nautilus: an optimized system for deep transfer learning
    over evolving training datasets" (2022), for the plan.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import FineTunedClassifier
    >>> china, flower = load_sample_images().images                  # two arrays (427, 640, 3)
    >>> X = [china[:, :320], china[:, 320:], flower[:, :320], flower[:, 320:]]
    >>> y = ["china", "china", "flower", "flower"]
    >>> model = FineTunedClassifier(unfreeze=1, max_epochs=2, random_state=0).fit(X, y)
    >>> model.predict([flower, china]).tolist()
    ['flower', 'china']
    >>> model.unfrozen_block_names_, model.n_trainable_parameters_
    (['conv_head'], 414722)
    """

    classes_: np.ndarray

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
        max_epochs: int = 10,
        batch_size: int | str = 32,
        lr: float = 5e-4,
        head_lr: float | None = None,
        lr_decay: float = 0.85,
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
        self.runtime = runtime
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
            Strings, numbers, booleans or NumPy dates, of one type and none of them missing; or an
            indicator matrix of zeros and ones, not sparse, if an image may have several.
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
        y = self._check_given(y)
        classes = None if classes is None else np.unique(plain_labels(classes))
        if self.class_weight == "balanced":
            raise ValueError(
                "class_weight='balanced' is not known from a part of the images; pass "
                "sklearn.utils.class_weight.compute_class_weight's result as a dict."
            )
        if hasattr(self, "_trainer"):
            if classes is not None and not np.array_equal(classes, self.classes_):
                raise ValueError(
                    f"classes={classes.tolist()!r} are not those of the first call to partial_fit, "
                    f"{self.classes_.tolist()}."
                )
        elif classes is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        else:
            self.classes_ = classes
            is_multilabel = type_of_target(y) == "multilabel-indicator"
            self._kind = "label" if is_multilabel else "class"
        return self._fit(X, y, sample_weight, lambda y, _: self._encode(y, True), in_parts=True)

    @takes_dask(lambda self: self._no_rows()[:, 0] if self._is_binary else self._no_rows())
    def decision_function(self, X: Any) -> np.ndarray:
        """Return what the network says before it is turned into probabilities.

        Parameters
        ----------
        X : sequence of images, or dask collection of them

        Returns
        -------
        ndarray of shape (n,) or (n, n_classes), float32
            Logits, the mean over the views; of two classes, by how much the second leads.
        """
        outputs = self._outputs(X).mean(1)
        return outputs[:, 1] - outputs[:, 0] if self._is_binary else outputs

    @takes_dask(lambda self: self._no_rows())
    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict the probability of every class.

        Parameters
        ----------
        X : sequence of images, or dask collection of them

        Returns
        -------
        ndarray of shape (n, n_classes), float32
            Columns as in `classes_`; rows sum to 1, but for several labels an image.
        """
        outputs = torch.from_numpy(self._outputs(X))  # (n, predict_views, n_classes)
        is_multilabel = self._kind == "label"
        probabilities = outputs.sigmoid() if is_multilabel else outputs.softmax(2)
        return probabilities.mean(1).numpy()

    @takes_dask(lambda self: self._labels(self._no_rows()))
    def predict(self, X: Any) -> np.ndarray:
        """Predict the class of images.

        Parameters
        ----------
        X : sequence of images, or dask collection of them

        Returns
        -------
        ndarray of shape (n,) or (n, n_labels)
            Labels as in `y`.
        """
        return self._labels(self.predict_proba(X))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy on images; of several labels an image, how often all are right.

        Parameters
        ----------
        X : sequence of images
        y : array-like of shape (n,) or (n, n_labels)
            Labels as in `fit`.
        sample_weight : array-like of shape (n,), default=None

        Returns
        -------
        float
        """
        return super().score(X, plain_labels(y), sample_weight)

    def _check_given(self, y: Any) -> Any:
        return plain_labels(super()._check_given(y))

    def _labels(self, probabilities: np.ndarray) -> np.ndarray:
        if self._kind == "label":
            return (probabilities > 0.5).astype(int)
        return self.classes_[probabilities.argmax(1)]

    def _no_rows(self) -> np.ndarray:
        return np.empty((0, len(self.classes_)), np.float32)

    @property
    def _is_binary(self) -> bool:
        return self._kind == "class" and len(self.classes_) == 2

    def _encode(self, y: Any, goes_on: bool) -> np.ndarray:
        """Turn labels into class numbers (n,), or zeros and ones (n, n_labels)."""
        y = check_y(y, multi_output=True, estimator=self)
        y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y
        if type_of_target(y) == "continuous-multioutput":
            raise ValueError(
                f"Unknown label type: y has {y.shape[1]} columns of fractions. Soft labels are not "
                "taken: pass the most probable one, y.argmax(1), or every image once for each of "
                "its labels, with the shares as sample_weight."
            )
        check_classification_targets(y)
        is_multilabel = type_of_target(y) == "multilabel-indicator"
        if y.ndim == 2 and not is_multilabel:
            raise ValueError(
                f"y has {y.shape[1]} columns that are not zeros and ones. Several labels an "
                "image come as an indicator matrix: see sklearn's MultiLabelBinarizer."
            )
        kind = "label" if is_multilabel else "class"
        if not goes_on:
            self._kind = kind
            self.classes_ = np.arange(y.shape[1]) if is_multilabel else np.unique(y)
        elif kind != self._kind or (is_multilabel and y.shape[1] != len(self.classes_)):
            known = "an indicator matrix of" if self._kind == "label" else "one label an image, of"
            raise ValueError(
                f"y has shape {y.shape}, but the estimator goes on with {known} "
                f"{len(self.classes_)} classes."
            )
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
        if weights is None:
            return compute_sample_weight(self.class_weight, y)
        counted = np.flatnonzero(weights)
        weights = weights.copy()
        weights[counted] *= compute_sample_weight(self.class_weight, np.asarray(y)[counted])
        return weights

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
