"""What torch keeps for the whole process while a network runs: its defaults, and a lock."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

_mutex = threading.Lock()
_n_users = 0  # of float32 as the default, in all threads: it is one for the process
_default = torch.float32  # what it was before


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """Let torch make float32 tensors, whatever `torch.set_default_dtype` says."""
    global _n_users, _default
    with _mutex:
        if _n_users == 0 and (_default := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
        _n_users += 1
    try:
        yield
    finally:
        with _mutex:
            _n_users -= 1
            if _n_users == 0 and _default != torch.float32:
                torch.set_default_dtype(_default)


@contextlib.contextmanager
def ready_to_train() -> Iterator[None]:
    """Let torch make float32 tensors on the CPU and record gradients, whatever the caller has set.

    A fit may be called under `torch.inference_mode()` or `torch.no_grad()`, a network be loaded
    after `torch.set_default_device("cuda")`.
    """
    is_cpu = torch.get_default_device().type == "cpu"
    device = contextlib.nullcontext() if is_cpu else torch.device("cpu")
    with torch.inference_mode(False), torch.enable_grad(), float32_by_default(), device:
        yield


def trained_tensors(state: Any, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what an estimator kept as arrays as tensors; it must be of all names and shapes."""
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    kept = state if isinstance(state, dict) else {}
    found = {name: np.shape(value) for name, value in kept.items()}
    if found != shapes:
        wrong = sorted({str(name) for name, _ in found.items() ^ shapes.items()})
        raise ValueError(
            f"The trained values of this estimator are not those of its network ({wrong[0]!r} and "
            f"{len(wrong) - 1} more are missing, too many or of another shape): the file from "
            "which it was loaded is damaged. Write it again, or fit the estimator again."
        )
    return {name: torch.as_tensor(value) for name, value in kept.items()}


class _NetworkLock:
    """Held while a network runs or is traced; torch then makes float32 tensors by default.

    torch.fx traces by replacing what calls modules, for the whole process: nothing may run
    meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._defaults: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        self._defaults.append(float32_by_default())
        self._defaults[-1].__enter__()

    def __exit__(self, *_: Any) -> None:
        self._defaults.pop().__exit__(None, None, None)
        self._lock.release()

    def renew(self) -> None:
        """Let a child of a fork go on, though a thread of its parent held the lock."""
        self.__init__()  # type: ignore[misc]


network_lock = _NetworkLock()


def _after_fork() -> None:
    global _n_users
    _mutex._at_fork_reinit()  # type: ignore[attr-defined]
    network_lock.renew()
    if _n_users:  # by threads that the child has not
        torch.set_default_dtype(_default)
    _n_users = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
