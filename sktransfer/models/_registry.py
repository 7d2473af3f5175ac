"""Pretrained networks by name: torchvision's, timm's, embedded ones, files and modules.

A :class:`Backbone` is a network with all that belongs to its weights: preprocessing, categories
and a fingerprint.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import gc
import math
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import timm
import torch
import torchvision
from torch import nn
from torch.export import ExportedProgram

from sktransfer._threads import renewed_in_forks
from sktransfer._torch_state import call_seeded, ready_to_train
from sktransfer.models._builders import (
    build_efficientnet_lite,
    build_origin,
    build_timm,
    build_torchvision,
    published_enum,
    published_weights,
)
from sktransfer.models._fitting import load_state
from sktransfer.models._modules import copy_of, portable, set_eval, without_wrapper
from sktransfer.models._origins import FOLDER, Origin, find_origin
from sktransfer.models._state_files import (
    file_beside,
    file_stamp,
    read_state_dict,
    sha256_of,
    weights_path,
)
from sktransfer.models._weights import fingerprint
from sktransfer.transforms import RGB, Channels, Preprocessing

__all__ = ["Backbone", "get_model", "list_models", "register_model"]

# A name of the hub, or the address of its page there.
_REPOSITORY = re.compile(r"(?:(?i:https?)://[^/]+/)?((?!timm/)[\w.-]+/[\w.-]+)/?")
_KEPT = 4  # backbones that stay loaded when nobody uses them; more would pile up in comparisons
_LARGE = 50e6  # bytes of weights whose memory is to be free at once
_SEED = 0  # of the random weights that weights=None asks for where nobody has a random_state
_loaded: WeakValueDictionary[Any, Backbone] = WeakValueDictionary()  # all that somebody uses
_recent: OrderedDict[Any, Backbone] = OrderedDict()
# Of these two, for moments: who uses a loaded network does not wait for the download of another.
_lock = renewed_in_forks(threading.RLock())
# Held by who builds a network, downloads it included: one at a time, as other libraries replace
# what is that of the whole process meanwhile.
_building = renewed_in_forks(threading.RLock())
# Of `weights` and the seed of random ones.
_builders: dict[str, Callable[[Any, int], Backbone]] = {}


@dataclass(eq=False)
class Backbone:
    """A network and all that belongs to its weights.

    Parameters
    ----------
    network : torch.nn.Module
        Takes a float batch (n, channels, height, width) and returns one tensor with a row for each
        image; a dict, tuple or data class of one tensor counts as this tensor, a list of maps as
        its last.
        Used in evaluation mode. What `torch.compile` or `DataParallel` wraps is taken out.
    preprocessing : Preprocessing, default=that of ImageNet at 224 pixels
        How an image is brought to the network's input; its `mean` and `std` have a number for each
        channel that the network takes.
    categories : tuple of str or None, default=None
        Names of the network's own classes, in the order of its outputs; unique.
    name : str, default=the class of `network`
        Used in messages.

    Attributes
    ----------
    fingerprint : str
        Digest of architecture and weights. Equal fingerprints give equal activations for equal
        preprocessing.

    Examples
    --------
    >>> from sktransfer.models import get_model
    >>> backbone = get_model("efficientnet_lite0")
    >>> backbone.preprocessing.size, len(backbone.categories)
    ((224, 224), 1000)
    """

    network: nn.Module
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    categories: tuple[str, ...] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.network, nn.Module):
            raise TypeError(
                f"network must be a torch.nn.Module, got {type(self.network).__name__}; a name "
                "belongs into get_model(name), or into backbone=name."
            )
        self.network = without_wrapper(self.network)
        self.name = self.name or type(self.network).__name__
        if self.categories is not None:
            self.categories = unique_labels(self.categories)

    @property
    def fingerprint(self) -> str:
        if (known := self.__dict__.get("_fingerprint")) is None:
            known = self._fingerprint = fingerprint(self.network)
        return known

    @functools.cached_property
    def runners(self) -> dict[Any, Any]:
        """What runs this network, by device, precision and runtime; for the engine."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        # A digest of weights that can change while the copy lives must not travel with it.
        here = ("_fingerprint", "runners")
        state = {key: value for key, value in self.__dict__.items() if key not in here}
        return {**state, "network": portable(self.network)}


# ------------------------------------------------------------------------------ public functions


def register_model(name: str, builder: Callable[[Any], Backbone]) -> None:
    """Make a network available by name.

    Parameters
    ----------
    name : str
        The name that `backbone=` then takes. An existing name is replaced.
    builder : callable
        `builder(weights) -> Backbone`, with `weights` as the estimator was given it.

    Examples
    --------
    >>> from torch import nn
    >>> from sktransfer.models import Backbone, get_model, register_model
    >>> def tiny(weights):
    ...     return Backbone(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()))
    >>> register_model("tiny", tiny)
    >>> get_model("tiny").name
    'tiny'
    """
    if not callable(builder):
        raise TypeError(
            f"The builder of {name!r} must be a function of `weights` that returns a Backbone, got "
            f"{type(builder).__name__}."
        )

    def build(weights: Any, seed: int) -> Backbone:
        return call_seeded(seed, lambda: builder(weights)) if weights is None else builder(weights)

    _builders[name] = build
    with _building, _lock:
        for key in [key for key in _loaded if key[0] == name]:
            del _loaded[key]
            _recent.pop(key, None)


def list_models(pattern: str = "*") -> list[str]:
    """List the names that `backbone=` takes.

    Parameters
    ----------
    pattern : str, default="*"
        Shell-style wildcard.

    Returns
    -------
    list of str
        Sorted: registered and embedded names, torchvision's, then timm's with their published
        weights as `timm/<architecture>.<weights>`.

    Examples
    --------
    >>> from sktransfer.models import list_models
    >>> list_models("efficientnet_lite*")
    ['efficientnet_lite0', 'efficientnet_lite1', 'efficientnet_lite2']
    """
    torchvision_names = torchvision.models.list_models(module=torchvision.models)
    ours = sorted({*_builders, *torchvision_names})
    timms = [f"timm/{name}" for name in timm.list_pretrained()]
    return fnmatch.filter([*ours, *timms], pattern)


def get_model(
    backbone: Any, weights: Any = "default", *, trust_remote_code: bool = False
) -> Backbone:
    """Load a pretrained network.

    Parameters
    ----------
    backbone : str, torch.nn.Module, Backbone or fitted estimator
        A name of :func:`list_models`; a place, see below; the network itself; or what has it: an
        estimator of this library that trained one, or anything else with a method `to_backbone`.

        ===========================  =============================================================
        place                        what is there
        ===========================  =============================================================
        `"hf-hub:owner/name"`,       a repository of the hub with a network of timm, or a vision
        `"hf:owner/name"`            model of transformers (extra `hub`); its `config.json` tells
                                     which. `"hf:owner/name@revision"` for another than the main
                                     branch. Tokens, folders and HF_HUB_OFFLINE are those of
                                     `huggingface_hub`.
        `"local-dir:PATH"`,          a folder with such files
        `"hf:PATH"`, `"PATH"`
        ===========================  =============================================================
    weights : str, path or None, default="default"
        `"default"`: the best published ones. Another published name such as `"IMAGENET1K_V1"`.
        A path to a state dict, a checkpoint with one, safetensors or the index of shards, read
        without running code; its content tells which, not its suffix. Names may have a prefix such
        as ``module.``; a head that does not fit is left out, with a warning. Of a place, the name
        of a file there, such as `"pytorch_model.bin"`; `"default"` takes safetensors alone.
        `None`: random, here always the same; estimators that have a `random_state` draw them by
        it. A network, a Backbone or an estimator has its own
        weights, which `"default"` (and None) leaves as they are; a path is loaded into a copy.
    trust_remote_code : bool, default=False
        Whether code that lies beside a model of transformers may run. Read it before.

    Returns
    -------
    Backbone
        In evaluation mode, on the CPU, gradients off. The same object as long as nothing that
        shapes it changes; do not modify it.

    Raises
    ------
    ValueError
        Unknown name or weights, a file that does not hold this architecture, or one with values
        that are not finite; a published name of weights beside a network.
    TypeError
        Something else than a backbone, also from a builder of :func:`register_model`.
    OSError
        Published weights that could not be downloaded, or files that a place lacks.

    Examples
    --------
    >>> from sktransfer.models import get_model
    >>> get_model("efficientnet_lite0").categories[985]
    'daisy'
    """
    return seeded_model(backbone, weights, _SEED, trust_remote_code)


def seeded_model(
    backbone: Any, weights: Any, seed: int, trust_remote_code: bool = False
) -> Backbone:
    """Return what `get_model` does; the random weights that None asks for depend on `seed`."""
    backbone = _unwrapped(backbone)
    key = _key(backbone, weights, seed)
    if trust_remote_code and not (isinstance(backbone, str) and origin_of(backbone)):
        raise ValueError(
            f"trust_remote_code=True is for a folder or a repository of the hub, not {backbone!r}."
        )
    if isinstance(backbone, str):
        file = file_of(weights, backbone) or weights
        return _keep(
            (*key, trust_remote_code), lambda: _build(backbone, file, seed, trust_remote_code)
        )
    given = Backbone(backbone) if isinstance(backbone, nn.Module) else backbone
    return _keep(key, lambda: _copied(given, weights_path(weights), key[0]))


def loaded_model(backbone: Any, weights: Any, seed: int = _SEED) -> Backbone | None:
    """Return what `seeded_model` would, if it is loaded: for those that only want to look."""
    key = _key(_unwrapped(backbone), weights, seed)  # it may restore an estimator, digest a network
    return _known((*key, False) if isinstance(backbone, str) else key)


def channels_of(backbone: Any, load: Callable[[], Backbone]) -> Channels:
    """Return what the pixels are that a network takes; `load` gives it if it must be looked at.

    What is published as a name of torchvision's or timm's takes RGB; so does a module, of which
    nothing else is said.
    """
    is_name = isinstance(backbone, str) and backbone not in _builders
    if is_name and origin_of(backbone) is None:
        return RGB
    return RGB if isinstance(backbone, nn.Module) else load().preprocessing.channels


def get_architecture(backbone: Any, weights: Any) -> Backbone:
    """Return what `get_model` does, but with random weights where it would have to download."""
    if not isinstance(backbone, str) or backbone in _builders:
        return get_model(backbone, weights)
    origin = origin_of(backbone)
    is_local = file_of(weights, backbone) or (origin is not None and origin.is_folder)
    if is_local or loaded_model(backbone, weights) is not None:
        return get_model(backbone, weights)
    return get_model(backbone, None)


def unique_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Tell equal labels apart by their index: ImageNet has two cranes and two maillots."""
    labels = tuple(labels)
    counts = Counter(labels)
    return tuple(f"{x} ({i})" if counts[x] > 1 else x for i, x in enumerate(labels))


# ------------------------------------------------------------------------------ building


def _unwrapped(backbone: Any) -> Any:
    """Return the network of a fitted estimator, and anything else as it is."""
    return backbone.to_backbone() if hasattr(backbone, "to_backbone") else backbone


def _key(backbone: Any, weights: Any, seed: int) -> Any:
    """Return all that shapes a loaded backbone."""
    if isinstance(backbone, str):
        origin = origin_of(backbone)
        chosen = seed if weights is None else _stamp(weights, backbone)
        return backbone, chosen, origin and origin.stamp()
    if isinstance(backbone, nn.Module):
        backbone = Backbone(backbone)
    if not isinstance(backbone, Backbone):
        raise TypeError(
            "backbone must be a name, a torch.nn.Module, a sktransfer.models.Backbone or a fitted "
            f"estimator with a method to_backbone, got {type(backbone).__name__}"
            + isinstance(backbone, ExportedProgram)
            * ": pass its module(), or the network itself"
        )
    # The module is the user's and may change, so it is looked up by its content.
    content = fingerprint(backbone.network), backbone.preprocessing, backbone.categories
    return (*content, _stamp(weights, backbone))


def _stamp(weights: Any, backbone: Any) -> Any:
    """Return what tells weights apart: of a file, its place, age and size."""
    is_name = isinstance(backbone, str)
    path = file_of(weights, backbone) if is_name else file_beside(weights, backbone.name)
    if path is not None:
        return file_stamp(path)
    return weights if is_name else None  # its own


def origin_of(name: str) -> Origin | None:
    """Return where the files of a network lie if its name says so, and it is no known name."""
    return None if is_known(name) else find_origin(name)


def is_known(name: str) -> bool:
    """Tell whether a name stands for a network wherever it is used: no folder is meant by it."""
    is_timm = name.startswith("timm/") and timm.is_model(name.removeprefix("timm/"))
    return name in _builders or is_timm or name in _torchvision_names()


@functools.cache
def _torchvision_names() -> frozenset[str]:
    return frozenset(torchvision.models.list_models(module=torchvision.models))


def file_of(weights: Any, name: str) -> Path | None:
    """Return the file that `weights` names; None if it is no path, or a file beside a network."""
    if isinstance(weights, str) and not Path(weights).expanduser().exists() and origin_of(name):
        return None
    return weights_path(weights)


def _copied(given: Backbone, path: Path | None, known: str) -> Backbone:
    """Return a copy of a user's backbone, with the weights of a file if there is one.

    `known` is the fingerprint of the user's.
    """
    copied = replace(given, network=copy_of(given.network))
    if path is not None:
        state, size = read_state_dict(path), given.preprocessing.size
        load_state(None, copied.network, state, copied.name, path, size)
    elif _is_copied_as_is(given.network):
        copied._fingerprint = known
    return copied


def _is_copied_as_is(network: nn.Module) -> bool:
    """Return whether a copy has no wrapper less, and no weights of another precision."""
    tensors = (*network.parameters(), *network.buffers())
    return all(without_wrapper(module) is module for module in network.modules()) and all(
        tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point()
    )


def _keep(key: Any, build: Callable[[], Backbone]) -> Backbone:
    """Return the loaded backbone of `key`, or build it; of those out of use, drop the oldest."""
    if (kept := _known(key)) is None:
        with _building:
            if (kept := _known(key)) is None:  # nobody else has built it meanwhile
                with ready_to_train(_building):  # tensors of inference mode could never be trained
                    kept = _ready(build())
                with _lock:
                    _loaded[key] = kept
    with _lock:
        _recent[key] = kept
        _recent.move_to_end(key)
        dropped = _recent.popitem(last=False)[1] if len(_recent) > _KEPT else None
    if dropped is not None:
        n_bytes = sum(parameter.nbytes for parameter in dropped.network.parameters())
        del dropped
        if n_bytes > _LARGE:
            gc.collect()  # what runs a network refers to it, and it to that
    return kept


def _known(key: Any) -> Backbone | None:
    with _lock:
        return _loaded.get(key)


def _ready(backbone: Backbone) -> Backbone:
    """Make a network ready to be used by many: nobody trains this copy."""
    set_eval(backbone.network)
    for parameter in backbone.network.parameters():
        parameter.requires_grad_(False)
    # Weights of another precision meet float32 images; the runner's precision says how the network
    # computes, and its device where: on a GPU, with a copy.
    backbone.network.float().cpu()
    return backbone


def _build(name: str, weights: Any, seed: int, trust_remote_code: bool) -> Backbone:
    if weights is not None:
        seed = _SEED  # of a head that a file lacks: the same, whoever loads it first
    if name in _builders:
        built = _builders[name](weights, seed)
        if not isinstance(built, Backbone):
            raise TypeError(
                f"The builder that register_model got for {name!r} returned "
                f"{type(built).__name__}, not a sktransfer.models.Backbone: end it with "
                "`return Backbone(network)`."
            )
    elif name.startswith("timm/") and timm.is_model(name.removeprefix("timm/")):
        built = Backbone(*build_timm(name, weights, seed))
    elif name in _torchvision_names():
        built = Backbone(*build_torchvision(name, weights, seed))
    elif (origin := find_origin(name)) is not None:
        built = Backbone(*build_origin(origin, weights, seed, trust_remote_code))
    else:
        raise unknown_name(name)
    built.name = name
    return built


def portable_name(backbone: Any) -> Any:
    """Return a name as a process in another folder finds it: folders by their full path."""
    if not isinstance(backbone, str):
        return backbone
    try:
        origin = origin_of(backbone)
    except ValueError:
        return backbone  # whoever loads it says what is wrong
    return f"{FOLDER}{origin.place}" if origin and origin.is_folder else backbone


def unknown_name(name: str) -> ValueError:
    """Return the error for a name that stands for no network."""
    known = [*list_models(), *(f"timm/{model}" for model in timm.list_models())]
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    near = list(dict.fromkeys([*near, *([f"timm/{name}"] if f"timm/{name}" in known else [])]))
    if of_hub := _REPOSITORY.fullmatch(name):
        near = [f"hf:{of_hub[1]}"]
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return ValueError(
        f"Unknown backbone {name!r}, and no folder of {os.getcwd()!r}. {hint}"
        "sktransfer.models.list_models() gives all names; 'hf:owner/name' of the hub, 'local-dir:"
        "PATH' and a torch.nn.Module are taken as well."
    )


def imagenet_accuracy(name: str, weights: Any) -> float:
    """Return the published top-1 accuracy on ImageNet, from 0 to 1; NaN where none is at hand.

    torchvision brings those of its own weights; timm and the embedded networks bring none.
    """
    is_torchvision = name in torchvision.models.list_models(module=torchvision.models)
    if name in _builders or not is_torchvision:
        return math.nan
    path = weights_path(weights)
    chosen = published_weights(name, sha256_of(path)) if path else published_enum(name, weights)
    metrics = {} if chosen is None else chosen.meta["_metrics"].get("ImageNet-1K", {})
    return metrics.get("acc@1", math.nan) / 100


for _number in range(3):
    _builders[f"efficientnet_lite{_number}"] = lambda weights, seed, number=_number: Backbone(  # type: ignore[misc]
        *build_efficientnet_lite(number, weights, seed)
    )
