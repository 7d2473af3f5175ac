"""Vision models of transformers as networks that turn images into one tensor."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from sktransfer._optional import load_optional
from sktransfer._torch_state import call_seeded
from sktransfer.models._fitting import check_finite, load_state, without_prefix
from sktransfer.models._origins import Origin
from sktransfer.models._state_files import read_state_dict
from sktransfer.transforms import Preprocessing

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_CLASS_TOKENS = ("cls_token", "class_embedding", "distillation_token")
_REFUSED = {  # kinds of models, and why they can't be used
    "vit_mae": "it hides patches at random. timm has it as a plain transformer: "
    "'timm/vit_base_patch16_224.mae'",
    "siglip2": "its images keep their proportions (NaFlex). Load one of a fixed resolution, such "
    "as 'hf:google/siglip2-base-patch16-224'",
}
_OUTPUTS = ("logits", "image_embeds", "pooler_output")  # the first that there is
_OLDEST = 5  # version of transformers
_MOST_LAYERS = 1000
_MOST_VALUES = 5e9  # of random weights
_STEP = 1 / 255  # of intensities in 8 bits


class VisionNetwork(nn.Module):
    """A vision model of transformers that returns one tensor with a row for each image.

    This is what its head says of the image; without a head, what its pooler returns; without a
    pooler, the class token, or the mean over all positions.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Attributes
    ----------
    num_prefix_tokens : int
        Number of class and register tokens in front of the patch tokens.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        names = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
        self.n_class_tokens = sum(names.count(name) for name in _CLASS_TOKENS)
        registers = getattr(model.config, "num_register_tokens", None) or 0
        self.num_prefix_tokens = self.n_class_tokens + registers
        self.returns_maps = hasattr(model.config, "hidden_sizes")  # (n, c, h, w), not (n, t, c)
        # Without it, some models take images of one size alone.
        known = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if known else {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Turn images (n, 3, height, width) into rows (n, width)."""
        result = self.model(pixel_values=images, **self.options)
        for name in _OUTPUTS:
            if getattr(result, name, None) is not None:
                return getattr(result, name).flatten(1)
        last = result.last_hidden_state
        if self.n_class_tokens:
            return last[:, 0]
        return last.flatten(2).mean(2) if self.returns_maps else last.mean(1)


def build_transformers(
    origin: Origin, config: dict[str, Any], weights: Any, seed: int, trust_remote_code: bool
) -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
    """Build a vision model of transformers from its files.

    Parameters
    ----------
    origin : Origin
    config : dict
        The content of its `config.json`.
    weights : str, Path or None
        "default", the name of a file of `origin`, another file, or None for random weights.
    seed : int
        Of these.
    trust_remote_code : bool
        Whether code that comes with the model may run.

    Returns
    -------
    network, preprocessing, categories
    """
    found = load_optional("transformers", f"backbone={origin.name!r}", "'.[hub]'")
    if int(found.__version__.partition(".")[0]) < _OLDEST:
        raise ImportError(
            f"backbone={origin.name!r} needs transformers {_OLDEST} or newer, not "
            f"{found.__version__}: pip install '.[hub]'"
        )
    is_remote = trust_remote_code and "auto_map" in config
    with silence():
        settings, cls = (None, None) if is_remote else _choose_class(origin, config)
        preprocessing = _read_preprocessing(origin, trust_remote_code)
        source = weights
        if isinstance(weights, str):
            source = origin.weights(None if weights == "default" else weights)
        state = read_state_dict(source) if source else {}
        check_finite(state, source)
        model, left = call_seeded(
            seed,
            lambda: (
                (_remote_model(origin, config), state)
                if is_remote
                else _load(origin, settings, cls, state)
            ),
        )
    if left:
        # It says what differs, takes prefixes off, and knows which part is the head.
        load_state(None, model, left, origin.name, source, preprocessing.size)
    _forget_place(model.config)
    return VisionNetwork(model), preprocessing, _categories(model.config) if state else None


@contextmanager
def silence() -> Iterator[None]:
    """Keep transformers from showing bars, and reports of weights that are not in a file."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------ models


def _choose_class(origin: Origin, config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the settings of the part of a model that sees images, and the class of this part."""
    import transformers

    kind = str(config.get("model_type"))
    if kind in _REFUSED:
        raise ValueError(f"backbone={origin.name!r} ({kind}) can't be used: {_REFUSED[kind]}.")
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(_unknown_kind(origin, config))
    if "quantization_config" in config:
        raise ValueError(
            f"backbone={origin.name!r} holds quantised weights. Load the ones that it was made of, "
            "and pass precision='int8' or 'bfloat16'."
        )
    # Code of the author, or compiled code of a hub, would be named here.
    named = {k: v for k, v in config.items() if k != "auto_map" and "implementation" not in k}
    named["architectures"] = [str(name) for name in config.get("architectures") or ()]
    settings = transformers.CONFIG_MAPPING[kind].from_dict(named)
    is_classifier = _is_classifier(named["architectures"])
    classifiers = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if is_classifier and type(settings) in classifiers:
        return _checked(origin, settings, classifiers[type(settings)])
    if kind in ("clip", "siglip"):
        tower = settings.vision_config
        tower.projection_dim = getattr(settings, "projection_dim", None)
        settings, kind = tower, f"{kind}_vision_model"
    if kind == "clip_vision_model" and "CLIPVisionModel" not in named["architectures"]:
        return _checked(origin, settings, transformers.CLIPVisionModelWithProjection)
    if type(settings) not in transformers.MODEL_MAPPING:
        raise ValueError(f"backbone={origin.name!r} is a {kind}, which has no model of images.")
    return _checked(origin, settings, transformers.MODEL_MAPPING[type(settings)])


def _is_classifier(architectures: Any) -> bool:
    return any("ForImageClassification" in str(name) for name in architectures or ())


def _checked(origin: Origin, settings: Any, cls: Any) -> tuple[Any, Any]:
    """Raise ValueError for what is no model of images, or of impossible sizes."""
    if getattr(cls, "main_input_name", "pixel_values") != "pixel_values":
        raise ValueError(
            f"backbone={origin.name!r} is a {settings.model_type}, which takes "
            f"{cls.main_input_name} rather than images. Pass a model of images."
        )
    for key, value in settings.to_dict().items():
        values = value if isinstance(value, (list, tuple)) else [value]
        layers = [v for v in values if isinstance(v, int) and ("layers" in key or "depth" in key)]
        if any(n > _MOST_LAYERS for n in layers):
            raise ValueError(f"backbone={origin.name!r}: {key}={value} in its config.json.")
    return settings, cls


def _unknown_kind(origin: Origin, config: dict[str, Any]) -> str:
    kind = config.get("model_type")
    if "auto_map" in config:
        return (
            f"backbone={origin.name!r} ({kind}) needs code that comes with it, which is not "
            "run. If you have read that code and trust its author, pass "
            f"backbone=get_model({origin.name!r}, trust_remote_code=True)."
        )
    return (
        f"backbone={origin.name!r}: its config.json names neither an architecture of timm nor a "
        f"model_type that the installed transformers knows, but model_type={kind!r}. A newer "
        "transformers may know it."
    )


def _load(
    origin: Origin, settings: Any, cls: Any, state: dict[str, torch.Tensor]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a model with the tensors of a file; if it lacks some, also those that there are."""
    with torch.device("meta"):
        expected = cls(settings).state_dict()
    n_values, n_read = (sum(v.numel() for v in each.values()) for each in (expected, state))
    if n_values > (2 * n_read + 1e7 if state else _MOST_VALUES):
        raise ValueError(
            f"backbone={origin.name!r}: its config.json is of a model of {n_values:.3g} values, "
            f"and its weights have {n_read:.3g}: they do not belong together."
        )
    if not state:
        return cls(settings), {}
    model, there, is_whole = _converted(settings, cls, state)
    if not is_whole:  # maybe as it was saved inside of another network
        plain, _ = without_prefix(state, expected)
        model, there, is_whole = _converted(settings, cls, plain)
    return model, {} if is_whole else there


def load_part(
    origin: Origin, settings: Any, cls: Any, state: dict[str, torch.Tensor], what: str
) -> Any:
    """Return one part of a model with its tensors of a file; without tensors, random ones.

    Raises
    ------
    ValueError
        If the file lacks some.
    """
    model, there = _load(origin, settings, cls, state)
    if there:
        lacking = [name for name in model.state_dict() if name not in there]
        raise ValueError(
            f"backbone={origin.name!r}: its weights lack {len(lacking)} tensors of the {what} "
            f"part, such as {', '.join(lacking[:3])}. Pass those of the whole network."
        )
    return model


def _converted(
    settings: Any, cls: Any, state: dict[str, torch.Tensor]
) -> tuple[Any, dict[str, torch.Tensor], bool]:
    """Let transformers load tensors, which it knows by the names of its older versions, too.

    Returns
    -------
    model : transformers.PreTrainedModel
    there : dict of str to torch.Tensor
        The tensors of the file by the model's present names, and what it does not know.
    is_whole : bool
        Whether the model lacks none.
    """
    model, report = cls.from_pretrained(
        None,
        config=settings,
        state_dict=dict(state),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    other = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    lacking = {*report["missing_keys"], *other}
    if getattr(model, "pooler", None) is not None and any(k.startswith("pooler.") for k in lacking):
        model.pooler = None  # it was not trained
        lacking = {key for key in lacking if not key.startswith("pooler.")}
    there = {k: v for k, v in model.state_dict().items() if k not in lacking}
    unknown = {k: state[k] for k in sorted(report["unexpected_keys"]) if k in state}
    return model, {**there, **unknown}, not lacking


def _remote_model(origin: Origin, config: dict[str, Any]) -> Any:
    """Return a model with random weights whose code comes with it, and is trusted."""
    import transformers

    revision = {} if origin.is_folder else {"revision": origin.revision}
    settings = transformers.AutoConfig.from_pretrained(
        origin.place, trust_remote_code=True, **revision
    )
    is_classifier = "AutoModelForImageClassification" in config["auto_map"]
    auto = transformers.AutoModelForImageClassification if is_classifier else transformers.AutoModel
    code = {} if origin.is_folder else {"code_revision": origin.revision}
    return auto.from_config(settings, trust_remote_code=True, **code)


def _forget_place(settings: Any) -> None:
    """Drop from settings where they were read from: what a model computes does not depend on it."""
    for name in ("_name_or_path", "_commit_hash"):
        if hasattr(settings, name):
            setattr(settings, name, "" if name == "_name_or_path" else None)


def _categories(settings: Any) -> tuple[str, ...] | None:
    """Return the names of a model's classes; None if it has none, or only numbers."""
    named = getattr(settings, "id2label", None) or {}
    labels = tuple(str(named[i]) for i in sorted(named))
    if not _is_classifier(settings.architectures) or all(
        label.startswith("LABEL_") for label in labels
    ):
        return None
    return labels


# ------------------------------------------------------------------------------ preprocessing


def _read_preprocessing(origin: Origin, trust_remote_code: bool) -> Preprocessing:
    """Return the preprocessing that the image processor of a model does."""
    from transformers import AutoImageProcessor

    file = origin.first_of(_PROCESSORS)
    if file is None:
        raise OSError(
            f"backbone={origin.name!r} has no {_PROCESSORS[0]} in {origin.place!r}, so nobody can "
            "tell how its images are scaled. Copy that file from the model that it was trained "
            "from, into a folder with the others."
        )
    try:
        processor = AutoImageProcessor.from_pretrained(
            file.parent, trust_remote_code=trust_remote_code
        )
        preprocessing = Preprocessing.from_transformers(processor.to_dict())
        problem = _difference(processor, preprocessing)
    except Exception as error:
        problem = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
    if problem:
        raise ValueError(
            f"backbone={origin.name!r}: what {file.name} says can't be done here ({problem}). "
            "Load the model by transformers and pass "
            "sktransfer.models.Backbone(network, preprocessing)."
        )
    return preprocessing


def _difference(processor: Any, preprocessing: Preprocessing) -> str | None:
    """Compare the pixels of both on images of odd proportions; say if they differ."""
    wanted = tuple(max(side, 8) for side in preprocessing.resize)
    for height, width in ((wanted[0] + 37, 2 * wanted[1] + 11), (3 * wanted[0] // 2, wanted[1])):
        rows, columns = np.mgrid[:height, :width]
        waves = [rows * 5 + columns * 3, rows * columns // 7, (rows // 9) * (columns // 5) * 31]
        image = torch.from_numpy(np.stack(waves).astype(np.uint8))  # (3, height, width)
        theirs = processor(image, return_tensors="pt")["pixel_values"].float()
        ours = preprocessing.normalize(preprocessing.fit_size(image)[None])
        if theirs.shape != ours.shape:
            return f"it makes images of {tuple(theirs.shape[2:])}, not {preprocessing.size} pixels"
        # Some scale intensities before sizes, and so do not round to 8 bits in between.
        if (theirs - ours).abs().max() > _STEP / min(preprocessing.std):
            return "its pixels are others"
    return None
