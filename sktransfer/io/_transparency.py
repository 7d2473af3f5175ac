"""Transparent images: which may be it, and the colour on which they lie; other fourth channels."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from sktransfer.io._bit_depth import CHANNELS, UnusableImage, kind_of_tiff, tags_of_tiff

Colour = tuple[int, int, int]

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_WITH_ALPHA = b"\x04", b"\x06"  # among the kinds of colours of PNG
_OPAQUE_WEBP = b"VP8 "  # a file of WebP that has no other part


def may_be_transparent(data: bytes) -> bool:
    """Tell, without decoding, whether an encoded image may have transparent pixels."""
    if data.startswith(_JPEG):
        return False
    if data.startswith(_PNG) and data[12:16] == b"IHDR":
        return data[25:26] in _WITH_ALPHA or b"tRNS" in data
    return not (data[:4] == b"RIFF" and data[8:16] == b"WEBP" + _OPAQUE_WEBP)


def on_background(image: Image.Image, background: Colour) -> Image.Image:
    """Return an image as RGB, on a background where it is transparent."""
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image  # Pillow's only way
        with_alpha = straight if straight.mode == "RGBA" else straight.convert("RGBA")
        lowest: Any = with_alpha.getchannel("A").getextrema()[0]
        if lowest < 255:
            ground = Image.new("RGBA", image.size, background)
            return Image.alpha_composite(ground, with_alpha).convert("RGB")
        image = with_alpha
    return image if image.mode == "RGB" else image.convert("RGB")


def key_in_8_bits(image: Image.Image, bits: int) -> Any:
    """Return what a file says is transparent: a colour, or entries of the palette.

    None if it says nothing, or what does not fit to the image, as its user may have changed it.
    """
    key = image.info.get("transparency")
    if image.mode == "P" and isinstance(key, bytes):
        return key[:256]
    if image.mode == "1" and isinstance(key, int):
        return 255 * bool(key)
    levels = key if isinstance(key, tuple) else (key,)
    is_whole = all(isinstance(level, int) for level in levels)
    if image.mode not in ("L", "P", "RGB") or len(levels) != len(image.mode) or not is_whole:
        return None
    if image.mode != "P":
        levels = tuple(x >> 8 if bits == 16 else x * 255 // (2**bits - 1) for x in levels)
    if not all(0 <= level <= 255 for level in levels):
        return None
    return levels if image.mode == "RGB" else levels[0]


def grey_on_background(grey: np.ndarray, image: Image.Image, background: Colour) -> np.ndarray:
    """Put 16-bit grey on a background where it has the level that the file calls transparent."""
    key = image.info.get("transparency")
    if grey.dtype != np.uint8 or not isinstance(key, int):
        return grey
    is_clear = np.asarray(image) == key
    if not is_clear.any():
        return grey
    return np.where(is_clear[..., None], np.array(background, np.uint8), grey[..., None])


def without_others(n_channels: int, rest: str) -> str:
    """Return what to do with 2, 4 or more channels; `rest` is the code that takes some of them."""
    kind, part = ("grey", ":1") if n_channels == 2 else ("RGB", ":3")
    transparency = ""
    if n_channels in (2, 4):
        transparency = ", or show transparency on a colour with PIL.Image.alpha_composite"
    return (
        f"an image has 1 or 3 channels, and none of {n_channels} is dropped unasked: for a network "
        f"of {n_channels}, pass backbone=sktransfer.ChannelAdapter(backbone, n_channels="
        f"{n_channels}); or convert to {kind}: pass {rest.format(part)} if these are "
        f"{kind}{transparency}"
    )


def refuse_dropped_channels(image: Image.Image) -> None:
    """Raise an error for a TIFF file of whose channels Pillow leaves some out, without a word.

    It reads alpha that the file calls so, and no other fourth channel, such as near infrared.
    """
    tags = tags_of_tiff(image)
    n_channels, n_read = tags.get(CHANNELS, 1), len(image.getbands())
    if n_channels > n_read:
        mode = "L" if image.mode == "L" else "RGB"
        remedy = without_others(n_channels, f"PIL.Image.open(path).convert({mode!r})")
        raise UnusableImage(f"it is {kind_of_tiff(tags)}, of which Pillow reads {n_read}; {remedy}")
