"""What of the frozen blocks to keep, and what to recompute: a plan for one fit."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from sktransfer._frozen import FrozenBlocks

# Orders of magnitude are enough: blocks and activations differ by factors.
_FLOPS = {"cpu": 5e10, "cuda": 5e12}  # a second
_DISK = 1e9  # bytes a second
_DECODING = 3e-3  # seconds an image
_STEPS = 8  # results kept on the way through a network, about
_LARGEST = 3  # of them, in sizes of the uint8 image
_IN_RAM = 2**29  # bytes that a fit holds in memory; beyond, they lie in a temporary file
_DISK_SHARE = 0.1  # of what is free that one pass may fill


@dataclass(frozen=True)
class Plan:
    """What a fit keeps.

    Attributes
    ----------
    cut : int
        Where the trained part of the network begins.
    start : int
        Where an epoch begins: at activations kept for the whole fit, or, if 0, at the images.
    keep : tuple of int
        The positions that the memory keeps.
    text : str
        All this in one line.
    """

    cut: int
    start: int
    keep: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        return self.text

    def without_start(self) -> Plan:
        """Return the plan for a disk that proved full: epochs start from the images."""
        text = "every epoch starts from the images, as the disk is full"
        return Plan(self.cut, 0, self.keep, f"{text} ({self.text})")


def make_plan(
    frozen: FrozenBlocks,
    cut: int,
    n_images: int,
    n_views: int,
    n_epochs: int,
    memory_folder: str | None,
    temporary_folder: str,
) -> Plan:
    """Weigh bytes against blocks.

    Parameters
    ----------
    frozen : FrozenBlocks
    cut : int
        In front of the first trained block.
    n_images, n_views, n_epochs : int
    memory_folder : str or None
        The folder of the memory; None without one.
    temporary_folder : str
        Where activations go that are too many for the RAM.
    """
    n_rows = n_images * n_views
    rate = _FLOPS.get(frozen.runner.device.type, 5e11)
    compute = [flops / rate for flops in frozen.flops()]  # seconds an image
    keep = _worth_keeping(frozen, compute, cut) if memory_folder else []
    budget = _free(memory_folder) * _DISK_SHARE if memory_folder else 0.0
    dropped = 0
    while sum(map(frozen.n_bytes, keep)) * n_rows > budget:
        # In front they are the largest; the cut itself and the embedding go last.
        keep.remove(next((p for p in keep if p not in (cut, frozen.embedding)), keep[0]))
        dropped += 1
    start = _cheapest_start(frozen, compute, cut, n_images, n_views, n_epochs, temporary_folder)
    text = _describe(frozen, cut, start, keep, dropped, n_images, n_views)
    return Plan(cut, start, tuple(keep), text)


def _worth_keeping(frozen: FrozenBlocks, compute: list[float], cut: int) -> list[int]:
    """Return the cut, the embedding, and a few steps on the way for fits that cut elsewhere.

    A step is worth it if its result is small, and written and read faster than computed from the
    last one; and as fits rarely try all depths, only if much has been computed since then.
    """
    image = frozen.n_bytes(0)
    keep, last, seconds = {frozen.embedding}, 0, _DECODING
    for position in range(1, frozen.embedding):
        size = frozen.n_bytes(position)
        fast = 2 * size / _DISK < seconds + sum(compute[last:position])
        if position == cut and fast:
            keep.add(position)
        if (
            fast
            and size <= _LARGEST * image
            and sum(compute[last:position]) > sum(compute) / _STEPS
        ):
            keep.add(position)
            last, seconds = position, 0.0
    return sorted(keep)


def _cheapest_start(
    frozen: FrozenBlocks,
    compute: list[float],
    cut: int,
    n_images: int,
    n_views: int,
    n_epochs: int,
    folder: str,
) -> int:
    """Return where epochs begin: one that trains from `cut` reads there, or runs up to there."""

    def n_bytes(start: int) -> int:
        return frozen.n_bytes(start) * n_images * (n_views if start else 1)

    def seconds(start: int) -> float:
        each = frozen.n_bytes(start) / _DISK + sum(compute[start:cut])
        once = (_DECODING + sum(compute[:start])) * (n_views if start else 1)
        return once + n_epochs * each

    if cut == frozen.embedding:
        return cut
    room = max(_IN_RAM, _free(folder) / 2)
    return min((s for s in range(cut + 1) if s == 0 or n_bytes(s) <= room), key=seconds)


def _free(folder: str) -> int:
    """Return the free bytes of the disk on which a folder lies, or will lie."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def _describe(
    frozen: FrozenBlocks,
    cut: int,
    start: int,
    keep: list[int],
    dropped: int,
    n_images: int,
    n_views: int,
) -> str:
    names = ["the images", *frozen.runner.block_names, "the embedding"]
    n_rows = n_images * n_views
    if start == cut and cut:
        rows = f"{n_images} images" + (f" × {n_views} views" if n_views > 1 else "")
        size = frozen.n_bytes(cut) * n_rows
        parts = [f"every epoch starts from {names[cut]}, {_amount(size)} for {rows}"]
    elif cut:
        parts = [f"every epoch starts from {names[start]} and recomputes up to {names[cut]}"]
    else:
        parts = ["every epoch starts from the images: nothing is frozen"]
    if keep:
        size = sum(map(frozen.n_bytes, keep)) * n_rows
        parts.append(f"the memory keeps {', '.join(names[p] for p in keep)}: {_amount(size)}")
    if dropped:
        parts.append(f"{dropped} more would fill over a tenth of the free disk, so are recomputed")
    return "; ".join(parts)


def _amount(n_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.3g} {unit}"


def in_ram(n_bytes: int) -> bool:
    """Tell whether a fit holds so much in memory."""
    return n_bytes <= _IN_RAM
