"""One image: what a user gave is read and decoded to uint8 RGB, or refused with a remedy."""

from __future__ import annotations

import math
import os
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Number
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
import xxhash
from PIL import Image, ImageFile, UnidentifiedImageError

from sktransfer._config import get_config
from sktransfer._threads import call_in_forks, renewed_in_forks
from sktransfer.io._bit_depth import UnusableImage
from sktransfer.io._codecs import (
    Decoded,
    decode,
    decode_pillow,
    is_sound_jpeg,
    why_unknown,
)
from sktransfer.io._files import read_regular, room_for
from sktransfer.io._messages import speaking_of
from sktransfer.io._samples import samples, samples_of_pillow
from sktransfer.io._transparency import Colour, may_be_transparent, without_others
from sktransfer.transforms import RGB, Channels

_LONGEST_NAME = 500  # characters in an error
_MOST_OUTSIDE = 0.5  # of the values of an image; if more are clipped, their range was another one
ACCEPTED = "paths, encoded bytes, PIL images, arrays (height, width[, channels]) or tensors"
_KINDS: dict[str, tuple[type, ...]] = {
    "a path": (str, os.PathLike),
    "encoded bytes": (bytes, bytearray, memoryview),
    "a PIL image": (Image.Image,),
    "an array": (np.ndarray,),
    "a tensor": (torch.Tensor,),
    "a list": (list, tuple),
}
# The lock of each PIL image that is being read, by its identity: the image may be in several rows,
# or in the hands of several threads. A lock is gone when the last thread that uses it is done.
_pillow_locks: WeakValueDictionary[int, Any] = WeakValueDictionary()
_finding_lock = renewed_in_forks(threading.Lock())
call_in_forks(_pillow_locks.clear)  # a thread that isn't in the child may have held some


class DamagedImageWarning(UserWarning):
    """A file is damaged, and what could be decoded of it is used; see `sktransfer.set_config`."""


@dataclass(frozen=True)
class OpenImage:
    """An image whose file was read: its bytes, or uint8 pixels (height, width, channels)."""

    content: Any
    where: str
    doubt: str = ""  # why its brightness may be wrong
    damage: str = ""  # what is wrong with the file of a PIL image
    # Read once, as another thread may change it: pixels are never kept under another one's digest.
    background: Colour = field(default_factory=lambda: get_config()["background"])
    channels: Channels = RGB

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for the content and, if that may show, for the background."""
        if isinstance(self.content, bytes):
            if not may_be_transparent(self.content):
                return xxhash.xxh3_128_digest(self.content)
            digest = xxhash.xxh3_128(f"file on {self.background}".encode())
            digest.update(self.content)
            return digest.digest()
        # The prefix keeps pixels apart from files, and 2×8 pixels apart from 4×4.
        digest = xxhash.xxh3_128(f"uint8 RGB pixels {self.content.shape}".encode())
        digest.update(np.ascontiguousarray(self.content).data)
        return digest.digest()

    def decode(self, use: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Return uint8 pixels (channels, height, width), RGB unless `channels` says else, with
        channels last in memory; or what `use` makes of them.

        No other large image is decoded before `use` returns.
        """
        with ExitStack() as room:
            pixels = torch.from_numpy(self._pixels(room).transpose(2, 0, 1))
            return pixels if use is None else use(pixels)

    def examine(self, use: Callable[[torch.Tensor], Any]) -> tuple[Any, str]:
        """Return what `use` makes of uint8 (channels, height, width), and the damage, if any.

        There is no warning and, if a part could be decoded, no error, whatever the settings say.
        """
        with ExitStack() as room:
            decoded = self._decoded(room)
            pixels = self._own_pixels(decoded)
            return use(torch.from_numpy(pixels.transpose(2, 0, 1))), decoded.damage

    def check(self) -> None:
        """Raise the `ValueError` that `decode` would, without its warnings."""
        is_picture = isinstance(self.content, bytes) and self.channels.are_rgb
        if is_picture and _guarded(is_sound_jpeg, self.content, self.where):
            return
        with ExitStack() as room:
            decoded = self._decoded(room)
            _refuse_damage(decoded, self.where)
            _from_array(decoded.pixels, self.where, self.channels)

    def _pixels(self, room: ExitStack) -> np.ndarray:
        decoded = self._decoded(room)
        _refuse_damage(decoded, self.where)
        _warn(decoded, self.where)
        return self._own_pixels(decoded)

    def _own_pixels(self, decoded: Decoded) -> np.ndarray:
        if not isinstance(self.content, bytes):
            return self.content.copy("C")  # it may be the user's own array
        return _from_array(decoded.pixels, self.where, self.channels)

    def _decoded(self, room: ExitStack) -> Decoded:
        if not isinstance(self.content, bytes):
            room.enter_context(room_for(self.content.shape[0] * self.content.shape[1]))
            return Decoded(self.content, self.damage, self.doubt)

        def decode_in_turn(data: bytes) -> Decoded:
            def reserve(n: int) -> None:
                room.enter_context(room_for(n))

            if not self.channels.are_rgb:
                return samples(data, reserve)
            return decode(data, self.background, reserve)

        return _guarded(decode_in_turn, self.content, self.where)


def _refuse_damage(decoded: Decoded, where: str) -> None:
    """Raise an error of a damaged image where the settings say so."""
    if decoded.damage and get_config()["damaged"] == "error":
        raise ValueError(
            f"{where}: the image is damaged ({decoded.damage}); replace it, or drop the row."
        )


def _warn(decoded: Decoded, where: str) -> None:
    """Warn of what is wrong with an image."""
    if decoded.damage:
        warnings.warn(
            f"{where}: the image is damaged ({decoded.damage}); what could be decoded of it is "
            "used. Replace it, or drop the row; sktransfer.set_config(damaged='error') refuses "
            "such images.",
            DamagedImageWarning,
            stacklevel=2,
        )
    if decoded.doubt:
        warnings.warn(f"{where}: {decoded.doubt}.", stacklevel=2)


def open_image(item: Any, where: str, channels: Channels = RGB) -> OpenImage:
    if isinstance(item, (str, os.PathLike)):
        return OpenImage(_read(item, where), where, channels=channels)
    if isinstance(item, (bytes, bytearray, memoryview)):
        if not item:
            raise ValueError(f"{where}: the encoded image is empty (0 bytes); drop the row.")
        return OpenImage(bytes(item), where, channels=channels)
    damage = doubt = ""
    if isinstance(item, Image.Image):
        decode = _from_users_pillow if channels.are_rgb else _samples_of_users_pillow
        item, damage, doubt = _guarded(decode, item, where)
    if isinstance(item, torch.Tensor):
        item = _channels_last(item, where, channels)
    if not isinstance(item, np.ndarray):
        raise TypeError(f"{where} is {kind_of(item)}: pass {ACCEPTED}.")
    pixels = _from_array(item, where, channels)
    return OpenImage(pixels, where, doubt, damage, channels=channels)


def file_name(item: Any) -> str:
    """Return a path as errors quote it: nothing for what is none, the ends of one without end."""
    if not isinstance(item, (str, os.PathLike)):
        return ""
    name = str(os.fspath(item))
    if len(name) <= _LONGEST_NAME:
        return repr(name)
    part = _LONGEST_NAME // 5
    return f"{name[:part]!r}...{name[-part:]!r}, {len(name):,} characters"


def kind_of(item: Any) -> str:
    for kind, types in _KINDS.items():
        if isinstance(item, types):
            return kind
    nan = isinstance(item, float) and math.isnan(item)
    if nan or type(item).__name__ in ("NoneType", "NAType", "NaTType"):
        return f"a missing value ({item})"
    number = isinstance(item, (Number, np.generic))
    return "a number" if number else f"of type {type(item).__name__}"


def _read(path: str | os.PathLike, where: str) -> bytes:
    try:
        data = read_regular(path)
    except FileNotFoundError as error:
        here = "" if os.path.isabs(path) else f" in {os.getcwd()!r}"
        raise ValueError(f"{where}: there is no such file{here}; check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)  # without the name once more
        reason += "; use load_image_folder" if os.path.isdir(path) else ""
        raise ValueError(f"{where}: the file cannot be read: {reason}.") from error
    if not data:
        raise ValueError(f"{where}: the file is empty (0 bytes); replace it or drop the row.")
    return data


def _guarded(decode: Callable[[Any], Any], source: Any, where: str) -> Any:
    """Call `decode(source)`; its errors become a `ValueError` that says where and what to do."""
    is_closed = _lost_its_file(source)  # known before Pillow tries
    try:
        with speaking_of(where):
            return decode(source)
    except (MemoryError, ImportError):
        raise
    except Image.DecompressionBombWarning as error:  # the user's filters make it an error
        raise ValueError(str(error)) from error
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        if isinstance(error, (NameError, AttributeError)) and not _came_through_pillow(error):
            raise  # a mistake in this code
        reason = f"the image cannot be decoded, it may be damaged or cut short ({reason_of(error)})"
        reason += "; replace it, or drop the row"
        if is_closed or (isinstance(source, Image.Image) and "closed image" in str(error)):
            reason = (
                "the PIL image is closed, its pixels are gone; pass its copy(), made before it "
            )
            reason += "is closed, or the path"
        elif isinstance(error, UnidentifiedImageError):
            reason = why_unknown(source)
        elif isinstance(error, UnusableImage):
            reason = str(error)
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"too many pixels ({error}); make it smaller or, if you trust it, raise the "
            reason += "limit: sktransfer.set_config(max_pixels=...) or PIL.Image.MAX_IMAGE_PIXELS"
        raise ValueError(f"{where}: {reason}.") from error


def reason_of(error: Exception) -> str:
    """Return the text of an error, or its name if it has none."""
    return str(error) or type(error).__name__


def _lost_its_file(source: Any) -> bool:
    """Tell whether this is a PIL image that waits for pixels which it can't get any more."""
    if not isinstance(source, ImageFile.ImageFile) or not source.tile:
        return False
    file = getattr(source, "fp", None)
    return file is None or getattr(file, "closed", False)


def _came_through_pillow(error: Exception) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("PIL.") for frame, _ in frames)


def _from_users_pillow(image: Image.Image) -> Decoded:
    """Decode an image that other threads may hold: Pillow reads its file when it is first used."""
    # In this order: who holds the lock never waits for room, so that it is soon free again.
    with _room_for(image), _lock_of(image):
        return decode_pillow(image, get_config()["background"])


def _samples_of_users_pillow(image: Image.Image) -> Decoded:
    with _room_for(image), _lock_of(image):
        return samples_of_pillow(image)


def _room_for(image: Image.Image) -> AbstractContextManager[None]:
    return room_for(image.width * image.height)


def _lock_of(image: Image.Image) -> Any:
    """Return the lock of an image, Python's own: Ctrl-C could leave one of ours locked."""
    with _finding_lock:
        lock = _pillow_locks.setdefault(id(image), threading.Lock())
    return lock


def shape_of(item: Any, where: str) -> tuple[int, ...]:
    """Return height, width and perhaps channels of an image as it came, before any conversion."""
    if isinstance(item, torch.Tensor):
        return (*item.shape[1:], item.shape[0]) if item.ndim == 3 else tuple(item.shape)
    if isinstance(item, np.ndarray):
        return item.shape
    if isinstance(item, Image.Image):
        return _guarded(_samples_of_users_pillow, item, where).pixels.shape
    content = open_image(item, where, Channels(0)).content
    return _guarded(lambda data: samples(data, lambda n: None), content, where).pixels.shape


def as_numpy(X: Any) -> Any:
    if not isinstance(X, torch.Tensor):
        return X
    X = X.detach().cpu()
    return (X.float() if X.is_floating_point() else X).numpy()  # NumPy has no bfloat16


def counts_of(channels: Channels) -> tuple[int, ...]:
    """Return how many channels an array may have: grey becomes RGB."""
    return (1, 3) if channels.number == 3 else (channels.number,)


def expected(channels: Channels) -> str:
    """Return the words for these numbers."""
    if channels.number == 3:
        return "1 or 3 channels"
    return f"{channels.number} channel{'s' * (channels.number > 1)}"


def _channels_last(tensor: torch.Tensor, where: str, channels: Channels) -> np.ndarray:
    """Return a tensor (channels, height, width) as an array (height, width, channels)."""
    shape, counts = tuple(tensor.shape), counts_of(channels)
    if len(shape) != 3:
        return as_numpy(tensor)
    if shape[0] in counts:
        return np.moveaxis(as_numpy(tensor), 0, -1)
    remedy = f"pass (height, width) or (channels, height, width) with {expected(channels)}"
    if channels.number != 3:
        remedy = f"the network takes (channels, height, width) with {expected(channels)}"
    if shape[2] in counts:
        remedy += "; image.permute(2, 0, 1) puts the channels first"
    elif channels.number == 3:
        remedy = without_others(shape[0], "image[{}]")
    raise ValueError(f"{where}: got a tensor of shape {shape}; {remedy}.")


def _from_array(array: np.ndarray, where: str, channels: Channels = RGB) -> np.ndarray:
    """Return (height, width[, channels]) as uint8 (height, width, channels), itself if it is that.

    Grey becomes RGB for a network of three channels.
    """
    shape, counts = array.shape, counts_of(channels)
    if array.ndim == 2:
        array = array[:, :, None]  # (height, width, 1)
    if array.ndim != 3 or array.shape[2] not in counts:
        remedy = f"pass (height, width) or (height, width, channels) with {expected(channels)}"
        if channels.number != 3:
            remedy = f"the network takes (height, width, channels) with {expected(channels)}"
        if array.ndim == 3 and array.shape[0] in counts:
            remedy += "; np.moveaxis(image, 0, -1) puts the channels last"
        elif array.ndim == 3 and channels.number == 3:
            remedy = without_others(array.shape[2], "image[..., {}]")
        raise ValueError(f"{where}: got an image of shape {shape}; {remedy}.")
    if array.size == 0:
        raise ValueError(f"{where}: the image has no pixels (shape {shape}); drop the row.")
    array = to_uint8(array, where, channels.value_range)
    is_grey = array.shape[2] == 1 and channels.number == 3
    return np.repeat(array, 3, axis=2) if is_grey else array


def to_uint8(array: np.ndarray, where: str, value_range: Any = None) -> np.ndarray:
    """Return pixels (..., channels) as uint8; errors call them `where`."""
    check_dtype(array.dtype, where, value_range)
    if value_range is not None:
        return _from_range(array, where, value_range)
    if array.dtype == np.uint8:
        return array
    low, high, top = float(array.min()), float(array.max()), white(array)
    if not math.isfinite(low + high):
        raise ValueError(f"{where}: the pixels hold NaN or infinity; mend them or drop the row.")
    slack = 1e-5 if top == 1 else 0  # rounding errors of whoever scaled the image
    if low < -slack or high > top + slack:
        remedy = f"divide by {'255, or by ' if high <= 255 else ''}the largest possible value"
        if low < 0:
            remedy = "undo the standardisation, the estimator applies the network's own"
        rule = "floats must lie in [0, 1]" if top == 1 else "integers must lie in 0..255"
        raise ValueError(f"{where}: pixels from {low:g} to {high:g}, but {rule}; {remedy}.")
    return quantise(array)


def _from_range(
    array: np.ndarray, where: str, value_range: tuple[tuple[float, float], ...]
) -> np.ndarray:
    """Return values (..., channels) as uint8: 0 and 255 at the ends of the range, and beyond."""
    low, high = np.array(value_range).T  # one for all channels, or for each
    values = array.astype(np.float32 if array.itemsize <= 2 else np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{where}: the pixels hold NaN or infinity; mend them or drop the row.")
    scaled = (values - low) / (high - low)
    if (outside := ((scaled < 0) | (scaled > 1)).mean()) > _MOST_OUTSIDE:
        warnings.warn(
            f"{where}: {outside:.0%} of the values lie outside of value_range={value_range} and "
            f"are clipped; they go from {values.min():g} to {values.max():g}. State the range of "
            "the data.",
            stacklevel=2,
        )
    return quantise(scaled)


def white(array: np.ndarray) -> int:
    """Return the value of white."""
    return 1 if array.dtype.kind in "fb" else 255


def quantise(array: np.ndarray) -> np.ndarray:
    if array.dtype == bool:
        return array * np.uint8(255)
    if array.dtype.kind == "f":
        return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    top = min(255, np.iinfo(array.dtype).max)  # NumPy 2.0 takes no limit that int8 can't hold
    return np.clip(array, 0, top).astype(np.uint8)


def check_dtype(dtype: np.dtype, where: str, value_range: Any = None) -> None:
    if dtype.kind == "c":
        raise ValueError(f"{where}: Complex data not supported; pass the real part or magnitude.")
    if dtype.kind not in "biuf":
        raise TypeError(f"{where}: pixels of dtype {dtype}; pass uint8, or floats in [0, 1].")
    if dtype == np.uint16 and value_range is None:
        remedy = (
            "divide by the largest value the camera gives (255, 4095 or 65535), or state it to "
        )
        remedy += "a sktransfer.ChannelAdapter: value_range=(0, 4095)"
        raise ValueError(f"{where}: the range of uint16 pixels is unknown; {remedy}.")
