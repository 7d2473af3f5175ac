"""The nearest of many rows: the one place that looks for neighbours."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import xxhash
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import check_array

EXACT = 100_000  # rows, up to which all distances are computed
_LISTS_READ = 32  # of the index, for each query


def nearest(
    rows: Any, queries: Any, n_neighbors: int, *, metric: Any = "cosine"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances and the indices of the nearest rows, nearest first.

    All distances are computed, by scikit-learn. For more than 100,000 rows and the metric
    "cosine" or "euclidean", an index of faiss reads a part of the rows instead, if it is installed
    (``pip install '.[neighbors]'``); it may miss a few neighbours, and finds the same
    each time.

    Parameters
    ----------
    rows : array-like of shape (n, n_features)
        They stay float32 if they are.
    queries : array-like of shape (n_queries, n_features) or None
        None for the rows themselves; then no row is its own neighbour.
    n_neighbors : int
        At most n; less than n without queries.
    metric : str or callable, default="cosine"
        As of :class:`sklearn.neighbors.NearestNeighbors`. By the cosine, a row of zeros is as far
        from all others as orthogonal rows are, and equal to another row of zeros.

    Returns
    -------
    distances : ndarray of shape (n_queries, n_neighbors)
    indices : ndarray of shape (n_queries, n_neighbors)
        Rows.
    """
    rows = check_array(rows, dtype=[np.float32, np.float64])
    queries = None if queries is None else check_array(queries, dtype=rows.dtype)
    if metric == "cosine":
        queries = None if queries is None else _unit(queries)
        distances, indices = _nearest(_unit(rows), queries, n_neighbors, "euclidean")
        return np.square(distances) / 2, indices
    return _nearest(rows, queries, n_neighbors, metric)


def nearest_in_order(
    rows: Any, queries: Any, n_neighbors: int, *, metric: Any = "cosine"
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `nearest` returns; of rows that are equal, the first comes first.

    So are the rows that are returned if more of them are equally near than are asked for.
    """
    rows = check_array(rows, dtype=[np.float32, np.float64])
    numbers = _numbers_of_distinct(rows)
    firsts = np.unique(numbers, return_index=True)[1]
    k = min(n_neighbors, len(firsts))
    distances, found = nearest(rows[firsts], queries, k, metric=metric)
    order = np.lexsort((found, distances))
    distances, found = (np.take_along_axis(of, order, axis=1) for of in (distances, found))
    if len(firsts) == len(rows):
        return distances, found
    equal = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])
    indices = [np.concatenate([equal[i] for i in of_query])[:n_neighbors] for of_query in found]
    counts = np.array([len(of) for of in equal])
    pairs = zip(distances, counts[found], strict=True)
    repeated = [np.repeat(*pair)[:n_neighbors] for pair in pairs]
    return np.stack(repeated), np.stack(indices)


def _numbers_of_distinct(rows: np.ndarray) -> np.ndarray:
    """Return a number for each row, the same for equal ones, in the order in which they come."""
    rows, known = np.ascontiguousarray(rows), dict[bytes, int]()
    digests = (xxhash.xxh3_128_digest(row.data) for row in rows)
    return np.array([known.setdefault(digest, len(known)) for digest in digests])


def _unit(rows: np.ndarray) -> np.ndarray:
    """Return rows of length 1; half the square of their distances is the cosine distance.

    Rows of zeros get a direction of their own: one more column.
    """
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    is_zero = lengths == 0
    return np.hstack([rows / np.where(is_zero, 1, lengths), is_zero.astype(rows.dtype)])


def _nearest(
    rows: np.ndarray, queries: np.ndarray | None, n_neighbors: int, metric: Any
) -> tuple[np.ndarray, np.ndarray]:
    if len(rows) > EXACT and metric == "euclidean" and find_spec("faiss") is not None:
        return _nearest_by_index(rows, queries, n_neighbors)
    model = NearestNeighbors(n_neighbors=n_neighbors, algorithm="brute", metric=metric)
    return model.fit(rows).kneighbors(queries)


def _nearest_by_index(
    rows: np.ndarray, queries: np.ndarray | None, n_neighbors: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find neighbours in those lists of similar rows whose means are nearest to a query."""
    import faiss

    asked = rows if queries is None else queries
    k = n_neighbors + (queries is None)
    index: Any = faiss.index_factory(rows.shape[1], f"IVF{4 * round(len(rows) ** 0.5)},Flat")
    index.nprobe = _LISTS_READ
    index.train(np.ascontiguousarray(rows, np.float32))
    index.add(np.ascontiguousarray(rows, np.float32))
    squares, indices = index.search(np.ascontiguousarray(asked, np.float32), k)
    distances = np.sqrt(squares.clip(0))
    if len(few := np.flatnonzero((indices < 0).any(axis=1))):  # the lists hold less than is asked
        model = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(rows)
        distances[few], indices[few] = model.kneighbors(asked[few])
    return _without_themselves(distances, indices) if queries is None else (distances, indices)


def _without_themselves(
    distances: np.ndarray, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop each row from its own neighbours or, where equal rows took its place, the last."""
    is_own = indices == np.arange(len(indices))[:, None]
    is_own[~is_own.any(axis=1), -1] = True
    shape = len(indices), indices.shape[1] - 1
    return distances[~is_own].reshape(shape), indices[~is_own].reshape(shape)
