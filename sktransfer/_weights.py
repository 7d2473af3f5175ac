"""State dicts: read them safely, load them whole, and tell networks apart by their weights."""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from torch import nn


def weights_path(weights: Any) -> Path | None:
    """Return the file that `weights` names, or None if it is no path."""
    if isinstance(weights, os.PathLike):
        path = Path(weights)
    elif isinstance(weights, str) and (os.sep in weights or Path(weights).suffix):
        path = Path(weights)
    else:
        return None
    if not path.is_file():
        raise ValueError(f"weights={str(weights)!r}: there is no such file")
    return path.resolve()


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
    create: Callable[..., nn.Module],
    network: nn.Module,
    state: Mapping[str, torch.Tensor],
    name: str,
    source: Any,
) -> nn.Module:
    """Load `state`, all of it; a head of another number of classes is made to fit."""
    own = network.state_dict()
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    sizes = {len(state[key]) for key in other if own[key].ndim}
    if other and not missing and not unknown and len(sizes) == 1:
        resized = create(num_classes=sizes.pop())
        if all(value.shape == state[key].shape for key, value in resized.state_dict().items()):
            network, other = resized, []
    if missing or unknown or other:
        problems = [
            *(f"{key} is missing" for key in missing[:2]),
            *(f"{key} is not known" for key in unknown[:2]),
            *(f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in other[:2]),
        ]
        raise ValueError(
            f"weights={str(source)!r} does not hold the weights of {name!r}: {'; '.join(problems)} "
            f"({len(missing) + len(unknown) + len(other)} entries differ of {len(own)}). "
            "Name the architecture that the file was saved from."
        )
    network.load_state_dict(state)
    return network


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(network: nn.Module) -> str:
    """Digest the weights, the buffers and the settings of every module."""
    digest = xxhash.xxh3_128()
    for name, tensor in network.state_dict(keep_vars=True).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().view(-1)
        if plain.numel():
            digest.update(plain.view(torch.uint8).numpy())
    for name, module in network.named_modules():
        digest.update(f"{name} {type(module).__module__}.{type(module).__qualname__}".encode())
        for key, value in sorted(vars(module).items()):
            # Two modules with equal weights may still differ in a stride or a plain attribute.
            # `training` and hooks do not count: a backbone is a copy in evaluation mode.
            if key not in _MODULE_STATE and not key.endswith("_hooks"):
                digest.update(f"{key}={_describe(value)}".encode())
        for buffer_name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers[buffer_name]
            if buffer is not None:
                digest.update(f"{buffer_name}={buffer.detach().cpu().numpy().tobytes()!r}".encode())
    return digest.hexdigest()


_MODULE_STATE = {"training", *vars(nn.Module())}  # what every module has, weights included


def _describe(value: Any) -> str:
    """Text for a setting; what prints its address is named by what it is."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_describe, value))})"
    if isinstance(value, Mapping):
        return f"({', '.join(f'{_describe(k)}: {_describe(v)}' for k, v in value.items())})"
    if inspect.isroutine(value) or isinstance(value, type):
        code = getattr(value, "__code__", None)
        return f"{getattr(value, '__qualname__', value)}{code.co_code if code else ''!r}"
    if isinstance(value, torch.Tensor):
        return repr(value.detach().cpu().numpy().tobytes())
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
