"""What a network expects its images to look like: size, crop, mean and standard deviation."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

__all__ = ["Preprocessing"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MODES = ("center", "floor", "squash", "border")
# Pillow's filters, and how many pixels to each side of a point they read.
_INTERPOLATIONS = {
    "bilinear": (Image.Resampling.BILINEAR, 1),
    "bicubic": (Image.Resampling.BICUBIC, 2),
}
# An image whose sides are further apart than this from the proportions of `resize` would be huge
# before the crop (1 × 30,000 pixels take 6 GB). No photograph is: its pixels stay torch's.
_EXTREME = 16
_STRIP = 4  # rows that a tall one is scaled to at once: widened as a whole it would be huge, too


def __dir__() -> list[str]:
    return __all__


class Channels(NamedTuple):
    """What the pixels of an image are: how many channels, and from where to where their values go.

    `value_range` has one pair (low, high) for all channels, or one for each; it is None where the
    dtype says it: 0 to 255 of integers, 0 to 1 of floats.
    """

    number: int = 3
    value_range: tuple[tuple[float, float], ...] | None = None

    @property
    def are_rgb(self) -> bool:
        """Whether images are read as pictures that Pillow would show, and become RGB."""
        return self.number == 3 and self.value_range is None

    def in_8_bits(self) -> Channels:
        """Return the same channels, once their values are brought to 8 bits."""
        return Channels(self.number)


RGB = Channels()


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise an image as the pretrained weights were evaluated.

    Preprocessing belongs to the weights: two checkpoints of one architecture may differ in it.

    Parameters
    ----------
    size : tuple of (int, int), default=(224, 224)
        Height and width in pixels of what enters the network.
    resize : tuple of (int, int), default=(256, 256)
        Height and width in pixels to which an image is scaled before the crop, as `mode` says.
    mode : {"center", "floor", "squash", "border"}, default="center"
        `"center"` keeps the aspect ratio and covers `resize`; so does `"floor"`, which of an odd
        number of pixels crops one more at the bottom or right. `"squash"` scales each side to
        `resize`, `"border"` keeps the aspect ratio inside `resize` and pads with the mean
        colour. All then crop the central `size`.
    interpolation : {"bilinear", "bicubic"}, default="bilinear"
        Always with antialiasing.
    mean, std : tuple of floats, default=those of ImageNet
        Per channel (red, green, blue), for intensities in [0, 1]. Their number is that of the
        channels that the network takes; see :class:`sktransfer.ChannelAdapter`.
    value_range : tuple of (low, high), or one such pair for each channel, default=None
        The values that become the intensities 0 and 1; what lies outside is clipped. None: what
        the dtype says, 0 and 255 of integers, 0 and 1 of floats. Between them 256 steps are told
        apart.

    Examples
    --------
    >>> import torch
    >>> from sktransfer.transforms import Preprocessing
    >>> preprocessing = Preprocessing(size=(96, 96), resize=(110, 110))
    >>> image = torch.zeros(3, 300, 200, dtype=torch.uint8)
    >>> preprocessing.fit_size(image).shape
    torch.Size([3, 96, 96])
    """

    size: tuple[int, int] = (224, 224)
    resize: tuple[int, int] = (256, 256)
    mode: str = "center"
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    value_range: Any = None

    def __post_init__(self) -> None:
        # Lists and arrays are taken, but kept as tuples of plain numbers: these have a hash, and
        # one way to be printed, which `fingerprint` needs.
        for name in ("size", "resize"):
            object.__setattr__(self, name, _sides(getattr(self, name), name))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _per_channel(getattr(self, name), name))
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean is for {len(self.mean)} channels, and std for {len(self.std)}: pass a "
                "number for each channel in both."
            )
        if 0 in self.std:
            raise ValueError(f"std={self.std} holds 0, by which nothing can be divided.")
        pairs = range_pairs(self.value_range, len(self.mean))
        object.__setattr__(self, "value_range", pairs)
        for name, known in (("mode", _MODES), ("interpolation", _INTERPOLATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")

    @classmethod
    def from_torchvision(cls, preset: Any) -> Preprocessing:
        """Read torchvision's `ImageClassification` preset of a published checkpoint."""
        crop, resize = preset.crop_size[0], preset.resize_size[0]
        return cls(
            size=(crop, crop),
            resize=(resize, resize),
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Read timm's data configuration, a dict with `input_size`, `crop_pct` and so on."""
        size = tuple(config["input_size"][1:])
        crop_pct = config.get("crop_pct") or 0.875
        interpolation = config.get("interpolation", "bicubic")
        return cls(
            size=size,
            resize=tuple(math.floor(side / crop_pct) for side in size),
            mode=config.get("crop_mode") or "center",
            interpolation=interpolation if interpolation in ("bilinear", "bicubic") else "bicubic",
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Read the settings of an image processor of transformers, its `to_dict()`.

        Raises
        ------
        ValueError
            If it does what can't be said here, such as images of any proportions.
        """
        size = config.get("size") or {}
        size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
        crops = config.get("crop_size") if config.get("do_center_crop") else None
        crop = {"height": crops, "width": crops} if isinstance(crops, int) else crops
        crop = (crop["height"], crop["width"]) if crop else None
        shortest, crop_pct = size.get("shortest_edge"), config.get("crop_pct")
        if not config.get("do_resize", True) or not (shortest or {"height", "width"} <= set(size)):
            raise ValueError(f"images of one size come only of do_resize and a size, not {size}")
        if not shortest:
            resize, mode = (size["height"], size["width"]), "squash"
        elif crop_pct is None:
            resize, mode = (shortest, shortest), "floor"
        elif shortest < 384:  # ConvNeXt's
            resize, mode = (int(shortest / crop_pct),) * 2, "floor"
            crop = (shortest, shortest)
        else:
            resize, mode = (shortest, shortest), "squash"
        if crop is None and mode == "floor":
            raise ValueError(f"the shortest side is scaled to {shortest}, and nothing is cropped")
        resampling = {None: "bilinear", 2: "bilinear", 3: "bicubic"}.get(config.get("resample"))
        if resampling is None:
            raise ValueError(f"resample={config['resample']} is neither bilinear nor bicubic")
        scaled = config.get("do_normalize", True)
        return cls(
            size=crop or resize,
            resize=resize,
            mode=mode,
            interpolation=resampling,
            mean=config["image_mean"] if scaled else (0.0, 0.0, 0.0),
            std=config["image_std"] if scaled else (1.0, 1.0, 1.0),
        )

    def with_size(self, size: int | tuple[int, int] | None) -> Preprocessing:
        """Return the same preprocessing for another input size; the crop keeps its share."""
        if size is None:
            return self
        height, width = _sides(size, "image_size")
        resize = (
            max(height, round(self.resize[0] * height / self.size[0])),
            max(width, round(self.resize[1] * width / self.size[1])),
        )
        return replace(self, size=(height, width), resize=resize)

    def __repr__(self) -> str:
        # Without a range it is what it always was: keys of the memory are made of it.
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.value_range is None:
            del shown["value_range"]
        values = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return f"{type(self).__qualname__}({values})"

    @property
    def channels(self) -> Channels:
        """What the pixels are that the network takes."""
        return Channels(len(self.mean), self.value_range)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what enters the network."""
        return len(self.mean), *self.size

    @property
    def fingerprint(self) -> str:
        """Text that is equal for two preprocessings only if they do the same."""
        return repr(self)

    def fit_size(self, image: torch.Tensor) -> torch.Tensor:
        """Scale and crop one image; what the crop drops of a very long one is never scaled.

        Parameters
        ----------
        image : uint8 tensor of shape ([n,] channels, height, width)

        Returns
        -------
        uint8 tensor of shape ([n,] channels, height, width), those of `size`
        """
        height, width = image.shape[-2:]
        scaled = self.scaled_size(height, width)
        ratios = self.resize[0] / height, self.resize[1] / width
        if max(ratios) > _EXTREME * min(ratios):
            if image.ndim == 4:
                return torch.stack([self.fit_size(each) for each in image])
            image = _scale_center(image, scaled, self.size, self.interpolation, self.mode)
        else:
            image = _scale(image, scaled, self.interpolation)
        if self.mode == "border":
            missing = [
                max(0, want - have) for want, have in zip(self.size, image.shape[-2:], strict=True)
            ]
            top, left = missing[0] // 2, missing[1] // 2
            padding = [left, top, missing[1] - left, missing[0] - top]
            fill = [float(round(255 * value)) for value in self.mean]
            image = F.pad(image, padding, fill=fill)
        both = zip(image.shape[-2:], self.size, strict=True)
        rows, columns = (_center(*sides, self.mode) for sides in both)
        if (len(rows), len(columns)) != self.size:
            return F.center_crop(image, list(self.size))  # which pads
        return image[..., rows.start : rows.stop, columns.start : columns.stop]

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width to which an image is scaled before the crop."""
        target_height, target_width = self.resize
        if self.mode == "squash":
            return self.resize
        ratios = target_height / height, target_width / width
        if self.mode == "border":
            scale = min(ratios)
            return max(1, round(height * scale)), max(1, round(width * scale))
        # The side that decides is met exactly; the other is rounded down, as torchvision does.
        if ratios[0] >= ratios[1]:
            return target_height, max(target_width, int(target_height * width / height))
        return max(target_height, int(target_width * height / width)), target_width

    def normalize(self, batch: torch.Tensor) -> torch.Tensor:
        """Turn a uint8 batch (n, c, height, width) into the float32 input of the network."""
        if batch.device.type == "cuda" and type(batch) is torch.Tensor:  # a copy there waits
            mean, std = _constants_on(batch.device, self.mean, self.std)
        else:
            mean, std = _constants(batch.device, self.mean, self.std)
        return batch.to(torch.float32).div_(255).sub_(mean).div_(std)  # (n, c, h, w)


def _constants(device: torch.device, *values: tuple[float, ...]) -> list[torch.Tensor]:
    """Return numbers per channel as float32 tensors (1, c, 1, 1)."""
    tensors = (torch.tensor(each, dtype=torch.float32, device=device) for each in values)
    return [tensor.view(1, -1, 1, 1) for tensor in tensors]


@functools.lru_cache(maxsize=64)
def _constants_on(device: torch.device, *values: tuple[float, ...]) -> list[torch.Tensor]:
    """Return the same tensors at every call, for use in and out of inference mode."""
    with torch.inference_mode(False):
        return _constants(device, *values)


def _scale(image: torch.Tensor, scaled: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Scale uint8 images ([n,] c, height, width) as torchvision does, to the same pixels.

    By one operation of torch, where it has one for 8 bits: threads that decode wait for each other
    at each of them, as it leaves Python's lock and takes it again.
    """
    height, width = image.shape[-2:]
    if (height, width) == scaled:
        return image
    is_plain = type(image) is torch.Tensor and image.device.type == "cpu"
    if not is_plain or (interpolation == "bilinear" and not _scales_8_bits()):
        mode = InterpolationMode(interpolation)
        return F.resize(image, list(scaled), interpolation=mode, antialias=True)
    last = image.numpy().transpose((1, 2, 0) if image.ndim == 3 else (0, 2, 3, 1))
    last = last.reshape(-1, height, width, last.shape[-1])
    if (
        width == 1
    ):  # torch can't tell then which axis comes last in memory, and may take a wrong one
        last = np.ascontiguousarray(last)
    batch = torch.from_numpy(last.transpose(0, 3, 1, 2))
    batch = interpolate(batch, scaled, mode=interpolation, align_corners=False, antialias=True)
    return torch.from_numpy(batch.numpy().reshape(*image.shape[:-2], *scaled))


@functools.cache
def _scales_8_bits() -> bool:
    """Tell whether torch's bilinear scaling of uint8 is exact here, as torchvision holds it."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _scale_center(
    image: torch.Tensor,
    scaled: tuple[int, int],
    size: tuple[int, int],
    interpolation: str,
    mode: str,
) -> torch.Tensor:
    """Scale an image to `scaled`, but make only the central `size` of the result.

    The pixels are those of scaling the whole and cropping it, to rounding.
    """
    if len(image) != 3:  # Pillow knows no others
        what = scaled, size, interpolation, mode
        single = (channel.expand(3, -1, -1) for channel in image.split(1))
        return torch.cat([_scale_center(channel, *what)[:1] for channel in single])
    resampling, radius = _INTERPOLATIONS[interpolation]
    rows, columns = (_center(*sides, mode) for sides in zip(scaled, size, strict=True))
    across, left, right = _read_for(columns, image.shape[2], scaled[1], radius)
    strips = []
    n_rows = _STRIP if image.shape[1] > image.shape[2] else len(rows)
    for first in range(rows.start, rows.stop, n_rows):
        strip = range(first, min(first + n_rows, rows.stop))
        down, top, bottom = _read_for(strip, image.shape[1], scaled[0], radius)
        pixels = image[:, down, across].permute(1, 2, 0).numpy()  # (height, width, 3)
        # Unlike torch, Pillow scales what lies between two places inside of pixels. It may start
        # with the other axis; torch starts with this one.
        part = Image.fromarray(np.ascontiguousarray(pixels))
        wide = (len(columns), part.height)
        part = part.resize(wide, resampling, (left, 0, right, part.height))
        part = part.resize((len(columns), len(strip)), resampling, (0, top, part.width, bottom))
        strips.append(np.asarray(part))
    return torch.from_numpy(np.concatenate(strips)).permute(2, 0, 1)  # (3, height, width)


def _center(length: int, size: int, mode: str) -> range:
    """Return the places that torchvision's `center_crop`, or that of "floor", keeps of an axis."""
    half = (length - size) / 2
    start = max(0, int(half) if mode == "floor" else round(half))
    return range(start, start + min(length, size))


def _read_for(places: range, length: int, scaled: int, radius: int) -> tuple[slice, float, float]:
    """Return which pixels make these places of a scaled axis, and the span of them to scale."""
    scale = length / scaled
    low, high = places.start * scale, min(length, places.stop * scale)
    margin = radius * max(1, scale) + 1
    first, last = max(0, math.floor(low - margin)), min(length, math.ceil(high + margin))
    return slice(first, last), low - first, high - first


def _sides(value: Any, name: str) -> tuple[int, int]:
    """Check a height and width in pixels; one number stands for both."""
    value = value.tolist() if hasattr(value, "tolist") else value
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    valid = (isinstance(s, Integral) and not isinstance(s, bool) and int(s) > 0 for s in sides)
    if len(sides) != 2 or not all(valid):
        raise ValueError(f"{name} must be a positive int or (height, width), got {value!r}.")
    return int(sides[0]), int(sides[1])


def _per_channel(value: Any, name: str) -> tuple[float, ...]:
    """Check a number for each channel."""
    value = value.tolist() if hasattr(value, "tolist") else value
    are_numbers = isinstance(value, (tuple, list)) and all(map(_is_finite, value))
    if not are_numbers or not value:
        raise ValueError(
            f"{name} must have a number for each channel, 3 of them for red, green and blue, got "
            f"{value!r}."
        )
    return tuple(map(float, value))


def range_pairs(value: Any, n_channels: int | None) -> tuple[tuple[float, float], ...] | None:
    """Check a range of values, (low, high), or one for each channel; return pairs of floats."""
    if value is None:
        return None
    listed = value.tolist() if hasattr(value, "tolist") else value
    pairs = [listed] if _is_pair(listed) else listed
    if not isinstance(pairs, (list, tuple)) or not pairs or not all(map(_is_pair, pairs)):
        raise ValueError(
            "value_range must be the values of black and white, (low, high) with low < high, or "
            f"one such pair for each channel, got {value!r}."
        )
    if n_channels is not None and len(pairs) not in (1, n_channels):
        raise ValueError(
            f"value_range has {len(pairs)} pairs for {n_channels} channels: pass one pair for all "
            "of them, or one for each."
        )
    return tuple((float(low), float(high)) for low, high in pairs)


def _is_pair(value: Any) -> bool:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    return is_pair and all(map(_is_finite, value)) and value[0] < value[1]


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False
