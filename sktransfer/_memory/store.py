"""The one LMDB file in the folder of a memory, which processes and threads share."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import lmdb

from sktransfer._memory.store_format import (
    TABLES,
    find_problem,
    is_at,
    is_sealed,
    open_environment,
    open_file,
    seal,
    stamp,
    time_of,
    touch,
)
from sktransfer._threads import renewed_in_forks

try:
    import fcntl
except ImportError:  # Windows: LMDB's own locks, and no look at the file after it was opened
    fcntl = None  # type: ignore[assignment]

FIRST_MAP_SIZE = 1 << 30  # bytes of address space, doubled when they are full
TOUCH_EVERY = 300.0  # seconds by which a time of last access may lag behind
RETRY_AFTER = 60.0  # seconds until a damaged file that could not be renamed is tried again
MAX_OPEN = 8  # stores of a process that are open at once, each with three file descriptors
_KEPT_DIGESTS = 200_000
_DAMAGE = (
    lmdb.BadTxnError,
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)
_COMPLAINED: set[tuple[str, str]] = set()
T = TypeVar("T")


class _Damaged(OSError):
    """The file contradicts itself although it was found sound."""


class Store:
    """The one LMDB environment of a folder in this process, opened when it is used.

    Processes take turns by `flock` on the data file itself, shared to read and exclusive to
    write. So LMDB needs no lock file whose loss would let two of them write at once, and a
    deleted data file is simply another store. Threads take turns by a mutex.

    Every turn begins with a look at the file's size and times. Whatever finds it changed and
    without its seal (see `store_format`) closes it, and checks it before it is mapped again:
    a writer was killed, which does no harm, or something else changed the file. A damaged file is
    renamed, and an empty one takes its place.

    A commit syncs the data, but not the page that makes it current (``metasync=False``): a
    power loss may take back the latest batch, which is then computed again, never half of it.
    """

    _fd: Any = None
    _env: Any = None  # py-lmdb does not touch an environment of another process

    def __init__(self, folder: str) -> None:
        self.folder, self.path = folder, os.path.join(folder, "data.mdb")
        self.forget()

    def forget(self) -> None:
        """Begin as if the file had never been opened, as a forked child must."""
        if self._fd is not None:
            os.close(self._fd)  # a copy that would prolong a lock held by the parent
        self._mutex = threading.Lock()
        self._fd = self._env = None
        self._tables: dict[bytes, Any] = {}
        self._known: tuple[int, ...] | None = None  # the file as it was last found sound
        self._suspect = self._doubted = self._opened_now = self.readonly = False
        self.last_used = 0.0
        self._news: list[str] = []
        self._pause_until, self._pause_reason = 0.0, ""
        self._recent: set[bytes] = set()
        self._recent_since = 0.0

    def __del__(self) -> None:
        self._close()

    def run(self, job: Callable[..., T], *, write: bool = False) -> T:
        """Call ``job(txn, rows, files, used)`` in one transaction, and again if that must grow.

        Raises
        ------
        OSError
            The store cannot be read or written; its message says why.
        """
        return self._in_turn(lambda env: self._transact(job, write), write)

    def _in_turn(self, action: Callable[[Any], T], write: bool) -> T:
        """Call `action(env)` while others are kept from writing, or altogether."""
        try:
            return self._in_one_turn(action, write)
        except _Damaged:  # now checked, whatever its seal says
            return self._in_one_turn(action, write)

    def _in_one_turn(self, action: Callable[[Any], T], write: bool) -> T:
        """Call `action(env)` once.

        No context manager of our own: Ctrl-C between its start and the block would leave it locked.
        """
        with self._mutex:
            try:
                self._acquire(write)
                if write and self.readonly:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.path)
                result = action(self._env)
            except _DAMAGE as error:
                self._suspect = True
                raise _Damaged(f"{self.path}: {error}") from error
            except lmdb.Error as error:
                # a full disk may come as a mere "Input/output error"
                free = shutil.disk_usage(self.folder).free / 1e6
                raise OSError(f"{self.path}: {error}; {free:.1f} MB free") from error
            finally:
                if fcntl and self._fd is not None:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
            news, self._news = self._news, []
            opened_now, self._opened_now = self._opened_now, False
        if opened_now:
            _close_least_recently_used(self)
        for text in news:
            warnings.warn(text, UserWarning, stacklevel=4)
        return result

    def _transact(self, job: Callable[..., T], write: bool) -> T:
        while True:
            try:
                with self._env.begin(self._tables[TABLES[0]], None, write, not write) as txn:
                    result = job(txn, *self._tables.values())
                break
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])
            except lmdb.MapResizedError:  # another process has doubled it
                self._env.set_mapsize(0)
            except _DAMAGE:
                raise
            except lmdb.Error:  # such as a full disk: what was committed before stands
                self._close_env()
                if write:
                    self._seal()
                raise
        if write:
            self._seal()
        return result

    def _acquire(self, exclusive: bool) -> None:
        """Lock the file that the path names now, and see that it is sound and mapped."""
        while True:
            if self._fd is None:
                self._fd, self.readonly = open_file(self.path, FIRST_MAP_SIZE)
            if fcntl:
                fcntl.flock(self._fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            status = os.fstat(self._fd)
            self.last_used = time.monotonic()
            if not is_at(self.path, status):
                self._close()
            elif self._env is not None and self._is_sound(status):
                self._known = stamp(status)
                return
            elif not exclusive:
                exclusive = True
            elif time.monotonic() < self._pause_until:
                raise OSError(self._pause_reason)
            else:
                self._open(status)

    def _is_sound(self, status: os.stat_result) -> bool:
        if self._suspect:
            return False
        # Without our lock, a missing seal may only mean that somebody is writing.
        if stamp(status) == self._known or is_sealed(self.path, status):
            return True
        return not (fcntl or self._env is None)

    def _open(self, status: os.stat_result) -> None:
        self._close_env()
        if not self._is_sound(status):
            problem = find_problem(self.path)
            if problem is not None:
                try:
                    self._set_aside(problem)
                except OSError as error:  # do not check the same file again for each batch
                    self._pause_until = time.monotonic() + RETRY_AFTER
                    self._pause_reason = f"{self.path} is damaged ({problem}): {error}"
                    raise OSError(self._pause_reason) from error
                self._close()
                return
            self._suspect = False
        self._opened_now = True
        # LMDB itself enlarges a map that is too small for the file.
        self._env = open_environment(
            self.path,
            readonly=self.readonly,
            map_size=FIRST_MAP_SIZE,
            metasync=False,
            lock=not (fcntl or self.readonly),
        )
        try:
            self._tables = {n: self._env.open_db(n, create=not self.readonly) for n in TABLES}
        except BaseException:  # such as Ctrl-C: an environment without tables is of no use
            self._close_env()
            raise
        self._seal()

    def _seal(self) -> None:
        status = os.fstat(self._fd)
        self._known = stamp(status)
        with contextlib.suppress(OSError):  # a read-only folder: then only this process knows
            seal(self.path, status)

    def _set_aside(self, problem: str) -> None:
        """Rename the damaged file, so that an empty one is begun in its place."""
        if self.readonly:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.path)
        aside = self.path + ".damaged"
        os.replace(self.path, aside)
        self._suspect = False
        self._news.append(
            f"The memory in {self.folder} was damaged by something else than sktransfer "
            f"({problem}). It begins anew, so its results will be computed again. The damaged file "
            f"is now {aside} and may be deleted."
        )

    @property
    def is_open(self) -> bool:
        """Whether this process holds descriptors of the file at the moment."""
        return self._fd is not None

    def close(self) -> None:
        """Close the file until it is used again."""
        with self._mutex:
            self._close()

    def _close(self) -> None:
        self._close_env()
        try:
            if self._fd is not None:
                os.close(self._fd)
        finally:  # Ctrl-C may come right after: another file could get the number
            self._fd = None

    def _close_env(self) -> None:
        try:
            if self._env is not None:
                self._env.close()
        finally:
            self._env = None

    def doubt(self) -> None:
        """Have the file checked at its next use, its seal notwithstanding; once is enough."""
        self._suspect = self._suspect or not self._doubted
        self._doubted = True

    def stale(self, keys: Iterable[bytes], txn: Any, used: Any) -> list[bytes]:
        """Return those of `keys` whose time of last access is out of date.

        What was looked at lately is remembered, so that a warm read costs one set difference.
        """
        now = time.time()
        if now - self._recent_since > TOUCH_EVERY or len(self._recent) > _KEPT_DIGESTS:
            self._recent, self._recent_since = set(), now
        new = set(keys) - self._recent
        self._recent |= new
        limit = now - TOUCH_EVERY
        times = ((key, txn.get(key, db=used)) for key in new)
        return [k for k, t in times if t is None or time_of(t) < limit]

    def touch(self, keys: list[bytes]) -> None:
        """Note that these were read just now, where that is possible."""
        if keys and not self.readonly:
            with contextlib.suppress(OSError):
                self.run(lambda txn, rows, files, used: touch(txn, used, keys), write=True)

    def clear(self) -> None:
        """Delete everything, and give its space back at once."""
        self._in_turn(self._unlink, write=True)

    def _unlink(self, env: Any) -> None:
        os.unlink(self.path)
        for path in glob.glob(glob.escape(self.path) + ".*"):  # seal, damaged, unfinished
            with contextlib.suppress(FileNotFoundError):  # another process has finished its own
                os.unlink(path)
        self._close()

    def shrink(self) -> None:
        """Give the space of deleted entries back, once it is the larger part of the file."""
        self._in_turn(self._compact, write=True)

    def _compact(self, env: Any) -> None:
        if self._transact(_n_bytes, write=False) > os.path.getsize(self.path) // 2:
            return
        fresh = f"{self.path}.{os.getpid()}"
        try:
            with open(fresh, "wb") as file:
                if fcntl:  # who opens it at its new place waits for its seal
                    fcntl.flock(file, fcntl.LOCK_EX)
                env.copyfd(file.fileno(), compact=True)
                os.fsync(file.fileno())
                os.replace(fresh, self.path)
                seal(self.path, os.fstat(file.fileno()))
        except (OSError, lmdb.Error):  # no room for a copy: the free pages stay for later rows
            with contextlib.suppress(OSError):
                os.unlink(fresh)
        else:
            self._close()

    def info(self) -> dict[str, int]:
        """Count entries, and the bytes of their pages."""
        return self.run(_count)


def _count(txn: Any, rows: Any, files: Any, used: Any) -> dict[str, int]:
    n_entries = sum(txn.stat(table)["entries"] for table in (rows, files))
    return {"n_entries": n_entries, "n_bytes": _n_bytes(txn, rows, files, used)}


def _n_bytes(txn: Any, *tables: Any) -> int:
    stats = [txn.stat(table) for table in tables]
    pages = ("branch_pages", "leaf_pages", "overflow_pages")
    return sum(stat["psize"] * stat[page] for stat in stats for page in pages)


# ----------------------------------------------------------------------------- complaints


def cannot(done: str, reason: object) -> str:
    return (
        f"cannot be {done}: {reason}. The work goes on without it: what cannot be read is computed "
        f"again, what cannot be written is not kept."
    )


def complain(location: str, text: str, subject: str = "The memory in") -> None:
    """Warn, once for a folder and subject in this process."""
    if (location, subject) not in _COMPLAINED:
        _COMPLAINED.add((location, subject))
        warnings.warn(f"{subject} {location} {text}", UserWarning, stacklevel=4)


# ----------------------------------------------------------------------- one for each folder

_STORES: weakref.WeakValueDictionary[str, Store] = weakref.WeakValueDictionary()
_REGISTRY = renewed_in_forks(threading.Lock())


def open_store(folder: str) -> Store:
    """Return the store of a folder, which all objects of this process share."""
    folder = os.path.realpath(folder)
    with _REGISTRY:
        store = _STORES.get(folder) or _STORES.setdefault(folder, Store(folder))
    return store


def _close_least_recently_used(but: Store) -> None:
    """Close stores until no more than `MAX_OPEN` are open; they open again at their next use."""
    with _REGISTRY:
        others = [store for store in _STORES.values() if store.is_open and store is not but]
    others.sort(key=lambda store: store.last_used)
    for store in others[: max(0, len(others) + 1 - MAX_OPEN)]:
        store.close()


_HELD: list[Store] = []  # while the process forks


def _before_fork() -> None:
    """Wait until no transaction runs: LMDB in the child would take it for one of its own."""
    _REGISTRY.acquire()
    for store in _STORES.values():
        store._mutex.acquire()
        _HELD.append(store)


def _after_fork_in_parent() -> None:
    while _HELD:
        _HELD.pop()._mutex.release()
    _REGISTRY.release()


def _after_fork_in_child() -> None:
    """Let a child open its own files: neither LMDB nor locks survive a fork."""
    _HELD.clear()
    for store in _STORES.values():
        store.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
