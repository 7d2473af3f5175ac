"""Where a network computes and in what precision, and what its results take to come back."""

from __future__ import annotations

import multiprocessing
import warnings
from typing import Any

import numpy as np
import torch

# How a CPU, the driver of a GPU, cuBLAS and cuDNN say it.
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
# How torch says that a parent has used the GPU, which its forked child then can't.
_IN_FORK = ("in forked subprocess", "CUDA error: initialization error")
_INSTEAD_OF_FORK = (
    "A process that was forked from one that has used the GPU can't use it, nor read what lies on "
    "it: start processes by 'spawn' or 'forkserver', as joblib's default backend does; or pass "
    "device='cpu' and, of what is fitted on the GPU, predict once with it before the fork."
)
INT8 = "int8"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn `"auto"` or a name into a device that is there, with its number if it has one."""
    try:
        resolved = torch.device(_best_device() if device == "auto" else device)
        if resolved.type == "meta":
            raise RuntimeError("it computes shapes, no values")
        return torch.empty(0, device=resolved).device  # "cuda" and "cuda:0" are one
    except (RuntimeError, AssertionError) as error:
        remedy = "Pass device='cpu'" + " or 'auto'" * (device != "auto") + "."
        if any(words in str(error) for words in _IN_FORK):
            remedy = _INSTEAD_OF_FORK
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"device={str(device)!r} can't be used here ({reason}). {remedy}"
        ) from error


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def numerics(device: torch.device, precision: str) -> str:
    """Name what a device computes otherwise than others do, by more than rounding; "" if nothing.

    In lower precisions each kind of device has its own list of operations that run in them; a GPU
    has weights in bfloat16, too. In float32 it may round what enters convolutions to TF32, as torch
    lets it by default.
    """
    if device.type == "cpu":
        return ""
    if device.type == "cuda" and precision == "bfloat16":
        return "cuda, weights"
    if precision != "float32":
        return device.type
    return "tf32" if device.type == "cuda" and _rounds_to_tf32(device) else ""


def _rounds_to_tf32(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0) and allows_tf32()


def allows_tf32() -> bool:
    """Return whether torch may use TF32, by either of its two kinds of settings."""
    # The older kind can't be read any more where the newer one was set.
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    matmul = torch.backends.cuda.matmul
    return "tf32" in (conv.fp32_precision, matmul.fp32_precision)


def check_readable(device: torch.device) -> None:
    """Raise an error if this is a forked process, which can't read what lies on a GPU."""
    if device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise RuntimeError(f"What was trained lies on {str(device)!r}. {_INSTEAD_OF_FORK}")


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, those that torch keeps for later included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def warn_of_copies(device: torch.device) -> None:
    """Warn in a joblib worker that every one of them has a copy of the network on the GPU."""
    name = multiprocessing.current_process().name
    if device.type == "cuda" and name.startswith("LokyProcess"):
        warnings.warn(
            f"{name} loads a copy of the backbone of its own onto {str(device)!r}: with n_jobs > 1 "
            "each process does, and they take turns on the GPU. Use n_jobs=1, or device='cpu'.",
            UserWarning,
            stacklevel=2,
        )


class _Fetched:
    """An array on its way from a GPU; it waits for it only when it is looked at."""

    def __init__(self, x: torch.Tensor) -> None:
        # Whatever the user's default device is, which may be this GPU.
        self._host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        self._host.copy_(x, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(x.device))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._done.synchronize()
        return self._host.numpy()


def fetch(x: torch.Tensor) -> Any:
    """Return a tensor as an array, or as what becomes one while the GPU goes on."""
    return _Fetched(x) if x.is_cuda else x.cpu().numpy()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a GPU, or the system, had no memory left."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(words in str(error) for words in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
