"""Packages that only some functions need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load_optional(module: str, caller: str, install: str) -> Any:
    """Import a module that need not be there; the error names what wants it, and the command."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{caller} needs {package}: pip install {install}") from error
