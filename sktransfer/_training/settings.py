"""What the parameters of an estimator that trains say, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch

from sktransfer._engine.runtime import has_bfloat16
from sktransfer._threads import n_threads
from sktransfer.io import ImageSequence

# Of the settings, those that a net which is there need not know: `Trainer` reads them anew.
_READ_ANEW = {
    *("augment", "n_views", "predict_views", "crop_scale", "memory", "n_jobs"),
    *("head_epochs", "max_epochs", "searches_depth"),
}


@dataclass(kw_only=True)
class Settings:
    """The parameters of an estimator that its training takes, and what `y` says.

    Those with a default are not parameters of every estimator.
    """

    auto_batch: ClassVar[int] = 32  # images of a step where `batch_size` is "auto"

    kind: str  # "class", "label" or "value"; "pair" without `y`
    n_outputs: int
    is_from_scratch: bool  # on random weights
    unfreeze: Any
    precision: str = "float32"
    head: Any
    pooling: Any
    layer: Any = "auto"
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
    searches_depth: bool = False  # whether fits of other depths will follow

    def __post_init__(self) -> None:
        self.callbacks = list(self.callbacks or [])  # the user's list may change

    @classmethod
    def taken_from_parameters(cls) -> list[str]:
        """Return the names of what the parameters say, not `y`."""
        return [field.name for field in fields(cls) if field.name not in ("kind", "n_outputs")]

    def precision_of_steps(self, device: torch.device) -> str:
        """Return what the trained blocks compute in while they are trained.

        `"auto"` takes bfloat16 where it is known to be faster.
        """
        if self.precision != "auto":
            return self.precision
        is_faster = device.type == "cpu" and has_bfloat16(if_unknown=False)
        return "bfloat16" if is_faster else "float32"

    def needs_new_net(self, other: Settings) -> bool:
        """Tell whether a net that was made for other settings is none for these."""
        names = {field.name for field in fields(self)} - _READ_ANEW
        return any(getattr(self, name) != getattr(other, name) for name in names)

    @property
    def images_a_step(self) -> int:
        """Return the images of a training step."""
        return self.auto_batch if isinstance(self.batch_size, str) else self.batch_size

    @property
    def solves_head(self) -> bool:
        """Whether the head starts at its optimum on the embeddings of the frozen network."""
        is_linear = isinstance(self.head, str)
        return is_linear and self.head_epochs == "auto" and not self.is_from_scratch


def rate_of_head(lr: float, head_lr: float | None) -> float:
    """Return the learning rate of new layers: None stands for that of the pretrained ones."""
    return lr if head_lr is None else head_lr


def unseen_blocks_error(layer: Any, unfreeze: Any, block: str, is_output: bool) -> ValueError:
    """Return the error of a head that does not see a block which is trained."""
    if is_output:
        return ValueError(
            f"layer={layer!r} puts the head on what the pretrained head says, and "
            f"unfreeze={unfreeze!r} trains blocks in front of that: pass unfreeze=0, or 'auto' "
            "instead of 'output', what the pretrained head sees."
        )
    return ValueError(
        f"layer={layer!r} lies in front of block {block!r}, which unfreeze={unfreeze!r} trains: "
        f"the head would not see what it learns. Add {block!r} or 'auto' to layer, or pass "
        "unfreeze=0."
    )


def distinct(
    images: ImageSequence,
    targets: np.ndarray,
    weights: np.ndarray | None,
    groups: np.ndarray | None,
    n_jobs: int | None,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Find the different images, in an order of their own.

    Equal images with equal targets are one, with the sum of their weights, and those of weight 0
    are left out. A fit then depends neither on the order of the rows, nor on whether an image comes
    twice or counts twice.

    Returns
    -------
    rows : ndarray of int
        The first row of each.
    weights : ndarray or None
        Theirs; None if none were given, and no image comes twice.
    groups : ndarray of int or None
        Theirs: of an image that comes in several groups, the first of these.
    """
    digests = images.digests(n_threads(n_jobs))
    columns = targets.reshape(len(targets), -1).tolist()
    each = np.ones(len(targets)) if weights is None else weights
    equal: dict[tuple, list[int]] = {}
    for row, (digest, target) in enumerate(zip(digests, columns, strict=True)):
        if each[row] > 0:
            equal.setdefault((digest, *target), []).append(row)
    ordered = [equal[key] for key in sorted(equal)]
    rows = np.array([same[0] for same in ordered])
    if groups is not None:
        groups = np.array([groups[same].min() for same in ordered])
    if weights is None and len(rows) == len(targets):
        return rows, None, groups
    # Sorted, as a sum depends on its order in the last bit.
    return rows, np.array([np.sort(each[same]).sum() for same in ordered]), groups
