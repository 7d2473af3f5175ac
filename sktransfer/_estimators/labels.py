"""Labels in whatever container, made plain for scikit-learn; what can't be one is an error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.utils._missing import is_pandas_na
from sklearn.utils.multiclass import check_classification_targets, type_of_target

_SHOWN = 5  # rows that an error names
_ROWS = (list, tuple, np.ndarray)
_NESTED = (*_ROWS, set, frozenset, dict)


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


def refuse_missing(y: Any) -> np.ndarray | None:
    """Raise an error that names rows with missing or masked values; return the entries of `y`."""
    values = _array(y)
    if values is None or not values.ndim:
        return None
    if not values.size:  # how many there should be is for a later check
        return values
    rows = np.flatnonzero(_is_missing(values).reshape(len(values), -1).any(1))
    if len(rows):
        raise ValueError(
            f"y contains NaN, None, NA or masked values in {len(rows)} of {len(values)} rows "
            f"({_few(rows)}). Leave these images out, of X and y alike, or say what they are."
        )
    return values


def _array(y: Any) -> np.ndarray | None:
    """Return the entries as NumPy has them, of lists with their own types; None of no array."""
    if isinstance(y, (list, tuple)):
        entries = _unpacked(np.fromiter(y, object, len(y)))
        return _table(entries) if all(isinstance(e, _ROWS) for e in entries) else entries
    if isinstance(y, (str, bytes)) or not hasattr(y, "__array__"):
        return None
    # Of pandas: NumPy knows no nullable types.
    values = y.to_numpy() if hasattr(y, "isna") else _unmasked(y)
    return _unpacked(values) if values.dtype == object else values


def _unmasked(values: Any) -> np.ndarray:
    """Return an array, or a tensor, as a plain array that has None where a value is masked."""
    if np.ma.is_masked(values):
        plain = np.ma.getdata(values).astype(object)
        plain[np.ma.getmaskarray(values)] = None
        return plain
    return np.asarray(values)


def _unpacked(entries: np.ndarray) -> np.ndarray:
    """Return objects with arrays and tensors of no dimension as their values, others as arrays."""
    plain = [
        _unmasked(entry)[()] if hasattr(entry, "__array__") else entry for entry in entries.flat
    ]
    return np.fromiter(plain, object, len(plain)).reshape(entries.shape)


def _table(y: Iterable[Any]) -> np.ndarray:
    """Return a list of rows as a table; of rows that differ in length, an array of rows."""
    rows = [list(row) for row in y]
    if len({len(row) for row in rows}) == 1:
        return np.array(rows)
    return np.fromiter(rows, object, len(rows))


def _is_missing(values: np.ndarray) -> np.ndarray:
    if values.dtype == object:
        flat = [v is None or is_pandas_na(v) or _is_nan(v) for v in values.ravel()]
        return np.array(flat, bool).reshape(values.shape)
    return values != values if values.dtype.kind in "fcmM" else np.zeros(values.shape, bool)


def _is_nan(value: Any) -> bool:
    return not isinstance(value, _NESTED) and bool(value != value)


def _refuse_several(values: np.ndarray) -> None:
    """Raise an error if a row is a collection of labels."""
    for row, entry in enumerate(values.ravel()):
        if isinstance(entry, _NESTED):
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


def _few(rows: Iterable[int]) -> str:
    """Return the first few rows as text."""
    shown = [str(row) for row in rows]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")


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


def name_rare_classes(y: np.ndarray, at_least: int) -> str:
    """Return, in words, the classes of fewer images and their counts; "" if there are none."""
    classes, counts = np.unique(y, return_counts=True)
    rare = [
        f"{label!r} has {count} image{'s' if count > 1 else ''}"
        for label, count in zip(classes.tolist(), counts.tolist(), strict=True)
        if count < at_least
    ]
    more = [f"{len(rare) - 5} more classes have few"] if len(rare) > 6 else rare[5:]
    return ", ".join(rare[:5] + more)
