"""State dicts: read them safely, load them whole, and tell networks apart by their weights."""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import inspect
import logging
import os
import pickle
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import xxhash
from torch import fx, nn
from torch.nn.parameter import is_lazy

from sktransfer.io._files import open_regular
from sktransfer.models._modules import computed_attributes, load_script, script_bytes
from sktransfer.models._sources import Sources, file_of, is_known_by_version


def weights_path(weights: Any) -> Path | None:
    """Return the file that `weights` names, or None if it is no path."""
    if not _is_path(weights):
        return None
    path = Path(weights).expanduser()
    try:
        open_regular(path).close()
    except FileNotFoundError as error:
        where = "" if path.is_absolute() else f" in {os.getcwd()!r}, from which it is looked for"
        raise ValueError(
            f"weights={str(weights)!r}: there is no such file{where}. If it was moved, name its "
            "new place by set_params(weights='path/to/the/file')."
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"weights={str(weights)!r} can't be read: {reason}.") from error
    return path.resolve()


def file_beside(weights: Any, name: str) -> Path | None:
    """Return the file to load into a network that has weights; None to leave it as it is.

    Raises
    ------
    ValueError
        If `weights` names published ones, or a file that is not there.
    """
    if weights is None or (isinstance(weights, str) and weights == "default"):
        return None
    if (path := weights_path(weights)) is not None:
        return path
    raise ValueError(
        f"weights={weights!r} names published weights, beside a network ({name}) that has its own. "
        "Pass weights='default' for these, a path to a state dict, or the network by its name."
    )


def portable_weights(weights: Any) -> Any:
    """Return `weights` as another process, in another folder, finds them: files by full path."""
    if not _is_path(weights):
        return weights
    # A text: paths of another system can't be unpickled, and skops does not know them.
    path = Path(weights).expanduser()
    return str(path.resolve()) if path.exists() else os.fspath(weights)


def _is_path(weights: Any) -> bool:
    if isinstance(weights, str):
        return os.sep in weights or Path(weights).suffix != ""
    return isinstance(weights, os.PathLike)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict without running code that the file may hold."""
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights={str(path)!r} was refused: it is not a plain state dict, and reading it "
            "could run code. Save the tensors alone: torch.save(network.state_dict(), path)."
        ) from error
    except Exception as error:
        raise ValueError(f"weights={str(path)!r} can't be read as a state dict: {error}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    entries = list(state.values()) if isinstance(state, Mapping) else []
    if not entries or not all(isinstance(entry, torch.Tensor) for entry in entries):
        raise ValueError(
            f"weights={str(path)!r} holds no state dict (a mapping of names to tensors) but a "
            f"{type(state).__name__}. Save one with torch.save(network.state_dict(), path)."
        )
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_state(
    create: Callable[..., nn.Module] | None,
    network: nn.Module,
    state: Mapping[str, torch.Tensor],
    name: str,
    source: Any,
) -> nn.Module:
    """Load `state`, all of it; a head of another number of classes is made to fit, by `create`."""
    expected = network.state_dict()
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    other = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    sizes = {len(state[key]) for key in other if expected[key].ndim}
    if create and other and not missing and not unknown and len(sizes) == 1:
        resized = create(num_classes=sizes.pop())
        if all(value.shape == state[key].shape for key, value in resized.state_dict().items()):
            network, other = resized, []
    if missing or unknown or other:
        problems = [
            *(f"{key} is missing" for key in missing[:2]),
            *(f"{key} is not known" for key in unknown[:2]),
            *(f"{k} is {tuple(state[k].shape)}, not {tuple(expected[k].shape)}" for k in other[:2]),
        ]
        raise ValueError(
            f"weights={str(source)!r} does not hold the weights of {name!r}: {'; '.join(problems)} "
            f"({len(missing) + len(unknown) + len(other)} entries differ of {len(expected)}). "
            "Name the architecture that the file was saved from."
        )
    _check_values(state, network.state_dict(), source)
    network.load_state_dict(state)
    return network


def _check_values(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], source: Any
) -> None:
    """Raise ValueError for a tensor with which a network could not compute."""
    for name, tensor in state.items():
        if (problem := _problem(tensor, expected[name])) is not None:
            raise ValueError(
                f"weights={str(source)!r}: {name} {problem}. Save plain floating-point tensors "
                "with finite values: torch.save(network.state_dict(), path)."
            )


def _problem(tensor: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Say what is wrong with a tensor that is to take the place of `expected`."""
    if tensor.is_meta:
        return "has a shape but no values (it is on torch's meta device)"
    if tensor.layout != torch.strided:
        return f"is sparse ({tensor.layout})"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype})"
    if expected.is_floating_point() and not tensor.is_floating_point():
        return f"is {tensor.dtype}, not floating-point"
    if not is_finite(tensor) and is_finite(expected):  # a mask of a network may hold infinity
        return f"holds {_counted(tensor)}"
    return None


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; as fast as the memory can be read."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # torch can't compare floats of 8 bits
        tensor = tensor.float()
    # Both are NaN if any value is. Of a flat tensor they come ten times faster.
    return all(bool(end.isfinite()) for end in tensor.detach().reshape(-1).aminmax())


def _counted(tensor: torch.Tensor) -> str:
    tensor = tensor.float()
    counts = {"NaN": int(tensor.isnan().sum()), "infinity": int(tensor.isinf().sum())}
    kinds = " and ".join(f"{kind} {n} times" for kind, n in counts.items() if n)
    return f"{kinds}, among {tensor.numel()} values"


def not_finite(network: nn.Module) -> str | None:
    """Return the name of a weight or statistic of a network that holds NaN or infinity."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        if isinstance(value, torch.jit.ScriptModule):
            yield from self._script_parts(value)
            return
        yield type(value).__qualname__
        if isinstance(value, torch.Tensor):
            yield from _tensor_parts(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            yield f"{value.dtype.str} {value.shape}"
            yield value.tobytes()
        elif isinstance(value, nn.Module):
            yield from self._module_parts(value)
        elif isinstance(value, Mapping):
            yield from (self(part) for item in value.items() for part in item)
        elif isinstance(value, (set, frozenset)):
            yield from sorted(map(self, value))  # their order is another one in every process
        elif isinstance(value, (list, tuple)):
            yield from map(self, value)
        elif isinstance(value, types.ModuleType):
            yield value.__name__
            yield self._sources.digest(value.__name__) or ""
        elif isinstance(value, logging.Logger):
            yield value.name  # the rest of it is that of all loggers, and shapes no result
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
        elif inspect.isroutine(value):  # written in C
            yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"
        elif isinstance(value, (fx.Graph, torch.jit.ScriptFunction)):
            yield str(value if isinstance(value, fx.Graph) else value.inlined_graph)
        else:
            yield from self._object_parts(value)

    def _module_parts(self, module: nn.Module) -> Iterator[str | bytes]:
        yield self(type(module))
        # By itself, too: somebody may have replaced it on the class of a package.
        yield self(getattr(type(module), "forward", None))
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
        graph: Any = load_script(script_bytes(module)).inlined_graph
        constants = [node for node in graph.findAllNodes("prim::Constant") if node.hasAttributes()]
        for node in constants:
            if node.kindOf("value") == "t":
                yield self(node.t("value"))
        text = str(torch._C._jit_pass_canonicalize(graph))
        yield re.sub(r"___torch_mangle_\d+\.|\s*#.*|prim::Constant\[value=.* ]]", "", text)

    def _class_parts(self, cls: type) -> Iterator[str]:
        for base in cls.__mro__:
            yield f"{base.__module__}.{base.__qualname__}"
            if is_known_by_version(base.__module__, file_of(base.__module__)):
                continue
            source = self._sources.digest(base.__module__)
            yield source or ""
            for key, value in sorted(vars(base).items()):
                is_member = inspect.isroutine(value) or not key.startswith(("__", "_abc_"))
                # Somebody may have replaced a method on the class of a package.
                if is_member and (source is None or _is_from_elsewhere(value, base.__module__)):
                    yield from (key, self(value))

    def _function_parts(self, function: types.FunctionType) -> Iterator[str]:
        yield f"{function.__module__}.{function.__qualname__}"
        yield from map(self, (function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield self(cell.cell_contents)
        code, module = function.__code__, str(function.__globals__.get("__name__"))
        if is_known_by_version(module, code.co_filename):
            return
        source = None if _is_from_elsewhere(function, module) else self._sources.digest(module)
        yield source or self(code)
        for name in sorted(_global_names(code) & function.__globals__.keys()):
            value = function.__globals__[name]
            if source is None or _is_of_another_package(value, module):
                yield self._global(value, set(code.co_names))

    def _global(self, value: Any, names: set[str]) -> str:
        """Describe what a function calls: of a module, what it may use by these names."""
        if not isinstance(value, types.ModuleType) or is_known_by_version(
            value.__name__, file_of(value.__name__)
        ):
            return self(value)
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


_MODULE_STATE = {"training", *vars(nn.Module())}  # what every module has, weights included


def _is_from_elsewhere(member: Any, module: str) -> bool:
    """Return whether a function of a class, or in a property of it, is not that of a module."""
    function = getattr(member, "__func__", getattr(member, "fget", member))
    if not isinstance(function, types.FunctionType):
        return False
    of = sys.modules.get(module)
    return of is None or function.__globals__ is not vars(of)


def _is_of_another_package(value: Any, module: str) -> bool:
    """Return whether a function or a class is not that of the package of a module."""
    if not isinstance(value, (type, types.FunctionType, types.ModuleType)):
        return False
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return name.partition(".")[0] != module.partition(".")[0]


def _global_names(code: types.CodeType) -> set[str]:
    loads = (step for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return {step.argval for step in loads}.union(*map(_global_names, inner))


def _tensor_parts(tensor: torch.Tensor) -> Iterator[str | bytes]:
    yield f"{tensor.dtype} {tuple(tensor.shape)}"
    plain = tensor.detach()
    plain = plain.dequantize() if plain.is_quantized else plain
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    plain = plain.cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    if plain.numel():
        yield xxhash.xxh3_128_digest(plain.view(torch.uint8).numpy().data)
