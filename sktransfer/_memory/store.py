"""What processes share in the folder of a memory: one LMDB file, and claims to compute."""

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
    TIME,
    create_file,
    find_problem,
    is_at,
    is_sealed,
    iter_nodes,
    open_file,
    seal,
    stamp,
    touch,
    unwrap,
)
from sktransfer._threads import call_in_forks, renewed_in_forks

try:
    import fcntl
except ImportError:  # Windows: LMDB's own locks, and no look at the file after it was opened
    fcntl = None  # type: ignore[assignment]

FIRST_MAP_SIZE = 1 << 30  # bytes of address space, doubled when they are full
TOUCH_EVERY = 300.0  # seconds by which a time of last access may lag behind
RETRY_AFTER = 60.0  # seconds until a damaged file that could not be replaced is tried again
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
    """The one open environment of a folder in this process.

    Processes take turns by `flock` on the data file itself, shared to read and exclusive to
    write. So LMDB needs no lock file whose loss would let two of them write at once, and a
    deleted data file is simply another store. Threads take turns by a mutex.

    Whatever finds the file without its seal (see `_store_format`) checks it before it is mapped:
    a writer was killed, which does no harm, or something else changed the file.

    A commit syncs the data, but not the page that makes it current (``metasync=False``): a
    power loss may take back the latest batch, which is then computed again, never half of it.
    """

    _fd: Any = None
    _env: Any = None  # py-lmdb does not touch an environment of another process

    def __init__(self, folder: str) -> None:
        self.folder, self.path = folder, os.path.join(folder, "data.mdb")
        self.forget()

    def forget(self) -> None:
        """Let go of what belongs to the parent process, or to a first use."""
        if self._fd is not None:
            os.close(self._fd)  # a copy that would prolong a lock held by the parent
        self._mutex = threading.Lock()
        self._fd = self._env = None
        self._tables: dict[bytes, Any] = {}
        self._known: tuple[int, ...] | None = None  # the file as it was last found sound
        self._suspect = self._doubted = self.readonly = False
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
        try:
            return self._in_turn(lambda env: self._transact(job, write), write)
        except _Damaged:  # now checked, whatever its seal says
            return self._in_turn(lambda env: self._transact(job, write), write)

    def _in_turn(self, action: Callable[[Any], T], write: bool) -> T:
        """Call `action(env)` while others are kept from writing, or altogether.

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
            found = os.fstat(self._fd)
            if not is_at(self.path, found):
                self._close()
            elif self._env is not None and self._is_sound(found):
                self._known = stamp(found)
                return
            elif not exclusive:
                exclusive = True
            elif time.monotonic() < self._pause_until:
                raise OSError(self._pause_reason)
            else:
                self._open(found)

    def _is_sound(self, found: os.stat_result) -> bool:
        if self._suspect:
            return False
        # Without our lock, a missing seal may only mean that somebody is writing.
        return stamp(found) == self._known or is_sealed(found) or not (fcntl or self._env is None)

    def _open(self, found: os.stat_result) -> None:
        self._close_env()
        if not self._is_sound(found):
            problem = find_problem(self.path)
            if problem is not None:
                try:
                    self._rescue(problem)
                except OSError as error:  # do not check the same file again for each batch
                    self._pause_until = time.monotonic() + RETRY_AFTER
                    self._pause_reason = f"{self.path} is damaged ({problem}): {error}"
                    raise OSError(self._pause_reason) from error
                self._close()
                return
            self._suspect = False
        # LMDB itself enlarges a map that is too small for the file.
        self._env = lmdb.open(
            self.path,
            subdir=False,
            readonly=self.readonly,
            map_size=FIRST_MAP_SIZE,
            metasync=False,
            lock=not (fcntl or self.readonly),
            max_dbs=len(TABLES),
        )
        try:
            self._tables = {n: self._env.open_db(n, create=not self.readonly) for n in TABLES}
        except BaseException:  # such as Ctrl-C: an environment without tables is of no use
            self._close_env()
            raise
        self._seal()

    def _seal(self) -> None:
        with contextlib.suppress(OSError):  # a read-only folder: then only this process knows
            seal(self.path)
        self._known = stamp(os.fstat(self._fd))

    def _rescue(self, problem: str) -> None:
        """Put a new file with the intact rows of the damaged one in its place."""
        if self.readonly:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.path)
        aside = self.path + ".damaged"
        nodes = iter_nodes(self.path)
        intact = ((k, v) for k, v in nodes if len(k) == 32 and unwrap(k, v) is not None)
        room = FIRST_MAP_SIZE + 2 * os.path.getsize(self.path)
        fresh, n_rows = create_file(self.path, intact, room)
        os.replace(self.path, aside)
        os.replace(fresh, self.path)
        self._suspect = False
        self._news.append(
            f"The memory in {self.folder} was damaged by something else than sktransfer "
            f"({problem}). {n_rows} intact results were kept; the others will be computed again. "
            f"The damaged file is now {aside} and may be deleted."
        )

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
        return [k for k, t in times if t is None or TIME.unpack(t)[0] < limit]

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
        for path in glob.glob(glob.escape(self.path) + ".*"):  # damaged or unfinished ones
            os.unlink(path)
        self._close()

    def shrink(self) -> None:
        """Give the space of deleted entries back, once it is the larger part of the file."""
        self._in_turn(self._compact, write=True)

    def _compact(self, env: Any) -> None:
        if _n_bytes(env, self._tables) > os.path.getsize(self.path) // 2:
            return
        fresh = f"{self.path}.{os.getpid()}"
        try:
            with open(fresh, "wb") as file:
                env.copyfd(file.fileno(), compact=True)
                os.fsync(file.fileno())
            seal(fresh)
            os.replace(fresh, self.path)
        except (OSError, lmdb.Error):  # no room for a copy: the free pages stay for later rows
            with contextlib.suppress(OSError):
                os.unlink(fresh)
        else:
            self._close()

    def info(self) -> dict[str, int]:
        """Count entries, and the bytes of their pages."""
        return self._in_turn(self._count, write=False)

    def _count(self, env: Any) -> dict[str, int]:
        with env.begin() as txn:
            n_rows, n_files = (txn.stat(self._tables[t])["entries"] for t in (b"rows", b"files"))
        return {"n_entries": n_rows + n_files, "n_bytes": _n_bytes(env, self._tables)}


def _n_bytes(env: Any, tables: dict[bytes, Any]) -> int:
    with env.begin() as txn:
        stats = [txn.stat(table) for table in tables.values()]
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


# ------------------------------------------------------------------------------- claims


class Claims:
    """Marks of what is being computed, as locks on single bytes of an empty file.

    The kernel drops the locks of a process that dies, so no claim can be left over. They
    belong to the process as a whole, and all of them go when it closes any descriptor of the file:
    hence one descriptor for good, and a table of our own for the threads.

    Ctrl-C may come between any two steps. So the table, and nothing else, says who owns a place,
    and it never says too little: a place is entered before it is locked, and leaves the table after
    it was unlocked. What changes the table is one operation of a dict, so that no mutex could stay
    locked. `give_back` of the same place must not run in two threads at once.
    """

    _fd: int | None = None

    def __init__(self, folder: str | None) -> None:
        self.path = folder and os.path.join(folder, "claims")
        self.forget()

    def forget(self) -> None:
        """Start anew, as a forked child must: locks are not inherited."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None
        self._opening = threading.Lock()
        self._owners: dict[int, object] = {}  # of the places that are taken

    def take(self, places: Iterable[int], owner: object) -> list[bool]:
        """Take the places that are free for `owner`; tell for each whether it was."""
        return [self._take(place, owner) for place in places]

    def give_back(self, places: Iterable[int], owner: object) -> None:
        """Free those of the places that `owner` holds."""
        for place in places:
            if self._owners.get(place) is owner:
                self._unlock(place)
                self._owners.pop(place, None)

    def give_all_back(self, owner: object) -> None:
        """Free all that `owner` holds."""
        self.give_back(self._owners.copy(), owner)

    def wait(self, place: int, owner: object) -> None:
        """Return once nobody holds the place; `owner` must hold none."""
        if any(other is owner for other in self._owners.copy().values()):
            raise RuntimeError("Release your claims before you wait for those of others.")
        pause = 0.001
        # By trials: a lock that blocks cannot be given back to Ctrl-C on all systems, and the
        # kernel may see a deadlock between processes where only their threads cross.
        while not self._take(place, owner):
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        self.give_back([place], owner)

    def _take(self, place: int, owner: object) -> bool:
        if place in self._owners or self._owners.setdefault(place, owner) is not owner:
            return False
        if self._lock(place):
            return True
        self._owners.pop(place, None)
        return False

    def _lock(self, place: int) -> bool:
        if fcntl is None or self.path is None:
            return True
        try:
            with self._opening:
                if self._fd is None:
                    self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:  # no place for the file: rather computed twice than not at all
            return True
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            return True
        return True

    def _unlock(self, place: int) -> None:
        if fcntl is not None and self._fd is not None:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, place)


# ----------------------------------------------------------------------- one for each folder

_STORES: weakref.WeakValueDictionary[str, Store] = weakref.WeakValueDictionary()
_CLAIMS: dict[str, Claims] = {}
_REGISTRY = renewed_in_forks(threading.Lock())


def open_store(folder: str) -> Store:
    """Return the store of a folder, which stays open as long as somebody refers to it."""
    folder = os.path.realpath(folder)
    with _REGISTRY:
        store = _STORES.get(folder) or _STORES.setdefault(folder, Store(folder))
    return store


def open_claims(folder: str) -> Claims:
    """Return the claims of a folder, which stay open for good."""
    return _CLAIMS.setdefault(os.path.realpath(folder), Claims(folder))


def _after_fork() -> None:
    """Let a child open its own files: neither LMDB nor locks survive a fork."""
    for store in _STORES.values():
        store.forget()
    for claims in _CLAIMS.values():
        claims.forget()


call_in_forks(_after_fork)
