"""Compiled programs on disk: what one process compiled, the next one reads."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import shutil
import struct
import uuid
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from xxhash import xxh3_128, xxh3_128_hexdigest

_HEAD = struct.Struct("<8s16sQ")  # what it is, a digest of what follows, bytes of the results
_MAGIC = b"skt-prg3"
_SHARE_OF_DISK = 0.1  # of what is free, that a new file may take


class KeptProgram(NamedTuple):
    """What a file of a program holds.

    Attributes
    ----------
    blob : bytes
        As OpenVINO exports a compiled model.
    expected : list of list of ndarray
        What torch computed for each of the inputs by which the program was checked; in 8 bits,
        then what the program did.
    """

    blob: bytes
    expected: list[list[np.ndarray]]


class ProgramFile:
    """The place of a program on disk; of a compiled one, for this machine and these versions alone.

    Trouble with the disk never raises and never warns: it only means that the program is compiled.

    Parameters
    ----------
    folder : str or path-like
        Made when the first program is written.
    *parts : object
        All that shapes the program, the weights of its network included; their `repr` must be
        alike in every process.
    suffix : str, default=".program"
    is_of_machine : bool, default=True
        Whether it is of no use on another machine.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *parts: object,
        suffix: str = ".program",
        is_of_machine: bool = True,
    ) -> None:
        surroundings = _surroundings() if is_of_machine else ()
        name = xxh3_128_hexdigest(repr((*parts, *surroundings)).encode())
        self.path = Path(folder) / f"{name}{suffix}"

    def exists(self) -> bool:
        """Tell whether there is such a file; it may still turn out to be damaged."""
        return self.path.is_file()

    def read(self) -> KeptProgram | None:
        """Return what was written; None if there is nothing, or if it is damaged."""
        with contextlib.suppress(OSError, ValueError, EOFError, MemoryError, struct.error):
            if self.path.is_file():  # opening a pipe would wait for whoever writes to it
                with self.path.open("rb") as file:
                    return _read(file, self.path.stat().st_size, self.path.name)
        return None

    def write(self, program: KeptProgram) -> None:
        """Keep a program, whole or not at all, unless it took much of what is free on the disk."""
        draft = self.path.with_name(f".{uuid.uuid4().hex}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if len(program.blob) > _SHARE_OF_DISK * shutil.disk_usage(self.path.parent).free:
                return
            with draft.open("xb") as file:
                _write(file, program, self.path.name)
            draft.replace(self.path)
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the file, if it is there and may be removed."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def _write(file: BinaryIO, program: KeptProgram, name: str) -> None:
    results = BytesIO()
    for arrays in program.expected:
        results.write(struct.pack("<Q", len(arrays)))
        for array in arrays:
            np.lib.format.write_array(results, array, allow_pickle=False)
    digest = _digest(name, results.getvalue(), program.blob)
    file.write(_HEAD.pack(_MAGIC, digest, len(results.getvalue())))
    file.write(results.getvalue())
    file.write(program.blob)


def _read(file: BinaryIO, size: int, name: str) -> KeptProgram:
    magic, expected_digest, n_bytes = _HEAD.unpack(file.read(_HEAD.size).ljust(_HEAD.size, b"\0"))
    if magic != _MAGIC or n_bytes > size:
        raise ValueError("not a program, or cut off")
    results, blob = file.read(n_bytes), file.read()
    if _digest(name, results, blob) != expected_digest:
        raise ValueError("damaged, or that of another program")
    return KeptProgram(blob, _arrays(BytesIO(results)))


def _digest(name: str, results: bytes, blob: bytes) -> bytes:
    digest = xxh3_128(f"{name} {len(results)}:".encode())  # where one ends and the other begins
    digest.update(results)
    digest.update(blob)
    return digest.digest()


def _arrays(file: BytesIO) -> list[list[np.ndarray]]:
    lists = []
    while count := file.read(8):
        (n_arrays,) = struct.unpack("<Q", count)
        lists.append([np.lib.format.read_array(file, allow_pickle=False) for _ in range(n_arrays)])
    return lists


@functools.cache
def _surroundings() -> tuple[str, ...]:
    """Name what a compiled program depends on besides its network: versions, and the CPU."""
    torch_version = ".".join(torch.__version__.split(".")[:2])
    machine = platform.system(), platform.machine(), platform.processor()
    return (_openvino_version(), torch_version, *machine, *_cpu())


def _openvino_version() -> str:
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:  # not every packager installs that file
        import openvino

        return openvino.__version__


def _cpu() -> list[str]:
    """Return the model and the instructions of the CPU, where the system tells them."""
    names = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # Arm has the last
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return [torch.backends.cpu.get_cpu_capability()]
    return [line for line in first.splitlines() if line.partition(":")[0].strip() in names]
