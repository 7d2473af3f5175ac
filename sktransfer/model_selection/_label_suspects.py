"""Labels that a model doubts which did not learn them: confident learning."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import StratifiedGroupKFold

from sktransfer._bars import tqdm
from sktransfer._threads import small_solve
from sktransfer.model_selection._comparison import without_words_on_small_classes

N_FOLDS = 5
_CLEAR = 0.5  # by how much the probability of another class leads, if it need not be credible


class Suspect(NamedTuple):
    """An image whose label may be wrong.

    Attributes
    ----------
    row : int
    other : int
        The number of the class to which it seems to belong.
    given : float
        The probability of its label.
    best : float
        That of the other class.
    """

    row: int
    other: int
    given: float
    best: float


def label_suspects(
    model: Any,
    features: np.ndarray,
    codes: np.ndarray,
    groups: np.ndarray,
    *,
    random_state: Any,
    verbose: bool | int = False,
) -> list[Suspect]:
    """Return images whose label a model doubts that was fitted on others, the most doubtful first.

    The rule is that of confident learning (Northcutt, Jiang and Chuang 2021). A class is credible
    for an image if its probability is at least the mean probability that this class has for its
    own images; a label is suspect if the most probable of the credible classes is another one. Of
    a class whose images are all easily told, few others are credible: so a label is suspect as
    well if another class leads by one half.

    Parameters
    ----------
    model : classifier with `predict_proba`
    features : ndarray of shape (n, n_features)
    codes : ndarray of shape (n,)
        Numbers of the classes, from 0.
    groups : ndarray of shape (n,)
        Images of one group are in one fold.
    """
    probabilities = out_of_fold(
        model, features, codes, groups, random_state=random_state, verbose=verbose
    )
    rows = np.flatnonzero(np.isfinite(probabilities).any(axis=1))
    p, given = probabilities[rows], codes[rows]
    of_own = p[np.arange(len(rows)), given]
    sums = np.bincount(given, of_own, p.shape[1])
    thresholds = sums / np.bincount(given, minlength=p.shape[1]).clip(1)
    credible = np.where(p >= thresholds, p, 0)
    best = np.where(credible.any(axis=1), credible.argmax(axis=1), given)
    leads = (best == given) & (p.max(axis=1) - of_own >= _CLEAR)
    best = np.where(leads, p.argmax(axis=1), best)
    doubtful = np.flatnonzero(best != given)
    found = [
        Suspect(int(rows[i]), int(best[i]), float(of_own[i]), float(p[i, best[i]]))
        for i in doubtful
    ]
    return sorted(found, key=lambda suspect: suspect.given - suspect.best)


def out_of_fold(
    model: Any,
    features: np.ndarray,
    codes: np.ndarray,
    groups: np.ndarray,
    *,
    random_state: Any,
    verbose: bool | int = False,
) -> np.ndarray:
    """Return the probabilities of all classes, (n, n_classes), by models that saw other groups.

    They are NaN for images whose class no other group has, in training or at all.
    """
    probabilities = np.full((len(codes), codes.max() + 1), np.nan)
    n_folds = min(N_FOLDS, int(np.bincount(codes).max()), len(np.unique(groups)))
    if n_folds < 2:
        return probabilities
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=random_state)
    with without_words_on_small_classes():
        folds = list(splitter.split(features, codes, groups))
    for train, test in tqdm(folds, "folds", disable=not verbose):
        if len(test) == 0 or len(np.unique(codes[train])) < 2:
            continue
        with small_solve(features[train].size):
            fitted = clone(model).fit(features[train], codes[train])
        known = test[np.isin(codes[test], fitted.classes_)]
        probabilities[known] = 0
        if len(known):
            probabilities[np.ix_(known, fitted.classes_)] = fitted.predict_proba(features[known])
    return probabilities
