"""What torch keeps for the whole process: its defaults, its random numbers, what traces networks.

A thread that takes several locks takes them in this order: that of who builds a network,
that of the programs, that of who looks for blocks, `chance_lock`, `network_lock`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import nn

from sktransfer._threads import call_in_forks, renewed_in_forks

_T = TypeVar("_T")


class NetworkLock:
    """Held shared by threads that run networks, or by one that changes what all networks use.

    Each thread has a lock of its own, which it holds while it runs a network; to be alone is to
    hold the locks of all threads. These are locks of Python's own, left in one step: Ctrl-C between
    the start of a context manager of ours and its block would leave it locked.

    A thread that is alone may also run networks, and be alone again; one that runs a network may
    only run further ones: two that both wait for the other to finish would wait for ever.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self._all: WeakSet[Any] = WeakSet()  # those of threads that have ended go by themselves
        # Held by the thread that is alone, or waits for it. Others that begin wait here, so that
        # it comes to its turn however often they run a network.
        self._gate = threading.RLock()
        self._unpatched: tuple[Any, Any] | None = None
        call_in_forks(self._after_fork)

    def shared(self) -> AbstractContextManager[Any]:
        """Return the lock of this thread: `with network_lock.shared():` runs a network."""
        lock = self._lock_of_thread()
        if not lock._is_owned():
            with self._gate:
                pass
        return lock

    def alone(self, function: Callable[[], _T]) -> _T:
        """Call a function while no other thread runs a network.

        It is for what torch replaces for all threads: tracing by torch.fx replaces what calls
        modules, counting of operations adds hooks to all of them.
        """
        if self.is_held() and not self._gate._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError("A thread that runs a network can't ask to be alone meanwhile.")
        with self._gate:
            before = self._unpatched
            self._unpatched = before or (nn.Module.__call__, nn.Module.__getattr__)
            try:
                result = _call_holding(list(self._all), function)
            finally:
                self._unpatched = before
        return result

    def is_held(self) -> bool:
        """Tell whether this thread runs a network, or is alone."""
        return self._lock_of_thread()._is_owned()

    def _lock_of_thread(self) -> Any:
        lock = getattr(self._thread, "lock", None)
        if lock is None:
            lock = threading.RLock()
            with self._gate:
                self._all.add(lock)
            self._thread.lock = lock
        return lock

    def _after_fork(self) -> None:
        """Begin with other locks: this thread may hold the old ones, and leaves them later."""
        was_alone = self._gate._is_owned()  # type: ignore[attr-defined]
        self._thread, self._all, self._gate = threading.local(), WeakSet(), threading.RLock()
        if self._unpatched is not None and not was_alone:  # another thread was tracing
            nn.Module.__call__, nn.Module.__getattr__ = self._unpatched  # type: ignore[method-assign]
            self._unpatched = None


def _call_holding(locks: Sequence[Any], function: Callable[[], _T]) -> _T:
    if not locks:
        return function()
    with locks[0]:
        result = _call_holding(locks[1:], function)  # no return in here, where Ctrl-C may come
    return result


network_lock = NetworkLock()

# Random numbers ---------------------------------------------------------------------------------

# Held by whoever draws from torch's global generators, of which a process has one a device.
chance_lock = renewed_in_forks(threading.RLock())
_outer_states: list[list[torch.Tensor]] = []  # of the global generators, while they are replaced


class Chance:
    """Random numbers that depend on a seed alone, for what draws from torch's global generators.

    Dropout, the random transforms of torchvision and the first weights of layers do so, whatever
    thread they run in. What takes a generator should get one instead.

    Parameters
    ----------
    seed : int
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._states: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def in_torch(self) -> Iterator[None]:
        """Let torch draw from here; go on where the last time ended.

        The caller must hold `chance_lock`. Afterwards torch's generators are as they were.
        """
        generators = _global_generators()
        _outer_states.append([generator.get_state() for generator in generators])
        try:
            for i, generator in enumerate(generators):
                if i in self._states:
                    generator.set_state(self._states[i])
                else:
                    generator.manual_seed(self.seed % 2**63)
            yield
        finally:
            try:
                self._states = dict(enumerate(g.get_state() for g in generators))
            finally:
                _restore(_outer_states.pop(), generators)


def call_seeded(seed: int, create: Callable[[], _T]) -> _T:
    """Create something whose weights are drawn by a seed, ready to train."""
    with chance_lock, Chance(seed).in_torch(), ready_to_train(chance_lock):
        created = create()
    return created


def _global_generators() -> list[torch.Generator]:
    """Return torch's generators, that of the CPU first; those of GPUs only once they are used."""
    gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *gpus]


def _restore(states: Sequence[torch.Tensor], generators: Sequence[torch.Generator]) -> None:
    for state, generator in zip(states, generators, strict=False):
        generator.set_state(state)


# Defaults ---------------------------------------------------------------------------------------

_mutex = renewed_in_forks(threading.RLock())  # of `_users`; garbage may be collected meanwhile
# Who needs float32 just now, in all threads, and the default before the first of them came: torch
# has one default for the process.
_users: dict[object, torch.dtype] = {}


@contextlib.contextmanager
def float32_by_default(held: AbstractContextManager[Any] | None = None) -> Iterator[None]:
    """Let torch make float32 tensors, whatever `torch.set_default_dtype` says.

    The caller must hold the lock `held`, taken just before; by default, `network_lock`. Ctrl-C may
    cut off what follows the `yield`; then a thread, which it does not reach, does so once `held` is
    free. Several threads may be in here at once: the default is changed for all of them together.
    """
    user = object()
    with _mutex:
        before = next(iter(_users.values()), torch.get_default_dtype())
        if before != torch.float32:
            held = network_lock.shared() if held is None else held
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
def ready_to_train(held: AbstractContextManager[Any] | None = None) -> Iterator[None]:
    """Let torch make float32 tensors on the CPU and record gradients, whatever the caller has set.

    A fit may be called under `torch.inference_mode()` or `torch.no_grad()`, a network be loaded
    after `torch.set_default_device("cuda")`. `held` is that of `float32_by_default`.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        float32_by_default(held),
        cpu_by_default(),
    ):
        yield


def cpu_by_default() -> AbstractContextManager[Any]:
    """Return a context in which this thread makes tensors on the CPU, if no device is named."""
    return as_on(torch.device("cpu"))


def as_on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context for a network on a device, whatever `torch.set_default_device` says.

    In this thread the network then makes tensors, if it names no device, on that of the user's
    two where it runs: torch's own default, the CPU, or its device.
    """
    default = torch.get_default_device().type
    return contextlib.nullcontext() if default in ("cpu", device.type) else device


def trained_tensors(state: Any, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what an estimator kept as arrays as tensors; it must be of all names and shapes."""
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    kept = state if isinstance(state, dict) else {}
    kept_shapes = {name: np.shape(value) for name, value in kept.items()}
    if kept_shapes != shapes:
        wrong = sorted({str(name) for name, _ in kept_shapes.items() ^ shapes.items()})
        raise ValueError(
            f"The trained values of this estimator are not those of its network ({wrong[0]!r} and "
            f"{len(wrong) - 1} more are missing, too many or of another shape): the file from "
            "which it was loaded is damaged. Write it again, or fit the estimator again."
        )
    return {name: torch.as_tensor(value, device="cpu") for name, value in kept.items()}


def _after_fork() -> None:
    for user in list(_users):  # in threads that the child has not
        _leave(user)
    if _outer_states:  # a thread of the parent was drawing
        _restore(_outer_states[0], _global_generators()[:1])  # no child can use its parent's GPUs
        _outer_states.clear()


call_in_forks(_after_fork)
