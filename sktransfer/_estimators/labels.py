"""Labels in whatever container, made plain for scikit-learn; what can't be one is an error."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from sktransfer._missing import NESTED, refuse_missing


def plain_labels(y: Any) -> Any:
    """Return labels as scikit-learn's checks take them.

    Nullable integers and booleans of pandas, arrays of objects that are all numbers, and lists of
    arrays or tensors of no dimension become NumPy's; the rest stays what it is.

    Parameters
    ----------
    y : array-like
        One label an image; or a table.

    Raises
    ------
    ValueError
        Labels are missing, of several types, or several for an image without being a table; or
        `y` is sparse. The message names rows and the remedy.
    """
    if issparse(y):
        raise ValueError(f"y is a sparse {type(y).__name__}: pass y.toarray().")
    values = refuse_missing(y)
    if values is None:
        return y
    if values.dtype != object or values.size == 0:
        return values if hasattr(y, "isna") else y
    _refuse_several(values)
    return _of_one_type(values, y)


def _refuse_several(values: np.ndarray) -> None:
    """Raise an error if a row is a collection of labels."""
    for row, entry in enumerate(values.ravel()):
        if isinstance(entry, NESTED):
            raise ValueError(
                f"y[{row}] is {entry!r}, a {type(entry).__name__}. Several labels an image come as "
                "an indicator matrix: pass sklearn.preprocessing.MultiLabelBinarizer()"
                ".fit_transform(y)."
            )


def _of_one_type(values: np.ndarray, y: Any) -> Any:
    """Return numbers as an array of numbers, strings as they came; refuse what mixes them."""
    kinds = [_kind(value) for value in values.ravel()]
    first = kinds[0]
    row = next((i for i, kind in enumerate(kinds) if kind != first), None)
    if row is not None:
        raise ValueError(
            f"y mixes types: y[0] is {values.ravel()[0]!r}, y[{row}] is {values.ravel()[row]!r}. "
            "Pass labels of one type, such as [str(label) for label in y]."
        )
    if first == "number" or (first == "str" and isinstance(y, (list, tuple))):
        return np.array(values.tolist())
    if first == "str":
        return y
    raise ValueError(
        f"Unknown label type: y holds objects of type {first}; pass strings, numbers or booleans."
    )


def _kind(value: Any) -> str:
    if isinstance(value, (int, float, np.number, np.bool_)):
        return "number"
    return "str" if isinstance(value, str) else type(value).__name__


# ------------------------------------------------------------------------------ classes


def is_indicator(y: np.ndarray) -> bool:
    """Tell an indicator matrix of several labels an image from one label each; refuse others."""
    kind = type_of_target(y)
    if kind == "continuous-multioutput":
        raise ValueError(
            f"Unknown label type: y has {y.shape[1]} columns of fractions. Soft labels are not "
            "taken: pass the most probable one, y.argmax(1), or every image once for each of "
            "its labels, with the shares as sample_weight."
        )
    check_classification_targets(y)
    if y.ndim == 2 and kind != "multilabel-indicator":
        raise ValueError(
            f"y has {y.shape[1]} columns that are not zeros and ones. Several labels an "
            "image come as an indicator matrix: see sklearn's MultiLabelBinarizer."
        )
    return kind == "multilabel-indicator"


def check_known(
    y: np.ndarray, is_multilabel: bool, classes: np.ndarray, was_multilabel: bool
) -> None:
    """Raise an error if labels are not of the classes, or of the form, of earlier ones."""
    if is_multilabel != was_multilabel or (is_multilabel and y.shape[1] != len(classes)):
        known = "an indicator matrix of" if was_multilabel else "one label an image, of"
        raise ValueError(
            f"y has shape {y.shape}, but the estimator goes on with {known} {len(classes)} classes."
        )
    unknown = [] if is_multilabel else np.setdiff1d(y, classes).tolist()
    if unknown:
        raise ValueError(
            f"y holds the classes {unknown}, which were not announced: the estimator goes on with "
            f"{classes.tolist()}. Name all in the first call to partial_fit, classes=[...], or fit "
            "a new estimator."
        )


def labels_of(probabilities: np.ndarray, classes: np.ndarray, is_multilabel: bool) -> np.ndarray:
    """Return the most probable class of each row; of several labels, those above one half."""
    if is_multilabel:
        return (probabilities > 0.5).astype(int)
    return classes[probabilities.argmax(1)]
