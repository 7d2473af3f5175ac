"""Pretrained networks as scikit-learn estimators."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sktransfer._config import config_context, get_config, set_config
    from sktransfer._estimators.anomaly import PatchAnomalyDetector
    from sktransfer._estimators.channel_adapter import ChannelAdapter
    from sktransfer._estimators.contrastive import ContrastivePretrainer
    from sktransfer._estimators.detection import FineTunedDetector
    from sktransfer._estimators.fine_tuned_regressor import FineTunedRegressor
    from sktransfer._estimators.fine_tuning import FineTunedClassifier
    from sktransfer._estimators.masked_language import MaskedLanguagePretrainer
    from sktransfer._estimators.model_file import load_model
    from sktransfer._estimators.onnx_export import to_onnx
    from sktransfer._estimators.openvino_export import export_openvino
    from sktransfer._estimators.pretrained import PretrainedFeatureExtractor
    from sktransfer._estimators.pretrained_classifier import PretrainedClassifier
    from sktransfer._estimators.recipe import make_classifier
    from sktransfer._estimators.zero_shot import ZeroShotClassifier
    from sktransfer.inspection import model_summary
    from sktransfer.io import load_image_folder
    from sktransfer.io._coco import load_coco
    from sktransfer.models import get_model, list_models, register_model

__version__ = "0.1.0"

__all__ = [
    "ChannelAdapter",
    "ContrastivePretrainer",
    "FineTunedClassifier",
    "FineTunedDetector",
    "FineTunedRegressor",
    "MaskedLanguagePretrainer",
    "PatchAnomalyDetector",
    "PretrainedClassifier",
    "PretrainedFeatureExtractor",
    "ZeroShotClassifier",
    "config_context",
    "export_openvino",
    "get_config",
    "get_model",
    "list_models",
    "load_coco",
    "load_image_folder",
    "load_model",
    "make_classifier",
    "model_summary",
    "register_model",
    "set_config",
    "to_onnx",
]

_HOMES = {
    "ChannelAdapter": "_estimators.channel_adapter",
    "ContrastivePretrainer": "_estimators.contrastive",
    "FineTunedClassifier": "_estimators.fine_tuning",
    "FineTunedDetector": "_estimators.detection",
    "FineTunedRegressor": "_estimators.fine_tuned_regressor",
    "MaskedLanguagePretrainer": "_estimators.masked_language",
    "PatchAnomalyDetector": "_estimators.anomaly",
    "PretrainedClassifier": "_estimators.pretrained_classifier",
    "PretrainedFeatureExtractor": "_estimators.pretrained",
    "ZeroShotClassifier": "_estimators.zero_shot",
    "config_context": "_config",
    "export_openvino": "_estimators.openvino_export",
    "get_config": "_config",
    "get_model": "models",
    "list_models": "models",
    "load_coco": "io._coco",
    "load_image_folder": "io",
    "load_model": "_estimators.model_file",
    "make_classifier": "_estimators.recipe",
    "model_summary": "inspection",
    "register_model": "models",
    "set_config": "_config",
    "to_onnx": "_estimators.onnx_export",
}


if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    # Threads of OpenMP (GNU) that wait for each other keep their core for milliseconds. Where other
    # programs run, they take it from the thread that they wait for: embeddings by torch then took
    # eight times the processor time (`benchmarks/busy_machine.py`). 1,000 rounds are what OpenMP
    # itself takes with more threads than cores. It is read when torch is loaded, so it is set
    # before.
    os.environ["GOMP_SPINCOUNT"] = "1000"


def __getattr__(name: str) -> Any:
    # Loaded when first used: torch takes seconds, and `sktransfer --help` should not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*(globals().keys() - {"Any", "TYPE_CHECKING", "import_module", "os"}), *__all__]
