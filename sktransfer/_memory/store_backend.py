"""The packed store backend: all entries of a `joblib.Memory` in one file."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import joblib
import numpy as np
from joblib._store_backends import CacheItemInfo, StoreBackendBase, StoreBackendMixin
from joblib.disk import memstr_to_bytes

from sktransfer._memory.store import Store, cannot, complain, open_store
from sktransfer._memory.store_format import (
    FILE,
    NAME,
    batches,
    describe,
    drop,
    file_key,
    fill_rows,
    item_of,
    name_key,
    path_of,
    put,
    row_keys,
    row_prefix,
    time_of,
    touch,
    unwrap,
    wrap,
)

BACKEND = "sktransfer-lmdb"
COMPANIONS = "compiled"  # the folder of files that other programs keep next to the results


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
            self._opened = open_store(self.location)
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
            hit_keys = keys if hits.all() else [k for k, hit in zip(keys, hits, strict=True) if hit]
            return hits, n_damaged, self._store.stale(hit_keys, txn, used)

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

    def dump_items(
        self, func_id: str, pairs: Sequence[tuple[bytes, np.ndarray]], text: str = ""
    ) -> None:
        """See `ImageMemory.write`."""
        name = name_key(func_id), text.encode(errors="replace")
        keys = row_keys(func_id, [digest for digest, _ in pairs])
        items = (
            (key, wrap(key, describe(row.dtype, row.shape) + row.tobytes()))
            for key, (_, row) in zip(keys, pairs, strict=True)
        )
        for batch in batches(items):
            self._try(
                lambda txn, rows, files, used, batch=batch: put(txn, rows, used, batch, name),
                None,
                write=True,
            )

    def shares(self) -> list[tuple[str, int, int]]:
        """See `ImageMemory.shares`."""

        def job(txn: Any, rows: Any, files: Any, used: Any) -> list[tuple[str, int, int]]:
            counts: dict[bytes, list[int]] = {}
            for key, value in txn.cursor(rows):
                share = counts.setdefault(bytes(key[:16]), [0, 0])
                share[0] += 1
                share[1] += len(value)
            together: dict[str, list[int]] = {}
            for prefix, (n_rows, n_bytes) in counts.items():
                text = bytes(txn.get(NAME + prefix, b"", db=used)).decode(errors="replace")
                share = together.setdefault(text, [0, 0])
                share[0] += n_rows
                share[1] += n_bytes
            return [(text, share[0], share[1]) for text, share in together.items()]

        return self._try(job, [])

    def info(self) -> dict[str, int]:
        """Count results, and the bytes of their pages."""
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
        """Delete an entry, all of a function, or all there is, companions included."""
        if os.path.abspath(location) == self.location:
            self._store.clear()
            delete_companions(self.location)
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
            return sizes, {bytes(k): time_of(value) for k, value in txn.cursor(used)}

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
        """Delete what was not read for the longest time; see `joblib.Memory.reduce_size`.

        The bytes of companions count. If they alone exceed the limit, all of them are deleted.
        """
        if bytes_limit is not None:
            limit = memstr_to_bytes(bytes_limit) if isinstance(bytes_limit, str) else bytes_limit
            if n_companion_bytes(self.location) > limit:
                delete_companions(self.location)
            bytes_limit = max(0, limit - n_companion_bytes(self.location))
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


def n_companion_bytes(location: str) -> int:
    """Return the bytes of the files in the folder of companions of a memory."""
    total = 0
    for folder, _, names in os.walk(os.path.join(location, COMPANIONS)):
        for name in names:
            with contextlib.suppress(OSError):  # just deleted
                total += os.path.getsize(os.path.join(folder, name))
    return total


def delete_companions(location: str) -> None:
    """Delete the folder of companions of a memory, as far as that is allowed."""
    shutil.rmtree(os.path.join(location, COMPANIONS), ignore_errors=True)


class _NewFile(io.BytesIO):
    """A file that is kept at the end of its ``with`` block, if that ends well."""

    def __init__(self, keep: Callable[[bytes], None]) -> None:
        super().__init__()
        self._keep = keep

    def __exit__(self, kind: Any, *details: Any) -> None:
        if kind is None:
            self._keep(self.getvalue())
        super().__exit__(kind, *details)


joblib.register_store_backend(BACKEND, LmdbStoreBackend)
