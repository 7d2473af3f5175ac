"""Features of the patches of images: maps of some blocks on one grid, and a choice among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.random_projection import GaussianRandomProjection
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate

from sktransfer._engine.augmentation import Augmentation, Views
from sktransfer._engine.cut_network import as_map
from sktransfer._engine.frozen import Activations, FrozenBlocks
from sktransfer._engine.layers import map_positions
from sktransfer._engine.runner import Runner
from sktransfer.io import ImageSequence
from sktransfer.transforms import Preprocessing

_NEIGHBOURHOOD = 3  # places to a side over which a map is averaged
_CELL = 8  # pixels to a side of the finest grid
_CHUNK = 32  # images whose patches are made at once
_PROJECTED = 64  # features in which patches are chosen


class PatchFeatures:
    """What some blocks have at the places of an image, side by side on one grid.

    Each map is averaged over neighbourhoods of 3 × 3 places and brought to the size of the largest,
    but of no more than a place for 8 × 8 pixels.

    Parameters
    ----------
    runner : Runner
    preprocessing : Preprocessing
    layer : int, str or list of these
        See `map_positions`.

    Attributes
    ----------
    grid : tuple of (int, int)
        Rows and columns of patches.
    """

    def __init__(self, runner: Runner, preprocessing: Preprocessing, layer: Any) -> None:
        self.preprocessing = preprocessing
        self.frozen = FrozenBlocks(runner, preprocessing, "avg")
        self.positions = map_positions(runner, layer, preprocessing.size)
        sizes = [
            self._as_map(self._blank(position), position).shape[2:] for position in self.positions
        ]
        most = [max(1, -(-side // _CELL)) for side in preprocessing.size]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        self.grid = min(height, most[0]), min(width, most[1])

    def views(self, images: ImageSequence) -> Views:
        """Return images as they enter the network."""
        size = self.preprocessing.size
        return Views(images, self.preprocessing, Augmentation(None, None, size))

    def forms(self, n: int) -> list[tuple[tuple[int, ...], Any]]:
        """Return the shape and the dtype of the activations of `n` images, for each block."""
        frozen = self.frozen
        return [((n, *frozen.shape(p)), frozen.dtype(p)) for p in self.positions]

    def stream(self, **options: Any) -> Activations:
        """Return a pass over images to the activations, which the memory keeps for others, too."""
        return Activations(self.frozen, self.positions, self.positions, **options)

    def __call__(self, stored: Sequence[np.ndarray]) -> np.ndarray:
        """Return the features of patches (n, n_patches, n_features) of what a pass returns."""
        with torch.inference_mode():
            maps = [
                self._map(torch.from_numpy(x), p)
                for x, p in zip(stored, self.positions, strict=True)
            ]
            return torch.cat(maps, 1).flatten(2).transpose(1, 2).contiguous().cpu().numpy()

    def rows(self, stored: Sequence[np.ndarray], numbers: np.ndarray) -> np.ndarray:
        """Return the features of the patches with these numbers, which rise, of all images."""
        n_patches, parts = math.prod(self.grid), []
        for start in range(0, len(stored[0]), _CHUNK):
            patches = np.concatenate(self([x[start : start + _CHUNK] for x in stored]))
            first = start * n_patches
            asked = slice(*np.searchsorted(numbers, [first, first + len(patches)]))
            parts.append(patches[numbers[asked] - first])
        return np.concatenate(parts)

    def _map(self, stored: torch.Tensor, position: int) -> torch.Tensor:
        x = self._as_map(self.frozen.unpack(stored, position), position)  # (n, c, h, w)
        margin = _NEIGHBOURHOOD // 2
        x = avg_pool2d(x, _NEIGHBOURHOOD, 1, margin, count_include_pad=False)
        if x.shape[2] > self.grid[0] or x.shape[3] > self.grid[1]:
            return adaptive_avg_pool2d(x, self.grid)
        return interpolate(x, self.grid, mode="bilinear", align_corners=False)

    def _as_map(self, x: torch.Tensor, position: int) -> torch.Tensor:
        runner, size = self.frozen.runner, self.frozen.size
        return as_map(x, runner.layout(position, size), runner.n_prefix(position), size)

    def _blank(self, position: int) -> torch.Tensor:
        shape = self.frozen.runner.shape(position, self.frozen.size)
        return torch.empty(1, *shape, device="meta")


def coreset(
    rows: np.ndarray, n: int, chance: np.random.RandomState, tell: Callable[[], Any]
) -> np.ndarray:
    """Choose rows that leave none far from all of them: each is the farthest from those before.

    Parameters
    ----------
    rows : ndarray of shape (n_rows, n_features), float32
    n : int
        How many.
    chance : RandomState
    tell : callable
        It is called behind each choice.

    Returns
    -------
    ndarray of int, shape (n,)
    """
    if n >= len(rows):
        return np.arange(len(rows))
    if rows.shape[1] > _PROJECTED:
        projection = GaussianRandomProjection(_PROJECTED, random_state=chance)
        rows = projection.set_output(transform="default").fit_transform(rows)
    x = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
    lengths = x.square().sum(1)
    distances = torch.full_like(lengths, torch.inf)  # to the nearest that is chosen, squared
    numbers = [int(chance.randint(len(rows)))]
    for _ in range(n - 1):
        last = numbers[-1]
        torch.minimum(
            distances, torch.addmv(lengths + lengths[last], x, x[last], alpha=-2), out=distances
        )
        distances[last] = -torch.inf  # not once more, whatever the rounding
        numbers.append(int(distances.argmax()))
        tell()
    return np.array(numbers)
