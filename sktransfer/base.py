"""What all estimators on images share: their input, their tags, their network."""

from __future__ import annotations

import os
from numbers import Integral
from typing import Any, ClassVar

import torch
from sklearn.base import BaseEstimator, _fit_context
from sklearn.utils import Tags
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions, validate_params
from sklearn.utils.validation import _check_sample_weight as check_sample_weight
from sklearn.utils.validation import _check_y as check_y
from sklearn.utils.validation import validate_data
from torch import nn
from torchvision.models import WeightsEnum

from sktransfer._inference import POOLINGS, PRECISIONS, Runner, get_runner
from sktransfer.io import ImageSequence, check_images
from sktransfer.models import Backbone, get_model
from sktransfer.transforms import Preprocessing

__all__ = [
    "HasMethods",
    "ImageEstimator",
    "Interval",
    "StrOptions",
    "_fit_context",
    "check_sample_weight",
    "check_y",
    "validate_params",
]


class ImageEstimator(BaseEstimator):
    """Base of the estimators whose `X` is a sequence of images.

    It knows how to validate such an `X` and how to get the backbone that its parameters name.
    Think twice before adding to it: what only some estimators need belongs to them.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "backbone": [str, nn.Module, Backbone],
        "weights": [str, os.PathLike, WeightsEnum, None],
        "pooling": [StrOptions(set(POOLINGS))],
        "image_shape": [tuple, list, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), tuple, list, None],
        "memory": [str, os.PathLike, HasMethods(["cache"]), None],
        "device": [str, torch.device],
        "precision": [StrOptions(set(PRECISIONS))],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "n_jobs": [Integral, None],
        "verbose": ["verbose"],
    }

    backbone: Any
    weights: Any
    image_shape: Any
    image_size: Any
    device: Any
    precision: str

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        flat = self.image_shape is not None
        tags.input_tags.two_d_array = flat
        tags.input_tags.one_d_array = not flat
        tags.input_tags.three_d_array = not flat
        tags.input_tags.string = not flat
        return tags

    def _check_images(self, X: Any, *, reset: bool) -> ImageSequence:
        """Validate `X` and wrap it as images that are decoded when they are needed."""
        if self.image_shape is not None:
            X = validate_data(self, X, reset=reset, dtype="numeric")
            return check_images(X, image_shape=tuple(self.image_shape))
        validate_data(self, X, reset=reset, skip_check_array=True, ensure_2d=False)
        return check_images(X)

    def _load(self, **fitted: Any) -> tuple[Runner, Preprocessing]:
        """Return the network that the parameters name, and what it wants images to be.

        `fitted` holds values of `precision` and `image_size` that go before the parameters.
        """
        backbone = get_model(self.backbone, self.weights)
        runner = get_runner(backbone, self.device, fitted.get("precision", self.precision))
        size = fitted.get("image_size", self.image_size)
        return runner, backbone.preprocessing.with_size(size)
