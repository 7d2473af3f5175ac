"""What a reader would call the units of a network, and the blocks that they make up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import fx, nn

from sktransfer.models._graph import Cut, module_path

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHT = re.compile("weight(_orig|_v)?$")  # the latter of norms and prunings of weights


class Unit(NamedTuple):
    """A module that a reader would call one; its nodes are number `first` to `last`."""

    path: str
    first: int
    last: int


class Outline:
    """Walks the module tree of a network for the modules that a reader would call its units.

    Attributes
    ----------
    units : list of Unit
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

    def _find_units(self) -> list[Unit]:
        paths = self._walk("")
        while len(paths) == 1 and paths[0] not in self.opened:  # all of it in one module: look in
            self.opened.add(paths[0])
            paths = self._walk("")
        units = [Unit(path, *self.spans[path]) for path in paths]
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
    weights = [item for item in module.named_parameters(recurse=False) if _WEIGHT.search(item[0])]
    computed = getattr(module, "parametrizations", None)
    if isinstance(computed, nn.ModuleDict):  # torch's: a weight that is computed from others
        weights += [
            (name, p) for name, of in computed.items() for p in of.parameters(recurse=False)
        ]
    return "Norm" not in type(module).__name__ and any(value.ndim > 1 for _, value in weights)


def merge(units: list[Unit], cuts: list[Cut]) -> Iterator[list[Unit]]:
    """Put units together that no cut separates."""
    group: list[Unit] = []
    for unit in units:
        last = max((member.last for member in group), default=-1)
        if group and any(last <= cut.at < unit.first for cut in cuts):
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


def block_names(groups: Iterable[list[Unit]]) -> Iterator[str]:
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


def end_of_block(cuts: list[Cut], shapes: dict[fx.Node, tuple[int, ...]]) -> Cut:
    """The last of the cuts behind a block at which none of its positions was pooled or dropped."""
    first = shapes[cuts[0].node]
    return next(cut for cut in reversed(cuts) if not _is_collapsed(shapes[cut.node], first))


def _is_collapsed(shape: tuple[int, ...], first: tuple[int, ...]) -> bool:
    if _is_vector(shape):  # flattened, or pooled to a single position
        return not _is_vector(first) or len(shape) < len(first)
    return len(shape) == len(first) == 2 and shape[0] < first[0]  # (tokens, channels)


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) <= 1
