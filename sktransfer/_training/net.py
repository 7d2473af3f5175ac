"""The trained part of a network, and its training by skorch."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import skorch
import torch
from skorch.callbacks import Callback, EarlyStopping, LRScheduler
from skorch.helper import predefined_split
from skorch.utils import to_tensor
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._engine.runner import network_lock
from sktransfer._torch_state import float32_by_default, trained_tensors
from sktransfer._training.data import TrainingData
from sktransfer._training.depthwise import FastDepthwise
from sktransfer._training.progress import Progress
from sktransfer.models._modules import copy_of

_WARM_UP = 0.1  # of all steps
_PIECE = 20e6  # bytes of the largest tensor on a CPU, see benchmarks/pieces.py


# ------------------------------------------------------------------------------ the network


class TrainedPart(nn.Module):
    """What follows the cut: blocks, the pooling and a head.

    Parameters
    ----------
    frozen : FrozenBlocks
        Of the shared network; its blocks behind the cut are copied.
    start : int
        Where batches come from; what lies between it and the cut is run frozen.
    cut : int
    unfrozen : set of int
        Numbers of the trained blocks.
    head : nn.Module
    step : int
        Images that frozen blocks take at once.
    moves_statistics : bool
        Whether batch-norms in the trained blocks use, and update, statistics of the batch.
    """

    frozen: FrozenBlocks
    start: int
    cut: int

    def __init__(
        self,
        frozen: FrozenBlocks,
        start: int,
        cut: int,
        unfrozen: set[int],
        head: nn.Module,
        step: int,
        moves_statistics: bool,
    ) -> None:
        super().__init__()
        self.start, self.cut, self.step = start, cut, step
        self.largest_piece = sys.maxsize  # fewer images once the memory did not suffice
        self.moves_statistics = moves_statistics
        self.__dict__["frozen"] = frozen  # not a part of this module: neither saved nor trained
        segments = [frozen.runner.segment(i, frozen.size) for i in range(cut, frozen.embedding)]
        self.blocks = copy_of(nn.ModuleList(segments))
        # What lies behind the last block belongs to it.
        last = frozen.embedding - 2
        self.is_trained = [min(i, max(last, 0)) in unfrozen for i in range(cut, frozen.embedding)]
        for block, is_trained in zip(self.blocks, self.is_trained, strict=True):
            for parameter in block.parameters():
                parameter.requires_grad_(is_trained and parameter.is_floating_point())
        self.head = head
        self.to(frozen.runner.device)

    def forward(
        self, stored: torch.Tensor, start: int | None = None, weights: Any = None
    ) -> torch.Tensor:
        """Turn a batch that is stored at `start` into outputs (n, n_outputs).

        The weights of the images come with a batch, but only the loss needs them.
        """
        frozen, start = self.frozen, (self.start if start is None else start)
        with network_lock, float32_by_default(), frozen.runner.autocast(), FastDepthwise():
            if start < self.cut:  # at the images
                x = frozen.activations(stored, self.cut, self.step)
            else:
                x = frozen.unpack(stored, start)
            for block in self.blocks:
                x = block(x)
            if self.cut < frozen.embedding:
                x = frozen.pool(x)
            return self.head(x).float()

    def piece(self, batch_size: int) -> int:
        """Return how many images of a batch are trained on at once."""
        runner, size = self.frozen.runner, self.frozen.size
        if self.moves_statistics:  # a part of a batch has others
            return batch_size
        if self.cut == self.frozen.embedding or runner.device.type != "cpu":
            return min(batch_size, self.largest_piece)
        n_pieces = math.ceil(batch_size / max(1, runner.fitting(self.cut, size, _PIECE)))
        # Pieces of about one size.
        return min(math.ceil(batch_size / n_pieces), self.largest_piece)

    def train(self, mode: bool = True) -> TrainedPart:
        """Set the mode; frozen blocks stay in eval mode, so their statistics never move."""
        super().train(mode)
        for block, is_trained in zip(self.blocks, self.is_trained, strict=True):
            if not is_trained:
                block.eval()
        if not self.moves_statistics:
            self.hold_statistics()
        return self

    def hold_statistics(self) -> None:
        """Let batch-norms use their own statistics; those of one image would be none."""
        for module in self.blocks.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def trained_state(self) -> dict[str, np.ndarray]:
        """Return what cannot be rebuilt: the trained blocks and the head."""
        return {k: v.detach().cpu().numpy().copy() for k, v in self._trained_values().items()}

    def load_trained_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `trained_state` returned."""
        own = self.state_dict()  # not a dict of its values: it has the versions of modules as well
        own.update(trained_tensors(state, self._trained_values()))
        self.load_state_dict(own)

    def _trained_values(self) -> dict[str, torch.Tensor]:
        own = {f"blocks.{i}." for i, trained in enumerate(self.is_trained) if trained} | {"head."}
        return {
            name: value
            for name, value in self.state_dict().items()
            # What is quantised is never trained.
            if name.startswith(tuple(own)) and _is_plain(value)
        }

    def parameter_groups(
        self, lr: float, head_lr: float, lr_decay: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Return the trained parameters with their learning rates; only matrices decay."""
        depth, groups = 0, []
        parts: list[tuple[nn.Module, float]] = [(self.head, head_lr)]
        for block, is_trained in zip(reversed(self.blocks), reversed(self.is_trained), strict=True):
            if is_trained and any(True for _ in block.parameters()):
                parts.append((block, lr * lr_decay**depth))
                depth += 1
        for part, rate in parts:
            trained = [p for p in part.parameters() if p.requires_grad]
            for some, decay in (
                ([p for p in trained if p.ndim > 1], weight_decay),
                ([p for p in trained if p.ndim <= 1], 0.0),
            ):
                if some:
                    groups.append({"params": some, "lr": rate, "weight_decay": decay})
        return groups


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_quantized


# ------------------------------------------------------------------------------ skorch


class Loss(nn.Module):
    """Cross-entropy of classes or labels, or squared error of values: one loss for each image."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the losses (n,)."""
        if self.kind == "class":
            return F.cross_entropy(outputs, y, reduction="none")
        if self.kind == "label":
            return F.binary_cross_entropy_with_logits(outputs, y, reduction="none").mean(1)
        return F.mse_loss(outputs, y, reduction="none").mean(1)


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
