"""What networks of the user's own need: wrappers off, copies, pickles, one tensor of many."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

_JIT = ".torch.jit"  # which is not developed further: how warnings of any kind that say so begin

# ------------------------------------------------------------------------------ copies


def without_wrapper(network: nn.Module) -> nn.Module:
    """Return what `torch.compile`, or a wrapper for several devices, has inside."""
    while True:
        compiled = getattr(network, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            network = compiled
        elif isinstance(network, (nn.DataParallel, DistributedDataParallel)):
            network = network.module
        else:
            return network


def copy_of(network: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a copy of a network, without wrappers; `memo` as for `copy.deepcopy`.

    Hooks such as those of `torch.nn.utils.weight_norm` leave a computed weight on their module,
    which torch refuses to copy; they compute it again at every call.
    """
    network = without_wrapper(network)
    memo = {} if memo is None else memo
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    with torch.inference_mode(False), torch.no_grad():
        copied = copy.deepcopy(network, memo)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if (inner := without_wrapper(child)) is not child:
                setattr(module, name, inner)
    return copied


def set_eval(network: nn.Module) -> None:
    """Switch to evaluation mode, if there is another: a module of `torch.export` has only one."""
    with contextlib.suppress(NotImplementedError):
        network.eval()


def computed_attributes(module: nn.Module) -> set[str]:
    """Return the attributes that hooks compute from weights before every call."""
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    norms = {str(hook.name) for hook in hooks if hasattr(hook, "compute_weight")}
    prunings = {str(hook._tensor_name) for hook in hooks if hasattr(hook, "apply_mask")}
    return norms | prunings


# ------------------------------------------------------------------------------ pickles


def portable(network: Any) -> Any:
    """Return what a pickle can hold in the place of a network; it is a network when loaded."""
    if not isinstance(network, nn.Module):
        return network
    if isinstance(network, torch.jit.ScriptModule):
        return _Portable(network)
    if any(map(parametrize.is_parametrized, network.modules())):
        return _Portable(network)
    if isinstance(network, fx.GraphModule) and hasattr(network, "_guards_fn"):
        raise pickle.PicklingError(
            "A module of torch.export can't be pickled, nor sent to another process. Pass the "
            "network that was exported; or register_model(name, builder) with a builder that reads "
            "the exported file, and pass that name."
        )
    return network


class _Portable:
    """Stands in a pickle for a network that torch does not let be pickled."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __reduce__(self) -> Any:
        if isinstance(self.network, torch.jit.ScriptModule):
            return load_script, (script_bytes(self.network),)
        bare = copy_of(self.network)
        for module in bare.modules():
            if parametrize.is_parametrized(module):
                module.__class__ = type(module).__bases__[0]
                _drop_local_hooks(module)
        return _with_parametrizations, (bare,)


def _drop_local_hooks(module: nn.Module) -> None:
    """Drop what reads state dicts of the older weight norm: no pickle can hold it."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if "<locals>" in getattr(getattr(hook, "hook", hook), "__qualname__", ""):
            del hooks[key]


def script_bytes(network: torch.jit.ScriptModule) -> bytes:
    """Return the file of a scripted or traced module."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _JIT)
        torch.jit.save(network, buffer)
    return buffer.getvalue()


def load_script(content: bytes) -> torch.jit.ScriptModule:
    """Return the module of a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _JIT)
        return torch.jit.load(io.BytesIO(content))


def _with_parametrizations(network: nn.Module) -> nn.Module:
    """Give modules back the class by which they compute their weights."""
    for module in network.modules():
        lists = module._modules.get("parametrizations")
        if isinstance(lists, nn.ModuleDict):
            parametrize._inject_new_class(module)
            for name in lists:
                parametrize._inject_property(module, name)
    return network


# ------------------------------------------------------------------------------ outputs


class OutputError(TypeError):
    """A network returns something else than one tensor with a row for each image."""

    def __init__(self, what: str, subject: str = "it") -> None:
        self.what = what
        super().__init__(
            f"{subject} returns {what}, not one tensor with a row of numbers for each image. Wrap "
            "it in a module whose forward returns the tensor that you want."
        )


def one_tensor(output: Any, kind: type, is_map: Callable[[Any], bool]) -> Any:
    """Return what stands for a network's output: it, its only tensor, or the last map of a list.

    Parameters
    ----------
    output : Any
    kind : type
        Of a tensor, or of what stands for one in a graph.
    is_map : callable
        Tells whether a tensor is a batch of maps (n, c, h, w).

    Raises
    ------
    OutputError
        If there are several tensors, or none; it says what there is.
    """
    if isinstance(output, kind):
        return output
    named = {name: part for name, part in _parts(output).items() if part is not None}
    parts = list(named.values())
    if len(parts) == 1:
        return one_tensor(parts[0], kind, is_map)
    are_tensors = bool(parts) and all(isinstance(part, kind) for part in parts)
    if isinstance(output, list) and are_tensors and all(map(is_map, parts)):
        return parts[-1]  # of timm's features_only=True, from the finest to the coarsest
    name = type(output).__name__.removeprefix("immutable_")  # as torch.fx calls them
    if not parts:
        raise OutputError("None" if output is None else f"a {name} without a tensor")
    is_numbered = list(named) == [str(i) for i in range(len(named))]
    raise OutputError(f"a {name} of " + (str(len(parts)) if is_numbered else " and ".join(named)))


def _parts(output: Any) -> dict[str, Any]:
    """Return the parts of a mapping, a sequence or a data class by their names."""
    if isinstance(output, Mapping):
        return {str(name): part for name, part in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    if isinstance(output, (list, tuple)):
        return {str(i): part for i, part in enumerate(output)}
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {}


class Whole(nn.Module):
    """A network that runs in one piece, and returns one tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Turn images (n, 3, height, width) into the tensor that stands for the output."""
        output = self.network(images.contiguous())  # it may take views of maps, channels first
        return one_tensor(output, torch.Tensor, lambda part: part.ndim == 4)
