"""The fit of a detector, its batches and its net; and what it finds, in pixels of the images."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import skorch
import torch
import xxhash
from skorch.callbacks import GradientNormClipping
from torch import nn

from sktransfer._bars import tqdm
from sktransfer._engine.augmentation import Augmentation, Views
from sktransfer._engine.box_views import BoxAugmentation, BoxViews, Target
from sktransfer._engine.device import is_out_of_memory
from sktransfer._memory.memory import check_memory
from sktransfer._threads import n_threads
from sktransfer._torch_state import Chance, ready_to_train
from sktransfer._training.data import TrainingData
from sktransfer._training.detector_maps import BlockMaps, Pixels, RecomputedMaps
from sktransfer._training.detector_part import DetectorPart
from sktransfer._training.net import (
    DrawingSteps,
    Interrupted,
    Progress,
    Schedule,
    continue_net,
    make_net,
    parameter_groups,
    train,
)
from sktransfer._training.settings import rate_of_head
from sktransfer.io import ImageSequence
from sktransfer.io._boxes import Objects, image_sizes, letterbox

_BATCH = 8  # images of a training step
_CHUNK = 64  # images that a prediction holds at once, or fewer:
_CHUNK_BYTES = 2**29  # maps of large images would go through the disk
_MAX_NORM = 10.0  # of the gradient: the first steps of a new predictor can be large


@dataclass(kw_only=True)
class DetectorSettings:
    """The parameters of a detector that a training or a prediction takes."""

    max_epochs: int
    batch_size: int | str
    lr: float
    head_lr: float | None
    weight_decay: float
    augment: Any
    n_views: int | None
    score_threshold: float
    nms_threshold: float
    max_detections: int
    callbacks: Sequence[Any] | None
    memory: Any
    n_jobs: int | None
    verbose: int

    @property
    def images_a_step(self) -> int:
        """Return the images of a training step."""
        return _BATCH if isinstance(self.batch_size, str) else self.batch_size


class DetectorTrainer:
    """Trains a detector; finds objects with it.

    Parameters
    ----------
    part : DetectorPart
    settings : DetectorSettings

    Attributes
    ----------
    net : skorch.NeuralNet or None
        Of the last training; its module is `part`.
    history : list of dict
        Of each epoch: `epoch`, `train_loss`, `dur` in seconds.
    """

    def __init__(self, part: DetectorPart, settings: DetectorSettings) -> None:
        self.part, self.settings = part, settings
        self.net: Any = None
        self.history: list[dict[str, Any]] = []
        self._is_at_constant_rate = False

    # ------------------------------------------------------------------------ training

    def train(
        self, images: ImageSequence, objects: Sequence[Objects], numbers: Any, sizes: Any, seed: int
    ) -> None:
        """Run all epochs, at a learning rate that rises and falls.

        Parameters
        ----------
        images : ImageSequence
        objects : sequence of Objects
            Of each image, in its pixels.
        numbers : sequence of ndarray
            Of the categories of the objects, from 0.
        sizes : ndarray of shape (n, 2)
            Height and width of the images.
        seed : int
        """
        settings = self.settings
        n_steps = settings.max_epochs * math.ceil(len(images) / settings.images_a_step)
        targets = self._targets(objects, numbers, sizes)
        self._run(images, targets, seed, settings.max_epochs, Schedule(n_steps))

    def train_part(
        self, images: ImageSequence, objects: Sequence[Objects], numbers: Any, sizes: Any, seed: int
    ) -> None:
        """Run one epoch at a constant learning rate, with the moments that AdamW has so far."""
        targets = self._targets(objects, numbers, sizes)
        self._run(images, targets, seed, 1, None)

    def _run(
        self,
        images: ImageSequence,
        targets: list[Target],
        seed: int,
        n_epochs: int,
        schedule: Schedule | None,
    ) -> None:
        """Run epochs; on Ctrl-C, the part is as far as it came."""
        settings, progress = self.settings, Progress()
        views, outs = self._start(images, targets)
        with progress.shown(len(views) + n_epochs * len(images), settings.verbose):
            self._run_frozen(views, outs, progress)
            data = self._data(views, outs, seed)
            net = self._new_net(schedule, seed, progress)
            training = threading.Lock()
            try:
                with training, ready_to_train(training):
                    if schedule is None and self._is_at_constant_rate:
                        continue_net(net, self.net)
                    train(net, data, n_epochs, Chance(seed), progress=progress, stage="training")
            except Interrupted:
                self._keep(net, schedule)
                raise
        self._keep(net, schedule)

    def _keep(self, net: Any, schedule: Schedule | None) -> None:
        self.net, self._is_at_constant_rate = net, schedule is None
        self.history = [
            {"epoch": i, "train_loss": float(epoch["train_loss"]), "dur": epoch.get("dur")}
            for i, epoch in enumerate(net.history, 1)
        ]

    def _new_net(self, schedule: Schedule | None, seed: int, progress: Progress) -> Any:
        settings = self.settings
        head_lr = rate_of_head(settings.lr, settings.head_lr)
        parts = self.part.rated_parts(settings.lr, head_lr)
        net = make_detector_net(
            self.part,
            parameter_groups(parts, settings.weight_decay, only_matrices_decay=False),
            max_epochs=settings.max_epochs,
            batch_size=settings.images_a_step,
            callbacks=settings.callbacks or [],
            schedule=schedule,
            seed=seed,
            progress=progress,
            verbose=settings.verbose,
        )
        net.history.extend(dict(epoch) for epoch in self.history)
        return net

    def _targets(
        self, objects: Sequence[Objects], numbers: Sequence[np.ndarray], sizes: np.ndarray
    ) -> list[Target]:
        """Turn objects into what the detector learns: boxes in its input, its own numbers."""
        targets: list[Target] = []
        for of_image, labels, (height, width) in zip(objects, numbers, sizes.tolist(), strict=True):
            scale, offset = letterbox(self.part.preprocessing, height, width)
            boxes = torch.from_numpy((of_image.boxes * scale + offset).astype(np.float32))
            shifted = torch.from_numpy(labels + self.part.first_label)
            targets.append({"boxes": boxes, "labels": shifted})
        return targets

    def _start(
        self, images: ImageSequence, targets: list[Target]
    ) -> tuple[BoxViews, list[np.ndarray]]:
        """Return the views to learn, and room for what is kept of each: maps if they fit."""
        source, views = self.part.source, self._views(images, targets)
        try:
            return views, source.empty(len(views))
        except MemoryError:
            if not isinstance(source, BlockMaps):
                raise
        if self.settings.verbose > 1:
            tqdm.write("every epoch starts from the images, as the disk is full")
        self.part.source = RecomputedMaps(source)
        views = self._views(images, targets)
        return views, self.part.source.empty(len(views))

    def _views(self, images: ImageSequence, targets: list[Target]) -> BoxViews:
        """Return the fixed views in which images are learnt."""
        preprocessing, settings = self.part.preprocessing, self.settings
        augmentation = BoxAugmentation(settings.augment, settings.n_views, preprocessing.size)
        n_views = 1 if self._is_drawn else augmentation.n_views
        return BoxViews(images, preprocessing, augmentation, targets, n_views)

    @property
    def _is_drawn(self) -> bool:
        """Whether epochs start from the images, so that each can draw new views of them."""
        return isinstance(self.part.source, Pixels)

    def _data(self, views: BoxViews, stored: list[np.ndarray], seed: int) -> DetectorData:
        augments = "draws" if self._is_drawn and self.settings.augment is not None else "turns"
        threads = n_threads(self.settings.n_jobs)
        return DetectorData(views, stored, seed=seed, augments=augments, n_threads=threads)

    def _run_frozen(self, views: Views, outs: list[np.ndarray], progress: Progress) -> None:
        """Fill what the detector starts from, a row for each view."""
        settings = self.settings
        progress.stage("frozen blocks")
        self.part.source.fill(
            views,
            outs,
            memory=check_memory(settings.memory),
            batch_size=settings.batch_size,
            n_jobs=settings.n_jobs,
            progress=progress,
        )

    def continued(self, settings: DetectorSettings) -> DetectorTrainer:
        """Return a trainer that goes on from here; this one stays as it is."""
        other = copy.copy(self)
        other.settings, other.part = settings, self.part.copied()
        return other

    # ------------------------------------------------------------------------ prediction

    def find(self, images: ImageSequence) -> list[dict[str, np.ndarray]]:
        """Return boxes in pixels of the images, numbers of the categories from 0, and scores."""
        part, settings = self.part, self.settings
        part.limit(settings.score_threshold, settings.nms_threshold, settings.max_detections)
        augmentation = Augmentation(None, None, part.preprocessing.size)
        results: list[dict[str, np.ndarray]] = []
        progress = Progress()  # two threads may predict at once
        with progress.shown(len(images), settings.verbose):
            n_bytes = sum(array.nbytes for array in part.source.empty(1))
            step = max(1, min(_CHUNK, _CHUNK_BYTES // n_bytes))
            for first in range(0, len(images), step):
                chunk = images[first : first + step]
                sizes = image_sizes(chunk, n_threads(settings.n_jobs)).tolist()
                views = Views(chunk, part.preprocessing, augmentation)
                outs = part.source.empty(len(views))
                self._run_frozen(views, outs, progress)
                detections = part.detect(outs, settings.images_a_step)
                results += map(self._in_image, detections, sizes)
        return results

    def _in_image(
        self, detected: dict[str, np.ndarray], size: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Turn what is found in the network's input into boxes of the image."""
        height, width = size
        scale, offset = letterbox(self.part.preprocessing, height, width)
        boxes = np.clip((detected["boxes"] - offset) / scale, 0, [width, height, width, height])
        is_inside = (boxes[:, 2:] > boxes[:, :2]).all(1)  # others lie beside the image
        return {
            "boxes": boxes[is_inside].astype(np.float32),
            "labels": detected["labels"][is_inside],
            "scores": detected["scores"][is_inside],
        }


# ------------------------------------------------------------------------------ skorch


class DetectorData(TrainingData):
    """Batches of stored tensors, or of images in fresh views, with the boxes of each view.

    Parameters
    ----------
    views : BoxViews
    stored : list of ndarray
        What the part takes, with a row for each view: maps, or pixels.
    **options
        As of `TrainingData`.
    """

    views: BoxViews

    def __init__(self, views: BoxViews, stored: list[np.ndarray], **options: Any) -> None:
        rows = np.arange(len(views.images))
        super().__init__(views, stored[0], rows, rows, None, **options)
        self.parts = stored
        self.shown_targets = views.find_targets(self._threads)

    def __getitems__(self, numbers: list[int]) -> Any:
        """Return a batch (X, y): X has what the part takes, y boxes and labels of each image."""
        rows = self.numbers[numbers]
        if self.augments == "draws":
            with ThreadPoolExecutor(self._threads) as threads:
                images, targets = zip(*threads.map(self._draw_scene, rows.tolist()), strict=True)
            return {"stored": [torch.stack(images)]}, list(targets)
        places = rows * self.views.n_views + self._view_of(rows)
        stored = [torch.from_numpy(np.ascontiguousarray(part[places])) for part in self.parts]
        return {"stored": stored}, [self.shown_targets[place] for place in places.tolist()]

    def _draw_scene(self, row: int) -> tuple[torch.Tensor, Target]:
        seed = xxhash.xxh3_64_intdigest(f"{self.seed} {self.epoch} {row}".encode())
        return self.views.draw(torch.from_numpy(self.parts[0][row]), row, seed)


class DetectorNet(DrawingSteps, skorch.NeuralNet):
    """A skorch net whose module says itself what it loses."""

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Return the loss of a batch and its parts; its gradients are in the parameters."""
        X, targets = batch  # by the parts of X, which are of one length, skorch counts the images
        try:
            return super().train_step_single(({**X, "targets": targets}, targets), **fit_params)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"A step of {len(targets)} images does not fit into the memory of {self.device!r}, "
                "and can't be taken in parts, as the loss counts all boxes of a step. Pass a "
                "smaller batch_size or image_size, or unfreeze fewer blocks."
            ) from error

    def get_loss(
        self, y_pred: dict[str, torch.Tensor], y_true: Any, X: Any = None, training: bool = False
    ) -> torch.Tensor:
        """Return the sum of the losses that the detector has."""
        return torch.stack(list(y_pred.values())).sum()


def make_detector_net(
    part: DetectorPart,
    groups: list[dict[str, Any]],
    *,
    callbacks: Sequence[Any],
    **options: Any,
) -> skorch.NeuralNet:
    """Compose the skorch net that trains a detector; `options` are those of `make_net`."""
    clipping = ("clipping", GradientNormClipping(_MAX_NORM))
    return make_net(
        DetectorNet,
        part,
        groups,
        callbacks=[clipping, *callbacks],
        criterion=nn.Identity,
        **options,
    )
