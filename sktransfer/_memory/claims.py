"""Claims: which results are being computed at this moment, known to all processes and threads."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable

from sktransfer._threads import call_in_forks

try:
    import fcntl
except ImportError:  # Windows: each process computes for itself
    fcntl = None  # type: ignore[assignment]


class Claims:
    """Marks of what is being computed, as locks on single bytes of an empty file.

    The kernel drops the locks of a process that dies, so no claim can be left over. They
    belong to the process as a whole, and all of them go when it closes any descriptor of the file:
    hence one descriptor, which is closed once no claim is left, and a table of our own for the
    threads.

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
        self._mutex = threading.Lock()  # of the descriptor: it opens, locks and closes in turns
        self._owners: dict[int, object] = {}  # of the places that are taken

    def take_free(self, places: Iterable[int], owner: object) -> list[bool]:
        """Take the places that are free for `owner`; tell for each whether it was."""
        were_free = [self._take_if_free(place, owner) for place in places]
        self._close_if_idle()
        return were_free

    def give_back(self, places: Iterable[int], owner: object) -> None:
        """Free those of the places that `owner` holds."""
        for place in places:
            if self._owners.get(place) is owner:
                self._unlock(place)
                self._owners.pop(place, None)
        self._close_if_idle()

    def give_all_back(self, owner: object) -> None:
        """Free all that `owner` holds."""
        self.give_back(self._owners.copy(), owner)

    def wait_until_free(self, place: int, owner: object) -> None:
        """Return once nobody holds the place; `owner` must hold none."""
        if any(other is owner for other in self._owners.copy().values()):
            raise RuntimeError("Release your claims before you wait for those of others.")
        pause = 0.001
        # By trials: a lock that blocks cannot be given back to Ctrl-C on all systems, and the
        # kernel may see a deadlock between processes where only their threads cross.
        while not self._take_if_free(place, owner):
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        self.give_back([place], owner)

    def _take_if_free(self, place: int, owner: object) -> bool:
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
            with self._mutex:
                if self._fd is None:
                    self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # no place for the file, or no locks: rather computed twice than not at all
            return True
        return True

    def _unlock(self, place: int) -> None:
        if fcntl is not None and self._fd is not None:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, place)

    def _close_if_idle(self) -> None:
        """Close the file once nothing is claimed; a place enters the table before it is locked."""
        if self._fd is None or self._owners:
            return
        with self._mutex:
            if self._fd is not None and not self._owners:
                descriptor, self._fd = self._fd, None  # in this order: Ctrl-C may come between
                os.close(descriptor)


_CLAIMS: dict[str, Claims] = {}


def open_claims(folder: str) -> Claims:
    """Return the claims of a folder, which all objects of this process share."""
    return _CLAIMS.setdefault(os.path.realpath(folder), Claims(folder))


def _after_fork() -> None:
    for claims in _CLAIMS.values():
        claims.forget()


call_in_forks(_after_fork)
