"""Images of any channels: their values as a file has them, and not as a picture shows them."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from sktransfer._optional import load_optional
from sktransfer.io._bit_depth import UnusableImage, bits_of_file
from sktransfer.io._codecs import (
    Decoded,
    check_n_pixels,
    load_pixels,
    open_encoded,
    turned,
    upright,
)
from sktransfer.io._messages import pillow_warnings
from sktransfer.io._transparency import refuse_dropped_channels

# Modes of Pillow whose bands are what the file has; a palette and others are not.
_PLAIN = ("1", "L", "LA", "RGB", "RGBA", "I", "I;16", "I;16B", "I;16L", "F")
_INVERTED, _PALETTE = 0, 3  # of what TIFF calls a photometric interpretation
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # else it prints what it raises
_ARRAYS = "read it yourself and pass arrays (height, width, channels)"


def samples(data: bytes, reserve: Callable[[int], Any]) -> Decoded:
    """Return the values of an encoded image (height, width[, channels]), upright.

    `reserve` is called with the number of its pixels before they are decoded. TIFF files are read
    by tifffile: their channels may be samples of a page, planes, or pages of one size.
    """
    if data[:4] in TiffImagePlugin.PREFIXES:
        return Decoded(_tiff_samples(data, reserve))
    with pillow_warnings(), closing(open_encoded(data)) as image:
        check_n_pixels(image.width, image.height)
        reserve(image.width * image.height)
        _refuse_8_of_16_bits(image)
        damage = load_pixels(image, data if image.format == "PNG" else b"")
        return Decoded(_pillow_samples(image), damage)


def samples_of_pillow(image: Image.Image) -> Decoded:
    """Return the values of an image of Pillow, upright."""
    _refuse_8_of_16_bits(image)
    load_pixels(image, b"")
    return Decoded(_pillow_samples(image))


def _pillow_samples(image: Image.Image) -> np.ndarray:
    if image.mode not in _PLAIN:
        raise UnusableImage(
            f"its mode is {image.mode!r}, whose bands are no channels of their own; convert it, as "
            "with image.convert('L') or 'RGB'"
        )
    refuse_dropped_channels(image)
    return upright(np.array(image), image)


def _refuse_8_of_16_bits(image: Image.Image) -> None:
    if bits_of_file(image) == 16 and len(image.getbands()) > 1:
        raise UnusableImage(
            "it has colours of 16 bits, of which Pillow reads 8; save it as TIFF, or " + _ARRAYS
        )


# ------------------------------------------------------------------------------ TIFF


def _tiff_samples(data: bytes, reserve: Callable[[int], Any]) -> np.ndarray:
    tifffile = load_optional("tifffile", "Reading channels of TIFF files", "'.[tiff]'")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = _series_of_image(file)
        page = series[0].keyframe
        _refuse_other_values(page)
        shape, axes = series[0].shape, series[0].axes
        if len(series) > 1:  # pages that were written one by one
            shape, axes = (len(series), *shape), "I" + axes
        places = _places_of_axes(axes, shape)
        height, width = (shape[i] for i in places[:2])
        check_n_pixels(width, height)
        reserve(math.prod(shape))
        try:
            values = np.stack([each.asarray() for each in series]).reshape(shape)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            reason = f"its compression is one that tifffile does not read by itself ({error})"
            raise UnusableImage(f"{reason}: pip install imagecodecs") from error
    orientation = int(page.tags.valueof("Orientation", 1))
    return turned(values.transpose(places), orientation)  # (height, width[, channels])


def _series_of_image(file: Any) -> list[Any]:
    """Return the pages that are the image; smaller copies and masks of it are none."""
    series = [s for s in file.series if not (s.keyframe.is_reduced or s.keyframe.is_mask)]
    if not series:
        raise OSError("it has no pages")
    first = series[0]
    are_alike = all((s.shape, s.dtype) == (first.shape, first.dtype) for s in series)
    if len(series) == 1 or (are_alike and first.axes == "YX"):
        return series
    sizes = [f"{' × '.join(map(str, each.shape))} {each.dtype}" for each in series]
    listed = ", ".join(sizes[:4]) + ", ..." * (len(sizes) > 4)
    raise UnusableImage(
        f"its pages have different sizes or types ({listed}), so they are not the channels of one "
        f"image; {_ARRAYS}"
    )


def _refuse_other_values(page: Any) -> None:
    kind = int(page.photometric)
    if kind in (_INVERTED, _PALETTE):
        what = "its white is 0" if kind == _INVERTED else "its values are numbers of a palette"
        raise UnusableImage(f"{what}, which tifffile leaves as it is; {_ARRAYS}")


def _places_of_axes(axes: str, shape: tuple[int, ...]) -> list[int]:
    """Return the places of height, width and, if there are any, channels."""
    others = [i for i, axis in enumerate(axes) if axis not in "YX"]
    if len(others) > 1 or "Y" not in axes or "X" not in axes:
        size = " × ".join(map(str, shape))
        raise UnusableImage(
            f"it is a stack of {size} with the axes {axes!r}, and an image has height, width and "
            f"channels; {_ARRAYS}"
        )
    return [axes.index("Y"), axes.index("X"), *others]
