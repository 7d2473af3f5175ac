"""A pretrained network as it is: it says which of its own classes an image shows."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.metrics import accuracy_score
from sklearn.utils import Tags

from sktransfer._engine.embedding import Rows
from sktransfer._estimators.base import ImageEstimator, _fit_context, atomic, takes_dask
from sktransfer._estimators.labels import plain_labels
from sktransfer._estimators.pretrained import embedding_of
from sktransfer.io import ImageSequence
from sktransfer.models import get_model

__all__ = ["PretrainedClassifier"]


class PretrainedClassifier(ImageEstimator):
    """Classify images by a pretrained network as it is, into the classes it was trained on.

    Nothing is learnt: all methods work without `fit`.

    Parameters
    ----------
    backbone : str, torch.nn.Module or Backbone, default="efficientnet_lite0"
        A name of :func:`sktransfer.list_models`, such as `"resnet50"` or `"vgg16"`; or a network.
        Its output must be a row of logits an image, one for each of at least two classes.
    weights : str, path or None, default="default"
        `"default"` for the best published weights, another published name, a path to a state
        dict, or None for random ones.
    image_shape : tuple of (height, width) or (height, width, channels), default=None
        Shape of an image if `X` has flat rows; None if `X` holds images.
    image_size : int or tuple of (height, width), default=None
        Size in pixels at which images enter the network; None for the size of its weights.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep the logits of every image on disk. The entries are those of
        ``PretrainedFeatureExtractor(layer="output")``.
    device : str or torch.device, default="auto"
        `"auto"` takes a CUDA device if there is one, else the CPU.
    precision : {"float32", "bfloat16", "float16", "int8"}, default="float32"
        What the network computes in; see :class:`PretrainedFeatureExtractor`. Logits are float32
        in any case, and in `"int8"` the head computes in float32, too.
    runtime : {"auto", "torch", "openvino"}, default="auto"
        What computes; see :class:`PretrainedFeatureExtractor`.
    batch_size : int or "auto", default="auto"
        Images in flight at once and, on a GPU, in one batch.
    n_jobs : int or None, default=None
        Threads that read and decode images and, with OpenVINO, run the network. None or -1: one a
        core and two spare ones, or what joblib leaves to a worker process.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Names of the network's classes, in the order of its outputs; there without `fit`. Weights
        that come without names (a file that is no published checkpoint, a module, random ones)
        have numbers, 0 to n_classes - 1: pass a :class:`sktransfer.models.Backbone` with
        `categories` to name them.
    n_features_in_ : int
        Number of columns of `X`, if it has any and `fit` saw it.
    feature_names_in_ : ndarray of str
        Name of the column, if `fit` saw a data frame.

    Raises
    ------
    ValueError, TypeError
        For an image that can't be read: the message names row, file and reason. For a network
        whose output is no row of logits.

    See Also
    --------
    FineTunedClassifier : Learns classes of yours.
    PretrainedFeatureExtractor : With ``layer="output"``, the same logits as a transformer.

    Notes
    -----
    What scikit-learn calls a classifier predicts the labels with which it was fitted. This one
    does not, so :func:`sklearn.base.is_classifier` returns False, and meta-estimators that ask for
    a classifier (such as `VotingClassifier`) refuse it. `score` compares it with labels of yours,
    if they are its `classes_`.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import PretrainedClassifier
    >>> images = load_sample_images().images                     # two arrays (427, 640, 3)
    >>> model = PretrainedClassifier()
    >>> model.predict(images).tolist()
    ['palace', 'daisy']
    >>> model.top_k(images, k=2)[["row", "rank", "label"]]
       row  rank      label
    0    0     1     palace
    1    0     2  bell cote
    2    1     1      daisy
    3    1     2        bee
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        name: constraint
        for name, constraint in ImageEstimator._parameter_constraints.items()
        if name != "pooling"
    }

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: Any = "default",
        image_shape: Any = None,
        image_size: Any = None,
        memory: Any = None,
        device: Any = "auto",
        precision: str = "float32",
        runtime: str = "auto",
        batch_size: int | str = "auto",
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.image_shape = image_shape
        self.image_size = image_size
        self.memory = memory
        self.device = device
        self.precision = precision
        self.runtime = runtime
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    @atomic
    def fit(self, X: Any, y: Any = None) -> Self:
        """Check the parameters, the network and the form of `X`; nothing is learnt.

        Parameters
        ----------
        X : sequence of images
            See :class:`sktransfer.PretrainedFeatureExtractor`.
        y : ignored

        Returns
        -------
        self
        """
        self._check_images(X, reset=True)
        logits_of(self)
        return self

    @property
    def classes_(self) -> np.ndarray:
        """Names of the network's classes, or their numbers."""
        categories = self._backbone().categories
        if categories is None:
            return np.arange(logits_of(self).columns[-1].stop)
        return np.array(categories)

    @takes_dask(lambda self: self.classes_[:0])
    def predict(self, X: Any) -> np.ndarray:
        """Name the most probable class of images.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n,)
            Entries of `classes_`.
        """
        return self.classes_[self._logits(self._images(X)).argmax(1)]

    @takes_dask(lambda self: np.empty((0, len(self.classes_)), np.float32))
    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of every class: the softmax of the network's output.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n, n_classes), float32
            Columns as in `classes_`; rows sum to 1.
        """
        return _softmax(self._logits(self._images(X)))

    @takes_dask(lambda self: decision_of(np.empty((0, len(self.classes_)), np.float32)))
    def decision_function(self, X: Any) -> np.ndarray:
        """Return the logits: what the network says before the softmax.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n, n_classes) or (n,), float32
            Of two classes, by how much the second leads.
        """
        return decision_of(self._logits(self._images(X)))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy on images that are labelled with the network's own classes.

        Parameters
        ----------
        X : sequence of images
        y : array-like of shape (n,)
            Entries of `classes_`.
        sample_weight : array-like of shape (n,), default=None

        Returns
        -------
        float
        """
        y = plain_labels(y)  # an error that names its rows comes before the images run
        return float(accuracy_score(y, self.predict(X), sample_weight=sample_weight))

    def top_k(self, X: Any, k: int = 5) -> Any:
        """Return the most probable classes of images as a table.

        Parameters
        ----------
        X : sequence of images
        k : int, default=5
            Classes an image, 1 to n_classes.

        Returns
        -------
        pandas.DataFrame of n * k rows
            Columns `row` (of `X`, from 0), `file` (if `X` holds paths), `rank` (1 to k), `label`
            and `probability`; sorted by row and rank.

        Raises
        ------
        ValueError
            If the network has fewer classes than `k`.
        """
        import pandas

        images = self._images(X)
        classes = self.classes_
        if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= len(classes):
            raise ValueError(f"k must be an int from 1 to {len(classes)} classes, got {k!r}.")
        probabilities = _softmax(self._logits(images))  # (n, n_classes)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]  # (n, k)
        columns = {
            "row": np.repeat(np.arange(len(images)), k),
            "rank": np.tile(np.arange(1, k + 1), len(images)),
            "label": classes[best].ravel(),
            "probability": np.take_along_axis(probabilities, best, axis=1).ravel(),
        }
        if any(files := [images.file(i) for i in range(len(images))]):
            # Of objects, as pandas' own strings hold no names that are not UTF-8.
            columns["file"] = pandas.Series(np.repeat(np.array(files, object), k), dtype=object)
        order = ["row", "file", "rank", "label", "probability"]
        return pandas.DataFrame({name: columns[name] for name in order if name in columns})

    def _images(self, X: Any) -> ImageSequence:
        self._validate_params()
        return self._check_images(X, reset=False)

    def _logits(self, images: ImageSequence) -> np.ndarray:
        return logits_of(self)(images)  # (n, n_classes) float32

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        return tags


def logits_of(classifier: PretrainedClassifier) -> Rows:
    """Return a pass over images to their logits; an error if the network has none."""
    embedding = embedding_of(classifier)
    runner = embedding.runner
    categories = get_model(classifier.backbone, classifier.weights).categories
    shape = runner.shape(None, embedding.preprocessing.size)
    is_headless = getattr(runner.network, "num_classes", None) == 0  # so timm's say it
    if len(shape) != 1 or shape[0] < 2 or is_headless:
        what = "an embedding, as it has no head" if is_headless else f"shape {shape} an image"
        raise ValueError(
            f"Backbone {runner.name!r} returns {what}: no logits of classes. "
            "PretrainedFeatureExtractor embeds images with it; FineTunedClassifier gives it a "
            "head."
        )
    if categories is not None and len(categories) != shape[0]:
        raise ValueError(
            f"Backbone {runner.name!r} names {len(categories)} categories, but its output has "
            f"{shape[0]} columns."
        )
    return embedding


def decision_of(logits: np.ndarray) -> np.ndarray:
    """Return logits or, of two classes, by how much the second leads."""
    return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(1).numpy()
