"""One progress bar for all that a fit or a prediction does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from skorch.callbacks import Callback
from tqdm.auto import tqdm


class Progress(Callback):
    """A bar that counts images: once through the frozen blocks, and once in each epoch.

    Between calls, and where nothing is to be shown, it does nothing. As a callback of skorch's it
    follows the batches.
    """

    def __init__(self) -> None:
        self._bar: Any = None

    @contextmanager
    def shown(self, n_images: int, verbose: int, unit: str = "image") -> Iterator[None]:
        """Show the bar for the length of a ``with`` block; `n_images` is an estimate."""
        self._bar = tqdm(total=n_images, unit=unit, disable=not verbose)
        try:
            yield
            self._bar.total = self._bar.n  # early stopping, or a memory that knew it all
            self._bar.refresh()
        finally:
            self._bar.close()
            self._bar = None

    def stage(self, name: str, n_epochs: int = 0) -> None:
        """Say what comes next, and over how many epochs."""
        self._name, self._n_epochs, self._epoch = name, n_epochs, 0
        if self._bar is not None:
            self._bar.set_description(name)

    def update(self, n_images: int) -> None:
        """Move on."""
        if self._bar is not None:
            self._bar.update(n_images)

    def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
        self._epoch += 1
        if self._bar is not None:
            self._bar.set_description(f"{self._name} {self._epoch}/{self._n_epochs}")

    def on_batch_end(self, net: Any, batch: Any = None, **kwargs: Any) -> None:
        self.update(len(batch[1]))

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            losses = {key: net.history[-1].get(key) for key in ("train_loss", "valid_loss")}
            self._bar.set_postfix({k: f"{v:.3g}" for k, v in losses.items() if v is not None})
