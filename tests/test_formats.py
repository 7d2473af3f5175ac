"""Files that Pillow, tifffile and imageio write, against those libraries' own arrays."""

import contextlib
import io
import itertools
import re

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from PIL import Image, features

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
    if dtype == bool:
        return values * 47 % 3 < 1
    return (values * white(dtype)).astype(dtype) if dtype.kind != "f" else values.astype(dtype)


def white(dtype):
    return np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1


def rgb(array, largest=None, inverted=False):
    """Return what a library's own array is in floats up to 255, without alpha."""
    shown = array / float(largest or white(array.dtype)) * 255
    if shown.ndim == 2 or shown.shape[2] < 3:
        grey = shown if shown.ndim == 2 else shown[..., 0]
        shown = np.repeat(grey[..., None], 3, axis=2)
    return 255 - shown[..., :3] if inverted else shown[..., :3]


def assert_shows(data, expected):
    found = load_image(data).permute(1, 2, 0).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1


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


# What Pillow can show, whatever the compression and the order of bytes.
SHOWN = {("bool", 1), *itertools.product(["uint8"], (1, 3, 4)), *itertools.product(["uint16"], (3, 4))}


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
    shown = {}
    for packing, order, separate, photometric in itertools.product(
        packings, "<>", layouts, photometrics
    ):
        options = packing | {"byteorder": order, "photometric": photometric}
        data, own = write_tiff(pixels, separate, **options)
        np.testing.assert_array_equal(own, pixels)
        name = (*packing, order, separate, photometric)
        shown[name] = assert_shown_or_refused(data, own, photometric == "miniswhite")
    print(shown)
