"""A stream of images to results, through the memory.

Files are read and digested in threads, looked up, loaded in threads if they are missing, put into
batches, computed, and their results written back.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from sktransfer._bars import tqdm
from sktransfer._engine.results import Names, Write, why_not_finite
from sktransfer._engine.runner import Runner
from sktransfer._memory.memory import ImageMemory
from sktransfer._threads import n_stream_threads, one_core_threads

_LOOKUP = 64  # images looked up, and claimed, at once
_TASKS = 8  # that load a batch, on a GPU: each takes Python's lock from the others
# Images of a task that loads and runs them: a core goes faster while it does the same thing.
_TOGETHER = 4
_T = TypeVar("_T")


class Images(Protocol):
    """What can be streamed."""

    def __len__(self) -> int: ...

    def digest(self, i: int) -> bytes:
        """Return 16 bytes that stand for the content of image `i`; called in threads."""

    def load(self, i: int, digest: bytes | None = None) -> torch.Tensor:
        """Return image `i`, uint8 (3, height, width); called in threads."""

    def where(self, i: int) -> str:
        """Return the row of image `i` and, if there is one, its file: for messages."""


@dataclass
class _Part:
    """One of the results, or errors, of a task of several images."""

    task: Future[list[Any]]
    number: int

    def is_good(self) -> bool:
        """Tell whether there is a result by now."""
        if not self.task.done() or self.task.cancelled() or self.task.exception() is not None:
            return False
        return not isinstance(self.task.result()[self.number], Exception)

    def result(self) -> Any:
        loaded = self.task.result()[self.number]
        if isinstance(loaded, Exception):
            raise loaded
        return loaded


@dataclass
class _Miss:
    """An image that must be computed: the rows it fills and, soon, what its computation takes."""

    rows: list[int]
    digest: bytes
    loaded: _Part
    done: bool = False


class Stream(ABC):
    """One pass over images: look their results up, compute and keep what is missing.

    Parameters
    ----------
    runner : Runner
    image_size : tuple of (int, int)
    memory : ImageMemory or None
    batch_size : int or "auto"
        Images in flight at once, and on a GPU in a batch.
    n_jobs : int or None
        Threads that read and decode and, with OpenVINO, run the network; None for one a core and
        two spare ones, or what joblib leaves to a worker.
    verbose : bool
        Show a progress bar.
    progress : object with `update(n)`, default=None
        A bar of the caller's that is moved instead.

    Attributes
    ----------
    n_computed : int
        Images that ran through the network.
    shared_bar : object with `update(n)` or None
        As given by `progress`.
    """

    unit = "image"  # of the bar

    def __init__(
        self,
        runner: Runner,
        image_size: tuple[int, int],
        *,
        memory: ImageMemory | None = None,
        batch_size: int | str = "auto",
        n_jobs: int | None = None,
        verbose: bool | int = False,
        progress: Any = None,
    ) -> None:
        self.runner, self.memory = runner, memory
        self.batch_size, self.verbose = runner.batch_size(batch_size, image_size), verbose
        self.shared_bar = progress
        self.step = runner.step(batch_size, image_size)  # fewer once the memory did not suffice
        self.in_threads = False  # whether images run by themselves, in the threads that load them
        self.n_threads = n_stream_threads(n_jobs)
        self.n_computed = 0
        self._is_ready = False

    @abstractmethod
    def names(self) -> Names:
        """Name the results; called once for a pass, before anything is looked up."""

    def _ensure_ready(self) -> None:
        """Get ready, once for a pass: what computes is that by which the results are named."""
        if not self._is_ready:
            self._get_ready()
            self._is_ready = True

    def _get_ready(self) -> None:
        """Make what runs the network; called before the first image is computed."""
        self.in_threads = False

    def _tell_size(self) -> None:
        """Tell the user if much is about to be written to the memory."""
        return

    @abstractmethod
    def _load(self, row: int, digest: bytes | None) -> Any:
        """Fetch what the computation of a row takes; called in threads."""

    def _load_several(self, rows: Sequence[int], digests: Sequence[bytes | None]) -> list[Any]:
        """Fetch what the computation of some rows takes, or the error of a row; in threads."""
        loaded: list[Any] = []
        for row, digest in zip(rows, digests, strict=True):
            try:
                loaded.append(self._load(row, digest))
            except Exception as error:
                loaded.append(error)
        return loaded

    @abstractmethod
    def _run(self, loaded: list[Any]) -> list[Any]:
        """Compute an array-like for each result that is wanted, then for each by-product.

        Of single images, and in threads, if that is how the network runs.
        """

    def _fill_outs(self, images: Images, outs: Sequence[np.ndarray]) -> None:
        """Fill `outs`, for each wanted result an array with a row for each image."""
        self._images, self._outs, self._is_ready, self._is_over = images, outs, False, False
        self._names = Names([], [], set(), "") if self.memory is None else self.names()
        self._were_read = np.zeros((len(outs), len(images)), bool)
        self._owner = object()  # of claims: what is ours to compute, and not yet in the memory
        self._misses: dict[bytes, _Miss] = {}  # those of them on their way through the network
        self._tell_size()
        self._threads = one_core_threads(self.n_threads)
        self._writer = ThreadPoolExecutor(1)
        silent = not self.verbose or self.shared_bar is not None
        bar = tqdm(total=len(images), unit=self.unit, desc=self.runner.name, disable=silent)
        self._progress = self.shared_bar or bar
        filling = threading.Lock()
        parts = filling, self._threads, self._writer, self._owner
        cleaner = threading.Thread(target=self._clean_up, args=parts, daemon=True)
        try:
            # A lock is left in one step, whatever happens; Ctrl-C could cut off what a `finally`
            # does, and a second one what it does in answer to the first.
            with filling:
                cleaner.start()
                rows: Sequence[int] = range(len(images))
                while rows:
                    rows = self._fill(rows)
        finally:
            if cleaner.is_alive():
                cleaner.join()
            bar.close()

    def _clean_up(
        self, filling: threading.Lock, threads: Executor, writer: Executor, owner: object
    ) -> None:
        """Write what was computed, once `filling` is free, and give all claims back.

        In a thread of its own, which Ctrl-C does not reach.
        """
        with filling:
            self._is_over = True
            threads.shutdown(wait=False, cancel_futures=True)
            writer.shutdown()
            if self.memory is not None:
                self.memory.release_all(owner)
            threads.shutdown()

    def _fill(self, rows: Sequence[int]) -> list[int]:
        """Fill `rows`, but for those that another process computes just now; return these."""
        others: dict[int, bytes] = {}
        misses = self._all(rows) if self.memory is None else self._missing(rows, others)
        writes: deque[Future[None]] = deque()
        # Decoding runs two batches ahead of the network, writing two behind it.
        groups = _groups(_ahead(misses, 2 * self.batch_size), self.batch_size)
        started = ((group, self._compute(group)) for group in groups)
        # A GPU works on a batch while the results of the one before are taken.
        n_running = 1 if self.runner.device.type == "cuda" else 0
        for group, values in _ahead(started, n_running):
            good, results = _finite(group, self._deliver(group, values))
            if self.memory is not None:
                writes.append(self._writer.submit(self._store, good, results))
                if len(writes) > 2:
                    writes.popleft().result()
            if len(good) < len(group):
                wrong = next(miss for miss in group if miss not in good)
                where = self._images.where(min(wrong.rows))
                raise ValueError(f"{where}: {why_not_finite(self.runner)}")
        for write in writes:
            write.result()
        if others and self.memory is not None:
            self.memory.wait(self._names.claim, next(iter(others.values())), self._owner)
        return list(others)

    def _all(self, rows: Sequence[int]) -> Iterator[_Miss]:
        for start in range(0, len(rows), _LOOKUP):
            part = rows[start : start + _LOOKUP]
            for row, loaded in zip(part, self._submit(part, [None] * len(part)), strict=True):
                yield _Miss([row], row.to_bytes(8, "little"), loaded)

    def _missing(self, rows: Sequence[int], others: dict[int, bytes]) -> Iterator[_Miss]:
        """Fill what the memory holds, yield what it lacks; `others` gets what is not ours."""
        chunks = (rows[start : start + _LOOKUP] for start in range(0, len(rows), _LOOKUP))
        digested = ((chunk, self._threads.submit(self._digest, chunk)) for chunk in chunks)
        for chunk, future in _ahead(digested, self.n_threads):
            digests = dict(zip(chunk, future.result(), strict=True))
            lacking: dict[bytes, list[int]] = {}  # rows of each distinct image
            for row in self._read(digests):
                lacking.setdefault(digests[row], []).append(row)
            for digest in list(lacking):
                if miss := self._misses.get(digest):  # the writer may take it out at any time
                    self._join(miss, lacking.pop(digest))
            mine = self._claim(lacking, others)
            loading = self._submit([lacking[digest][0] for digest in mine], mine)
            for digest, loaded in zip(mine, loading, strict=True):
                self._misses[digest] = _Miss(lacking[digest], digest, loaded)
                yield self._misses[digest]

    def _claim(self, lacking: dict[bytes, list[int]], others: dict[int, bytes]) -> list[bytes]:
        """Take what nobody computes; another may have finished it since it was looked up."""
        assert self.memory is not None
        digests = list(lacking)
        are_free = self.memory.claim(self._names.claim, digests, self._owner)
        mine = []
        for digest, is_free in zip(digests, are_free, strict=True):
            if is_free:
                mine.append(digest)
            else:
                others |= dict.fromkeys(lacking[digest], digest)
        unread = self._read({row: digest for digest in mine for row in lacking[digest]})
        left = {digest for digest in mine if set(lacking[digest]) & unread}
        self._release([digest for digest in mine if digest not in left])
        return [digest for digest in mine if digest in left]

    def _read(self, digests: dict[int, bytes]) -> set[int]:
        """Fill the rows that the memory holds; return the others."""
        assert self.memory is not None
        rows = list(digests)
        if not rows:
            return set()
        hits = np.ones(len(rows), bool)
        # Rows that show the same image come together, so they need not be in order.
        consecutive = rows == list(range(rows[0], rows[0] + len(rows)))
        parts = zip(self._names.wanted, self._outs, self._were_read, strict=True)
        for key, out, were_read in parts:
            places = out[rows[0] : rows[-1] + 1] if consecutive else out[rows]
            found = self.memory.read(key, list(digests.values()), places)
            if not consecutive:
                out[rows] = places
            were_read[rows] = found
            hits &= found
        self._progress.update(int(hits.sum()))
        return {row for row, hit in zip(rows, hits, strict=True) if not hit}

    def _join(self, miss: _Miss, rows: list[int]) -> None:
        """Let `rows`, which show the same image, share what is computed for it."""
        if miss.done:
            for out in self._outs:
                out[rows] = out[miss.rows[0]]
            self._progress.update(len(rows))
        else:
            miss.rows.extend(rows)

    def _digest(self, rows: Sequence[int]) -> list[bytes]:
        return [self._images.digest(row) for row in rows]

    def _submit(self, rows: Sequence[int], digests: Sequence[bytes | None]) -> Iterator[_Part]:
        """Load rows in threads, when they are asked for, and compute them there if images run
        by themselves.

        Several are one task, but of few images there are as many tasks as threads can share.
        """
        if not rows:
            return
        self._ensure_ready()
        if self.in_threads:
            for_each = min(len(rows), len(self._images) // 4) // self.n_threads  # some tasks each
            size = min(_TOGETHER, self.batch_size, for_each)
        else:  # threads that only load take Python's lock from each other: so few tasks for a batch
            n_tasks = 2 * self.n_threads
            size = min(self.batch_size // min(_TASKS, n_tasks), len(self._images) // n_tasks)
        size = max(1, size)
        function = self._load_and_run if self.in_threads else self._load_several
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            task = self._threads.submit(function, rows[part], digests[part])
            yield from (_Part(task, number) for number in range(len(rows[part])))

    def _load_and_run(self, rows: Sequence[int], digests: Sequence[bytes | None]) -> list[Any]:
        found = self._load_several(rows, digests)
        for number, loaded in enumerate(found):
            if self._is_over:  # nobody waits for what is left
                raise CancelledError
            if not isinstance(loaded, Exception):
                try:
                    found[number] = self._run([loaded])
                except Exception as error:
                    found[number] = error
        return found

    def _compute(self, group: Sequence[_Miss]) -> list[Any]:
        """Compute an array-like for each result of a group; see `_run`."""
        try:
            loaded = [miss.loaded.result() for miss in group]
        except BaseException:
            self._save_finished(group)
            raise
        if self.in_threads:
            return [np.concatenate(part) for part in zip(*loaded, strict=True)]

        def run(step: int) -> list[Any]:
            self.step = step
            return self._run(loaded)

        return self.runner.in_smaller_steps(run, self.step)

    def _save_finished(self, group: Sequence[_Miss]) -> None:
        """Keep what threads computed of a group in which an image failed."""
        if not self.in_threads or self.memory is None:
            return
        if finished := [miss for miss in group if miss.loaded.is_good()]:
            results = self._deliver(finished, self._compute(finished))
            self._writer.submit(self._store, *_finite(finished, results))

    def _deliver(self, group: Sequence[_Miss], values: Sequence[Any]) -> list[Write]:
        """Fill the rows of a group; return all results of it, for the memory."""
        arrays = [np.asarray(value) for value in values]
        self.n_computed += len(group)
        rows = np.array([row for miss in group for row in miss.rows])
        numbers = np.array([number for number, miss in enumerate(group) for _ in miss.rows])
        # By-products have no out. What the memory has stays: another program rounds otherwise.
        for out, array, were_read in zip(self._outs, arrays, self._were_read, strict=False):
            lacking = ~were_read[rows]
            out[rows[lacking]] = array[numbers[lacking]]
        for miss in group:
            miss.done = True
        self._progress.update(len(rows))
        digests = [miss.digest for miss in group]
        names = [*self._names.wanted, *self._names.by_products]
        if self.memory is None:
            names = [""] * len(arrays)
        return [Write(name, digests, rows) for name, rows in zip(names, arrays, strict=True)]

    def _store(self, group: Sequence[_Miss], results: list[Write]) -> None:
        """Write results; runs in a thread of its own."""
        assert self.memory is not None
        for result in results:
            if result.key in self._names.kept:
                text = self._names.texts.get(result.key, "")
                self.memory.write(result.key, result.digests, result.rows, text)
        digests = [miss.digest for miss in group]
        self._release(digests)
        for digest in digests:
            del self._misses[digest]

    def _release(self, digests: Sequence[bytes]) -> None:
        if self.memory is not None:
            self.memory.release(self._names.claim, digests, self._owner)


def _finite(group: Sequence[_Miss], results: list[Write]) -> tuple[list[_Miss], list[Write]]:
    """Leave out the images of a group of which a result holds NaN or infinity."""
    bad = set().union(*(result.not_finite() for result in results))
    if not bad:
        return list(group), results
    return [m for m in group if m.digest not in bad], [r.without(bad) for r in results]


def _ahead(items: Iterable[_T], n: int) -> Iterator[_T]:
    """Yield `items`, taking each from its source while up to `n` before it still wait."""
    waiting: deque[_T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > n:
            yield waiting.popleft()
    yield from waiting


def _groups(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
