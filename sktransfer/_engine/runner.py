"""One copy of a network on a device: slices of its blocks run on a batch, pooled to rows."""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
import xxhash
from torch import nn

from sktransfer._config import get_config
from sktransfer._engine.device import (
    PRECISIONS,
    fetch,
    first_line,
    free_memory,
    is_out_of_memory,
    numerics,
    resolve_device,
    warn_of_copies,
)
from sktransfer._engine.pooling import layout_of, pool
from sktransfer._engine.runtime import (
    OpenVinoProgram,
    Program,
    fold_batch_norms,
    forget_openvino,
    reason_of,
    resolve_runtime,
    warn_fallback,
    warn_without_instructions,
)
from sktransfer._threads import call_in_forks, renewed_in_forks
from sktransfer._torch_state import float32_by_default, network_lock
from sktransfer.models import Backbone
from sktransfer.models._blocks import TracedNetwork, TracingError
from sktransfer.models._modules import OutputError, Whole, copy_of
from sktransfer.models._weights import Describer
from sktransfer.transforms import Preprocessing

# What a CPU takes at once: few images, see benchmarks/batch_size.py, and fewer of large ones. The
# C library gets larger tensors anew from the system every time, which costs more than it saves.
_CPU_STEP = 4
_CPU_BYTES = 20e6
_BATCH = 32  # of images in flight
_GPU_BATCH = 256  # at most
_GPU_SHARE = 0.1  # of the free memory that the largest tensor may take; a few are alive at once
_VERSION = 2  # of the computation; a change that alters rows makes old entries unreachable
_T = TypeVar("_T")
_runners_lock = renewed_in_forks(threading.Lock())
_building = renewed_in_forks(threading.RLock())  # of programs, each of which is built once
_all_runners: WeakSet[Runner] = WeakSet()  # also those of fitted estimators


def get_runner(
    backbone: Backbone,
    device: str | torch.device,
    precision: str,
    runtime: str = "auto",
    image_size: tuple[int, int] | None = None,
) -> Runner:
    """Return this process's one copy of `backbone` on this device in this precision.

    `image_size` is that of the images to come, if it is known.
    """
    resolved = resolve_device(device)
    runners = backbone.runners
    asked = (resolved, precision, runtime)
    with _runners_lock, torch.inference_mode(False):
        runner = runners.get(asked) or _new_runner(runners, backbone, asked)
    if image_size is not None:
        runner.add_size(image_size)
    return runner


def _new_runner(runners: dict[Any, Runner], backbone: Backbone, asked: Any) -> Runner:
    resolved, precision, runtime = asked
    warn_without_instructions(precision, resolved)
    warn_of_copies(resolved)
    chosen = resolve_runtime(runtime, resolved, precision, backbone.network, backbone.name)
    key = (resolved, precision, chosen)
    runners[key] = runners.get(key) or Runner(backbone, resolved, precision, chosen)
    runners[asked] = runners[key]
    return runners[asked]


def _after_fork() -> None:
    """Let a forked child compute on torch, on one core.

    It has none of its parent's threads: OpenMP, through which torch uses several cores, and
    OpenVINO would wait for them forever; torch's may be of a network that is not ours.
    """
    torch.set_num_threads(1)
    forget_openvino([runner._programs for runner in _all_runners])
    for runner in _all_runners:
        runner.backbone.runners.clear()
        runner.runtime, runner._programs, runner._n_cores = "torch", {}, 1


call_in_forks(_after_fork)


class Runner:
    """A backbone on a device, in a precision, cut where it is asked to be.

    Parameters
    ----------
    backbone : Backbone
    device : torch.device
    precision : {"float32", "bfloat16", "float16"}
        Below float32, the operations that lose nothing by it run in it (torch's autocast).
    runtime : {"torch", "openvino"}
    """

    def __init__(
        self, backbone: Backbone, device: torch.device, precision: str, runtime: str = "torch"
    ) -> None:
        self.backbone = backbone  # which stays loaded as long as this is used
        self.name, self.fingerprint = backbone.name, backbone.fingerprint
        self.device, self.precision, self.runtime = device, precision, runtime
        network = backbone.network
        if device.type != "cpu":
            network = copy_of(network).to(device)
        self.network: nn.Module = network.to(memory_format=torch.channels_last)
        self._image_size = backbone.preprocessing.size
        self._sizes = [self._image_size]  # by which blocks are looked for
        self._traced: TracedNetwork | None = None
        self._why_whole = ""  # why it can't be cut, at the last of the sizes
        self._shapes: dict[Any, tuple[int, ...]] = {}
        self.most = sys.maxsize  # images at once; fewer once the memory did not suffice
        # As many cores as torch may use here, which joblib limits in its workers.
        self._n_cores = torch.get_num_threads()
        self._programs: dict[Any, Program] = {}
        _all_runners.add(self)
        self.flops: dict[tuple[int, int], list[int]] = {}  # see FrozenBlocks.flops

    def add_size(self, image_size: tuple[int, int]) -> None:
        """Look for blocks at this size, too, if the backbone's own size shows none.

        A network of the user's own may take images of one size, which only the user knows.
        """
        if self._traced is None and image_size not in self._sizes:
            network_lock.alone(lambda: self._add_size(image_size))

    def _add_size(self, image_size: tuple[int, int]) -> None:
        # Looked at right away: who runs this network must not find that it is to be traced again.
        was_traced, self._why_whole = bool(self._why_whole), ""
        self._sizes.append(image_size)
        if was_traced:
            self._find_blocks()

    @property
    def trace(self) -> TracedNetwork:
        """The network as a list of blocks; raises TracingError if it can't be cut."""
        if self._traced is None and not self._why_whole:
            network_lock.alone(self._find_blocks)
        if self._traced is None:
            raise TracingError(self._why_whole)
        return self._traced

    def _find_blocks(self) -> None:
        why = ""
        for size in self._sizes:
            if self._traced is not None or self._why_whole:
                return  # by now another thread has found them, or that there are none
            try:
                with float32_by_default():
                    self._traced = TracedNetwork(self.network, size)
            except TracingError as error:
                why = self._advice(size, error)
        if self._traced is None:
            self._why_whole = why

    def _advice(self, image_size: tuple[int, int], error: TracingError) -> str:
        """Say why the network can't be cut or, if it can't run whole either, only why not."""
        try:
            self._find_whole_shape(image_size)
        except (OutputError, ValueError) as failure:
            return str(failure)
        return (
            f"{error} The whole network can still be used: by an extractor with layer='output', or "
            "with unfreeze=0 or 'all' where a new head is trained."
        )

    @property
    def can_be_cut(self) -> bool:
        """Whether it has known positions, though maybe no blocks; else it is run whole."""
        try:
            return bool(self.trace)
        except TracingError:
            return False

    @property
    def block_names(self) -> list[str]:
        """The names of the blocks; empty if there are none, or if the network can't be cut."""
        return list(self.trace.names) if self.can_be_cut else []

    def position(self, layer: int | str) -> int | None:
        """Return the cut behind `layer`; None stands for the output of the whole network."""
        return None if layer == "output" else self.trace.position(layer)

    @property
    def embedding(self) -> int:
        """The position of the embedding, behind the blocks; of a network without any, 1."""
        return len(self.block_names) + 1

    @property
    def embedding_or_output(self) -> int | None:
        """The position of the embedding, None where this is the output of the whole network."""
        return self.embedding if self.can_be_cut else None

    def segment(self, start: int, image_size: tuple[int, int]) -> nn.Module:
        """Return the network from a position to the next; whole if it can't be cut."""
        if not self.can_be_cut:
            return Whole(self.network).eval()
        with network_lock.shared():
            return self.trace.slice(start, start + 1, image_size)

    @property
    def runs_in_threads(self) -> bool:
        """Whether each image runs by itself, on one core, in whatever thread asks for it."""
        return self.runtime == "openvino"

    def batch_size(self, given: int | str, image_size: tuple[int, int]) -> int:
        """Return the images in flight: those given or, if `"auto"`, what suits the device."""
        if given != "auto":
            return int(given)
        if self.device.type != "cuda":
            return _BATCH
        fitting = self.fitting(0, image_size, free_memory(self.device) * _GPU_SHARE)
        return max(1, min(_GPU_BATCH, 2 ** int(math.log2(max(1, fitting)))))

    def step(self, batch_size: int | str, image_size: tuple[int, int]) -> int:
        """Return how many of a batch's images to run at once: on a GPU all, on a CPU few."""
        if self.runs_in_threads:
            return 1
        batch_size = min(self.batch_size(batch_size, image_size), self.most)
        if self.device.type != "cpu":
            return batch_size
        fitting = self.fitting(0, image_size, _CPU_BYTES)
        return max(1, min(batch_size, _CPU_STEP, fitting))

    def fitting(self, start: int, image_size: tuple[int, int], n_bytes: float) -> int:
        """Return of how many images the largest float32 tensor behind `start` takes `n_bytes`."""
        if not self.can_be_cut:
            return _CPU_STEP
        return int(n_bytes / (4 * self.trace.largest(start, self.embedding, image_size)))

    def shape(self, position: int | None, image_size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one image's activation."""
        if (position, image_size) not in self._shapes:
            is_cut = self.can_be_cut  # it may trace, for which this thread must be alone
            with network_lock.shared(), float32_by_default():
                self._shapes[position, image_size] = (
                    self._find_shape(position, image_size)
                    if is_cut
                    else self._find_whole_shape(image_size)
                )
        return self._shapes[position, image_size]

    def _refusal(self, image_size: tuple[int, int], error: Exception) -> str:
        height, width = image_size
        message = (
            f"Backbone {self.name!r} can't take images of {height} × {width} pixels, any number of "
            f"them as a float32 tensor (n, 3, {height}, {width}): {first_line(error).rstrip('.')}."
        )
        if image_size == self._image_size:
            return f"{message} If it takes another size, pass image_size."
        own = " × ".join(map(str, self._image_size))
        return f"{message} By its preprocessing they are {own}: leave image_size=None for that."

    def _find_shape(self, position: int | None, image_size: tuple[int, int]) -> tuple[int, ...]:
        try:
            return self.trace.shape(self.trace.output if position is None else position, image_size)
        except Exception as error:
            raise ValueError(self._refusal(image_size, error)) from error

    def _find_whole_shape(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        try:
            with torch.inference_mode():
                output = Whole(self.network)(torch.zeros(2, 3, *image_size, device=self.device))
            _check_rows(output)
        except OutputError as error:
            raise OutputError(error.what, f"Backbone {self.name!r}") from error
        except Exception as error:
            raise ValueError(self._refusal(image_size, error)) from error
        return tuple(output.shape[1:])

    def width(self, position: int | None, pooling: str, image_size: tuple[int, int]) -> int:
        """Return the number of features of one image; ValueError if `pooling` can't apply."""
        shape = self.shape(position, image_size)
        layout = layout_of(shape, image_size)
        tokens = layout == "tokens" and position is not None and self.trace.n_prefix_tokens
        if (pooling == "token" and layout != "vector" and not tokens) or (
            layout == "other" and pooling != "flatten"
        ):
            remedy = "'flatten'" if layout == "other" else "'avg', 'max' or 'flatten'"
            raise ValueError(
                f"pooling={pooling!r} can't be applied to activations of shape {shape} of "
                f"{self.name!r}, which have no class token. Use pooling={remedy}."
            )
        blank = torch.empty(1, *shape, device="meta")
        return pool(blank, layout, pooling, self.n_prefix(position)).shape[1]

    def key(self, position: int | None, pooling: str, preprocessing: Preprocessing) -> str:
        """Name all that shapes a row but the image: the memory's name of this function."""
        vector = layout_of(self.shape(position, preprocessing.size), preprocessing.size) == "vector"
        parts: tuple[Any, ...] = (
            _VERSION,
            self.fingerprint,
            preprocessing.fingerprint,
            "output" if position is None else position,
            "flatten" if vector else pooling,
            self.precision,
        )
        if self.precision != "float32" and self.runtime != "torch":  # in float32 they agree
            parts += (self.runtime,)
        if difference := numerics(self.device, self.precision):
            parts += (difference,)
        if get_config()["damaged"] == "error":  # what "warn" let pass is not taken from the memory
            parts += ("whole files",)
        if type(preprocessing) is not Preprocessing:  # its settings do not tell what it does
            parts += (Describer()(type(preprocessing)),)
        readable = self.name.rpartition("/")[2]
        return f"{readable}-{xxhash.xxh3_128_hexdigest(repr(parts).encode())}"

    def n_prefix(self, position: int | None) -> int:
        """Return the number of class and register tokens in front of the patch tokens."""
        return 0 if position is None else self.trace.n_prefix_tokens

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which the network computes in its precision."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def in_smaller_steps(self, run: Callable[[int], _T], step: int) -> _T:
        """Call `run(step)`; while the memory does not suffice, with half as many images."""
        while True:
            try:
                return run(step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if step == 1:
                    raise MemoryError(
                        f"Not even one image fits into the memory of {str(self.device)!r} beside "
                        f"backbone {self.name!r} ({first_line(error)}). Pass a smaller "
                        "image_size, a smaller backbone or another device."
                    ) from error
            # Out of the handler, which holds on to the tensors of the failed step.
            step = self.most = step // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(
                f"The memory of {str(self.device)!r} did not suffice: backbone {self.name!r} goes "
                f"on with {step} images at once.",
                UserWarning,
                stacklevel=2,
            )

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while the network runs, unless it runs in several threads at once."""
        return nullcontext() if self.runs_in_threads else network_lock.shared()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this context the network may be called, in its precision, without gradients.

        `lock` must be held.
        """
        with torch.inference_mode():
            if self.runs_in_threads:
                yield
                return
            with float32_by_default(), self.autocast():
                yield

    def block(self, start: int, image_size: tuple[int, int]) -> Program:
        """Return what runs a batch from a position to the next; see `segment`."""

        def example() -> torch.Tensor:
            shape = (3, *image_size) if start == 0 else self.shape(start, image_size)
            return torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))

        return self._program(
            (start, image_size), lambda: self._folded(start, start + 1, image_size), example
        )

    def rows_program(
        self,
        positions: Sequence[int | None],
        pooling: str,
        preprocessing: Preprocessing,
        is_alone: bool = False,
    ) -> Program:
        """Return what turns a uint8 batch (n, 3, h, w) into pooled rows, for each position.

        OpenVINO's takes one core for each call or, for the single image of a whole pass, all.
        """
        n_streams = 1 if is_alone else self._n_cores

        def example() -> torch.Tensor:
            noise = np.random.default_rng(0).integers(256, size=(1, 3, *preprocessing.size))
            return torch.from_numpy(noise.astype(np.uint8))

        return self._program(
            (tuple(positions), pooling, preprocessing),
            lambda: _Rows(self, positions, pooling, preprocessing),
            example,
            n_streams,
        )

    def _program(
        self,
        key: Any,
        build: Callable[[], nn.Module],
        example: Callable[[], torch.Tensor],
        n_streams: int | None = None,
    ) -> Program:
        n_streams = n_streams or self._n_cores
        key = (key, n_streams if self.runs_in_threads else None)
        if (known := self._programs.get(key)) is None:
            self.can_be_cut  # noqa: B018 may trace, for which this thread must be alone
            # Out of inference mode, in which sizes can't be found.
            with (
                network_lock.shared(),
                _building,
                float32_by_default(),
                torch.inference_mode(False),
                torch.no_grad(),
            ):
                if (known := self._programs.get(key)) is None:
                    known = self._make_program(build, example, n_streams)
                    self._programs[key] = known
        return known

    def _make_program(
        self,
        build: Callable[[], nn.Module],
        example: Callable[[], torch.Tensor],
        n_streams: int,
    ) -> Program:
        module = build()
        if self.runs_in_threads:
            try:
                if not self.can_be_cut:
                    raise ValueError("it can't be traced, so what it does may depend on the pixels")
                cores = self._n_cores
                return OpenVinoProgram(module, example(), self.precision, cores, n_streams)
            except Exception as error:  # OpenVINO's own, of what it can't convert or compile
                self.runtime = "torch"
                warn_fallback(self.name, f"it can't take this network ({reason_of(error)})")

        def run(x: torch.Tensor) -> list[torch.Tensor]:
            with network_lock.shared(), self.running():
                results = module(x)
            return list(results) if isinstance(results, tuple) else [results]

        return run

    def _folded(self, start: int, stop: int, image_size: tuple[int, int]) -> nn.Module:
        """Return a slice, with batch-norms made a part of convolutions on a CPU."""
        if not self.can_be_cut:
            return Whole(self.network).eval()
        part = self.trace.slice(start, stop, image_size)
        return fold_batch_norms(part) if self.device.type == "cpu" else part

    def slices(
        self, positions: Iterable[int | None], image_size: tuple[int, int]
    ) -> list[tuple[int | None, nn.Module]]:
        """Return positions in their order, each with what leads there from the one before."""
        wanted = set(positions)
        found: list[tuple[int | None, nn.Module]] = []
        start = 0
        for stop in sorted(p for p in wanted if p is not None):
            found.append((stop, self._folded(start, stop, image_size)))
            start = stop
        if None in wanted:
            whole = self.trace.output if self.can_be_cut else 1
            found.append((None, self._folded(start, whole, image_size)))
        return found

    def rows(
        self,
        images: Sequence[torch.Tensor],
        positions: Sequence[int | None],
        pooling: str,
        preprocessing: Preprocessing,
        step: int,
        is_alone: bool = False,
    ) -> list[Any]:
        """Return one float32 array (len(images), width) for each position.

        Every batch has `step` images, the last one padded: a row then does not depend on how
        many others came with it.
        """
        program = self.rows_program(positions, pooling, preprocessing, is_alone)
        parts: list[list[Any]] = [[] for _ in positions]
        for start in range(0, len(images), step):
            some = list(images[start : start + step])
            some_last = [image.permute(1, 2, 0) for image in some]  # channels last, as they lie
            batch = torch.stack(some_last + some_last[:1] * (step - len(some)))
            batch = batch.permute(0, 3, 1, 2)  # (step, 3, h, w) uint8
            for part, rows in zip(parts, program(self.to_device(batch)), strict=True):
                part.append(fetch(rows[: len(some)]))
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def to_device(self, batch: torch.Tensor) -> torch.Tensor:
        """Start to copy a batch to the device."""
        if self.device.type == "cuda":  # from memory that stays in place, the copy does not wait
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)


def _check_rows(output: torch.Tensor) -> None:
    """Raise OutputError if the output for two images has no row of real numbers for each."""
    if output.ndim == 0 or len(output) != 2:
        raise OutputError(f"a tensor of shape {tuple(output.shape)} for two images")
    if output.is_complex():
        raise OutputError("complex numbers")


class _Rows(nn.Module):
    """From uint8 images (n, 3, h, w) to pooled float32 rows, one tensor for each position."""

    def __init__(
        self,
        runner: Runner,
        positions: Sequence[int | None],
        pooling: str,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        self.positions, self.pooling, self.preprocessing = positions, pooling, preprocessing
        found = runner.slices(positions, preprocessing.size)
        self.order = [position for position, _ in found]
        self.slices = [part for _, part in found]  # not registered: they are not this one's own
        self.n_prefix = {position: runner.n_prefix(position) for position in self.order}

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.preprocessing.normalize(images).contiguous(memory_format=torch.channels_last)
        rows: dict[int | None, torch.Tensor] = {}
        for position, part in zip(self.order, self.slices, strict=True):
            x = part(x)
            layout = layout_of(x.shape[1:], self.preprocessing.size)
            rows[position] = pool(x.float(), layout, self.pooling, self.n_prefix[position])
        return tuple(rows[position] for position in self.positions)
