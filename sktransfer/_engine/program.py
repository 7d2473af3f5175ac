"""The one executor: from the images to what a network has at some of its cuts, as one program.

What is asked for at a cut is an activation or a pooled row. A row is exact. An activation is
rounded to half precision, once, behind all that was computed from the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from sktransfer._engine.cut_network import layout_of, pool
from sktransfer._engine.device import fetch
from sktransfer._torch_state import network_lock
from sktransfer.models._modules import copy_of
from sktransfer.transforms import Preprocessing

if TYPE_CHECKING:
    from sktransfer._engine.runner import Runner

ACTIVATION = "activation"
LARGEST = 65504  # of what half precision holds


class Output(NamedTuple):
    """What is asked for at a cut.

    Attributes
    ----------
    position : int or None
        See `CutNetwork`.
    form : str
        `"activation"`, or the pooling of a row.
    """

    position: int | None
    form: str

    @property
    def is_row(self) -> bool:
        return self.form != ACTIVATION


# ------------------------------------------------------------------------------ stored forms


def half_of(precision: str) -> torch.dtype:
    """Return the half precision in which activations are kept."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float16


def round_to_half(x: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    """Round to the nearest that half precision holds.

    Infinity is left as it is: it is an error, which the stream reports.
    """
    if x.dtype != torch.float32 or half != torch.float16:
        return x.to(half)
    if x.device.type == "cpu" and x.amax() <= LARGEST and x.amin() >= -LARGEST:
        return x.to(half)  # faster; a GPU would have to be waited for
    return torch.where(x.isinf(), x, x.clamp(-LARGEST, LARGEST)).to(half)


def stored_form(x: torch.Tensor, output: Output, half: torch.dtype, layout: str) -> torch.Tensor:
    """Bring a result to the form in which it is kept: maps have their channels last."""
    if output.is_row:
        return x
    x = round_to_half(x, half)
    x = (x.permute(0, 2, 3, 1) if layout == "map" else x).contiguous()
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x  # NumPy has no bfloat16


# ------------------------------------------------------------------------------ programs


class Block:
    """Images (n, h, w, 3) that lie side by side.

    Those for a GPU lie in memory from which it copies them without a wait. Threads that load images
    put them there: the one thread that keeps the GPU at work copies nothing.

    Parameters
    ----------
    parts : sequence of Tensor of shape (k, h, w, 3)
    device : torch.device
        Of the network.
    """

    def __init__(self, parts: Sequence[torch.Tensor], device: torch.device) -> None:
        self.device = device
        if device.type != "cuda":
            self.images = (parts[0] if len(parts) == 1 else torch.cat(list(parts))).contiguous()
            return
        shape = sum(map(len, parts)), *parts[0].shape[1:]
        # Torch keeps this memory for later blocks: new memory costs more than the copy.
        self.images = torch.empty(shape, dtype=parts[0].dtype, device="cpu", pin_memory=True)
        torch.cat(list(parts), out=self.images)

    def split(self) -> list[OfBlock]:
        """Return the images one by one."""
        return [OfBlock(self, number) for number in range(len(self.images))]

    def on_device(self, numbers: Sequence[int]) -> torch.Tensor:
        """Return the images of some numbers, which rise, on the device."""
        first, end = numbers[0], numbers[-1] + 1
        images = self.images[first:end].to(self.device, non_blocking=True)
        return images if len(numbers) == end - first else images[[n - first for n in numbers]]


class OfBlock(NamedTuple):
    """An image of a block: those of one block come into a batch together."""

    block: Block
    number: int


class Outputs(nn.Module):
    """From uint8 images (n, 3, h, w) to a tensor for each output.

    Parameters
    ----------
    runner : Runner
    outputs : sequence of Output
    preprocessing : Preprocessing
    finish : callable or None
        What becomes of each result, as soon as it is there: results of many cuts take room.
    dtype : torch.dtype or None, default=None
        Of the weights, of which this then has copies, and of what lies between them; None for
        those that the network has.
    """

    def __init__(
        self,
        runner: Runner,
        outputs: Sequence[Output],
        preprocessing: Preprocessing,
        finish: Callable[[torch.Tensor, Output], torch.Tensor] | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.outputs, self.preprocessing, self.finish = list(outputs), preprocessing, finish
        self.dtype = dtype
        positions = {output.position for output in outputs}
        # Not registered: the slices are not this one's own.
        with network_lock.shared():  # a slice for another image size runs on shapes
            self.slices = runner.slices(positions, preprocessing.size)
            if dtype is not None:
                self.slices = [(at, copy_of(part).to(dtype)) for at, part in self.slices]
        self.n_prefix = {position: runner.n_prefix(position) for position in positions}

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.preprocessing.normalize(images)
        x = x if self.dtype is None else x.to(self.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        results: dict[Output, torch.Tensor] = {}
        for position, part in self.slices:
            x = part(x)
            for output in {o: None for o in self.outputs if o.position == position}:
                result = self._row(x, output) if output.is_row else x
                results[output] = result if self.finish is None else self.finish(result, output)
        return tuple(results[output] for output in self.outputs)

    def _row(self, x: torch.Tensor, output: Output) -> torch.Tensor:
        layout = layout_of(x.shape[1:], self.preprocessing.size)
        return pool(x.float(), layout, output.form, self.n_prefix[output.position])


class Program:
    """Runs a network on batches of images, up to some of its cuts.

    Parameters
    ----------
    run : callable
        From a uint8 batch (n, 3, h, w) on the device to results in their stored forms.
    device : torch.device
    runs_in_threads : bool, default=False
        Whether each image runs by itself, on one core, in whatever thread asks for it.

    Attributes
    ----------
    n_images : int
        That ran, those included that filled up a batch.
    """

    def __init__(
        self,
        run: Callable[[torch.Tensor], list[torch.Tensor]],
        device: torch.device,
        runs_in_threads: bool = False,
    ) -> None:
        self._run, self.device, self.runs_in_threads = run, device, runs_in_threads
        self.n_images = 0

    def __call__(self, images: Sequence[torch.Tensor | OfBlock], step: int) -> list[Any]:
        """Return for each output an array-like with a row for each image, uint8 (3, h, w).

        On a GPU they are copied while it goes on. Every batch has `step` images, the last is
        padded: a row then does not depend on the others that came with it.
        """
        step = self.step(step)
        parts: list[list[Any]] = []
        for start in range(0, len(images), step):
            batch = list(images[start : start + step])
            together = _batch(batch, step, self.device)
            parts.append([fetch(x) for x in self.results(together, len(batch))])
        columns = zip(*parts, strict=True)
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in columns]

    def step(self, step: int) -> int:
        """Return how many images it takes at once, if torch takes `step`."""
        return 1 if self.runs_in_threads else step

    def results(self, batch: torch.Tensor, n: int) -> list[torch.Tensor]:
        """Return the first `n` results for each output, on the device."""
        self.n_images += len(batch)
        results = self._run(to_device(batch, self.device))
        return results if n == len(batch) else [x[:n] for x in results]


def to_device(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Start to copy a batch to the device."""
    if device.type == "cuda" and batch.device.type == "cpu" and not batch.is_pinned():
        batch = batch.pin_memory()  # from memory that stays in place, the copy does not wait
    return batch.to(device, non_blocking=True)


def as_block(images: Sequence[torch.Tensor], device: torch.device) -> Block:
    """Put images (3, h, w) of one size side by side."""
    # By NumPy: torch lets other threads in between at each of so many operations.
    parts = [torch.from_numpy(image.numpy().transpose(1, 2, 0)[None]) for image in images]
    return Block(parts, device)


def _batch(
    images: Sequence[torch.Tensor | OfBlock], step: int, device: torch.device
) -> torch.Tensor:
    """Return a batch (step, 3, h, w) that repeats its first image; channels last, as they lie."""
    if len(images) == step == 1 and isinstance(images[0], torch.Tensor):
        return images[0][None]
    parts: list[torch.Tensor] = []  # (n, h, w, 3)
    for block, group in groupby(images, _block_of):
        if block is None:
            singles = [image for image in group if isinstance(image, torch.Tensor)]
            block, numbers = as_block(singles, device), list(range(len(singles)))
        else:
            numbers = [image.number for image in group if isinstance(image, OfBlock)]
        parts.append(block.on_device(numbers))
    if missing := step - len(images):
        parts.append(parts[0][:1].expand(missing, -1, -1, -1))
    return torch.cat(parts).permute(0, 3, 1, 2)


def _block_of(image: torch.Tensor | OfBlock) -> Block | None:
    return image.block if isinstance(image, OfBlock) else None
