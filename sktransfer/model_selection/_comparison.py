"""What comparisons share: embeddings with their cost, folds and fits, an SVM on pixels."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import xxhash
from sklearn.base import BaseEstimator
from sklearn.metrics import check_scoring
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import GridSearchCV, check_cv, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.metadata_routing import get_routing_for_object
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length

from sktransfer._estimators.base import check_y
from sktransfer._estimators.labels import plain_labels
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor, embedding_of
from sktransfer._splits import (
    Folds,
    Split,
    class_sizes,
    name_rare_classes,
    without_words_on_small_classes,
)
from sktransfer._threads import n_stream_threads, one_core_threads, renewed_in_forks
from sktransfer._training.depth_search import OnRows
from sktransfer.io import ImageSequence
from sktransfer.transforms import Preprocessing

PIXELS = 32  # side of the thumbnails that stand for "no transfer"
_N_DISTANCES = 8  # two of each fold, and of the refit
_MOST_PAIRED = 5000  # rows, between all of which the distances take 200 MB
_distances: dict[tuple[bytes, ...], np.ndarray] = {}  # between rows, by their digests
_distances_lock = renewed_in_forks(threading.Lock())


def embed(
    extractor: PretrainedFeatureExtractor, images: ImageSequence
) -> tuple[np.ndarray, int, float]:
    """Embed images; return the rows, how many ran through the network, and the seconds.

    What is done once for a network, loading and tracing it, is not counted.
    """
    embedding = embedding_of(extractor)
    start = time.perf_counter()
    X = embedding(images)
    return X, embedding.n_computed, time.perf_counter() - start


def thumbnails(images: ImageSequence) -> np.ndarray:
    """Return the images as grey thumbnails, flat: (n, 32 * 32) in [0, 1]."""
    preprocessing = Preprocessing((PIXELS, PIXELS), (PIXELS, PIXELS), mode="squash")

    def thumbnail(row: int) -> np.ndarray:
        small = images.load(row, None, preprocessing.fit_size)  # (3, 32, 32) uint8
        return small.float().mean(0).flatten().numpy() / 255

    with one_core_threads(n_stream_threads(None)) as threads:
        return np.stack(list(threads.map(thumbnail, range(len(images)))))


def pixel_svm(n_features: int, n_jobs: int | None = None) -> BaseEstimator:
    """Return an RBF SVM for thumbnails, tuned on what it is fitted on."""
    kernels = [partial(rbf_kernel, gamma=share / n_features) for share in (0.5, 1)]
    grid = {"svc__C": [1, 3, 10], "svc__kernel": kernels}
    return GridSearchCV(make_pipeline(StandardScaler(), SVC()), grid, cv=Folds(3), n_jobs=n_jobs)


def rbf_kernel(X: np.ndarray, Y: np.ndarray, gamma: float) -> np.ndarray:
    """Return scikit-learn's kernel; all candidates of a search share the distances of a fold."""
    key = tuple(xxhash.xxh3_128_digest(np.ascontiguousarray(rows).data) for rows in (X, Y))
    with _distances_lock:
        distances = _distances.pop(key, None)
    if distances is None:
        distances = euclidean_distances(X, Y, squared=True)
    with _distances_lock:
        _distances[key] = distances
        while len(_distances) > _N_DISTANCES:
            _distances.pop(next(iter(_distances)))  # the one that was used longest ago
    return np.exp(-gamma * distances)


class RowKernel:
    """A kernel for support vector machines that are fitted on the numbers of rows.

    The distances between all rows are computed once, for all splits, folds and candidates. Of more
    than 5,000 rows those of a fold are, for all of its candidates.

    Parameters
    ----------
    rows : callable
        Returns the rows, (n, k).
    """

    def __init__(self, rows: Callable[[], np.ndarray]) -> None:
        self._rows = rows
        self._distances: np.ndarray | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> RowKernel:
        return self  # scikit-learn copies what is a parameter, once for each candidate

    def numbers(self) -> np.ndarray:
        """Return the numbers of the rows, (n, 1)."""
        return np.arange(len(self._rows()))[:, None]

    def rbf(self, numbers: np.ndarray, others: np.ndarray, gamma: float) -> np.ndarray:
        """Return scikit-learn's RBF kernel between the rows of these numbers."""
        X = self._rows()
        i, j = (column[:, 0].astype(int) for column in (numbers, others))
        if len(X) > _MOST_PAIRED:
            return rbf_kernel(X[i], X[j], gamma)
        with self._lock:
            if self._distances is None:
                self._distances = euclidean_distances(X, squared=True)
        return np.exp(-gamma * self._distances[np.ix_(i, j)])


def check_labels(y: Any, images: ImageSequence, purpose: str) -> np.ndarray:
    """Return one label of any type for each image, of two classes at least."""
    if y is None:
        raise ValueError(f"{purpose} requires y to be passed, but the target y is None.")
    y = check_y(plain_labels(y))
    check_consistent_length(images, y)
    check_classification_targets(y)
    classes = np.unique(y)
    if len(classes) < 2:
        raise ValueError(
            f"{purpose} needs images of at least 2 classes: all {len(y)} are "
            f"{classes.tolist()[0]!r}."
        )
    return y


def stratified_folds(
    splitter: Any, y: np.ndarray, cv: Any, groups: np.ndarray | None = None
) -> list[Split]:
    """Return the folds of a splitter; of a number `cv` of them, say which classes are too small."""
    if isinstance(cv, Integral):
        _check_folds(int(cv), y, groups)
    with without_words_on_small_classes:
        splits = list(check_cv(splitter, y, classifier=True).split(np.zeros(len(y)), y, groups))
    if isinstance(cv, Integral):
        n_folds = len(splits) * len(y) // sum(len(test) for _, test in splits)
        if n_folds < int(cv):
            raise ValueError(
                f"The groups can be dealt into {n_folds} folds at most, of which each leaves all "
                f"classes to learn from: pass cv={n_folds}, or smaller groups."
            )
    return splits


def _check_folds(cv: int, y: np.ndarray, groups: np.ndarray | None) -> None:
    """Raise or warn where scikit-learn would, with the classes and the remedy."""
    rare = name_rare_classes(y, cv, groups)
    counts = class_sizes(y, groups)[1]
    possible = counts.min() if counts.min() > 1 or counts.max() >= cv else counts.max()
    fewer = f"pass cv={possible}, or " if possible > 1 else ""
    units, more = ("images", "add images") if groups is None else ("groups", "pass smaller groups")
    remedy = f"{fewer}{more}"
    if counts.max() < cv:
        raise ValueError(f"No class has {units} for cv={cv} folds: {rare}. To go on, {remedy}.")
    if rare:
        warnings.warn(
            f"Some of the cv={cv} folds have no image of a class to score on: {rare}. If that "
            f"matters, {remedy}.",
            UserWarning,
            stacklevel=6,
        )


def _takes_groups(model: Any) -> bool:
    """Tell whether a model splits what it is fitted on, and by groups if there are some."""
    return bool(get_routing_for_object(model).consumes("fit", ["groups"]))


def fit_and_score(
    model: Any,
    X: Any,
    y: np.ndarray,
    split: Split,
    scoring: Any,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """Fit a clone of a model on the first part of a split, and score it on the second.

    One split at a time: a fine-tuned network is large, and all of them would be held at once.

    Parameters
    ----------
    model : estimator
    X : ImageSequence or ndarray
    y : ndarray of shape (n,)
    split : tuple of (train, test)
        Rows.
    scoring : str, callable or None
        As of :func:`sklearn.model_selection.cross_validate`.
    groups : ndarray of shape (n,), default=None
        For a model that splits what it is fitted on.

    Returns
    -------
    dict
        What `cross_validate` returns, of this split alone: `estimator`, `fit_time` in seconds, and
        `test_score` or, of several scores, `test_<name>` for each.
    """

    def score(on_rows: OnRows, rows: np.ndarray, y_true: np.ndarray) -> Any:
        return check_scoring(on_rows.fitted_, scoring)(on_rows.fitted_, X[rows], y_true)

    results = cross_validate(
        OnRows(model, X, groups=groups if _takes_groups(model) else None),
        np.arange(len(y)),
        y,
        cv=[split],
        scoring=score,
        n_jobs=1,  # the model may have its own
        return_estimator=True,
        error_score="raise",
    )
    of_split = {name: values[0] for name, values in results.items()}
    return of_split | {"estimator": of_split["estimator"].fitted_}
