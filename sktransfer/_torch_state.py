"""What torch keeps for the whole process while a network runs: its defaults, and a lock."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from sktransfer._threads import call_in_forks, renewed_in_forks

# Held while a network runs or is traced: torch.fx traces by replacing what calls modules, for the
# whole process. No context manager of our own: Ctrl-C between its start and the block would leave
# it locked.
network_lock = renewed_in_forks(threading.RLock())
_mutex = renewed_in_forks(threading.RLock())  # of `_users`; garbage may be collected meanwhile
# Who needs float32 just now, in all threads, and the default before the first of them came: torch
# has one default for the process.
_users: dict[object, torch.dtype] = {}


@contextlib.contextmanager
def float32_by_default(held: AbstractContextManager[Any] = network_lock) -> Iterator[None]:
    """Let torch make float32 tensors, whatever `torch.set_default_dtype` says.

    The caller must hold the lock `held`, taken just before. Ctrl-C may cut off what follows the
    `yield`; then a thread, which it does not reach, does so once `held` is free.
    """
    user = object()
    with _mutex:
        before = next(iter(_users.values()), torch.get_default_dtype())
        if before != torch.float32:
            threading.Thread(target=_leave_after, args=(user, held), daemon=True).start()
            _users[user] = before
            torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        _leave(user)


def _leave(user: object) -> None:
    """Let torch's default be what it was, if nobody else needs float32; harmless if repeated."""
    with _mutex:
        if user in _users:
            if len(_users) == 1:
                torch.set_default_dtype(_users[user])
            _users.pop(user, None)


def _leave_after(user: object, held: AbstractContextManager[Any]) -> None:
    with held:
        pass
    _leave(user)


@contextlib.contextmanager
def ready_to_train(held: AbstractContextManager[Any] = network_lock) -> Iterator[None]:
    """Let torch make float32 tensors on the CPU and record gradients, whatever the caller has set.

    A fit may be called under `torch.inference_mode()` or `torch.no_grad()`, a network be loaded
    after `torch.set_default_device("cuda")`. `held` is that of `float32_by_default`.
    """
    is_cpu = torch.get_default_device().type == "cpu"
    device = contextlib.nullcontext() if is_cpu else torch.device("cpu")
    with torch.inference_mode(False), torch.enable_grad(), float32_by_default(held), device:
        yield


@contextlib.contextmanager
def seeded_to_train(seed: int) -> Iterator[None]:
    """Give torch a seed for a while, ready to train; the caller must hold `network_lock`."""
    with torch.random.fork_rng(), ready_to_train():
        torch.manual_seed(seed)
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


def _after_fork() -> None:
    for user in list(_users):  # in threads that the child has not
        _leave(user)


call_in_forks(_after_fork)
