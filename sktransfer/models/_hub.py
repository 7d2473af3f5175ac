"""Downloads of published weights: quick and quiet to fail where there is no connection."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import torch
from huggingface_hub import constants

_SECONDS = 4.0  # that a server has to accept a connection; its answers may take longer
_PORTS = {"http": 80, "https": 443}
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".npz")  # of files on the hub that hold them


@contextlib.contextmanager
def downloading(name: str, url: str, remedy: str) -> Iterator[None]:
    """Let torch.hub download `url` in a ``with`` block, unless its file is there already.

    Raises
    ------
    OSError
        If that fails, at once where there is no connection; it says `remedy`.
    """
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        if not os.path.exists(os.path.join(folder, os.path.basename(urlsplit(url).path))):
            check_connection(url)
        with contextlib.redirect_stdout(sys.stderr):  # torch prints where it downloads from
            yield
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"The weights of {name!r} could not be downloaded from {url} ({error}). Download that "
            f"file on a connected machine and pass weights='path/to/the/file.pth', or put it into "
            f"{folder}; {remedy}"
        ) from error


def check_hub(repository: str, endings: tuple[str, ...] = _WEIGHTS) -> None:
    """Raise OSError at once if the hub can't be reached, and no such file of a repository is kept.

    The hub's own client would try several times, with a message for each try. What is kept
    on disk it finds without a connection.
    """
    if constants.HF_HUB_OFFLINE:  # then it does not try
        return
    try:
        check_connection(constants.ENDPOINT)
    except OSError:
        if not _is_kept(repository, endings):
            raise


def _is_kept(repository: str, endings: tuple[str, ...]) -> bool:
    """Return whether the hub's client has files with such names of a repository on disk."""
    try:
        folder = huggingface_hub.snapshot_download(repository, local_files_only=True)
    except Exception:  # its kinds of errors differ between versions
        return False
    return any(name.endswith(endings) for name in os.listdir(folder))


def check_connection(url: str) -> None:
    """Raise OSError soon if the server of `url`, or the proxy in front of it, can't be reached."""
    host, port = _server(url)
    end = time.monotonic() + _SECONDS
    answers = _first(lambda _: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), [None], end)
    addresses = {address[4][:2] for address in answers}
    # All at once: of a server's addresses, those of one protocol may lead nowhere.
    _first(lambda address: socket.create_connection(address, _SECONDS).close(), addresses, end)


def _server(url: str) -> tuple[str, int]:
    """Return host and port to which a request for `url` connects."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 1080)


def _first(call: Callable[[Any], Any], arguments: Iterable[Any], end: float) -> Any:
    """Return the result of the call that succeeds first; OSError if none does until `end`."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(argument: Any) -> None:
        try:
            results.put(call(argument))
        except (OSError, UnicodeError) as error:
            results.put(error)

    # Threads that end by themselves: the system's resolver takes no deadline.
    threads = [threading.Thread(target=run, args=(a,), daemon=True) for a in arguments]
    for thread in threads:
        thread.start()
    outcome: Any = None
    for _ in threads:
        try:
            outcome = results.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(f"no connection within {_SECONDS:.0f} seconds") from None
        if not isinstance(outcome, Exception):
            return outcome
    raise OSError(str(outcome)) from outcome
