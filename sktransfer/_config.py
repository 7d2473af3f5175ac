"""Settings of the process: what to do with damaged images, and how many pixels one may have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The environment is the only place of the settings, so that processes started later have them.
_NAMES = {"damaged": "SKTRANSFER_DAMAGED", "max_pixels": "SKTRANSFER_MAX_PIXELS"}


def get_config() -> dict[str, Any]:
    """Return the current settings.

    Returns
    -------
    dict
        `damaged` and `max_pixels`; see `set_config`.

    Examples
    --------
    >>> from sktransfer import get_config
    >>> get_config()
    {'damaged': 'warn', 'max_pixels': 'pillow'}
    """
    damaged = os.environ.get(_NAMES["damaged"], "warn")
    pixels = os.environ.get(_NAMES["max_pixels"], "pillow")
    return {
        "damaged": _check_damaged(damaged, _NAMES["damaged"]),
        "max_pixels": _check_pixels(pixels, _NAMES["max_pixels"]),
    }


def set_config(*, damaged: str | None = None, max_pixels: int | str | None = None) -> None:
    """Change settings of this process, in the way of `sklearn.set_config`.

    They hold for all threads, and stand in the environment as `SKTRANSFER_DAMAGED` and
    `SKTRANSFER_MAX_PIXELS`: worker processes that start later, as those of joblib or dask on this
    machine, take them over. Workers that run already keep theirs; set them there as well, or start
    new ones.

    Parameters
    ----------
    damaged : {"warn", "error"}, default=None
        What happens if a file is damaged, but a part of its pixels can be decoded. "warn", which
        is the setting at the start, uses them and gives a `sktransfer.io.DamagedImageWarning`
        that names row, file and damage. "error" raises a `ValueError`, and takes nothing from a
        memory that was computed while the setting was "warn". None changes nothing. An image
        whose result is in the memory is not decoded again, so nothing is said of it.
    max_pixels : int or "pillow", default=None
        Files with more pixels raise a `ValueError` before they are decoded. "pillow", the setting
        at the start, is the limit at which Pillow raises an error, twice
        `PIL.Image.MAX_IMAGE_PIXELS`: 178,956,970 pixels, or none if that is None. A number counts
        in place of Pillow's limit, and may be larger; TIFF and WebP files, which Pillow measures
        once more, need a larger `PIL.Image.MAX_IMAGE_PIXELS` as well. None changes nothing.

    See Also
    --------
    config_context : Settings for a part of a program.
    get_config : The current settings.

    Examples
    --------
    >>> from sktransfer import config_context, get_config, set_config
    >>> with config_context():  # what is set inside ends with it
    ...     set_config(damaged="error", max_pixels=50_000_000)
    ...     get_config()
    {'damaged': 'error', 'max_pixels': 50000000}
    """
    if damaged is not None:
        _check_damaged(damaged, "damaged")
    if max_pixels is not None:
        os.environ[_NAMES["max_pixels"]] = str(_check_pixels(max_pixels, "max_pixels"))
    if damaged is not None:
        os.environ[_NAMES["damaged"]] = damaged


@contextmanager
def config_context(
    *, damaged: str | None = None, max_pixels: int | str | None = None
) -> Iterator[None]:
    """Change settings for a `with` block; see `set_config` for them.

    The settings are those of the process, so other threads see the change as well.

    Parameters
    ----------
    damaged, max_pixels
        As in `set_config`.

    Examples
    --------
    >>> from sktransfer import config_context, get_config
    >>> with config_context(damaged="error"):
    ...     get_config()["damaged"]
    'error'
    """
    before = {name: os.environ.get(name) for name in _NAMES.values()}
    try:
        set_config(damaged=damaged, max_pixels=max_pixels)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _check_damaged(value: Any, name: str) -> str:
    if value not in ("warn", "error"):
        raise ValueError(f"{name} must be 'warn' or 'error', got {value!r}.")
    return value


def _check_pixels(value: Any, name: str) -> int | str:
    if value == "pillow":
        return value
    try:
        pixels = int(value)
    except (TypeError, ValueError):
        pixels = 0
    if pixels < 1 or isinstance(value, (bool, float)):
        raise ValueError(f"{name} must be a number of pixels from 1, or 'pillow', got {value!r}.")
    return pixels
