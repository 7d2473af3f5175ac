"""Training by skorch: the nets, their callbacks, their one factory, and the loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import skorch
import torch
from skorch.callbacks import Callback, EarlyStopping, LRScheduler
from skorch.utils import to_tensor
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from sktransfer._bars import tqdm
from sktransfer._torch_state import Chance, chance_lock, network_lock
from sktransfer._training.interrupt import Interrupted, ctrl_c

_WARM_UP = 0.1  # of all steps


# ------------------------------------------------------------------------------ skorch


class DrawingSteps:
    """A skorch net that draws from a chance of its own, and runs while nobody traces a network.

    Each step takes the locks for itself: other threads come to their turn between two of them.
    """

    chance: Chance  # set by `train`

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Return the loss and the outputs of a batch; its gradients are in the parameters."""
        with chance_lock, self.chance.in_torch(), network_lock.shared():
            return super().train_step_single(batch, **fit_params)  # type: ignore[misc]

    def validation_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Return the loss and the outputs of a batch that is not learnt from."""
        with chance_lock, self.chance.in_torch(), network_lock.shared():
            return super().validation_step(batch, **fit_params)  # type: ignore[misc]


class _InPieces:
    """A skorch net that weights losses, takes a batch in pieces, and adds up their gradients."""

    def get_loss(
        self: Any, y_pred: torch.Tensor, y_true: torch.Tensor, X: Any = None, training: bool = False
    ) -> torch.Tensor:
        """Return the weighted mean of the losses."""
        losses = self.criterion_(y_pred, to_tensor(y_true, device=self.device))
        if "weights" in X:
            losses = losses * to_tensor(X["weights"], device=self.device)
        return losses.mean()

    def train_step_single(self: Any, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Return the loss and the outputs of a batch; its gradients are in the parameters."""
        X, y = batch
        self._set_training(True)
        if len(y) == 1:
            self.module_.hold_statistics()

        planned = self.module_.piece(len(y))

        def run(piece: int) -> dict[str, Any]:
            self.module_.zero_grad()  # of an attempt that did not fit
            if piece < planned:
                self.module_.largest_piece = piece
            return self._train_in_pieces(X, y, piece, **fit_params)

        if self.module_.moves_statistics:
            return run(planned)
        return self.module_.frozen.runner.in_smaller_steps(run, planned)

    def _train_in_pieces(self: Any, X: Any, y: Any, piece: int, **fit_params: Any) -> Any:
        loss, outputs = 0.0, []
        for first in range(0, len(y), piece):
            part = slice(first, first + piece)
            X_part = {name: values[part] for name, values in X.items()}
            y_pred = self.infer(X_part, **fit_params)
            share = len(y_pred) / len(y)
            loss_part = share * self.get_loss(y_pred, y[part], X=X_part, training=True)
            loss_part.backward()
            loss = loss + loss_part.detach()
            outputs.append(y_pred.detach())
        return {"loss": loss, "y_pred": torch.cat(outputs)}


class _Classifier(DrawingSteps, _InPieces, skorch.NeuralNetClassifier):
    pass


class _Labeller(DrawingSteps, _InPieces, skorch.NeuralNet):
    pass


class _Regressor(DrawingSteps, _InPieces, skorch.NeuralNetRegressor):
    pass


# By the kind of `y`.
NETS: dict[str, Callable[..., skorch.NeuralNet]] = {
    "class": _Classifier,
    "label": _Labeller,
    "value": _Regressor,
}


class Watch(Callback):
    """Stop where the loss is lost; tell the data which epoch it is."""

    def on_epoch_begin(self, net: Any, dataset_train: Any = None, **kwargs: Any) -> None:
        dataset_train.epoch = len(net.history) - 1

    def on_batch_end(self, net: Any, training: bool = False, **kwargs: Any) -> None:
        batches = net.history[-1]["batches"]
        loss = batches[-1]["train_loss"] if training else 0.0
        if not math.isfinite(loss):
            rates = sorted({group["lr"] for group in net.optimizer_.param_groups})
            raise ValueError(
                f"The training loss became {loss} in epoch {len(net.history)}, batch "
                f"{len(batches)}, at learning rates up to {rates[-1]:.3g}. Lower lr or head_lr, "
                "or check the targets for extreme values."
            )


class Progress(Callback):
    """A bar over all that a fit does with images, which counts those that the user has.

    Images run through the frozen blocks once and are trained on in each epoch; the bar reaches the
    last of them when all this is done, so the time that it shows is that of the whole.

    Between calls, and where nothing is to be shown, it does nothing. As a callback of skorch's it
    follows the batches.

    Attributes
    ----------
    n_shown : int or None
        How many images the user has; None for as many as are run.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._name, self._n_epochs, self._epoch = "", 0, 0
        self._n_done: float = 0
        self._n_images = 1
        self.n_shown: int | None = None

    @contextmanager
    def shown(self, n_images: int, verbose: int, unit: str = "image") -> Iterator[None]:
        """Show the bar for the length of a ``with`` block; `n_images` run, which is an estimate."""
        self._n_done, self._n_images = 0, max(1, n_images)
        total = n_images if self.n_shown is None else self.n_shown
        self._bar = tqdm(total=total, unit=unit, disable=not verbose)
        try:
            yield
            if self.n_shown is None:
                self._bar.total = self._bar.n  # early stopping, or a memory that knew it all
            else:
                self._bar.update(total - self._bar.n)
            self._bar.refresh()
        finally:
            self._bar.close()
            self._bar = None

    def stage(self, name: str, n_epochs: int = 0) -> None:
        """Say what comes next, and over how many epochs."""
        self._name, self._n_epochs, self._epoch = name, n_epochs, 0
        if self._bar is not None:
            self._bar.set_description(name)

    def update(self, n_images: float) -> None:
        """Move on; by parts of images only with `n_shown`."""
        self._n_done += n_images
        if self._bar is not None:
            share = min(1.0, self._n_done / self._n_images)
            n = self._n_done if self.n_shown is None else int(share * self._bar.total)
            self._bar.update(n - self._bar.n)

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


def make_net(
    net_class: Callable[..., skorch.NeuralNet],
    module: nn.Module,
    groups: list[dict[str, Any]],
    *,
    seed: int,
    progress: Progress,
    schedule: Schedule | None,
    callbacks: Sequence[Any] = (),
    verbose: int = 0,
    **options: Any,
) -> skorch.NeuralNet:
    """Compose the skorch net that trains a module by AdamW.

    Parameters
    ----------
    net_class : class of skorch nets
    module : nn.Module
    groups : list of dict
        The parameters with their learning rates, as of `parameter_groups`.
    seed : int
        Of the order of the batches.
    progress : Progress
    schedule : Schedule or None
        Of the learning rate; None for a constant one.
    callbacks : sequence of callbacks of skorch's
        They come after those of this library.
    verbose : int, default=0
        The table of skorch is shown from 2 on.
    **options
        Further parameters of the net, such as its `criterion` and `batch_size`.
    """
    ours: list[Any] = [("watch", Watch()), ("progress", progress)]
    if schedule is not None:
        policy = LRScheduler(LambdaLR, lr_lambda=schedule, last_epoch=-1, step_every="batch")
        ours.append(("schedule", policy))
    net = net_class(
        module,
        optimizer=lambda *_, **__: torch.optim.AdamW(groups, fused=True),
        iterator_train__shuffle=True,
        iterator_train__generator=torch.Generator().manual_seed(seed),
        iterator_train__collate_fn=_as_is,
        iterator_valid__generator=torch.Generator().manual_seed(seed),
        iterator_valid__collate_fn=_as_is,
        callbacks=[*ours, *callbacks],
        device=str(next(module.parameters()).device),
        verbose=verbose > 1,
        callbacks__print_log__sink=_print_beside_bar(verbose),
        **{"train_split": None, **options},
    )
    return net.initialize()


def continue_net(net: skorch.NeuralNet, before: skorch.NeuralNet) -> None:
    """Let a new net go on where another one is: moments of its optimizer, the order of images.

    They are copied: the other net could go on as well.
    """
    fresh, state = net.optimizer_.state_dict(), before.optimizer_.state_dict()["state"]
    net.optimizer_.load_state_dict({**fresh, "state": copy.deepcopy(state)})
    net.iterator_train__generator.set_state(before.iterator_train__generator.get_state())


def _as_is(batch: Any) -> Any:
    return batch  # data return whole batches


def early_stopping(patience: int, verbose: int) -> tuple[str, Callback]:
    """Return the callback that ends a training whose loss on other images falls no more."""
    sink = _print_beside_bar(verbose)
    return "early_stopping", EarlyStopping(patience=patience, load_best=True, sink=sink)


def _print_beside_bar(verbose: int) -> Callable[[str], Any]:
    return tqdm.write if verbose > 1 else print  # what is printed would tear the bar apart


def parameter_groups(
    parts: Iterable[tuple[Iterable[nn.Parameter], float]],
    weight_decay: float,
    *,
    only_matrices_decay: bool = True,
) -> list[dict[str, Any]]:
    """Return what is trained as the groups of an optimizer.

    Parameters
    ----------
    parts : iterable of (parameters, learning rate)
        What is frozen of them is left out. What several parts share has the rate of the first.
    weight_decay : float
    only_matrices_decay : bool, default=True
        Whether biases, and the scales of norms, do not decay.
    """
    groups = []
    known: set[nn.Parameter] = set()
    for parameters, lr in parts:
        trained = [p for p in parameters if p.requires_grad and p not in known]
        known.update(trained)
        decaying = [p for p in trained if p.ndim > 1 or not only_matrices_decay]
        others = [p for p in trained if p.ndim <= 1 and only_matrices_decay]
        for group, decay in ((decaying, weight_decay), (others, 0.0)):
            if group:
                groups.append({"params": group, "lr": lr, "weight_decay": decay})
    return groups


class Schedule:
    """The share of the learning rate at each step: up in a tenth of them, down by a cosine."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps, self.offset = n_steps, 0

    def __call__(self, step: int) -> float:
        step += self.offset
        n_warm = max(1, round(_WARM_UP * self.n_steps))
        if step < n_warm:
            return (step + 1) / n_warm
        done = (step - n_warm) / max(1, self.n_steps - n_warm)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


# ------------------------------------------------------------------------------ the loop


def train(
    net: Any,
    data: Dataset,
    n_epochs: int,
    chance: Chance,
    *,
    progress: Progress,
    stage: str = "epoch",
) -> None:
    """Run epochs that draw from `chance`; the bar counts them.

    Raises
    ------
    Interrupted
        On Ctrl-C. The net is as it then was, and `n_done` of the epochs are in its history.
    """
    n_before = len(net.history)
    net.chance = chance
    if n_epochs:
        progress.stage(stage, n_epochs)
    net.notify("on_train_begin", X=data, y=None)
    try:
        _run_epochs(net, data, n_epochs)
    except Interrupted as interrupted:
        interrupted.n_done = len(net.history) - n_before
        raise
    if net.history:  # skorch's early stopping looks at the last epoch
        net.notify("on_train_end", X=data, y=None)


def _run_epochs(net: skorch.NeuralNet, data: Dataset, n_epochs: int) -> None:
    """Run epochs until a callback ends them; one that was cut off is not recorded."""
    try:
        with ctrl_c():
            net.fit_loop(data, epochs=n_epochs)
    except Interrupted:
        raise
    except KeyboardInterrupt:  # how a callback ends a training
        pass
    finally:
        net.module_.eval()
        net.history[:] = [epoch for epoch in net.history if "train_loss" in epoch]


def recorded(net: skorch.NeuralNet) -> list[dict[str, Any]]:
    """Return the numbers and the words that were recorded of each epoch."""
    return [
        {
            name: value if isinstance(value, str | int) else float(value)
            for name, value in epoch.items()
            if isinstance(value, (str, int, float, np.number, np.bool_))
        }
        for epoch in net.history
    ]
