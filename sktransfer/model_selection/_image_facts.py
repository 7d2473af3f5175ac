"""What one look at the pixels of each image says, kept in the memory: size, light, sharpness.

A warm call decodes nothing but damaged files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from sktransfer._bars import tqdm
from sktransfer._memory.memory import ImageMemory
from sktransfer._threads import n_threads
from sktransfer.io import ImageSequence

SIDE = 64  # pixels of the small copies
_VERSION = 1  # another one where what is kept is computed otherwise
_KEY = f"facts of images, {_VERSION}"
_TEXT = "the images themselves\t\tsize, light, sharpness\tand a small copy"
_CHUNK = 256  # images that are looked up and written at once
_MEASURED = 256  # pixels of the longer side at which light and sharpness are measured
_FACTS = ("height", "width", "darkest", "dark", "bright", "brightest", "sharpness")
_SHARES = (0.01, 0.05, 0.95, 0.99)  # of the pixels that are no brighter
_N_NUMBERS = 4 * len(_FACTS)  # bytes of float32
_N_BYTES = _N_NUMBERS + SIDE * SIDE


@dataclass
class ImageFacts:
    """What is known of images, a row for each.

    Attributes
    ----------
    digests : list of bytes
        Of the content; empty for a file that can't be read.
    rows : ndarray of shape (n, 4124), uint8
        The numbers and the small copy of each image, as the memory keeps them.
    damage : dict of int to str
        Rows of images that can't be decoded, or not whole, and why. Nothing else is known of them.
    key : str
        Under which the memory keeps them.
    """

    digests: list[bytes]
    rows: np.ndarray
    damage: dict[int, str] = field(default_factory=dict)
    key: str = _KEY

    def note(self, row: int, digest: bytes | None, reason: str) -> None:
        """Note the digest of an image, or why it is not sound."""
        self.digests[row] = digest or b""
        if reason:
            self.damage[row] = reason

    @property
    def small(self) -> np.ndarray:
        """Grey copies, whatever the shape of an image: uint8 (n, 64, 64)."""
        return self.rows[:, _N_NUMBERS:].reshape(-1, SIDE, SIDE)

    def column(self, name: str) -> np.ndarray:
        """Return one fact of each image, float32.

        `height` and `width` in pixels; the brightness, from 0 to 255, that 1 % (`darkest`), 5 %
        (`dark`), 95 % (`bright`) and 99 % (`brightest`) of the pixels do not exceed; `sharpness`,
        how much of the contrast lies between neighbours; NaN where there is none.
        """
        numbers = np.ascontiguousarray(self.rows[:, :_N_NUMBERS]).view(np.float32)
        return numbers[:, _FACTS.index(name)]

    def of(self, rows: np.ndarray) -> ImageFacts:
        """Return the facts of some images, of which none is damaged."""
        return ImageFacts([self.digests[row] for row in rows.tolist()], self.rows[rows])


def look_at(
    images: ImageSequence,
    memory: ImageMemory | None = None,
    n_jobs: int | None = None,
    verbose: bool | int = False,
) -> ImageFacts:
    """Look at each image once, or read from the memory what was seen before."""
    n = len(images)
    rows = np.zeros((n, _N_BYTES), np.uint8)
    facts = ImageFacts([b""] * n, rows, key=_key_of(images))
    threads = ThreadPoolExecutor(n_threads(n_jobs))
    try:
        with tqdm(total=n, desc="looking", unit="image", disable=not verbose) as bar:
            for start in range(0, n, _CHUNK):
                chunk = range(start, min(start + _CHUNK, n))
                _look_at_some(images, chunk, facts, memory, threads)
                bar.update(len(chunk))
    finally:
        threads.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the other files
    return facts


def _look_at_some(
    images: ImageSequence,
    chunk: Sequence[int],
    facts: ImageFacts,
    memory: ImageMemory | None,
    threads: ThreadPoolExecutor,
) -> None:
    """Fill some rows of the facts; keep in the memory what had to be decoded for it."""
    digested = threads.map(lambda row: _or_why_not(images, row, images.digest), chunk)
    for row, (digest, reason) in zip(chunk, digested, strict=True):
        facts.note(row, digest, reason)
    readable = [row for row in chunk if row not in facts.damage]
    missing = _not_in_memory(facts, readable, memory)
    looked = threads.map(lambda row: _or_why_not(images, row, partial(_look, images)), missing)
    for row, (seen, reason) in zip(missing, looked, strict=True):
        packed, damage = seen or (None, "")
        facts.note(row, facts.digests[row], reason or damage)
        if row not in facts.damage:
            facts.rows[row] = packed
    kept = [row for row in missing if row not in facts.damage]
    if memory is not None and kept:
        memory.write(facts.key, [facts.digests[row] for row in kept], facts.rows[kept], _TEXT)


def _or_why_not(images: ImageSequence, row: int, get: Callable[[int], Any]) -> tuple[Any, str]:
    """Return what `get` says of a row or, if it can't be read, the reason."""
    try:
        return get(row), ""
    except ValueError as error:
        return None, str(error).removeprefix(f"{images.where(row)}: ")


def _not_in_memory(facts: ImageFacts, rows: Sequence[int], memory: ImageMemory | None) -> list[int]:
    """Fill the rows that the memory has; return the others."""
    if memory is None or not rows:
        return list(rows)
    found = np.zeros((len(rows), _N_BYTES), np.uint8)
    hits = memory.read(facts.key, [facts.digests[row] for row in rows], found)
    facts.rows[np.array(rows)[hits]] = found[hits]
    return [row for row, hit in zip(rows, hits, strict=True) if not hit]


def _look(images: ImageSequence, row: int) -> tuple[np.ndarray, str]:
    return images.examine(row, _packed)


def _key_of(images: ImageSequence) -> str:
    """Return what keeps facts apart if one file may be read in several ways."""
    return _KEY if images.channels.are_rgb else f"{_KEY}, {images.channels}"


def _packed(pixels: torch.Tensor) -> np.ndarray:
    """Return the facts of an image, uint8 (c, height, width), and its small copy, as bytes.

    Of other channels than red, green and blue, the brightness is their mean.
    """
    height, width = pixels.shape[1:]
    scale = min(1.0, _MEASURED / max(height, width))
    size = [max(1, round(scale * side)) for side in (height, width)]
    resized = F.resize(pixels, size, antialias=True)
    is_rgb = len(resized) == 3
    grey = F.rgb_to_grayscale(resized) if is_rgb else resized.float().mean(0, keepdim=True).byte()
    levels = np.bincount(grey.numpy().ravel(), minlength=256).cumsum() / grey.numel()
    light = [np.searchsorted(levels, share) for share in _SHARES]
    numbers = np.array([height, width, *light, _sharpness(grey.float())], np.float32)
    small = F.resize(grey, [SIDE, SIDE], antialias=True).numpy()
    return np.concatenate([numbers.view(np.uint8), small.ravel()])


def _sharpness(grey: torch.Tensor) -> float:
    """Return the contrast between neighbours as a share of the whole contrast."""
    if min(grey.shape[1:]) < 3 or not (contrast := float(grey.std())):
        return np.nan
    middle = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float((middle - around / 4).square().mean().sqrt()) / contrast
