"""Pretrained networks as scikit-learn estimators."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sktransfer._coco import load_coco
    from sktransfer._config import config_context, get_config, set_config
    from sktransfer._contrastive import ContrastivePretrainer
    from sktransfer._detection import FineTunedDetector
    from sktransfer._fine_tuning import FineTunedClassifier, FineTunedRegressor
    from sktransfer._masked_language import MaskedLanguagePretrainer
    from sktransfer._model_file import load_model
    from sktransfer._pretrained import PretrainedFeatureExtractor
    from sktransfer._pretrained_classifier import PretrainedClassifier
    from sktransfer.inspection import model_summary
    from sktransfer.io import load_image_folder
    from sktransfer.models import get_model, list_models, register_model

__version__ = "0.1.0"

__all__ = [
    "ContrastivePretrainer",
    "FineTunedClassifier",
    "FineTunedDetector",
    "FineTunedRegressor",
    "MaskedLanguagePretrainer",
    "PretrainedClassifier",
    "PretrainedFeatureExtractor",
    "config_context",
    "get_config",
    "get_model",
    "list_models",
    "load_coco",
    "load_image_folder",
    "load_model",
    "model_summary",
    "register_model",
    "set_config",
]

_HOMES = {
    "ContrastivePretrainer": "_contrastive",
    "FineTunedClassifier": "_fine_tuning",
    "FineTunedDetector": "_detection",
    "FineTunedRegressor": "_fine_tuning",
    "MaskedLanguagePretrainer": "_masked_language",
    "PretrainedClassifier": "_pretrained_classifier",
    "PretrainedFeatureExtractor": "_pretrained",
    "config_context": "_config",
    "get_config": "_config",
    "get_model": "models",
    "list_models": "models",
    "load_coco": "_coco",
    "load_image_folder": "io",
    "load_model": "_model_file",
    "model_summary": "inspection",
    "register_model": "models",
    "set_config": "_config",
}


def __getattr__(name: str) -> Any:
    # Loaded when first used: torch takes seconds, and `sktransfer --help` should not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
