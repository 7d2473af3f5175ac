"""Images told apart by words: networks that were trained on images and their captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from sklearn.base import ClassifierMixin
from sklearn.utils import Tags

from sktransfer._estimators.base import (
    ImageEstimator,
    _fit_context,
    atomic,
    check_y,
    takes_dask,
    twin_of,
)
from sktransfer._estimators.labels import is_indicator, plain_labels
from sktransfer._estimators.pretrained import embedding_of
from sktransfer._estimators.pretrained_classifier import decision_of
from sktransfer._estimators.prompts import check_known, prompts_of, sentences_of, texts_of
from sktransfer._neighbors import nearest
from sktransfer._optional import load_optional
from sktransfer.io import ImageSequence
from sktransfer.models._origins import portable_name
from sktransfer.models._text_towers import TextTower, load_text_tower

__all__ = ["ZeroShotClassifier"]

# What `fit` tries, by the images that it gets: how much their likeness counts beside the words (of
# which 0 is the words alone), and how fast it fades, in units of the median distance.
_WEIGHTS = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_SHARPNESS = (1.0, 3.0, 10.0, 30.0)
_CHUNK = 2**24  # likenesses at once
_MOST_PAIRED = 1000  # images of which all pairs give the median
_TINY = 1e-6  # the least of it


class _Words(NamedTuple):
    """What the prompts say: a row for each class, and how cosines become logits."""

    classes: np.ndarray
    rows: np.ndarray  # (n_classes, width) float32, of length 1
    scale: float
    bias: float

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Return the logits of images by their rows, of length 1."""
        return self.scale * rows @ self.rows.T + self.bias


class ZeroShotClassifier(ClassifierMixin, ImageEstimator):
    """Classify images by words, with a network that was trained on images and their captions.

    Each class is described by prompts; an image gets the class whose prompts its embedding is
    nearest to. Nothing has to be learnt, so all methods work without `fit` if `prompts` are given.
    `fit` on a few labelled images lets likeness to these count as well, as much as it helps.

    Parameters
    ----------
    backbone : str, default="hf:google/siglip2-base-patch16-224"
        CLIP or SigLIP (also SigLIP 2 of a fixed resolution) of transformers: a folder, or a name of
        the hub, see :func:`sktransfer.get_model`. Extra `hub`.
    prompts : dict of label to str or list of str, list of str, or None, default=None
        What each class looks like, in the words of a caption: ``{"defective": ["a broken solar
        cell", "a cell with a dark crack"], "sound": "a solar cell"}``. Of a list, each entry is
        label and prompt. None: the labels that `fit` gets are the prompts.
    templates : str, list of str or None, default="This is a photo of {}."
        Sentences with ``{}`` where a prompt goes. The embeddings of all prompts of a class, in all
        templates, are averaged. None: the prompts are whole sentences.
    weights : str, path or None, default="default"
        See :func:`sktransfer.get_model`; of both halves of the network.
    image_shape : tuple of (height, width) or (height, width, channels), default=None
        Shape of an image if `X` has flat rows; None if `X` holds images.
    image_size : int or tuple of (height, width), default=None
        Size in pixels at which images enter the network; None for the size of its weights.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep the embedding of every image on disk. The entries are those of
        ``PretrainedFeatureExtractor(layer="output")``.
    device : str or torch.device, default="auto"
        `"auto"` takes a CUDA device if there is one, else the CPU. Texts are read on the CPU.
    precision : {"float32", "bfloat16", "float16", "int8"}, default="float32"
        Of the images; see :class:`PretrainedFeatureExtractor`.
    runtime : {"auto", "torch", "openvino"}, default="auto"
        What computes; see :class:`PretrainedFeatureExtractor`.
    batch_size : int or "auto", default="auto"
        Images in flight at once and, on a GPU, in one batch.
    n_jobs : int or None, default=None
        Threads that read and decode images and, with OpenVINO, run the network.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted; there without `fit` if `prompts` are given.
    blend_ : dict
        After `fit`: the `weight` of likeness to labelled images, 0 if there are none or if it does
        not help, and its `sharpness`.
    n_features_in_ : int
        Number of columns of `X`, if it has any and `fit` saw it.
    feature_names_in_ : ndarray of str
        Name of the column, if `fit` saw a data frame.

    Raises
    ------
    ValueError
        For prompts that are empty or the same for two classes, a single class, a prompt that is too
        long, a network that reads no words, labels without a prompt.
    OSError
        For a place that lacks files, or can't be reached.

    See Also
    --------
    PretrainedClassifier : The classes that a network was trained on.
    FineTunedClassifier : Learns from hundreds of labelled images.

    Notes
    -----
    The logit of a class is ``scale * cosine + bias``, with the network's own numbers; probabilities
    are their softmax. SigLIP was trained to say of each text by itself whether it fits:
    ``scipy.special.expit`` of the logits is the probability of that, and with more than two
    classes `decision_function` returns them, as long as `fit` has seen no labels.

    With labels, the logits of image x get ``weight * mean(exp(sharpness * (cosine(x, z) - 1)))``
    added, over the images z of a class: the cache model of Tip-Adapter, with means so that
    large classes do not lead. Both numbers are those with the least log-loss when each labelled
    image is judged by the others. A fitted estimator needs only the half that sees images.

    How accurate this is depends on the network; it was not measured here.

    References
    ----------
    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
    Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023). Zhang et al., "Tip-Adapter:
    Training-free Adaption of CLIP for Few-shot Classification" (2022).

    Examples
    --------
    >>> from sktransfer import ZeroShotClassifier
    >>> model = ZeroShotClassifier(prompts={"cat": "a cat", "dog": ["a dog", "a puppy"]})
    >>> model.classes_.tolist()
    ['cat', 'dog']
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        name: constraint
        for name, constraint in ImageEstimator._parameter_constraints.items()
        if name != "pooling"
    } | {"prompts": [Mapping, "array-like", None], "templates": [str, "array-like", None]}

    def __init__(
        self,
        backbone: Any = "hf:google/siglip2-base-patch16-224",
        prompts: Any = None,
        *,
        templates: Any = "This is a photo of {}.",
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
        self.prompts = prompts
        self.templates = templates
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
        """Read the prompts; with labels, find how much likeness to these images is to count.

        Parameters
        ----------
        X : sequence of images
            See :class:`sktransfer.PretrainedFeatureExtractor`.
        y : array-like of shape (n,), default=None
            Labels, each of which has a prompt. A class may lack images.

        Returns
        -------
        self
        """
        images = self._check_images(X, reset=True)
        labels = None if y is None else self._check_labels(y, len(images))
        words = self._read(labels)
        check_known(labels, words.classes)
        self._words, self._fitted, self._examples = words._asdict(), self._settings(), None
        self.blend_ = {"weight": 0.0, "sharpness": 1.0}
        if labels is not None:
            rows, numbers = self._embed(images, words), np.searchsorted(words.classes, labels)
            self.blend_ = _choose(rows, numbers, words)
            self._examples = [rows, numbers] if self.blend_["weight"] else None
        return self

    @property
    def classes_(self) -> np.ndarray:
        """The labels."""
        words = getattr(self, "_words", None)
        return np.array(sorted(prompts_of(self.prompts))) if words is None else words["classes"]

    @takes_dask(lambda self: self.classes_[:0])
    def predict(self, X: Any) -> np.ndarray:
        """Name the class whose prompts fit best.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n,)
            Entries of `classes_`.
        """
        logits, classes = self._logits(X)
        return classes[logits.argmax(1)]

    @takes_dask(lambda self: np.empty((0, len(self.classes_)), np.float32))
    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of every class: the softmax of the logits.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n, n_classes), float32
            Columns as in `classes_`; rows sum to 1.
        """
        return softmax(self._logits(X)[0], axis=1)

    @takes_dask(lambda self: decision_of(np.empty((0, len(self.classes_)), np.float32)))
    def decision_function(self, X: Any) -> np.ndarray:
        """Return the logits.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n, n_classes) or (n,), float32
            Of two classes, by how much the second leads.
        """
        return decision_of(self._logits(X)[0])

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy.

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
        return super().score(X, plain_labels(y), sample_weight)

    def search(self, texts: Any, X: Any, k: int = 10) -> Any:
        """Find the images that fit texts best.

        Parameters
        ----------
        texts : str or list of str
            Whole captions; `templates` and `prompts` play no part.
        X : sequence of images
            With a `memory`, those that were embedded before are not run again.
        k : int, default=10
            Images for each text, 1 to the number of images.

        Returns
        -------
        pandas.DataFrame of len(texts) * k rows
            Columns `text`, `rank` (from 1), `row` (of `X`), `path` (None of images that are no
            files) and `similarity`, the cosine.

        Raises
        ------
        ImportError
            Without pandas.
        """
        pandas = load_optional("pandas", "ZeroShotClassifier.search", "pandas")
        self._validate_params()
        asked = texts_of(texts, "texts")
        images = self._check_images(X, reset=False)
        if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= len(images):
            raise ValueError(f"k must be an int from 1 to {len(images)} images, got {k!r}.")
        queries = self._tower()(asked)
        distances, rows = nearest(embedding_of(self)(images), queries, int(k))
        paths = [images.file(i) for i in rows.ravel().tolist()]
        return pandas.DataFrame(
            {
                "text": np.repeat(np.array(asked, object), k),
                "rank": np.tile(np.arange(1, k + 1), len(asked)),
                "row": rows.ravel(),
                "path": pandas.Series(paths, dtype=object),
                "similarity": 1 - distances.ravel(),
            }
        )

    # ------------------------------------------------------------------------ inside

    def _tower(self) -> TextTower:
        return load_text_tower(self.backbone, self.weights)

    def _check_labels(self, y: Any, n: int) -> np.ndarray:
        y = check_y(plain_labels(y), multi_output=False, y_numeric=False, estimator=self)
        if is_indicator(y) or len(y) != n:
            raise ValueError(
                f"y has shape {y.shape}; there are {n} images: pass one label for each."
            )
        return y

    def _read(self, labels: np.ndarray | None) -> _Words:
        """Return what the prompts say; labels of `fit` are prompts if none are given."""
        if self.prompts is None and labels is not None:
            prompts = {label: [str(label)] for label in np.unique(labels).tolist()}
        else:
            prompts = prompts_of(self.prompts)
        sentences = sentences_of(prompts, self.templates)
        classes = np.array(sorted(prompts))
        if len(classes) < 2:
            raise ValueError(
                f"There is a single class, {classes.tolist()[0]!r}, from which none can be told "
                "apart: pass prompts for two or more."
            )
        tower = self._tower()
        rows = [tower(sentences[label]).mean(0) for label in sorted(prompts)]
        unit = torch.nn.functional.normalize(torch.from_numpy(np.stack(rows)), dim=1).numpy()
        return _Words(classes, unit, tower.scale, tower.bias)

    def _embed(self, images: ImageSequence, words: _Words) -> np.ndarray:
        """Return rows of images, of length 1."""
        embedding = embedding_of(self)
        width = embedding.columns[-1].stop
        if width != words.rows.shape[1]:
            raise ValueError(
                f"Backbone {self.backbone!r} embeds images in {width} numbers and texts in "
                f"{words.rows.shape[1]}: its halves do not belong together."
            )
        return torch.nn.functional.normalize(torch.from_numpy(embedding(images)), dim=1).numpy()

    def _logits(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return logits float32 (n, n_classes), and the classes."""
        self._validate_params()
        fitted = twin_of(self)  # another thread may fit this one meanwhile
        images = fitted._check_images(X, reset=False)
        if not hasattr(fitted, "_words"):
            words = fitted._read(None)
            return words.logits(fitted._embed(images, words)), words.classes
        fitted._check_unchanged()
        words = _Words(**fitted._words)
        rows = fitted._embed(images, words)
        logits = words.logits(rows)
        if fitted._examples is not None:
            seen, numbers = fitted._examples
            logits += _likeness(rows, seen, numbers, len(words.classes), **fitted.blend_)
        return logits, words.classes

    def _settings(self) -> dict[str, Any]:
        """Return the parameters to which the words belong."""
        prompts = None if self.prompts is None else prompts_of(self.prompts)
        templates = None if self.templates is None else texts_of(self.templates, "templates")
        named = {"backbone": portable_name(self.backbone), "weights": str(self.weights)}
        return {**named, "prompts": prompts, "templates": templates}

    def _check_unchanged(self) -> None:
        now = self._settings()
        for name, value in self._fitted.items():
            if now[name] != value:
                raise ValueError(
                    f"{name} was {value!r} when this estimator was fitted, and is {now[name]!r}: "
                    "set it back, or call fit."
                )

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        return tags


# ------------------------------------------------------------------------------ labelled images


def _likeness(
    rows: np.ndarray,
    seen: np.ndarray,
    numbers: np.ndarray,
    n_classes: int,
    *,
    weight: float,
    sharpness: float,
    are_seen: bool = False,
) -> np.ndarray:
    """Return how like the labelled images of each class images are, (n, n_classes).

    With `are_seen`, the images are the labelled ones, of which none is compared with itself.
    """
    is_class = np.eye(n_classes, dtype=np.float32)[numbers]  # (n_seen, n_classes)
    counts = is_class.sum(0) - is_class if are_seen else is_class.sum(0)
    sums = np.empty((len(rows), n_classes), np.float32)
    step = max(1, _CHUNK // len(seen))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        affinity = np.exp(sharpness * (rows[part] @ seen.T - 1))
        sums[part] = affinity @ is_class
    if are_seen:
        sums -= is_class * np.exp(sharpness * (np.square(rows).sum(1, keepdims=True) - 1))
    return weight * sums / np.maximum(counts, 1)


def _choose(rows: np.ndarray, numbers: np.ndarray, words: _Words) -> dict[str, float]:
    """Choose how likeness counts: by what each image is taken for, from words and the others."""
    logits, n_classes = words.logits(rows), len(words.classes)
    some = rows[:: -(-len(rows) // _MOST_PAIRED)]
    distances = 1 - (some @ some.T)[np.triu_indices(len(some), 1)]
    unit = float(np.median(distances)) if len(distances) else 0.0
    losses = {}
    for sharpness in (times / max(unit, _TINY) for times in _SHARPNESS):
        likeness = _likeness(
            rows, rows, numbers, n_classes, weight=1.0, sharpness=sharpness, are_seen=True
        )
        for weight in _WEIGHTS:
            right = log_softmax(logits + weight * likeness, axis=1)[np.arange(len(rows)), numbers]
            losses[weight, sharpness] = -float(right.mean())
    weight, sharpness = min(losses, key=losses.__getitem__)
    return {"weight": weight, "sharpness": sharpness}
