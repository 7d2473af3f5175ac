"""Images in any form (path, bytes, PIL image, array, tensor) become uint8 RGB tensors."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.utils import check_array

from sktransfer._config import get_config
from sktransfer.io._decoding import (
    ACCEPTED,
    DamagedImageWarning,
    OpenImage,
    as_numpy,
    check_dtype,
    counts_of,
    expected,
    file_name,
    kind_of,
    open_image,
    quantise,
    shape_of,
    to_uint8,
    white,
)
from sktransfer.io._files import reading_turn
from sktransfer.io._folders import list_images, load_image_folder
from sktransfer.io._transparency import without_others
from sktransfer.transforms import RGB, Channels

__all__ = [
    "DamagedImageWarning",
    "ImageSequence",
    "check_images",
    "list_images",
    "load_image",
    "load_image_folder",
]

_DARK = 16  # of 255; images in which nothing is brighter were probably scaled otherwise
_MOST_BANDS = 16  # of what may be the channels of an image that came first
_ONE_FILE = ("a path", "encoded bytes", "a PIL image")


class ImageSequence:
    """A sequence of images that are read only when they are asked for.

    :func:`check_images` makes it; the parameters of the class are for this library alone.
    ``len(images)`` is their number, and ``images[rows]`` some of them, for a slice, a list of
    numbers or a mask: errors still name the rows of the whole sequence. Several threads may read
    from it at once.

    Attributes
    ----------
    channels : Channels
        What the pixels are: ``channels.number`` of them, 3 for RGB.

    See Also
    --------
    check_images : Make such a sequence of what a user passes.
    load_image : Decode a single image.

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
        digests: dict[Any, bytes] | None = None,
        channels: Channels = RGB,
    ) -> None:
        self._items = items
        self._rows = np.arange(len(items)) if rows is None else rows
        self._digests = {} if digests is None else digests
        self.channels = channels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: Any) -> ImageSequence:
        """Return the rows of a slice, a list of indices or a mask; errors keep their numbers."""
        rows = np.atleast_1d(self._rows[indices])
        return ImageSequence(self._items, rows, self._digests, self.channels)

    def with_channels(self, channels: Channels) -> ImageSequence:
        """Return the same images as another network takes them."""
        if channels == self.channels:
            return self
        if _is_block(self._items):
            _check_block(self._items, channels)
        return ImageSequence(self._items, self._rows, None, channels)

    def file(self, i: int) -> str | None:
        """Return the path of an image.

        Parameters
        ----------
        i : int
            Its row.

        Returns
        -------
        str or None
            None if it is no file.
        """
        item = self._items[self._rows[i]]
        return os.fspath(item) if isinstance(item, (str, os.PathLike)) else None

    def where(self, i: int) -> str:
        """Return the words by which an error calls row `i`: its number and its file, if any."""
        name = file_name(self._items[self._rows[i]])
        return f"row {self._rows[i]}" + (f" ({name})" if name else "")

    def open(self, i: int) -> OpenImage:
        """Return row `i`, its file read once, with `.digest` and `.decode()`. Thread-safe."""
        return open_image(self._items[self._rows[i]], self.where(i), self.channels)

    def digest(self, i: int) -> bytes:
        """Return bytes that stand for the content of an image.

        Parameters
        ----------
        i : int
            Its row.

        Returns
        -------
        bytes
            16 of them. They depend on a file's bytes, not its name, and on the background if it may
            be transparent; or on the upright RGB pixels of a PIL image, an array or a tensor.
        """
        known = self._digests.get((int(self._rows[i]), get_config()["background"]))
        if known is not None:
            return known
        with reading_turn(self._items[self._rows[i]]):
            return self.open(i).digest

    def digests(self, n_threads: int) -> list[bytes]:
        """Return the digests of all rows, and remember them: files are not read for them again."""
        background = get_config()["background"]
        with ThreadPoolExecutor(n_threads) as threads:
            digests = list(threads.map(self.digest, range(len(self))))
        rows = self._rows.tolist()
        self._digests.update({(r, background): d for r, d in zip(rows, digests, strict=True)})
        return digests

    def load(
        self,
        i: int,
        digest: bytes | None = None,
        use: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Read and decode an image.

        Parameters
        ----------
        i : int
            Its row.
        digest : bytes or None, default=None
            What `digest` returned for the row, if its content is to be the same still.
        use : callable, default=None
            What is made of the pixels: ``use(pixels)`` is returned in their place. The next large
            image is not decoded before it returns.

        Returns
        -------
        torch.Tensor
            uint8, of shape (channels, height, width): red, green and blue, unless `check_images`
            got other channels.

        Raises
        ------
        ValueError
            If it can't be read, or if its content has another digest than the given one.
        """
        with reading_turn(self._items[self._rows[i]]):
            image = self.open(i)
            if digest is not None and image.digest != digest:
                raise ValueError(f"{image.where}: the file changed while it was read; run again.")
            return image.decode(use)

    def examine(self, i: int, use: Callable[[torch.Tensor], Any]) -> tuple[Any, str]:
        """Return what `use` makes of the pixels of row `i`, and the damage, if any.

        A `ValueError` says why an image can't be decoded at all. Thread-safe.
        """
        with reading_turn(self._items[self._rows[i]]):
            return self.open(i).examine(use)

    def block(
        self, rows: Sequence[int], digests: Sequence[bytes | None] | None = None
    ) -> torch.Tensor | None:
        """Return rows of one array of uint8 images as a tensor (n, channels, height, width) on it.

        None for everything else, and if a row's content has another digest than the given one:
        then `load` says what is wrong. As it may be the user's own array, it is only to be read.
        """
        items = self._items
        is_block = isinstance(items, np.ndarray) and items.dtype == np.uint8 and items.ndim == 4
        is_block = is_block and self.channels.value_range is None
        if not is_block or items.shape[3] != self.channels.number or not items.size:
            return None
        numbers = self._rows[list(rows)]
        is_run = bool((np.diff(numbers) == 1).all())
        pixels = items[numbers[0] : numbers[-1] + 1] if is_run else items[numbers]
        if not pixels.flags.writeable or min(pixels.strides) < 0:  # torch would warn, or refuse it
            pixels = pixels.copy()
        for row, digest in zip(rows, digests or (), strict=False):
            if digest is not None and self.open(row).digest != digest:
                return None
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def check_images(
    X: Any, *, image_shape: Sequence[int] | None = None, channels: Channels | None = None
) -> ImageSequence:
    """Check that `X` is a sequence of images, without reading files or copying arrays.

    Parameters
    ----------
    X : sequence of images
        Paths (list, array, Series or data frame of one column), encoded bytes, PIL images,
        arrays (height, width[, channels]) of any sizes, tensors (channels, height, width); or one
        array (n, height, width[, channels]) or tensor (n, channels, height, width). An array or
        a tensor has one channel, grey, or three, RGB. Pixels are uint8, other integers in 0..255,
        bool, or floats in [0, 1], which are rounded to 8 bits. There is a warning if no pixel of
        integer images is brighter than 16, as they would be nearly black. The same PIL image may
        come several times, but not as the pages of a stack: pass a copy of each page.
    image_shape : tuple of 2 or 3 ints, default=None
        Height, width and perhaps channels of flat rows (n, n_features); one may be -1, as in
        `reshape`. Only here are values out of range clipped, with a warning.
    channels : Channels, default=None
        What the pixels are that a network takes, its `preprocessing.channels`; None for RGB. See
        :class:`sktransfer.ChannelAdapter`.

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
        return X if channels is None else X.with_channels(channels)
    channels = channels or RGB
    if (kind := kind_of(X)) in _ONE_FILE:
        raise TypeError(f"Expected a sequence of images, got {kind}: for one image, pass [X].")
    if issparse(X) or (isinstance(X, torch.Tensor) and X.layout != torch.strided):
        raise TypeError("Sparse input is not supported: pass X.toarray() (X.to_dense() in torch).")
    if image_shape is not None:
        return ImageSequence(_flat_rows(X, image_shape, channels), channels=channels.in_8_bits())
    items = _items(X)
    is_block = _is_block(items)
    if is_block:
        _check_block(items, channels)
    if len(items) == 0:
        raise ValueError("Found array with 0 sample(s) while a minimum of 1 is required.")
    kind = "an array" if is_block else kind_of(items[0])
    if kind in ("an array", "a tensor") and channels.value_range is None:
        _warn_of_darkness(items)
    elif kind == "a PIL image":
        _refuse_repeated_pages(items)
    return ImageSequence(items, channels=channels)


def count_channels(X: Any) -> int:
    """Return how many channels the first of a sequence of images has.

    Raises
    ------
    ValueError
        If it looks as if they came first, and not last.
    """
    items = X._items if isinstance(X, ImageSequence) else _items(X)
    if len(items) == 0:
        raise ValueError("Found array with 0 sample(s) while a minimum of 1 is required.")
    first = items[0]
    shape = shape_of(first, "row 0" + (f" ({file_name(first)})" if file_name(first) else ""))
    n_channels = shape[2] if len(shape) == 3 else 1
    if n_channels > shape[0] and shape[0] <= _MOST_BANDS:
        raise ValueError(
            f"row 0 has shape {shape}, which would be an image {shape[0]} pixels high, of "
            f"{n_channels} channels: channels come last, X.transpose(0, 2, 3, 1) moves them there; "
            f"if they do, pass n_channels={n_channels}."
        )
    return n_channels


def load_image(source: Any) -> torch.Tensor:
    """Decode one image to upright RGB, as Pillow would show it.

    Palette, CMYK, 1-bit and animated images (their first frame) are converted, 16-bit grey is
    scaled to 8 bits, and EXIF orientation is applied. Transparent parts of files and PIL images lie
    on white, or on the `background` of `sktransfer.set_config`.

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
    pixels = open_image(source, file_name(source) or "the image").decode()
    if kind_of(source) in ("an array", "a tensor"):
        _warn_of_darkness([source])
    return pixels


# Many images ----------------------------------------------------------------------------------


def _is_block(items: Any) -> bool:
    """Tell whether images come as one array or tensor of numbers."""
    is_array = isinstance(items, np.ndarray) and items.dtype.kind not in "OSUT"
    return is_array or isinstance(items, torch.Tensor)


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


def _check_block(X: np.ndarray | torch.Tensor, channels: Channels) -> None:
    """Check the shape and dtype of images that come as one array or tensor."""
    shape, is_tensor = tuple(X.shape), isinstance(X, torch.Tensor)
    check_dtype(as_numpy(X[:0] if shape else X).dtype, "X", channels.value_range)
    counts = counts_of(channels)
    remedy = ""
    if len(shape) < 2:
        got = "1D array" if shape else "scalar array"
        remedy = f"Expected 2D array, got {got} instead. Reshape your data: X.reshape(1, -1) is one"
        remedy += " flat image (with image_shape), X.reshape(n, height, width) are n grey ones."
    elif len(shape) == 2:
        remedy = "These are flat rows or one grey image: pass image_shape=(height, width), or [X]."
    elif is_tensor and len(shape) == 3:
        remedy = "Pass X.unsqueeze(1) for grey images, or X.unsqueeze(0) for a single image."
    elif len(shape) == 4 and shape[1 if is_tensor else 3] not in counts:
        remedy = _channels_remedy(shape, is_tensor, channels)
    elif len(shape) == 3 and 1 not in counts:
        remedy = f"An image has {expected(channels)}: for a single one, pass [X]."
    elif not is_tensor and len(shape) == 3 and shape[2] in (3, 4) and shape[1] > 8:
        remedy = "If this is one colour image, pass [X]; if it is grey ones, X[..., np.newaxis]."
    elif len(shape) > 4:
        remedy = "Images have at most 4 dimensions: (n, height, width, channels)."
    if remedy:
        raise ValueError(f"X has shape {shape}. {remedy}")


def _channels_remedy(shape: tuple[int, ...], is_tensor: bool, channels: Channels) -> str:
    """Return what to do with images of this shape, (n, ...), which have other channels."""
    n_channels, other = (shape[1], shape[3]) if is_tensor else (shape[3], shape[1])
    counts = counts_of(channels)
    if channels.number != 3 and other not in counts:
        return f"The network takes images of {expected(channels)}."
    if n_channels and other not in counts:
        return f"But {without_others(n_channels, 'X[:, {}]' if is_tensor else 'X[..., {}]')}."
    order = "0, 3, 1, 2" if is_tensor else "0, 2, 3, 1"
    move = f"X.{'permute' if is_tensor else 'transpose'}({order})"
    what, where = ("A tensor", "first") if is_tensor else ("An array", "last")
    remedy = f": pass {move}" if other in counts else ""
    return f"{what} has its {expected(channels)} {where}{remedy}."


def _warn_of_darkness(images: Iterable[Any]) -> None:
    """Warn if integer images are nearly black; nothing is read behind the first bright one."""
    brightest = 0
    for image in map(as_numpy, images):
        if image.dtype.kind not in "iu" or image.size == 0:
            return
        brightest = max(brightest, int(image.max()))
        if brightest > _DARK:
            return
    if brightest > 0:
        warnings.warn(
            f"The brightest pixel is {brightest}, but white is 255 for integers: the images are "
            "nearly black. Divide by the largest possible value, as in X / 16 for scikit-learn's "
            "digits.",
            stacklevel=3,
        )


def _refuse_repeated_pages(images: Sequence[Any]) -> None:
    """Raise a `ValueError` if an image that was moved to a later page is in several rows."""
    rows: dict[int, list[int]] = {}
    for row, image in enumerate(images):
        if image.tell() > 0:
            rows.setdefault(id(image), []).append(row)
    for same in rows.values():
        if len(same) > 1:
            first = ", ".join(map(str, same[:5])) + ", ..." * (len(same) > 5)
            raise ValueError(
                f"rows {first} are one PIL image of several pages, which shows page "
                f"{images[same[0]].tell()} (counted from 0) in all of them: pass a copy of each "
                "page, [page.copy() for page in PIL.ImageSequence.Iterator(stack)]."
            )


def _flat_rows(X: Any, image_shape: Sequence[int], channels: Channels) -> np.ndarray:
    """Return flat rows as uint8 (n, height, width[, channels]); clip with a warning."""
    if isinstance(X, (Sequence, np.ndarray)) and len(X):
        first = kind_of(X[0])
        if first in _ONE_FILE:
            raise ValueError(f"image_shape is for flat rows, but row 0 is {first}: leave it None.")
    X = check_array(as_numpy(X), dtype="numeric", ensure_all_finite=False, input_name="X")
    shape = _resolve_shape(image_shape, X.shape[1], channels)
    if channels.value_range is not None:
        return to_uint8(X.reshape(len(X), *shape), "X", channels.value_range)
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
    else:
        _warn_of_darkness([X])
    return quantise(X).reshape(len(X), *shape)


def _resolve_shape(
    image_shape: Sequence[int], n_features: int, channels: Channels
) -> tuple[int, ...]:
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
    n_channels = shape[2] if len(shape) == 3 else 1
    if n_channels not in counts_of(channels):
        remedy = f"an image has {expected(channels)}"
        if channels.number == 3:
            rest = f"X.reshape(-1, {', '.join(map(str, shape))})[..., {{}}] without image_shape"
            remedy = without_others(n_channels, rest)
        raise ValueError(f"image_shape={shape} has {n_channels} channels; {remedy}.")
    return shape
