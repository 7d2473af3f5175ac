"""The frozen blocks of a network: activations at its cuts in half precision, and its embedding.

All of them are computed from the image; an activation is rounded once, and is read at its own cut
alone. So a result does not depend on what the memory holds, nor on where a fit starts its epochs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from sktransfer._engine.augmentation import Views
from sktransfer._engine.cut_network import layout_of, pool
from sktransfer._engine.embedding import OutputsPass
from sktransfer._engine.layers import columns_of, poolings_of, rows_of
from sktransfer._engine.program import ACTIVATION, LARGEST, Output, Program, to_device
from sktransfer._engine.runner import Runner
from sktransfer._threads import one_core_threads
from sktransfer.transforms import Preprocessing


class FrozenBlocks:
    """What leads from an image to a cut.

    Positions are those of `TracedNetwork`; `embedding` has pooled float32 rows, those in front of
    it activations in half precision. One more, `passed`, stands for those of the rows that lie in
    front of the cut, if the embedding is made of layers on both sides of it.

    Parameters
    ----------
    runner : Runner
    preprocessing : Preprocessing
    pooling : {"avg", "max", "token", "flatten"} or tuple of these
    layer : int, str or list of these, default="auto"
        What the embedding is: the rows of an extractor with this `layer`.
    cut : int, default=None
        Where what is trained begins; None if nothing is.

    Attributes
    ----------
    rows : list of Output
        The pooled rows of which the embedding consists.
    passed_rows : list of Output
        Those in front of the cut; none if all of them are.
    columns : list of slice
        Where each lies in it.
    width : int
        The number of its features.
    """

    def __init__(
        self,
        runner: Runner,
        preprocessing: Preprocessing,
        pooling: Any,
        layer: Any = "auto",
        cut: int | None = None,
    ) -> None:
        self.runner, self.preprocessing = runner, preprocessing
        self.size = preprocessing.size
        self.embedding, self.passed = runner.embedding, runner.embedding + 1
        if layer == "auto" and not runner.can_be_cut:
            layer = "output"
        self.poolings = poolings_of(pooling)
        self.rows = rows_of(runner, layer, pooling, self.size)
        self.columns = columns_of(runner, self.rows, self.size)
        self.width = self.columns[-1].stop
        last = cut if cut is not None and cut < self.embedding else 0
        passed = [row for row in self.rows if row.position is not None and row.position <= last]
        self.passed_rows = passed
        self.half = runner.half

    @property
    def is_at_the_end(self) -> bool:
        """Whether the embedding is made of what the last block, and all behind it, have."""
        return {row.position for row in self.rows} == {self.runner.embedding_or_output}

    # ------------------------------------------------------------------------ outputs

    def outputs(self, positions: Sequence[int]) -> list[Output]:
        """Return what is asked for at positions: activations and, at the last, the embedding."""
        outputs: list[Output] = []
        for position in positions:
            outputs += self._rows(position) or [Output(position, ACTIVATION)]
        return outputs

    def _rows(self, position: int) -> list[Output]:
        """Return the rows of which the result at a position consists; none of an activation."""
        return {self.embedding: self.rows, self.passed: self.passed_rows}.get(position, [])

    def columns_at(self, position: int) -> list[slice]:
        """Return where each row lies in the result at a position."""
        return columns_of(self.runner, self._rows(position), self.size)

    def end(self, positions: Sequence[int]) -> int:
        """Return the last cut that is run to for the results at positions."""
        of_passed = [row.position or 0 for row in self.passed_rows]
        ends = [max(of_passed) if p == self.passed else p for p in positions]
        return max(ends)

    def kept_at(self, positions: Sequence[int]) -> list[Output]:
        """Return what is kept at some positions: at each the pooled rows, too, for extractors."""
        rows = [
            Output(position, pooling)
            for position in positions
            for pooling in self.poolings
            if position < self.embedding and self.runner.can_pool(position, pooling, self.size)
        ]
        return [*self.outputs(positions), *rows]

    def shape(self, position: int) -> tuple[int, ...]:
        """Return the shape of one image's result, as it is stored: maps have channels last."""
        if position == 0:
            return self.preprocessing.shape
        if position >= self.embedding:
            return (self.columns_at(position)[-1].stop,)
        shape = self.runner.shape(position, self.size)
        return (*shape[1:], shape[0]) if self._is_map(position) else shape

    def dtype(self, position: int) -> type[np.generic]:
        """Return the dtype in which results are stored; NumPy knows bfloat16 as its 16 bits."""
        if position == 0:
            return np.uint8
        if position >= self.embedding:
            return np.float32
        return np.int16 if self.half == torch.bfloat16 else np.float16

    def n_bytes(self, position: int) -> int:
        """Return the size of one image's stored result."""
        return int(np.prod(self.shape(position))) * np.dtype(self.dtype(position)).itemsize

    def _is_map(self, position: int) -> bool:
        return self.runner.layout(position, self.size) == "map"

    # ------------------------------------------------------------------------ tensors

    def unpack(self, stored: torch.Tensor, position: int) -> torch.Tensor:
        """Turn a stored batch into what the network takes at this position, float32."""
        x = to_device(stored, self.runner.device)
        if position == 0:
            x = self.preprocessing.normalize(x)
            return x.contiguous(memory_format=torch.channels_last)
        if position >= self.embedding:
            return x
        if x.dtype == torch.int16:
            x = x.view(torch.bfloat16)
        x = x.float()
        return x.permute(0, 3, 1, 2) if self._is_map(position) else x

    def program(self, *positions: int) -> Program:
        """Return what runs images to cuts; see `activations`."""
        return self.runner.program(self.outputs(positions), self.preprocessing)

    def activations(
        self, program: Program, images: torch.Tensor, positions: Sequence[int], step: int
    ) -> list[torch.Tensor]:
        """Run uint8 images (n, c, h, w) to cuts, by the batches in which `Activations` does.

        The results are float32, ready for what is trained behind the cuts. `program` is that of
        these positions: who runs a network, as in a training step, can't ask for it, see `Runner`.
        """
        step = program.step(step)
        n_outputs = [len(self.outputs([position])) for position in positions]

        def run(batch: torch.Tensor) -> list[torch.Tensor]:
            padding = batch[:1].expand(step - len(batch), *batch.shape[1:])
            stored = iter(program.results(torch.cat([batch, padding]), len(batch)))
            parts = [list(islice(stored, n)) for n in n_outputs]
            return [torch.cat(part, 1) if len(part) > 1 else part[0] for part in parts]

        batches = images.split(step)
        if program.runs_in_threads:
            with one_core_threads(torch.get_num_threads()) as threads:
                parts = list(threads.map(run, batches))
        else:
            parts = [run(batch) for batch in batches]
        with torch.no_grad():  # out of inference mode
            whole = map(torch.cat, zip(*parts, strict=True))
            return [self.unpack(x, p) for x, p in zip(whole, positions, strict=True)]

    def rows_at(self, x: torch.Tensor, position: int) -> dict[Output, torch.Tensor]:
        """Return those of the embedding's rows that are pooled from activations at a position.

        Behind the embedding, or that of a network that can't be cut, is the network's output.
        """
        end = self.runner.embedding_or_output
        name = None if end is None or position > end else position
        layout, n_prefix = layout_of(x.shape[1:], self.size), self.runner.n_prefix(name)
        rows = [row for row in self.rows if row.position == name]
        return {row: pool(x.float(), layout, row.form, n_prefix) for row in rows}

    def split_passed(self, stored: torch.Tensor | None) -> dict[Output, torch.Tensor]:
        """Return the rows in front of the cut, of a stored batch of them."""
        if stored is None:
            return {}
        x = self.unpack(stored, self.passed)
        columns = self.columns_at(self.passed)
        return {row: x[:, part] for row, part in zip(self.passed_rows, columns, strict=True)}

    def passed_of(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the rows in front of the cut, of embeddings; a view where they lie together."""
        parts = zip(self.rows, self.columns, strict=True)
        columns = np.r_[*(part for row, part in parts if row in self.passed_rows)]
        first, last = columns[0], columns[-1] + 1
        is_together = last - first == len(columns)
        return embeddings[:, first:last] if is_together else embeddings[:, columns]

    def joined(self, rows: dict[Output, torch.Tensor]) -> torch.Tensor:
        """Return the embedding (n, width) that consists of rows."""
        parts = [rows[row] for row in self.rows]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Round what the network has at a cut as kept activations are rounded, to float32."""
        if self.half == torch.float16:
            x = x.clamp(-LARGEST, LARGEST)  # nothing that depends on values: it is exported
        return x.to(self.half).float()

    # ------------------------------------------------------------------------ costs

    def is_worth_going_on(self, position: int) -> bool:
        """Tell whether a pass to a cut goes on to the embedding, for those who ask for it later.

        That costs the blocks behind the cut, and saves those before it, which would run again.
        """
        flops = self.flops()
        return sum(flops[position:]) <= sum(flops[:position])

    def flops(self) -> list[int]:
        """Return the floating-point operations from each position to the next, for one image."""
        return self.runner.flops(self.size)


class Activations(OutputsPass):
    """One pass over views of images to their results at some cuts.

    Parameters
    ----------
    frozen : FrozenBlocks
    positions : sequence of int
        Where the results are asked for, from 1 to ``frozen.passed``, in order.
    keep : collection of int
        Where the memory is to keep them, also of those that are only passed on the way.
    **options
        See `Stream`.
    """

    def __init__(
        self,
        frozen: FrozenBlocks,
        positions: Sequence[int],
        keep: Collection[int] = (),
        **options: Any,
    ) -> None:
        self.frozen, self.positions = frozen, list(positions)
        last = frozen.end(self.positions)
        is_kept = frozen.embedding in keep and options.get("memory") is not None
        if is_kept and last < frozen.embedding and frozen.is_worth_going_on(last):
            last = frozen.embedding
        kept = frozen.kept_at([position for position in keep if position <= last])
        wanted = frozen.outputs(self.positions)
        kept += [output for output in wanted if output.is_row and is_kept]
        super().__init__(frozen.runner, frozen.preprocessing, wanted, kept, **options)

    def __call__(self, views: Views, outs: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Return for each position an array with a row for each view, or fill those given."""
        if outs is None:
            outs = [self.empty(position, len(views)) for position in self.positions]
        pairs = zip(self.positions, outs, strict=True)
        self.fill(views, [part for pair in pairs for part in self._parts(*pair)])
        return list(outs)

    def _parts(self, position: int, out: np.ndarray) -> list[np.ndarray]:
        """Return the part of an array for each output at a position."""
        if position < self.frozen.embedding:
            return [out]
        return [out[:, columns] for columns in self.frozen.columns_at(position)]

    def empty(self, position: int, n: int) -> np.ndarray:
        """Return an array for `n` results."""
        return np.empty((n, *self.frozen.shape(position)), self.frozen.dtype(position))
