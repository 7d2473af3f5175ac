"""What is learnt from images: their views, the head, the batches, the net and its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import skorch
from skorch.helper import predefined_split
from torch import nn

from sktransfer._engine.augmentation import Augmentation, Views
from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._threads import n_threads
from sktransfer._training.data import TrainingData
from sktransfer._training.heads import Loss, make_head
from sktransfer._training.net import (
    NETS,
    Progress,
    Schedule,
    early_stopping,
    make_net,
    parameter_groups,
)
from sktransfer._training.settings import Settings, rate_of_head
from sktransfer._training.trained_part import TrainedPart
from sktransfer.io import ImageSequence


class Examples(NamedTuple):
    """What is learnt from, and the seed of the chance in it."""

    views: Views
    targets: np.ndarray  # encoded, one or a row of them for each image
    weights: np.ndarray | None  # of the images
    seed: int
    passed: np.ndarray | None = None  # rows of the layers in front of the cut, of all views
    groups: np.ndarray | None = None  # of the images, which no split tears apart


class Task:
    """To learn classes, labels or values from images.

    Parameters
    ----------
    settings : Settings
    frozen : FrozenBlocks
    cut : int
        Where the trained part of the network begins.
    """

    n_shown = 1  # views of an image in one epoch

    def __init__(self, settings: Settings, frozen: FrozenBlocks, cut: int) -> None:
        self.settings, self.frozen, self.cut = settings, frozen, cut

    @property
    def is_on_layers(self) -> bool:
        """Whether the head sees other layers than the last one, and some of them are trained."""
        return self.cut < self.frozen.embedding and not self.frozen.is_at_the_end

    # ------------------------------------------------------------------------ views

    def augmentation(self, n_views: int | None) -> Augmentation:
        """Return what makes `n_views` fixed views of an image, None for all that there are.

        Raises
        ------
        ValueError
            If a prediction is to average over more views than an image has.
        """
        settings, size = self.settings, self.frozen.size
        augmentation = Augmentation(settings.augment, n_views, size)
        most = max(Augmentation(settings.augment, None, size).n_views, augmentation.n_views)
        if settings.predict_views > most:
            raise ValueError(
                f"predict_views={settings.predict_views}, but augment={settings.augment!r} has "
                f"{most} views of an image."
            )
        return augmentation

    @property
    def n_views(self) -> int:
        """The number of fixed views of an image; 1 if nothing is frozen, as views are drawn."""
        return 1 if self.cut == 0 else self.augmentation(self.settings.n_views).n_views

    def views(self, images: ImageSequence, n_items: int) -> Views:
        """Return the fixed views in which images are learnt; `n_items` rows of them have a `y`."""
        augmentation = self.augmentation(self.settings.n_views)
        return Views(images, self.frozen.preprocessing, augmentation, self.n_views)

    # ------------------------------------------------------------------------ batches

    def data(
        self,
        stored: np.ndarray | None,
        rows: np.ndarray,
        examples: Examples,
        *,
        is_valid: bool = False,
    ) -> TrainingData:
        """Return the batches of some rows, to be learnt from or, with `is_valid`, held out.

        Parameters
        ----------
        stored : ndarray or None
            Where epochs start from; None for the images.
        rows : ndarray of int
        examples : Examples
        is_valid : bool, default=False
        """
        augments = "draws" if self.cut == 0 and self.settings.augment is not None else "turns"
        return TrainingData(
            examples.views,
            stored,
            rows,
            examples.targets,
            examples.weights,
            passed=examples.passed,
            seed=examples.seed,
            augments="no" if is_valid else augments,
            n_threads=n_threads(self.settings.n_jobs),
        )

    def n_steps(self, n_images: int) -> int:
        """Return the number of steps in an epoch."""
        return math.ceil(n_images / self.settings.images_a_step)

    @property
    def step(self) -> int:
        """The number of images that frozen blocks take at once."""
        return self.frozen.runner.step(self.settings.batch_size, self.frozen.size)

    # ------------------------------------------------------------------------ the net

    def new_head(self) -> nn.Module:
        """Return a head that has learnt nothing yet."""
        settings = self.settings
        width, n_outputs = self.frozen.width, settings.n_outputs
        return make_head(settings.head, width, n_outputs, settings.dropout, self.is_on_layers)

    def callbacks(self) -> list[Any]:
        """Return the callbacks of the second phase."""
        return list(self.settings.callbacks or [])

    def net_options(self) -> dict[str, Any]:
        """Return the class of the net, its loss, and what else only a net of this kind takes."""
        kind = self.settings.kind
        options = {"net_class": NETS[kind], "criterion": Loss(kind)}
        # skorch's classifier has a score of its own, which asks for the classes.
        classes = {"classes": list(range(self.settings.n_outputs))} if kind == "class" else {}
        return options | classes

    def new_net(
        self,
        module: TrainedPart,
        schedule: Schedule | None,
        seed: int,
        progress: Progress,
        *,
        callbacks: Sequence[Any] = (),
        valid: TrainingData | None = None,
    ) -> skorch.NeuralNet:
        """Return a net that trains a module; with `valid`, it stops early by these batches."""
        settings, options = self.settings, self.net_options()
        if valid is not None:
            stop = early_stopping(settings.n_iter_no_change, settings.verbose)
            callbacks = [stop, *callbacks]
            options["train_split"] = predefined_split(valid)
        head_lr = rate_of_head(settings.lr, settings.head_lr)
        parts = module.rated_parts(settings.lr, head_lr, settings.lr_decay)
        return make_net(
            options.pop("net_class"),
            module,
            parameter_groups(parts, settings.weight_decay),
            seed=seed,
            progress=progress,
            schedule=schedule,
            callbacks=callbacks,
            verbose=settings.verbose,
            max_epochs=settings.max_epochs,
            batch_size=settings.images_a_step,
            **options,
        )
