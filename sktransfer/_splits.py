"""Which images are learnt from and which are scored on: by chance, stratified, in whole groups.

All that this library splits by itself is split here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.model_selection import (
    BaseCrossValidator,
    GroupKFold,
    KFold,
    ShuffleSplit,
    StratifiedGroupKFold,
    StratifiedKFold,
    StratifiedShuffleSplit,
)
from sklearn.utils import check_random_state

from sktransfer._missing import refuse_missing
from sktransfer._threads import WithoutWarnings

Split = tuple[np.ndarray, np.ndarray]  # rows to learn from, and rows to score on
# What scikit-learn says of images; here groups count, and who asks for folds says so.
without_words_on_small_classes = WithoutWarnings(UserWarning, "The least populated class")


class UndividedWarning(UserWarning):
    """Says that a split was left out, as there are too few groups for it."""


# ------------------------------------------------------------------------------ groups


def check_groups(groups: Any, n_images: int) -> np.ndarray | None:
    """Return groups as numbers (n_images,), the same whatever the order of the images.

    Parameters
    ----------
    groups : array-like of shape (n_images,) or None
        Of any type that can be sorted.
    n_images : int

    Returns
    -------
    ndarray of int, or None if there are none

    Raises
    ------
    TypeError, ValueError
        For what is no list of one group an image, with the remedy.

    Examples
    --------
    >>> from sktransfer._splits import check_groups
    >>> check_groups(["b", "a", "b"], 3).tolist()
    [1, 0, 1]
    """
    if groups is None:
        return None
    entries = refuse_missing(groups, "groups")
    if entries is None:
        raise TypeError(
            f"groups is of type {type(groups).__name__}: pass a list, an array or a Series that "
            "has the group of each image."
        )
    if len(entries) != n_images:
        raise ValueError(
            f"groups has {len(entries)} entries for {n_images} images: pass one for each image, in "
            "the order of X."
        )
    if entries.size != n_images:
        raise ValueError(
            f"groups has shape {entries.shape}: pass one entry for each image, such as strings "
            "that join the columns."
        )
    try:
        return np.unique(entries.ravel(), return_inverse=True)[1]
    except TypeError as error:
        raise ValueError(
            f"groups can't be sorted, as its entries are of several types ({error}): pass groups "
            "of one type, such as [str(group) for group in groups]."
        ) from error


def class_sizes(y: np.ndarray, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes, and how many images or, if groups are given, groups each of them has."""
    if groups is None:
        return np.unique(y, return_counts=True)
    classes, numbers = np.unique(y, return_inverse=True)
    pairs = np.unique(np.stack([numbers, groups]), axis=1)
    return classes, np.bincount(pairs[0])


def name_rare_classes(y: np.ndarray, at_least: int, groups: np.ndarray | None = None) -> str:
    """Return, in words, the classes of fewer images, or groups; "" if there are none."""
    classes, counts = class_sizes(y, groups)
    unit, verb = ("image", "has") if groups is None else ("group", "lies in")
    rare = [
        f"{label!r} {verb} {count} {unit}{'s' if count > 1 else ''}"
        for label, count in zip(classes.tolist(), counts.tolist(), strict=True)
        if count < at_least
    ]
    more = [f"{len(rare) - 5} more classes have few"] if len(rare) > 6 else rare[5:]
    return ", ".join(rare[:5] + more)


def _if_they_join(groups: np.ndarray | None) -> np.ndarray | None:
    """Return groups, None if each image is one by itself: then they ask for nothing."""
    return None if groups is None or len(np.unique(groups)) == len(groups) else groups


# ------------------------------------------------------------------------------ folds


class Folds(BaseCrossValidator):
    """What a number of folds stands for in this library.

    Folds of classes are stratified. If groups are given, none of them is in two folds:
    :class:`sklearn.model_selection.StratifiedGroupKFold`, or `GroupKFold` of what are no classes.
    There are fewer folds than asked for where some of them would be empty, or would leave a class
    out of what is learnt from that lies in several groups.

    Parameters
    ----------
    n_splits : int
        2 or more.
    kind : {"class", "label", "value"}, default="class"
        What `y` holds.
    random_state : int or None, default=None
        None deals images out in their order.
    n_repeats : int, default=1
        How often they are dealt out. With groups, those times that give folds of an earlier one do
        not count.
    n_left : int, default=1
        Groups of a class that are to be left in what is learnt from, if it has more.
    """

    __metadata_request__split = {"groups": True}

    def __init__(
        self,
        n_splits: int,
        kind: str = "class",
        random_state: int | None = None,
        *,
        n_repeats: int = 1,
        n_left: int = 1,
    ) -> None:
        self.n_splits = n_splits
        self.kind = kind
        self.random_state = random_state
        self.n_repeats = n_repeats
        self.n_left = n_left

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Iterator[Split]:
        """Yield the rows to learn from and to score on, of each fold."""
        chance = None if self.random_state is None else check_random_state(self.random_state)
        groups = _if_they_join(groups)
        known: set[bytes] = set()
        for _ in range(self.n_repeats):
            if groups is None:
                yield from self._without_groups(X, y, chance)
                continue
            splits = self.of_groups(np.asarray(y), np.asarray(groups), chance)
            if not splits:
                raise ValueError(self._why_not(np.asarray(y), np.asarray(groups)))
            folds = b"".join(sorted(test.tobytes() for _, test in splits))
            yield from () if folds in known else splits
            known.add(folds)

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """Return the number of splits, which groups may lower."""
        if _if_they_join(groups) is None:
            return self.n_splits * self.n_repeats
        return len(list(self.split(X, y, groups)))

    def _without_groups(self, X: Any, y: Any, chance: Any) -> Iterator[Split]:
        splitter = StratifiedKFold if self.kind == "class" else KFold
        return splitter(self.n_splits, shuffle=chance is not None, random_state=chance).split(X, y)

    def of_groups(self, y: np.ndarray, groups: np.ndarray, chance: Any) -> list[Split]:
        """Return as many folds of whole groups as there can be; none, if not even two."""
        y = _codes(y, self.kind)
        if self.kind == "class" and class_sizes(y, groups)[1].max() < 2:
            return []
        for n_folds in range(min(self.n_splits, len(np.unique(groups))), 1, -1):
            splitter: Any = GroupKFold(n_folds)
            if self.kind == "class":
                shuffled = {"shuffle": chance is not None, "random_state": chance}
                splitter = StratifiedGroupKFold(n_folds, **shuffled)
            with without_words_on_small_classes:
                splits = list(splitter.split(y, y, groups))
            if all(self._can_be_learnt(y, groups, split) for split in splits):
                return splits
        return []

    def _can_be_learnt(self, y: np.ndarray, groups: np.ndarray, split: Split) -> bool:
        """Tell whether there is something to score on, and all classes to learn from."""
        train, test = split
        if len(test) < (1 if self.kind == "class" else 2):  # no R² of a single value
            return False
        left = np.zeros(y.max() + 1, int)
        classes, counts = class_sizes(y[train], groups[train])
        left[classes] = counts
        if len(left) > 1 and len(classes) < 2:
            return False
        return bool((left >= np.minimum(self.n_left, class_sizes(y, groups)[1] - 1)).all())

    def _why_not(self, y: np.ndarray, groups: np.ndarray) -> str:
        n_groups = len(np.unique(groups))
        rare = name_rare_classes(y, 2, groups) if self.kind == "class" else ""
        return (
            f"{len(y)} images of {_counted(n_groups)} can't be dealt into folds of whole groups"
            f"{f': {rare}' if rare else ''}. Pass smaller groups, more images, or no groups."
        )


def inner_folds(
    n_splits: int,
    y: np.ndarray,
    kind: str,
    groups: np.ndarray | None,
    seed: int,
    *,
    n_left: int = 1,
) -> list[Split]:
    """Return up to so many folds, each with all classes to learn from; none if there can't be two.

    Parameters
    ----------
    n_splits, kind, n_left
        See `Folds`.
    y : ndarray of shape (n,) or (n, n_outputs)
    groups : ndarray of shape (n,) or None
    seed : int
    """
    groups = _if_they_join(groups)
    if kind == "class":
        most = min(n_splits, int(class_sizes(y, groups)[1].min()))
    else:
        most = min(n_splits, len(y) // 2)
    if most < 2:
        return []
    folds = Folds(most, kind, seed, n_left=n_left)
    if groups is None:
        return list(folds.split(y, y))
    return folds.of_groups(y, groups, check_random_state(seed))


# ------------------------------------------------------------------------------ parts held out


def hold_outs(
    n_splits: int,
    share: float,
    y: np.ndarray,
    kind: str,
    groups: np.ndarray | None,
    seed: int,
    *,
    n_left: int = 1,
) -> list[Split]:
    """Return splits by chance that hold out a share of the images.

    Without groups they are those of :class:`sklearn.model_selection.StratifiedShuffleSplit`, or
    `ShuffleSplit` of what are no classes. Of groups, whole ones are held out, by chance as long as
    they bring the number of images of each class nearer to its share; of each class at least one,
    and at least `n_left` are left.

    Parameters
    ----------
    n_splits : int
    share : float in (0, 1)
    y : ndarray of shape (n,) or (n, n_outputs)
    kind : {"class", "label", "value"}
    groups : ndarray of shape (n,) or None
    seed : int
    n_left : int, default=1
        Groups of each class to learn from; classes that lie in no more are not held out.

    Raises
    ------
    ValueError
        If there are too few images or groups.
    """
    groups = _if_they_join(groups)
    if groups is None:
        splitter: Any = StratifiedShuffleSplit if kind == "class" else ShuffleSplit
        return list(splitter(n_splits, test_size=share, random_state=seed).split(y, y))
    counts = _table(_codes(y, kind), groups)
    chance, rows, splits = np.random.RandomState(seed), np.arange(len(y)), []
    numbers = np.unique(groups, return_inverse=True)[1]
    for _ in range(n_splits):
        held = _held_out(counts, share, chance, n_left)
        if not held.any():
            raise ValueError(f"the images are of {_counted(len(counts))}.")
        splits.append((rows[~held[numbers]], rows[held[numbers]]))
    return splits


def _held_out(
    counts: np.ndarray, share: float, chance: np.random.RandomState, n_left: int
) -> np.ndarray:
    """Draw groups to hold out, of their images in each class (n_groups, n_classes)."""
    order = chance.permutation(len(counts))
    wanted = share * counts.sum(0)
    n_groups = (counts > 0).sum(0)  # of each class
    held, now, left = np.zeros(len(counts), bool), np.zeros(counts.shape[1], int), n_groups.copy()

    def is_free(group: int) -> bool:
        would_be_left = left - (counts[group] > 0)
        return not held[group] and bool((would_be_left >= np.minimum(n_left, n_groups)).all())

    def hold(group: int) -> None:
        held[group] = True
        now[:] += counts[group]
        left[:] -= counts[group] > 0

    for kind in np.argsort(n_groups, kind="stable"):
        groups = order[counts[order, kind] > 0]
        for group in groups:
            is_nearer = np.abs(now + counts[group] - wanted).sum() < np.abs(now - wanted).sum()
            if is_nearer and is_free(group):
                hold(group)
        if not now[kind] and (free := [group for group in groups if is_free(group)]):
            hold(min(free, key=lambda group: counts[group].sum()))
    return held


def _codes(y: np.ndarray, kind: str) -> np.ndarray:
    """Return class numbers; of what are no classes, one number for all."""
    if kind != "class":
        return np.zeros(len(y), int)
    return np.unique(y, return_inverse=True)[1]


def _table(codes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return how many images of each class a group has, (n_groups, n_classes)."""
    numbers = np.unique(groups, return_inverse=True)[1]
    counts = np.zeros((numbers.max() + 1, codes.max() + 1), int)
    np.add.at(counts, (numbers, codes), 1)
    return counts


def _counted(n_groups: int) -> str:
    return f"{n_groups} group{'s' * (n_groups != 1)}"
