"""Regular files are opened to read, and large images decoded one at a time."""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO

from sktransfer._threads import call_in_forks

_FREE_PIXELS = 2**25  # of an image that need not wait for others: those of most cameras
_PIXELS_IN_FLIGHT = 2**27  # of the larger images that are decoded at once
_LONGEST_WAIT = 60.0  # seconds for room; then rather too much memory than to stand still
_PART = 2**24  # bytes that are read at once
_LARGE_FILE = 2**26  # bytes from which files are read one at a time

# ------------------------------------------------------------------------------ reading


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read; raise an `OSError` for what is no regular file, which may never end."""
    _refuse_irregular(os.stat(path))  # as opening a pipe could already wake the other end
    file = open(path, "rb", opener=_open_at_once)
    try:
        _refuse_irregular(os.fstat(file.fileno()))  # it may have been replaced meanwhile
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike) -> bytes:
    """Return the content of a regular file, see `open_regular`.

    With few calls of the system, as threads that read wait for each other at each of them.
    """
    _refuse_irregular(os.stat(path))
    number = _open_at_once(os.fspath(path), os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(number)
        _refuse_irregular(status)
        data = os.read(number, status.st_size)
        while len(data) != status.st_size and (more := os.read(number, _PART)):
            data += more  # it is longer than was said, or comes in parts
        return data
    finally:
        os.close(number)


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for whoever writes to a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _refuse_irregular(status: os.stat_result) -> None:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
    }
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for test, kind in kinds.items() if test(status.st_mode)), "special")
        raise OSError(f"this is {kind}, not a regular file")


def is_large(path: str | os.PathLike) -> bool:
    """Whether a file is so large that it should not be read beside others."""
    try:
        return os.stat(path).st_size > _LARGE_FILE
    except (OSError, ValueError):
        return False  # whoever reads it says why it can't be read


# ------------------------------------------------------------------------------ memory


class _Room:
    """Lets threads decode as long as the pixels of their images do not become too many."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.changed = threading.Condition()
        self.large_file = threading.RLock()

    @contextmanager
    def reserved(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for an image; one alone always finds it."""
        if pixels <= _FREE_PIXELS:
            yield
            return
        with self.changed:
            # Not for ever: Ctrl-C may have cut off what would have given room back.
            self.changed.wait_for(
                lambda: not self.in_flight or self.in_flight + pixels <= _PIXELS_IN_FLIGHT,
                timeout=_LONGEST_WAIT,
            )
            self.in_flight += pixels
        try:
            yield
        finally:
            _trim_heaps()
            with self.changed:
                self.in_flight -= pixels
                self.changed.notify_all()


def _trim_heaps() -> None:
    """Give freed memory back: glibc keeps the blocks of Pillow's images, each thread its own."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library


_room = _Room()


def room_for(pixels: int) -> Any:
    """Return a context for the decoding of an image, in which it waits for other large ones."""
    return _room.reserved(pixels)


def reading_turn(item: Any) -> Any:
    """Return a context for the reading of an image: large files are read one at a time."""
    is_path = isinstance(item, (str, os.PathLike))
    return _room.large_file if is_path and is_large(item) else nullcontext()


def _after_fork() -> None:
    global _room
    _room = _Room()  # the locks may have been held by threads that are not in the child


call_in_forks(_after_fork)
