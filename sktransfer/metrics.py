"""Scores on arrays: transferability, detection, and whether probabilities can be believed.

The transferability scores tell how well embeddings suit a task, without fine-tuning on it: higher
is better. They compare networks on one task; they are no accuracies, and those of different tasks,
or by different formulas, can't be compared.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from scipy.linalg import svd
from scipy.stats import mode
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.model_selection import LeaveOneGroupOut, check_cv, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils import check_array, check_consistent_length, check_X_y, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight

from sktransfer._neighbors import nearest
from sktransfer._splits import Folds, check_groups
from sktransfer.io._coco import coco_scores

__all__ = [
    "coco_scores",
    "expected_calibration_error",
    "h_score",
    "knn_score",
    "leep_score",
    "log_me_score",
]

_TINY = 1e-12  # relative: of a noise and of a prior that are taken for none
_MAX_ITERATIONS = 1000


def __dir__() -> list[str]:
    return __all__


def log_me_score(X: Any, y: Any) -> float:
    r"""Score embeddings by the logarithm of the maximum evidence (LogME).

    The targets are modelled by a linear regression :math:`y = Xw + \epsilon` with the prior
    :math:`w \sim N(0, \alpha^{-1} I)` and the noise :math:`\epsilon \sim N(0, \beta^{-1} I)`.
    Its evidence, the weights integrated out, is

    .. math::

        \log p(y | X, \alpha, \beta) = \frac{n}{2} \log \beta + \frac{d}{2} \log \alpha
        - \frac{n}{2} \log 2 \pi - \frac{\beta}{2} \|Xm - y\|^2 - \frac{\alpha}{2} \|m\|^2
        - \frac{1}{2} \log |A|

    with :math:`A = \alpha I + \beta X^T X` and :math:`m = \beta A^{-1} X^T y`. The score is its
    maximum over :math:`\alpha` and :math:`\beta`, divided by :math:`n`. They are found by the
    fixed-point iteration

    .. math::

        \gamma = \sum_i \frac{\beta \sigma_i^2}{\alpha + \beta \sigma_i^2}, \quad
        \alpha \leftarrow \frac{\gamma}{\|m\|^2}, \quad
        \beta \leftarrow \frac{n - \gamma}{\|Xm - y\|^2}

    over the singular values :math:`\sigma_i` of `X`. Classes are regressed one against the rest,
    as zeros and ones; the score is the mean over them.

    Parameters
    ----------
    X : array-like of shape (n, d)
        Embeddings, as they are: the regression has no intercept.
    y : array-like of shape (n,) or (n, n_outputs)
        Labels of any type; or floats that are no classes, which are regressed themselves.

    Returns
    -------
    float
        Higher is better; it has no bounds.

    Notes
    -----
    Rotating the embeddings, permuting them or scaling all of them by one factor changes nothing.
    Where the embeddings explain a target without any noise, and there are fewer of them than
    images, the evidence has no maximum; the noise is then 1e-12 of the target's square sum.

    References
    ----------
    You, Liu, Wang and Long, "LogME: practical assessment of pre-trained models for transfer
    learning" (2021), algorithm 1 with the fixed-point iteration of You, Liu, Zhang, Wang, Jordan
    and Long, "Ranking and tuning pre-trained models" (2022).

    Examples
    --------
    >>> from sktransfer.metrics import log_me_score
    >>> X = [[1.0], [1.0], [1.0], [0.0]]
    >>> round(log_me_score(X, ["a", "a", "b", "b"]), 4)
    -0.9816
    """
    X, y = check_X_y(X, y, dtype=np.float64, multi_output=True, ensure_min_samples=2)
    if type_of_target(y).startswith("continuous"):
        targets = y.astype(np.float64).reshape(len(y), -1)
    else:
        classes = _check_labels(y)
        targets = (classes[:, None] == np.unique(classes)).astype(np.float64)
    left, sigma, _ = svd(X, full_matrices=False)
    rank = int(np.sum(sigma > sigma[0] * max(X.shape) * np.finfo(float).eps))
    if rank == 0:
        raise ValueError("X is zero everywhere: there is nothing to score.")
    projected = left[:, :rank].T @ targets  # (rank, n_outputs)
    rest = np.square(targets - left[:, :rank] @ projected).sum(axis=0)
    rest = np.maximum(rest, _TINY * np.square(targets).sum(axis=0))
    evidences = [
        _evidence(sigma[:rank] ** 2, projected[:, k] ** 2, rest[k], len(X))
        for k in range(targets.shape[1])
    ]
    return float(np.mean(evidences))


def _evidence(s: np.ndarray, z: np.ndarray, rest: float, n: int) -> float:
    """Return the maximum log evidence of one target, a row.

    It can have several maxima, so the iteration starts from little, some and much regularisation.

    Parameters
    ----------
    s : ndarray of shape (rank,)
        Squared singular values of the embeddings.
    z : ndarray of shape (rank,)
        Squared parts of the target along the left singular vectors.
    rest : float
        Square sum of what no embedding explains.
    n : int
        Number of rows.
    """
    # All follows from t = alpha / beta: m = sqrt(s z) / (t + s), gamma = sum of s / (t + s).
    low, high = _TINY * s.max(), s.max() / _TINY
    evidences = []
    for t in (s.min(), s.mean(), s.max()):
        for _ in range(_MAX_ITERATIONS):
            gamma, free, residual, square = _moments(s, z, rest, n, t)
            new = high if square * free == 0 else gamma / free * residual / square
            old, t = t, float(np.clip(new, low, high))
            if abs(t - old) <= 1e-9 * t:
                break
        _, _, residual, square = _moments(s, z, rest, n, t)
        # The best beta for this t, where beta (residual + t square) is n.
        beta = n / (residual + t * square)
        log_det = np.log1p(s / t).sum()  # |A| / alpha^d
        evidences.append((n * np.log(beta / (2 * np.pi)) - n - log_det) / (2 * n))
    return max(evidences)


def _moments(
    s: np.ndarray, z: np.ndarray, rest: float, n: int, t: float
) -> tuple[float, float, float, float]:
    """Return gamma, n - gamma, the residual's square sum, and that of the mean weights."""
    shares = t / (t + s)
    gamma, free = (s / (t + s)).sum(), n - len(s) + shares.sum()
    return gamma, free, rest + (shares**2 * z).sum(), (s * z / (t + s) ** 2).sum()


def h_score(X: Any, y: Any) -> float:
    r"""Score embeddings by the variance between classes as a share of all: the H-score.

    .. math::

        H(f) = \mathrm{tr}(\Sigma^{-1} \Sigma_B)

    where :math:`\Sigma` is the covariance of the embeddings and :math:`\Sigma_B` that of the
    means of their classes, each mean taken once for each image. As there may be more features
    than images, the covariance is shrunk,

    .. math::

        H_\lambda(f) = \mathrm{tr}(\Sigma_\lambda^{-1} (1 - \lambda) \Sigma_B), \quad
        \Sigma_\lambda = (1 - \lambda) \Sigma + \lambda \frac{\mathrm{tr} \Sigma}{d} I

    by the :math:`\lambda` of Ledoit and Wolf.

    Parameters
    ----------
    X : array-like of shape (n, d)
        Embeddings.
    y : array-like of shape (n,)
        Labels of any type.

    Returns
    -------
    float
        From 0 to the number of classes less one; higher is better.

    Notes
    -----
    Rotating, shifting or permuting the embeddings or scaling all of them by one factor changes
    nothing. Only without shrinkage would this hold for any linear map that can be undone.

    With about as many features as images, or more, part of the score is chance, and more of it
    where a few directions hold most of the variance: there is then little shrinkage, and
    embeddings of random weights can come out first.

    References
    ----------
    Bao, Li, Huang, Zhang, Zheng, Zamir and Guibas, "An information-theoretic approach to
    transferability in task transfer learning" (2019). Ibrahim, Ponomareva and Mazumder, "Newer is
    not always better: rethinking transferability metrics, their peculiarities, stability and
    performance" (2022), for the shrinkage. Ledoit and Wolf, "A well-conditioned estimator for
    large-dimensional covariance matrices" (2004).

    Examples
    --------
    >>> from sktransfer.metrics import h_score
    >>> round(h_score([[0.0], [0.0], [1.0], [1.0]], ["a", "a", "b", "b"]), 6)
    1.0
    >>> h_score([[0.0], [1.0], [0.0], [1.0]], ["a", "a", "b", "b"])
    0.0
    """
    X, y = check_X_y(X, y, dtype=np.float64, ensure_min_samples=2)
    classes = _check_labels(y)
    X = X - X.mean(axis=0)
    if not X.any():
        raise ValueError("All rows of X are equal: there is nothing to score.")
    shrinkage = ledoit_wolf_shrinkage(X, assume_centered=True)
    mean_variance = np.square(X).mean()
    rows, squares = _without_correlations(X)
    values = (1 - shrinkage) * squares / len(X) + shrinkage * mean_variance
    kept = values > values[-1] * X.shape[1] * np.finfo(float).eps  # not shrunk, it may be singular
    counts = np.bincount(classes)
    sums = np.zeros((len(counts), rows.shape[1]))
    np.add.at(sums, classes, rows)
    means = sums / np.sqrt(counts * len(X))[:, None]  # means.T @ means is the covariance of means
    return float((1 - shrinkage) * (means[:, kept] ** 2 / values[kept]).sum())


def _without_correlations(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return centred rows, rotated so that no two features correlate, and their square sums."""
    if X.shape[1] > len(X):  # no more directions than rows: found among the rows, in less time
        squares, left = np.linalg.eigh(X @ X.T)
        squares = squares.clip(0)
        return left * np.sqrt(squares), squares
    squares, directions = np.linalg.eigh(X.T @ X)
    return X @ directions, squares.clip(0)


def leep_score(probabilities: Any, y: Any) -> float:
    r"""Score a network by what its own classes say of the labels (LEEP).

    With :math:`\theta(x)_z` the probability that the network gives its class z for image x,

    .. math::

        \hat P(y, z) = \frac{1}{n} \sum_{i: y_i = y} \theta(x_i)_z, \quad
        \mathrm{LEEP} = \frac{1}{n} \sum_i \log \sum_z \hat P(y_i | z) \theta(x_i)_z

    so it is the mean log-likelihood of a classifier that draws a class z of the network, then a
    label given z.

    Parameters
    ----------
    probabilities : array-like of shape (n, n_source_classes)
        What the network, head included, gives for its own classes: rows that sum to 1. See
        ``PretrainedFeatureExtractor(layer="output")`` for the logits of which it is the softmax.
    y : array-like of shape (n,)
        Labels of any type.

    Returns
    -------
    float
        At most 0; higher is better. A network that says the same of all images has minus the
        entropy of the labels.

    References
    ----------
    Nguyen, Hassner, Seeger and Archambeau, "LEEP: a new measure to evaluate transferability of
    learned representations" (2020).

    Examples
    --------
    >>> from sktransfer.metrics import leep_score
    >>> leep_score([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], ["a", "a", "b"])
    0.0
    """
    theta, y = check_X_y(probabilities, y, dtype=np.float64, ensure_min_samples=2)
    classes = _check_labels(y)
    _check_probabilities(theta, "probabilities")
    joint = np.zeros((classes.max() + 1, theta.shape[1]))  # (n_classes, n_source_classes)
    np.add.at(joint, classes, theta / len(theta))
    marginal = joint.sum(axis=0)
    conditional = joint / np.where(marginal > 0, marginal, 1)  # P(y | z)
    likelihoods = (conditional[classes] * theta).sum(axis=1) / theta.sum(axis=1)
    return float(np.log(likelihoods).mean())


def knn_score(
    X: Any,
    y: Any,
    *,
    n_neighbors: int = 5,
    metric: str = "cosine",
    cv: Any = None,
    groups: Any = None,
) -> float:
    r"""Score embeddings by the accuracy of their nearest neighbours.

    .. math::

        \frac{1}{n} \sum_i [y_i = \mathrm{mode}(y_j: j \in N_k(i))]

    where :math:`N_k(i)` are the k nearest neighbours of image i among all others or, with `cv`,
    among those of the training folds.

    Parameters
    ----------
    X : array-like of shape (n, d)
        Embeddings.
    y : array-like of shape (n,)
        Labels of any type.
    n_neighbors : int, default=5
        k.
    metric : str, default="cosine"
        Of the distance; see :class:`sklearn.neighbors.KNeighborsClassifier`.
    cv : int, splitter, iterable or None, default=None
        None leaves one out; else as in :func:`sklearn.model_selection.cross_val_score`, the mean
        over the folds. Images that come twice, or nearly so, flatter the first.
    groups : array-like of shape (n,), default=None
        The group of each image. None then leaves one group out, whose images find their neighbours
        among those of the others; a number of folds is one of whole groups, as of
        :class:`sklearn.model_selection.StratifiedGroupKFold`; a splitter gets them.

    Returns
    -------
    float
        Between 0 and 1; higher is better.

    References
    ----------
    Puigcerver, Riquelme, Mustafa, Renggli, Pinto, Gelly, Keysers and Houlsby, "Scalable transfer
    learning with expert models" (2021), for the leave-one-out accuracy as a score. Renggli, Pinto,
    Rimanic, Puigcerver, Riquelme, Zhang and Lucic, "Which model to transfer? Finding the needle in
    the growing haystack" (2022), for how it compares.

    Examples
    --------
    >>> from sktransfer.metrics import knn_score
    >>> X = [[1.0, 0.1], [1.0, 0.0], [0.1, 1.0], [0.0, 1.0]]
    >>> knn_score(X, ["a", "a", "b", "b"], n_neighbors=1)
    1.0
    """
    X, y = check_X_y(X, y, dtype=[np.float64, np.float32], ensure_min_samples=2)
    classes = _check_labels(y)
    groups = check_groups(groups, len(X))
    if cv is not None or groups is not None:
        model = KNeighborsClassifier(n_neighbors=n_neighbors, metric=metric)
        splitter = LeaveOneGroupOut() if cv is None else cv
        if groups is not None and isinstance(cv, Integral):
            splitter = Folds(int(cv))
        splits = list(check_cv(splitter, y, classifier=True).split(X, y, groups))
        scores = cross_val_score(model, X, y, cv=splits, error_score="raise")
        sizes = [len(test) if cv is None else 1 for _, test in splits]  # of images, or of folds
        return float(np.average(scores, weights=sizes))
    if n_neighbors >= len(X):
        raise ValueError(
            f"n_neighbors={n_neighbors}, but an image has only {len(X) - 1} others: pass fewer."
        )
    _, indices = nearest(X, None, n_neighbors, metric=metric)
    return float((mode(classes[indices], axis=1).mode == classes).mean())


def _check_probabilities(values: np.ndarray, name: str) -> None:
    """Raise a ValueError for the first row that is no distribution."""
    sums = values.sum(axis=1)
    wrong = np.flatnonzero((values < 0).any(axis=1) | (np.abs(sums - 1) > 1e-3))
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"Row {row} of {name} has values from {values[row].min():g} to "
            f"{values[row].max():g} and the sum {sums[row]:g}: probabilities are not negative and "
            "sum to 1. Of logits, pass scipy.special.softmax(logits, axis=1)."
        )


def _check_labels(y: np.ndarray) -> np.ndarray:
    """Return labels as class numbers from 0 on, (n,)."""
    if y.ndim != 1:
        raise ValueError(f"y has shape {y.shape}: the score takes one label an image.")
    check_classification_targets(y)
    names, classes = np.unique(y, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"y has one class only, {names.tolist()[0]!r}: nothing to tell apart.")
    return classes


def expected_calibration_error(
    y_true: Any,
    y_prob: Any,
    *,
    n_bins: int = 15,
    labels: Any = None,
    sample_weight: Any = None,
) -> float:
    r"""Return by how much a classifier's confidence differs from its accuracy.

    The confidence is the highest probability of an image. Images are put into bins of equal width
    by it, and the differences within the bins are averaged:

    .. math::

        \mathrm{ECE} = \sum_b \frac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    Parameters
    ----------
    y_true : array-like of shape (n,)
        Labels of any type.
    y_prob : array-like of shape (n, n_classes) or (n,)
        Probabilities, as `predict_proba` returns them; of two classes, those of the second are
        enough.
    n_bins : int, default=15
        Bins between 0 and 1.
    labels : array-like of shape (n_classes,), default=None
        Which class each column is, as in `classes_`; None for the sorted labels of `y_true`.
    sample_weight : array-like of shape (n,), default=None

    Returns
    -------
    float
        From 0, where the confidence can be taken at its word, to 1.

    Notes
    -----
    It depends on the number of bins, and of few images it is mostly chance: of 200 images whose
    probabilities are exactly right it is still about 0.05. Compare by the log-loss, and look at
    the curve of :class:`sklearn.calibration.CalibrationDisplay`.

    References
    ----------
    Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning"
    (2015); Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks" (2017).

    Examples
    --------
    >>> from sktransfer.metrics import expected_calibration_error
    >>> y = ["cat", "cat", "dog", "cat"]
    >>> expected_calibration_error(y, [[0.75, 0.25]] * 4)
    0.0
    >>> round(expected_calibration_error(y, [[0.95, 0.05]] * 4), 3)
    0.2
    """
    y_prob = check_array(y_prob, ensure_2d=False, dtype=np.float64, input_name="y_prob")
    if y_prob.ndim == 1:
        y_prob = np.column_stack([1 - y_prob, y_prob])
    y_true = column_or_1d(y_true)
    check_consistent_length(y_true, y_prob, sample_weight)
    classes = np.unique(y_true) if labels is None else column_or_1d(labels)
    if len(classes) != y_prob.shape[1]:
        raise ValueError(
            f"y_prob has {y_prob.shape[1]} columns, but there are {len(classes)} classes: "
            f"{', '.join(map(str, classes[:5]))}. Pass labels=model.classes_."
        )
    _check_probabilities(y_prob, "y_prob")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}.")
    confidence = y_prob.max(axis=1)
    is_right = classes[y_prob.argmax(axis=1)] == y_true
    weights = _check_sample_weight(sample_weight, y_prob, dtype=np.float64)
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    differences = np.bincount(bins, weights * (is_right - confidence), minlength=n_bins)
    return float(np.abs(differences).sum() / weights.sum())
