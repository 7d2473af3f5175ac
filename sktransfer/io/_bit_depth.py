"""Grey and colours of more than 8 bits: what a file says of them, and what becomes of them."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

# Of TIFF files.
_WIDTH, _BITS, _COMPRESSION, _PHOTOMETRIC, CHANNELS = 256, 258, 259, 262, 277
_LARGEST, _PLANES, _PREDICTOR, _SAMPLES = 281, 284, 317, 339
_NUMBERS = {1: "unsigned integers", 2: "signed integers", 3: "floats", 6: "complex numbers"}
_UNCOMPRESSED, _PACKBITS, _YCBCR = 1, 32773, 6

_REMEDY = "read it with tifffile, divide by the largest possible value, and pass the arrays"
_CAMERAS = (8, 10, 12, 14)  # bits that are often stored in 16


class UnusableImage(ValueError):
    """A file that is whole, but whose pixels can't be used; the message says why, and a remedy."""


def grey_pixels(image: Image.Image) -> tuple[np.ndarray, str]:
    """Return grey of more than 8 bits, and why its brightness may be wrong, or nothing.

    16-bit grey becomes uint8; int32 and float32 are returned as they are, to count as arrays.
    """
    grey = np.asarray(image)
    tags = tags_of_tiff(image)
    white_is_zero = tags.get(_PHOTOMETRIC) == 0
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        return _wide_grey(grey, tags, white_is_zero), ""
    largest = int(grey.max(initial=0))
    bits = _stated_bits(tags, largest)
    grey = np.clip(grey >> (bits - 8), 0, 255).astype(np.uint8)
    return 255 - grey if white_is_zero else grey, too_dark(largest) if bits == 16 else ""


def _wide_grey(grey: np.ndarray, tags: Mapping[int, Any], white_is_zero: bool) -> np.ndarray:
    """Return 32-bit grey of a TIFF file with the sign and the white that the file says."""
    if not tags:
        return grey
    if grey.dtype == np.int32 and (_first(tags, _SAMPLES) or 1) == 1:
        grey = grey.view(np.uint32)
    top, rule = (1, "floats must lie in [0, 1]") if grey.dtype == np.float32 else (255, "")
    low, high = float(grey.min(initial=0)), float(grey.max(initial=0))
    if low < 0 or high > top + 1e-5 * (top == 1):
        raise UnusableImage(
            f"pixels from {low:g} to {high:g} in {kind_of_tiff(tags)}, but "
            f"{rule or 'integers must lie in 0..255'}; divide by the largest possible value: "
            f"{_REMEDY}"
        )
    return top - grey if white_is_zero else grey


def _stated_bits(tags: Mapping[int, Any], largest: int) -> int:
    """Return how many of 16 bits a file says that it uses."""
    if _first(tags, _BITS) == 12:
        return 12
    white = _first(tags, _LARGEST)
    # Some programs write the largest value of the image there, which says nothing of white.
    if isinstance(white, int) and white in {2**n - 1 for n in range(9, 16)} and largest <= white:
        return white.bit_length()
    return 16


def too_dark(largest: int) -> str:
    """Return why 16-bit pixels up to `largest` may be meant brighter, or nothing."""
    bits = next((n for n in _CAMERAS if largest < 2**n), 16)
    if not largest or bits == 16:
        return ""
    return (
        f"its 16-bit pixels reach {largest} of 65535 and come out nearly black, as the file does "
        f"not say that fewer bits are used. If white is {2**bits - 1}, read the file yourself and "
        f"pass arrays, divided by {2**bits - 1}"
    )


def bits_of_file(image: Image.Image) -> int:
    """Return the bits of a sample in a file that is not loaded yet; 8 if nothing is known.

    Pillow brings 2 and 4 bits, and colours of 16, to 8.
    """
    found = re.search(r"[A-Za-z];(2|4|16)(?!\d)", str(getattr(image, "tile", "")))
    return int(found[1]) if found else 8


# ------------------------------------------------------------------------------ TIFF


def refuse_misread(image: Image.Image) -> None:
    """Raise an error for TIFF files of which Pillow returns wrong pixels without a word."""
    tags = tags_of_tiff(image)
    compression = tags.get(_COMPRESSION, _UNCOMPRESSED)
    is_compressed = compression != _UNCOMPRESSED
    bits, sample = _first(tags, _BITS) or 1, _first(tags, _SAMPLES) or 1
    is_little = getattr(tags, "prefix", b"II") == b"II"
    swapped = is_compressed and image.mode in "IF" and is_little != (sys.byteorder == "little")
    planes = bits > 8 and tags.get(_PLANES) == 2 and not is_compressed
    predicted = compression == _PACKBITS and tags.get(_PREDICTOR, 1) != 1
    if swapped or planes or predicted or (bits == 8 and sample == 2):
        raise UnusableImage(f"it is {kind_of_tiff(tags)}, which Pillow misreads; {_REMEDY}")
    if tags.get(_PHOTOMETRIC) == _YCBCR and not is_compressed and image.mode == "RGB":
        raise UnusableImage(
            "it is an uncompressed TIFF in YCbCr, which Pillow misreads before version 13; update "
            "Pillow"
        )


def refuse_unreadable(data: bytes) -> None:
    """Raise an error for files that Pillow takes for damaged ones, with a warning of its own."""
    if data[:4] == b"MM\0+":
        raise UnusableImage(f"it is a big-endian BigTIFF, which Pillow cannot read; {_REMEDY}")


def unread_tiff(data: bytes) -> str:
    """Return what a TIFF file holds that Pillow can't open; nothing if it is none."""
    if data[:4] not in TiffImagePlugin.PREFIXES:
        return ""
    stream = io.BytesIO(data)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(stream.read(16 if 43 in data[2:4] else 8))
        stream.seek(tags.next)
        tags.load(stream)
        return kind_of_tiff(tags) if _WIDTH in tags else ""
    except Exception:  # damaged tags raise almost anything
        return ""


def kind_of_tiff(tags: Mapping[int, Any]) -> str:
    """Return the words for what a TIFF file holds, as "a TIFF of 64-bit floats"."""
    channels = tags.get(CHANNELS, 1)
    words = [
        f"a TIFF of {_first(tags, _BITS) or 1}-bit",
        _NUMBERS.get(_first(tags, _SAMPLES) or 1, "samples of unknown kind"),
        f"in {channels} channels" if channels != 1 else "",
        "whose white is zero (tifffile does not invert it)" if tags.get(_PHOTOMETRIC) == 0 else "",
    ]
    return " ".join(word for word in words if word)


def tags_of_tiff(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of an image of a TIFF file; of others, none."""
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def _first(tags: Mapping[int, Any], tag: int) -> Any:
    value = tags.get(tag)
    return value[0] if isinstance(value, tuple) and value else value
