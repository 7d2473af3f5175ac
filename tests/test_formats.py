"""Files that Pillow, tifffile and imageio write, against those libraries' own arrays."""

import contextlib
import io
import itertools
import re
import struct
import zlib

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from PIL import Image

from sktransfer.io import load_image

DTYPES = ["bool", "uint8", "uint16", "uint32", "int8", "int16", "int32"]
DTYPES += ["float16", "float32", "float64"]
KINDS = {"u": "unsigned integers", "i": "signed integers", "f": "floats"}
DARK = pytest.warns(UserWarning, match="come out nearly black")


def ramp(dtype, channels):
    """Return all of the range from 0 to the largest value, (6, 8[, channels])."""
    values = np.linspace(0, 1, 48 * channels)
    values = values.reshape((6, 8, channels) if channels > 1 else (6, 8))
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return values * 47 % 3 < 1
    return (values * white(dtype)).astype(dtype) if dtype.kind != "f" else values.astype(dtype)


def white(dtype):
    return np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1


def rgb(array, largest=None, inverted=False):
    """Return what a library's own array is in floats up to 255, on white where it has alpha."""
    shown = array / float(largest or white(array.dtype)) * 255
    if shown.ndim == 3 and shown.shape[2] in (2, 4):
        alpha = shown[..., -1:] / 255
        shown = shown[..., :-1] * alpha + 255 * (1 - alpha)
    if shown.ndim == 2 or shown.shape[2] < 3:
        grey = shown if shown.ndim == 2 else shown[..., 0]
        shown = np.repeat(grey[..., None], 3, axis=2)
    return 255 - shown[..., :3] if inverted else shown[..., :3]


def assert_shows(data, expected):
    found = load_image(data).permute(1, 2, 0).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 2  # where Pillow cuts two of 16 bits to 8, and blends


def assert_shown_or_refused(data, own, inverted=False):
    """Check a TIFF file; return whether it is shown."""
    try:
        assert_shows(data, rgb(own, inverted=inverted))
    except ValueError as error:
        bits = 1 if own.dtype == bool else own.dtype.itemsize * 8
        kind = f"a TIFF of {bits}-bit {KINDS.get(own.dtype.kind, KINDS['u'])}"
        kind += f" in {own.shape[2]} channels" if own.ndim == 3 else ""
        kind += " whose white is zero" if inverted else ""
        kind = "a big-endian BigTIFF" if data[:4] == b"MM\0+" else kind
        assert re.search(rf"{kind}\b.*tifffile", str(error)), error
        return False
    return True


def write_tiff(pixels, separate, **options):
    """Write with tifffile; return the file, and what tifffile reads from it."""
    pixels = np.moveaxis(pixels, -1, 0) if separate else pixels
    options |= {"planarconfig": "separate" if separate else "contig"} if pixels.ndim == 3 else {}
    tifffile.imwrite(file := io.BytesIO(), pixels, **options)
    own = tifffile.imread(io.BytesIO(file.getvalue()))
    return file.getvalue(), np.moveaxis(own, 0, -1) if separate else own


# What must be shown where the bytes stand in the usual order; the rest may be refused.
SHOWN = {("bool", 1), ("uint8", 1), ("uint8", 3), ("uint8", 4), ("float32", 1)}
SHOWN |= {("uint16", 1), ("uint16", 3), ("uint16", 4)}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiff_files_of_tifffile(dtype, channels):
    pixels = ramp(dtype, channels)
    layouts = [False] if channels == 1 or dtype == "bool" else [False, True]
    if dtype == "bool" and channels > 1:
        layouts = [True]  # tifffile can't read back what it packs of the other
    packings = [{}, {"compression": "zlib"}, {"bigtiff": True}, {"tile": (16, 16)}]
    packings += [{"compression": "zlib", "predictor": True}] if pixels.dtype.kind in "iu" else []
    photometrics = ["minisblack", "miniswhite"] if channels == 1 else ["rgb"]
    for packing, order, separate, photometric in itertools.product(
        packings, "<>", layouts, photometrics
    ):
        options = packing | {"byteorder": order, "photometric": photometric}
        data, own = write_tiff(pixels, separate, **options)
        np.testing.assert_array_equal(own, pixels)
        is_shown = assert_shown_or_refused(data, own, photometric == "miniswhite")
        assert is_shown or order == ">" or separate or (dtype, channels) not in SHOWN


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F"])
def test_tiff_files_of_pillow(mode, compression):
    pixels = {"1": ramp("bool", 1), "I;16": ramp("uint16", 1), "F": ramp("float32", 1)}.get(mode)
    if mode == "I":
        pixels = ramp("uint8", 1).astype(np.int32)
    image = Image.fromarray(ramp("uint8", 3)).convert(mode) if pixels is None else None
    image = Image.fromarray(pixels) if image is None else image
    image.save(file := io.BytesIO(), "TIFF", compression=compression)
    own = np.asarray(image.convert("RGB") if mode == "P" else image)
    largest = 255 if mode == "I" else None
    assert_shows(file.getvalue(), rgb(own, largest))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int16", "float32", "float64"])
def test_tiff_files_of_imageio(dtype, channels):
    pixels = ramp(dtype, channels)
    options = {} if channels == 1 else {"photometric": "rgb", "planarconfig": "contig"}
    if dtype == "bool" and channels > 1:
        options = {}  # as three pages: the first counts
    data = iio.imwrite("<bytes>", pixels, plugin="tifffile", extension=".tiff", **options)
    own = iio.imread(data, plugin="tifffile", index=0)
    with tifffile.TiffFile(io.BytesIO(data)) as file:  # miniswhite of 1 bit, as tifffile chooses
        inverted = file.pages[0].photometric == tifffile.PHOTOMETRIC.MINISWHITE
    assert assert_shown_or_refused(data, own, inverted) or (dtype, channels) not in SHOWN


@pytest.mark.parametrize(
    "dtype, channels", [("bool", 1), *itertools.product(["uint8", "uint16"], [1, 2, 3, 4])]
)
def test_png_files(dtype, channels):
    pixels = ramp(dtype, channels)
    if dtype == "uint16" and channels > 1:
        data = deep_png(pixels)
    else:
        data = iio.imwrite("<bytes>", pixels, plugin="pillow", extension=".png")
        own = iio.imread(data, plugin="pillow")
        np.testing.assert_array_equal(own, pixels)
    assert_shows(data, rgb(pixels))


def deep_png(pixels):
    """Write what neither library writes: colours of 16 bits."""

    def chunk(kind, body):
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    height, width, channels = pixels.shape
    colour = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(chunk, chunks.items()))


@pytest.mark.parametrize("scale", [1, 16, 256])
def test_12_bits_in_files_of_16(scale):
    pixels = (ramp("uint8", 1).astype(np.uint16)) * scale
    for data in (
        iio.imwrite("<bytes>", pixels, plugin="pillow", extension=".png"),
        write_tiff(pixels, False)[0],
    ):
        with contextlib.nullcontext() if scale == 256 else DARK:
            assert_shows(data, rgb(pixels))


@pytest.mark.parametrize("largest", [1, 15, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_pnm_files_with_their_largest_value(channels, largest):
    pixels = np.rint(ramp("float64", channels) * largest).astype(">u2" if largest > 255 else "u1")
    header = b"P%d 8 6 %d\n" % (5 if channels == 1 else 6, largest)
    assert_shows(header + pixels.tobytes(), rgb(pixels, largest))
    text = b" ".join(b"%d" % value for value in pixels.flat)
    header = b"P%d 8 6 %d\n" % (2 if channels == 1 else 3, largest)
    assert_shows(header + text, rgb(pixels, largest))


@pytest.mark.parametrize(
    "format, mode",
    [
        *itertools.product(["BMP", "GIF", "JPEG", "JPEG2000", "PPM", "PCX"], ["L", "RGB"]),
        *itertools.product(["TGA", "WEBP", "SGI", "BMP", "JPEG2000"], ["RGB", "RGBA"]),
        *itertools.product(["BMP", "GIF", "PNG", "PCX", "TGA"], ["P"]),
        *itertools.product(["BMP", "GIF", "PNG", "PPM", "PCX"], ["1"]),
        *[("JPEG", "CMYK"), ("JPEG2000", "LA"), ("JPEG2000", "I;16")],
    ],
)
def test_other_files(format, mode):
    image = Image.fromarray(ramp("uint16", 1) if mode == "I;16" else ramp("uint8", 3))
    options = {"lossless": True} if format == "WEBP" else {}
    image.convert(mode).save(file := io.BytesIO(), format, **options)
    if mode == "I;16":
        assert_shows(file.getvalue(), rgb(iio.imread(file.getvalue())))
        return
    own = Image.open(io.BytesIO(file.getvalue()))
    assert_shows(file.getvalue(), np.asarray(own.convert("RGB"), float))
    np.testing.assert_array_equal(
        own.convert("RGB"), iio.imread(file.getvalue(), mode="RGB", index=0)
    )
