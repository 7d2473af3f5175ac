"""Where a network computes and in what precision, and what its results take to come back."""

from __future__ import annotations

import multiprocessing
import warnings
from typing import Any

import numpy as np
import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn `"auto"` or a name into a device that is there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type == "meta":
            raise RuntimeError("it computes shapes, no values")
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={str(device)!r} can't be used here ({str(error).splitlines()[0]}). "
            "Pass device='auto' or 'cpu'."
        ) from error
    return resolved


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
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._host.copy_(x, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(x.device))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._done.synchronize()
        return self._host.numpy()


def fetch(x: torch.Tensor) -> Any:
    """Return a tensor as an array, or as what becomes one while the GPU goes on."""
    return _Fetched(x) if x.device.type == "cuda" else x.cpu().numpy()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a GPU, or the system, had no memory left."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
