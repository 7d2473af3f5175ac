"""What the parameters of an estimator that trains say, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sktransfer._threads import n_threads
from sktransfer.io import ImageSequence

_BATCH = 32  # images of a training step
_REPEATED = 4  # times the images, of which some count more than once


@dataclass(kw_only=True)
class Settings:
    """The parameters of an estimator that its training takes, and what `y` says.

    Those with a default are not parameters of every estimator.
    """

    kind: str  # "class", "label" or "value"; "pair" without `y`
    n_outputs: int
    weights: Any
    unfreeze: Any
    head: Any
    pooling: str
    dropout: float = 0.0
    head_epochs: int | str = 0
    max_epochs: int
    batch_size: int | str
    lr: float
    head_lr: float | None
    lr_decay: float
    weight_decay: float
    augment: Any
    n_views: int | None
    predict_views: int = 1
    early_stopping: bool = False
    validation_fraction: float = 0.1
    n_iter_no_change: int = 5
    callbacks: Sequence[Any] | None
    memory: Any
    n_jobs: int | None
    verbose: int

    @classmethod
    def taken_from_parameters(cls) -> list[str]:
        """Return the names that are parameters of the estimators, too."""
        return [field.name for field in fields(cls) if field.name not in ("kind", "n_outputs")]

    @property
    def is_from_scratch(self) -> bool:
        return self.weights is None

    @property
    def images_a_step(self) -> int:
        """Return the images of a training step."""
        return _BATCH if isinstance(self.batch_size, str) else self.batch_size

    @property
    def solves_head(self) -> bool:
        """Whether the head starts at its optimum on the embeddings of the frozen network."""
        is_linear = isinstance(self.head, str)
        return is_linear and self.head_epochs == "auto" and not self.is_from_scratch


def unordered(
    images: ImageSequence,
    targets: np.ndarray,
    weights: np.ndarray | None,
    n_jobs: int | None,
    repeats: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Bring images into an order of their own: a fit then does not depend on that of the rows.

    Images of weight 0 are left out; those of weight 2, with `repeats` and if all weights are such
    small integers, come twice.

    Returns
    -------
    rows : ndarray of int
    weights : ndarray or None
        Of these rows.
    """
    digests = images.digests(n_threads(n_jobs))
    columns = targets.reshape(len(targets), -1).tolist()
    each = np.ones(len(targets)) if weights is None else weights
    keys = [(d, *row, weight) for d, row, weight in zip(digests, columns, each, strict=True)]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    if weights is None:
        return order, None
    weights = weights[order]
    are_counts = (weights == weights.astype(int)).all()
    if repeats and are_counts and weights.sum() <= _REPEATED * len(order):
        return np.repeat(order, weights.astype(int)), None
    return order[weights > 0], weights[weights > 0]
