"""The maps of frozen networks, kept; and what follows them, trained by skorch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import skorch
import torch
from skorch.callbacks import GradientNormClipping
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from sktransfer._engine.embedding import Embedding
from sktransfer._engine.frozen import Activations, FrozenBlocks
from sktransfer._engine.runner import Runner, network_lock
from sktransfer._engine.stream import Stream
from sktransfer._threads import n_threads, renewed_in_forks
from sktransfer._torch_state import float32_by_default, trained_tensors
from sktransfer._training.data import allocate
from sktransfer._training.depthwise import FastDepthwise
from sktransfer._training.detectors import AsGiven, Given, first_label
from sktransfer._training.net import DrawingSteps, Progress, Schedule, make_net
from sktransfer.io import ImageSequence
from sktransfer.transforms import Preprocessing

_MAX_NORM = 10.0  # of the gradient: the first steps of a new predictor can be large


# ------------------------------------------------------------------------------ frozen parts


class Fitted:
    """Images brought to the input of a network, to be streamed."""

    def __init__(self, images: ImageSequence, preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing
        self.where = images.where

    def __len__(self) -> int:
        return len(self.images)

    def digest(self, i: int) -> bytes:
        """Return the digest of image `i`."""
        return self.images.digest(i)

    def load(self, i: int, digest: bytes | None = None) -> torch.Tensor:
        """Return image `i`, uint8 (3, height, width)."""
        return self.images.load(i, digest, self.preprocessing.fit_size)


class Source(Protocol):
    """What leads from images to the tensors that are kept for the training."""

    def empty(self, n: int) -> list[np.ndarray]:
        """Return arrays for the tensors of `n` images."""

    def fill(self, images: ImageSequence, outs: list[np.ndarray], **options: Any) -> None:
        """Fill arrays; `options` are those of a `Stream`."""

    def unpack(self, stored: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Turn a batch of stored tensors into float32 ones on the device."""


def _allocated(n: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
    if (found := allocate((n, *shape), dtype)) is None:
        raise MemoryError(
            f"The maps of {n} images, {tuple(shape)} each, fit neither into the memory nor onto "
            "the disk of temporary files. Pass a smaller image_size or fewer images."
        )
    return found


class BlockMaps:
    """Activations of a backbone at some of its cuts, in half precision."""

    def __init__(self, frozen: FrozenBlocks, positions: Sequence[int]) -> None:
        self.frozen, self.positions = frozen, list(positions)

    def empty(self, n: int) -> list[np.ndarray]:
        frozen = self.frozen
        return [_allocated(n, frozen.shape(p), frozen.dtype(p)) for p in self.positions]

    def fill(self, images: ImageSequence, outs: list[np.ndarray], **options: Any) -> None:
        stream = Activations(self.frozen, self.positions, self.positions, **options)
        _fill(stream, Fitted(images, self.frozen.preprocessing), outs)

    def unpack(self, stored: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(stored, self.positions, strict=True)
        return [self.frozen.unpack(x, position) for x, position in pairs]


class FlatMaps(nn.Module):
    """All maps of a detector's backbone, as one row an image."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return rows (n, c1 * h1 * w1 + ...)."""
        return torch.cat([x.flatten(1) for x in self.backbone(images).values()], 1)


class DetectorMaps:
    """The maps of a detector's frozen backbone."""

    def __init__(self, runner: Runner, preprocessing: Preprocessing) -> None:
        self.runner, self.preprocessing = runner, preprocessing
        network: Any = runner.network
        with torch.inference_mode():
            blank = torch.zeros(1, 3, *preprocessing.size, device=runner.device)
            self.shapes = [x.shape[1:] for x in network.backbone(blank).values()]

    def empty(self, n: int) -> list[np.ndarray]:
        return [_allocated(n, (sum(shape.numel() for shape in self.shapes),), np.float32)]

    def fill(self, images: ImageSequence, outs: list[np.ndarray], **options: Any) -> None:
        _fill(
            Embedding(self.runner, [None], "flatten", self.preprocessing, **options), images, outs
        )

    def unpack(self, stored: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        rows = stored[0].to(self.runner.device)
        parts = rows.split([shape.numel() for shape in self.shapes], 1)
        return [x.unflatten(1, shape) for x, shape in zip(parts, self.shapes, strict=True)]


class Pixels:
    """The images themselves, where nothing is frozen in front of what is trained."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self.preprocessing, self.device = preprocessing, device

    def empty(self, n: int) -> list[np.ndarray]:
        return [_allocated(n, (3, *self.preprocessing.size), np.uint8)]

    def fill(self, images: ImageSequence, outs: list[np.ndarray], **options: Any) -> None:
        fitted, progress = Fitted(images, self.preprocessing), options["progress"]
        with ThreadPoolExecutor(n_threads(options["n_jobs"])) as threads:
            for i, image in enumerate(threads.map(fitted.load, range(len(fitted)))):
                outs[0][i] = image.numpy()
                progress.update(1)

    def unpack(self, stored: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self.preprocessing.normalize(stored[0].to(self.device))]


def _fill(stream: Stream, images: Any, outs: list[np.ndarray]) -> None:
    try:
        stream._fill_outs(images, outs)
    except KeyboardInterrupt:
        kept = "lie in the memory" if stream.memory is not None else "are lost without a memory"
        raise KeyboardInterrupt(
            f"Interrupted while the frozen blocks ran: {stream.n_computed} of {len(images)} images "
            f"were computed and {kept}; call it again."
        ) from None


# ------------------------------------------------------------------------------ the trained part


class Examples(NamedTuple):
    """What is learnt from: stored tensors, and of each image boxes and labels in its input."""

    stored: list[np.ndarray]
    targets: list[dict[str, torch.Tensor]]

    def batch(self, rows: torch.Tensor) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Return the tensors and the targets of some rows."""
        numbers = rows.tolist()
        stored = [torch.from_numpy(np.ascontiguousarray(part[numbers])) for part in self.stored]
        return stored, [self.targets[i] for i in numbers]


_given_lock = renewed_in_forks(threading.RLock())  # of what a detector's backbone is given


class DetectorPart(nn.Module):
    """What follows the frozen maps: a detector whose backbone takes them.

    Parameters
    ----------
    detector : nn.Module
        One of torchvision's, with `requires_grad` set on what is trained.
    source : Pixels, BlockMaps or DetectorMaps
    preprocessing : Preprocessing
    block_names : list of str
        Of the backbone.
    n_frozen : int
        How many of these blocks are frozen.
    pretrained : list of nn.Module
        Where the layers are that are not new.
    moves_statistics : bool
        Whether batch-norms among the trained layers use, and update, statistics of the batch.
    fingerprint : str
        Of the pretrained network.
    """

    examples: Examples

    def __init__(
        self,
        detector: Any,
        source: Source,
        preprocessing: Preprocessing,
        block_names: Sequence[str],
        n_frozen: int,
        *,
        pretrained: Sequence[nn.Module],
        moves_statistics: bool,
        fingerprint: str,
    ) -> None:
        super().__init__()
        detector.transform = AsGiven()
        self.detector, self.moves_statistics = detector, moves_statistics
        self.source, self.preprocessing = source, preprocessing
        self.block_names, self.n_frozen = list(block_names), n_frozen
        self.fingerprint, self.progress = fingerprint, Progress()
        self.first_label = first_label(detector)
        self.device = next(detector.parameters()).device
        self._pretrained = {id(p) for part in pretrained for p in part.parameters()}

    def forward(self, stored: list[torch.Tensor], targets: Any = None) -> Any:
        """Return the losses by name while it trains, else boxes, labels and scores."""
        with network_lock.shared(), _given_lock, float32_by_default(), FastDepthwise():
            given = self.source.unpack(stored)
            backbone: Any = self.detector.backbone
            if hasattr(backbone, "positions") or isinstance(backbone, Given):
                backbone.given = given
                blank = given[0].new_empty(1).expand(3, *self.preprocessing.size)
                images = [blank] * len(given[0])
            else:
                images = list(given[0])
            try:
                return self.detector(images, targets)
            finally:
                backbone.__dict__.pop("given", None)

    def train(self, mode: bool = True) -> DetectorPart:
        """Set the mode; what is frozen stays in eval mode, so its statistics never move."""
        super().train(mode)
        for module in self.detector.modules():
            own = list(module.parameters(recurse=False))
            is_trained = any(parameter.requires_grad for parameter in own)
            if isinstance(module, _BatchNorm) and not (is_trained and self.moves_statistics):
                module.eval()
        for module in self.detector.backbone.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()  # with the dropout in it
        return self

    def parameter_groups(
        self, lr: float, backbone_lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Return the trained parameters, new ones first, with their learning rates."""
        trained = [p for p in self.parameters() if p.requires_grad]
        new = [p for p in trained if id(p) not in self._pretrained]
        old = [p for p in trained if id(p) in self._pretrained]
        pairs = [(new, lr), (old, backbone_lr)]
        return [
            {"params": some, "lr": rate, "weight_decay": weight_decay}
            for some, rate in pairs
            if some
        ]

    def limit(self, score: float, nms: float, most: int) -> None:
        """Say which objects are found: of what score and overlap, and how many."""
        owner: Any = getattr(self.detector, "roi_heads", self.detector)
        owner.score_thresh, owner.nms_thresh, owner.detections_per_img = score, nms, most

    def detect(self, stored: list[np.ndarray], batch_size: int) -> list[dict[str, np.ndarray]]:
        """Return boxes in the input, numbers of the categories from 0, and scores."""
        self.eval()
        found = []
        with torch.no_grad():
            for first in range(0, len(stored[0]), batch_size):
                batch = [torch.from_numpy(part[first : first + batch_size]) for part in stored]
                found += self(batch)
        return [
            {
                "boxes": image["boxes"].cpu().numpy(),
                "labels": image["labels"].cpu().numpy() - self.first_label,
                "scores": image["scores"].cpu().numpy(),
            }
            for image in found
        ]

    def trained_state(self) -> dict[str, np.ndarray]:
        """Return what cannot be rebuilt."""
        return {name: value.cpu().numpy().copy() for name, value in self._trained_values().items()}

    def _trained_values(self) -> dict[str, torch.Tensor]:
        trained = {name for name, p in self.detector.named_parameters() if p.requires_grad}
        if self.moves_statistics:
            trained |= {name for name, _ in self.detector.named_buffers()}
        state = self.detector.state_dict()
        return {name: value for name, value in state.items() if name in trained}

    def load_trained_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `trained_state` returned."""
        own = self.detector.state_dict()
        own.update(trained_tensors(state, self._trained_values()))
        self.detector.load_state_dict(own)


# ------------------------------------------------------------------------------ skorch


class _Rows(Dataset):
    """The numbers of images: what belongs to them lies in the module."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch = n, 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[int, int]:
        return i, i

    def __getitems__(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(numbers), torch.tensor(numbers)


class _Net(DrawingSteps, skorch.NeuralNet):
    """A skorch net whose module says itself what it loses."""

    def infer(self, x: torch.Tensor, **fit_params: Any) -> dict[str, torch.Tensor]:
        """Return the losses of a batch of rows by name."""
        return self.module_(*self.module_.examples.batch(x))

    def get_loss(
        self, y_pred: dict[str, torch.Tensor], y_true: Any, X: Any = None, training: bool = False
    ) -> torch.Tensor:
        """Return their sum."""
        return torch.stack(list(y_pred.values())).sum()


def rows_of(n: int) -> Dataset:
    """Return what a net is trained on: the rows of `Examples`."""
    return _Rows(n)


def make_detector_net(
    part: DetectorPart,
    groups: list[dict[str, Any]],
    *,
    max_epochs: int,
    batch_size: int,
    callbacks: Sequence[Any],
    schedule: Schedule | None,
    seed: int,
    progress: Progress,
    verbose: int,
) -> skorch.NeuralNet:
    """Compose the skorch net that trains a detector; its table is shown from `verbose=2` on."""
    return make_net(
        _Net,
        part,
        groups,
        seed=seed,
        progress=progress,
        schedule=schedule,
        callbacks=[("clipping", GradientNormClipping(_MAX_NORM)), *callbacks],
        verbose=verbose,
        max_epochs=max_epochs,
        batch_size=batch_size,
        criterion=nn.Identity,
    )
