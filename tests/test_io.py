"""Every kind of image that people have, good and bad; real files, written by Pillow."""

import io
import os
import pickle
import re
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import compress, crc32

import numpy as np
import pandas as pd
import PIL
import PIL.ImageSequence
import polars as pl
import pytest
import scipy.sparse
import torch
import xxhash
from images import CHINA, FLOWER, SMALL, encode, hwc
from joblib import Parallel, delayed
from packaging.version import Version
from PIL import Image, ImageFile, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils import resample

from sktransfer import config_context
from sktransfer.io import (
    ImageSequence,
    _decoding,
    check_images,
    find_unreadable,
    list_images,
    load_image,
    load_image_folder,
)


def as_pillow_shows(data):
    with Image.open(io.BytesIO(data)) as image:
        return blended(ImageOps.exif_transpose(image))


def blended(image, background=(255, 255, 255)):
    """Return the pixels of an image on a background."""
    pixels = np.asarray(image.convert("RGBA"), float)
    share = pixels[..., 3:] / 255
    return np.rint(pixels[..., :3] * share + np.array(background) * (1 - share)).astype(np.uint8)


@pytest.fixture
def paths(tmp_path):
    """Three different small PNG files."""
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for k, file in enumerate(files):
        Image.fromarray(np.roll(SMALL, 3 * k, axis=0)).save(file)
    return [str(file) for file in files]


# What X may be ---------------------------------------------------------------------------------

containers = {
    "list": list,
    "tuple": tuple,
    "Path": lambda x: [Path(p) for p in x],
    "numpy str": np.array,
    "numpy str_": lambda x: list(np.array(x)),
    "numpy object": lambda x: np.array(x, dtype=object),
    "numpy column": lambda x: np.array(x, dtype=object)[:, None],
    "pandas Series": pd.Series,
    "pandas object": lambda x: pd.Series(x, dtype=object, index=[7, 5, 3]),
    "pandas string": lambda x: pd.Series(x, dtype="string"),
    "pandas category": lambda x: pd.Series(x, dtype="category"),
    "pandas Index": pd.Index,
    "pandas frame": lambda x: pd.DataFrame({"file": x}),
    "polars Series": pl.Series,
    "polars categorical": lambda x: pl.Series(x, dtype=pl.Categorical),
    "polars frame": lambda x: pl.DataFrame({"file": x}),
}


@pytest.mark.parametrize("container", containers.values(), ids=containers)
def test_containers_of_paths(paths, container):
    images = check_images(container(paths))
    assert isinstance(images, ImageSequence) and len(images) == 3
    for k in range(3):
        np.testing.assert_array_equal(hwc(images.load(k)), np.roll(SMALL, 3 * k, axis=0))


item_kinds = {
    "bytes": lambda a: encode(a, "PNG"),
    "bytearray": lambda a: bytearray(encode(a, "PNG")),
    "memoryview": lambda a: memoryview(encode(a, "PNG")),
    "PIL": Image.fromarray,
    "array": np.asarray,
    "read-only": lambda a: np.broadcast_to(a, a.shape),
    "Fortran": np.asfortranarray,
    "int64": lambda a: a.astype(np.int64),
    "float64": lambda a: a / 255,
    "float32": lambda a: (a / 255).astype(np.float32),
    "float16": lambda a: (a / 255).astype(np.float16),
    "tensor": lambda a: torch.tensor(a).permute(2, 0, 1),
    "float tensor": lambda a: (torch.tensor(a).permute(2, 0, 1) / 255).requires_grad_(),
}


@pytest.mark.parametrize("kind", item_kinds.values(), ids=item_kinds)
@pytest.mark.parametrize("container", ["list", "object", "pandas", "frame", "polars"])
def test_kinds_of_items_of_any_size(kind, container):
    items = [kind(SMALL), kind(SMALL[:20, :33])]
    if container == "object":
        X = np.empty(2, dtype=object)
        X[0], X[1] = items
    elif container == "list":
        X = items
    elif container == "pandas":
        X = pd.Series(items)
    elif container == "frame":
        X = pd.DataFrame({"image": pd.Series(items, dtype=object)})
    else:
        X = pl.Series(items, dtype=pl.Object)
    images = check_images(X)
    np.testing.assert_array_equal(hwc(images.load(0)), SMALL)
    np.testing.assert_array_equal(hwc(images.load(1)), SMALL[:20, :33])
    np.testing.assert_array_equal(hwc(load_image(items[1])), SMALL[:20, :33])


def test_polars_binary_and_bytes_array():
    data = encode(SMALL, "PNG")
    for X in (pl.Series([data, data]), pl.DataFrame({"image": [data, data]}), np.array([data])):
        np.testing.assert_array_equal(hwc(check_images(X).load(0)), SMALL)


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("torch_tensor", [False, True])
def test_blocks(channels, torch_tensor):
    X = np.random.RandomState(0).randint(0, 256, (4, 9, 7, channels or 1), dtype=np.uint8)
    expected = X if channels == 3 else np.repeat(X, 3, axis=3)
    if torch_tensor:
        X = torch.tensor(X).permute(0, 3, 1, 2)
    elif channels is None:
        X = X[..., 0]
    images = check_images(X)
    assert len(images) == 4
    for k in range(4):
        np.testing.assert_array_equal(hwc(images.load(k)), expected[k])


@pytest.mark.parametrize(
    "X",
    [
        torch.full((2, 3, 4, 5), 0.5, dtype=torch.bfloat16),
        torch.full((2, 1, 4, 5), 0.5, dtype=torch.float16),
        torch.full((2, 3, 4, 5), 0.5, dtype=torch.float64, requires_grad=True),
        np.full((2, 4, 5), 0.5),
        np.full((2, 4, 5), 0.5).tolist(),
        np.full((2, 4, 5), 0.5).astype(object),
        torch.full((2, 3, 4, 5), 128),
        np.full((2, 4, 5), 128, dtype=np.int16),
    ],
)
def test_values_are_quantised(X):
    assert torch.equal(check_images(X).load(1), torch.full((3, 4, 5), 128, dtype=torch.uint8))


def test_bool_and_rounding_errors():
    image = np.array([[False, True]])
    assert load_image(image)[0].tolist() == [[0, 255]]
    assert load_image(torch.tensor(image))[0].tolist() == [[0, 255]]
    assert load_image(np.array([[-1e-7, 1 + 1e-7]]))[0].tolist() == [[0, 255]]


def test_arrays_are_not_copied_but_loaded_images_are():
    X = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    images = check_images(X)
    loaded = images.load(0)
    X[0] = 7
    assert loaded.max() == 0 and images.load(0).min() == 7


def test_sequence_subset_and_pickle(paths):
    images = check_images(paths)
    assert check_images(images) is images
    digests = [images.digest(k) for k in range(3)]
    for indices in ([2, 0], np.array([2, 0]), slice(None, None, -2)):
        subset = images[indices]
        assert [subset.digest(k) for k in range(2)] == [digests[2], digests[0]]
    mask = np.array([False, True, False])
    assert len(images[mask]) == len(images[1]) == 1
    assert images[1:][mask[1:] == 0].where(0) == f"row 2 ({paths[2]!r})"
    assert pickle.loads(pickle.dumps(images)).digest(1) == digests[1]


def test_paths_are_not_touched_until_read(tmp_path):
    images = check_images([tmp_path / "later.png", tmp_path / "never.png"])
    Image.fromarray(SMALL).save(tmp_path / "later.png")
    np.testing.assert_array_equal(hwc(images.load(0)), SMALL)
    with pytest.raises(ValueError, match=r"row 1 \('.*never.png'\): there is no such file"):
        images.digest(1)


def test_open_reads_a_file_once(paths):
    image = check_images(paths).open(0)
    os.remove(paths[0])
    assert len(image.digest) == 16
    np.testing.assert_array_equal(hwc(image.decode()), SMALL)


# Flat rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image_shape, shape",
    [
        ((4, 6), (4, 6)),
        ((1, -1), (1, 24)),
        ((-1, 6), (4, 6)),
        ((4, 2, 3), (4, 2)),
        ((2, -1, 3), (2, 4)),
        ((4, 6, -1), (4, 6)),
        (np.array([4, 6]), (4, 6)),
    ],
)
def test_flat_rows(image_shape, shape):
    X = np.random.RandomState(0).randint(0, 256, (5, 24), dtype=np.uint8)
    images = check_images(X, image_shape=image_shape)
    assert images.load(0).shape == (3, *shape)
    assert images.load(2)[0, 0, 0] == X[2, 0]


def test_flat_rows_of_any_container():
    X = load_digits().data[:6] / 16
    expected = check_images(X, image_shape=(8, 8)).load(3)
    assert expected.max() == round(255 * X[3].max())
    others = (X.tolist(), list(X), pd.DataFrame(X), pl.DataFrame(X), X.astype(object))
    for other in (*others, torch.tensor(X)):
        assert torch.equal(check_images(other, image_shape=(8, 8)).load(3), expected)


@pytest.mark.parametrize("dtype", [float, np.float32, int, np.int8, np.uint16])
def test_flat_rows_out_of_range_are_clipped_with_one_warning(dtype):
    X = np.zeros((4, 6), dtype=dtype)
    X[2, 1], X[3, 0], X[1, 5] = 100, 1, 1
    top = 1 if np.dtype(dtype).kind == "f" else 255
    if top == 1:
        message = r"1 of 4 rows .* outside \[0, 1\].* row 2, from 0 to 100\. Scale"
    elif dtype is np.uint16:
        X[2, 1] = 300
        message = r"outside \[0, 255\].* row 2, from 0 to 300\."
    else:
        X[2, 1] = -100
        message = r"row 2, from -100 to 0\."
    with pytest.warns(UserWarning, match=message) as record:
        image = check_images(X, image_shape=(2, 3)).load(2)
    assert len(record) == 1
    assert image[0, 0, 1] == (0 if X[2, 1] < 0 else 255)


@pytest.mark.parametrize(
    "X, image_shape, error, message",
    [
        (np.zeros((2, 5)), (2, 3), ValueError, r"5 features, but image_shape=\(2, 3\) takes 6"),
        (np.zeros((2, 5)), (2, -1), ValueError, "takes a multiple of 2"),
        (np.zeros((2, 10)), (1, 2, 5), ValueError, "5 channels; an image has 1 or 3"),
        (np.zeros((2, 24)), (2, 3, 4), ValueError, r"4 .*X\.reshape\(-1, 2, 3, 4\)\[\.\.\., :3\]"),
        (np.zeros((2, 12)), (-1, 3, 2), ValueError, r"2 .*X\.reshape\(-1, 2, 3, 2\)\[\.\.\., :1\]"),
        (np.zeros((2, 10)), (-1, -1), ValueError, "one may be -1"),
        (np.zeros((2, 10)), (10,), ValueError, "must be"),
        (np.zeros((2, 10)), (2.0, 5.0), ValueError, "must be"),
        (np.zeros((2, 10)), (0, -1), ValueError, "must be"),
        (np.zeros(4), (1, -1), ValueError, "Expected 2D array, got 1D array"),
        (np.zeros((2, 2, 2)), (1, -1), ValueError, "dim 3"),
        (np.zeros((0, 4)), (1, -1), ValueError, r"0 sample\(s\)"),
        (np.zeros((4, 0)), (1, -1), ValueError, r"0 feature\(s\)"),
        (np.zeros((4, 2)) + 1j, (1, -1), ValueError, "Complex data not supported"),
        (np.array([[0, 0], [0, np.nan]]), (1, -1), ValueError, "NaN or infinity in row 1"),
        (np.array([[-np.inf, np.inf], [0, 0]]), (1, -1), ValueError, "NaN or inf.* row 0"),
        (np.array([[0, "a"]], dtype=object), (1, -1), ValueError, "could not convert"),
        (scipy.sparse.eye(3).tocsr(), (1, -1), TypeError, "Sparse input is not supported.*toarray"),
        (["a.jpg"], (1, -1), ValueError, "image_shape is for flat rows, but row 0 is a path"),
    ],
)
def test_bad_flat_rows(X, image_shape, error, message):
    with pytest.raises(error, match=message):
        check_images(X, image_shape=image_shape)


# What X may not be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "X, error, message",
    [
        ("a.jpg", TypeError, r"a path: for one image, pass \[X\]"),
        (Path("a.jpg"), TypeError, r"pass \[X\]"),
        (b"\xff\xd8", TypeError, r"encoded bytes.*pass \[X\]"),
        (Image.new("L", (2, 2)), TypeError, r"a PIL image.*pass \[X\]"),
        (None, TypeError, "a sequence of images, got a missing value"),
        (3, TypeError, "a sequence of images, got a number"),
        ({"a": 1}, TypeError, "of type dict"),
        ((p for p in "ab"), TypeError, "of type generator"),
        ([], ValueError, r"0 sample\(s\)"),
        (np.zeros((0, 8, 8)), ValueError, r"0 sample\(s\)"),
        (np.array([], dtype=str), ValueError, r"0 sample\(s\)"),
        (pd.Series([], dtype=object), ValueError, r"0 sample\(s\)"),
        (np.zeros(5), ValueError, "Expected 2D array, got 1D array.*Reshape your data"),
        ([0.1, 0.2], ValueError, "Expected 2D array, got 1D array"),
        (pd.Series([1, 2]), ValueError, "Expected 2D array, got 1D array"),
        (np.array(3.0), ValueError, "scalar array"),
        (torch.tensor(3.0), ValueError, "scalar array"),
        (np.zeros((5, 64)), ValueError, r"shape \(5, 64\).*image_shape=\(height, width\)"),
        ([[0.1, 0.2], [0.3, 0.4]], ValueError, r"image_shape=\(height, width\)"),
        (pd.DataFrame(np.zeros((3, 4))), ValueError, r"image_shape=\(height, width\)"),
        (torch.zeros(5, 64), ValueError, "image_shape"),
        (FLOWER, ValueError, r"\(427, 640, 3\).*one colour image, pass \[X\]"),
        (np.zeros((2, 3, 32, 30)), ValueError, r"channels last: pass X\.transpose\(0, 2, 3, 1\)"),
        (np.zeros((2, 8, 8, 8)), ValueError, "1 or 3 channels.*n_channels=8"),
        (np.zeros((2, 2, 3, 8, 8)), ValueError, "at most 4 dimensions"),
        (torch.zeros(2, 32, 30, 3), ValueError, r"pass X\.permute\(0, 3, 1, 2\)"),
        (
            np.zeros((2, 8, 9, 4)),
            ValueError,
            r"9, 4\)\. But .*4 is dropped.*X\[\.{3}, :3\].*alpha",
        ),
        (np.zeros((2, 8, 9, 2)), ValueError, r"n_channels=2\).*X\[\.\.\., :1\].*grey"),
        (torch.zeros(2, 4, 8, 9), ValueError, r"unasked.*n_channels=4\);.*pass X\[:, :3\]"),
        (torch.ones(2, 2, 8, 9), ValueError, r"unasked.*n_channels=2\);.*pass X\[:, :1\]"),
        (torch.zeros(3, 32, 30), ValueError, r"unsqueeze\(1\).*unsqueeze\(0\)"),
        (torch.zeros(2, 2, 3, 8, 8), ValueError, "at most 4 dimensions"),
        (torch.eye(3).to_sparse(), TypeError, "Sparse input is not supported"),
        (scipy.sparse.eye(3).tocsr(), TypeError, r"Sparse input is not supported.*toarray\(\)"),
        (np.zeros((2, 4, 4), dtype=complex), ValueError, "Complex data not supported"),
        (np.zeros((2, 4, 4), dtype=np.uint16), ValueError, "uint16 pixels is unknown; divide by"),
        (np.zeros((2, 4, 4), dtype="M8[s]"), TypeError, "dtype datetime64"),
        (["a.jpg", np.zeros((4, 4))], TypeError, "row 1 is an array, but row 0 is a path"),
        (["a.jpg", None], TypeError, r"row 1 is a missing value \(None\)"),
        (pd.Series(["a.jpg", None]), TypeError, "row 1 is a missing value"),
        (pd.Series(["a.jpg", None], dtype="string"), TypeError, r"row 1 is a missing .*<NA>"),
        ([b"a", "a.jpg"], TypeError, "row 1 is a path, but row 0 is encoded bytes"),
        ([{"a": 1}], TypeError, "row 0 is of type dict, not an image"),
        ([("a.jpg", 1)], TypeError, "Expected numbers, or one column of paths"),
        ([[1, 2], [3]], TypeError, "unequal shapes"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), TypeError, "one column of paths"),
        (pl.DataFrame({"a": ["x"], "b": ["y"]}), TypeError, "one column of paths"),
        (np.array([["a.jpg", "b.jpg"]]), TypeError, "one column of paths"),
    ],
)
def test_bad_sequences(X, error, message):
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        check_images(X)


@pytest.mark.parametrize(
    "image, error, message",
    [
        (
            np.full((4, 4), 200.0),
            ValueError,
            r"from 200 to 200, but floats .* \[0, 1\]; divide by 255",
        ),
        (np.full((4, 4), 4000.0), ValueError, "; divide by the largest possible value"),
        (np.full((4, 4), -1.0), ValueError, "floats.*undo the standardisation"),
        (np.full((4, 4), 300), ValueError, r"integers must lie in 0\.\.255"),
        (np.full((4, 4), -3), ValueError, r"from -3 to -3, but integers must lie in 0\.\.255"),
        (np.full((4, 4), np.nan), ValueError, "NaN or infinity"),
        (np.full((4, 4), np.inf), ValueError, "NaN or infinity"),
        (torch.full((3, 4, 4), np.nan), ValueError, "NaN or infinity"),
        (np.zeros((4, 4), dtype=complex), ValueError, "Complex data not supported"),
        (np.zeros((4, 4), dtype=np.uint16), ValueError, "uint16"),
        (np.array([["a"]]), TypeError, "dtype <U1"),
        (np.zeros((0, 4)), ValueError, r"no pixels \(shape \(0, 4\)\)"),
        (np.zeros((3, 9, 8)), ValueError, r"np\.moveaxis\(image, 0, -1\)"),
        (np.zeros((9, 8, 7)), ValueError, "1 or 3 channels"),
        (np.zeros(9), ValueError, r"shape \(9,\)"),
        (torch.zeros(9), ValueError, r"shape \(9,\)"),
        (
            np.ones((9, 8, 4)),
            ValueError,
            r"\(9, 8, 4\);.*image\[\.\.\., :3\].*alpha_composite",
        ),
        (np.ones((9, 8, 2)), ValueError, r"image\[\.\.\., :1\] if these are grey"),
        (torch.ones(4, 9, 8), ValueError, r"tensor of shape \(4, 9, 8\);.*pass image\[:3\]"),
        (torch.ones(9, 8, 3), ValueError, r"\(9, 8, 3\);.*image\.permute\(2, 0, 1\)"),
        (torch.ones(4, 8, 3), ValueError, r"\(4, 8, 3\);.*image\.permute\(2, 0, 1\)"),
        (torch.ones(9, 8, 7), ValueError, r"\(9, 8, 7\);.*1 or 3 channels.*n_channels=9"),
    ],
)
def test_bad_arrays_name_their_row(image, error, message):
    good = torch.zeros(3, 4, 4) if isinstance(image, torch.Tensor) else np.zeros((4, 4))
    images = check_images([good, image])
    images.load(0)
    with pytest.raises(error, match="row 1.*" + message):
        images.load(1)
    with pytest.raises(error, match="the image.*" + message):
        load_image(image)


def test_load_image_refuses_other_things():
    with pytest.raises(TypeError, match="the image is a number: pass paths, encoded bytes"):
        load_image(3)


# Brightness ----------------------------------------------------------------------------------


DIGITS = load_digits().images  # 0 to 16


@pytest.mark.parametrize(
    "X, brightest",
    [
        (DIGITS.astype(int), 16),
        (DIGITS.astype(np.uint8), 16),
        (torch.tensor(DIGITS, dtype=torch.int16)[:, None], 16),
        (list(DIGITS[:3].astype(int)), 16),
        (list(torch.tensor(DIGITS[:3]).int()), 16),
        (DIGITS[:3].astype(int).tolist(), 16),
        ((DIGITS > 8).astype(np.uint8), 1),  # a mask
        (np.concatenate([np.zeros((5, 8, 8), int), DIGITS[:1].astype(int)]), 15),
    ],
)
def test_integers_that_come_out_nearly_black_are_told(X, brightest):
    message = rf"brightest pixel is {brightest}, but white is 255.*X / 16 for scikit-learn's digits"
    with pytest.warns(UserWarning, match=message) as record:
        check_images(X)
    assert len(record) == 1


def test_single_images_and_flat_rows_that_come_out_nearly_black_are_told():
    for image in (DIGITS[0].astype(int), torch.tensor(DIGITS[0], dtype=torch.uint8)):
        with pytest.warns(UserWarning, match="brightest pixel is 15"):
            load_image(image)
    with pytest.warns(UserWarning, match="brightest pixel is 16"):
        check_images(load_digits().data.astype(int), image_shape=(8, 8))


@pytest.mark.parametrize(
    "X",
    [
        np.zeros((3, 8, 8), int),
        np.zeros((3, 8, 8), bool),
        DIGITS > 8,
        DIGITS / 160,
        list(DIGITS / 160),
        np.stack([np.zeros((8, 8), int), np.full((8, 8), 17)]),
        [np.zeros((8, 8), int), np.full((9, 9), 17), np.ones((8, 8), int)],
    ],
)
def test_other_dark_images_are_not_told(X):
    check_images(X)  # a warning would be an error


def test_nothing_is_read_behind_a_bright_image(tmp_path):
    file = tmp_path / "images"
    file.write_bytes(bytes([200] * 2**20))
    os.truncate(file, 2**40)  # a terabyte, of which hardly anything is on the disk
    check_images(np.memmap(file, np.uint8, "r", shape=(2**20, 2**10, 2**10)))


# Images in memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_a_lazily_opened_image_in_many_rows_and_threads(tmp_path, format):
    Image.fromarray(FLOWER).save(tmp_path / "image", format)
    expected = load_image(str(tmp_path / "image"))
    for _ in range(8):
        with Image.open(tmp_path / "image") as image, ThreadPoolExecutor(8) as threads:
            images = check_images([image] * 8)
            loaded = list(threads.map(images.load, range(8)))
        assert all(torch.equal(one, expected) for one in loaded)


def test_resampled_lazy_images_under_joblibs_threads(tmp_path):
    for k in range(4):
        Image.fromarray(np.roll(FLOWER, 50 * k, axis=1)).save(tmp_path / f"{k}.png")
    expected = [check_images([load_image(tmp_path / f"{k}.png")]).digest(0) for k in range(4)]
    for seed in range(5):
        opened = [Image.open(tmp_path / f"{k}.png") for k in range(4)]
        X, numbers = resample(opened, list(range(4)), n_samples=12, random_state=seed)
        calls = (delayed(check_images(X).digests)(4) for _ in range(4))
        for digests in Parallel(4, backend="threading")(calls):
            assert digests == [expected[number] for number in numbers]
        for image in opened:
            image.close()


@pytest.mark.parametrize("format", ["TIFF", "GIF", "PNG"])
def test_pages_that_are_one_image_object_are_told(tmp_path, format):
    pages = [Image.fromarray(np.roll(SMALL, k, axis=0)) for k in (0, 9, 20)]
    pages[0].save(tmp_path / "stack", format, save_all=True, append_images=pages[1:])
    with Image.open(tmp_path / "stack") as stack:
        whole = [stack, stack]  # its first page, twice, as a bootstrap may give it
        assert torch.equal(check_images(whole).load(1), load_image(str(tmp_path / "stack")))
        X = list(PIL.ImageSequence.Iterator(stack))
        with pytest.raises(ValueError, match=r"rows 0, 1, 2 are one .*page 2 .*page\.copy\(\)"):
            check_images(X)
        copies = [page.copy() for page in PIL.ImageSequence.Iterator(stack)]
        assert len({check_images(copies).digest(k) for k in range(3)}) == 3
        check_images([stack])  # moved by the user to another page


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_closed_images_say_so(tmp_path, format):
    Image.fromarray(SMALL).save(tmp_path / "image", format)
    with Image.open(tmp_path / "image") as left:
        pass
    with Image.open(tmp_path / "image") as loaded:
        loaded.load()
    with open(tmp_path / "image", "rb") as file:
        of_file = Image.open(file)
    used = Image.fromarray(SMALL)
    closed = Image.open(tmp_path / "image")
    closed.close()
    used.close()
    for image in (left, closed, of_file, used):
        with pytest.raises(ValueError, match=r"^row 1: the PIL image is closed.*copy\(\).* path\."):
            check_images([loaded, image]).load(1)
    assert check_images([loaded, left]).load(0).shape == (3, 30, 40)


# Broken files ----------------------------------------------------------------------------------


def bad_file(tmp_path, data, name="bad.jpg"):
    (tmp_path / name).write_bytes(data)
    Image.fromarray(SMALL).save(tmp_path / "good.png")
    return check_images([tmp_path / "good.png", tmp_path / name])


def test_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"row 0 \('no.jpg'\): there is no such file in '.*'; check"
    ):
        check_images(["no.jpg"]).load(0)
    with pytest.raises(ValueError, match=r"row 0 \('0.5'\): there is no such file"):
        check_images(np.array(["0.5"])).load(0)
    with pytest.raises(ValueError, match="^'no.jpg': there is no such file") as info:
        load_image("no.jpg")
    assert isinstance(info.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("letter", ["A", "A/"])  # the name too long for a file, or no such folder
def test_text_without_end_is_quoted_once_and_in_part(letter):
    uri = "data:image/png;base64," + 6000 // len(letter) * letter
    for call in (lambda: load_image(uri), lambda: check_images([uri]).load(0)):
        with pytest.raises(
            ValueError, match=r"'data:image/png;base64,A.*, 6,022 characters"
        ) as info:
            call()
        assert len(str(info.value)) < 500 and str(info.value).count("data:") == 1


def test_files_that_are_no_images(tmp_path):
    with pytest.raises(ValueError, match=r"row 0 \(.*the file cannot be read: this is a folder"):
        check_images([tmp_path]).load(0)
    with pytest.raises(ValueError, match=r"cannot be read: embedded null"):
        check_images(["a\0b"]).load(0)
    with pytest.raises(ValueError, match=r"row 1 \('.*bad.jpg'\): the file is empty \(0 bytes\)"):
        bad_file(tmp_path, b"").load(1)
    with pytest.raises(ValueError, match=r"row 1 .*no image that starts with b'hello world'"):
        bad_file(tmp_path, b"hello world").load(1)
    with pytest.raises(ValueError, match=r"row 0: the encoded image is empty"):
        check_images([b""]).load(0)
    with pytest.raises(ValueError, match=r"row 0: .*no image that starts with b'abc'; replace"):
        check_images([b"abc"]).load(0)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(paths):
    os.chmod(paths[0], 0)
    with pytest.raises(ValueError, match="row 0 .*Permission denied"):
        check_images(paths).load(0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.95])
def test_truncated_files(tmp_path, format, part):
    data = encode(SMALL, format)
    images = bad_file(tmp_path, data[: int(part * len(data))])
    with pytest.raises(ValueError, match=r"row 1 \('.*bad.jpg'\): .*or drop the row") as info:
        images.load(1)
    assert info.value.__cause__ is not None
    images.load(0)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_truncated_files_that_the_user_wants(format, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(FLOWER, format)
    image = load_image(data[: len(data) // 2])
    np.testing.assert_array_equal(hwc(image)[:100], as_pillow_shows(data)[:100])


def test_damaged_png(tmp_path):
    data = bytearray(encode(SMALL, "PNG"))
    data[200:220] = b"\0" * 20
    with pytest.raises(ValueError, match="row 1 .*damaged"):
        bad_file(tmp_path, data).load(1)


def test_decompression_bomb(monkeypatch, tmp_path):
    images = bad_file(tmp_path, encode(SMALL, "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # half of 1200 is 600
    with pytest.raises(
        ValueError, match=r"row 1 \('.*'\): too many pixels .*1200 pix.*MAX_IMAGE_PIXELS"
    ):
        images.load(1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # Pillow warns up to twice that
    named = (
        r"row 1 \('.*'\): Image size \(1200 pixels\) exceeds .* raise PIL.Image.MAX_IMAGE_PIXELS"
    )
    with pytest.warns(Image.DecompressionBombWarning, match=named):
        assert images.load(1).shape == (3, 30, 40)
    with pytest.raises(ValueError, match=named):  # warnings are errors here
        images.load(1)
    with pytest.warns(Image.DecompressionBombWarning, match="^Image size"):
        Image.open(io.BytesIO(encode(SMALL, "PNG")))  # the user's own


def failing(error):
    def load(*_):
        raise error

    return load


@pytest.mark.parametrize("error", [AttributeError, UnboundLocalError, IndexError])
def test_whatever_pillow_raises_is_damage(tmp_path, monkeypatch, error):
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", failing(error("from a plugin")))
    with pytest.raises(ValueError, match=r"row 1 \('.*'\): .*damaged.*from a plugin"):
        bad_file(tmp_path, encode(SMALL, "PNG")).load(1)


def test_an_error_without_a_text_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", failing(AssertionError()))
    with pytest.raises(ValueError, match=r"row 1 .*cut short \(AssertionError\)"):
        bad_file(tmp_path, encode(SMALL, "PNG")).load(1)


@pytest.mark.parametrize("error", [MemoryError, NameError, AttributeError])
def test_what_is_not_about_the_file_is_raised_as_it_is(tmp_path, monkeypatch, error):
    monkeypatch.setattr(_decoding, "decode", failing(error))
    with pytest.raises(error):
        bad_file(tmp_path, encode(SMALL, "PNG")).load(1)


# Pixels: torchvision and Pillow ----------------------------------------------------------------


@pytest.mark.parametrize("photo", [CHINA, FLOWER], ids=["china", "flower"])
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 60, "progressive": True},
        {"quality": 100, "subsampling": 0},
        {"quality": 75, "subsampling": 1},
        {"quality": 95, "subsampling": 2, "optimize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_pixels_are_those_of_pillow(photo, options, mode):
    # Odd sides: chroma is upsampled at the border. Measured: no pixel differs.
    data = encode(Image.fromarray(photo[:425, :637]).convert(mode), "JPEG", **options)
    difference = np.abs(hwc(load_image(data)).astype(int) - as_pillow_shows(data))
    assert difference.mean() < 0.5 and difference.max() <= 4


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"compress_level": 0}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "RGBA", "P"])
def test_png_pixels_are_those_of_pillow(options, mode):
    data = encode(Image.fromarray(FLOWER[:151, :203]).convert(mode), "PNG", **options)
    np.testing.assert_array_equal(hwc(load_image(data)), as_pillow_shows(data))


def with_alpha(image):
    image = image.convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (30, 1))))
    return image


def transparent_palette():
    image = Image.fromarray(SMALL).quantize(16)
    image.info["transparency"] = bytes(range(0, 256, 16))
    return image


modes = {
    "L": lambda im: im.convert("L"),
    "LA": lambda im: with_alpha(im).convert("LA"),
    "P": lambda im: im.quantize(32),
    "P with one transparent colour": lambda im: im.quantize(32),
    "P with alpha": lambda im: transparent_palette(),
    "RGBA": with_alpha,
    "CMYK": lambda im: im.convert("CMYK"),
    "YCbCr": lambda im: im.convert("YCbCr"),
    "1": lambda im: im.convert("1"),
    "HSV": lambda im: im.convert("HSV"),
}


not_written = {  # by Pillow
    "PNG": ["CMYK", "YCbCr", "HSV"],
    "TIFF": ["HSV"],
    "GIF": ["P with alpha", "CMYK", "YCbCr", "HSV"],
    "JPEG": ["LA", "P", "P with one transparent colour", "P with alpha", "RGBA", "HSV"],
}
formats = [None, "PNG", "TIFF", "WEBP", "GIF", "JPEG"]


@pytest.mark.parametrize(
    "format, mode", [(f, m) for f in formats for m in modes if m not in not_written.get(f, [])]
)
def test_modes(format, mode):
    image = modes[mode](Image.fromarray(SMALL))
    options = {"transparency": 3} if "one" in mode and format in ("PNG", "GIF") else {}
    if format is None:
        info = dict(image.info)
        loaded, expected = load_image(image), blended(image.copy())
        assert image.info == info
    else:
        data = encode(image, format, **options)
        if (format, mode) == ("TIFF", "YCbCr") and Version(PIL.__version__) < Version("13"):
            for bytes_behind in (0, 10_000):  # only without them does Pillow raise an error
                with pytest.raises(ValueError, match="in YCbCr, which Pillow misreads before"):
                    load_image(data + bytes(bytes_behind))
            return
        loaded, expected = load_image(data), as_pillow_shows(data)
    np.testing.assert_array_equal(hwc(loaded), expected)
    assert np.abs(expected.astype(int) - SMALL).mean() < 130  # not inverted, not black


def png_of(samples, bits, colour_type, transparent=b""):
    """Write a PNG of samples (height, width, channels), which Pillow writes in a few kinds only."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    rows = [row.ravel().astype(">u2" if bits == 16 else "u1") for row in samples]
    if bits < 8:
        each = [np.unpackbits(row[:, None], axis=1)[:, 8 - bits :] for row in rows]
        rows = [np.packbits(bits_of_row) for bits_of_row in each]
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", transparent), (b"IEND", b"")]
    parts.insert(2, (b"IDAT", compress(b"".join(b"\0" + row.tobytes() for row in rows))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(k, d) for k, d in parts if d or k == b"IEND")


@pytest.mark.parametrize(
    "bits, channels", [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3)]
)
def test_the_transparent_colour_of_a_png(bits, channels):
    levels = np.random.RandomState(0).randint(0, min(2**bits, 5), (9, 12, channels))
    levels *= {16: 13107, 8: 51}.get(bits, 1)
    key = levels[0, 0]
    data = png_of(levels, bits, 0 if channels == 1 else 2, struct.pack(f">{channels}H", *key))
    is_clear = (levels == key).all(2)
    for background in [(255, 255, 255), (10, 200, 0)]:
        expected = np.repeat(levels * 255 // (2**bits - 1), 3 // channels, axis=2)
        expected[is_clear] = background
        with config_context(background=background):
            for source in (data, Image.open(io.BytesIO(data))):
                np.testing.assert_array_equal(hwc(load_image(source)), expected)


def transparent_images():
    """Yield images with all kinds of transparency, and the formats that hold them."""
    image = with_alpha(Image.fromarray(SMALL))
    yield image, "PNG TIFF WEBP TGA BMP JPEG2000 DDS"
    yield image.convert("LA"), "PNG TIFF TGA JPEG2000"
    yield image.convert("La"), ""
    yield image.convert("RGBa"), ""
    yield image.convert("PA"), ""
    yield transparent_palette(), "PNG"
    one = Image.fromarray(SMALL).quantize(8)
    one.info["transparency"] = 2
    yield one, "PNG GIF"
    palette = one.copy()
    palette.apply_transparency()  # into the palette
    yield palette, ""


def test_transparency_lies_on_the_background():
    for image, formats in transparent_images():
        files = {format: encode(image, format) for format in formats.split()}
        sources = {"": image, **files}
        for background, name in [((0, 0, 0), "black"), ((9, 200, 31), None)]:
            with config_context(background=name or background):
                for format, source in sources.items():
                    shown = image.convert("LA") if image.mode == "La" else image
                    shown = shown if format == "" else Image.open(io.BytesIO(source))
                    got = hwc(load_image(source)).astype(int)
                    # Pillow rounds what is multiplied by alpha once more.
                    most = 1 if image.mode == "RGBa" else 0
                    assert np.abs(got - blended(shown, background)).max() <= most, format
                    assert most or np.array_equal(got, hwc(load_image(shown)))
        assert len(set(map(type, sources.values()))) == 1 + bool(formats)


def test_first_frame_of_transparent_animations():
    frames = [with_alpha(Image.fromarray(np.roll(SMALL, k, axis=1))) for k in (0, 9)]
    for format in ("PNG", "WEBP", "GIF"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(hwc(load_image(data)), as_pillow_shows(data))
        assert (hwc(load_image(data))[:, 0] == 255).all()


def test_opaque_alpha_changes_nothing():
    image = Image.fromarray(FLOWER[:99, :101])
    with config_context(background="red"):
        for mode, formats in {"RGBA": "PNG TIFF WEBP", "LA": "PNG TIFF", "P": "PNG"}.items():
            opaque, plain = image.convert(mode), image.convert("L" if mode == "LA" else "RGB")
            options = {"transparency": bytes([255] * 255 + [254])} if mode == "P" else {}
            plain = opaque.convert("RGB") if mode == "P" else plain
            for format in formats.split():
                kept = {"lossless": False} if format == "WEBP" else {}
                data, other = (
                    encode(opaque, format, **options, **kept),
                    encode(plain, format, **kept),
                )
                assert torch.equal(load_image(data), load_image(other)), (mode, format)


def test_what_a_user_says_of_transparency_may_be_nonsense():
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"):
        for said in (b"", b"abc", "none", None, (1, 2), (1.5, 2, 3), [1, 2, 3], 3.0, -1, 999):
            image = Image.fromarray(SMALL).convert("L" if mode == "I;16" else mode)
            if mode == "I;16":
                image = Image.fromarray(np.asarray(image, np.uint16) * 257)
            expected = hwc(load_image(image))
            image.info["transparency"] = said
            assert hwc(load_image(image)).shape == expected.shape
            if not (mode == "P" and isinstance(said, (bytes, int))):
                np.testing.assert_array_equal(hwc(load_image(image)), expected, f"{mode} {said}")


def test_digests_of_transparent_files_know_the_background():
    clear, opaque = with_alpha(Image.fromarray(SMALL)), Image.fromarray(SMALL)
    files = [encode(clear, "PNG"), encode(clear.convert("LA"), "TIFF"), encode(clear, "WEBP")]
    files += [
        encode(transparent_palette(), "PNG"),
        encode(opaque.convert("L"), "PNG", transparency=7),
    ]
    plain = [encode(opaque, format) for format in ("PNG", "JPEG", "WEBP")]
    plain.append(encode(opaque.quantize(9), "PNG"))
    images = check_images([*files, *plain])
    clear_pillow = check_images([clear])
    white_pixels = clear_pillow.digest(0)
    on_white = images.digests(2)
    with config_context(background=(250, 250, 250)):
        on_grey = images.digests(2)
        assert [images.digest(k) for k in range(len(images))] == on_grey
        images.load(0, on_grey[0])  # nothing has changed meanwhile
        assert clear_pillow.digest(0) != white_pixels
    same = [a == b for a, b in zip(on_white, on_grey, strict=True)]
    assert same == [False] * 5 + [True] * 4
    assert images.digests(1) == on_white and len({*on_white}) == len(images)
    assert on_white[5] == xxhash.xxh3_128_digest(plain[0])  # that of older memories


def test_cmyk_jpeg_is_not_inverted():
    data = encode(Image.fromarray(FLOWER).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(hwc(load_image(data)).astype(int) - FLOWER).mean() < 5


@pytest.mark.parametrize("format", [None, "PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_is_scaled(format):
    grey = SMALL[..., 0]
    image = Image.fromarray(grey.astype(np.uint16) * 257)
    loaded = load_image(image if format is None else encode(image, format))
    np.testing.assert_array_equal(hwc(loaded), np.repeat(grey[..., None], 3, axis=2))


def test_32_bit_grey_counts_as_array():
    grey = SMALL[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    for pixels in (grey.astype(np.int32), (grey / 255).astype(np.float32)):
        image = Image.fromarray(pixels)
        for source in (image, encode(image, "TIFF")):
            np.testing.assert_array_equal(hwc(load_image(source)), expected)
        too_bright = encode(Image.fromarray(pixels * 300), "TIFF")
        with pytest.raises(ValueError, match="^row 0: pixels from .* must lie in .*; divide by"):
            check_images([too_bright]).load(0)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_animations(format):
    frames = [Image.fromarray(np.roll(SMALL, k, axis=1)) for k in (0, 9, 20)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(hwc(load_image(data)), as_pillow_shows(data))
    assert np.abs(hwc(load_image(data)).astype(int) - SMALL).mean() < 20


def test_mpo():
    frames = [Image.fromarray(np.roll(FLOWER, k, axis=1)) for k in (0, 90)]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(hwc(load_image(data)), as_pillow_shows(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(FLOWER, format, exif=exif)
    loaded, expected = hwc(load_image(data)), as_pillow_shows(data)
    assert loaded.shape[:2] == ((427, 640) if orientation < 5 else (640, 427))
    np.testing.assert_array_equal(loaded, expected)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(hwc(load_image(image)), expected)


@pytest.mark.parametrize("endian", ["<", ">"])
def test_exif_of_both_endiannesses(endian):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x0112] = 6
    data = encode(FLOWER, "JPEG", exif=exif.tobytes())
    np.testing.assert_array_equal(hwc(load_image(data)), as_pillow_shows(data))


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_xmp_orientation(format):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(FLOWER, format, xmp=xmp)
    np.testing.assert_array_equal(hwc(load_image(data)), as_pillow_shows(data))


# Digests ---------------------------------------------------------------------------------------


def test_digest_of_a_file_is_that_of_its_bytes(paths, tmp_path):
    images = check_images(paths)
    digests = [images.digest(k) for k in range(3)]
    assert len(set(digests)) == 3 and all(len(digest) == 16 for digest in digests)
    data = [Path(path).read_bytes() for path in paths]
    assert [check_images(data).digest(k) for k in range(3)] == digests
    (tmp_path / "renamed.jpg").write_bytes(data[1])
    assert check_images([tmp_path / "renamed.jpg"]).digest(0) == digests[1]
    assert check_images([memoryview(data[2])]).digest(0) == digests[2]
    Path(paths[0]).write_bytes(data[2])
    assert images.digest(0) == digests[2]


def test_digest_of_pixels():
    decoded = [
        SMALL,
        SMALL[::-1][::-1],
        SMALL / 255,
        SMALL.astype(int),
        Image.fromarray(SMALL),
        torch.tensor(SMALL).permute(2, 0, 1),
    ]
    digests = {check_images([image]).digest(0) for image in decoded}
    assert len(digests) == 1
    other = SMALL.copy()
    other[0, 0, 0] ^= 1
    others = [other, SMALL.reshape(40, 30, 3), SMALL[:, ::-1], SMALL.transpose(1, 0, 2)]
    digests |= {check_images([image]).digest(0) for image in others}
    digests |= {check_images([SMALL.tobytes()]).digest(0)}
    assert len(digests) == 6


def test_folds_hit():
    X = np.random.RandomState(0).randint(0, 256, (20, 5, 4), dtype=np.uint8)
    everything = check_images(X)
    digests = {everything.digest(k) for k in range(20)}
    for part in train_test_split(X, random_state=0):
        fold = check_images(part)
        assert {fold.digest(k) for k in range(len(fold))} < digests


def test_threads(tmp_path):
    rng = np.random.RandomState(0)
    photos = [Image.fromarray(np.roll(FLOWER, k, axis=1)) for k in rng.randint(0, 640, 8)]
    formats = ["JPEG", "PNG", "WEBP", "GIF"] * 2
    for k, (photo, format) in enumerate(zip(photos, formats, strict=True)):
        photo.save(tmp_path / f"{k}.{format.lower()}")
    images = check_images(sorted(tmp_path.iterdir()) * 3)
    alone = [images.load(k) for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(images.load, range(len(images))))
        digests = list(pool.map(images.digest, range(len(images))))
    assert all(torch.equal(image, alone[k % 8]) for k, image in enumerate(loaded))
    assert len(set(digests)) == 8


# Folders ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in "dog/b.png cat/2.JPG cat/10.jpg cat/deep/er/1.tif .hidden/x.png dog/.y.png".split():
        file = tmp_path / "pets" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(SMALL).save(file)
    (tmp_path / "pets/dog/notes.txt").write_text("a dog")
    (tmp_path / "pets/readme.md").write_text("pets")
    (tmp_path / "pets/dog/.thumbs").mkdir()
    (tmp_path / "pets/dog/.thumbs/t.png").write_bytes(b"")
    return tmp_path / "pets"


def test_folder(folder):
    data = load_image_folder(folder)
    assert data.target_names == ["cat", "dog"]
    names = [Path(file).relative_to(folder).as_posix() for file in data.data]
    assert names == ["cat/10.jpg", "cat/2.JPG", "cat/deep/er/1.tif", "dog/b.png"]
    assert data.target.tolist() == ["cat"] * 3 + ["dog"] and data.unreadable == {}
    assert data.filenames is data.data and isinstance(data.data[0], str)
    assert check_images(data.data).load(3).shape == (3, 30, 40)


def test_folder_paths_are_relative_if_the_folder_is(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_image_folder("pets").data[-1] == os.path.join("pets", "dog", "b.png")


def test_folder_categories_and_extensions(folder):
    data = load_image_folder(folder, categories=["dog"])
    assert data.target_names == ["dog"] and data.target.tolist() == ["dog"]
    assert len(load_image_folder(folder, extensions=[".jpg", ".png"]).data) == 3
    with pytest.raises(ValueError, match=r"no categories \['cow'\]; it has \['cat', 'dog'\]"):
        load_image_folder(folder, categories=["cow", "dog"])


def test_folder_with_unreadable_images(folder):
    (folder / "cat/0.jpg").write_bytes(b"")
    (folder / "cat/1.png").write_text("text")
    with pytest.warns(
        UserWarning, match=r"(?s)2 unreadable.*0\.jpg': empty.*1\.png': not an im"
    ) as record:
        data = load_image_folder(folder)
    assert len(record) == 1 and record[0].filename == __file__
    assert [*data.unreadable] == [str(folder / "cat/0.jpg"), str(folder / "cat/1.png")]
    assert "not an image" in data.unreadable[str(folder / "cat/1.png")]
    assert len(data.data) == len(data.target) == 4
    with pytest.raises(ValueError, match=r"2 unreadable images:(?s:.*)0\.jpg(?s:.*)1\.png"):
        load_image_folder(folder, errors="raise")
    for k in range(9):
        (folder / f"dog/{k}.jpg").symlink_to(folder / "gone")
    with pytest.warns(UserWarning, match=r"11 unreadable(?s:.*)\.\.\.$"):
        load_image_folder(folder)


def test_bad_folders(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        load_image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="readme.md' is a file, not a folder"):
        load_image_folder(folder / "readme.md")
    with pytest.raises(
        ValueError, match=r"has no category folders: .* as '.*image.jpg'; 1 image \('1.tif'\)"
    ):
        load_image_folder(folder / "cat/deep/er")
    for listed in (load_image_folder, list_images):
        with pytest.raises(ValueError, match=r"errors must be .*, got 'ignore'"):
            listed(folder, errors="ignore")
    (tmp_path / "empty/zebra").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"No image in \['.*zebra'\]: looked for .*\.png"):
        load_image_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"No image in '.*empty': looked for files"):
        list_images(tmp_path / "empty")


def test_a_folder_without_images_is_no_class(folder):
    for name in ("zebra", "ape", "Sphinx/deep/er"):
        (folder / name).mkdir(parents=True)
    (folder / "ape/notes.txt").write_text("an ape")
    message = r"3 folders \('Sphinx', 'ape', 'zebra'\) left out, .*class of '.*pets' needs images"
    with pytest.warns(UserWarning, match=message) as record:
        data = load_image_folder(folder)
    assert len(record) == 1 and record[0].filename == __file__
    assert data.target_names == ["cat", "dog"] and len(set(data.target)) == 2
    with pytest.raises(ValueError, match=r"No image in \['.*zebra'\]"):
        load_image_folder(folder, categories=["cat", "zebra"])
    (folder / "zebra/z.png").write_bytes(encode(SMALL, "PNG")[:-60])
    with pytest.warns(UserWarning, match="3 folders|1 unreadable image is") as record:
        data = load_image_folder(folder, errors="skip")
    assert len(record) == 2
    assert data.target_names == ["cat", "dog"] and len(data.unreadable) == 1


def test_what_systems_leave_behind_is_never_mentioned(folder):
    lists = lambda: (load_image_folder(folder).data.tolist(), list_images(folder))  # noqa: E731
    before = lists()
    for place in (".", "cat", "cat/deep"):
        for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", "$RECYCLE.BIN", "lost+found"):
            make_images(folder / place, [f"{name}/1.png", f"{name}/._1.png"])
        make_images(folder / place, [".DS_Store.png", "._2.png"])
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "DESKTOP.INI"):
            (folder / place / name).write_text("")
        (folder / place / ".Trash").symlink_to(folder / "nowhere")
    assert lists() == before
    extensions = [".jpg", ".png", ".db", ".ini"]
    assert "Thumbs.db" not in str(load_image_folder(folder, extensions=extensions).unreadable)


def test_files_that_can_not_be_decoded_are_skipped_or_named(odd_files, tmp_path):
    odd_files[:] = [file for file in odd_files if file.exists()]
    for k, file in enumerate(sorted(set(odd_files))):
        (tmp_path / "ab"[k % 2]).mkdir(exist_ok=True)
        file.rename(tmp_path / "ab"[k % 2] / file.name)
    bad = sorted(str(file) for file in tmp_path.glob("*/bad*"))
    with pytest.warns(UserWarning, match=r"(?s)6 unreadable images .*cut.*truncated"):
        data = load_image_folder(tmp_path, errors="skip", verbose=True)
    assert sorted(data.unreadable) == bad and len(data.data) == len(data.target) == 6
    assert find_unreadable(data.data) == {}
    with pytest.warns(UserWarning, match="6 unreadable"):
        assert list_images(tmp_path, errors="skip") == data.data.tolist()
    for listed in (load_image_folder, list_images):
        with pytest.raises(ValueError, match=r"6 unreadable images:(.*\n){6}.*bad"):
            listed(tmp_path, errors="raise")
    with config_context(damaged="error"), pytest.warns(UserWarning, match="7 unreadable"):
        list_images(tmp_path, errors="skip")


def test_links_are_followed_by_all_who_list_images(folder, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "more").mkdir(parents=True)
    for name in ("more/1.png", "more/2.png", "3.png"):
        Image.fromarray(SMALL).save(elsewhere / name)
    (folder / "cat/linked").symlink_to(elsewhere / "more")  # a folder in a class
    (folder / "dog/linked.png").symlink_to(elsewhere / "3.png")  # an image
    (folder / "owl").symlink_to(elsewhere)  # a class
    (folder / "same owl").symlink_to(elsewhere)  # the same folder twice is listed twice
    # links that lead back: to the class, the folder of classes, above it, and to each other
    (folder / "cat/deep/again").symlink_to(folder / "cat")
    (folder / "dog/all").symlink_to(folder)
    (elsewhere / "back").symlink_to(tmp_path)
    (elsewhere / "more/up").symlink_to(elsewhere)
    owl = ["3.png", "more/1.png", "more/2.png"]
    cat = ["10.jpg", "2.JPG", "deep/er/1.tif", "linked/1.png", "linked/2.png", "linked/up/3.png"]
    expected = [f"cat/{name}" for name in cat] + ["dog/b.png", "dog/linked.png"]
    expected += [f"{name}/{file}" for name in ("owl", "same owl") for file in owl]

    data = load_image_folder(folder)
    assert [Path(f).relative_to(folder).as_posix() for f in data.data] == expected
    assert data.target.tolist() == ["cat"] * 6 + ["dog"] * 2 + ["owl"] * 3 + ["same owl"] * 3
    (tmp_path / "photos").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for place in (folder, f"{folder}/", "photos", "elsewhere/../photos"):
        assert [Path(f).relative_to(place).as_posix() for f in list_images(place)] == expected
        assert len(load_image_folder(place).data) == 14


def test_links_between_folders_list_each_once(tmp_path):
    for name in "abcdefgh":
        make_images(tmp_path, [f"{name}/1.png"])
        for other in "abcdefgh".replace(name, ""):
            (tmp_path / name / f"to {other}").symlink_to(tmp_path / other)
    assert len(list_images(tmp_path)) == 8 * 8
    data = load_image_folder(tmp_path)
    assert np.unique(data.target, return_counts=True)[1].tolist() == [8] * 8
    assert data.data.tolist() == list_images(tmp_path)


def test_links_that_lead_nowhere(folder):
    (folder / "owl").symlink_to(folder / "no disk")
    with pytest.warns(UserWarning, match=r"1 link \('.*owl'\) left out") as record:
        assert load_image_folder(folder).target_names == ["cat", "dog"]
    assert len(record) == 1 and record[0].filename == __file__
    with pytest.warns(UserWarning, match="owl.*left out"):
        assert len(list_images(folder)) == 4
    (folder / "owl").unlink()
    (folder / "cat/a").symlink_to(folder / "cat/b")
    (folder / "cat/b").symlink_to(folder / "cat/a")
    with pytest.warns(UserWarning, match=r"2 links \('.*a', '.*b'\) left out"):
        assert len(load_image_folder(folder).data) == 4


def make_images(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(SMALL).save(root / name)
    return root


@pytest.mark.parametrize(
    "names, part",
    [
        ("train/cat/1.png val/cat/2.png test/cat/3.png", "train"),
        ("Training/cat/1.png Training/dog/1.png Test/2.png", "Training"),
        ("test/cat/1.png test/dog/1.png", "test"),
        ("train/a/1.png train/b/1.png valid/b/1.png valid/stray.png", "train"),
    ],
)
def test_parts_of_a_data_set_are_no_classes(tmp_path, names, part):
    root = make_images(tmp_path / "photos", names.split())
    (root / "notes").mkdir()
    message = rf"(?i)the parts \[.*{part}.* lie inside.*load_image_folder\('.*photos.{part}'\)"
    with pytest.raises(ValueError, match=message):
        load_image_folder(root)
    parts = sorted({name.split("/")[0] for name in names.split()})
    assert load_image_folder(root, categories=parts).target_names == parts
    assert len(list_images(root)) == len(names.split())


@pytest.mark.parametrize(
    "names",
    [
        "train/1.png test/1.png",  # to tell the parts from each other
        "train/steam/1.png bus/city/1.png",  # vehicles
        "train/2023/1.png test/2024/2.png",
        "cat/train/1.png cat/test/1.png dog/train/1.png",
    ],
)
def test_classes_that_are_called_like_parts(tmp_path, names):
    root = make_images(tmp_path, names.split())
    classes = sorted({name.split("/")[0] for name in names.split()})
    assert load_image_folder(root).target_names == classes


def test_images_beside_class_folders_are_told(folder):
    make_images(folder, ["5.png", "1.JPG", "3.png", "2.png", ".hidden.png"])
    message = r"4 images \('1.JPG', '2.png', '3.png', \.\.\.\) left out, .*pets' beside"
    with pytest.warns(UserWarning, match=message) as record:
        data = load_image_folder(folder)
    assert len(record) == 1 and record[0].filename == __file__ and len(data.data) == 4
    assert len(load_image_folder(folder, categories=["cat", "dog"]).data) == 4
    assert len(list_images(folder)) == 8


# Unreadable files -------------------------------------------------------------------------------


@pytest.fixture
def odd_files(tmp_path):
    """Return files, of which those are unreadable whose names begin with "bad"."""
    photo, jpeg = Image.fromarray(FLOWER), encode(FLOWER, "JPEG", quality=90)
    scratched = bytearray(jpeg)
    scratched[20000:20100] = bytes(100)
    contents = {
        "good.jpg": jpeg,
        "bad cut.jpg": jpeg[: len(jpeg) // 2],
        "damaged.jpg": scratched,
        "no end.jpg": jpeg[:-2],
        "print.jpg": encode(photo.convert("CMYK"), "JPEG"),
        "bad print.jpg": encode(photo.convert("CMYK"), "JPEG")[:9000],
        "grey.jpg": encode(photo.convert("L"), "JPEG", progressive=True),
        "bad text.jpg": b"hello",
        "bad empty.jpg": b"",
        "bad cut.png": encode(SMALL, "PNG")[:-60],
        "good.png": encode(SMALL, "PNG"),
        "bad.tif": encode((SMALL[..., 0] / 7).astype(np.float32), "TIFF"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in [*contents, "bad missing.jpg", "good.png"]]


def test_unreadable_files_are_those_that_can_not_be_loaded(odd_files):
    images, rng = check_images(odd_files), np.random.RandomState(0)
    for damaged in ("warn", "error"):
        with config_context(damaged=damaged):
            reasons = find_unreadable(odd_files, n_jobs=2)
            expected = {}
            for row in range(len(odd_files)):
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        images.load(row)
                except ValueError as error:
                    expected[row] = str(error).partition(": ")[2]
        assert reasons == expected and list(reasons) == sorted(reasons)
        names = {odd_files[row].name for row in reasons} - {"damaged.jpg"}
        assert names == {file.name for file in odd_files if file.name.startswith("bad")}
        assert ("damaged.jpg" in {odd_files[row].name for row in reasons}) == (damaged == "error")
    encoded = [file.read_bytes() for file in odd_files[:4]]
    assert list(find_unreadable(encoded)) == [1]
    for _ in range(15):  # a JPEG at an eighth of its size is judged as the whole
        data = bytearray(encoded[0])
        for place in rng.randint(0, len(data), 5):
            data[place] = rng.randint(256)
        with warnings.catch_warnings(), config_context(damaged="error"):
            warnings.simplefilter("ignore")
            try:
                load_image(bytes(data))
                expected = []
            except ValueError:
                expected = [0]
            assert list(find_unreadable([bytes(data)])) == expected


def test_what_is_no_list_of_files():
    for wrong in ("a.jpg", Path("a.jpg"), b"abc"):
        with pytest.raises(TypeError, match="pass \\[file\\]"):
            find_unreadable(wrong)
    assert find_unreadable([]) == {}
