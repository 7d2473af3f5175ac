"""Dask collections of images: one task a partition, one estimator a process.

The scheduler of a cluster imports this module too, so it does not import torch by itself.
"""

from __future__ import annotations

import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

import cloudpickle
import dask.array as da
import joblib
import numpy as np
import xxhash
from dask._task_spec import Task, TaskRef
from dask.bag import Bag
from dask.core import flatten
from dask.delayed import delayed
from dask.highlevelgraph import HighLevelGraph
from dask.utils import is_dataframe_like, is_series_like
from sklearn.utils.validation import check_is_fitted

from sktransfer._threads import dask_worker, renewed_in_forks

_KEPT = 2  # estimators that a process keeps ready
_ready: OrderedDict[str, Any] = OrderedDict()
# Of `_ready`, for moments.
_lock = renewed_in_forks(threading.Lock())
# Held by who prepares an estimator: several threads of a worker get one.
_preparing = renewed_in_forks(threading.Lock())


def on_partitions(
    estimator: Any, method: str, X: Any, empty: Callable[[Any], np.ndarray]
) -> da.Array:
    """Return the lazy result of a method of an estimator, called on each partition of `X`.

    Parameters
    ----------
    estimator : ImageEstimator
        As it is now: what happens to it later does not change the result.
    method : str
        Its name; it takes a sequence of images.
    X : dask array, bag, Series or data frame
        An array is partitioned along its first axis; what its other axes are cut into is joined.
    empty : callable
        `empty(estimator)` is what the method returns for no images: (0,) or (0, width).

    Returns
    -------
    dask.array.Array
        One chunk a partition; of unknown length, but for an array whose chunks are known.

    Raises
    ------
    TypeError, ValueError
        For what can be told from the shape and type of `X`. What is wrong with an image is raised
        when its partition is computed: the message names partition, row, file and reason.

    Notes
    -----
    The estimator travels once to each worker, as bytes: pickled as
    :class:`~sktransfer.FineTunedClassifier` says, without frozen blocks. A process rebuilds it
    once, whatever the number of partitions and threads.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> from sktransfer import PretrainedFeatureExtractor
    >>> images = da.from_array(np.zeros((3, 32, 32, 3), np.uint8), chunks=(2, -1, -1, -1))
    >>> rows = PretrainedFeatureExtractor(image_size=32).transform(images)
    >>> rows.shape, rows.chunks, rows.dtype
    ((3, 1280), ((2, 1), (1280,)), dtype('float32'))
    """
    estimator._validate_params()
    check_is_fitted(estimator)
    X = _checked(estimator, X)
    rows = empty(estimator)
    shipped = _Shipped(estimator)
    node = delayed(shipped, name=f"{type(estimator).__name__}-{shipped.token}", traverse=False)
    name = f"{method}-{uuid4().hex}"  # not a digest: files that failed may be mended
    run = partial(_run, method=method, empty=rows)
    zeros = (0,) * (rows.ndim - 1)
    layer: dict[Any, Any] = {}
    for i, part in enumerate(flatten(X.__dask_keys__())):
        # References: a bare key is taken for data by whoever sees this layer without the others.
        key = (name, i, *zeros)
        layer[key] = Task(key, run, TaskRef(node.key), TaskRef(part), i)
    graph = HighLevelGraph.from_collections(name, layer, [node, X])
    lengths = X.chunks[0] if isinstance(X, da.Array) else (np.nan,) * len(layer)
    return da.Array(graph, name, (lengths, *((n,) for n in rows.shape[1:])), meta=rows)


def _checked(estimator: Any, X: Any) -> Any:
    """Check what can be told without an image; return `X` with partitions of whole images."""
    if isinstance(X, da.Array):
        if X.ndim == 0:
            raise ValueError("X is a dask array without axes; pass one of images or of paths.")
        if X.dtype.kind in "biufc" and not np.isnan(X.shape[1:]).any():
            blank = np.broadcast_to(np.zeros((), X.dtype), (1, *X.shape[1:]))
            estimator.check_images(blank)
        return X.rechunk(dict.fromkeys(range(1, X.ndim), -1))
    if isinstance(X, Bag):
        return X
    if is_dataframe_like(X) or is_series_like(X):
        from dask.dataframe.utils import meta_nonempty

        estimator.check_images(meta_nonempty(X._meta).iloc[:1])
        return X.optimize()
    raise TypeError(
        f"Expected a dask array, bag, Series or data frame of images, got {type(X).__name__}: "
        "see dask.bag.from_delayed, dask.array.from_delayed, or pass X.compute()."
    )


class _Shipped:
    """An estimator as bytes. A scheduler that passes it on need not import what it holds."""

    def __init__(self, estimator: Any) -> None:
        self.data = cloudpickle.dumps(estimator)
        self.token = xxhash.xxh3_128_hexdigest(self.data)

    def estimator(self) -> Any:
        """Return this process's one copy, its network loaded."""
        if (estimator := self._ready_one()) is None:
            with _preparing:
                if (estimator := self._ready_one()) is None:  # nobody else has prepared it
                    estimator = self._prepared()
        return estimator

    def _ready_one(self) -> Any:
        with _lock:
            if self.token in _ready:
                _ready.move_to_end(self.token)
            return _ready.get(self.token)

    def _prepared(self) -> Any:
        estimator = pickle.loads(self.data)
        estimator.prepare()
        if estimator.n_jobs is None or estimator.n_jobs < 0:
            estimator.n_jobs = 1  # as many partitions run at once as there are cores
        with _lock:
            _ready[self.token] = estimator
            while len(_ready) > _KEPT:
                _ready.popitem(last=False)
        return estimator


def _run(shipped: _Shipped, part: Any, number: int, *, method: str, empty: np.ndarray) -> Any:
    """Compute one partition: an array, a Series, a data frame, or a list of a bag."""
    images = part if hasattr(part, "shape") else list(part)
    if len(images) == 0:
        return empty
    _compute_in_all_threads()
    estimator = shipped.estimator()
    try:
        # Other backends count what a dask worker may not use, or warn.
        with joblib.parallel_config("threading"):
            return getattr(estimator, method)(images)
    except (TypeError, ValueError) as error:
        if len(error.args) == 1:  # not a UnicodeDecodeError
            error.args = (f"partition {number}, {error}",)
        raise


def _compute_in_all_threads() -> None:
    """Let a network use the threads that a worker has: it runs on one batch at a time."""
    import torch

    worker = dask_worker()
    # Dask sets OMP_NUM_THREADS=1, as if several tasks could compute at once.
    if worker is not None and worker.state.nthreads > torch.get_num_threads():
        torch.set_num_threads(worker.state.nthreads)
