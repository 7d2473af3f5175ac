"""Labels that a model doubts which did not learn them: confident learning."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import StratifiedGroupKFold

from sktransfer._bars import tqdm
from sktransfer._splits import without_words_on_small_classes
from sktransfer._threads import small_solve

N_FOLDS = 5
_CLEAR = 3  # times as probable as the label is another class that need not be credible
_UNSURE = 10  # times as probable as any other class, a label is sure
_LOOKED_AT = 15  # labels that a reader looks at anyway
_SHARE = 4  # images, of which no more than one is listed just to make up that number


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
    well if another class is three times as probable.

    Where few images are in a wrong class, an image that is like both classes may still be one of
    them. So the least sure labels are returned as well, up to 15 in all.

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
    each = np.arange(len(rows))
    of_own = p[each, given]
    best, is_suspect = _other_classes(p, given)
    of_best = p[each, best]
    order = np.argsort(of_own / np.maximum(of_best, np.finfo(float).tiny), kind="stable")
    is_unsure = ~is_suspect & (_UNSURE * of_best >= of_own)
    n_more = max(0, min(_LOOKED_AT, len(rows) // _SHARE) - int(is_suspect.sum()))
    more = order[is_unsure[order]][:n_more]
    listed = is_suspect | np.isin(each, more)
    return [
        Suspect(int(rows[i]), int(best[i]), float(of_own[i]), float(of_best[i]))
        for i in order[listed[order]]
    ]


def _other_classes(p: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return to which other class each image would belong, and whether its label is suspect."""
    each = np.arange(len(p))
    of_own = p[each, given]
    thresholds = np.bincount(given, of_own, p.shape[1]) / np.bincount(
        given, minlength=p.shape[1]
    ).clip(1)
    credible = np.where(p >= thresholds, p, 0)
    is_credible = credible.any(axis=1) & (credible.argmax(axis=1) != given)
    others = p.copy()
    others[each, given] = -1
    rival = others.argmax(axis=1)
    is_suspect = is_credible | (p[each, rival] >= _CLEAR * of_own)
    return np.where(is_credible, credible.argmax(axis=1), rival), is_suspect


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
    with without_words_on_small_classes:
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
