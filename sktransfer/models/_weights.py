"""Networks are told apart by their weights, settings and code; values are checked."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import logging
import re
import sys
import types
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import fx, nn
from torch.nn.parameter import is_lazy

from sktransfer.models._modules import (
    computed_attributes,
    load_script,
    script_bytes,
    without_wrapper,
)
from sktransfer.models._sources import Sources, file_of, imports_of, is_known_by_version


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; as fast as the memory can be read."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # torch can't compare floats of 8 bits
        tensor = tensor.float()
    # Both are NaN if any value is. Of a flat tensor they come faster.
    return all(bool(end.isfinite()) for end in tensor.detach().reshape(-1).aminmax())


def counted_not_finite(tensor: torch.Tensor) -> str:
    """Say how many values of a tensor are no numbers."""
    tensor = tensor.float()
    counts = {"NaN": int(tensor.isnan().sum()), "infinity": int(tensor.isinf().sum())}
    kinds = " and ".join(f"{kind} {n} times" for kind, n in counts.items() if n)
    return f"{kinds}, among {tensor.numel()} values"


def not_finite(network: nn.Module) -> str | None:
    """Return the name of a weight or statistic of a network that holds NaN or infinity."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)


def fingerprint(network: nn.Module) -> str:
    """Digest all that shapes what a network computes: weights, settings, hooks and its own code.

    Equal in every process for equal networks; mode, device and `requires_grad` do not count.
    Code of torch, torchvision, NumPy and Python is known by its name, that of other installed
    packages by its source files, and all other code by what it does.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise ValueError(
                f"{name} of the network {type(network).__name__} has no values yet: load its "
                "weights, or run it once if it has lazy modules, before passing it as a backbone."
            )
    return Describer()(network)


class Describer:
    """Describes values by short texts that differ if the values do, alike in every process."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}  # holds the values: their ids must stay theirs
        self._open: dict[int, int] = {}  # values that are being described, and their depth
        self._replaced: dict[type, list[tuple[str, Any]]] = {}  # methods of classes of torch
        self._sources = Sources()

    def __call__(self, value: Any) -> str:
        if value is None or type(value) in (bool, int, float, complex, str, bytes):
            return repr(value)
        if id(value) in self._open:
            return f"<around, {self._open[id(value)]}>"
        if id(value) not in self._known:
            self._open[id(value)] = len(self._open)
            try:
                digest = xxhash.xxh3_128()
                for part in self._parts(value):
                    part = part if isinstance(part, bytes) else part.encode()
                    digest.update(f"{len(part)}:".encode())
                    digest.update(part)
            finally:
                del self._open[id(value)]
            self._known[id(value)] = value, digest.hexdigest()
        return self._known[id(value)][1]

    def _parts(self, value: Any) -> Iterator[str | bytes]:
        value = _without_compiler(value)
        if isinstance(value, torch.jit.ScriptModule):
            yield from self._script_parts(value)
            return
        if isinstance(value, logging.Logger):
            # All loggers share the rest, which shapes no result; some packages replace their class.
            yield from ("Logger", value.name)
            return
        yield type(value).__qualname__
        if type(value) not in _PLAIN and isinstance(value, _CONTAINERS):
            yield from self._container_parts(value)
        if isinstance(value, torch.Tensor):
            yield from _tensor_parts(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            yield f"{value.dtype.str} {value.shape}"
            yield value.tobytes()
        elif isinstance(value, nn.Module):
            yield from self._module_parts(value)
        elif isinstance(value, _CACHES):
            return  # what they hold depends on what ran before
        elif isinstance(value, Mapping):
            yield from (self(part) for item in value.items() for part in item)
        elif isinstance(value, (set, frozenset)):
            yield from sorted(map(self, value))  # their order is another one in every process
        elif isinstance(value, (list, tuple)):
            yield from map(self, value)
        elif isinstance(value, types.ModuleType):
            yield from self._imported_parts(value)
        elif isinstance(value, types.CodeType):
            yield value.co_code
            yield from map(self, (value.co_consts, value.co_names, value.co_varnames))
        elif isinstance(value, type):
            yield from self._class_parts(value)
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            yield from map(self, (value.__func__, getattr(value, "__self__", None)))
        elif isinstance(value, functools.partial):
            yield from map(self, (value.func, value.args, value.keywords))
        elif isinstance(value, property):
            yield self(value.fget)
        elif isinstance(value, types.FunctionType):
            yield from self._function_parts(value)
        elif isinstance(value, _WRITTEN_IN_C):
            yield f"{getattr(value, '__module__', '')}.{value.__qualname__}"
            of = getattr(value, "__self__", None)
            if not isinstance(of, (type, types.ModuleType)):
                yield self(of)
        elif isinstance(value, torch.autocast):  # which keeps what was before it
            yield self({k: v for k, v in vars(value).items() if not k.startswith("prev")})
        elif isinstance(value, fx.Graph):
            yield str(value)
        elif isinstance(value, torch.jit.ScriptFunction):
            yield _graph_text(value.inlined_graph)
        else:
            yield from self._object_parts(value)

    def _module_parts(self, module: nn.Module) -> Iterator[str | bytes]:
        yield self(type(module))
        # By itself, too: somebody may have replaced it on the class of a package.
        classes = type(module).__mro__
        yield self(next((vars(c)["forward"] for c in classes if "forward" in vars(c)), None))
        tensors = {**module._parameters, **module._buffers}
        yield from (self(part) for item in sorted(tensors.items()) for part in item)
        computed = computed_attributes(module)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield self(module.get_extra_state())
        for key, value in sorted(vars(module).items()):
            # Two modules with equal weights may still differ in a stride or a plain attribute.
            if key not in _MODULE_STATE and key not in computed:
                yield from (key, self(value))
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            yield self(list(hooks.values()))  # a copy of the network has them, too
        yield from (self(part) for item in module._modules.items() for part in item)

    def _script_parts(self, module: torch.jit.ScriptModule) -> Iterator[str | bytes]:
        """Parts of a scripted or traced module: tensors, and the graph as it is read from a file.

        What was not read from one has other names in its graph than what was.
        """
        yield from (self(part) for item in sorted(module.state_dict().items()) for part in item)
        loaded = load_script(script_bytes(module))
        graph: Any = loaded.inlined_graph
        names = {node.s("name") for node in graph.findAllNodes("prim::GetAttr")}
        for path, part in loaded.named_modules():
            own: Any = part._c
            kept = {**part._parameters, **part._buffers, **part._modules}
            for name in sorted(filter(own.hasattr, names - kept.keys())):
                yield from (f"{path}.{name}", self(own.getattr(name)))
        constants = [node for node in graph.findAllNodes("prim::Constant") if node.hasAttributes()]
        for node in constants:
            if node.kindOf("value") == "t":
                yield self(node.t("value"))
        yield _graph_text(torch._C._jit_pass_canonicalize(graph))

    def _container_parts(self, value: Any) -> Iterator[str]:
        """Parts of a subclass of a container beside what it contains."""
        if isinstance(value, defaultdict):
            yield self(value.default_factory)
        if not self._is_of_a_package(type(value)):
            yield from (self(type(value)), self(getattr(value, "__dict__", None)))

    def _imported_parts(self, module: types.ModuleType) -> Iterator[str]:
        """Parts of a module that somebody may use any name of."""
        yield module.__name__
        yield self._sources.digest(module.__name__) or ""
        if not self._is_of_a_package(module):
            names = [name for name in vars(module) if not name.startswith("__")]
            yield from (part for name in sorted(names) for part in (name, self(vars(module)[name])))

    def _is_of_a_package(self, value: type | types.ModuleType) -> bool:
        """Return whether a version, or the source files of a package, tell what it does."""
        name = value.__module__ if isinstance(value, type) else value.__name__
        is_known = is_known_by_version(name, file_of(name))
        return is_known or self._sources.digest(name) is not None

    def _class_parts(self, cls: type) -> Iterator[str]:
        for base in cls.__mro__:
            yield f"{_MAIN.get(base.__module__, base.__module__)}.{base.__qualname__}"
            if _is_class_known_by_version(base):
                if base not in self._replaced:
                    self._replaced[base] = _replaced_methods(base)
                yield from (
                    part for key, value in self._replaced[base] for part in (key, self(value))
                )
                continue
            source = self._sources.digest(base.__module__)
            yield source or ""
            for key, value in sorted(vars(base).items()):
                is_member = inspect.isroutine(value) or not key.startswith(("__", "_abc_"))
                # Somebody may have replaced a method on the class of a package.
                if is_member and (source is None or _is_from_elsewhere(value, base.__module__)):
                    yield from (key, self(value))

    def _function_parts(self, function: types.FunctionType) -> Iterator[str]:
        yield f"{_MAIN.get(function.__module__, function.__module__)}.{function.__qualname__}"
        yield from map(self, (function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield self(cell.cell_contents)
        code, module = function.__code__, str(function.__globals__.get("__name__"))
        if is_known_by_version(module, code.co_filename):
            return
        source = None if _is_from_elsewhere(function, module) else self._sources.digest(module)
        if attributes := {k: v for k, v in vars(function).items() if not k.startswith("_")}:
            yield self(attributes)
        yield source or self(code)
        names = _names(code)
        for name in sorted(_global_names(code) & function.__globals__.keys()):
            value = function.__globals__[name]
            if source is None or _is_of_another_package(value, module):
                yield self._global(value, names)
        for name in sorted(imports_of(code, function.__globals__) if source is None else ()):
            if (digest := self._sources.imported(name)) is None:
                digest = self._global(sys.modules[name], names)
            yield digest

    def _global(self, value: Any, names: set[str]) -> str:
        """Describe what a function calls: of a module, what it may use by these names."""
        if not isinstance(value, types.ModuleType):
            return self(value)
        if is_known_by_version(value.__name__, file_of(value.__name__)):
            return value.__name__
        used = sorted(names & vars(value).keys())
        return self([self._global(vars(value)[name], names - {name}) for name in used])

    def _object_parts(self, value: Any) -> Iterator[str]:
        """Parts of any other object: what pickle would keep of it, else what it prints."""
        yield self(type(value))
        try:
            reduced = value.__reduce_ex__(2)
        except Exception:
            text = repr(value)
            yield "" if " at 0x" in text else text
        else:
            if isinstance(reduced, tuple):  # the last two are iterators
                reduced = (*reduced[:3], *(list(part or ()) for part in reduced[3:5]))
            yield self(reduced)
        yield self(getattr(value, "__dict__", None) or None)


_MAIN = {"__mp_main__": "__main__"}  # as a process that was spawned calls the script
_CACHES = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
_CONTAINERS = (torch.Tensor, np.ndarray, Mapping, set, frozenset, list, tuple)
_PLAIN = {torch.Tensor, nn.Parameter, np.ndarray, dict, set, frozenset, list, tuple}
_WRITTEN_IN_C = (
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)
# What every module has, weights included, and what `torch.compile` leaves on one.
_MODULE_STATE = {"training", "_compiled_call_impl", "_is_torch_compile", *vars(nn.Module())}


def _without_compiler(value: Any) -> Any:
    """Return what `torch.compile` wraps, a function or a network; anything else as it is."""
    if isinstance(value, nn.Module):
        return without_wrapper(value)
    while isinstance(value, types.FunctionType) and hasattr(value, "_torchdynamo_orig_callable"):
        value = value._torchdynamo_orig_callable
    return value


def _is_from_elsewhere(member: Any, module: str) -> bool:
    """Return whether a function of a class, or in a property of it, is not that of a module."""
    function = getattr(member, "__func__", getattr(member, "fget", member))
    if not isinstance(function, types.FunctionType):
        return False
    of = sys.modules.get(module)
    return of is None or function.__globals__ is not vars(of)


def _is_class_known_by_version(cls: type) -> bool:
    """Return whether a class is torch's, torchvision's, NumPy's, Python's or this library's."""
    name = cls.__module__
    if name in ("builtins", "types") and "__module__" in vars(cls):
        return False  # what `exec` and `types.new_class` make seems to be of these modules
    return is_known_by_version(name, file_of(name))


def _replaced_methods(cls: type) -> list[tuple[str, Any]]:
    """Return the methods of a class that is known by version which are the user's, or a package's.

    Other packages add methods to `nn.Module` that nothing here calls.
    """
    members = {} if cls in (object, nn.Module) else vars(cls)
    return sorted(
        (key, member)
        for key, member in members.items()
        if _is_from_elsewhere(member, cls.__module__) and not _is_of_known_module(member)
    )


def _is_of_known_module(member: Any) -> bool:
    function = getattr(member, "__func__", getattr(member, "fget", member))
    module = str(function.__globals__.get("__name__"))
    is_known = is_known_by_version(module, file_of(module))
    return is_known and not _is_from_elsewhere(function, module)


def _is_of_another_package(value: Any, module: str) -> bool:
    """Return whether a function or a class is not that of the package of a module."""
    if not isinstance(value, (type, types.FunctionType, types.ModuleType)):
        return False
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return name.partition(".")[0] != module.partition(".")[0]


def _names(code: types.CodeType) -> set[str]:
    """Return what code may get from a module: all names in it, and texts, as for `getattr`."""
    texts = (const for const in code.co_consts if isinstance(const, str))
    return {*code.co_names, *texts}.union(*map(_names, _inner_codes(code)))


def _inner_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    return (const for const in code.co_consts if isinstance(const, types.CodeType))


def _global_names(code: types.CodeType) -> set[str]:
    loads = (step for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    return {step.argval for step in loads}.union(*map(_global_names, _inner_codes(code)))


def _graph_text(graph: Any) -> str:
    """Return a graph of torch.jit without tensors, places in files and numbers of classes."""
    pattern = r"___torch_mangle_\d+\.|\s*#.*|prim::Constant\[value=.* ]]"
    return re.sub(pattern, "", str(graph))


def _tensor_parts(tensor: torch.Tensor) -> Iterator[str | bytes]:
    yield f"{tensor.dtype} {tuple(tensor.shape)}"
    plain = tensor.detach()
    plain = plain.dequantize() if plain.is_quantized else plain
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    plain = plain.cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    if plain.numel():
        yield xxhash.xxh3_128_digest(plain.view(torch.uint8).numpy().data)
