"""What Pillow and libtiff say of an image while this thread decodes it."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from sktransfer._threads import called_once

# Pillow logs errors of TIFF files, which Python would print where no handler is set.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# What this thread decodes, and what libtiff and Pillow say of it. Each is a weak reference: Ctrl-C
# may cut off what would take it away, and then it is gone with what decoded.
_said = threading.local()


class _Where(str):
    """A row and its file."""


class _Lines(list[str]):
    """What was said."""


def _current(name: str) -> Any:
    """Return what `_said` refers to by a name, or None."""
    reference = getattr(_said, name, None)
    return None if reference is None else reference()


@contextmanager
def _refers_to(name: str, value: Any) -> Iterator[None]:
    """Let `_said` refer to a value by a name."""
    before = getattr(_said, name, None)
    try:
        setattr(_said, name, weakref.ref(value))
        yield
    finally:
        setattr(_said, name, before)


class _ThreadsWarnings:
    """Stands in Pillow's modules for `warnings`, whose own filters are those of all threads.

    In a thread that decodes it keeps what is said, which names neither row nor file. What is said
    of the size of an image can't wait, as a filter may make it an error: it gets their name here.
    Elsewhere it warns as Pillow does.
    """

    def warn(self, message: Any, category: Any = UserWarning, stacklevel: int = 1) -> None:
        said, where = _current("warnings"), _current("where")
        is_of_size = category is Image.DecompressionBombWarning
        if said is not None and not is_of_size:
            said.append(str(message))
            return
        if where is not None and is_of_size:
            message = (
                f"{where}: {str(message).rstrip('.')}. Make it smaller or, if you trust it, raise "
                "PIL.Image.MAX_IMAGE_PIXELS."
            )
        warnings.warn(message, category, stacklevel + 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(warnings, name)


@contextmanager
def speaking_of(where: str) -> Iterator[None]:
    """Say in this thread of which row and file Pillow warns."""
    words = _Where(where)
    with _refers_to("where", words):
        yield


@contextmanager
def pillow_warnings() -> Iterator[list[str]]:
    """Collect what Pillow warns of in this thread."""
    _listen_to_pillow()
    said = _Lines()
    with _refers_to("warnings", said):
        yield said


@functools.cache
def _listen_to_pillow() -> None:
    Image.init()  # loads the modules of all formats
    for name, module in list(sys.modules.items()):
        if name.startswith("PIL.") and getattr(module, "warnings", None) is warnings:
            module.warnings = _ThreadsWarnings()  # type: ignore[attr-defined]


@contextmanager
def libtiff_messages() -> Iterator[list[str]]:
    """Collect what libtiff says in this thread, and would print."""
    _set_libtiff_handler()
    lines = _Lines()
    with _refers_to("lines", lines):
        yield lines


@called_once
def _set_libtiff_handler() -> Any:
    """Set a handler that collects libtiff's messages; other threads' are printed as before."""
    library = ctypes.CDLL(Image.core.__file__)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
    try:
        set_handler, format_text = library.TIFFSetErrorHandler, ctypes.CDLL(None).vsnprintf
    except (AttributeError, OSError, TypeError):
        return None  # Pillow has libtiff built in, or none: it prints its errors
    set_handler.restype, set_handler.argtypes = kind, [kind]
    format_text.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]

    def take(module: bytes | None, text: bytes, values: int | None) -> None:
        lines = _current("lines")
        if lines is None:
            printed(module, text, values)
            return
        buffer = ctypes.create_string_buffer(500)
        format_text(buffer, len(buffer), text, values)
        lines.append(buffer.value.decode(errors="replace").rstrip("."))

    handler = kind(take)
    printed = set_handler(handler)
    return handler  # kept, as libtiff calls it: a second one would let the first go
