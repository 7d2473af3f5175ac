"""Ctrl-C in a training: what was learnt until then is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: unlike a callback's KeyboardInterrupt, by which skorch ends a training early."""

    n_done = 0  # epochs that were run to their end


@contextmanager
def ctrl_c() -> Iterator[None]:
    """Turn Ctrl-C into `Interrupted`, where this thread is the one that gets it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def stop(*_: Any) -> None:
        raise Interrupted

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
