"""The frozen blocks of a network: activations at its cuts, through the memory.

An activation is rounded to half precision at every cut on its way. It is then the same whether it
comes from the image, from another activation or from the disk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sktransfer._engine.augmentation import Views
from sktransfer._engine.pooling import layout_of, pool
from sktransfer._engine.runner import Runner, network_lock
from sktransfer._engine.stream import Stream, Write
from sktransfer._threads import one_core_threads
from sktransfer._torch_state import float32_by_default
from sktransfer.transforms import Preprocessing

_LARGEST = 65504  # of what half precision holds
_VERSION = "blockwise 2"  # of the computation; a change that alters results needs another


class FrozenBlocks:
    """What leads from an image to a cut.

    Positions are those of `TracedNetwork`; the last one, `embedding`, has pooled float32 rows, the
    others have activations in half precision.

    Parameters
    ----------
    runner : Runner
    preprocessing : Preprocessing
    pooling : {"avg", "max", "token", "flatten"}
    """

    def __init__(self, runner: Runner, preprocessing: Preprocessing, pooling: str) -> None:
        self.runner, self.preprocessing, self.pooling = runner, preprocessing, pooling
        self.size = preprocessing.size
        self.embedding = runner.embedding
        self._whole = runner.embedding_or_output
        self.width = runner.width(self._whole, pooling, self.size)
        self.half = torch.bfloat16 if runner.precision == "bfloat16" else torch.float16

    def shape(self, position: int) -> tuple[int, ...]:
        """Return the shape of one image's result, as it is stored: maps have channels last."""
        if position == 0:
            return (3, *self.size)
        if position == self.embedding:
            return (self.width,)
        shape = self.runner.shape(position, self.size)
        return (*shape[1:], shape[0]) if self._is_map(position) else shape

    def dtype(self, position: int) -> type[np.generic]:
        """Return the dtype in which results are stored; NumPy knows bfloat16 as its 16 bits."""
        if position == 0:
            return np.uint8
        if position == self.embedding:
            return np.float32
        return np.int16 if self.half == torch.bfloat16 else np.float16

    def n_bytes(self, position: int) -> int:
        """Return the size of one image's stored result."""
        return int(np.prod(self.shape(position))) * np.dtype(self.dtype(position)).itemsize

    def key(self, position: int | str) -> str:
        """Name a position in the memory."""
        pooling = self.pooling if position == self.embedding else None
        exact = self.runner.key(self._whole, self.pooling, self.preprocessing)
        readable = exact.rpartition("-")[0]
        parts = (_VERSION, position, pooling, self._exact_key)
        return f"{readable}-{xxhash.xxh3_128_hexdigest(repr(parts).encode())}"

    @property
    def _exact_key(self) -> str:
        # One for all poolings: "flatten" is defined everywhere.
        return self.runner.key(self._whole, "flatten", self.preprocessing)

    def _is_map(self, position: int) -> bool:
        return layout_of(self.runner.shape(position, self.size), self.size) == "map"

    # ------------------------------------------------------------------------ tensors

    def unpack(self, stored: torch.Tensor, position: int) -> torch.Tensor:
        """Turn a stored batch into what the network takes at this position, float32."""
        x = stored.to(self.runner.device, non_blocking=True)
        if position == 0:
            x = self.preprocessing.normalize(x)
            return x.contiguous(memory_format=torch.channels_last)
        if position == self.embedding:
            return x
        if x.dtype == torch.int16:
            x = x.view(torch.bfloat16)
        x = x.float()
        return x.permute(0, 3, 1, 2) if self._is_map(position) else x

    def pack(self, x: torch.Tensor, position: int) -> np.ndarray:
        """Turn the result at a position into what is stored."""
        if position == self.embedding:
            return x.cpu().numpy()
        x = x.permute(0, 2, 3, 1) if self._is_map(position) else x
        x = x.contiguous().cpu()
        return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()

    def advance(
        self, x: torch.Tensor, start: int, stop: int, wanted: Collection[int] = ()
    ) -> dict[int, torch.Tensor]:
        """Run a batch from `start` to `stop`; return the results there and where `wanted`.

        Call it inside `Runner.running()`, with its lock held.
        """
        results = {start: x} if start == stop else {}
        for position in range(start + 1, stop + 1):
            (x,) = self.runner.block(position - 1, self.size)(x.float())
            x = self.pool(x) if position == self.embedding else self._round_finite(x)
            if position == stop or position in wanted:
                results[position] = x
        return results

    def advance_in_steps(
        self, stored: torch.Tensor, start: int, stop: int, step: int
    ) -> torch.Tensor:
        """Run a stored batch to `stop`, float32, by the batches in which `Activations` runs it."""

        def run(part: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                padding = part[:1].expand(step - len(part), *part.shape[1:])
                x = self.unpack(torch.cat([part, padding]), start)
                return self.advance(x, start, stop)[stop][: len(part)].float()

        first, *others = stored.split(step)
        parts = [run(first)]  # here, as it may compile, for which the caller holds the lock
        if self.runner.runs_in_threads:
            with one_core_threads(torch.get_num_threads()) as threads:
                parts += threads.map(run, others)
        else:
            parts += map(run, others)
        with torch.no_grad():
            return torch.cat(parts)  # out of inference mode: training goes on from it

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Reduce the network's last activations to one float32 row an image."""
        layout = layout_of(x.shape[1:], self.size)
        return pool(x.float(), layout, self.pooling, self.runner.n_prefix(self._whole))

    def _round_finite(self, x: torch.Tensor) -> torch.Tensor:
        """Round, but leave infinity as it is: it is an error, which the stream reports."""
        if x.dtype != torch.float32 or self.half != torch.float16:
            return x.to(self.half)
        if x.device.type == "cpu" and x.amax() <= _LARGEST and x.amin() >= -_LARGEST:
            return x.to(self.half)  # twice as fast; a GPU would have to be waited for
        return torch.where(x.isinf(), x, x.clamp(-_LARGEST, _LARGEST)).to(self.half)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Bring an activation to half precision."""
        if self.half == torch.float16 and x.dtype != torch.float16:
            x = x.clamp(-_LARGEST, _LARGEST)  # else infinity
        return x.to(self.half)

    # ------------------------------------------------------------------------ costs

    def flops(self) -> list[int]:
        """Return the floating-point operations from each position to the next, for one image."""
        if self.size not in self.runner.flops:
            # Counting adds hooks to the modules of all threads.
            self.runner.flops[self.size] = network_lock.alone(self._count_flops)
        return self.runner.flops[self.size]

    def _count_flops(self) -> list[int]:
        blank = torch.zeros(1, 3, *self.size, dtype=torch.uint8, device="cpu")
        counts = []
        with float32_by_default(), torch.inference_mode(), self.runner.autocast():
            x = self.unpack(blank, 0)
            for position in range(self.embedding):
                segment = self.runner.segment(position, self.size)
                # The counter does not know fused attention on a CPU: it would count nothing.
                with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                    x = segment(x.float())
                counts.append(counter.get_total_flops())
        return counts


class Activations(Stream):
    """One pass over views of images to their results at some cuts.

    Parameters
    ----------
    frozen : FrozenBlocks
    positions : sequence of int
        Where the results are asked for, from 1 to ``frozen.embedding``, in order.
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
        keys = [frozen.key(p) for p in positions]
        super().__init__(frozen.runner, frozen.size, keys, **options)
        self.frozen, self.positions = frozen, list(positions)
        self.keep = [] if self.memory is None else sorted(keep)
        self.claim_key = frozen.key("any")  # whoever runs an image keeps what others start from
        self.kept_keys = {frozen.key(p) for p in self.keep}

    def __call__(self, views: Views, outs: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Return for each position an array with a row for each view, or fill those given."""
        if outs is None:
            outs = [self.empty(position, len(views)) for position in self.positions]
        self._fill_outs(views, outs)
        return list(outs)

    def empty(self, position: int, n: int) -> np.ndarray:
        """Return an array for `n` results."""
        return np.empty((n, *self.frozen.shape(position)), self.frozen.dtype(position))

    def _load(self, row: int, digest: bytes | None) -> tuple[int, torch.Tensor]:
        """Fetch the nearest kept activation in front of what is asked for, else the image."""
        if self.memory is not None and digest is not None:
            for position in range(self.positions[0], 0, -1):
                found = self.empty(position, 1)
                if self.memory.read(self.frozen.key(position), [digest], found)[0]:
                    return position, torch.from_numpy(found[0])
        return 0, self._images.load(row, digest)

    def _run(
        self, loaded: list[tuple[int, torch.Tensor]], digests: list[bytes]
    ) -> tuple[list[np.ndarray], list[Write]]:
        values = [self.empty(position, len(loaded)) for position in self.positions]
        extras: list[Write] = []
        for start in {start for start, _ in loaded}:
            numbers = [i for i, (first, _) in enumerate(loaded) if first == start]
            for some in _pieces(numbers, self.step):
                results = self._step(start, [loaded[i][1] for i in some])
                for value, position in zip(values, self.positions, strict=True):
                    value[some] = results[position]
                extras += [
                    Write(self.frozen.key(position), [digests[i] for i in some], rows)
                    for position, rows in results.items()
                    if position in self.keep and position not in self.positions
                ]
        return values, extras

    def _step(self, start: int, stored: list[torch.Tensor]) -> dict[int, np.ndarray]:
        """Run a batch, padded: a result then does not depend on the others that came with it."""
        batch = torch.stack(stored + stored[:1] * (self.step - len(stored)))
        stop = self.positions[-1]
        wanted = {p for p in {*self.keep, *self.positions} if start < p <= stop}
        with self.frozen.runner.lock, self.frozen.runner.running():
            x = self.frozen.unpack(batch, start)
            results = self.frozen.advance(x, start, stop, wanted)
            packed = {p: self.frozen.pack(x, p)[: len(stored)] for p, x in results.items()}
        if start in self.positions:
            packed[start] = torch.stack(stored).numpy()
        return packed


def _pieces(items: Sequence[int], size: int) -> Iterable[list[int]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))
