"""Images in any form (path, bytes, PIL image, array, tensor) become uint8 RGB tensors."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from scipy.sparse import issparse
from sklearn.utils import Bunch, check_array

from sktransfer._decoding import (
    ACCEPTED,
    DamagedImageWarning,
    OpenImage,
    as_numpy,
    check_dtype,
    file_name,
    kind_of,
    open_image,
    quantise,
    white,
)
from sktransfer._files import open_regular, reading_turn

__all__ = [
    "DamagedImageWarning",
    "ImageSequence",
    "check_images",
    "list_images",
    "load_image",
    "load_image_folder",
]

# HEIC needs a Pillow plugin: listed so that such photographs are reported, not passed over.
_IMAGE_EXTENSIONS = tuple(
    ".apng .avif .bmp .dib .gif .heic .heif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm"
    " .tga .tif .tiff .webp".split()
)
_ONE_FILE = ("a path", "encoded bytes", "a PIL image")


class ImageSequence:
    """A sequence of images that are read only when asked for; `check_images` makes it.

    Examples
    --------
    >>> import numpy as np
    >>> from sktransfer.io import check_images
    >>> images = check_images(np.zeros((5, 32, 48, 3), dtype=np.uint8))
    >>> len(images), images.load(0).shape
    (5, torch.Size([3, 32, 48]))
    >>> images[[3, 1]].digest(0) == images.digest(3)
    True
    """

    def __init__(
        self,
        items: Any,
        rows: np.ndarray | None = None,
        digests: dict[int, bytes] | None = None,
    ) -> None:
        self._items = items
        self._rows = np.arange(len(items)) if rows is None else rows
        self._digests = {} if digests is None else digests

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: Any) -> ImageSequence:
        """Return the rows of a slice, a list of indices or a mask; errors keep their numbers."""
        return ImageSequence(self._items, np.atleast_1d(self._rows[indices]), self._digests)

    def file(self, i: int) -> str | None:
        """Return the path of row `i`; None if it is no file."""
        item = self._items[self._rows[i]]
        return os.fspath(item) if isinstance(item, (str, os.PathLike)) else None

    def where(self, i: int) -> str:
        """Return the words by which an error calls row `i`: its number and its file, if any."""
        name = file_name(self._items[self._rows[i]])
        return f"row {self._rows[i]}" + (f" ({name})" if name else "")

    def open(self, i: int) -> OpenImage:
        """Return row `i`, its file read once, with `.digest` and `.decode()`. Thread-safe."""
        return open_image(self._items[self._rows[i]], self.where(i))

    def digest(self, i: int) -> bytes:
        """Return 16 bytes that stand for the content of row `i`.

        They depend on a file's bytes, not its name; or on the upright RGB pixels of a PIL
        image, an array or a tensor.
        """
        known = self._digests.get(int(self._rows[i]))
        if known is not None:
            return known
        with reading_turn(self._items[self._rows[i]]):
            return self.open(i).digest

    def digests(self, n_threads: int) -> list[bytes]:
        """Return the digests of all rows, and remember them: files are not read for them again."""
        with ThreadPoolExecutor(n_threads) as threads:
            found = list(threads.map(self.digest, range(len(self))))
        self._digests.update(zip(self._rows.tolist(), found, strict=True))
        return found

    def load(
        self,
        i: int,
        digest: bytes | None = None,
        use: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return row `i` as uint8 RGB of shape (3, height, width), or raise a `ValueError`.

        It raises one, too, if the row's content has another digest than the given one. With `use`
        it returns what that makes of the pixels: large images wait for each other until then.
        """
        with reading_turn(self._items[self._rows[i]]):
            image = self.open(i)
            if digest is not None and image.digest != digest:
                raise ValueError(f"{image.where}: the file changed while it was read; run again.")
            return image.decode(use)


def check_images(X: Any, *, image_shape: Sequence[int] | None = None) -> ImageSequence:
    """Check that `X` is a sequence of images, without reading files or copying arrays.

    Parameters
    ----------
    X : sequence of images
        Paths (list, array, Series or data frame of one column), encoded bytes, PIL images,
        arrays (height, width[, channels]) of any sizes, tensors (channels, height, width); or one
        array (n, height, width[, channels]) or tensor (n, channels, height, width). One to
        four channels: grey, grey and alpha, RGB, RGBA; alpha is dropped. Pixels are uint8, other
        integers in 0..255, bool, or floats in [0, 1], which are rounded to 8 bits.
    image_shape : tuple of 2 or 3 ints, default=None
        Height, width and perhaps channels of flat rows (n, n_features); one may be -1, as in
        `reshape`. Only here are values out of range clipped, with a warning.

    Returns
    -------
    ImageSequence
        What is wrong with a single image is raised when that row is read.

    Raises
    ------
    TypeError, ValueError
        Naming the row, what came and the remedy.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer.io import check_images
    >>> images = check_images(load_digits().data / 16, image_shape=(8, 8))
    >>> len(images), images.load(0).shape
    (1797, torch.Size([3, 8, 8]))
    """
    if isinstance(X, ImageSequence):
        return X
    if (kind := kind_of(X)) in _ONE_FILE:
        raise TypeError(f"Expected a sequence of images, got {kind}: for one image, pass [X].")
    if issparse(X) or (isinstance(X, torch.Tensor) and X.layout != torch.strided):
        raise TypeError("Sparse input is not supported: pass X.toarray() (X.to_dense() in torch).")
    if image_shape is not None:
        return ImageSequence(_flat_rows(X, image_shape))
    items = _items(X)
    is_block = isinstance(items, np.ndarray) and items.dtype.kind not in "OSUT"
    if is_block or isinstance(items, torch.Tensor):
        _check_block(items)
    if len(items) == 0:
        raise ValueError("Found array with 0 sample(s) while a minimum of 1 is required.")
    return ImageSequence(items)


def load_image(source: Any) -> torch.Tensor:
    """Decode one image to upright RGB, as Pillow would show it.

    Palette, CMYK, 1-bit and animated images (their first frame) are converted, 16-bit grey is
    scaled to 8 bits, EXIF orientation is applied and alpha is dropped.

    Parameters
    ----------
    source : path, bytes, PIL image, array (height, width[, channels]) or tensor (channels, h, w)
        Pixels are as in `check_images`.

    Returns
    -------
    torch.Tensor
        uint8, of shape (3, height, width).

    Raises
    ------
    TypeError, ValueError
        If there is no such file, or it cannot be read, or is not an image.

    Examples
    --------
    >>> import numpy as np
    >>> from sktransfer.io import load_image
    >>> load_image(np.full((2, 3), 0.5)).shape
    torch.Size([3, 2, 3])
    """
    return open_image(source, file_name(source) or "the image").decode()


def load_image_folder(
    path: str | os.PathLike,
    *,
    categories: Sequence[str] | None = None,
    extensions: Sequence[str] | None = None,
    on_error: str = "warn",
) -> Bunch:
    """List the images of a folder that has one sub-folder for each category.

    The counterpart of `sklearn.datasets.load_files`. Images are listed, not loaded; the order is
    that of the sorted paths. Hidden files and those with other extensions are passed over.

    Parameters
    ----------
    path : path
        The folder; images may also lie in sub-folders of a category's folder.
    categories : list of str, default=None
        The category folders to use; None means all but the hidden ones.
    extensions : list of str, default=None
        The file extensions of images, in lower case; None means the usual ones.
    on_error : {"warn", "raise"}, default="warn"
        What to do with files whose header Pillow can't read: leave them out, with a warning that
        names them, or raise a `ValueError`. Damage behind the header shows when a file is decoded.

    Returns
    -------
    sklearn.utils.Bunch
        `data` and `filenames` (the paths, an array of str), `target` (integers into
        `target_names`), `target_names` (the sorted folder names) and `unreadable` (the paths
        that were left out).

    Raises
    ------
    ValueError
        If the folder, a category or its images are missing.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from PIL import Image
    >>> from sktransfer.io import load_image_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ["cracked/1.png", "intact/1.png", "intact/2.png"]:
    ...         file = pathlib.Path(folder, name)
    ...         file.parent.mkdir(exist_ok=True)
    ...         Image.new("L", (8, 8)).save(file)
    ...     data = load_image_folder(folder)
    >>> data.target_names, data.target
    (['cracked', 'intact'], array([0, 1, 1]))
    """
    if on_error not in ("warn", "raise"):
        raise ValueError(f"on_error must be 'warn' or 'raise', got {on_error!r}.")
    names = _category_names(Path(path), categories)
    extensions = tuple(extensions or _IMAGE_EXTENSIONS)
    listed = [(f, k) for k, name in enumerate(names) for f in _images_in(path, name, extensions)]
    reasons = {file: reason for file, _ in listed if (reason := _header_error(file))}
    if reasons:
        _report(list(reasons.values()), on_error)
    kept = [(file, k) for file, k in listed if file not in reasons]
    target = np.array([k for _, k in kept], dtype=int)
    empty = [os.path.join(path, names[k]) for k in sorted({*range(len(names))} - {*target})]
    if empty:
        raise ValueError(
            f"No image in {empty}: looked for readable files that end in {', '.join(extensions)}. "
            "Remove the folder, or set `categories`."
        )
    data = np.array([file for file, _ in kept], dtype=object)
    return Bunch(
        data=data, filenames=data, target=target, target_names=names, unreadable=list(reasons)
    )


def list_images(path: str | os.PathLike) -> list[str]:
    """List the image files in a folder and its sub-folders.

    Hidden files and folders, and files with other extensions, are passed over; nothing is opened.

    Parameters
    ----------
    path : path
        The folder.

    Returns
    -------
    list of str
        Paths, sorted.

    Raises
    ------
    ValueError
        If there is no such folder, or no image in it.

    Examples
    --------
    >>> import pathlib, sklearn.datasets
    >>> from sktransfer.io import list_images
    >>> folder = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    >>> [pathlib.Path(file).name for file in list_images(folder)]
    ['china.jpg', 'flower.jpg']
    """
    _check_folder(Path(path), "pass a folder of images.")
    found = _images_in(path, "", _IMAGE_EXTENSIONS)
    if not found:
        raise ValueError(
            f"No image in {os.fspath(path)!r}: looked for files that end in "
            f"{', '.join(_IMAGE_EXTENSIONS)}."
        )
    return found


# Many images ----------------------------------------------------------------------------------


def _items(X: Any) -> Any:
    """Unwrap `X` to a list of images, an array of strings or numbers, or a tensor."""
    if hasattr(X, "columns") and hasattr(X, "shape") and X.shape[1] == 1:
        X = X[X.columns[0]]  # the only column of a pandas or polars data frame
    if hasattr(X, "to_list"):
        X = X.to_list()  # a Series
    if isinstance(X, torch.Tensor):
        return X
    if not isinstance(X, (list, tuple)) and hasattr(X, "__array__"):
        X = np.asarray(X)
    if isinstance(X, np.ndarray):
        if X.dtype.kind not in "OSUT":
            return X
        if X.ndim == 2 and X.shape[1] == 1:
            X = X[:, 0]
        if X.ndim != 1:
            return _numbers(X)
        if X.dtype.kind != "O":
            return X
    elif not isinstance(X, Sequence):
        raise TypeError(f"Expected a sequence of images, got {kind_of(X)}: pass {ACCEPTED}.")
    return _numbers(X) if _common_kind(X) in ("a list", "a number") else X


def _common_kind(items: Sequence[Any]) -> str:
    first = kind_of(items[0]) if len(items) else ""
    for row, item in enumerate(items):
        kind = kind_of(item)
        if kind != first:
            raise TypeError(f"row {row} is {kind}, but row 0 is {first}: pass images of one kind.")
    if first.startswith(("a missing", "of type")):
        raise TypeError(f"row 0 is {first}, not an image: pass {ACCEPTED}.")
    return first


def _numbers(X: Any) -> np.ndarray:
    """Turn nested lists, or an array of objects, into an array of numbers."""
    try:
        array = np.array(X.tolist() if isinstance(X, np.ndarray) else X)
    except ValueError as error:
        raise TypeError(f"The rows are lists of unequal shapes: pass {ACCEPTED}.") from error
    if array.dtype.kind in "OSUT":
        got = f"{array.dtype} of shape {array.shape}"
        raise TypeError(f"Expected numbers, or one column of paths, got an array of {got}.")
    return array


def _check_block(X: np.ndarray | torch.Tensor) -> None:
    """Check the shape and dtype of images that come as one array or tensor."""
    shape, is_tensor = tuple(X.shape), isinstance(X, torch.Tensor)
    check_dtype(as_numpy(X[:0] if shape else X).dtype, "X")
    remedy = ""
    if len(shape) < 2:
        got = "1D array" if shape else "scalar array"
        remedy = f"Expected 2D array, got {got} instead. Reshape your data: X.reshape(1, -1) is one"
        remedy += " flat image (with image_shape), X.reshape(n, height, width) are n grey ones."
    elif len(shape) == 2:
        remedy = "These are flat rows or one grey image: pass image_shape=(height, width), or [X]."
    elif is_tensor and len(shape) == 3:
        remedy = "Pass X.unsqueeze(1) for grey images, or X.unsqueeze(0) for a single image."
    elif is_tensor and len(shape) == 4 and not 1 <= shape[1] <= 4:
        remedy = "A tensor has its 1 to 4 channels first: pass X.permute(0, 3, 1, 2)."
    elif not is_tensor and len(shape) == 3 and shape[2] in (3, 4) and shape[1] > 8:
        remedy = "If this is one colour image, pass [X]; if it is grey ones, X[..., np.newaxis]."
    elif not is_tensor and len(shape) == 4 and not 1 <= shape[3] <= 4:
        remedy = "An array has its 1 to 4 channels last"
        remedy += ": pass X.transpose(0, 2, 3, 1)." if 1 <= shape[1] <= 4 else "."
    elif len(shape) > 4:
        remedy = "Images have at most 4 dimensions: (n, height, width, channels)."
    if remedy:
        raise ValueError(f"X has shape {shape}. {remedy}")


def _flat_rows(X: Any, image_shape: Sequence[int]) -> np.ndarray:
    """Return flat rows as uint8 (n, height, width[, channels]); clip with a warning."""
    if isinstance(X, (Sequence, np.ndarray)) and len(X):
        first = kind_of(X[0])
        if first in _ONE_FILE:
            raise ValueError(f"image_shape is for flat rows, but row 0 is {first}: leave it None.")
    X = check_array(as_numpy(X), dtype="numeric", ensure_all_finite=False, input_name="X")
    shape = _resolve_shape(image_shape, X.shape[1])
    low, high, top = X.min(axis=1), X.max(axis=1), white(X)  # (n,)
    broken = np.flatnonzero(~(np.isfinite(low) & np.isfinite(high)))
    if len(broken):
        raise ValueError(f"Input X contains NaN or infinity in row {broken[0]}: mend or drop it.")
    outside = np.flatnonzero((low < 0) | (high > top))
    if len(outside):
        row = outside[0]
        warnings.warn(
            f"{len(outside)} of {len(X)} rows have pixels outside [0, {top}] and are clipped; the "
            f"first is row {row}, from {low[row]:g} to {high[row]:g}. Scale them, as in X / 16 for "
            "scikit-learn's digits, or with MinMaxScaler(clip=True).",
            UserWarning,
            stacklevel=3,
        )
    return quantise(X).reshape(len(X), *shape)


def _resolve_shape(image_shape: Sequence[int], n_features: int) -> tuple[int, ...]:
    shape = tuple(image_shape)
    valid = all(isinstance(side, (int, np.integer)) and (side > 0 or side == -1) for side in shape)
    if not valid or len(shape) not in (2, 3) or shape.count(-1) > 1:
        raise ValueError(
            "image_shape must be (height, width) or (height, width, channels), positive ints of "
            f"which one may be -1, got {image_shape!r}."
        )
    known = abs(math.prod(shape))
    if n_features % known if -1 in shape else n_features != known:
        holds = f"a multiple of {known}" if -1 in shape else str(known)
        raise ValueError(f"X has {n_features} features, but image_shape={shape} takes {holds}.")
    shape = tuple(n_features // known if side == -1 else int(side) for side in shape)
    if len(shape) == 3 and shape[2] > 4:
        raise ValueError(f"image_shape={shape} has {shape[2]} channels, an image has 1 to 4.")
    return shape


# A folder of images ---------------------------------------------------------------------------


def _category_names(folder: Path, categories: Sequence[str] | None) -> list[str]:
    _check_folder(folder, "pass the folder that holds the categories.")
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and f.name[0] != ".")
    if not names:
        raise ValueError(
            f"{str(folder)!r} has no category folders: images are expected as "
            f"{str(folder / 'category' / 'image.jpg')!r}."
        )
    missing = sorted(set(categories or []) - set(names))
    if missing:
        raise ValueError(f"{str(folder)!r} has no categories {missing}; it has {names}.")
    return names if categories is None else [name for name in names if name in categories]


def _check_folder(folder: Path, remedy: str) -> None:
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{str(folder)!r} {reason}: {remedy}")


def _images_in(path: str | os.PathLike, name: str, extensions: tuple[str, ...]) -> list[str]:
    def refuse(error: OSError) -> None:  # os.walk would pass over what it can't list
        raise ValueError(f"The folder {error.filename!r} cannot be listed: {error}") from error

    found = []
    for root, folders, files in os.walk(os.path.join(path, name), onerror=refuse):
        folders[:] = [folder for folder in folders if folder[0] != "."]
        files = [f for f in files if f[0] != "." and f.lower().endswith(extensions)]
        found += [os.path.join(root, file) for file in files]
    return sorted(found)


def _header_error(file: str) -> str:
    """Return why Pillow can't open a file, or nothing if it can."""
    try:
        with open_regular(file) as stream, Image.open(stream):
            return ""
    except UnidentifiedImageError:
        reason = "not an image that Pillow can read" if os.path.getsize(file) else "empty (0 bytes)"
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        reason = str(error)
    return f"{file!r}: {reason}"


def _report(reasons: list[str], on_error: str) -> None:
    if on_error == "raise":
        raise ValueError(f"{len(reasons)} unreadable images:\n" + "\n".join(reasons))
    first = "\n".join(reasons[:5] + ["..."] * (len(reasons) > 5))
    warnings.warn(f"{len(reasons)} unreadable images are left out:\n{first}", stacklevel=3)
