"""State dicts are fitted to a network: names without prefixes, another head, values checked."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sktransfer.models._blocks import TracedNetwork, TracingError
from sktransfer.models._state_files import is_one_of_shards
from sktransfer.models._weights import counted_not_finite, is_finite

# Modules that others are put into, whose names no network gives to a part of its own.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_AVERAGED = {"ema", "ema_model", "model_ema", "teacher"}  # parts that were meant to be used
_USUAL = {"backbone", "encoder", "model", "network", "net"}  # names of a network in another
_NAMED = 3  # entries that a message names


class _Difference(NamedTuple):
    """The names by which a state dict and a network differ."""

    missing: list[str]
    unknown: list[str]
    other: list[str]  # of another shape


def load_state(
    create: Callable[..., nn.Module] | None,
    network: nn.Module,
    state: Mapping[str, torch.Tensor],
    name: str,
    source: Any,
    image_size: tuple[int, int] = (224, 224),
) -> nn.Module:
    """Load the tensors of a file into a network, all that lies in front of its head.

    Parameters
    ----------
    create : callable or None
        `create(num_classes=n)` makes the network with another head; None if nothing does.
    network : nn.Module
    state : mapping of str to torch.Tensor
    name : str
        Of the network, for messages.
    source : Any
        The `weights` that `state` came from, for messages.
    image_size : (int, int), default=(224, 224)
        Of images that the network takes.

    Returns
    -------
    nn.Module
        `network`, or, if the head of the file has another number of classes, what `create` made.

    Raises
    ------
    ValueError
        If a part in front of the head does not fit, or a value is not finite.

    Warns
    -----
    UserWarning
        If a part of the file is left out, or the head is not in it.
    """
    expected = network.state_dict()
    named, left = without_prefix(state, expected)
    difference = _compare(named, expected)
    if create and difference.other and not difference.missing:
        sizes = {len(named[key]) for key in difference.other if named[key].ndim}
        resized = create(num_classes=sizes.pop()) if len(sizes) == 1 else network
        if not (others := _compare(named, resized.state_dict())).other:
            network, difference = resized, others
            expected = network.state_dict()
    if any(difference) and not _is_head_only(difference, network, image_size):
        raise ValueError(_why_not(difference, named, expected, name, source))
    fitting = {k: v for k, v in named.items() if k in expected and k not in difference.other}
    _check_values(fitting, expected, source)
    network.load_state_dict(fitting, strict=False)
    if line := _what_was_left([*left, *difference.unknown], difference):
        warnings.warn(f"weights={str(source)!r} for {name!r}: {line}", UserWarning, stacklevel=2)
    return network


def without_prefix(
    state: Mapping[str, torch.Tensor], expected: Collection[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the entries that lie where most of the expected names do, by these names.

    A network that was saved inside of another has names with a prefix, such as
    ``module.backbone.conv1.weight``.

    Returns
    -------
    state : dict of str to torch.Tensor
    left : list of str
        Names that lie elsewhere.
    """
    wrappers = _WRAPPERS - {part for key in expected for part in key.split(".")}
    plain = {_without(key, wrappers): value for key, value in state.items()}
    counts = Counter(prefix for key in plain for prefix in _prefixes(key, expected))
    prefix = max(counts, key=lambda prefix: (counts[prefix], *_rank(prefix)), default="")
    named = {k.removeprefix(prefix): v for k, v in plain.items() if k.startswith(prefix)}
    return named, [key for key in plain if not key.startswith(prefix)]


def _without(key: str, parts: set[str]) -> str:
    return ".".join(part for part in key.split(".") if part not in parts) if parts else key


def _prefixes(key: str, expected: Collection[str]) -> Iterable[str]:
    """Return all that can be taken off a name so that an expected one is left."""
    starts = [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]
    return [key[:start] for start in starts if key[start:] in expected]


def _rank(prefix: str) -> tuple[bool, bool, int]:
    """Rank prefixes that fit equally well: averages first, then usual names, then short ones."""
    parts = set(prefix.split(".")) - {""}
    return bool(parts & _AVERAGED), parts <= _USUAL, -len(prefix)


def _compare(state: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> _Difference:
    # A counter of batches shapes nothing here, nor does a table that the network computes itself.
    missing = [k for k in expected if k not in state and not k.endswith(".num_batches_tracked")]
    unknown = [k for k, v in state.items() if k not in expected and _is_weight(v)]
    other = [k for k, v in expected.items() if k in state and v.shape != state[k].shape]
    return _Difference(missing, unknown, other)


def _is_weight(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


# ------------------------------------------------------------------------------ heads


def _is_head_only(difference: _Difference, network: nn.Module, image_size: tuple[int, int]) -> bool:
    """Return whether all that a network has in front of its head is in the file, and fits."""
    head = _head_names(network, image_size)
    if head is None or not head.issuperset([*difference.missing, *difference.other]):
        return False
    body = [name for name in network.state_dict() if name not in head]
    shared = ".".join(os.path.commonprefix([name.split(".")[:-1] for name in body]))
    modules = {name for name, _ in network.named_modules()}
    around = (_module_around(name, modules) for name in difference.unknown)
    return bool(body) and all(
        path == shared or not any(name.startswith(f"{path}.") for name in body) for path in around
    )


def _head_names(network: nn.Module, image_size: tuple[int, int]) -> set[str] | None:
    """Return the names of the weights of the head; None if nobody can tell."""
    try:
        traced = TracedNetwork(network, image_size)
    except TracingError:
        return None
    return set(traced.slice(traced.embedding, traced.output).state_dict())


def _module_around(name: str, modules: set[str]) -> str:
    """Return the innermost module of the network in which a tensor of the file would lie."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


# ------------------------------------------------------------------------------ messages


def _why_not(
    difference: _Difference,
    state: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    name: str,
    source: Any,
) -> str:
    missing, unknown, other = difference
    problems = [
        *(f"{key} is missing" for key in missing[:_NAMED]),
        *(f"{key} is not known" for key in unknown[:_NAMED]),
        *(f"{k} is {tuple(state[k].shape)}, not {tuple(expected[k].shape)}" for k in other[:2]),
    ]
    of_shards = isinstance(source, Path) and is_one_of_shards(source)
    return (
        f"weights={str(source)!r} does not hold the weights of {name!r}: {'; '.join(problems)} "
        f"({len(missing) + len(unknown) + len(other)} entries differ of {len(expected)}). "
        + (
            "The file is one of several: pass the index beside it, which ends in .index.json."
            if of_shards
            else "Name the architecture that the file was saved from."
        )
    )


def _what_was_left(left: list[str], difference: _Difference) -> str:
    """Say in a line what of a file is not used, and what of the network is not from it."""
    new = [*difference.missing, *difference.other]
    parts = [f"{_some(left)} left out"] if left else []
    parts += [f"its head is not from the file ({_some(new)})"] if new else []
    return "; ".join(parts) + "." if parts else ""


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


# ------------------------------------------------------------------------------ values


def check_finite(state: Mapping[str, torch.Tensor], source: Any) -> None:
    """Raise ValueError for a tensor of a file that holds NaN or infinity, or no values."""
    values = {name: tensor for name, tensor in state.items() if _is_weight(tensor)}
    _check_values(values, dict.fromkeys(values, torch.zeros(())), source)


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
        return f"holds {counted_not_finite(tensor)}"
    return None
