"""The graph of a network: traced once, its sizes and cut points, and what lies between two cuts.

A *cut point* is a place in the graph where one tensor carries all that the rest of the network
needs to know of the image.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torchvision
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sktransfer.models._modules import copy_of, one_tensor, set_eval

_BATCHES = (2, 3, 5)  # two batch sizes give a line, the third one tells whether it is one


class Cut(NamedTuple):
    """After the graph's node number `at`, `node` is all that is left of the image."""

    at: int
    node: fx.Node


# --- Tracing -------------------------------------------------------------------------------------


# x += y changes what other names stand for, too, where x is a tensor; not so x = x + y.
_OUT_OF_PLACE: dict[Any, Any] = {
    getattr(operator, f"i{name.strip('_')}"): getattr(operator, name)
    for name in "add sub mul truediv floordiv mod pow and_ or_ xor lshift rshift".split()
}


class _Proxy(fx.Proxy):
    """Stands for a value, and records what changes it in place; torch.fx has only copies."""


def _recorded(change: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", change, (self, other), {})


for _change in _OUT_OF_PLACE:
    setattr(_Proxy, f"__{_change.__name__}__", _recorded(_change))


class _Tracer(fx.Tracer):
    """Traces a network as a function of its first argument; the others keep their defaults.

    Modules of the classes `whole` are not looked into.
    """

    def __init__(self, whole: tuple[type, ...] = ()) -> None:
        functions, self.leaves = (), whole
        if "timm" in sys.modules:  # else the network is not one of timm's
            from timm.models import get_notrace_functions, get_notrace_modules

            functions = tuple(get_notrace_functions())
            self.leaves = (*whole, *get_notrace_modules())
        modules: Any = [math, torchvision.ops]
        if "einops" in sys.modules:
            modules.append(sys.modules["einops"])
        super().__init__(autowrap_modules=tuple(modules), autowrap_functions=functions)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # Not root_fn, the forward of the class: the user may have replaced that of the instance,
        # and the network may have hooks.
        image = self.create_proxy("placeholder", "image", (), {})
        return (lambda root, image: root._call_impl(image)), [self.root, image]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer whether images are of the type of a weight: a network converts them if not."""
        node = obj.node
        if node.target in (operator.eq, operator.ne):
            left, right = map(self._dtype, node.args)
            if left is not None and right is not None:
                return node.target(left, right)
        return super().to_bool(obj)

    def _dtype(self, value: Any) -> torch.dtype | None:
        """Return the type that a node stands for, of images and of weights; None if of others."""
        if not (isinstance(value, fx.Node) and value.target is getattr and "dtype" in value.args):
            return value if isinstance(value, torch.dtype) else None
        owner: Any = value.args[0]
        if owner.op == "get_attr":
            path, _, name = owner.target.rpartition(".")
            # As an attribute of its module, it is a proxy now.
            weight = self.root.get_submodule(path)._parameters.get(name)
            return None if weight is None else weight.dtype
        return torch.float32 if owner.op == "placeholder" else None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def trace(network: nn.Module) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """Trace in eval mode; returns the graph and the tensors that it, not the network, owns."""
    if isinstance(network, torch.jit.ScriptModule):
        raise TypeError("it was compiled by torch.jit; the network that it was made of can be cut")
    before = {module: dict(vars(module)) for module in network.modules()}
    try:
        set_eval(network)
        graph = _trace_around(network)
        _open_output(graph)
    finally:
        # The tracer leaves the tensors that it met on the way as attributes of the network, and
        # hooks that compute weights leave what stands for them in the graph.
        new = sorted(set(vars(network)) - set(before[network]))
        constants = {name: network.__dict__.pop(name) for name in new}
        for module, attributes in before.items():
            for name in vars(module).keys() - attributes:
                del vars(module)[name]
            vars(module).update(attributes)
    return graph, {name: value for name, value in constants.items() if torch.is_tensor(value)}


def _trace_around(network: nn.Module) -> fx.Graph:
    """Trace a network, but take modules whole that can't be traced.

    What a module does may depend on the size of its input, which is unknown to the tracer.
    """
    whole: tuple[type, ...] = ()
    while True:
        tracer, had_einops = _Tracer(whole), "einops" in sys.modules
        try:
            return tracer.trace(network)
        except Exception:
            if not had_einops and "einops" in sys.modules:  # imported by a forward
                continue
            _, (path, innermost) = [("", ("", None)), *tracer.module_stack.items()][-1]
            if not path or innermost is None or innermost in whole:
                raise
            whole = (*whole, innermost)


def _open_output(graph: fx.Graph) -> None:
    """Let the graph return the parts of a named tuple or data class, which it has as one node."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    (result,) = output.args
    made_by: Any = result.target if isinstance(result, fx.Node) else None
    names: Any
    if dataclasses.is_dataclass(made_by):
        names = [field.name for field in dataclasses.fields(made_by)]
    elif (names := getattr(made_by, "_fields", None)) is None:
        return
    output.args = ({**dict(zip(names, result.args, strict=False)), **result.kwargs},)
    graph.erase_node(result)


def choose_output(graph: fx.Graph, values: Values) -> None:
    """Let the graph return one tensor, where the network returns a container of it."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    (result,) = output.args
    chosen = one_tensor(result, fx.Node, lambda node: len(values.shapes.get(node, ())) == 3)
    output.args = (chosen,)


def module_path(node: fx.Node) -> str:
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
class Values:
    """What is known of each node for images of one size.

    `data`: nodes that carry the image. `shapes`: of those that hold one tensor of real numbers
    with the batch as its first axis, the shape without it. `sizes`: of nodes that hold no tensor,
    the value. `overwritten`: nodes whose tensor is changed in place by a later one.
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
        try:
            value = super().run_node(n)
        except RuntimeError:  # maybe as torch has no autocast for the meta device
            with _AsOnCpu():
                value = super().run_node(n)
        self.records.append((value, value._version if torch.is_tensor(value) else 0))
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        # Tracing may have written the device of the network into the graph.
        return fx.node.map_aggregate(super().fetch_args_kwargs_from_env(n), _to_meta)


class _ShapesOnly(TorchFunctionMode):
    """Skips functions whose result has the shape of their input.

    On the meta device, torch takes them apart in Python, which made up most of the propagation.
    """

    _SKIPPED = (F.hardtanh, F.relu6, F.hardsigmoid, F.hardswish, F.silu, F.gelu)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._SKIPPED and args and args[0].is_floating_point():
            # A tensor counts how often it is changed in place.
            return args[0].zero_() if kwargs.get("inplace") else torch.empty_like(args[0])
        if func is F.batch_norm and not kwargs["training"] and _fits(*args):
            return torch.empty_like(args[0])
        if func is F.layer_norm and tuple(args[0].shape[-len(args[1]) :]) == tuple(args[1]):
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


class _AsOnCpu(TorchFunctionMode):
    """Lets a module that asks on what device it runs, to leave autocast there, find the CPU."""

    _DEVICE = torch.Tensor.device.__get__

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == self._DEVICE:
            return torch.device("cpu")
        named = {name: _to_meta(value) for name, value in (kwargs or {}).items()}
        return func(*map(_to_meta, args), **named)


def _to_meta(value: Any) -> Any:
    is_device = isinstance(value, torch.device) or (isinstance(value, str) and value == "cpu")
    return torch.device("meta") if is_device else value


def _fits(x: Any, mean: Any = None, *_: Any) -> bool:
    """Tell whether a batch-norm takes `x`; the channels may depend on the size of images."""
    return torch.is_tensor(mean) and x.ndim > 1 and x.shape[1] == len(mean)


def propagate(graph: fx.Graph, lookup: Callable[[str], Any], shape: tuple[int, int, int]) -> Values:
    """Run the graph on images (c, h, w) without computing anything, on the meta device."""
    twin = _on_meta(as_module(graph, lookup))
    runs = []
    for batch in _BATCHES:
        recorder = _Recorder(twin)
        with torch.inference_mode(False), torch.no_grad(), torch.device("meta"), _ShapesOnly():
            recorder.run(torch.empty(batch, *shape, dtype=torch.float32))
        runs.append(recorder.records)
    result = Values(set(), {}, {}, set())
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
            is_real = not values[0].is_complex()
            if batches == _BATCHES and len(shapes) == 1 and is_real:
                result.shapes[node] = shapes.pop()
            if values[0]._version != records[0][1]:
                result.overwritten.add(node)
    return result


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Within this context, floating-point operations of all modules are counted."""
    # The counter does not know fused attention on a CPU: it would count nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def count_flops(module: fx.GraphModule, shape: tuple[int, ...]) -> int:
    """Return the floating-point operations for one input, without computing anything."""
    recorder = _Recorder(_on_meta(module))
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("meta"),
        counted_flops() as counter,
        _ShapesOnly(),
    ):
        recorder.run(torch.empty(1, *shape, dtype=torch.float32))
    return counter.get_total_flops()


def _on_meta(module: fx.GraphModule) -> fx.GraphModule:
    tensors = [*module.parameters(), *module.buffers()]
    memo = {}
    for tensor in tensors:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, dtype=dtype, device="meta", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy_of(module, memo)


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


# --- Cuts ----------------------------------------------------------------------------------------


def find_cuts(nodes: list[fx.Node], values: Values) -> list[Cut]:
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
            cuts.append(Cut(i, only))
    if not cuts or cuts[-1].node is not result:
        raise ValueError("its result has no row of real numbers for each image")
    return cuts


# --- Slices --------------------------------------------------------------------------------------


class Slicer:
    """Writes the graph between two cuts.

    What does not depend on the image is recomputed in the slice. Sizes of tensors that lie before
    the cut are written as numbers, or as a function of the batch size of the slice's input.
    """

    def __init__(self, nodes: list[fx.Node], values: Values, start: Cut, stop: Cut) -> None:
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
            copied = self.graph.create_node(node.op, self._target(node), args, kwargs, node.name)
            copied.meta = dict(node.meta)
        self.copies[node] = copied
        return copied

    def _target(self, node: fx.Node) -> Any:
        """Return what a node calls; a number, of which torch.fx has one name, gets a new one."""
        if self._may_copy(node):
            return "reshape"
        is_number = node.op == "call_function" and node in self.values.sizes
        return _OUT_OF_PLACE.get(node.target, node.target) if is_number else node.target

    def _may_copy(self, node: fx.Node) -> bool:
        """Tell whether a view can be a copy: a map with its channels last has none of its rows."""
        if (node.op, node.target) != ("call_method", "view"):
            return False
        arguments = (*node.args, *node.kwargs.values())
        known = [self.values.sizes.get(a, a) if isinstance(a, fx.Node) else a for a in arguments]
        is_changed = not self.values.overwritten.isdisjoint((node, node.args[0]))  # through it
        return not is_changed and not any(isinstance(value, torch.dtype) for value in known)

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


def as_module(graph: fx.Graph, lookup: Callable[[str], Any]) -> fx.GraphModule:
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    module = fx.GraphModule({target: lookup(target) for target in targets}, graph)
    for inner in module.modules():
        if type(inner) is nn.Module or inner is module:  # made here, only to hold the others
            inner.training = False
    return module


def refresh(module: fx.GraphModule, lookup: Callable[[str], Any]) -> fx.GraphModule:
    """Fetch buffers again: a network that moves to another device gets new ones."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            setattr(module.get_submodule(owner), name, lookup(node.target))
    return module
