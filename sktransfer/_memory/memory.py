"""One result per image on a `joblib.Memory`: batches of rows, and claims to compute them."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import joblib
import numpy as np
from joblib._store_backends import CacheWarning, FileSystemStoreBackend
from xxhash import xxh3_64_intdigest

from sktransfer._memory.claims import Claims, open_claims
from sktransfer._memory.store import cannot, complain
from sktransfer._memory.store_backend import (
    BACKEND,
    COMPANIONS,
    LmdbStoreBackend,
    n_companion_bytes,
)
from sktransfer._memory.store_format import row_keys
from sktransfer._threads import WithoutWarnings, renewed_in_forks

_unwritten = WithoutWarnings(CacheWarning)  # of joblib, for each item; once is enough
_asking_why = renewed_in_forks(threading.Lock())


def check_memory(memory: None | str | os.PathLike | joblib.Memory) -> ImageMemory | None:
    """Make what a user gave as `memory` ready for the results of images.

    Parameters
    ----------
    memory : None, str, path-like or joblib.Memory
        A path opens a `joblib.Memory` on the packed store in the folder ``joblib`` below it. All
        objects of a process that name the same path share one file, which is open while it is used:
        a process keeps a few of these files open, the last used. Put it on a local disk:
        network file systems keep LMDB's promises only among the processes of one machine.

    Returns
    -------
    ImageMemory or None
        None stands for no memory, such as ``joblib.Memory(location=None)``.

    Raises
    ------
    TypeError
        `memory` is something else.
    ValueError
        It is an empty string or a file.
    """
    if isinstance(memory, (str, os.PathLike)):
        if not os.fsdecode(memory):
            raise ValueError("memory='' names no folder; pass None for no memory.")
        if os.path.isfile(memory):
            raise ValueError(f"memory={os.fsdecode(memory)!r} is a file; name a folder.")
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
    def folder(self) -> str:
        """The folder in which it lies."""
        return str(getattr(self.memory, "location", None) or ".")

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

    def write(
        self,
        func_id: str,
        digests: Sequence[bytes],
        rows: Iterable[np.ndarray],
        text: str = "",
    ) -> None:
        """Keep ``rows[i]``, of any dtype but object, as the result of ``digests[i]``.

        On the packed store, sound rows that are there stay: so a row never changes, although
        another program or number of threads would round otherwise. `text` says what `func_id`
        stands for, for `shares`.
        """
        if isinstance(rows, np.ndarray):
            rows = [rows[i, ...] for i in range(len(rows))]  # scalars would lose their byte order
        pairs = [(d, np.asarray(row)) for d, row in zip(digests, rows, strict=True)]
        if hasattr(self._backend, "dump_items"):
            self._backend.dump_items(func_id, pairs, text)
            return
        for digest, row in pairs:
            call_id = [func_id, digest.hex()]
            with _unwritten:
                self._backend.dump_item(call_id, row, verbose=self._verbose)
            if not self._backend.contains_item(call_id) and (why := self._why_not(call_id, row)):
                complain(self._backend.location, cannot("written", why))
                break

    def _why_not(self, call_id: list[str], row: np.ndarray) -> str:
        """Write a row once more, and return what joblib says of it; nothing if it says nothing.

        Only here, by one thread at a time: the filters of warnings are those of all threads.
        """
        with _asking_why, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CacheWarning)
            self._backend.dump_item(call_id, row, verbose=self._verbose)
        why = ""
        for warning in caught:
            if issubclass(warning.category, CacheWarning):
                why = str(warning.message)
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        return why

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
        """Return ``n_entries``, the number of results, and ``n_bytes``, companions included."""
        if hasattr(self._backend, "info"):
            info = self._backend.info()
        else:
            items = self._backend.get_items()
            info = {"n_entries": len(items), "n_bytes": sum(item.size for item in items)}
        info["n_bytes"] += self.n_companion_bytes()
        return info

    def n_companion_bytes(self) -> int:
        """Return the bytes of files that are no results of images; see `companions`."""
        folder = self._local_folder
        return 0 if folder is None else n_companion_bytes(folder)

    def shares(self) -> list[tuple[str, int, int]]:
        """Return the text, the number of results and their bytes of each function, largest first.

        Results without a text are together, under "". Only the packed store knows; else it is [].
        """
        known = self._backend.shares() if hasattr(self._backend, "shares") else []
        return sorted(known, key=lambda share: -share[2])

    def tell_size(self, text: str) -> None:
        """Warn of how much is about to be written, once for a folder in this process."""
        complain(self.folder, text, "Results for the memory in")

    @property
    def companions(self) -> str | None:
        """The folder for files that are no results of images, such as compiled models.

        Whoever writes into it makes it first. `info` counts its bytes, `joblib.Memory.clear`
        deletes it, and so does `joblib.Memory.reduce_size` on the packed store if it alone exceeds
        ``bytes_limit``. Whoever reads from it must expect that its files are gone. None if the
        memory is not on a local disk.
        """
        return self._local_folder and os.path.join(self._local_folder, COMPANIONS)

    @property
    def _local_folder(self) -> str | None:
        folder = getattr(self._backend, "location", None)
        is_local = isinstance(self._backend, (LmdbStoreBackend, FileSystemStoreBackend))
        return folder if is_local and isinstance(folder, str) else None

    def claim(self, func_id: str, digests: Iterable[bytes], owner: object) -> list[bool]:
        """Take the right to compute these, as far as nobody else has it, without waiting.

        A caller reads, claims what is missing, *reads the claimed once more*, as another may have
        finished it in between, computes, writes and releases. What it did not get it defers.

        Parameters
        ----------
        func_id : str
        digests : iterable of bytes
        owner : object
            Whose the claims will be. It, not a list that Ctrl-C may cut short, is what a caller
            keeps: `release_all` gives back whatever it holds.

        Returns
        -------
        list of bool
            False where another process or owner, or this one, holds the claim. The death of
            a process frees its claims.
        """
        return self._claims.take_free(_places(func_id, digests), owner)

    def release(self, func_id: str, digests: Iterable[bytes], owner: object) -> None:
        """Give claims back, from any thread; what `owner` does not hold is left alone."""
        self._claims.give_back(_places(func_id, digests), owner)

    def release_all(self, owner: object) -> None:
        """Give back all that `owner` holds."""
        self._claims.give_all_back(owner)

    def wait(self, func_id: str, digest: bytes, owner: object) -> None:
        """Return once nobody holds the claim of this key; then read, or claim it.

        Raises
        ------
        RuntimeError
            `owner` holds claims: two that wait for each other would wait forever.
        """
        self._claims.wait_until_free(_places(func_id, [digest])[0], owner)

    @functools.cached_property
    def _claims(self) -> Claims:
        folder = getattr(self._backend, "location", None)
        if isinstance(self._backend, LmdbStoreBackend):
            with contextlib.suppress(OSError):
                os.makedirs(self._backend.location, exist_ok=True)
        if not (isinstance(folder, str) and os.path.isdir(folder)):
            return Claims(None)  # a store that is not local: everybody gets every claim
        return open_claims(folder)

    def __getstate__(self) -> dict[str, Any]:
        return {"memory": self.memory}


def _places(func_id: str, digests: Iterable[bytes]) -> list[int]:
    return [xxh3_64_intdigest(key) >> 2 for key in row_keys(func_id, digests)]  # 62 bits
