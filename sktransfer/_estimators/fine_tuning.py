"""Classes of one's own, learnt by a pretrained network from a depth on that is a parameter."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils import Tags, column_or_1d
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import type_of_target
from torch import nn

from sktransfer._estimators.base import StrOptions, _fit_context, atomic, check_y, takes_dask
from sktransfer._estimators.labels import (
    check_known,
    is_indicator,
    labels_of,
    plain_labels,
)
from sktransfer._estimators.supervised import FineTuned
from sktransfer._splits import name_rare_classes
from sktransfer.io import ImageSequence

__all__ = ["FineTunedClassifier"]


class FineTunedClassifier(ClassifierMixin, FineTuned):
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
        batch-norms move, and is the first phase left out. A network or an estimator as `backbone`
        has weights of its own, which `"default"` and None leave as they are.
    unfreeze : int, str or list of str, default=1
        What is trained besides the head. A number of blocks from the end, 0 for the head alone;
        the name of a block in `block_names_`, or a prefix of several (`"layer4"`): from there to
        the end; `"all"`; or a list of names or prefixes: these blocks and no others. `"auto"`: a
        number found by a search inside the training images, see Notes.
    head : "linear", tuple of int, or torch.nn.Module, default="linear"
        What turns an embedding into logits: a linear layer; hidden layers of these sizes with
        ReLU, and a linear layer; or a module, which is copied.
    layer : int, str or list of these, default="auto"
        What the head sees. `"auto"`: what the network's own head sees. Else all that
        :class:`PretrainedFeatureExtractor` takes, such as `"all"`, every block: the rows of these
        layers side by side. Rows of frozen layers are entries of the memory that both share, and
        run once; the trained blocks learn through rows of their own as well. The last of the
        layers must not lie in front of a block that is trained.
    pooling : {"avg", "max", "token", "flatten"} or tuple of these, default="avg"
        How the activations of a layer become a row, where the network has not pooled them; of a
        tuple, each layer has a row for each pooling.
    dropout : float in [0, 1), default=0.0
        Share of an embedding's features, and of the hidden layers', that training leaves out.
    head_epochs : int or "auto", default="auto"
        Epochs of the first phase. `"auto"` sets a linear head to the optimum of a regularised
        logistic regression on the embeddings. With ``unfreeze=0``, that is all there is to do: how
        much it is regularised is chosen by cross-validation, and fixed where a class has a single
        image. Else it is a start: the same one on several layers, whose scales stay as they are
        from then on, and one that is regularised more on the last layer alone. Another head gets
        `max_epochs` of them, unless it is all that is trained.
    max_epochs : int, default=10
        Epochs of the second phase.
    batch_size : int or "auto", default=32
        Images of a training step, and those that frozen blocks take at once. `"auto"`: 32 of a
        step, and as many as suit the device. Where a step does not fit into the memory, it is
        taken in parts, with a warning.
    lr : float, default=5e-4
        Learning rate of the pretrained layers, for AdamW: that of the last unfrozen block.
    head_lr : float, default=None
        Learning rate of the new layers, which are the head; None for `lr`.
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
        Whether to hold out a part of the images, stop when the loss on it no longer falls, and take
        the weights of the best epoch.
    validation_fraction : float in (0, 1), default=0.1
        The share of the images that is held out, stratified by class.
    n_iter_no_change : int, default=5
        Epochs without a lower loss after which training stops.
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
        Where to keep the results of frozen blocks on disk: the embedding and, where blocks are
        trained, what comes out of the last frozen one; `plan_` says how much. A
        :class:`PretrainedFeatureExtractor` of the same network shares them.
    device : str or torch.device, default="auto"
        `"auto"` takes a CUDA device if there is one, else the CPU.
    precision : {"auto", "float32", "bfloat16", "int8"}, default="float32"
        What the network computes in. Trained weights are float32 in any case, and activations at
        the cut are kept in half precision. `"auto"` predicts as `"float32"` does and shares its
        entries of the memory, but trains unfrozen blocks in bfloat16 where a CPU has instructions
        for it (AVX-512 BF16 or AMX): up to twice as fast in `benchmarks/depthwise.py`.
        Elsewhere, and on a GPU, it is `"float32"`. `"int8"`, for ``unfreeze=0`` alone, is that of
        :class:`PretrainedFeatureExtractor`; the head computes in float32, and so does the network
        that is exported or explained.
    runtime : {"auto", "torch", "openvino"}, default="auto"
        What the frozen blocks run on; see :class:`PretrainedFeatureExtractor`. Training is
        torch's.
    n_jobs : int, default=None
        Threads that read and decode images. None or -1: one a core.
    random_state : int, RandomState instance or None, default=None
        Seed of all that is random, the weights of `weights=None` included. The order of the rows,
        `n_jobs` and `memory` change nothing.
    verbose : int, default=0
        1 shows one progress bar, 2 the plan and skorch's table of epochs as well.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels.
    multilabel_ : bool
        Whether an image may have several labels.
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
        In `fit`, on Ctrl-C. A first fit, `partial_fit`, and one with ``warm_start=True`` keep what
        they learnt until then, and go on with ``warm_start=True``; the message says how far they
        came. Another fit leaves the estimator as it was, as an error does.

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

    Three things inside `fit` take a part of the images to score on: the search of
    ``unfreeze="auto"``, the cross-validation that chooses how much a solved head is regularised,
    and early stopping. Where images of one group are alike, a part by chance makes all three too
    sure of themselves. With `groups`, each part is one of whole groups, stratified by class as far
    as the groups allow. There are fewer folds where a class lies in fewer groups. Where it lies in
    one group only, the first two are left out, with a warning, and early stopping is an error.
    Equal images with equal labels count as one, which is in the first of their groups.

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
    >>> model = FineTunedClassifier(unfreeze=0, layer="all", pooling=("avg", "max")).fit(X, y)
    >>> model.n_trainable_parameters_                   # two classes, 6240 features of 18 blocks
    12482
    """

    classes_: np.ndarray
    multilabel_: bool

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **FineTuned._parameter_constraints,
        "class_weight": [StrOptions({"balanced"}), dict, None],
    }

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
    @atomic
    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> Self:
        """Train the head, then the unfrozen blocks with it.

        Parameters
        ----------
        X : sequence of images
            See :class:`sktransfer.PretrainedFeatureExtractor`.
        y : array-like of shape (n,) or (n, n_labels)
            Strings, numbers, booleans or NumPy dates, of one type and none of them missing; or an
            indicator matrix of zeros and ones, not sparse, if an image may have several.
        sample_weight : array-like of shape (n,), default=None
            Weights of the images. One of weight 2 counts as two of them; two that are equal, with
            equal labels, count as one of weight 2. An epoch shows each image once, whatever its
            weight.
        groups : array-like of shape (n,), default=None
            The group of each image: numbers or strings that say which images belong together, as
            those of one patient, one part, one place or one clip. No split inside `fit` tears a
            group apart; see Notes. Metadata routing requests them by default.

        Returns
        -------
        self
        """
        return self._fit(X, y, sample_weight, groups)

    @_fit_context(prefer_skip_nested_validation=True)
    @atomic
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
            self.multilabel_ = type_of_target(y) == "multilabel-indicator"
        return self._fit(X, y, sample_weight, in_parts=True)

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
        probabilities = outputs.sigmoid() if self.multilabel_ else outputs.softmax(2)
        return probabilities.mean(1).numpy()

    @takes_dask(lambda self: labels_of(self._no_rows(), self.classes_, self.multilabel_))
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
        return labels_of(self.predict_proba(X), self.classes_, self.multilabel_)

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

    @property
    def _kind(self) -> str:  # type: ignore[override]
        return "label" if self.multilabel_ else "class"

    def last_layer(self) -> nn.Module:
        return nn.Sigmoid() if self.multilabel_ else nn.Softmax(1)

    def _no_rows(self) -> np.ndarray:
        return np.empty((0, len(self.classes_)), np.float32)

    @property
    def _is_binary(self) -> bool:
        return not self.multilabel_ and len(self.classes_) == 2

    def _encode(self, y: Any, is_known: bool) -> np.ndarray:
        """Turn labels into class numbers (n,), or zeros and ones (n, n_labels)."""
        y = check_y(y, multi_output=True, estimator=self)
        y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y
        is_multilabel = is_indicator(y)
        if not is_known:
            self.multilabel_ = is_multilabel
            self.classes_ = np.arange(y.shape[1]) if is_multilabel else np.unique(y)
        check_known(y, is_multilabel, self.classes_, self.multilabel_)
        return y.astype(np.float32) if is_multilabel else np.searchsorted(self.classes_, y)

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

    def _check_targets(
        self, targets: np.ndarray, groups: np.ndarray | None, in_parts: bool
    ) -> None:
        if not self.multilabel_ and not in_parts and len(np.unique(targets)) < 2:
            raise ValueError(
                f"{type(self).__name__} needs images of at least 2 classes and got 1 class: all "
                f"{len(targets)} images are {self.classes_[targets].tolist()[0]!r}."
            )
        if self.early_stopping and not self.multilabel_ and not in_parts:
            self._check_is_divisible(targets, groups)

    def _check_is_divisible(self, targets: np.ndarray, groups: np.ndarray | None) -> None:
        """Raise an error that names the classes of too few images to hold out some of them."""
        needed = 3 if self.unfreeze == "auto" else 2  # the search fits on two thirds
        if rare := name_rare_classes(self.classes_[targets], needed, groups):
            what, fewer = ("of them", "") if groups is None else ("groups", "smaller groups, ")
            raise ValueError(
                f"early_stopping=True holds out validation_fraction={self.validation_fraction:g} "
                f"of the images, for which each class needs {needed} {what}: {rare}. Add images, "
                f"drop the class, or pass {fewer}early_stopping=False."
            )

    def _begin(self, targets: np.ndarray, weights: np.ndarray | None) -> int:
        return len(self.classes_)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags
