"""A fine-tuned network in one piece: what training and prediction run in two."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._engine.runner import Runner
from sktransfer._training.trainer import Trainer
from sktransfer.models._modules import copy_of


class WholeNetwork(nn.Module):
    """Blocks one after the other, the pooling, and a head.

    Activations are rounded at the frozen cuts as `FrozenBlocks` rounds them, so that it says what
    the estimator says. All in float32; nothing in it is shared with the estimator.

    Parameters
    ----------
    blocks : list of nn.Module
        From the normalised image to the embedding; number i leads to position i + 1.
    n_rounded : int
        Of so many of them, the results are rounded.
    frozen : FrozenBlocks or None
        Pools and rounds; None for a network that is used as it is.
    head : nn.Module
    """

    frozen: FrozenBlocks | None

    def __init__(
        self,
        blocks: list[nn.Module],
        n_rounded: int,
        frozen: FrozenBlocks | None,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.blocks = copy_of(nn.ModuleList(blocks))
        self.head = copy_of(head)
        self.n_rounded = n_rounded
        self.__dict__["frozen"] = frozen  # not a part of this module
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn normalised images (n, 3, height, width) into outputs (n, n_outputs)."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i < self.n_rounded and self.frozen is not None:
                x = self.frozen.round(x).float()
        if self.frozen is not None:
            x = self.frozen.pool(x)
        return self.head(x)


def whole_of_trainer(trainer: Trainer) -> WholeNetwork:
    """Return frozen and trained blocks with the new head, on the trainer's device."""
    frozen, part = trainer.frozen, trainer.net.module_
    before = [frozen.runner.segment(i, frozen.size) for i in range(part.cut)]
    n_rounded = min(part.cut, frozen.embedding - 1)
    return WholeNetwork([*before, *part.blocks], n_rounded, frozen, part.head)


def whole_of_runner(runner: Runner, image_size: tuple[int, int]) -> WholeNetwork:
    """Return a network as it is, in blocks."""
    blocks: list[Any] = [runner.segment(i, image_size) for i in range(runner.embedding)]
    head: nn.Module = nn.Identity()
    if runner.can_be_cut:
        head = runner.trace.slice(runner.embedding, runner.trace.output, image_size)
    return WholeNetwork(blocks, 0, None, head)
