"""How much two small pictures differ once one is turned, shifted and stretched onto the other."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

ORIENTATIONS = range(8)  # of a picture: mirrored or not, in four turns
_COARSE = 16  # pixels of the side of what is compared first
_ALIKE = 0.25  # difference of coarse pictures, above which no alignment is tried
_SIGMA = 1.0  # pixels; finer details differ with the quality of a JPEG file
_BORDER = 3  # pixels, which a crop may have cut off
_STEPS = 3  # of Gauss and Newton, for those that are near after the first
_NEAR = 0.06  # the share of variance that is then left, at most
_FURTHEST = 0.08  # of half a side: as far as a crop of a few per cent shifts or stretches
_PAIRS = 512  # at once


def turned(pictures: np.ndarray, orientation: int) -> np.ndarray:
    """Return square pictures (n, side, side) in one of the eight orientations."""
    pictures = pictures.transpose(0, 2, 1) if orientation & 4 else pictures
    pictures = pictures[:, ::-1] if orientation & 2 else pictures
    return pictures[:, :, ::-1] if orientation & 1 else pictures


def coarse(small: np.ndarray) -> np.ndarray:
    """Return coarse copies of square grey pictures: float32 (n, 16, 16), of mean 0 and length 1.

    Those of one grey level are zeros.
    """
    step = small.shape[1] // _COARSE
    parts = small.reshape(len(small), _COARSE, step, _COARSE, step)
    pictures = parts.mean(axis=(2, 4), dtype=np.float32)
    pictures -= pictures.mean(axis=(1, 2), keepdims=True)
    lengths = np.linalg.norm(pictures, axis=(1, 2), keepdims=True)
    return pictures / np.where(lengths > 1e-3, lengths, np.inf)


def differences(small: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return by how much the two pictures of each pair differ once they are aligned.

    The second is turned and mirrored as suits best. Then either is shifted and stretched a little,
    and its brightness and contrast are adapted, such that it fits the other: by the method of
    Lucas and Kanade (1981).

    Parameters
    ----------
    small : ndarray of shape (n, 64, 64), uint8
    pairs : ndarray of shape (n_pairs, 2)
        Rows.

    Returns
    -------
    ndarray of shape (n_pairs,), float32
        The variance of what is left, as a share of the variance of the picture, from 0 to 1. Of
        pictures that differ much, that of their coarse copies, which are not aligned.
    """
    pictures, found = coarse(small), np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _PAIRS):
        part = slice(start, start + _PAIRS)
        found[part] = _differences(small, pictures, pairs[part])
    return found


def _differences(small: np.ndarray, pictures: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    coarsely = _coarse_differences(pictures, pairs)  # (8, n_pairs)
    best = coarsely.argmin(axis=0)
    # As they are, too: what a crop leaves may coarsely fit better in a wrong orientation.
    found = _in_orientation(small, pairs, coarsely[0], np.zeros_like(best))
    others = np.flatnonzero(best > 0)
    of_others = _in_orientation(small, pairs[others], coarsely[:, others].min(0), best[others])
    found[others] = np.minimum(found[others], of_others)
    return np.where(np.isfinite(found), found, coarsely.min(axis=0))


def _in_orientation(
    small: np.ndarray, pairs: np.ndarray, coarsely: np.ndarray, orientations: np.ndarray
) -> np.ndarray:
    """Return the differences with the second of each pair turned; infinity if it is no use."""
    found = np.full(len(pairs), np.inf, np.float32)
    if len(rows := np.flatnonzero(coarsely < _ALIKE)):
        first, second = (_blurred(small[of]) for of in pairs[rows].T)
        second = _turned_each(second, orientations[rows])
        left = _aligned(first, second, 1)
        near = np.flatnonzero(left < _NEAR)
        one, other = first[near], second[near]
        left[near] = np.minimum(_aligned(one, other, _STEPS), _aligned(other, one, _STEPS))
        found[rows] = left
    return found


def _coarse_differences(pictures: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the differences in all orientations of the second of each pair, (8, n_pairs)."""
    first = pictures[pairs[:, 0]]
    found = [
        1 - (first * turned(pictures, way)[pairs[:, 1]]).sum(axis=(1, 2)) for way in ORIENTATIONS
    ]
    return np.stack(found).clip(0, 1)


def _turned_each(pictures: torch.Tensor, orientations: np.ndarray) -> torch.Tensor:
    arrays = pictures.numpy()
    each = [turned(arrays[i : i + 1], way)[0] for i, way in enumerate(orientations.tolist())]
    return torch.from_numpy(np.stack(each))


def _blurred(small: np.ndarray) -> torch.Tensor:
    size = 2 * round(2 * _SIGMA) + 1
    pictures = torch.from_numpy(small.astype(np.float32))
    return gaussian_blur(pictures[:, None], [size, size], [_SIGMA, _SIGMA])[:, 0]


def _aligned(moved: torch.Tensor, fixed: torch.Tensor, n_steps: int) -> np.ndarray:
    """Return the share of variance that is left at the best of some steps, (n,)."""
    n, side, _ = fixed.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    target = _inside(fixed)  # (n, pixels, 1)
    best = torch.ones(n)
    change = torch.zeros(n, 4, 1, 1)  # shift and stretch along x, then along y
    for step in range(n_steps + 1):
        places = [x + change[:, 0] + change[:, 1] * x, y + change[:, 2] + change[:, 3] * y]
        picture = F.grid_sample(
            moved[:, None], torch.stack(places, -1), padding_mode="border", align_corners=True
        )[:, 0]
        source = _inside(picture)
        best = torch.minimum(best, _left(source, target))
        if step < n_steps:
            along_y, along_x = torch.gradient(picture, spacing=2 / (side - 1), dim=(1, 2))
            slopes = [along_x, along_x * x, along_y, along_y * y]
            columns = torch.cat([source, *map(_inside, slopes)], dim=2)  # (n, pixels, 5)
            solved = _least_squares(columns, target)  # (n, 5)
            moves = solved[:, 1:] / solved[:, :1].clamp(min=0.3)
            change = (change + moves[:, :, None, None]).clamp(-_FURTHEST, _FURTHEST)
    return best.numpy()


def _inside(pictures: torch.Tensor) -> torch.Tensor:
    """Return the pixels off the border as columns of mean 0, (n, pixels, 1)."""
    inner = pictures[:, _BORDER:-_BORDER, _BORDER:-_BORDER].flatten(1)
    return (inner - inner.mean(1, keepdim=True))[:, :, None]


def _left(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the variance of a target that no contrast of the source explains, as a share."""
    product = (source * target).sum((1, 2))
    squares = (source.square().sum((1, 2)) * target.square().sum((1, 2))).clamp(min=1e-6)
    return (1 - product.clamp(min=0).square() / squares).clamp(0, 1)


def _least_squares(columns: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the coefficients of columns (n, pixels, k) that fit a target best, (n, k)."""
    products = columns.mT @ columns
    scale = products.diagonal(dim1=1, dim2=2)
    ridge = torch.diag_embed(1e-5 * scale + 1e-6)  # where a picture has no slopes
    return torch.linalg.solve(products + ridge, columns.mT @ target)[:, :, 0]
