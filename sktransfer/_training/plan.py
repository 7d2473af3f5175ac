"""What of the frozen blocks to keep, and what to recompute: a plan for one fit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sktransfer._engine.frozen import FrozenBlocks

# Orders of magnitude are enough: blocks and activations differ by factors.
_FLOPS = {"cpu": 5e10, "cuda": 5e12}  # a second
_DISK = 1e9  # bytes a second
_RAM = 1e10
_DECODING = 3e-3  # seconds an image
_LARGEST = 3  # uint8 images: the size of a result that is kept for other fits
_IN_RAM = 2**29  # bytes that a fit holds in memory; beyond, they lie in a temporary file
_DISK_SHARE = 0.1  # of what is free that the cut and the embedding may fill
_STEPS_SHARE = 0.02  # and steps on the way, which other fits may want
_LARGEST_SHARE = 2 / 3  # of the network's operations, in the trained blocks of a usual depth


@dataclass(frozen=True)
class Plan:
    """What a fit keeps.

    Attributes
    ----------
    cut : int
        Where the trained part of the network begins.
    start : int
        Where an epoch begins: at the activations of the cut, kept for the whole fit, or, if 0, at
        the images.
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


def usual_depths(flops: Sequence[int], n_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of blocks that a search tries, and the shares of the operations in them.

    They are 0, 1, 2, 4 and so on. Deeper ones than two thirds of the network share little frozen
    work, and cost as much as the whole.
    """
    counted = np.array(flops)
    depths = np.array([0, *(2**i for i in range(n_blocks.bit_length()))])
    shares = np.array([counted[n_blocks - depth :].sum() for depth in depths]) / counted.sum()
    shares[0] = 0.0
    kept = shares <= _LARGEST_SHARE
    kept[:2] = True
    return depths[kept], shares[kept]


def make_plan(
    frozen: FrozenBlocks,
    cut: int,
    n_images: int,
    n_views: int,
    n_epochs: int,
    with_embeddings: bool,
    memory_folder: str | None,
    temporary_folder: str,
    searches_depth: bool = False,
) -> Plan:
    """Weigh bytes against blocks.

    Parameters
    ----------
    frozen : FrozenBlocks
    cut : int
        In front of the first trained block.
    n_images, n_views, n_epochs : int
    with_embeddings : bool
        Whether all views run through the network anyway.
    memory_folder : str or None
        The folder of the memory; None without one.
    temporary_folder : str
        Where activations go that are too many for the RAM.
    searches_depth : bool, default=False
        Whether fits to other depths will follow: the memory then keeps the cuts of those that
        are usual, so that each image runs once for all of them.
    """
    n_rows = n_images * n_views
    is_weighed = memory_folder is not None or cut not in (0, frozen.embedding)
    # They are not counted for a plan that can only be one.
    compute = _seconds(frozen) if is_weighed else []
    keep: list[int] = []
    dropped: list[int] = []
    if memory_folder:
        free = _free(memory_folder)
        keep, dropped = _split(
            [p for p in sorted({cut, frozen.embedding}) if _is_worth_keeping(frozen, compute, p)],
            lambda p: frozen.n_bytes(p) * n_rows,
            free * _DISK_SHARE,
        )
        if searches_depth:
            steps = affordable_steps(frozen, _usual_cuts(frozen), n_rows, memory_folder)
            keep = sorted({*keep, *steps} - set(dropped))
    is_computed = with_embeddings or cut in keep
    counts = n_images, n_views, n_epochs
    keeps_cut = _keeps_cut(frozen, compute, cut, *counts, is_computed, temporary_folder)
    start = cut if keeps_cut else 0
    text = _describe(frozen, cut, start, keep, dropped, n_images, n_views)
    return Plan(cut, start, tuple(keep), text)


def _usual_cuts(frozen: FrozenBlocks) -> list[int]:
    """Return the cuts of the depths that a search tries, in order."""
    n_blocks = len(frozen.runner.block_names)
    depths, _ = usual_depths(frozen.flops(), n_blocks)
    return sorted({int(n_blocks - depth) for depth in depths[1:]} - {0})


def affordable_steps(
    frozen: FrozenBlocks, positions: Iterable[int], n_rows: int, memory_folder: str
) -> list[int]:
    """Return those of some positions on the way that a memory is to keep, as other fits may cut
    there: all whose activations are small, or the last of them if there is little room.
    """
    compute = _seconds(frozen)
    small = [
        position
        for position in positions
        if frozen.n_bytes(position) <= _LARGEST * frozen.n_bytes(0)
        and _is_worth_keeping(frozen, compute, position)
    ]
    budget = _free(memory_folder) * _STEPS_SHARE
    return _split(small, lambda p: frozen.n_bytes(p) * n_rows, budget)[0]


def _seconds(frozen: FrozenBlocks) -> list[float]:
    """Return about how long each block runs for one image."""
    rate = _FLOPS.get(frozen.runner.device.type, 5e11)
    return [flops / rate for flops in frozen.flops()]


def _is_worth_keeping(frozen: FrozenBlocks, compute: list[float], position: int) -> bool:
    """Tell whether a result is written and read faster than computed from the image."""
    if position == 0:
        return False
    seconds = _DECODING + sum(compute[:position])
    return position == frozen.embedding or 2 * frozen.n_bytes(position) / _DISK < seconds


def _split(
    positions: list[int], n_bytes: Callable[[int], int], budget: float
) -> tuple[list[int], list[int]]:
    """Return the last positions that fit into a budget, and the others."""
    for first in range(len(positions) + 1):
        if sum(map(n_bytes, positions[first:])) <= budget:
            return positions[first:], positions[:first]
    raise AssertionError("nothing takes no room")


def _keeps_cut(
    frozen: FrozenBlocks,
    compute: list[float],
    cut: int,
    n_images: int,
    n_views: int,
    n_epochs: int,
    is_computed: bool,
    folder: str,
) -> bool:
    """Tell whether epochs begin at kept activations: else they run the images up to the cut.

    `is_computed` says that the activations at the cut are computed, or kept, in any case.
    """
    if cut in (0, frozen.embedding):
        return True
    of_images = frozen.n_bytes(0) * n_images
    of_cut = frozen.n_bytes(cut) * n_images * n_views
    if of_cut > max(_IN_RAM, _free(folder) / 2):
        return False
    frozen_part = sum(compute[:cut])
    from_cut = frozen.n_bytes(cut) / (_RAM if in_ram(of_cut) else _DISK)
    from_images = frozen.n_bytes(0) / (_RAM if in_ram(of_images) else _DISK) + frozen_part
    if not in_ram(of_images):
        from_images += _DECODING
    once = 0.0 if is_computed else n_views * frozen_part
    return once + n_epochs * from_cut <= n_epochs * from_images


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
    dropped: list[int],
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
        parts = [f"every epoch starts from the images and recomputes up to {names[cut]}"]
    else:
        parts = ["every epoch starts from the images: nothing is frozen"]
    if keep:
        size = sum(map(frozen.n_bytes, keep)) * n_rows
        cuts = f"{len(keep)} cuts from {names[keep[0]]} on" if len(keep) > 1 else "the embedding"
        parts.append(f"the memory keeps {cuts}, {_amount(size)}")
    if dropped:
        lost = " and ".join(names[p] for p in dropped)
        amount = _amount(sum(map(frozen.n_bytes, dropped)) * n_rows)
        parts.append(f"{lost} would take {amount}, over a tenth of the free disk: recomputed")
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
