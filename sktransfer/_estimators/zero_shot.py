"""Images told apart by words: networks that were trained on images and their captions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import ClassifierMixin
from sklearn.utils import Tags

from sktransfer._estimators.base import (
    ImageEstimator,
    _fit_context,
    atomic,
    check_fingerprint,
    check_y,
    takes_dask,
    twin_of,
)
from sktransfer._estimators.labels import is_indicator, plain_labels
from sktransfer._estimators.pretrained import embedding_of
from sktransfer._estimators.pretrained_classifier import decision_of
from sktransfer._estimators.prompts import check_known, prompts_of, sentences_of, texts_of
from sktransfer._estimators.word_probe import choose_probe
from sktransfer._neighbors import nearest
from sktransfer.io import ImageSequence
from sktransfer.models._text_towers import TextTower, load_text_tower

__all__ = ["ZeroShotClassifier"]

_SAME = 1 - 1e-6  # the cosine of equal rows, but for rounding


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
    `fit` on a few labelled images learns what to add to that, as much as it helps.

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
        After `fit`: `C`, the inverse strength of the penalty on what was learnt from labels; 0 if
        there are none, or if the words alone are better.
    n_features_in_ : int
        Number of columns of `X`, if it has any and `fit` saw it.
    feature_names_in_ : ndarray of str
        Name of the column, if `fit` saw a data frame.

    Raises
    ------
    ValueError
        For prompts that are empty or the same for two classes, one class alone, a prompt that is
        too long, a network that reads no words, labels without a prompt.
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

    With labels, ``rows @ weights`` is added to the logits, where `rows` are the embeddings scaled
    to length 1: a logistic regression that starts from the words, which is the model of LP++. Its
    penalty is the one with the least log-loss in folds of the labelled images, of about 500 of them
    at most; if no class has two images, ``C=1``. Classes without images are not learnt about: how
    they compare is left to the words, and labels of one class alone change nothing. A fitted
    estimator needs only the half of the network that sees images.

    Tip-Adapter, which adds likeness to the labelled images instead, was measured beside it, with
    embeddings of real images and made-up words, as no pretrained CLIP was at hand. The probe was
    more accurate in 21 of 32 comparisons (`benchmarks/words.py`, docs/results/features.md). With
    two images a class, both may be worse than good words alone.

    How accurate this is depends on the network; it was not measured here.

    References
    ----------
    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
    Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023). Huang et al., "LP++: A
    Surprisingly Strong Linear Probe for Few-Shot CLIP" (2024). Zhang et al., "Tip-Adapter:
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
        """Read the prompts; with labels, learn what to add to what they say.

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
        if y is None and self.prompts is None:
            raise ValueError(
                "ZeroShotClassifier requires y to be passed, but the target y is None: "
                "prompts=None takes the labels as prompts."
            )
        images = self._check_images(X, reset=True)
        labels = None if y is None else self._check_labels(y, len(images))
        words = self._read(labels)
        check_known(labels, words.classes)
        self._words, self._fitted, self._probe = words._asdict(), self._settings(), None
        self._fingerprint, self.blend_ = self._backbone().fingerprint, {"C": 0.0}
        if labels is not None:
            rows, numbers = self._embed(images, words), np.searchsorted(words.classes, labels)
            weights, self.blend_["C"] = choose_probe(rows, numbers, words.logits(rows))
            self._probe = weights if self.blend_["C"] else None
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
        """
        import pandas

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
                f"There is one class alone, {classes.tolist()[0]!r}: pass prompts, or labels, of "
                "two or more."
            )
        tower = self._tower()
        rows = [tower(sentences[label]).mean(0) for label in sorted(prompts)]
        unit = torch.nn.functional.normalize(torch.from_numpy(np.stack(rows)), dim=1).numpy()
        _warn_of_equal(unit, classes)
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
        named = {"backbone": fitted.backbone, "weights": fitted.weights}
        check_fingerprint(fitted._backbone().fingerprint, fitted._fingerprint, named)
        words = _Words(**fitted._words)
        rows = fitted._embed(images, words)
        logits = words.logits(rows)
        return logits if fitted._probe is None else logits + rows @ fitted._probe, words.classes

    def _settings(self) -> dict[str, Any]:
        """Return the parameters to which the words, and what was learnt, belong."""
        prompts = None if self.prompts is None else prompts_of(self.prompts)
        templates = None if self.templates is None else texts_of(self.templates, "templates")
        return {
            # No dict: see __getstate__.
            "prompts": None
            if prompts is None
            else [[label, prompts[label]] for label in sorted(prompts)],
            "templates": templates,
            "image_size": self.image_size,
        }

    def _check_unchanged(self) -> None:
        now = self._settings()
        for name, value in self._fitted.items():
            if now[name] != value:
                raise ValueError(
                    f"{name} was {value!r} when this estimator was fitted, and is {now[name]!r}: "
                    "set it back, or call fit."
                )

    def __getstate__(self) -> dict[str, Any]:
        # skops writes the keys of a dict as texts, and reads "False" as True.
        state = super().__getstate__()
        prompts = state["prompts"]
        if not isinstance(prompts, Mapping):
            return state
        return {**state, "prompts": None, "_labelled": [[*prompts], [*prompts.values()]]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if (labelled := state.pop("_labelled", None)) is not None:
            state["prompts"] = dict(zip(*labelled, strict=True))
        super().__setstate__(state)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit = tags.target_tags.required = self.prompts is None
        return tags


def _warn_of_equal(rows: np.ndarray, classes: np.ndarray) -> None:
    """Warn if the network makes the same of the prompts of two classes."""
    pairs = np.argwhere(np.triu(rows @ rows.T > _SAME, 1))
    if len(pairs):
        first, second = classes[pairs[0]].tolist()
        warnings.warn(
            f"The prompts of {first!r} and {second!r} are the same to the network, as it is if its "
            "tokenizer does not know their words: say in others in what the classes differ.",
            UserWarning,
            stacklevel=2,
        )
