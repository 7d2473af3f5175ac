"""Pretrained networks as scikit-learn estimators."""

from sktransfer._pretrained import PretrainedFeatureExtractor
from sktransfer.io import load_image_folder
from sktransfer.models import get_model, list_models, register_model

__version__ = "0.1.0"

__all__ = [
    "PretrainedFeatureExtractor",
    "get_model",
    "list_models",
    "load_image_folder",
    "register_model",
]
