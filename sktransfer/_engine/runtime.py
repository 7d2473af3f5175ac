"""What runs a slice of a network: torch, or on a CPU OpenVINO, where it is installed."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sktransfer._engine.openvino_program import TOLERANCE, core
from sktransfer._engine.program_file import ProgramFile

RUNTIMES = ("auto", "torch", "openvino")

_SMALL = 100_000  # parameters; a smaller network takes less time than reading its images
# Images for each core until a compiled program has paid off: some for any network, and more the
# smaller it is, as compiling a small one takes as long. Measured by `benchmarks/cold_start.py`.
_IMAGES_TO_PAY_OFF, _GFLOP_TO_PAY_OFF = 25, 30
_SHARE_IF_KEPT = 0.4  # of them, for a program that is only read from a file
_EXTRA = "pip install '.[openvino]'"
_lost_threads = False  # this process was forked from one in which OpenVINO runs


def resolve_runtime(
    runtime: str, device: torch.device, precision: str, network: nn.Module, name: str
) -> str:
    """Return `"torch"` or `"openvino"`; warn if what is asked for can't be had.

    In 8 bits nothing else can take its place, so that is an error. Whether OpenVINO can be
    imported is not tried where it may never be used.
    """
    if precision == "int8":
        check_can_quantise(runtime, device)
        return "openvino"
    if runtime == "torch":
        return runtime
    reason = _reason_against(device, precision)
    if reason is None and runtime == "auto" and _is_small(network):
        return "torch"
    if reason is None and not waits_for_work(runtime, precision):
        if reason := why_not_imported():
            runtime = "openvino"  # it is installed, so the user counts on it
    if reason is None:
        return "openvino"
    if runtime == "openvino":
        warn_fallback(name, reason)
    return "torch"


def waits_for_work(runtime: str, precision: str) -> bool:
    """Tell whether torch computes until compiling pays off.

    Below float32 the rows of both differ, so one of them computes all.
    """
    return runtime == "auto" and precision == "float32"


def is_worth_compiling(
    flops: float, n_images: float, n_cores: int, file: ProgramFile | None = None
) -> bool:
    """Tell whether OpenVINO, compiling included, takes less time than torch.

    Parameters
    ----------
    flops : float
        Floating point operations of the program for one image, as torch counts them.
    n_images : float
        That the program has run, or will.
    n_cores : int
        They share the images, but not the compiling.
    file : ProgramFile, optional
        Where the program is, if it was compiled before.
    """
    worth = _IMAGES_TO_PAY_OFF + _GFLOP_TO_PAY_OFF / max(flops / 1e9, 1e-3)
    share = _SHARE_IF_KEPT if file is not None and file.exists() else 1
    return n_images >= n_cores * worth * share


def warn_fallback(name: str, reason: str) -> None:
    """Say that torch computes instead, and why."""
    message = f"Backbone {name!r} runs on torch, not on OpenVINO: {reason}."
    warnings.warn(message, UserWarning, stacklevel=2)


def forget_openvino(programs: Iterable[Any]) -> None:
    """Have a forked child use torch: OpenVINO waits for threads that only the parent has.

    So does the end of its objects, which therefore never comes: not even with the process.
    """
    global _lost_threads
    if core.cache_info().currsize:
        _lost_threads = True
        for kept in (core(), *programs):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _reason_against(device: torch.device, precision: str) -> str | None:
    if device.type != "cpu":
        return f"runtime='openvino' is for a CPU, and the device is {str(device)!r}"
    if precision not in TOLERANCE:
        return f"it does not compute in {precision}"
    if (reason := why_not_after_fork()) is not None:
        return reason
    if importlib.util.find_spec("openvino") is None:
        return f"it is not installed: {_EXTRA}"
    return None


def why_not_after_fork() -> str | None:
    """Return why OpenVINO can't be used in this process, if it is a fork."""
    if not _lost_threads:
        return None
    return (
        "this process was forked from one in which OpenVINO runs; start it by the method 'spawn' "
        "or 'forkserver' of multiprocessing, or by joblib's default, loky"
    )


def why_not_imported() -> str | None:
    """Return why OpenVINO, which is installed, can't be imported."""
    if error := _import_error():
        return f"OpenVINO can't be imported ({error}); reinstall it: {_EXTRA}"
    return None


def _is_small(network: nn.Module) -> bool:
    return sum(p.numel() for p in network.parameters()) < _SMALL


@functools.cache
def _import_error() -> str:
    try:
        core()
    except Exception as error:  # a broken installation can fail in any way
        return f"{type(error).__name__}: {error}"
    return ""


def check_can_quantise(runtime: str, device: torch.device) -> None:
    """Raise an error, which says what to use, where 8 bits can't be had."""
    if device.type != "cpu":
        raise ValueError(
            f"precision='int8' is for a CPU, and the device is {str(device)!r}. Pass "
            "precision='bfloat16' or 'float16' there, or device='cpu'."
        )
    if runtime == "torch":
        raise ValueError(
            "precision='int8' is computed by OpenVINO. Pass runtime='auto' or 'openvino', or "
            "precision='bfloat16' or 'float32' with runtime='torch'."
        )
    if (reason := why_not_after_fork()) is not None:
        raise RuntimeError(f"precision='int8' can't be computed here: {reason}.")
    for package in ("openvino", "nncf"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"precision='int8' needs {package}, which is not installed: pip install '.[int8]'"
            )
    if reason := why_not_imported():
        raise ImportError(f"precision='int8' can't be computed here: {reason}")


def warn_without_instructions(precision: str, device: torch.device) -> None:
    """Warn if a CPU computes in `bfloat16` or `int8` but has no instructions for it."""
    if precision == "int8" and device.type == "cpu" and not has_int8():
        warnings.warn(
            "This CPU has no instructions for 8 bits (VNNI): precision='int8' gains less "
            "here than on others. precision='float32' is more exact.",
            UserWarning,
            stacklevel=2,
        )
    if precision == "bfloat16" and device.type == "cpu" and not has_bfloat16():
        warnings.warn(
            "This CPU has no bfloat16 instructions: precision='bfloat16' makes nothing faster "
            "here, and torch slower. Use precision='float32'.",
            UserWarning,
            stacklevel=2,
        )


@functools.cache
def has_bfloat16(if_unknown: bool = True) -> bool:
    """Tell whether the CPU multiplies in bfloat16; `if_unknown` where that is not known."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return if_unknown
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


@functools.cache
def has_int8() -> bool:
    """Tell whether the CPU multiplies in 8 bits and adds in 32."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # not known
    names = ("_is_vnni_supported", "_is_avx512_vnni_supported", "_is_amx_tile_supported")
    known = [getattr(torch.cpu, name) for name in names if hasattr(torch.cpu, name)]
    return not known or any(is_supported() for is_supported in known) or _has_avx_vnni()


def _has_avx_vnni() -> bool:
    """Tell whether the system names the instructions of CPUs without AVX-512."""
    try:
        return "avx_vnni" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
