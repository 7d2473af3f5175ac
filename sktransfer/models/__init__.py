"""Pretrained networks by name: torchvision's, timm's, embedded ones, files and modules.

A :class:`Backbone` is a network with all that belongs to its weights: preprocessing, categories
and a fingerprint.
"""

from sktransfer.models._builders import RECOMMENDED
from sktransfer.models._registry import (
    Backbone,
    get_model,
    list_models,
    register_model,
)

__all__ = [
    "RECOMMENDED",
    "Backbone",
    "get_model",
    "list_models",
    "register_model",
]
