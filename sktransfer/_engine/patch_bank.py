"""A bank of the patches of sound images: chosen among them, and compared with those of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from sklearn.utils.random import sample_without_replacement
from torch.nn.functional import interpolate

from sktransfer._engine.patches import PatchFeatures, coreset
from sktransfer._neighbors import nearest

_MOST = 1_000  # patches of a bank whose size is a share
_CANDIDATES = 50_000  # patches among which those of a bank are chosen
_TRIED = 8  # of the nearest patches, among which one of another image is looked for


def choose_bank(
    features: PatchFeatures,
    i: int,
    stored: np.ndarray,
    owners: np.ndarray,
    size: float | int,
    chance: np.random.RandomState,
    tell: Callable[[float], Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Choose patches of images that a block has, and say of which image each is.

    Parameters
    ----------
    features : PatchFeatures
    i : int
        Which of its blocks.
    stored : ndarray
        What a pass over the images returned for this block.
    owners : ndarray of int, shape (n,)
        A number for each image, the same for those of equal content.
    size : int or float
        Patches, or a share of all.
    chance : RandomState
    tell : callable
        It is called with the share of the images for which each choice stands.

    Returns
    -------
    bank : ndarray of shape (n_patches, n_features), float32
    owners : ndarray of int, shape (n_patches,)
    """
    n_places = math.prod(features.grids[i])
    n = len(owners) * n_places
    drawn = np.sort(sample_without_replacement(n, min(n, _CANDIDATES), random_state=chance))
    rows = features.rows(i, stored, drawn)
    if isinstance(size, Integral):
        n_chosen = min(int(size), len(rows))
    else:
        n_chosen = max(2, min(_MOST, len(rows), round(size * n)))
    chosen = coreset(rows, n_chosen, chance, lambda: tell(len(owners) / n_chosen))
    return rows[chosen], owners[drawn[chosen] // n_places]


def distances_to(
    bank: np.ndarray, owners: np.ndarray, patches: np.ndarray, owners_of_patches: np.ndarray
) -> np.ndarray:
    """Return the distance of each patch of images (n, n_patches) to the nearest of a bank.

    An image is compared with the patches of the others, if it is one of those of the bank.

    Parameters
    ----------
    bank, owners : ndarray
        As of `choose_bank`.
    patches : ndarray of shape (n, n_patches, n_features)
    owners_of_patches : ndarray of int, shape (n,)
        The number of each image, -1 for a new one.
    """
    asked = np.concatenate(patches)
    asking = np.repeat(owners_of_patches, patches.shape[1])
    is_own = np.isin(owners_of_patches, owners).any()
    n_tried = min(_TRIED, len(bank)) if is_own else 1
    found, indices = nearest(bank, asked, n_tried, metric="euclidean")
    is_other = owners[indices] != asking[:, None]
    distances = found[np.arange(len(asked)), is_other.argmax(1)].astype(float)
    is_open = ~is_other.any(1)  # all that were nearest are the image's own
    for owner in np.unique(asking[is_open]):
        rows, others = is_open & (asking == owner), owners != owner
        known = bank[others] if others.any() else bank
        distances[rows] = nearest(known, asked[rows], 1, metric="euclidean")[0][:, 0]
    return distances.reshape(patches.shape[:2])


def usual(distances: np.ndarray) -> float:
    """Return the mean distance of sound patches, the unit of others; 1 if all of them are 0."""
    return float(distances.mean()) or 1.0


def one_map(
    distances: Sequence[np.ndarray], grids: Sequence[tuple[int, int]], units: np.ndarray
) -> np.ndarray:
    """Return the mean (n, rows, columns) of the distances in several blocks, on the finest grid.

    Blocks differ in how far apart their patches are; in units of the usual distance, all count
    alike.

    Parameters
    ----------
    distances : sequence of ndarray of shape (n, n_patches)
        For each block.
    grids : sequence of tuple of (int, int)
    units : ndarray of shape (n_blocks,)
    """
    finest = max(grids, key=math.prod)
    maps = [
        _resized((of_block / unit).reshape(-1, *grid), finest)
        for of_block, grid, unit in zip(distances, grids, units, strict=True)
    ]
    return np.mean(maps, axis=0)


def normality(maps: np.ndarray) -> np.ndarray:
    """Return a score for each map of distances (n, ...): minus that of the strangest patch."""
    return -maps.reshape(len(maps), -1).max(1).astype(float)  # a threshold lies between two


def over_pixels(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return maps of patches (n, rows, columns) as maps of pixels, interpolated and smoothed."""
    cell = [side / n / 2 for side, n in zip(size, maps.shape[1:], strict=True)]
    return gaussian_filter(_resized(maps, size), (0, *cell))


def _resized(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    x = torch.from_numpy(maps.astype(np.float32))[:, None]
    return interpolate(x, size, mode="bilinear", align_corners=False)[:, 0].numpy()
