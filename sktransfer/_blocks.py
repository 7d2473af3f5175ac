"""A network as an ordered list of blocks that can be cut between any two of them.

The network is traced once. A *cut point* is a place in its graph where one tensor carries all that
the rest of the network needs to know of the image; a *block* lies between two of them.
"""

from __future__ import annotations

import copy
import difflib
import math
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torchvision
from torch import fx, nn

_BATCHES = (2, 3, 5)  # two batch sizes give a line, the third one tells whether it is one
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class TracingError(ValueError):
    """The network cannot be written as a graph, so it has no blocks."""


class _Cut(NamedTuple):
    """After the graph's node number `at`, `node` is all that is left of the image."""

    at: int
    node: fx.Node


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
            self._graph, self._constants = _trace(network)
            self._nodes = list(self._graph.nodes)
            values = _propagate(self._graph, self._lookup, self.image_size)
            self._values = {self.image_size: values}
            self._find_blocks(values)
        except Exception as error:
            raise TracingError(
                f"{type(network).__name__} cannot be cut into blocks: {_reason(error)}. "
                "The whole network can still be used, with layer='output'."
            ) from error

    def _find_blocks(self, values: _Values) -> None:
        cuts = _find_cuts(self._nodes, values)
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
            graph = _Slicer(self._nodes, self._values_at(size), first, last).graph
            self._slices[key] = _module(graph, self._lookup)
        return _refresh(self._slices[key], self._lookup)

    def _cut(self, position: int) -> _Cut:
        if not 0 <= position <= self.output:
            raise ValueError(f"Positions are 0 to {self.output}, got {position}.")
        return self._cuts[position]

    def _size(self, image_size: tuple[int, int] | None) -> tuple[int, int]:
        return self.image_size if image_size is None else (int(image_size[0]), int(image_size[1]))

    def _values_at(self, image_size: tuple[int, int] | None) -> _Values:
        size = self._size(image_size)
        if size not in self._values:
            try:
                self._values[size] = _propagate(self._graph, self._lookup, size)
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


# --- Tracing -------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Traces a network as a function of its first argument; the others keep their defaults."""

    def __init__(self) -> None:
        functions, self.leaves = (), ()
        if "timm" in sys.modules:  # else the network is not one of timm's
            from timm.models import get_notrace_functions, get_notrace_modules

            functions = tuple(get_notrace_functions())
            self.leaves = tuple(get_notrace_modules())
        super().__init__(autowrap_modules=(math, torchvision.ops), autowrap_functions=functions)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "image", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def _trace(network: nn.Module) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """Trace in eval mode; returns the graph and the tensors that it, not the network, owns."""
    modes = {module: module.training for module in network.modules()}
    attributes = set(vars(network))
    try:
        network.eval()
        graph = _Tracer().trace(network)
    finally:
        for module, training in modes.items():
            module.training = training
        # The tracer leaves the tensors that it met on the way as attributes of the network.
        new = sorted(set(vars(network)) - attributes)
        constants = {name: network.__dict__.pop(name) for name in new}
    (result,) = next(node for node in reversed(graph.nodes) if node.op == "output").args
    if not isinstance(result, fx.Node):
        raise TypeError(f"it returns a {type(result).__name__}, not one tensor")
    return graph, {name: value for name, value in constants.items() if torch.is_tensor(value)}


def _path(node: fx.Node) -> str:
    """Module in which the node was traced."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


# --- Propagation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Affine:
    """A number that depends on the batch size n as ``scale * n + offset``."""

    scale: int
    offset: int


@dataclass
class _Values:
    """What is known of each node for images of one size.

    `data`: nodes that carry the image. `shapes`: of those that hold one tensor with the batch as
    its first axis, the shape without it. `sizes`: of nodes that hold no tensor, the value.
    `overwritten`: nodes whose tensor is changed in place by a later one.
    """

    data: set[fx.Node]
    shapes: dict[fx.Node, tuple[int, ...]]
    sizes: dict[fx.Node, Any]
    overwritten: set[fx.Node]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps each node's value, and its version when it was made."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.records: list[tuple[Any, int]] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.records.append((value, value._version if torch.is_tensor(value) else 0))
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        # Tracing may have written the device of the network into the graph.
        return fx.node.map_aggregate(
            super().fetch_args_kwargs_from_env(n),
            lambda value: torch.device("meta") if isinstance(value, torch.device) else value,
        )


def _propagate(
    graph: fx.Graph, lookup: Callable[[str], Any], image_size: tuple[int, int]
) -> _Values:
    """Run the graph without computing anything, on the meta device."""
    twin = _on_meta(_module(graph, lookup))
    runs = []
    for batch in _BATCHES:
        recorder = _Recorder(twin)
        with torch.no_grad(), torch.device("meta"):
            recorder.run(torch.empty(batch, 3, *image_size))
        runs.append(recorder.records)
    result = _Values(set(), {}, {}, set())
    for node, records in zip(graph.nodes, zip(*runs, strict=True), strict=True):
        values = [value for value, _ in records]
        if _holds_tensor(values[0]):
            if node.op == "placeholder" or any(n in result.data for n in node.all_input_nodes):
                result.data.add(node)
        else:
            try:
                result.sizes[node] = _as_function_of_batch(values)
            except ValueError:
                result.data.add(node)  # it cannot be recomputed: it must not be alive at a cut
        if all(map(torch.is_tensor, values)):
            shapes = {tuple(value.shape[1:]) for value in values}
            batches = tuple(value.shape[0] if value.ndim else 0 for value in values)
            if batches == _BATCHES and len(shapes) == 1:
                result.shapes[node] = shapes.pop()
            if values[0]._version != records[0][1]:
                result.overwritten.add(node)
    return result


def _on_meta(module: fx.GraphModule) -> fx.GraphModule:
    tensors = [*module.parameters(), *module.buffers()]
    memo = {}
    for tensor in tensors:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, dtype=dtype, device="meta", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(module, memo)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, torch.Tensor)


def _as_function_of_batch(values: list[Any]) -> Any:
    """Write the values found at the batch sizes `_BATCHES` as one expression."""
    first = values[0]
    if isinstance(first, (tuple, list)) and len({len(value) for value in values}) == 1:
        parts = [_as_function_of_batch(list(part)) for part in zip(*values, strict=True)]
        return parts if isinstance(first, list) else tuple(parts)
    if all(type(value) is type(first) and value == first for value in values):
        return first
    if all(type(value) is int for value in values):
        scale = (values[1] - first) // (_BATCHES[1] - _BATCHES[0])
        offset = first - scale * _BATCHES[0]
        if all(v == scale * n + offset for v, n in zip(values, _BATCHES, strict=True)):
            return _Affine(scale, offset)
    raise ValueError("The value is not an affine function of the batch size.")


# --- Cuts and blocks -----------------------------------------------------------------------------


def _find_cuts(nodes: list[fx.Node], values: _Values) -> list[_Cut]:
    """All places where a single tensor carries the image, the image and the output included."""
    number = {node: i for i, node in enumerate(nodes)}
    last_use = {
        node: max((number[user] for user in node.users if user in values.data), default=-1)
        for node in values.data
    }
    (result,) = nodes[-1].all_input_nodes
    last_use[result] = len(nodes)
    cuts, alive = [], set()
    for i, node in enumerate(nodes[:-1]):
        if node in values.data:
            alive.add(node)
        alive = {node for node in alive if last_use[node] > i}
        if len(alive) == 1 and (only := next(iter(alive))) in values.shapes:
            cuts.append(_Cut(i, only))
    if not cuts or cuts[-1].node is not result:
        raise ValueError("the result has no row for each image")
    return cuts


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
        self, network: nn.Module, nodes: list[fx.Node], data: set[fx.Node], cuts: list[_Cut]
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
                for path in {_path(node), *_owners(node)}:
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
        sources = [self.modules[path] for path in map(_path, behind) if path]
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
    return "Norm" not in type(module).__name__ and any(
        name.endswith("weight") and parameter.ndim > 1
        for name, parameter in module.named_parameters(recurse=False)
    )


def _merge(units: list[_Unit], cuts: list[_Cut]) -> Iterator[list[_Unit]]:
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


def _end_of_block(cuts: list[_Cut], shapes: dict[fx.Node, tuple[int, ...]]) -> _Cut:
    """The last of the cuts behind a block at which none of its positions was pooled or dropped."""
    first = shapes[cuts[0].node]
    return next(cut for cut in reversed(cuts) if not _is_collapsed(shapes[cut.node], first))


def _is_collapsed(shape: tuple[int, ...], first: tuple[int, ...]) -> bool:
    if _is_vector(shape):  # flattened, or pooled to a single position
        return not _is_vector(first) or len(shape) < len(first)
    return len(shape) == len(first) == 2 and shape[0] < first[0]  # (tokens, channels)


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) <= 1


# --- Slices --------------------------------------------------------------------------------------


class _Slicer:
    """Writes the graph between two cuts.

    What does not depend on the image is recomputed in the slice. Sizes of tensors that lie before
    the cut are written as numbers, or as a function of the batch size of the slice's input.
    """

    def __init__(self, nodes: list[fx.Node], values: _Values, start: _Cut, stop: _Cut) -> None:
        self.values = values
        self.graph = fx.Graph()
        self.input = self.graph.placeholder("x")
        self.live: dict[fx.Node, bool] = {}  # whether a size can be read from the slice's tensors
        self.inside = set(nodes[start.at + 1 : stop.at + 1])
        self.batch: fx.Node | None = None
        source = self.input
        if start.node in values.overwritten and start.at < stop.at:
            source = self.graph.call_method("clone", (source,))  # the caller keeps the activation
        self.copies: dict[fx.Node, Any] = {start.node: source}
        for node in nodes[start.at + 1 : stop.at + 1]:
            if node in values.data:
                self._copy(node)
        self.graph.output(self.copies[stop.node])

    def _copy(self, node: fx.Node) -> Any:
        if node in self.copies:
            return self.copies[node]
        if node in self.values.sizes and not self._is_live(node):
            copied = self._write(self.values.sizes[node])
        else:
            args = fx.node.map_aggregate(node.args, self._argument)
            kwargs = fx.node.map_aggregate(node.kwargs, self._argument)
            copied = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
            copied.meta = dict(node.meta)
        self.copies[node] = copied
        return copied

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self._copy(argument)
        return self._write(argument) if isinstance(argument, torch.device) else argument

    def _is_live(self, node: fx.Node) -> bool:
        if node not in self.live:
            sources = node.all_input_nodes
            known = all(n in self.copies for n in sources if n in self.values.data)
            self.live[node] = (known and node in self.inside) and any(
                n in self.values.data or (n in self.values.sizes and self._is_live(n))
                for n in sources
            )
        return self.live[node]

    def _write(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._write(part) for part in value)
        if isinstance(value, torch.device):  # the slice runs where its input is
            return self.graph.call_function(getattr, (self.input, "device"))
        if value is torch.float32:  # nor does it pin the precision
            return self.graph.call_function(getattr, (self.input, "dtype"))
        if not isinstance(value, _Affine):
            return value
        if self.batch is None:
            self.batch = self.graph.call_method("size", (self.input, 0))
        written = self.batch
        if value.scale != 1:
            written = self.graph.call_function(operator.mul, (written, value.scale))
        if value.offset:
            written = self.graph.call_function(operator.add, (written, value.offset))
        return written


def _module(graph: fx.Graph, lookup: Callable[[str], Any]) -> fx.GraphModule:
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    module = fx.GraphModule({target: lookup(target) for target in targets}, graph)
    for inner in module.modules():
        if type(inner) is nn.Module or inner is module:  # made here, only to hold the others
            inner.training = False
    return module


def _refresh(module: fx.GraphModule, lookup: Callable[[str], Any]) -> fx.GraphModule:
    """Fetch buffers again: a network that moves to another device gets new ones."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            setattr(module.get_submodule(owner), name, lookup(node.target))
    return module
