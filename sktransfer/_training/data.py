"""Batches to train on: kept activations, or images in other views."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from sktransfer._engine.augmentation import Views
from sktransfer._training.plan import in_ram

_PIECE = 1 << 24  # bytes of a file that are written at once


class TrainingData(Dataset):
    """Batches of stored activations, or of images, with targets and weights.

    Parameters
    ----------
    views : Views
    stored : ndarray or None
        A row for each view; None to take the images themselves.
    numbers : ndarray of int, shape (n,)
        The images that take part.
    targets : ndarray of shape (n_images, ...)
    weights : ndarray of shape (n_images,) or None
    passed : ndarray or None
        A row for each view, of the layers in front of the cut; None if the head sees none.
    seed : int
    augments : {"turns", "draws", "no"}
        Whether an image shows its fixed views in turns, a fresh one every time, or only itself.
    n_threads : int
        That decode images.
    """

    def __init__(
        self,
        views: Views,
        stored: np.ndarray | None,
        numbers: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray | None,
        *,
        passed: np.ndarray | None = None,
        seed: int = 0,
        augments: str = "no",
        n_threads: int = 1,
    ) -> None:
        self.views, self.stored, self.numbers = views, stored, numbers
        self.passed = passed
        self.targets = torch.from_numpy(targets)
        self.weights: torch.Tensor | None = None
        if weights is not None:  # losses of weighted and of plain batches are of one size
            self.weights = torch.from_numpy((weights / weights[numbers].mean()).astype(np.float32))
        self.seed, self.augments = seed, augments
        self.epoch = 0  # an image shows another view in each
        self._turn = np.random.RandomState(seed % 2**32).permutation(len(targets))
        self._images: np.ndarray | None = None
        self._threads = n_threads
        if stored is None:
            shape = (len(views.images), *views.preprocessing.shape)
            self._images = np.empty(shape, np.uint8) if in_ram(math.prod(shape)) else None
            self._is_loaded = np.zeros(len(views.images), bool)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, numbers: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return a batch (X, y); X has what the trained part takes."""
        rows = self.numbers[numbers]
        stored = self.stored
        X = {"stored": self._draw(rows) if stored is None else self._read(stored, rows)}
        if self.passed is not None:
            X["passed"] = self._read(self.passed, rows)
        if self.weights is not None:
            X["weights"] = self.weights[rows]
        return X, self.targets[rows]

    def __getitem__(self, number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        X, y = self.__getitems__([number])
        return {name: values[0] for name, values in X.items()}, y[0]

    def _read(self, stored: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(stored[rows * self.views.n_views + self._view_of(rows)])

    def _view_of(self, rows: np.ndarray) -> np.ndarray:
        if self.augments != "turns":
            return np.zeros_like(rows)
        return (self.epoch + self._turn[rows]) % self.views.n_views

    def _draw(self, rows: np.ndarray) -> torch.Tensor:
        with ThreadPoolExecutor(self._threads) as threads:
            numbers = self._view_of(rows)
            return torch.stack(list(threads.map(self._image, rows.tolist(), numbers.tolist())))

    def _image(self, row: int, number: int) -> torch.Tensor:
        if self.augments == "draws":
            return self._drawn(row, f"{self.seed} {self.epoch} {row}")
        return self.views.show(self._fitted(row), row, number)

    def _drawn(self, row: int, chance: str) -> torch.Tensor:
        """Return a fresh view of an image."""
        seed = xxhash.xxh3_64_intdigest(chance.encode())
        return self.views.augmentation.draw(self._fitted(row), seed)

    def _fitted(self, row: int) -> torch.Tensor:
        """Return an image at the size of the preprocessing, from memory if there is room."""
        if self._images is not None and self._is_loaded[row]:
            return torch.from_numpy(self._images[row])
        fitted = self.views.images.load(row, None, self.views.preprocessing.fit_size)
        if self._images is not None:
            self._images[row] = fitted.numpy()
            self._is_loaded[row] = True
        return fitted


def _reserve(file: IO[bytes], n_bytes: int) -> None:
    """Take the space on disk now: a file with holes would kill the process on a full disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
        return
    zeros, n_written = bytes(_PIECE), 0  # macOS and Windows
    while n_written < n_bytes:
        n_written += file.write(zeros[: n_bytes - n_written])


def allocate(shape: Sequence[int], dtype: Any) -> np.ndarray | None:
    """Return an array in memory or, if large, in a temporary file; None if the disk is full."""
    if in_ram(math.prod(shape) * np.dtype(dtype).itemsize):
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(buffering=0) as file:  # a buffer would be written at its end
        try:
            _reserve(file, math.prod(shape) * np.dtype(dtype).itemsize)
        except OSError:
            return None
        return np.memmap(file, dtype, "r+", shape=tuple(shape))
