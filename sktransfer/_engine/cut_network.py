"""A network on a device that is cut into slices: its positions, and what lies at them."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from sktransfer._engine.device import first_line, is_out_of_memory
from sktransfer._engine.folding import fold_batch_norms
from sktransfer._threads import limit_to_one_core, renewed_in_forks
from sktransfer._torch_state import as_on, float32_by_default, network_lock
from sktransfer.models import Backbone
from sktransfer.models._blocks import TracedNetwork, TracingError
from sktransfer.models._graph import counted_flops
from sktransfer.models._modules import OutputError, Whole, copy_of
from sktransfer.models._trial import OTHER_GRAPH, find_fault, needs_trial

POOLINGS = ("avg", "max", "token", "flatten")
_UNKNOWN = 4  # images at once of a network whose tensors are not known
_looking = renewed_in_forks(threading.RLock())  # held by who looks for blocks


def layout_of(shape: Sequence[int], image_size: tuple[int, int]) -> str:
    """Name the layout of one image's activation: vector, tokens, map, map_last or other.

    A map with its channels last (as in Swin) is told by its sides: they have the proportions of
    the image.
    """
    if len(shape) < 3:
        return ("vector", "vector", "tokens")[len(shape)]  # a single number is a vector of one
    if len(shape) > 3:
        return "other"
    proportions = image_size[0] / image_size[1]
    first = abs(np.log(shape[1] / shape[2] / proportions))  # (c, h, w)
    last = abs(np.log(shape[0] / shape[1] / proportions))  # (h, w, c)
    return "map" if first <= last else "map_last"


def as_map(
    x: torch.Tensor, layout: str, n_prefix: int, image_size: tuple[int, int]
) -> torch.Tensor:
    """Bring activations with positions in the image, or their gradients, to (n, c, h, w)."""
    if layout == "map_last":
        return x.permute(0, 3, 1, 2)
    if layout != "tokens":
        return x
    patches = x[:, n_prefix:].transpose(1, 2)  # (n, c, t)
    height = max(1, round(math.sqrt(patches.shape[2] * image_size[0] / image_size[1])))
    return patches.unflatten(2, (height, -1))  # (n, c, h, w)


def pool(x: torch.Tensor, layout: str, pooling: str, n_prefix: int = 0) -> torch.Tensor:
    """Reduce activations to one row an image; see `PretrainedFeatureExtractor`."""
    if layout == "vector" or pooling == "flatten":
        return x.unsqueeze(1) if x.ndim == 1 else x.flatten(1)  # (n, d)
    if layout == "tokens":
        if pooling == "token":
            return x[:, 0]  # (n, c)
        x, places = x[:, n_prefix:], [1]  # (n, t, c)
    else:
        places = [1, 2] if layout == "map_last" else [2, 3]
    # Reduced where they lie: OpenVINO copies a map that is flattened first.
    return x.mean(places) if pooling == "avg" else x.amax(places)


class CutNetwork:
    """The slices of a network, and the shapes between them.

    Positions are those of `TracedNetwork`; None stands for the output of the whole network.

    Parameters
    ----------
    backbone : Backbone
    device : torch.device
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self.backbone = backbone  # which stays loaded as long as this is used
        self.name, self.fingerprint = backbone.name, backbone.fingerprint
        self.device = device
        network = backbone.network
        if device.type != "cpu":
            network = copy_of(network).to(device)
        self.network: nn.Module = network
        self._n_channels, *_ = backbone.preprocessing.shape
        self._image_size = backbone.preprocessing.size
        self._sizes = [self._image_size]  # by which blocks are looked for
        self._traced: TracedNetwork | None = None
        self._why_whole = ""  # why it can't be cut, at the last of the sizes
        self._shapes: dict[Any, tuple[int, ...]] = {}
        self._widths: dict[Any, int] = {}
        self._flops: dict[tuple[int, int], list[int]] = {}

    def lay_out_for_torch(self) -> None:
        """Let weights lie as torch runs them fastest; this reads all of them."""
        of_maps = torch.channels_last  # torch has none for videos
        self.network._apply(lambda x: x.to(memory_format=of_maps) if x.ndim == 4 else x)

    def add_size(self, image_size: tuple[int, int]) -> None:
        """Look for blocks at this size, too, if the backbone's own size shows none.

        A network of the user's own may take images of one size, which only the user knows.
        """
        if self._traced is None and image_size not in self._sizes:
            with _looking:
                if image_size in self._sizes:  # by now another thread has looked
                    return
                self._sizes.append(image_size)
                # Right away: who runs this network must not find that it is to be traced again.
                if self._traced is None and self._why_whole:
                    self._find_blocks()

    # ------------------------------------------------------------------------ blocks

    @property
    def trace(self) -> TracedNetwork:
        """The network as a list of blocks; raises TracingError if it can't be cut."""
        if self._traced is None and not self._why_whole:
            if network_lock.is_held():
                raise RuntimeError("A thread that runs a network can't ask for its blocks.")
            with _looking:
                if self._traced is None and not self._why_whole:
                    self._find_blocks()
        if self._traced is None:
            raise TracingError(self._why_whole)
        return self._traced

    def _find_blocks(self) -> None:
        """Trace the network, for which this thread is alone, and try it out, beside others."""
        traced, why = None, ""
        for size in self._sizes:
            try:
                traced = self._traced_at(size)
                break
            except TracingError as error:
                with network_lock.shared():
                    why = self._advice(size, error)
        if needs_trial(self.network):
            with network_lock.shared(), self._plain(), limit_to_one_core():
                traced, why = self._try_out(traced, why)
        if traced is not None:
            self._prepare()
        self._traced, self._why_whole = traced, why

    def _traced_at(self, size: tuple[int, int]) -> TracedNetwork:
        def trace() -> TracedNetwork:
            with self._plain():
                return TracedNetwork(self.network, size, self._n_channels)

        return network_lock.alone(trace)

    def _prepare(self) -> None:
        """Change what a network that can be cut needs, before anybody runs it."""

    def _try_out(self, traced: TracedNetwork | None, why: str) -> tuple[TracedNetwork | None, str]:
        """Take the network whole if its graph is not what it computes; warn of unsound rows."""
        size, graph = self._sizes[-1], None  # of the images to come: another may cost far more
        if traced is not None:
            try:
                graph = traced.slice(0, traced.output, size)
            except ValueError:
                size = traced.image_size
                graph = traced.slice(0, traced.output)
        trial = self.network, (self._n_channels, *size), self.device
        fault = find_fault(*trial, graph)
        if fault == OTHER_GRAPH:
            name = type(self.network).__name__
            error = TracingError(f"{name} cannot be cut into blocks: {fault}.")
            traced, why, fault = None, self._advice(size, error), find_fault(*trial)
        if fault is not None:
            warnings.warn(f"Backbone {self.name!r} {fault}.", UserWarning, stacklevel=2)
        return traced, why

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Within this context torch is as it was at first, but for gradients, which it leaves out.

        Tensors of inference mode, which a network makes while it is traced, could be neither
        propagated nor trained with. `network_lock` must be held.
        """
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            float32_by_default(),
            as_on(self.device),
        ):
            yield

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

    def layer_name(self, position: int | None) -> str:
        """Return a value of `layer` that names a position: a block, "auto" or "output"."""
        if position is None:
            return "output"
        return "auto" if position == self.embedding else self.block_names[position - 1]

    @property
    def embedding(self) -> int:
        """The position of the embedding, behind the blocks; of a network without any, 1."""
        return len(self.block_names) + 1

    @property
    def embedding_or_output(self) -> int | None:
        """The position of the embedding, None where this is the output of the whole network."""
        return self.embedding if self.can_be_cut else None

    def embeds_without_weights(self, image_size: tuple[int, int]) -> bool:
        """Tell whether only norms and poolings lie between the last block and the embedding."""
        if not self.block_names:
            return False
        with network_lock.shared():
            part = self.trace.slice(self.embedding - 1, self.embedding, image_size)
        return all(weight.ndim < 2 for weight in part.parameters())

    # ------------------------------------------------------------------------ slices

    def segment(self, start: int, image_size: tuple[int, int]) -> nn.Module:
        """Return the network from a position to the next; whole if it can't be cut."""
        if not self.can_be_cut:
            return Whole(self.network).eval()
        with network_lock.shared():
            return self.trace.slice(start, start + 1, image_size)

    def slices(
        self, positions: Iterable[int | None], image_size: tuple[int, int]
    ) -> list[tuple[int | None, nn.Module]]:
        """Return positions in their order, each with what leads there from the one before."""
        wanted = set(positions)
        slices: list[tuple[int | None, nn.Module]] = []
        start = 0
        for stop in sorted(p for p in wanted if p is not None):
            slices.append((stop, self._folded(start, stop, image_size)))
            start = stop
        if None in wanted:
            whole = self.trace.output if self.can_be_cut else 1
            slices.append((None, self._folded(start, whole, image_size)))
        return slices

    def _folded(self, start: int, stop: int, image_size: tuple[int, int]) -> nn.Module:
        """Return a slice, with batch-norms made a part of convolutions on a CPU."""
        if not self.can_be_cut:
            return Whole(self.network).eval()
        part = self.trace.slice(start, stop, image_size)
        return fold_batch_norms(part) if self.device.type == "cpu" else part

    # ------------------------------------------------------------------------ shapes

    def fitting(self, start: int, image_size: tuple[int, int], n_bytes: float) -> int:
        """Return of how many images the largest float32 tensor behind `start` takes `n_bytes`."""
        if not self.can_be_cut:
            return _UNKNOWN
        return int(n_bytes / (4 * self.trace.largest(start, self.embedding, image_size)))

    def shape(self, position: int | None, image_size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one image's activation."""
        if (position, image_size) not in self._shapes:
            is_cut = self.can_be_cut  # it may trace, for which this thread must be alone
            with network_lock.shared(), self._plain():
                self._shapes[position, image_size] = (
                    self._find_shape(position, image_size)
                    if is_cut
                    else self._find_whole_shape(image_size)
                )
        return self._shapes[position, image_size]

    def layout(self, position: int | None, image_size: tuple[int, int]) -> str:
        """Return the layout of the activation at a position; see `layout_of`."""
        return layout_of(self.shape(position, image_size), image_size)

    def n_prefix(self, position: int | None) -> int:
        """Return the number of class and register tokens in front of the patch tokens."""
        return 0 if position is None else self.trace.n_prefix_tokens(position)

    def can_pool(self, position: int | None, pooling: str, image_size: tuple[int, int]) -> bool:
        """Tell whether `pooling` is defined for the activation at a position."""
        layout = self.layout(position, image_size)
        if pooling == "token" and layout != "vector":
            return layout == "tokens" and self.n_prefix(position) > 0
        return layout != "other" or pooling == "flatten"

    def width(self, position: int | None, pooling: str, image_size: tuple[int, int]) -> int:
        """Return the number of features of one image; ValueError if `pooling` can't apply."""
        key = position, pooling, image_size
        if key not in self._widths:
            self._widths[key] = self._find_width(*key)
        return self._widths[key]

    def _find_width(self, position: int | None, pooling: str, image_size: tuple[int, int]) -> int:
        shape, layout = self.shape(position, image_size), self.layout(position, image_size)
        if not self.can_pool(position, pooling, image_size):
            lack = "neither a map nor tokens" if layout == "other" else "no class token"
            remedy = "'flatten'" if layout == "other" else "'avg', 'max' or 'flatten'"
            raise ValueError(
                f"pooling={pooling!r} can't be applied to layer {self.layer_name(position)!r} of "
                f"{self.name!r}, whose activations of shape {shape} have {lack}. "
                f"Use pooling={remedy}, or leave this layer out."
            )
        blank = torch.empty(1, *shape, device="meta")
        return pool(blank, layout, pooling, self.n_prefix(position)).shape[1]

    def flops(self, image_size: tuple[int, int]) -> list[int]:
        """Return the floating-point operations from each position to the next, for one image.

        The last one is the embedding; of a network that can't be cut, it is the output.
        """
        if image_size not in self._flops:
            is_cut = self.can_be_cut
            # Counting adds hooks to the modules of all threads.
            self._flops[image_size] = network_lock.alone(
                lambda: self.trace.flops(image_size) if is_cut else [self._count_whole(image_size)]
            )
        return self._flops[image_size]

    def _count_whole(self, image_size: tuple[int, int]) -> int:
        blank = torch.zeros(1, self._n_channels, *image_size, device=self.device)
        with self._plain(), counted_flops() as counter:
            Whole(self.network)(blank)
        return counter.get_total_flops()

    def _find_shape(self, position: int | None, image_size: tuple[int, int]) -> tuple[int, ...]:
        try:
            return self.trace.shape(self.trace.output if position is None else position, image_size)
        except Exception as error:
            raise ValueError(self._refusal(image_size, error)) from error

    def _find_whole_shape(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        try:
            with self._plain():
                blank = torch.zeros(2, self._n_channels, *image_size, device=self.device)
                output = Whole(self.network)(blank)
            _check_rows(output)
        except OutputError as error:
            raise OutputError(error.what, f"Backbone {self.name!r}") from error
        except Exception as error:
            raise ValueError(self._refusal(image_size, error)) from error
        return tuple(output.shape[1:])

    def _runs_on_cpu(self, image_size: tuple[int, int]) -> bool:
        try:
            with self._plain():
                blank = torch.zeros(2, self._n_channels, *image_size, device="cpu")
                Whole(self.backbone.network)(blank)
        except Exception:
            return False
        return True

    def _refusal(self, image_size: tuple[int, int], error: Exception) -> str:
        is_cpu, lacks_memory = self.device.type == "cpu", is_out_of_memory(error)
        if not is_cpu and not lacks_memory and self._runs_on_cpu(image_size):
            return (
                f"Backbone {self.name!r} runs on a CPU alone: pass device='cpu'. On "
                f"{str(self.device)!r}, torch says: {first_line(error)}"
            )
        height, width = image_size
        shape = f"(n, {self._n_channels}, {height}, {width})"
        message = (
            f"Backbone {self.name!r} can't take images of {height} × {width} pixels, any number of "
            f"them as a float32 tensor {shape}: {first_line(error).rstrip('.')}."
        )
        if image_size == self._image_size:
            return f"{message} If it takes another size, pass image_size."
        preferred = " × ".join(map(str, self._image_size))
        return (
            f"{message} By its preprocessing they are {preferred}: leave image_size=None for that."
        )


def _check_rows(output: torch.Tensor) -> None:
    """Raise OutputError if the output for two images has no row of real numbers for each."""
    if output.ndim == 0 or len(output) != 2:
        raise OutputError(f"a tensor of shape {tuple(output.shape)} for two images")
    if output.is_complex():
        raise OutputError("complex numbers")
