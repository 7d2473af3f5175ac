"""What a detector starts from: maps of its frozen blocks, kept for each image, or the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sktransfer._engine.augmentation import Views
from sktransfer._engine.embedding import OutputsPass
from sktransfer._engine.frozen import Activations, FrozenBlocks
from sktransfer._engine.program import Output
from sktransfer._engine.runner import Runner
from sktransfer._threads import n_threads
from sktransfer._torch_state import float32_by_default, network_lock
from sktransfer._training.data import allocate
from sktransfer._training.detector_backbones import MapBatch
from sktransfer._training.phases import saying_what_is_kept
from sktransfer._training.plan import affordable_steps
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
            f"What {n} images start from, {tuple(shape)} each, fits neither into the memory nor "
            "onto the disk of temporary files. Pass a smaller image_size or fewer images."
        )
    return array


class BlockMaps:
    """Activations of a backbone at some of its cuts, in half precision.

    Parameters
    ----------
    frozen : FrozenBlocks
    positions : sequence of int
        Of the cuts, in order.
    others : sequence of int
        Positions of cuts that other depths want: on the way, the memory keeps what is small there.
    """

    def __init__(
        self, frozen: FrozenBlocks, positions: Sequence[int], others: Sequence[int]
    ) -> None:
        self.frozen, self.positions = frozen, list(positions)
        self.others = sorted({p for p in others if 0 < p < self.positions[-1]} - {*positions})

    def empty(self, n: int) -> list[np.ndarray]:
        frozen = self.frozen
        return [_allocated(n, frozen.shape(p), frozen.dtype(p)) for p in self.positions]

    def fill(self, views: Views, outs: list[np.ndarray], **options: Any) -> None:
        keep = self.positions
        if (memory := options["memory"]) is not None:
            keep = [*keep, *affordable_steps(self.frozen, self.others, len(views), memory.folder)]
        stream = Activations(self.frozen, self.positions, keep, **options)
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
        return torch.cat([x.flatten(1) for x in self.maps(images)], 1)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps, as those of a detector do: of a single one, it may be no dict."""
        maps = self.backbone(images)
        return [maps] if isinstance(maps, torch.Tensor) else list(maps.values())


class DetectorMaps:
    """The maps of a detector's frozen backbone, which the runner has as `FlatMaps`."""

    def __init__(self, runner: Runner, preprocessing: Preprocessing) -> None:
        self.runner, self.preprocessing = runner, preprocessing
        network: Any = runner.network
        with network_lock.shared(), torch.inference_mode(), float32_by_default():
            blank = torch.zeros(1, *preprocessing.shape, device=runner.device)
            self.shapes = [x.shape[1:] for x in network.maps(blank)]

    def empty(self, n: int) -> list[np.ndarray]:
        return [_allocated(n, (sum(shape.numel() for shape in self.shapes),), np.float32)]

    def fill(self, views: Views, outs: list[np.ndarray], **options: Any) -> None:
        rows = [Output(None, "flatten")]
        stream = OutputsPass(self.runner, self.preprocessing, rows, rows, **options)
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
        return [_allocated(n, self.preprocessing.shape, np.uint8)]

    def fill(self, views: Views, outs: list[np.ndarray], **options: Any) -> None:
        with ThreadPoolExecutor(n_threads(options["n_jobs"])) as threads:
            for i, image in enumerate(threads.map(views.load, range(len(views)))):
                outs[0][i] = image.numpy()
                options["progress"].update(1)

    def unpack(self, stored: Sequence[torch.Tensor]) -> MapBatch | torch.Tensor:
        return self.preprocessing.normalize(stored[0].to(self.device))


class RecomputedMaps(Pixels):
    """The images themselves, which run up to the cuts in each step, as there is no room for maps.

    Parameters
    ----------
    maps : BlockMaps
        That do not fit.
    """

    def __init__(self, maps: BlockMaps) -> None:
        super().__init__(maps.frozen.preprocessing, maps.frozen.runner.device)
        self.frozen, self.positions = maps.frozen, maps.positions
        self.step = self.frozen.runner.step("auto", self.frozen.size)
        # Made before any step: while one runs, nobody may ask for a program.
        self.program = self.frozen.program(*self.positions)

    def unpack(self, stored: Sequence[torch.Tensor]) -> MapBatch:
        images = stored[0].to(self.device)
        maps = self.frozen.activations(self.program, images, self.positions, self.step)
        return MapBatch(maps, self.frozen.size)
