"""What is missing in labels, values or groups, of whatever container they come in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.utils._missing import is_pandas_na

ROWS = (list, tuple, np.ndarray)
NESTED = (*ROWS, set, frozenset, dict)
_SHOWN = 5  # rows that an error names


def refuse_missing(values: Any, name: str = "y") -> np.ndarray | None:
    """Raise an error that names rows with missing or masked values; return the entries.

    Parameters
    ----------
    values : array-like
        A list, a tuple, or what has an `__array__`; of anything else, the result is None.
    name : {"y", "groups"}, default="y"
        What they are, for the error.
    """
    entries = _array(values)
    if entries is None or not entries.ndim:
        return None
    if not entries.size:  # how many there should be is for a later check
        return entries
    rows = np.flatnonzero(_is_missing(entries).reshape(len(entries), -1).any(1))
    if len(rows):
        remedy = (
            "of X and y alike, or say what they are"
            if name == "y"
            else "of X, y and groups alike, or give each a group of its own"
        )
        raise ValueError(
            f"{name} contains NaN, None, NA or masked values in {len(rows)} of {len(entries)} rows "
            f"({_few(rows)}). Leave these images out, {remedy}."
        )
    return entries


def _array(y: Any) -> np.ndarray | None:
    """Return the entries as NumPy has them, of lists with their own types; None of no array."""
    if isinstance(y, (list, tuple)):
        entries = _unpacked(np.fromiter(y, object, len(y)))
        return _table(entries) if all(isinstance(e, ROWS) for e in entries) else entries
    if isinstance(y, (str, bytes)) or not hasattr(y, "__array__"):
        return None
    # Of pandas: NumPy knows no nullable types. A Series of dask has no `to_numpy`.
    values = y.to_numpy() if hasattr(y, "isna") and hasattr(y, "to_numpy") else _unmasked(y)
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
    return not isinstance(value, NESTED) and bool(value != value)


def _few(rows: Iterable[int]) -> str:
    """Return the first few rows as text."""
    shown = [str(row) for row in rows]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
