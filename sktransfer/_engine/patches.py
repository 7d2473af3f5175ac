"""Features of the patches of images: maps of some blocks, and a choice among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.random_projection import GaussianRandomProjection
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

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
    """What some blocks have at the places of an image, each on a grid of its own.

    Each map is averaged over neighbourhoods of 3 × 3 places. A map that is finer than a place for
    8 × 8 pixels is averaged over such places as well.

    Parameters
    ----------
    runner : Runner
    preprocessing : Preprocessing
    layer : int, str or list of these
        See `map_positions`.

    Attributes
    ----------
    grids : list of tuple of (int, int)
        Rows and columns of the patches of each block.
    grid : tuple of (int, int)
        The finest of them.
    """

    def __init__(self, runner: Runner, preprocessing: Preprocessing, layer: Any) -> None:
        self.preprocessing = preprocessing
        self.frozen = FrozenBlocks(runner, preprocessing, "avg")
        self.positions = map_positions(runner, layer, preprocessing.size)
        rows, columns = (max(1, -(-side // _CELL)) for side in preprocessing.size)
        sizes = [self._as_map(self._blank(p), p).shape[2:] for p in self.positions]
        self.grids = [(min(height, rows), min(width, columns)) for height, width in sizes]
        self.grid = max(self.grids, key=math.prod)

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

    def __call__(self, stored: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the patches of each block (n, n_patches, n_features) of what a pass returns."""
        return [self.of_block(i, x) for i, x in enumerate(stored)]

    def of_block(self, i: int, stored: np.ndarray) -> np.ndarray:
        """Return the patches (n, n_patches, n_features) of one block."""
        with torch.inference_mode():
            x = self.frozen.unpack(torch.from_numpy(stored), self.positions[i])
            x = self._as_map(x, self.positions[i])  # (n, c, h, w)
            x = avg_pool2d(x, _NEIGHBOURHOOD, 1, _NEIGHBOURHOOD // 2, count_include_pad=False)
            x = adaptive_avg_pool2d(x, self.grids[i])
            return x.flatten(2).transpose(1, 2).contiguous().cpu().numpy()

    def rows(self, i: int, stored: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return the patches of a block with these numbers, which rise, of all images."""
        n_patches, parts = math.prod(self.grids[i]), []
        for start in range(0, len(stored), _CHUNK):
            patches = np.concatenate(self.of_block(i, stored[start : start + _CHUNK]))
            first = start * n_patches
            asked = slice(*np.searchsorted(numbers, [first, first + len(patches)]))
            parts.append(patches[numbers[asked] - first])
        return np.concatenate(parts)

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
