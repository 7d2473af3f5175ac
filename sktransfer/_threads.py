"""How many threads read and decode images."""

from __future__ import annotations

import sys
from typing import Any

import joblib


def n_threads(n_jobs: int | None) -> int:
    """Return how many threads read and decode images, for the `n_jobs` of an estimator.

    None or -1 is one a core, or what joblib leaves to a worker process. In a task of a dask worker
    it is one: the worker runs as many tasks at once as it has cores, where joblib would count
    those of the whole cluster, or warn.
    """
    if dask_worker() is None:
        return joblib.effective_n_jobs(-1 if n_jobs is None else n_jobs)
    return 1 if n_jobs is None or n_jobs < 0 else n_jobs


def dask_worker() -> Any:
    """Return the dask worker whose task runs in this thread, or None."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return distributed.get_worker()
    except ValueError:
        return None
