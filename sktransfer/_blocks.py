"""A network as an ordered list of blocks that can be cut between any two of them.

The network is traced once. A *cut point* is a place in its graph where one tensor carries all that
the rest of the network needs to know of the image; a *block* lies between two of them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import fx, nn

from sktransfer._graph import (
    Cut,
    Slicer,
    Values,
    as_module,
    choose_output,
    find_cuts,
    module_path,
    propagate,
    refresh,
    trace,
)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHT = re.compile("weight(_orig|_v)?$")  # the latter of norms and prunings of weights


class TracingError(ValueError):
    """The network cannot be written as a graph, so it has no blocks."""


class _Unit(NamedTuple):
    """A module that a reader would call one; its nodes are number `first` to `last`."""

    path: str
    first: int
    last: int


class TracedNetwork:
    """The blocks of a network, and the network between any two cuts.

    Positions count cuts: 0 is the image, ``i`` the activation after the i-th block,
    `embedding` what the weights of the head receive, and `output` what the network returns.

    Parameters
    ----------
    network : nn.Module
        Takes images of shape (n, 3, height, width) and returns one tensor. Traced in eval mode;
        its parameters are shared with every slice, and nothing in it is changed.
    image_size : (int, int), default=(224, 224)
        Height and width of the images by which cuts are found.

    Attributes
    ----------
    network : nn.Module
        As given.
    names : tuple of str
        The blocks in order, each named after its module; the head is not one.
    n_prefix_tokens : int
        Number of class and register tokens in front of the patch tokens.

    Raises
    ------
    TracingError
        If the network cannot be traced, for instance where its control flow depends on the data.
    """

    def __init__(self, network: nn.Module, image_size: tuple[int, int] = (224, 224)) -> None:
        self.network = network
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.n_prefix_tokens = _count_prefix_tokens(network)
        self._slices: dict[tuple[int, int, tuple[int, int]], fx.GraphModule] = {}
        try:
            self._graph, self._constants = trace(network)
            self._nodes = list(self._graph.nodes)
            values = propagate(self._graph, self._lookup, self.image_size)
            choose_output(self._graph, values)
            self._values = {self.image_size: values}
            self._find_blocks(values)
        except Exception as error:
            raise TracingError(
                f"{type(network).__name__} cannot be cut into blocks: {_reason(error)}."
            ) from error

    def _find_blocks(self, values: Values) -> None:
        cuts = find_cuts(self._nodes, values)
        outline = _Outline(self.network, self._nodes, values.data, cuts)
        groups = list(_merge(outline.units, cuts))
        firsts = [*(group[0].first for group in groups[1:]), outline.end]
        ends = []
        for group, first in zip(groups, firsts, strict=False):
            last = max(unit.last for unit in group)
            stop = min([first, *(pool for pool in outline.poolings if pool > last)])
            behind = [cut for cut in cuts if last <= cut.at < stop]
            ends.append(_end_of_block(behind, values.shapes))
        before_head = [cut for cut in cuts if cut.at < outline.end][-1]
        self.names = tuple(name or type(self.network).__name__ for name in _names(groups))
        self._cuts = [cuts[0], *ends, before_head, cuts[-1]]

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
            return self._blocks_named(layer)
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise TypeError(f"layer must be an int or a str, got {layer!r}.")
        number, n_blocks = layer.__index__(), len(self.names)
        if not -n_blocks <= number < n_blocks:
            valid = f"from {-n_blocks} to {n_blocks - 1}" if n_blocks else "no number: it has none"
            raise ValueError(f"The blocks of this network are numbered {valid}; got {number}.")
        return range(number % n_blocks, number % n_blocks + 1)

    def _blocks_named(self, name: str) -> range:
        if name in self.names:
            return range(self.names.index(name), self.names.index(name) + 1)
        found = [i for i, known in enumerate(self.names) if known.startswith(f"{name}.")]
        if found:
            return range(found[0], found[-1] + 1)
        prefixes = {known.rsplit(".", i)[0] for known in self.names for i in range(5)}
        near = difflib.get_close_matches(name, sorted(prefixes))
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"No block is called {name!r}.{hint} Blocks: {', '.join(self.names) or 'none'}."
        )

    def shape(self, position: int, image_size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Shape of one image's activation at a position, without the axis of the batch."""
        return self._values_at(image_size).shapes[self._cut(position).node]

    def largest(self, start: int, stop: int, image_size: tuple[int, int] | None = None) -> int:
        """Number of values of one image in the largest tensor between two positions."""
        shapes = self._values_at(image_size).shapes
        nodes = self._nodes[self._cut(start).at : self._cut(stop).at + 1]
        return max(math.prod(shapes.get(node, ())) for node in nodes)

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
                self._values[size] = propagate(self._graph, self._lookup, size)
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
    return lines[0].rstrip(".") if lines else type(error).__name__


def _count_prefix_tokens(network: nn.Module) -> int:
    for module in network.modules():
        tokens = getattr(module, "num_prefix_tokens", None)
        if isinstance(tokens, int):
            return tokens
    return int(any(name.endswith("class_token") for name, _ in network.named_parameters()))


# --- Outline -------------------------------------------------------------------------------------


class _Outline:
    """Walks the module tree of a network for the modules that a reader would call its units.

    Attributes
    ----------
    units : list of _Unit
        In the order in which they start; the head is not one.
    end : int
        Number of the first node of the head's weights, or of the graph's output.
    poolings : list of int
        Numbers of the first nodes of modules that pool by attention.
    """

    def __init__(
        self, network: nn.Module, nodes: list[fx.Node], data: set[fx.Node], cuts: list[Cut]
    ) -> None:
        self.nodes, self.data = nodes, data
        self.modules = dict(network.named_modules())
        self.cut_at = {cut.at for cut in cuts}
        self.called = {node.target for node in nodes if node.op == "call_module"}
        self.spans = self._find_spans()
        self.n_weights: Counter[str] = Counter()  # module -> number of weight layers in it
        for path, module in self.modules.items():
            outers = list(_ancestors(path))
            if _has_weights(module) and (path in self.spans or self.called & set(outers)):
                self.n_weights.update(outers)
        self.poolings = [self.spans[path][0] for path in self.spans if self._is_pooling(path)]
        for heads in (self._find_heads(), []):
            self.heads = heads
            self.end = min([self.spans[path][0] for path in heads], default=len(nodes) - 1)
            self.opened = {outer for path in heads for outer in _ancestors(path)} | {""}
            self.units = self._find_units()
            last = max((unit.last for unit in self.units), default=0)
            if not self.cut_at.isdisjoint(range(last, self.end)):
                break  # else the head cannot be separated, and is a part of the last unit

    def _find_spans(self) -> dict[str, tuple[int, int]]:
        """The first and the last node of each module."""
        spans: dict[str, tuple[int, int]] = {}
        for i, node in enumerate(self.nodes[:-1]):
            if node in self.data:
                for path in {module_path(node), *_owners(node)}:
                    for outer in _ancestors(path):
                        spans[outer] = (spans.get(outer, (i, i))[0], i)
        return spans

    def _find_units(self) -> list[_Unit]:
        paths = self._walk("")
        while len(paths) == 1 and paths[0] not in self.opened:  # all of it in one module: look in
            self.opened.add(paths[0])
            paths = self._walk("")
        units = [_Unit(path, *self.spans[path]) for path in paths]
        return sorted(units, key=lambda unit: unit.first)

    def _walk(self, path: str) -> list[str]:
        if path in self.heads or not self.n_weights[path]:
            return []
        children = self._children(path)
        if path in self.called or not children or not self._is_open(path):
            return [path]
        return [unit for inner in children for unit in self._walk(inner)]

    def _is_open(self, path: str) -> bool:
        """Whether the module only holds units and is none itself."""
        module = self.modules[path]
        if path in self.opened:
            return True
        if type(module) in _CONTAINERS:
            is_layer = self.n_weights[path] == 1
            return not is_layer or any(any(child.children()) for child in module.children())
        numbered = list(self._numbered(path))
        composite = [inner for inner in numbered if self.n_weights[inner] > 1]
        if len(composite) == 1:  # a stage of one block
            is_direct = composite[0].rpartition(".")[0] == path
            return len(numbered) == 1 and (not is_direct or len(self._children(path)) == 1)
        spans = sorted(self.spans[inner] for inner in composite)
        gaps = zip((last for _, last in spans), (first for first, _ in spans[1:]), strict=False)
        is_cut = any(not self.cut_at.isdisjoint(range(last, first)) for last, first in gaps)
        return is_cut and 2 * len(composite) >= len(numbered)

    def _numbered(self, path: str) -> Iterator[str]:
        """Modules with a number in their key, in this one or in containers in it."""
        for inner in self._children(path):
            if type(self.modules[inner]) in _CONTAINERS:
                yield from self._numbered(inner)
            elif re.search(r"\d", inner.rpartition(".")[2]):
                yield inner

    def _children(self, path: str) -> list[str]:
        """The modules inside that hold weights, without poolings."""
        children = (f"{path}.{key}".strip(".") for key, _ in self.modules[path].named_children())
        return [
            inner
            for inner in children
            if self.n_weights[inner] and inner in self.spans and not self._is_pooling(inner)
        ]

    def _is_pooling(self, path: str) -> bool:
        return bool(re.search("Att(entio)?n.*Pool", type(self.modules[path]).__name__))

    def _find_heads(self) -> list[str]:
        """The layers that make the output of an embedding."""
        layers = [p for p in self.spans if p in self.modules and _has_weights(self.modules[p])]
        get_classifier = getattr(self.modules[""], "get_classifier", None)
        if get_classifier is not None:  # timm's models know
            known = get_classifier()
            known = known if isinstance(known, tuple) else (known,)
            inside = {id(module) for head in known if head for module in head.modules()}
            heads = [path for path in layers if id(self.modules[path]) in inside]
            if len(heads) <= len(known):
                return heads
        last = max(layers, key=lambda path: self.spans[path][1], default="")
        return [last] if last and self._is_head(last) else []

    def _is_head(self, path: str) -> bool:
        module, (first, last) = self.modules[path], self.spans[path]
        if not {first - 1, last} <= self.cut_at:  # it must be all that leads to the output
            return False
        behind = [node for node in self.nodes[last + 1 : -1] if node in self.data]
        sources = [self.modules[path] for path in map(module_path, behind) if path]
        if any(list(source.parameters(recurse=False)) for source in sources):
            return False  # a norm behind it
        if isinstance(module, nn.Linear):
            names = [type(source).__name__ for source in sources] + [str(n.target) for n in behind]
            return not re.search("elu|swish|silu|mish|tanh", " ".join(names).lower())
        return bool(behind) and getattr(module, "kernel_size", None) == (1, 1)


def _ancestors(path: str) -> Iterator[str]:
    """The path itself, and all modules around it up to the network."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _owners(node: fx.Node) -> Iterator[str]:
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            yield str(source.target).rpartition(".")[0]


def _has_weights(module: nn.Module) -> bool:
    """Whether it is a convolution, a linear layer, an attention; not a norm or a bare vector."""
    own = [item for item in module.named_parameters(recurse=False) if _WEIGHT.search(item[0])]
    computed = getattr(module, "parametrizations", None)
    if isinstance(computed, nn.ModuleDict):  # torch's: a weight that is computed from others
        own += [(name, p) for name, of in computed.items() for p in of.parameters(recurse=False)]
    return "Norm" not in type(module).__name__ and any(value.ndim > 1 for _, value in own)


def _merge(units: list[_Unit], cuts: list[Cut]) -> Iterator[list[_Unit]]:
    """Put units together that no cut separates."""
    group: list[_Unit] = []
    for unit in units:
        last = max((member.last for member in group), default=-1)
        if group and any(last <= cut.at < unit.first for cut in cuts):
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


def _names(groups: Iterable[list[_Unit]]) -> Iterator[str]:
    """A group is named after what its units share; if others share that too, after its first."""
    groups = list(groups)
    for group in groups:
        paths = [unit.path.split(".") for unit in group]
        shared = 0
        while all(len(p) > shared and p[shared] == paths[0][shared] for p in paths):
            shared += 1
        name = ".".join(paths[0][:shared])
        others = [unit.path for other in groups if other is not group for unit in other]
        is_taken = any(f"{path}.".startswith(f"{name}.") for path in others)
        yield group[0].path if not name or is_taken else name


def _end_of_block(cuts: list[Cut], shapes: dict[fx.Node, tuple[int, ...]]) -> Cut:
    """The last of the cuts behind a block at which none of its positions was pooled or dropped."""
    first = shapes[cuts[0].node]
    return next(cut for cut in reversed(cuts) if not _is_collapsed(shapes[cut.node], first))


def _is_collapsed(shape: tuple[int, ...], first: tuple[int, ...]) -> bool:
    if _is_vector(shape):  # flattened, or pooled to a single position
        return not _is_vector(first) or len(shape) < len(first)
    return len(shape) == len(first) == 2 and shape[0] < first[0]  # (tokens, channels)


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) <= 1
