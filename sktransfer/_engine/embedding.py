"""Images to rows of pooled activations, exactly as the network computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sktransfer._engine.runner import Runner
from sktransfer._engine.stream import Stream, Write
from sktransfer.io import ImageSequence
from sktransfer.transforms import Preprocessing


class Embedding(Stream):
    """One pass over images to the rows of a feature extractor.

    Parameters
    ----------
    runner : Runner
    positions : sequence of int or None
        Cuts whose pooled activations are concatenated.
    pooling : {"avg", "max", "token", "flatten"}
    preprocessing : Preprocessing
    **options
        See `Stream`.
    """

    _images: ImageSequence

    def __init__(
        self,
        runner: Runner,
        positions: Sequence[int | None],
        pooling: str,
        preprocessing: Preprocessing,
        **options: Any,
    ) -> None:
        keys = [runner.key(p, pooling, preprocessing) for p in positions]
        super().__init__(runner, preprocessing.size, keys, **options)
        self.positions, self.pooling, self.preprocessing = positions, pooling, preprocessing
        ends = np.cumsum([0, *(runner.width(p, pooling, preprocessing.size) for p in positions)])
        self.columns = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    def __call__(self, images: ImageSequence) -> np.ndarray:
        """Return the rows of `images`, float32 of shape (n, width)."""
        rows = np.empty((len(images), self.columns[-1].stop), np.float32)
        self._fill_outs(images, [rows[:, columns] for columns in self.columns])
        return rows

    def _load(self, row: int, digest: bytes | None) -> torch.Tensor:
        # The file is read again: those that wait to be decoded would fill the memory.
        return self._images.load(row, digest, self.preprocessing.fit_size)  # (3, *size)

    def _run(
        self, loaded: list[torch.Tensor], digests: list[bytes]
    ) -> tuple[list[Any], list[Write]]:
        where = (self.positions, self.pooling, self.preprocessing)
        return self.runner.rows(loaded, *where, self.step, is_alone=len(self._images) == 1), []
