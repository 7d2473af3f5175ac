"""Settings of the process: damaged images, transparent ones, and how many pixels one may have."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# The environment is the only place of the settings, so that processes started later have them.
_NAMES = {
    "damaged": "SKTRANSFER_DAMAGED",
    "max_pixels": "SKTRANSFER_MAX_PIXELS",
    "background": "SKTRANSFER_BACKGROUND",
}


def get_config() -> dict[str, Any]:
    """Return the current settings.

    Returns
    -------
    dict
        `damaged`, `max_pixels` and `background`, a tuple of three ints; see `set_config`.

    Examples
    --------
    >>> from sktransfer import get_config
    >>> get_config()
    {'damaged': 'warn', 'max_pixels': 'pillow', 'background': (255, 255, 255)}
    """
    damaged = os.environ.get(_NAMES["damaged"], "warn")
    pixels = os.environ.get(_NAMES["max_pixels"], "pillow")
    background = os.environ.get(_NAMES["background"], "white")
    return {
        "damaged": _check_damaged(damaged, _NAMES["damaged"]),
        "max_pixels": _check_pixels(pixels, _NAMES["max_pixels"]),
        "background": _check_colour(background, _NAMES["background"]),
    }


def set_config(
    *,
    damaged: str | None = None,
    max_pixels: int | str | None = None,
    background: str | Sequence[int] | None = None,
) -> None:
    """Change settings of this process, in the way of `sklearn.set_config`.

    They hold for all threads, and stand in the environment as `SKTRANSFER_DAMAGED`,
    `SKTRANSFER_MAX_PIXELS` and `SKTRANSFER_BACKGROUND`: worker processes that start later, as those
    of joblib or dask on this machine, take them over. Workers that run already keep theirs; set
    them there as well, or start new ones. A fitted model does not remember them.

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
    background : str or (red, green, blue), default=None
        The colour on which the transparent parts of files and PIL images lie: a name or a code of
        `PIL.ImageColor`, such as "black" or "#808080", or three integers in 0..255. It is white
        at the start. Predict with the colour that the model was fitted with. A memory keeps the
        results of both colours; those of JPEG files, which can't be transparent, are the same.
        None changes nothing.

    See Also
    --------
    config_context : Settings for a part of a program.
    get_config : The current settings.

    Examples
    --------
    >>> from sktransfer import config_context, get_config, set_config
    >>> with config_context():  # what is set inside ends with it
    ...     set_config(damaged="error", max_pixels=50_000_000, background="black")
    ...     get_config()
    {'damaged': 'error', 'max_pixels': 50000000, 'background': (0, 0, 0)}
    """
    if damaged is not None:
        _check_damaged(damaged, "damaged")
    colour = None if background is None else _check_colour(background, "background")
    if max_pixels is not None:
        os.environ[_NAMES["max_pixels"]] = str(_check_pixels(max_pixels, "max_pixels"))
    if damaged is not None:
        os.environ[_NAMES["damaged"]] = damaged
    if colour is not None:
        os.environ[_NAMES["background"]] = "#{:02x}{:02x}{:02x}".format(*colour)


@contextmanager
def config_context(
    *,
    damaged: str | None = None,
    max_pixels: int | str | None = None,
    background: str | Sequence[int] | None = None,
) -> Iterator[None]:
    """Change settings for a `with` block; see `set_config` for them.

    The settings are those of the process, so other threads see the change as well.

    Parameters
    ----------
    damaged, max_pixels, background
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
        set_config(damaged=damaged, max_pixels=max_pixels, background=background)
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


def _check_colour(value: Any, name: str) -> tuple[int, int, int]:
    try:
        return _colour_of(value if isinstance(value, str) else tuple(value))
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a colour without transparency: a name such as 'white', a code such as "
            f"'#ffffff', or three integers in 0..255, got {value!r}."
        ) from None


@functools.lru_cache
def _colour_of(value: str | tuple[int, ...]) -> tuple[int, int, int]:
    from PIL import ImageColor  # here, as the command line's `--help` should not wait for it

    colour = ImageColor.getrgb(value) if isinstance(value, str) else value
    red, green, blue = (operator.index(level) for level in colour)
    if not all(0 <= level <= 255 for level in (red, green, blue)):
        raise ValueError("out of range")
    return red, green, blue
