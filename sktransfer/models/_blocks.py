"""A network as an ordered list of blocks that can be cut between any two of them.

The network is traced once. A *cut point* is a place in its graph where one tensor carries all that
the rest of the network needs to know of the image; a *block* lies between two of them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from sktransfer.models._graph import (
    Cut,
    Slicer,
    Values,
    as_module,
    choose_output,
    count_flops,
    find_cuts,
    module_path,
    propagate,
    refresh,
    trace,
)
from sktransfer.models._outline import Outline, block_names, end_of_block, merge
from sktransfer.models._tokens import find_prefixes


class TracingError(ValueError):
    """The network cannot be written as a graph, so it has no blocks."""


class TracedNetwork:
    """The blocks of a network, and the network between any two cuts.

    Positions count cuts: 0 is the image, ``i`` the activation after the i-th block,
    `embedding` what the weights of the head receive, and `output` what the network returns.

    Parameters
    ----------
    network : nn.Module
        Takes images of shape (n, channels, height, width) and returns one tensor. Traced in eval
        mode; its parameters are shared with every slice, and nothing in it is changed.
    image_size : (int, int), default=(224, 224)
        Height and width of the images by which cuts are found.
    n_channels : int, default=3
        Of the images.

    Attributes
    ----------
    network : nn.Module
        As given.
    names : tuple of str
        The blocks in order, each named after its module; the head is not one.

    Raises
    ------
    TracingError
        If the network cannot be traced, for instance where its control flow depends on the data.
    """

    def __init__(
        self,
        network: nn.Module,
        image_size: tuple[int, int] = (224, 224),
        n_channels: int = 3,
    ) -> None:
        self.network, self.n_channels = network, n_channels
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self._slices: dict[tuple[int, int, tuple[int, int]], fx.GraphModule] = {}
        try:
            self._graph, self._constants = trace(network)
            self._nodes = list(self._graph.nodes)
            values = propagate(self._graph, self._lookup, (n_channels, *self.image_size))
            choose_output(self._graph, values)
            self._values = {self.image_size: values}
            self._find_blocks(values)
        except Exception as error:
            raise TracingError(
                f"{type(network).__name__} cannot be cut into blocks: {_reason(error)}."
            ) from error

    def _find_blocks(self, values: Values) -> None:
        cuts = find_cuts(self._nodes, values)
        outline = Outline(self.network, self._nodes, values.data, cuts)
        groups = list(merge(outline.units, cuts))
        firsts = [*(group[0].first for group in groups[1:]), outline.end]
        ends = []
        for group, first in zip(groups, firsts, strict=False):
            last = max(unit.last for unit in group)
            stop = min([first, *(pool for pool in outline.poolings if pool > last)])
            behind = [cut for cut in cuts if last <= cut.at < stop]
            ends.append(end_of_block(behind, values.shapes))
        before_head = [cut for cut in cuts if cut.at < outline.end][-1]
        self.names = tuple(name or type(self.network).__name__ for name in block_names(groups))
        self._cuts = [cuts[0], *ends, before_head, cuts[-1]]
        self._prefixes = find_prefixes(self._nodes, values, self._lookup)

    @property
    def embedding(self) -> int:
        """Position of what the weights of the head receive."""
        return len(self.names) + 1

    @property
    def output(self) -> int:
        """Position of what the network returns."""
        return len(self.names) + 2

    def position(self, layer: int | str) -> int:
        """Find the position after a block.

        Parameters
        ----------
        layer : int or str
            The number of a block as Python counts, from 0 or, negative, from the end; its name; a
            dotted prefix that several blocks share, which stands for the last of them;
            ``"auto"``, the embedding; or ``"output"``.

        Returns
        -------
        position : int

        Raises
        ------
        ValueError
            If there is no such block.
        """
        if layer == "auto":
            return self.embedding
        if layer == "output":
            return self.output
        return self.blocks(layer).stop

    def blocks(self, layer: int | str) -> range:
        """Find the numbers, from 0, of the blocks that a number, a name or a prefix stands for.

        ``blocks(layer).start`` is the position in front of the first of them, and
        ``blocks(layer).stop`` the position after the last one.
        """
        if isinstance(layer, str):
            return blocks_named(self.names, layer)
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise TypeError(f"layer must be an int or a str, got {layer!r}.")
        number, n_blocks = layer.__index__(), len(self.names)
        if not -n_blocks <= number < n_blocks:
            valid = f"from {-n_blocks} to {n_blocks - 1}" if n_blocks else "no number: it has none"
            raise ValueError(f"The blocks of this network are numbered {valid}; got {number}.")
        return range(number % n_blocks, number % n_blocks + 1)

    def place(self, position: int) -> int:
        """Number of the node behind which a position lies; the same tensor has the same one."""
        return self._cut(position).at

    def modules_around(self, position: int) -> tuple[str, str]:
        """Return the paths of the modules in front of a cut, and behind it."""
        cut = self._cut(position)
        return module_path(cut.node), module_path(self._nodes[cut.at + 1])

    def shape(self, position: int, image_size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Shape of one image's activation at a position, without the axis of the batch."""
        return self._values_at(image_size).shapes[self._cut(position).node]

    def n_prefix_tokens(self, position: int) -> int:
        """Number of class and register tokens in front of the patch tokens at a position."""
        node = self._cut(position).node
        shape = self._values_at(None).shapes[node]
        if len(shape) != 2:
            return 0
        if any(self._prefixes.values()):  # behind the last patch token, there is no front
            return self._prefixes[node] % shape[0]
        return _known_prefix(self.network)  # a module put them there that can't be looked into

    def largest(self, start: int, stop: int, image_size: tuple[int, int] | None = None) -> int:
        """Number of values of one image in the largest tensor between two positions."""
        shapes = self._values_at(image_size).shapes
        nodes = self._nodes[self._cut(start).at : self._cut(stop).at + 1]
        return max(math.prod(shapes.get(node, ())) for node in nodes)

    def flops(self, image_size: tuple[int, int] | None = None) -> list[int]:
        """Floating-point operations from each position to the next, up to the embedding."""
        return [
            count_flops(self.slice(i, i + 1, image_size), self.shape(i, image_size))
            for i in range(self.embedding)
        ]

    def slice(
        self, start: int, stop: int, image_size: tuple[int, int] | None = None
    ) -> fx.GraphModule:
        """Network between two positions.

        Parameters
        ----------
        start, stop : int
            Positions, ``start <= stop``.
        image_size : (int, int), default=None
            Height and width of the images; by default, that of the tracing.

        Returns
        -------
        network : fx.GraphModule
            Takes the activation at `start` and returns the one at `stop`, both with the batch as
            their first axis. It shares the parameters of the network. Ask for it again after the
            network has been moved to another device: buffers are then replaced.
        """
        size = self._size(image_size)
        key = (start, stop, size)
        if start > stop:
            raise ValueError(f"A slice cannot start at {start} and stop before, at {stop}.")
        if key not in self._slices:
            first, last = self._cut(start), self._cut(stop)
            graph = Slicer(self._nodes, self._values_at(size), first, last).graph
            self._slices[key] = as_module(graph, self._lookup)
        return refresh(self._slices[key], self._lookup)

    def _cut(self, position: int) -> Cut:
        if not 0 <= position <= self.output:
            raise ValueError(f"Positions are 0 to {self.output}, got {position}.")
        return self._cuts[position]

    def _size(self, image_size: tuple[int, int] | None) -> tuple[int, int]:
        return self.image_size if image_size is None else (int(image_size[0]), int(image_size[1]))

    def _values_at(self, image_size: tuple[int, int] | None) -> Values:
        size = self._size(image_size)
        if size not in self._values:
            try:
                self._values[size] = propagate(self._graph, self._lookup, (self.n_channels, *size))
            except Exception as error:
                raise ValueError(
                    f"{type(self.network).__name__} takes no images of {size[0]} x {size[1]} "
                    f"pixels: {_reason(error)}."
                ) from error
        return self._values[size]

    def _lookup(self, target: str) -> Any:
        if target not in self._constants:
            owner, _, name = target.rpartition(".")
            return getattr(self.network.get_submodule(owner), name)
        device = next((p.device for p in self.network.parameters()), None)
        return self._constants[target].to(device)


def _reason(error: Exception) -> str:
    lines = re.sub(r" ?\(Proxy\(\w+\)\)", "", str(error).strip()).splitlines()
    kind = type(error).__name__
    if isinstance(error, KeyError):  # its message is the key alone
        return f"{kind}: {error}"
    return lines[0].rstrip(".") if lines else kind


def _known_prefix(network: nn.Module) -> int:
    """Return how many tokens a network says are in front of those of the image; timm's do."""
    counts = (getattr(module, "num_prefix_tokens", None) for module in network.modules())
    return next((count for count in counts if isinstance(count, int)), 0)


def blocks_named(names: Sequence[str], name: str) -> range:
    """Find the numbers, from 0, of the blocks of a name, or of a prefix that several share."""
    if name in names:
        return range(names.index(name), names.index(name) + 1)
    numbers = [i for i, known in enumerate(names) if known.startswith(f"{name}.")]
    if numbers:
        return range(numbers[0], numbers[-1] + 1)
    prefixes = {known.rsplit(".", i)[0] for known in names for i in range(5)}
    near = difflib.get_close_matches(name, sorted(prefixes))
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"No block is called {name!r}.{hint} Blocks: {', '.join(names) or 'none'}.")
