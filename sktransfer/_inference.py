"""Run slices of a network over a stream of images, through the memory.

Files are read and digested in threads, looked up, decoded in threads if they are missing, put
into batches of one size, run through the blocks, pooled to one row an image, and written back.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import joblib
import numpy as np
import torch
import xxhash
from torch import nn
from tqdm.auto import tqdm

from sktransfer._blocks import TracedNetwork, TracingError
from sktransfer._memory import ImageMemory
from sktransfer._weights import Describer
from sktransfer.io import ImageSequence
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

POOLINGS = ("avg", "max", "token", "flatten")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_VERSION = 1  # of the computation; a change that alters rows makes old entries unreachable
_LOOKUP = 64  # images looked up, and claimed, at once
_CPU_STEP = 4  # images that a CPU takes at once: more of them fall out of its caches
_T = TypeVar("_T")
# torch.fx traces by replacing what calls modules, for the whole process: nothing may run meanwhile.
_network_lock = threading.RLock()
_runners: WeakKeyDictionary[Backbone, dict[Any, Runner]] = WeakKeyDictionary()


# ------------------------------------------------------------------------------ pooling


def layout_of(shape: Sequence[int], image_size: tuple[int, int]) -> str:
    """Name the layout of one image's activation: vector, tokens, map, map_last or other.

    A map with its channels last (as in Swin) is told by its sides: they have the proportions of
    the image.
    """
    if len(shape) < 3:
        return ("other", "vector", "tokens")[len(shape)]
    if len(shape) > 3:
        return "other"
    proportions = image_size[0] / image_size[1]
    first = abs(np.log(shape[1] / shape[2] / proportions))  # (c, h, w)
    last = abs(np.log(shape[0] / shape[1] / proportions))  # (h, w, c)
    return "map" if first <= last else "map_last"


def pool(x: torch.Tensor, layout: str, pooling: str, n_prefix: int = 0) -> torch.Tensor:
    """Reduce activations to one row an image; see `PretrainedFeatureExtractor`."""
    if layout == "vector" or pooling == "flatten":
        return x.flatten(1)  # (n, d)
    if layout == "tokens":
        if pooling == "token":
            return x[:, 0]  # (n, c)
        x = x[:, n_prefix:].transpose(1, 2)  # (n, c, t)
    elif layout == "map_last":
        x = x.flatten(1, 2).transpose(1, 2)  # (n, c, h * w)
    else:
        x = x.flatten(2)  # (n, c, h * w)
    return x.mean(2) if pooling == "avg" else x.amax(2)


# ------------------------------------------------------------------------------ the network


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn `"auto"` or a name into a device that is there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type == "meta":
            raise RuntimeError("it computes shapes, no values")
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={str(device)!r} can't be used here ({str(error).splitlines()[0]}). "
            "Pass device='auto' or 'cpu'."
        ) from error
    return resolved


def get_runner(backbone: Backbone, device: str | torch.device, precision: str) -> Runner:
    """Return this process's one copy of `backbone` on this device in this precision."""
    resolved = resolve_device(device)
    runners = _runners.setdefault(backbone, {})
    if (resolved, precision) not in runners:
        runners[resolved, precision] = Runner(backbone, resolved, precision)
    return runners[resolved, precision]


class _OutputError(TypeError):
    """A network returns something else than one tensor with a row for each image."""


class Runner:
    """A backbone on a device, in a precision, cut where it is asked to be.

    Parameters
    ----------
    backbone : Backbone
    device : torch.device
    precision : {"float32", "bfloat16", "float16"}
        Below float32, the operations that lose nothing by it run in it (torch's autocast).
    """

    def __init__(self, backbone: Backbone, device: torch.device, precision: str) -> None:
        # The backbone itself must not be held: it is the weak key under which this is kept.
        self.name, self.fingerprint = backbone.name, backbone.fingerprint
        self.device, self.precision = device, precision
        network = backbone.network
        if device.type != "cpu":
            network = copy.deepcopy(network).to(device)
        self.network: nn.Module = network.to(memory_format=torch.channels_last)
        self._image_size = backbone.preprocessing.size
        self._shapes: dict[Any, tuple[int, ...]] = {}

    @cached_property
    def trace(self) -> TracedNetwork:
        """The network as a list of blocks; raises TracingError if it is none."""
        with _network_lock:
            return TracedNetwork(self.network, self._image_size)

    @cached_property
    def block_names(self) -> list[str]:
        """The names of the blocks; empty if the network can't be traced."""
        try:
            return list(self.trace.names)
        except TracingError:
            return []

    def position(self, layer: int | str) -> int | None:
        """Return the cut behind `layer`; None stands for the output of the whole network."""
        return None if layer == "output" else self.trace.position(layer)

    def shape(self, position: int | None, image_size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one image's activation."""
        if (position, image_size) not in self._shapes:
            try:
                with _network_lock:
                    self._shapes[position, image_size] = self._find_shape(position, image_size)
            except _OutputError:
                raise
            except Exception as error:
                raise ValueError(
                    f"Backbone {self.name!r} can't take images of {image_size[0]} × "
                    f"{image_size[1]} pixels ({error}). Its own size is {self._image_size[0]} × "
                    f"{self._image_size[1]}: leave image_size=None, or choose another."
                ) from error
        return self._shapes[position, image_size]

    def _find_shape(self, position: int | None, image_size: tuple[int, int]) -> tuple[int, ...]:
        if position is not None:
            return self.trace.shape(position, image_size)
        if self.block_names:
            return self.trace.shape(self.trace.output, image_size)
        with torch.inference_mode():
            output = self.network(torch.zeros(1, 3, *image_size, device=self.device))
        if not isinstance(output, torch.Tensor) or output.ndim == 0:
            kind = "number" if isinstance(output, torch.Tensor) else type(output).__name__
            raise _OutputError(
                f"Backbone {self.name!r} returns a {kind}, not one tensor with a row for each "
                "image. Wrap it in a module whose forward returns the tensor that you want."
            )
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
        return pool(blank, layout, pooling, self._n_prefix(position)).shape[1]

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
        if type(preprocessing) is not Preprocessing:  # its settings do not tell what it does
            parts += (Describer()(type(preprocessing)),)
        readable = self.name.rpartition("/")[2]
        return f"{readable}-{xxhash.xxh3_128_hexdigest(repr(parts).encode())}"

    def _n_prefix(self, position: int | None) -> int:
        return 0 if position is None else self.trace.n_prefix_tokens

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def activations(
        self, batch: torch.Tensor, positions: Iterable[int | None]
    ) -> dict[int | None, torch.Tensor]:
        """Run a normalised batch (n, 3, h, w) once; return the activation at each position."""
        size = (batch.shape[2], batch.shape[3])
        wanted = set(positions)
        results: dict[int | None, torch.Tensor] = {}
        x, start = batch, 0
        for stop in sorted(p for p in wanted if p is not None):
            x = self.trace.slice(start, stop, size)(x)
            results[stop], start = x, stop
        if None in wanted:
            whole = self.trace.slice(start, self.trace.output, size) if start else self.network
            results[None] = whole(x)
        return results

    def rows(
        self,
        images: Sequence[torch.Tensor],
        positions: Sequence[int | None],
        pooling: str,
        preprocessing: Preprocessing,
        step: int,
    ) -> list[np.ndarray]:
        """Return one float32 array (len(images), width) for each position.

        Every batch has `step` images, the last one padded: a row then does not depend on how
        many others came with it.
        """
        parts: list[list[np.ndarray]] = [[] for _ in positions]
        for start in range(0, len(images), step):
            some = list(images[start : start + step])
            batch = torch.stack(some + some[:1] * (step - len(some)))  # (step, 3, h, w) uint8
            batch = batch.to(self.device, non_blocking=True)
            with _network_lock, torch.inference_mode(), self._autocast():
                x = preprocessing.normalize(batch).contiguous(memory_format=torch.channels_last)
                found = self.activations(x, positions)
                for part, position in zip(parts, positions, strict=True):
                    x = found[position].float()
                    layout = layout_of(x.shape[1:], preprocessing.size)
                    rows = pool(x, layout, pooling, self._n_prefix(position))
                    part.append(rows[: len(some)].cpu().numpy())
        return [np.concatenate(part) for part in parts]


# ------------------------------------------------------------------------------ the stream


@dataclass
class _Miss:
    """An image that must be computed: the rows it fills and, soon, its pixels."""

    rows: list[int]
    digest: bytes
    pixels: Future[torch.Tensor]
    done: bool = False


class Embedding:
    """One pass over images: what is asked, of which network, and how to go about it.

    Parameters
    ----------
    runner : Runner
    positions : sequence of int or None
        Cuts whose pooled activations are concatenated.
    pooling : {"avg", "max", "token", "flatten"}
    preprocessing : Preprocessing
    memory : ImageMemory or None
    batch_size : int
        Images in flight at once, and on a GPU in a batch.
    n_jobs : int or None
        Threads that read and decode; None for all cores, or what joblib leaves to a worker.
    verbose : bool
        Show a progress bar.

    Attributes
    ----------
    n_computed : int
        Images that ran through the network.
    """

    def __init__(
        self,
        runner: Runner,
        positions: Sequence[int | None],
        pooling: str,
        preprocessing: Preprocessing,
        *,
        memory: ImageMemory | None = None,
        batch_size: int = 32,
        n_jobs: int | None = None,
        verbose: bool | int = False,
    ) -> None:
        self.runner, self.positions, self.pooling = runner, positions, pooling
        self.preprocessing, self.memory = preprocessing, memory
        self.batch_size, self.verbose = batch_size, verbose
        self.step = batch_size if runner.device.type != "cpu" else min(batch_size, _CPU_STEP)
        self.n_threads = joblib.effective_n_jobs(-1 if n_jobs is None else n_jobs)
        ends = np.cumsum([0, *(runner.width(p, pooling, preprocessing.size) for p in positions)])
        self.columns = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        self.keys = [runner.key(p, pooling, preprocessing) for p in positions]
        self.n_computed = 0

    def __call__(self, images: ImageSequence) -> np.ndarray:
        """Return the rows of `images`, float32 of shape (n, width)."""
        self._images = images
        self._out = np.empty((len(images), self.columns[-1].stop), np.float32)
        self._claimed: set[bytes] = set()  # ours to compute, not yet in the memory
        self._misses: dict[bytes, _Miss] = {}  # those of them on their way through the network
        self._threads = ThreadPoolExecutor(self.n_threads)
        self._writer = ThreadPoolExecutor(1)
        self._progress = tqdm(
            total=len(images), unit="image", desc=self.runner.name, disable=not self.verbose
        )
        try:
            rows: Sequence[int] = range(len(images))
            while rows:
                rows = self._fill(rows)
        finally:
            self._threads.shutdown(cancel_futures=True)
            self._writer.shutdown()  # what was computed is written, even after Ctrl-C
            self._release(list(self._claimed))
            self._progress.close()
        return self._out

    def _fill(self, rows: Sequence[int]) -> list[int]:
        """Fill `rows`, but for those that another process computes just now; return these."""
        others: dict[int, bytes] = {}
        misses = self._all(rows) if self.memory is None else self._missing(rows, others)
        writes: deque[Future[None]] = deque()
        # Decoding runs two batches ahead of the network, writing two behind it.
        for group in _groups(_ahead(misses, 2 * self.batch_size), self.batch_size):
            values = self._compute(group)
            if self.memory is not None:
                writes.append(self._writer.submit(self._store, group, values))
                if len(writes) > 2:
                    writes.popleft().result()
        for write in writes:
            write.result()
        if others and self.memory is not None:
            self.memory.wait(self.keys[0], next(iter(others.values())))
        return list(others)

    def _all(self, rows: Iterable[int]) -> Iterator[_Miss]:
        for row in rows:
            yield _Miss([row], b"", self._threads.submit(self._pixels, row))

    def _missing(self, rows: Sequence[int], others: dict[int, bytes]) -> Iterator[_Miss]:
        """Fill what the memory holds, yield what it lacks; `others` gets what is not ours."""
        chunks = (rows[start : start + _LOOKUP] for start in range(0, len(rows), _LOOKUP))
        digested = ((chunk, self._threads.submit(self._digest, chunk)) for chunk in chunks)
        for chunk, future in _ahead(digested, self.n_threads):
            digests = dict(zip(chunk, future.result(), strict=True))
            lacking: dict[bytes, list[int]] = {}  # rows of each distinct image
            for row in self._read(digests):
                lacking.setdefault(digests[row], []).append(row)
            for digest in list(lacking):
                if miss := self._misses.get(digest):  # the writer may take it out at any time
                    self._join(miss, lacking.pop(digest))
            for digest in self._claim(lacking, others):
                rows_ = lacking[digest]
                pixels = self._threads.submit(self._pixels, rows_[0], digest)
                self._misses[digest] = _Miss(rows_, digest, pixels)
                yield self._misses[digest]

    def _claim(self, lacking: dict[bytes, list[int]], others: dict[int, bytes]) -> list[bytes]:
        """Take what nobody computes; another may have finished it since it was looked up."""
        assert self.memory is not None
        digests = list(lacking)
        mine = []
        for digest, free in zip(digests, self.memory.claim(self.keys[0], digests), strict=True):
            if free:
                mine.append(digest)
                self._claimed.add(digest)
            else:
                others |= dict.fromkeys(lacking[digest], digest)
        unread = self._read({row: digest for digest in mine for row in lacking[digest]})
        left = {digest for digest in mine if set(lacking[digest]) & unread}
        self._release([digest for digest in mine if digest not in left])
        return [digest for digest in mine if digest in left]

    def _read(self, digests: dict[int, bytes]) -> set[int]:
        """Fill the rows that the memory holds; return the others."""
        assert self.memory is not None
        rows = list(digests)
        if not rows:
            return set()
        hits = np.ones(len(rows), bool)
        # Rows that show the same image come together, so they need not be in order.
        consecutive = rows == list(range(rows[0], rows[0] + len(rows)))
        for key, columns in zip(self.keys, self.columns, strict=True):
            if consecutive:
                view = self._out[rows[0] : rows[-1] + 1, columns]
                hits &= self.memory.read(key, list(digests.values()), view)
            else:
                copied = np.empty((len(rows), columns.stop - columns.start), np.float32)
                hits &= self.memory.read(key, list(digests.values()), copied)
                self._out[rows, columns] = copied
        self._progress.update(int(hits.sum()))
        return {row for row, hit in zip(rows, hits, strict=True) if not hit}

    def _join(self, miss: _Miss, rows: list[int]) -> None:
        """Let `rows`, which show the same image, share what is computed for it."""
        if miss.done:
            self._out[rows] = self._out[miss.rows[0]]
            self._progress.update(len(rows))
        else:
            miss.rows.extend(rows)

    def _digest(self, rows: Sequence[int]) -> list[bytes]:
        return [self._images.digest(row) for row in rows]

    def _pixels(self, row: int, digest: bytes | None = None) -> torch.Tensor:
        # The file is read again: those that wait to be decoded would fill the memory.
        image = self._images.open(row)
        if digest is not None and image.digest != digest:
            raise ValueError(f"{image.where}: the file changed while it was read; run again.")
        return self.preprocessing.fit_size(image.decode())  # (3, *size) uint8

    def _compute(self, group: Sequence[_Miss]) -> list[np.ndarray]:
        values = self.runner.rows(
            [miss.pixels.result() for miss in group],
            self.positions,
            self.pooling,
            self.preprocessing,
            self.step,
        )
        self.n_computed += len(group)
        for i, miss in enumerate(group):
            for columns, value in zip(self.columns, values, strict=True):
                self._out[miss.rows, columns] = value[i]
            miss.done = True
            self._progress.update(len(miss.rows))
        return values

    def _store(self, group: Sequence[_Miss], values: list[np.ndarray]) -> None:
        """Write computed rows; runs in a thread of its own."""
        assert self.memory is not None
        digests = [miss.digest for miss in group]
        for key, value in zip(self.keys, values, strict=True):
            self.memory.write(key, digests, value)
        self._release(digests)
        for digest in digests:
            del self._misses[digest]

    def _release(self, digests: Sequence[bytes]) -> None:
        if self.memory is not None and digests:
            self.memory.release(self.keys[0], digests)
            self._claimed.difference_update(digests)


def _ahead(items: Iterable[_T], n: int) -> Iterator[_T]:
    """Yield `items`, taking each from its source while up to `n` before it still wait."""
    waiting: deque[_T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > n:
            yield waiting.popleft()
    yield from waiting


def _groups(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
