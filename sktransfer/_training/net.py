"""Training by skorch: the nets, their callbacks, and the loop."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import skorch
import torch
from skorch.callbacks import Callback, EarlyStopping, LRScheduler
from skorch.helper import predefined_split
from skorch.utils import to_tensor
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from sktransfer._training.data import TrainingData
from sktransfer._training.heads import Loss

_WARM_UP = 0.1  # of all steps


# ------------------------------------------------------------------------------ skorch


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

        def run(piece: int) -> dict[str, Any]:
            self.module_.zero_grad()  # of an attempt that did not fit
            return self._train_in_pieces(X, y, piece, **fit_params)

        piece = self.module_.piece(len(y))
        if self.module_.moves_statistics:  # a part of a batch has others
            return run(piece)
        return self.module_.frozen.runner.in_smaller_steps(run, piece)

    def _train_in_pieces(self: Any, X: Any, y: Any, piece: int, **fit_params: Any) -> Any:
        loss, outputs = 0.0, []
        for first in range(0, len(y), piece):
            part = slice(first, first + piece)
            X_part = {name: values[part] for name, values in X.items()}
            found = self.infer(X_part, **fit_params)
            share = len(found) / len(y)
            of_part = share * self.get_loss(found, y[part], X=X_part, training=True)
            of_part.backward()
            loss = loss + of_part.detach()
            outputs.append(found.detach())
        return {"loss": loss, "y_pred": torch.cat(outputs)}


class _Classifier(_InPieces, skorch.NeuralNetClassifier):
    pass


class _Labeller(_InPieces, skorch.NeuralNet):
    pass


class _Regressor(_InPieces, skorch.NeuralNetRegressor):
    pass


_NETS: dict[str, Any] = {"class": _Classifier, "label": _Labeller, "value": _Regressor}


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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: unlike a callback's KeyboardInterrupt, by which skorch ends a training early."""


@contextmanager
def _ctrl_c() -> Iterator[None]:
    """Turn Ctrl-C into `Interrupted`, where this thread is the one that gets it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def stop(*_: Any) -> None:
        raise Interrupted

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def make_net(
    module: nn.Module,
    kind: str,
    groups: list[dict[str, Any]],
    valid: TrainingData | None,
    *,
    n_outputs: int,
    max_epochs: int,
    batch_size: int,
    patience: int,
    callbacks: Sequence[Any],
    schedule: Callable[[int], float] | None,
    seed: int,
    progress: Progress,
    verbose: int,
    net_class: Any = None,
    criterion: nn.Module | None = None,
) -> skorch.NeuralNet:
    """Compose the skorch net that trains `module`; its table is shown from `verbose=2` on.

    `kind` says which net and which loss, unless they are given.
    """
    sink = tqdm.write if verbose > 1 else print  # what is printed would tear the bar apart
    own: list[Any] = [("watch", Watch()), ("progress", progress)]
    if schedule is not None:
        policy = LRScheduler(LambdaLR, lr_lambda=schedule, last_epoch=-1, step_every="batch")
        own.append(("schedule", policy))
    if valid is not None:
        own.append(("early_stopping", EarlyStopping(patience=patience, load_best=True, sink=sink)))
    # skorch's classifier has a score of its own, which asks for the classes.
    classes = {"classes": list(range(n_outputs))} if kind == "class" else {}
    net = (net_class or _NETS[kind])(
        module,
        criterion=criterion or Loss(kind),
        optimizer=lambda *_, **__: torch.optim.AdamW(groups, fused=True),
        max_epochs=max_epochs,
        batch_size=batch_size,
        train_split=None if valid is None else predefined_split(valid),
        iterator_train__shuffle=True,
        iterator_train__generator=torch.Generator().manual_seed(seed),
        iterator_train__collate_fn=_as_is,
        iterator_valid__collate_fn=_as_is,
        callbacks=[*own, *callbacks],
        device=str(next(module.parameters()).device),
        verbose=verbose > 1,
        callbacks__print_log__sink=sink,
        **classes,
    )
    return net.initialize()


def _as_is(batch: Any) -> Any:
    return batch


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


def train(net: skorch.NeuralNet, data: Dataset, n_epochs: int) -> None:
    """Run epochs; `Interrupted` on Ctrl-C, the net as it then was."""
    net.notify("on_train_begin", X=data, y=None)
    try:
        with _ctrl_c():
            net.fit_loop(data, epochs=n_epochs)
    except Interrupted:
        raise
    except KeyboardInterrupt:  # how a callback ends a training
        pass
    finally:
        net.module_.eval()
        net.history[:] = [epoch for epoch in net.history if "train_loss" in epoch]
    if net.history:  # skorch's early stopping looks at the last epoch
        net.notify("on_train_end", X=data, y=None)
