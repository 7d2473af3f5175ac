"""What a detector starts from: maps of its frozen blocks, kept for each image, or the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sktransfer._engine.augmentation import Views
from sktransfer._engine.embedding import Embedding
from sktransfer._engine.frozen import Activations, FrozenBlocks
from sktransfer._engine.runner import Runner
from sktransfer._threads import n_threads
from sktransfer._torch_state import float32_by_default, network_lock
from sktransfer._training.data import allocate
from sktransfer._training.detector_backbones import MapBatch
from sktransfer._training.phases import saying_what_is_kept
from sktransfer.transforms import Preprocessing


class Source(Protocol):
    """What leads from images to the tensors that are kept for the training."""

    def empty(self, n: int) -> list[np.ndarray]:
        """Return arrays for the tensors of `n` images."""

    def fill(self, views: Views, outs: list[np.ndarray], **options: Any) -> None:
        """Fill arrays; `options` are those of a `Stream`."""

    def unpack(self, stored: Sequence[torch.Tensor]) -> MapBatch | torch.Tensor:
        """Turn a batch of stored tensors into what the detector takes, on its device."""


def _allocated(n: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
    if (array := allocate((n, *shape), dtype)) is None:
        raise MemoryError(
            f"The maps of {n} images, {tuple(shape)} each, fit neither into the memory nor onto "
            "the disk of temporary files. Pass a smaller image_size or fewer images."
        )
    return array


class BlockMaps:
    """Activations of a backbone at some of its cuts, in half precision."""

    def __init__(self, frozen: FrozenBlocks, positions: Sequence[int]) -> None:
        self.frozen, self.positions = frozen, list(positions)

    def empty(self, n: int) -> list[np.ndarray]:
        frozen = self.frozen
        return [_allocated(n, frozen.shape(p), frozen.dtype(p)) for p in self.positions]

    def fill(self, views: Views, outs: list[np.ndarray], **options: Any) -> None:
        stream = Activations(self.frozen, self.positions, self.positions, **options)
        with saying_what_is_kept(stream, len(views)):
            stream(views, outs)

    def unpack(self, stored: Sequence[torch.Tensor]) -> MapBatch:
        pairs = zip(stored, self.positions, strict=True)
        maps = [self.frozen.unpack(x, position) for x, position in pairs]
        return MapBatch(maps, self.frozen.size)


class FlatMaps(nn.Module):
    """All maps of a detector's backbone, as one row an image."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return rows (n, c1 * h1 * w1 + ...)."""
        return torch.cat([x.flatten(1) for x in self.backbone(images).values()], 1)


class _MapRows(Embedding):
    """One pass over views of images to their rows of `FlatMaps`."""

    def fill(self, views: Views, outs: list[np.ndarray]) -> None:
        self._fill_outs(views, outs)

    def _load(self, row: int, digest: bytes | None) -> torch.Tensor:
        return self._images.load(row, digest)  # a view has the network's size already


class DetectorMaps:
    """The maps of a detector's frozen backbone, which the runner has as `FlatMaps`."""

    def __init__(self, runner: Runner, preprocessing: Preprocessing) -> None:
        self.runner, self.preprocessing = runner, preprocessing
        network: Any = runner.network
        with network_lock.shared(), torch.inference_mode(), float32_by_default():
            blank = torch.zeros(1, 3, *preprocessing.size, device=runner.device)
            self.shapes = [x.shape[1:] for x in network.backbone(blank).values()]

    def empty(self, n: int) -> list[np.ndarray]:
        return [_allocated(n, (sum(shape.numel() for shape in self.shapes),), np.float32)]

    def fill(self, views: Views, outs: list[np.ndarray], **options: Any) -> None:
        stream = _MapRows(self.runner, [None], "flatten", self.preprocessing, **options)
        with saying_what_is_kept(stream, len(views)):
            stream.fill(views, outs)

    def unpack(self, stored: Sequence[torch.Tensor]) -> MapBatch:
        rows = stored[0].to(self.runner.device)
        parts = rows.split([shape.numel() for shape in self.shapes], 1)
        maps = [x.unflatten(1, shape) for x, shape in zip(parts, self.shapes, strict=True)]
        return MapBatch(maps, self.preprocessing.size)


class Pixels:
    """The images themselves, where nothing is frozen in front of what is trained."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self.preprocessing, self.device = preprocessing, device

    def empty(self, n: int) -> list[np.ndarray]:
        return [_allocated(n, (3, *self.preprocessing.size), np.uint8)]

    def fill(self, views: Views, outs: list[np.ndarray], **options: Any) -> None:
        with ThreadPoolExecutor(n_threads(options["n_jobs"])) as threads:
            for i, image in enumerate(threads.map(views.load, range(len(views)))):
                outs[0][i] = image.numpy()
                options["progress"].update(1)

    def unpack(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.preprocessing.normalize(stored[0].to(self.device))
