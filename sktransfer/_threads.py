"""Threads that decode images and that solve: how many, their cores, their locks after a fork."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import joblib
from threadpoolctl import ThreadpoolController

_Lock = TypeVar("_Lock")


def n_threads(n_jobs: int | None) -> int:
    """Return how many threads read and decode images, for the `n_jobs` of an estimator.

    None or -1 is one a core, or what joblib leaves to a worker process. In a task of a dask worker
    it is one: the worker runs as many tasks at once as it has cores, where joblib would count
    those of the whole cluster, or warn. So it is in a daemonic process, such as a worker of a pool
    of `multiprocessing`: joblib would warn of processes, which are not what is asked for.
    """
    n_jobs = -1 if n_jobs is None else n_jobs
    if dask_worker() is not None or multiprocessing.current_process().daemon:
        return 1 if n_jobs < 0 else n_jobs
    n = joblib.effective_n_jobs(n_jobs)
    return n if n_jobs >= 0 else int(max(1, min(n, _share_of_worker() + 1 + n_jobs)))


def _share_of_worker() -> float:
    """Return the cores that joblib leaves to its worker, if this process is one; else infinity."""
    if not multiprocessing.current_process().name.startswith("LokyProcess"):
        return math.inf
    share = os.environ.get("OMP_NUM_THREADS", "")
    return int(share) if share.isdigit() else math.inf


def n_stream_threads(n_jobs: int | None) -> int:
    """Return how many threads take images from files to results, for the `n_jobs` of an estimator.

    With all cores there are two more, so that no core is idle where threads can't go on.
    """
    n = n_threads(n_jobs)
    return n + 2 if n > 1 and n_jobs in (None, -1) else n


def dask_worker() -> Any:
    """Return the dask worker whose task runs in this thread, or None."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return distributed.get_worker()
    except ValueError:
        return None


def one_core_threads(n: int) -> ThreadPoolExecutor:
    """Return a pool of threads in which torch's operations take one core each."""
    return ThreadPoolExecutor(n, initializer=limit_to_one_core)


def limit_to_one_core() -> AbstractContextManager[Any]:
    """Let torch's operations take one core each in this thread; until the end of a `with`, if any.

    For a few images several cost more: on a busy machine, those that are ready wait for the others.
    """
    import torch  # here, as dask's scheduler imports this module

    torch.get_num_threads()  # sets this thread's number, which is then replaced
    limits: AbstractContextManager[Any] = _thread_pools().limit(limits=1, user_api="openmp")
    return limits


@functools.cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


def call_in_forks(function: Callable[[], None]) -> None:
    """Have every child of a fork call `function` when it starts."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def renewed_in_forks(lock: _Lock) -> _Lock:
    """Return a lock of a module, which is free in a child even if a thread of its parent held it.

    It is the same object: other modules may have imported it.
    """
    call_in_forks(lock._at_fork_reinit)  # type: ignore[attr-defined]
    return lock


def called_once(function: Callable[[], Any]) -> Any:
    """Return a function that keeps its result, and that several threads may be the first to call.

    `functools.cache` alone lets each of them call, and keeps one of the results. `cache_info` tells
    of it as there.
    """
    lock, cached = renewed_in_forks(threading.RLock()), functools.cache(function)

    @functools.wraps(function)
    def call() -> Any:
        with lock:
            return cached()

    call.cache_info = cached.cache_info  # type: ignore[attr-defined]
    return call


class WithoutWarnings:
    """A context that hides a category of warnings, and that several threads may enter at once.

    Where one of them leaves later than another, `warnings.catch_warnings` would hide them for good.

    Parameters
    ----------
    category : type of Warning
    message : str, default=""
        A regular expression that their messages match from the start.
    """

    def __init__(self, category: type[Warning], message: str = "") -> None:
        self.category, self.message, self._n_inside = category, message, 0
        self._lock = renewed_in_forks(threading.Lock())
        self._restoring = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._n_inside:
                self._restoring = warnings.catch_warnings()
                self._restoring.__enter__()
                warnings.filterwarnings("ignore", self.message, self.category)
            self._n_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                self._restoring.__exit__(None, None, None)


_SMALL = 2_500_000  # values of rows: see benchmarks/busy_machine.py
_limiting_blas = renewed_in_forks(threading.Lock())


@contextmanager
def small_solve(n_values: int) -> Iterator[None]:
    """Let a solve on rows of so many values take one core, if they are few.

    Where other programs run, several threads cost many times the work, as those that are ready
    wait for the one that has to wait for a core (`benchmarks/busy_machine.py`). Fits of a search on
    few values run in threads of this process: other processes take longer to start than such fits
    do. A solve on more values takes only as many cores as other programs leave when it begins.

    Parameters
    ----------
    n_values : int
        Rows times features.
    """
    if n_values <= _SMALL:
        with search_in_threads():
            yield
    elif (n_cores := _free_cores()) is None:
        yield
    else:
        with _limited(n_cores):
            yield


@contextmanager
def search_in_threads() -> Iterator[None]:
    """Let the fits of a search run in threads of this process, each on one core."""
    with _limited(1), joblib.parallel_config("threading"):
        yield


@contextmanager
def _limited(n_cores: int) -> Iterator[None]:
    # OpenMP has a limit for each thread, BLAS one for the process. Who comes second leaves that
    # alone: it would restore the limit of the first, maybe after that one is gone.
    is_first = _limiting_blas.acquire(blocking=False)
    try:
        pools = ThreadpoolController()  # of the libraries that are loaded by now
        if not is_first:  # before threadpoolctl 3.8, pools without a limit are restored as well
            pools = pools.select(user_api="openmp")
        limits: dict[str, int] = {}
        for pool in pools.lib_controllers:  # nobody gets more threads than it had
            limits[pool.user_api] = min(limits.get(pool.user_api, n_cores), pool.num_threads)
        with pools.limit(limits=limits):
            yield
    finally:
        if is_first:
            _limiting_blas.release()


def _free_cores() -> int | None:
    """Return how many cores other programs leave, one at least; None if all, or not known."""
    try:
        others = min(_n_running() for _ in range(3)) - 1  # a moment's work of others is no load
    except (OSError, ValueError, IndexError):  # not Linux
        return None
    return max(1, (os.cpu_count() or 1) - others) if others > 0 else None


def _n_running() -> int:
    """Return how many threads of the machine run or wait for a core, this one included."""
    time.sleep(0.002)
    with open("/proc/loadavg") as file:
        return int(file.read().split()[3].partition("/")[0])
