"""What a few labelled images add to words: a linear probe on top of the logits of the words."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

# The inverse strengths of the penalty that `choose_probe` compares; 0 is the words alone.
_CS = (0.0, 1.0, 10.0, 100.0, 1000.0)
_WITHOUT_FOLDS = 1.0  # where no class has two images, by which a strength could be judged
_FOLDS = 5
_MOST_JUDGED = 500  # images by which it is judged
_STEPS, _TOLERANCE = 100, 1e-6  # of L-BFGS: the most, and when it ends


def choose_probe(
    rows: np.ndarray, numbers: np.ndarray, logits: np.ndarray
) -> tuple[np.ndarray, float]:
    """Learn what to add to the logits of words, as much as helps on images that are left out.

    Only classes that have images are compared with each other: what the words say of the others
    beside these stays as it is.

    Parameters
    ----------
    rows : ndarray of shape (n, width)
        Of length 1.
    numbers : ndarray of shape (n,)
        The class of each.
    logits : ndarray of shape (n, n_classes)
        What the words say.

    Returns
    -------
    weights : ndarray of shape (width, n_classes), float32
        ``rows @ weights`` is to be added to the logits.
    C : float
        The inverse strength of the penalty on them; 0 if they are 0.
    """
    weights = np.zeros((rows.shape[1], logits.shape[1]), np.float32)
    present, numbers = np.unique(numbers, return_inverse=True)
    if len(present) == 1:
        return weights, 0.0
    # The weights are sums of rows: of few rows, the directions of these are enough.
    basis = np.linalg.qr(rows.T.astype(float))[0]  # (width, min(n, width))
    problem = rows @ basis, np.eye(len(present))[numbers], logits[:, present].astype(float)
    C = _chosen(numbers, *problem)
    if C:
        weights[:, present] = basis @ _fitted(*problem, C=C)
    return weights, C


def _chosen(numbers: np.ndarray, rows: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> float:
    """Return the C with the least log-loss in folds, dealt out in the order of the images."""
    turns = _turns(numbers)
    if not turns.any():
        return _WITHOUT_FOLDS
    judged = turns < max(2, _MOST_JUDGED // labels.shape[1])
    fold = turns[judged] % _FOLDS
    parts = [part[judged] for part in (rows, labels, logits)]
    losses = dict.fromkeys(_CS, 0.0)
    for number in np.unique(fold):
        left_out, others = fold == number, fold != number
        for C in _CS:
            added = parts[0][left_out] @ _fitted(*(part[others] for part in parts), C=C) if C else 0
            scores = log_softmax(parts[2][left_out] + added, axis=1)
            losses[C] -= float((scores * parts[1][left_out]).sum())
    return min(losses, key=losses.__getitem__)


def _turns(numbers: np.ndarray) -> np.ndarray:
    """Return for each image how many of its class come before it."""
    order = np.argsort(numbers, kind="stable")
    firsts = np.searchsorted(numbers[order], np.arange(numbers.max() + 1))
    turns = np.empty(len(numbers), int)
    turns[order] = np.arange(len(numbers)) - firsts[numbers[order]]
    return turns


def _fitted(rows: np.ndarray, labels: np.ndarray, logits: np.ndarray, *, C: float) -> np.ndarray:
    """Return the weights (width, n_classes) of a logistic regression that starts from logits."""
    shape = rows.shape[1], labels.shape[1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        scores = log_softmax(logits + rows @ weights, axis=1)
        gradient = rows.T @ (np.exp(scores) - labels) + weights / C
        return float(flat @ flat / (2 * C) - (scores * labels).sum()), gradient.ravel()

    options = {"maxiter": _STEPS, "ftol": _TOLERANCE}
    start = np.zeros(shape[0] * shape[1])
    return minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x.reshape(shape)
