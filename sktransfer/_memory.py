"""One result per image on a `joblib.Memory`: the packed backend, batches of rows, claims."""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import os
import re
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import joblib
import numpy as np
from joblib._store_backends import (
    CacheItemInfo,
    CacheWarning,
    StoreBackendBase,
    StoreBackendMixin,
)
from xxhash import xxh3_64_intdigest

from sktransfer._store import Claims, Store, cannot, complain
from sktransfer._store_check import (
    FILE,
    TIME,
    batches,
    describe,
    drop,
    file_key,
    fill_rows,
    item_of,
    path_of,
    put,
    row_keys,
    row_prefix,
    touch,
    unwrap,
    wrap,
)

BACKEND = "sktransfer-lmdb"
_STORES: weakref.WeakValueDictionary[str, Store] = weakref.WeakValueDictionary()
_CLAIMS: dict[str, Claims] = {}
_REGISTRY = threading.Lock()


def check_memory(memory: None | str | os.PathLike | joblib.Memory) -> ImageMemory | None:
    """Make what a user gave as `memory` ready for the results of images.

    Parameters
    ----------
    memory : None, str, path-like or joblib.Memory
        A path opens a `joblib.Memory` on the packed store in the folder ``joblib`` below it; all
        objects of a process that name the same path share one open file. Put it on a local disk:
        network file systems keep LMDB's promises only among the processes of one machine.

    Returns
    -------
    ImageMemory or None
        None stands for no memory, such as ``joblib.Memory(location=None)``.

    Raises
    ------
    TypeError
        `memory` is something else.
    """
    if isinstance(memory, (str, os.PathLike)):
        memory = joblib.Memory(os.fsdecode(memory), backend=BACKEND, verbose=0)
    if memory is None:
        return None
    if not isinstance(memory, joblib.Memory):
        raise TypeError(
            f"memory must be None, a path or a joblib.Memory, got {memory!r} "
            f"of type {type(memory).__name__}."
        )
    return None if memory.store_backend is None else ImageMemory(memory)


class ImageMemory:
    """Rows of results on a `joblib.Memory`, read and written in batches.

    A row's key is `func_id`, a short string that names all that shapes the result but the image,
    and a digest of 16 bytes of the image's content. Trouble with the disk never raises: there is
    one warning per folder and process, and what cannot be read is a miss.

    Parameters
    ----------
    memory : joblib.Memory
        On any store backend; batches are fast on ``"sktransfer-lmdb"``.
    """

    def __init__(self, memory: joblib.Memory) -> None:
        self.memory = memory

    def __repr__(self) -> str:
        return f"ImageMemory({self.memory!r})"

    @property
    def _backend(self) -> Any:
        return self.memory.store_backend

    def read(self, func_id: str, digests: Sequence[bytes], out: np.ndarray) -> np.ndarray:
        """Fill the rows of `out` that are in the memory.

        Parameters
        ----------
        func_id : str
        digests : sequence of n bytes objects of length 16
        out : ndarray of shape (n, ...)
            A stored row of another shape or dtype is a miss. The rows of misses stay as they were.

        Returns
        -------
        ndarray of shape (n,), bool
            Which rows were filled.
        """
        if len(out) != len(digests):
            raise ValueError(f"{len(digests)} digests, but {len(out)} rows for their results.")
        if hasattr(self._backend, "load_items"):
            return self._backend.load_items(func_id, digests, out)
        hits = [self._load(func_id, digest, out[i : i + 1]) for i, digest in enumerate(digests)]
        return np.array(hits, bool)

    def write(self, func_id: str, digests: Sequence[bytes], rows: Iterable[np.ndarray]) -> None:
        """Keep ``rows[i]``, of any dtype but object, as the result of ``digests[i]``."""
        if isinstance(rows, np.ndarray):
            rows = [rows[i, ...] for i in range(len(rows))]  # scalars would lose their byte order
        pairs = [(d, np.asarray(row)) for d, row in zip(digests, rows, strict=True)]
        if hasattr(self._backend, "dump_items"):
            self._backend.dump_items(func_id, pairs)
            return
        # joblib warns for each item that it cannot write; once is enough
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CacheWarning)
            for digest, row in pairs:
                self._backend.dump_item([func_id, digest.hex()], row, verbose=self._verbose)
                if any(issubclass(w.category, CacheWarning) for w in caught):
                    break
        for warning in caught:
            if issubclass(warning.category, CacheWarning):
                complain(self._backend.location, cannot("written", warning.message))
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )

    @property
    def _verbose(self) -> int:
        return getattr(self._backend, "verbose", 0)

    def _load(self, func_id: str, digest: bytes, out: np.ndarray) -> bool:
        """Fill the one row of `out` from a store backend that knows no batches."""
        call_id = [func_id, digest.hex()]
        if not self._backend.contains_item(call_id):
            return False
        try:
            row = self._backend.load_item(
                call_id, verbose=self._verbose, timestamp=self.memory.timestamp or time.time()
            )
        except Exception as error:  # unpickling what is damaged may raise anything
            complain(self._backend.location, cannot("read", repr(error)))
            return False
        if not isinstance(row, np.ndarray) or row.shape != out.shape[1:]:
            return False
        # joblib gives arrays back in the machine's byte order
        same_type = row.dtype.newbyteorder("=") == out.dtype.newbyteorder("=")
        if same_type:
            out[0] = row
        return same_type

    def info(self) -> dict[str, int]:
        """Return ``n_entries`` and the ``n_bytes`` that they take."""
        if hasattr(self._backend, "info"):
            return self._backend.info()
        items = self._backend.get_items()
        return {"n_entries": len(items), "n_bytes": sum(item.size for item in items)}

    def claim(self, func_id: str, digests: Iterable[bytes]) -> list[bool]:
        """Take the right to compute these, as far as nobody else has it, without waiting.

        A caller reads, claims what is missing, *reads the claimed once more*, as another may have
        finished it in between, computes, writes and releases. What it did not get it defers.

        Returns
        -------
        list of bool
            False where another process or thread, or this one, holds the claim. The death of
            a process frees its claims.
        """
        return self._claims.take(_places(func_id, digests))

    def release(self, func_id: str, digests: Iterable[bytes]) -> None:
        """Give claims back, from any thread; what this process does not hold is left alone."""
        self._claims.give_back(_places(func_id, digests))

    @contextlib.contextmanager
    def claimed(self, func_id: str, digests: Iterable[bytes]) -> Iterator[list[bool]]:
        """Claim for the length of a ``with`` block; see `claim`."""
        places = _places(func_id, digests)
        mine: list[bool] = []
        try:
            self._claims.take(places, mine)
            yield mine
        finally:
            self._claims.give_back([p for p, is_mine in zip(places, mine, strict=False) if is_mine])

    def wait(self, func_id: str, digest: bytes) -> None:
        """Return once nobody holds the claim of this key; then read, or claim it.

        Raises
        ------
        RuntimeError
            This thread holds claims: two that wait for each other would wait forever.
        """
        self._claims.wait(_places(func_id, [digest])[0])

    @functools.cached_property
    def _claims(self) -> Claims:
        folder = getattr(self._backend, "location", None)
        if isinstance(self._backend, LmdbStoreBackend):
            with contextlib.suppress(OSError):
                os.makedirs(self._backend.location, exist_ok=True)
        if not (isinstance(folder, str) and os.path.isdir(folder)):
            return Claims(None)  # a store that is not local: everybody gets every claim
        with _REGISTRY:
            return _CLAIMS.setdefault(os.path.realpath(folder), Claims(folder))

    def __getstate__(self) -> dict[str, Any]:
        return {"memory": self.memory}


def _places(func_id: str, digests: Iterable[bytes]) -> list[int]:
    return [xxh3_64_intdigest(key) >> 2 for key in row_keys(func_id, digests)]  # 62 bits


# ------------------------------------------------------------------------ the packed backend


class LmdbStoreBackend(StoreBackendBase, StoreBackendMixin):
    """A joblib store backend that packs all entries of a folder into one file.

    The files that joblib would write are values under their paths; rows of images have keys of
    their own and a pair of methods for batches. Deleted entries make room for new ones; `clear`,
    and a `Memory.reduce_size` that frees the larger part, also shrink the file.
    """

    def configure(
        self, location: str, verbose: int = 1, backend_options: dict[str, Any] | None = None
    ) -> None:
        """Only take notes: the file is made at first use, where trouble is a warning."""
        self.location = os.path.abspath(location)
        self.verbose = verbose
        self.compress = (backend_options or {}).get("compress", False)
        self.mmap_mode = None  # a packed file holds no arrays that could be mapped one by one

    @property
    def _store(self) -> Store:
        # The strong reference keeps the file open as long as a backend of it lives.
        if "_opened" not in self.__dict__:
            folder = os.path.realpath(self.location)
            with _REGISTRY:
                self._opened = _STORES.get(folder) or _STORES.setdefault(folder, Store(folder))
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def _try(self, job: Any, default: Any, *, write: bool = False) -> Any:
        try:
            return self._store.run(job, write=write)
        except OSError as error:
            complain(self.location, cannot("written" if write else "read", error))
            return default

    # rows of images

    def load_items(self, func_id: str, digests: Iterable[bytes], out: np.ndarray) -> np.ndarray:
        """See `ImageMemory.read`."""
        keys = row_keys(func_id, digests)
        target = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)

        def job(txn: Any, rows: Any, files: Any, used: Any) -> Any:
            hits, n_damaged = fill_rows(txn.get, keys, target)  # rows are the transaction's default
            found = keys if hits.all() else [k for k, hit in zip(keys, hits, strict=True) if hit]
            return hits, n_damaged, self._store.stale(found, txn, used)

        nothing: Any = np.zeros(len(keys), bool), 0, []
        hits, n_damaged, stale = self._try(job, nothing)
        self._store.touch(stale)
        if target is not out:
            out[hits] = target[hits]
        if n_damaged:
            self._store.doubt()
            complain(
                self.location,
                f"were damaged by something else than sktransfer: the checksums of {n_damaged} in "
                f"this batch are wrong. They will be computed again.",
                "Results in",
            )
        return hits

    def dump_items(self, func_id: str, pairs: Sequence[tuple[bytes, np.ndarray]]) -> None:
        """See `ImageMemory.write`."""
        keys = row_keys(func_id, [digest for digest, _ in pairs])
        items = (
            (key, wrap(key, describe(row.dtype, row.shape) + row.tobytes()))
            for key, (_, row) in zip(keys, pairs, strict=True)
        )
        for batch in batches(items):
            self._try(
                lambda txn, rows, files, used, batch=batch: put(txn, rows, used, batch),
                None,
                write=True,
            )

    def info(self) -> dict[str, int]:
        """See `ImageMemory.info`."""
        return self._store.info()

    # joblib's files

    def _open_item(self, f: str, mode: str) -> io.BytesIO:
        key = file_key(f, self.location)
        if "w" in mode:
            return _NewFile(lambda body: self._write_file(key, body))

        def job(txn: Any, rows: Any, files: Any, used: Any) -> Any:
            value = txn.get(key, db=files)
            body = None if value is None else unwrap(FILE + key, value)
            return body, self._store.stale([item_of(key)], txn, used)

        body, stale = self._try(job, (None, []))
        if body is None:
            raise FileNotFoundError(f"no entry {f}")
        self._store.touch(stale)
        return io.BytesIO(body)

    def _write_file(self, key: bytes, body: bytes) -> None:
        def job(txn: Any, rows: Any, files: Any, used: Any) -> None:
            txn.put(key, wrap(FILE + key, body), db=files)
            touch(txn, used, [item_of(key)])

        self._try(job, None, write=True)

    def _concurrency_safe_write(self, to_write: Any, filename: str, write_func: Any) -> None:
        write_func(to_write, filename)  # a transaction needs no temporary name

    def _item_exists(self, location: str) -> bool:
        key = file_key(location, self.location)

        def job(txn: Any, rows: Any, files: Any, used: Any) -> bool:
            cursor, inside = txn.cursor(files), key + b"/"
            below = cursor.set_range(inside) and bytes(cursor.key()).startswith(inside)
            return below or txn.get(key, db=files) is not None

        return self._try(job, False)

    def _move_item(self, src: str, dst: str) -> None:
        with self._open_item(src, "rb") as file:
            self._write_file(file_key(dst, self.location), file.read())
        self._delete([src])

    def create_location(self, location: str) -> None:
        """Do nothing: there are no folders."""

    def clear_location(self, location: str) -> None:
        """Delete an entry, all of a function, or all there is."""
        if os.path.abspath(location) == self.location:
            self._store.clear()
        else:
            self._delete([location])

    def clear_path(self, call_id: Sequence[str]) -> None:
        """Delete all of a function, rows of images as well."""
        names = call_id[0], row_keys(call_id[0], [b""])[0].hex()
        self._delete([os.path.join(self.location, name) for name in names])

    def get_items(self) -> list[CacheItemInfo]:
        """Return rows and results of functions, with their sizes and times of last access."""

        def job(txn: Any, rows: Any, files: Any, used: Any) -> tuple[Any, Any]:
            sizes = {bytes(key): len(value) for key, value in txn.cursor(rows)}
            for key, value in txn.cursor(files):
                item = item_of(bytes(key))
                if re.search(b"[0-9a-f]{32}$", item):
                    sizes[item] = sizes.get(item, 0) + len(value)
            return sizes, {bytes(k): TIME.unpack(value)[0] for k, value in txn.cursor(used)}

        sizes, times = self._try(job, ({}, {}))
        return [
            CacheItemInfo(
                path_of(key, self.location),
                size,
                datetime.datetime.fromtimestamp(times.get(key, 0.0)),
            )
            for key, size in sizes.items()
        ]

    def enforce_store_limits(
        self,
        bytes_limit: int | str | None,
        items_limit: int | None = None,
        age_limit: datetime.timedelta | None = None,
    ) -> None:
        """Delete what was not read for the longest time; see `joblib.Memory.reduce_size`."""
        items = self._get_items_to_delete(bytes_limit, items_limit, age_limit)
        if items:
            self._delete([item.path for item in items])
            self._store.shrink()

    def _delete(self, paths: Iterable[str]) -> None:
        keys = [file_key(path, self.location) for path in paths]

        def job(txn: Any, rows: Any, files: Any, used: Any) -> None:
            for key in keys:
                if (row := row_prefix(key)) is not None:
                    drop(txn, rows, row)
                    drop(txn, used, row)
                for table, file in ((files, key), (used, FILE + key)):
                    txn.delete(file, db=table)
                    drop(txn, table, file + b"/")

        self._store.run(job, write=True)


class _NewFile(io.BytesIO):
    """A file that is kept at the end of its ``with`` block, if that ends well."""

    def __init__(self, keep: Callable[[bytes], None]) -> None:
        super().__init__()
        self._keep = keep

    def __exit__(self, kind: Any, *details: Any) -> None:
        if kind is None:
            self._keep(self.getvalue())
        super().__exit__(kind, *details)


def _after_fork() -> None:
    """Let a child open its own files: neither LMDB nor locks survive a fork."""
    global _REGISTRY
    _REGISTRY = threading.Lock()
    for store in _STORES.values():
        store.forget()
    for claims in _CLAIMS.values():
        claims.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
joblib.register_store_backend(BACKEND, LmdbStoreBackend)
