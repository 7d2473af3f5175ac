"""The trained part of a network: what follows the cut."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sktransfer._engine.device import check_readable
from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._engine.program import Program
from sktransfer._torch_state import as_on, float32_by_default, network_lock, trained_tensors
from sktransfer._training.cut import Unfrozen
from sktransfer._training.depthwise import FastDepthwise
from sktransfer.models._modules import copy_of

_PIECE = 20e6  # bytes of the largest tensor on a CPU, see benchmarks/pieces.py


class TrainedPart(nn.Module):
    """What follows the cut: blocks, the pooling and a head.

    A head on several layers sees the rows of those in front of the cut as well.

    Parameters
    ----------
    frozen : FrozenBlocks
        Of the shared network; its blocks behind the cut are copied.
    start : int
        Where batches come from; what lies between it and the cut is run frozen.
    unfrozen : Unfrozen
    head : nn.Module
    step : int
        Images that frozen blocks take at once.
    moves_statistics : bool
        Whether batch-norms in the trained blocks use, and update, statistics of the batch.
    precision : {"float32", "bfloat16"}, default=None
        What training steps compute in if there are blocks; by default, what predictions do.
    """

    frozen: FrozenBlocks
    start: int
    cut: int

    def __init__(
        self,
        frozen: FrozenBlocks,
        start: int,
        unfrozen: Unfrozen,
        head: nn.Module,
        step: int,
        moves_statistics: bool,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        self.start, self.cut, self.step = start, unfrozen.cut, step
        self.largest_piece = sys.maxsize  # fewer images once the memory did not suffice
        self.moves_statistics = moves_statistics
        self.program: Program | None = None  # from the images to the cut, see `get_ready`
        self.__dict__["frozen"] = frozen  # not a part of this module: neither saved nor trained
        numbers = range(unfrozen.cut, frozen.embedding)
        segments = [frozen.runner.segment(i, frozen.size) for i in numbers]
        self.blocks = copy_of(nn.ModuleList(segments))
        self.precision = precision if len(self.blocks) else None  # a head alone gains nothing
        self.is_trained = [unfrozen.trains(i) for i in numbers]
        standing = self._standing(segments)
        for i, segment in enumerate(segments):
            pairs = zip(self.blocks[i].parameters(), segment.parameters(), strict=True)
            for parameter, original in pairs:
                is_free = self.is_trained[i] and original not in standing
                parameter.requires_grad_(is_free and parameter.is_floating_point())
        self.head = head
        self.to(frozen.runner.device)

    def _standing(self, segments: Sequence[nn.Module]) -> set[nn.Parameter]:
        """Return the weights of the frozen blocks, some of which trained ones may have as well."""
        standing = set[nn.Parameter]()
        if any(self.is_trained):
            before = [self.frozen.runner.segment(i, self.frozen.size) for i in range(self.cut)]
            pairs = zip(segments, self.is_trained, strict=True)
            frozen = [*before, *(segment for segment, is_trained in pairs if not is_trained)]
            standing.update(weight for segment in frozen for weight in segment.parameters())
        return standing

    def forward(
        self,
        stored: torch.Tensor,
        start: int | None = None,
        weights: Any = None,
        passed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Turn a batch that is stored at `start` into outputs (n, n_outputs).

        The weights of the images come with a batch, but only the loss needs them. `passed` are the
        stored rows of layers in front of the cut.
        """
        start = self.start if start is None else start
        runner = self.frozen.runner
        with network_lock.shared(), float32_by_default(), as_on(runner.device), FastDepthwise():
            x = self._at_cut(stored, start)
            with runner.autocast(self.precision if self.training else None):
                if self.cut < self.frozen.embedding:
                    x = self._embedding(x, passed)
                return self.head(x).float()

    def _embedding(self, x: torch.Tensor, passed: torch.Tensor | None) -> torch.Tensor:
        """Return what the head sees of what lies at the cut, and of rows in front of it."""
        rows = self.frozen.split_passed(passed)
        for position, block in enumerate(self.blocks, start=self.cut + 1):
            x = block(x)
            rows |= self.frozen.rows_at(x, position)
        return self.frozen.joined(rows)

    def _at_cut(self, stored: torch.Tensor, start: int) -> torch.Tensor:
        if start >= self.cut:
            return self.frozen.unpack(stored, start)
        assert self.program is not None
        (x,) = self.frozen.activations(self.program, stored, [self.cut], self.step)
        return x

    def get_ready(self) -> None:
        """Make what runs the frozen blocks, if batches start from the images.

        That takes a while, in which a training step would keep others from their networks.
        """
        if self.start < self.cut:
            self.program = self.frozen.program(self.cut)

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
        check_readable(self.frozen.runner.device)
        return {k: v.detach().cpu().numpy().copy() for k, v in self._trained_values().items()}

    def load_trained_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `trained_state` returned."""
        whole = self.state_dict()  # no plain dict: it has the versions of modules as well
        whole.update(trained_tensors(state, self._trained_values()))
        self.load_state_dict(whole)

    def _trained_values(self) -> dict[str, torch.Tensor]:
        prefixes = [f"blocks.{i}." for i, is_trained in enumerate(self.is_trained) if is_trained]
        return {
            name: value
            for name, value in self.state_dict().items()
            # What is quantised is never trained.
            if name.startswith((*prefixes, "head.")) and _is_plain(value)
        }

    def rated_parts(
        self, lr: float, head_lr: float, lr_decay: float
    ) -> list[tuple[list[nn.Parameter], float]]:
        """Return the parameters of the head, then of each trained block from the last on.

        Each comes with its learning rate, which falls by `lr_decay` from block to block.
        """
        depth, parts = 0, [(list(self.head.parameters()), head_lr)]
        for block, is_trained in zip(reversed(self.blocks), reversed(self.is_trained), strict=True):
            parameters = list(block.parameters())
            if is_trained and parameters:
                parts.append((parameters, lr * lr_decay**depth))
                depth += 1
        return parts


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_quantized
