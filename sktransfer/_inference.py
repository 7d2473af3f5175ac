"""One copy of a network on a device: slices of its blocks run on a batch, pooled to rows."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import xxhash
from torch import nn

from sktransfer._blocks import TracedNetwork, TracingError
from sktransfer._weights import Describer
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

POOLINGS = ("avg", "max", "token", "flatten")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What a CPU takes at once: few images, see benchmarks/batch_size.py, and fewer of large ones. The
# C library gets larger tensors anew from the system every time, which costs more than it saves.
_CPU_STEP = 4
_CPU_BYTES = 20e6
_VERSION = 1  # of the computation; a change that alters rows makes old entries unreachable
# torch.fx traces by replacing what calls modules, for the whole process: nothing may run meanwhile.
network_lock = threading.RLock()
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
        self.flops: dict[tuple[int, int], list[int]] = {}  # see FrozenBlocks.flops

    @cached_property
    def trace(self) -> TracedNetwork:
        """The network as a list of blocks; raises TracingError if it is none."""
        with network_lock:
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

    @property
    def embedding(self) -> int:
        """The position of the embedding, behind the blocks; of a network without any, 1."""
        return len(self.block_names) + 1

    def segment(self, start: int, image_size: tuple[int, int]) -> nn.Module:
        """Return the network from a position to the next; whole if it can't be cut."""
        if not self.block_names:
            return self.network
        return self.trace.slice(start, start + 1, image_size)

    def step(self, batch_size: int, image_size: tuple[int, int]) -> int:
        """Return how many of a batch's images to run at once: on a GPU all, on a CPU few."""
        if self.device.type != "cpu":
            return batch_size
        fitting = self.fitting(0, image_size, _CPU_BYTES)
        return max(1, min(batch_size, _CPU_STEP, fitting))

    def fitting(self, start: int, image_size: tuple[int, int], n_bytes: float) -> int:
        """Return of how many images the largest float32 tensor behind `start` takes `n_bytes`."""
        if not self.block_names:
            return _CPU_STEP
        return int(n_bytes / (4 * self.trace.largest(start, self.embedding, image_size)))

    def shape(self, position: int | None, image_size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one image's activation."""
        if (position, image_size) not in self._shapes:
            try:
                with network_lock:
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
            with network_lock, torch.inference_mode(), self.autocast():
                x = preprocessing.normalize(batch).contiguous(memory_format=torch.channels_last)
                found = self.activations(x, positions)
                for part, position in zip(parts, positions, strict=True):
                    x = found[position].float()
                    layout = layout_of(x.shape[1:], preprocessing.size)
                    rows = pool(x, layout, pooling, self.n_prefix(position))
                    part.append(rows[: len(some)].cpu().numpy())
        return [np.concatenate(part) for part in parts]
