"""Which code is known by a version, and digests of the source files of installed code."""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import xxhash

_SITES = ("site-packages", "dist-packages")  # where packages are installed
_STDLIB = sysconfig.get_path("stdlib") + os.sep
# The memory's keys have the versions of torch and torchvision, and one of what this library
# computes. Of Python and NumPy the results are always the same.
_BY_VERSION = tuple(
    os.path.dirname(file) + os.sep
    for file in (torch.__file__, torchvision.__file__, np.__file__, os.path.dirname(__file__))
)


def is_known_by_version(module: str, file: str | None) -> bool:
    """Return whether code is torch's, torchvision's, NumPy's, Python's or this library's."""
    if file is None:
        return module in sys.builtin_module_names
    if file.startswith("<frozen "):
        return True
    is_python = file.startswith(_STDLIB) and not any(site in file for site in _SITES)
    return is_python or file.startswith(_BY_VERSION)


def file_of(module: str) -> str | None:
    """Return the file of a module that is loaded, if it has one: a notebook's cells have none."""
    if module in ("__main__", "__mp_main__"):
        return None
    return getattr(sys.modules.get(module), "__file__", None)


class Sources:
    """Digests of installed modules by their source files, alike in every process.

    A digest covers the file of a module, and those of the modules of the same package whose
    functions and classes it names, and so on: what a network calls lies in them.
    """

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}
        self._imported: dict[str, str | None] = {}

    def digest(self, module: str) -> str | None:
        """Return the digest of a module; None if its files may not be what is loaded, or are none.

        This is so of what is not installed, of what was changed since this process began, and of
        what is known by its version.
        """
        if module not in self._known:
            self._known[module] = self._find(module)
        return self._known[module]

    def imported(self, module: str) -> str | None:
        """Return the digest of a module that a function imports; it may not be loaded yet.

        It covers the modules that this one imports, if they are not installed either. None if one
        is loaded that may not be what is in its file.
        """
        if module not in self._imported:
            self._imported[module] = _import_digest(module)
        return self._imported[module]

    def _find(self, module: str) -> str | None:
        file = file_of(module) or ""
        if is_known_by_version(module, file) or not any(site in file for site in _SITES):
            return None
        digest = xxhash.xxh3_128()
        for name in sorted(_modules_used_by(module)):
            if (content := _content_digest(file_of(name))) is None:
                return None
            digest.update(f"{name} {content} ".encode())
        return digest.hexdigest()


def _modules_used_by(module: str) -> set[str]:
    """Return the modules of one package that a module needs, itself included."""
    package = module.partition(".")[0]
    modules: set[str] = set()
    names = [module]
    while names:
        name = names.pop()
        if name not in modules and name.partition(".")[0] == package and file_of(name):
            modules.add(name)
            names += _modules_named_in(sys.modules[name])
    return modules


def _modules_named_in(module: types.ModuleType) -> Iterator[str]:
    """Yield the modules that define what a module names."""
    for value in list(vars(module).values()):
        kind = type(value)  # what an object says of its own class may run code, or warn
        if issubclass(kind, (type, types.FunctionType)):
            name = value.__module__
        elif kind is not types.ModuleType:  # a lazy module is of another class
            name = kind.__module__
        elif hasattr(module, "__path__"):
            continue  # which of them a package has depends on what was imported before
        else:
            name = value.__name__
        if isinstance(name, str):
            yield name


# ------------------------------------------------------------------------------ imports


def imports_of(code: types.CodeType, scope: Mapping[str, Any]) -> set[str]:
    """Return the names of modules that code imports, and what of their names may be modules.

    `scope` has `__package__`, to which relative names refer.
    """
    names: set[str] = set()
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for i, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            level, wanted = steps[i - 2].argval, steps[i - 1].argval or ()
            with contextlib.suppress(ImportError):  # relative, and of no package
                relative = "." * level + step.argval
                name = importlib.util.resolve_name(relative, scope.get("__package__"))
                names |= {name, *(f"{name}.{part}" for part in wanted)}
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return names.union(*(imports_of(part, scope) for part in inner))


def _import_digest(module: str) -> str | None:
    digest = xxhash.xxh3_128()
    found: set[str] = set()
    names = [module]
    while names:
        name = names.pop(0)
        if name in found or (spec := _own_spec(name)) is None:
            continue
        found.add(name)
        if name in sys.modules and _content_digest(spec.origin) is None:
            # What it uses was edited meanwhile: no other process knows what this one has loaded.
            return None if module in sys.modules else str(_START_OF_PROCESS)
        with contextlib.suppress(ImportError, SyntaxError, AttributeError):
            source: str = spec.loader.get_source(name) or ""  # type: ignore[union-attr]
            digest.update(f"{name} {len(source)} {source}".encode())
            names += sorted(imports_of(compile(source, name, "exec"), {"__package__": spec.parent}))
    return digest.hexdigest()


def _own_spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """Return where a module lies that is not installed; neither it nor its packages are run."""
    spec = None
    name, _, rest = module.partition(".")
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
    while spec is not None and rest:
        part, _, rest = rest.partition(".")
        name, folders = f"{name}.{part}", spec.submodule_search_locations or []
        spec = importlib.machinery.PathFinder.find_spec(name, folders)
    if spec is None or is_known_by_version(module, spec.origin):
        return None
    return None if any(site in (spec.origin or "") for site in _SITES) else spec


# ------------------------------------------------------------------------------ files


def _content_digest(file: str | None) -> str | None:
    """Return the digest of a file, or None if it changed since this process began."""
    try:
        status = os.stat(file or "")
        # When it was written, or put there as a link to what was written earlier.
        if max(status.st_mtime, status.st_ctime) < _START_OF_PROCESS:
            return _read_once(str(file))
    except OSError:  # it lies in an archive, or is gone
        pass
    return None


@functools.cache
def _read_once(file: str) -> str:
    return xxhash.xxh3_128_hexdigest(Path(file).read_bytes())


def _process_start() -> float:
    """Return when this process began; where the system does not tell, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        if not ticks:
            return time.time()
        since = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.time()
    return time.time() - since


_START_OF_PROCESS = _process_start()
