"""Learning without labels: pairs of tiles, the net that is trained on them, and their task."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import skorch
import torch
from skorch.callbacks import Callback, PassthroughScoring
from torch import nn
from torch.utils.data import DataLoader

from sktransfer._engine.augmentation import Views
from sktransfer._engine.device import is_out_of_memory
from sktransfer._engine.tiles import Tiles, TileViews
from sktransfer._threads import n_threads
from sktransfer._training.data import TrainingData
from sktransfer._training.heads import NTXent, make_projection, matching_accuracy, spread
from sktransfer._training.net import DrawingSteps
from sktransfer._training.settings import Settings
from sktransfer._training.task import Examples, Task
from sktransfer._training.trainer import Trainer
from sktransfer.io import ImageSequence

_COLLAPSED = 1e-3  # a spread below this: cosines of 0.999 between any two tiles
_PATIENCE = 3  # epochs in a row that have collapsed, before the training stops


@dataclass(kw_only=True)
class PairSettings(Settings):
    """The parameters of an estimator that learns from pairs."""

    auto_batch = 64

    temperature: float
    crop_scale: tuple[float, float]


class PairData(TrainingData):
    """Batches of pairs: tiles A of n pictures, then tiles B of the same.

    Of a clip, A is its first half and B its last, frame by frame.

    Parameters
    ----------
    views, stored, numbers, targets
        As of `TrainingData`; `numbers` and `targets` count pictures or clips.
    n_frames : int
        Of a clip; 1 of a picture.
    **options
        As of `TrainingData`.
    """

    def __init__(
        self,
        views: Views,
        stored: np.ndarray | None,
        numbers: np.ndarray,
        targets: np.ndarray,
        *,
        n_frames: int,
        **options: Any,
    ) -> None:
        super().__init__(views, stored, numbers, targets, None, **options)
        self.n_frames = n_frames
        self.n_half = max(1, n_frames // 2)  # frames of a tile

    def __getitems__(self, numbers: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return a batch (X, y): tiles (2 * n * n_half, ...), and the numbers of the pictures."""
        items = self.numbers[numbers]
        tiles = [self._tiles(items, side) for side in (0, 1)]
        return {"stored": torch.cat(tiles)}, self.targets[items]

    def _tiles(self, items: np.ndarray, side: int) -> torch.Tensor:
        """Return tiles A (`side` 0) or B (1), frame by frame: (n * n_half, ...)."""
        first = items * self.n_frames + side * (self.n_frames - self.n_half)
        rows = (first[:, None] + np.arange(self.n_half)).ravel()
        if self.augments == "draws":
            chances = [f"{self.seed} {self.epoch} {item} {side}" for item in items.tolist()]
            draws = [chance for chance in chances for _ in range(self.n_half)]
            with ThreadPoolExecutor(self._threads) as threads:
                return torch.stack(list(threads.map(self._drawn, rows.tolist(), draws)))
        shown = np.repeat(self._shown()[side][items], self.n_half)
        if self.stored is not None:
            return torch.from_numpy(self.stored[rows * self.views.n_views + shown])
        with ThreadPoolExecutor(self._threads) as threads:
            return torch.stack(list(threads.map(self._image, rows.tolist(), shown.tolist())))

    def _shown(self) -> tuple[np.ndarray, np.ndarray]:
        """Return which two fixed tiles each picture shows in this epoch: never the same one."""
        random = np.random.default_rng([self.seed, self.epoch])
        first = random.integers(self.views.n_views, size=len(self.targets))
        step = random.integers(1, self.views.n_views, size=len(self.targets))
        return first, (first + step) % self.views.n_views


# ------------------------------------------------------------------------------ skorch


def batch_size_of(n: int, batch_size: int) -> int:
    """Return the size that makes batches of `n` pictures even: all have about as many negatives."""
    return math.ceil(n / math.ceil(n / batch_size))


class PairNet(DrawingSteps, skorch.NeuralNet):
    """A skorch net whose loss looks at all rows of a batch at once."""

    def get_iterator(self, dataset: Any, training: bool = False) -> DataLoader:
        """Return batches of about one size; a picture that is alone in one is left out."""
        size = batch_size_of(len(dataset), self.batch_size)
        options = self.get_params_for("iterator_train")
        return DataLoader(dataset, size, drop_last=len(dataset) % size == 1, **options)

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Return the loss and the rows of a batch; its gradients are in the parameters."""
        try:
            return super().train_step_single(batch, **fit_params)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"{len(batch[1])} pairs of tiles do not fit into the memory of {self.device!r} at "
                "once, as the loss compares all of a batch. Pass a smaller batch_size or "
                "image_size, or unfreeze fewer blocks."
            ) from error

    def get_loss(
        self, y_pred: torch.Tensor, y_true: torch.Tensor, X: Any = None, training: bool = False
    ) -> torch.Tensor:
        """Return the loss of projected frames (2 * n * n_half, d), those of a tile averaged."""
        rows = y_pred.unflatten(0, (2 * len(y_true), -1)).mean(1)  # (2n, d)
        with torch.no_grad():
            self.history.record_batch("matching_accuracy", matching_accuracy(rows))
            self.history.record_batch("spread", spread(rows))
        return self.criterion_(rows)


class CollapseWatch(Callback):
    """Ends a training whose rows have become one."""

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        last = [epoch["spread"] for epoch in list(net.history)[-_PATIENCE:]]
        if len(last) == _PATIENCE and max(last) < _COLLAPSED:
            raise KeyboardInterrupt  # how skorch's callbacks end a training


def why_collapsed(history: list[dict[str, Any]]) -> str | None:
    """Return in words that the rows of the last epoch have become one; None if they have not."""
    if not history or history[-1]["spread"] >= _COLLAPSED:
        return None
    n_epochs = 0
    while n_epochs < len(history) and history[-1 - n_epochs]["spread"] < _COLLAPSED:
        n_epochs += 1
    return (
        f"The representation collapsed: for {n_epochs} epochs up to {len(history)}, the network "
        f"has had one and the same row for all tiles (spread {history[-1]['spread']:.2g}, of at "
        "most 1), by which no picture can be told from another. Either the pictures are the same "
        "to it, or its blocks have died: look at the images, lower lr, or raise batch_size."
    )


# ------------------------------------------------------------------------------ the task


class PairTask(Task):
    """To tell pictures, or clips, apart by pairs of tiles of them."""

    n_shown = 2  # two tiles of each picture
    settings: PairSettings

    def augmentation(self, n_views: int | None) -> Tiles:
        """Return what cuts `n_views` fixed tiles out of a picture, None for all that there are."""
        settings = self.settings
        return Tiles(settings.augment, n_views, self.frozen.size, settings.crop_scale)

    def views(self, images: ImageSequence, n_items: int) -> TileViews:
        """Return the tiles of `n_items` pictures, or clips, whose frames come one by one."""
        tiles = self.augmentation(self.settings.n_views)
        n_together = max(1, len(images) // n_items // 2)
        return TileViews(images, self.frozen.preprocessing, tiles, self.n_views, n_together)

    def data(
        self,
        stored: np.ndarray | None,
        rows: np.ndarray,
        examples: Examples,
        *,
        is_valid: bool = False,
    ) -> PairData:
        """Return the batches of some pictures or clips; none of them are held out."""
        assert not is_valid
        return PairData(
            examples.views,
            stored,
            rows,
            examples.targets,
            n_frames=len(examples.views.images) // len(examples.targets),
            seed=examples.seed,
            augments="draws" if self.cut == 0 else "turns",
            n_threads=n_threads(self.settings.n_jobs),
        )

    def n_steps(self, n_images: int) -> int:
        """Return the number of steps in an epoch: a picture that is alone in one is left out."""
        size = batch_size_of(n_images, self.settings.images_a_step)
        return math.ceil(n_images / size) - (n_images % size == 1)

    def new_head(self) -> nn.Module:
        """Return a projection head that has learnt nothing yet."""
        return make_projection(self.settings.head, self.frozen.width)

    def callbacks(self) -> list[Any]:
        """Return the callbacks of the training, those of the user among them."""
        accuracy = PassthroughScoring("matching_accuracy", lower_is_better=False, on_train=True)
        distance = PassthroughScoring("spread", lower_is_better=False, on_train=True)
        # Where it ends the training, the others have seen the epoch.
        watch = ("collapse", CollapseWatch())
        scores = [("matching_accuracy", accuracy), ("spread", distance)]
        return [*scores, *super().callbacks(), watch]

    def net_options(self) -> dict[str, Any]:
        """Return the class of the net and its loss."""
        return {"net_class": PairNet, "criterion": NTXent(self.settings.temperature)}


class PairTrainer(Trainer):
    """Trains what follows the cut, and a projection head, on pairs of tiles."""

    task_class = PairTask
