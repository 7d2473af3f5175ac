"""Encoded images become pixels, and what is wrong with them becomes words."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import simplejpeg  # tells what libjpeg warns of: Pillow hides it, torchvision prints it
import torch
import torchvision  # noqa: F401  (registers torch.ops.image)
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from sktransfer._config import get_config
from sktransfer.io._bit_depth import (
    bits_of_file,
    grey_pixels,
    refuse_misread,
    refuse_unreadable,
    too_dark,
    unread_tiff,
)
from sktransfer.io._messages import libtiff_messages, pillow_warnings
from sktransfer.io._transparency import (
    Colour,
    grey_on_background,
    key_in_8_bits,
    on_background,
    refuse_dropped_channels,
)

_STRIP = 2**20  # pixels that are converted at once
_JUNK = 1024  # bytes in front of a JPEG that are looked at
_DAMAGE = ("Corrupt JPEG data", "Inconsistent progression")  # how libjpeg's warnings begin
_HARMLESS = "bad ICC marker"
_END_OF_JPEG = b"\xff\xd9"
_STARTS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8", "MPO": b"\xff\xd8"}
_KINDS = {b"\xff\xd8\xff": ("JPEG",), _STARTS["PNG"]: ("PNG",)}
_SEEN = "_sktransfer_seen"  # the attribute of a user's image with what is in `_Seen`


class Decoded(NamedTuple):
    """Upright pixels, and what is to be said of them."""

    pixels: np.ndarray  # uint8 RGB (height, width, 3), or 32-bit grey (height, width)
    damage: str = ""  # what is wrong with the file, though it could be decoded
    doubt: str = ""  # why its pixels may be wrong


class _Seen(NamedTuple):
    """What is seen only when an image is loaded."""

    frame: int
    bits: int  # of a sample, before it became 8
    damage: str = ""
    error: str = ""


def decode(data: bytes, background: Colour, reserve: Callable[[int], Any]) -> Decoded:
    """Decode an encoded image; `reserve` is called with the number of its pixels before."""
    return _with_warnings(lambda: _decode(data, background, reserve))


def decode_pillow(image: Image.Image, background: Colour) -> Decoded:
    """Return the pixels of an image of Pillow, which is loaded as a file is if it is not yet."""
    return _with_warnings(lambda: _decode_pillow(image, background))


def _with_warnings(decode: Callable[[], Decoded]) -> Decoded:
    """Return what is decoded, with the first of Pillow's warnings if there is nothing worse."""
    with pillow_warnings() as said:
        decoded = decode()
    if said and not decoded.damage and not decoded.doubt:
        return decoded._replace(doubt=f"Pillow says of the file: {said[0].strip().rstrip('.')}")
    return decoded


def _decode(data: bytes, background: Colour, reserve: Callable[[int], Any]) -> Decoded:
    with closing(open_encoded(data)) as image:
        check_n_pixels(image.width, image.height)
        reserve(image.width * image.height)
        damage = ""
        if image.format in ("JPEG", "MPO"):
            pixels, damage = _jpeg_pixels(image, data)
        else:
            pixels = _webp_pixels(image, data, background)
        if pixels is not None:
            return Decoded(upright(pixels, image), damage)
        bits = bits_of_file(image)  # seen before it is loaded only
        damage = load_pixels(image, data if image.format == "PNG" else b"") or damage
        return _decoded(image, background, bits)._replace(damage=damage)


def _decode_pillow(image: Image.Image, background: Colour) -> Decoded:
    if not isinstance(image, ImageFile.ImageFile):
        image.load()
        return _decoded(image, background)
    if image.tile:
        _load_of_user(image)
    image.load()
    seen = getattr(image, _SEEN, None)
    if seen is None or seen.frame != image.tell():  # the user loaded it
        return _decoded(image, background)
    if seen.error:
        raise OSError(seen.error)
    return _decoded(image, background, seen.bits)._replace(damage=seen.damage)


def _load_of_user(image: ImageFile.ImageFile) -> None:
    """Load an image, and keep with it what is seen only then: it may be asked for once more."""
    seen = _Seen(image.tell(), bits_of_file(image))
    try:
        seen = seen._replace(damage=load_pixels(image, _bytes_not_loaded(image)))
    except Exception as error:
        if not image.tile:  # libtiff's errors leave it as if it were loaded
            setattr(image, _SEEN, seen._replace(error=str(error)))
        raise
    setattr(image, _SEEN, seen)


def _bytes_not_loaded(image: ImageFile.ImageFile) -> bytes:
    """Return the file of a PNG or a JPEG that is not loaded yet; nothing of later frames."""
    start, file = _STARTS.get(image.format or ""), image.fp
    if start is None or image.tell() or file is None:
        return b""
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    return data if data.startswith(start) else b""


def _decoded(image: Image.Image, background: Colour, bits: int = 8) -> Decoded:
    refuse_dropped_channels(image)
    if image.mode[0] in "IF":
        pixels, doubt = grey_pixels(image)
        pixels = grey_on_background(pixels, image, background)
    else:
        pixels, doubt = _rgb(image, background, bits), ""
        if bits == 16 and (largest := int(pixels.max(initial=0))):
            doubt = too_dark(largest << 8 | 255)  # the lower byte is lost: of black nobody can tell
    return Decoded(upright(pixels, image), doubt=doubt)


def why_unknown(data: bytes) -> str:
    """Return why Pillow can't identify an image, and a remedy."""
    with pillow_warnings() as said:
        kind = unread_tiff(data)
    if kind and not said:  # else its tags are damaged, those of its kind perhaps as well
        return (
            f"it is {kind}, which Pillow cannot read; read it with tifffile and pass the array, "
            "scaled to [0, 1]"
        )
    if data[:3] == b"\xff\xd8\xff":
        return (
            "it starts as a JPEG, but Pillow cannot read its header, which is damaged or of a rare "
            "kind (such as 12 bits a sample); replace it, or drop the row"
        )
    is_tiff = data[:4] in (b"II*\0", b"MM\0*")  # in which a JPEG may lie
    junk = 0 if is_tiff else data[: _JUNK + 3].find(b"\xff\xd8\xff")
    if junk > 0:
        return (
            f"{junk} bytes stand in front of a JPEG ({data[: min(junk, 12)]!r}); cut them off "
            f"(data[{junk}:]), or drop the row"
        )
    return f"Pillow knows no image that starts with {data[:12]!r}; replace it, or drop the row"


def open_encoded(data: bytes) -> Image.Image:
    refuse_unreadable(data)
    # Only their own plugins: once all are loaded, others would try to read them before.
    formats = next((kinds for start, kinds in _KINDS.items() if data.startswith(start)), None)
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        if get_config()["max_pixels"] == "pillow":
            raise
    for name in Image.ID:  # `Image.open` without its limit, which is that of the whole process
        plugin, accepts = Image.OPEN[name]
        if accepts is None or accepts(data[:16]) is True:
            try:
                return plugin(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
    raise UnidentifiedImageError("no plugin opens it")


def check_n_pixels(width: int, height: int) -> None:
    """Raise an error for an image of more pixels than `set_config` or Pillow allows."""
    limit, pixels = get_config()["max_pixels"], width * height
    if limit == "pillow":
        limit = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else pixels
    if pixels > limit:
        raise Image.DecompressionBombError(
            f"{width} × {height} = {pixels} pixels, but max_pixels is {limit}"
        )


# ------------------------------------------------------------------------------ pixels


def _rgb(image: Image.Image, background: Colour, bits: int = 8) -> np.ndarray:
    """Convert strip by strip: Pillow's copies take 4 bytes a pixel each."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    key = key_in_8_bits(image, bits)
    # Pillow's limit, as cutting out a strip is checked by it.
    rows = max(1, min(_STRIP, Image.MAX_IMAGE_PIXELS or _STRIP) // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom))
        strip.info.pop("transparency", None)
        if key is not None:
            strip.info["transparency"] = key
        pixels[top:bottom] = np.asarray(on_background(strip, background))
    return pixels


def upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Turn pixels as the EXIF data of their image say."""
    return turned(pixels, _orientation(image))


def turned(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    """Turn pixels as a number of EXIF says, of which 1 is upright."""
    if orientation not in range(2, 9):
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if pixels.ndim == 2:
        return np.ascontiguousarray(pixels)
    copied = np.empty(pixels.shape, pixels.dtype)
    for channel in range(pixels.shape[2]):  # faster than all at once
        copied[..., channel] = pixels[..., channel]
    return copied


def _orientation(image: Image.Image) -> Any:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _webp_pixels(image: Image.Image, data: bytes, background: Colour) -> np.ndarray | None:
    """Decode a WebP file at once, where Pillow keeps five copies; None if it is for Pillow."""
    if image.format != "WEBP" or getattr(image, "is_animated", False):
        return None
    encoded = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    mode = 4 if image.mode == "RGBA" else 3  # torchvision's RGB_ALPHA and RGB
    try:
        pixels = torch.ops.image.decode_webp(encoded, mode).permute(1, 2, 0).numpy()
    except (AttributeError, RuntimeError):
        return None  # torchvision has none, or the data are damaged: Pillow says how
    return pixels if mode == 3 else _rgb(Image.fromarray(pixels), background)


# ------------------------------------------------------------------------------ JPEG


def is_sound_jpeg(data: bytes) -> bool:
    """Tell whether libjpeg decodes a JPEG without a warning, at an eighth of its size.

    What this tells nothing of, as of CMYK, has to be decoded as a whole.
    """
    if not data.startswith(_STARTS["JPEG"]):
        return False
    with pillow_warnings(), closing(open_encoded(data)) as image:
        check_n_pixels(image.width, image.height)
        _orientation(image)  # of which damaged tags make an error
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
    except ValueError:
        return False
    return True


def _jpeg_pixels(image: Image.Image, data: bytes) -> tuple[np.ndarray | None, str]:
    """Return the pixels of a JPEG, or None if they are for Pillow, and what libjpeg warns of."""
    is_rgb = image.mode in ("L", "RGB")
    # Given a place, it can't be made to write more than the header promised to Pillow.
    pixels = np.empty((image.height, image.width, 3 if is_rgb else 4), np.uint8)
    try:
        decoded = simplejpeg.decode_jpeg(data, "RGB" if is_rgb else "CMYK", buffer=pixels)
    except ValueError as error:
        return _repaired(image, data, pixels, str(error))
    return (decoded if is_rgb and decoded.shape == pixels.shape else None), ""


def _repaired(
    image: Image.Image, data: bytes, pixels: np.ndarray, warning: str
) -> tuple[np.ndarray | None, str]:
    """Return what `_jpeg_pixels` does, for a file that libjpeg has a warning for."""
    is_baseline = pixels.shape[2] == 3 and not image.info.get("progressive")
    if warning.startswith("Premature end of JPEG file") and is_baseline:
        try:  # A lost end marker harms nothing if all that stands before it is there.
            return simplejpeg.decode_jpeg(data + _END_OF_JPEG, "RGB", buffer=pixels), ""
        except ValueError:
            return None, ""  # Pillow refuses it, or decodes it for a user who wants it
    return None, _damage_in(warning)


def _damage_in(warning: str) -> str:
    """Return a warning of libjpeg if it means that pixels are wrong."""
    return warning if warning.startswith(_DAMAGE) and _HARMLESS not in warning else ""


def _damage_of_jpeg(data: bytes) -> str:
    """Return what libjpeg warns of, which Pillow hides; decoded at an eighth of the size."""
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
    except ValueError as warning:
        return _damage_in(str(warning))
    return ""


# ------------------------------------------------------------------------------ others


def load_pixels(image: Image.Image, data: bytes) -> str:
    """Load an image with Pillow; return what is wrong with it nevertheless.

    The bytes are needed for PNG and for a JPEG that nobody has decoded: without them they are not
    looked at.
    """
    if image.format == "TIFF":
        refuse_misread(image)
        with libtiff_messages() as said:
            try:
                image.load()
            except OSError as error:
                raise OSError("; ".join([str(error), *said[:1]])) from error
        return said[0] if said else ""
    image.load()
    takes_all = ImageFile.LOAD_TRUNCATED_IMAGES  # the user's own setting
    if image.format == "PNG" and data and not takes_all:
        return _damage_of_png(image, data)
    if image.format in ("JPEG", "MPO") and data:
        return _damage_of_jpeg(data)
    return ""


def _damage_of_png(image: Image.Image, data: bytes) -> str:
    """Return what Pillow does not look at: checksums of the pixels, and whether all are there."""
    if not all(is_whole for _, is_whole in _compressed_blocks(data)):
        return "a checksum of its pixels is wrong"
    if _rows_are_missing(image, data):
        return "its compressed data end before its last row"
    return ""


def _compressed_blocks(data: bytes) -> Iterator[tuple[memoryview, bool]]:
    """Yield the blocks of compressed pixels of a PNG, and whether their checksums are right."""
    view, start = memoryview(data), 8
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 8 + length
        if kind == b"IDAT":
            checksum = zlib.crc32(view[start + 4 : end])
            yield view[start + 8 : end], data[end : end + 4] == struct.pack(">I", checksum)
        start = end + 4


def _rows_are_missing(image: Image.Image, data: bytes) -> bool:
    """Whether the compressed data of a PNG are shorter than its pixels, which stay black then."""
    width, height = image.size
    tail = np.asarray(image.crop((0, max(0, height - 2), width, height)))
    if tail.reshape(len(tail), -1).any(axis=1).all():  # two rows, as it may be interlaced
        return False
    bits, colour, interlaced = data[24], data[25], data[28]
    bits *= {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4)]
        passes += [(1, 0, 2, 2), (0, 1, 1, 2)]
    expected = 0
    for left, top, step_x, step_y in passes:
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        expected += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    return _inflated_size(data) < expected


def _inflated_size(data: bytes) -> int:
    """Return how many bytes the compressed data of a PNG make."""
    inflate, size = zlib.decompressobj(), 0
    for block, _ in _compressed_blocks(data):
        rest: Any = block
        while rest:
            size += len(inflate.decompress(rest, 2**20))
            rest = inflate.unconsumed_tail
    return size
