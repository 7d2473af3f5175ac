"""Activations to one row an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

POOLINGS = ("avg", "max", "token", "flatten")


def layout_of(shape: Sequence[int], image_size: tuple[int, int]) -> str:
    """Name the layout of one image's activation: vector, tokens, map, map_last or other.

    A map with its channels last (as in Swin) is told by its sides: they have the proportions of
    the image.
    """
    if len(shape) < 3:
        return ("vector", "vector", "tokens")[len(shape)]  # a single number is a vector of one
    if len(shape) > 3:
        return "other"
    proportions = image_size[0] / image_size[1]
    first = abs(np.log(shape[1] / shape[2] / proportions))  # (c, h, w)
    last = abs(np.log(shape[0] / shape[1] / proportions))  # (h, w, c)
    return "map" if first <= last else "map_last"


def as_map(
    x: torch.Tensor, layout: str, n_prefix: int, image_size: tuple[int, int]
) -> torch.Tensor:
    """Bring activations with positions in the image, or their gradients, to (n, c, h, w)."""
    if layout == "map_last":
        return x.permute(0, 3, 1, 2)
    if layout != "tokens":
        return x
    patches = x[:, n_prefix:].transpose(1, 2)  # (n, c, t)
    height = max(1, round(math.sqrt(patches.shape[2] * image_size[0] / image_size[1])))
    return patches.unflatten(2, (height, -1))  # (n, c, h, w)


def pool(x: torch.Tensor, layout: str, pooling: str, n_prefix: int = 0) -> torch.Tensor:
    """Reduce activations to one row an image; see `PretrainedFeatureExtractor`."""
    if layout == "vector" or pooling == "flatten":
        return x.unsqueeze(1) if x.ndim == 1 else x.flatten(1)  # (n, d)
    if layout == "tokens":
        if pooling == "token":
            return x[:, 0]  # (n, c)
        x = x[:, n_prefix:].transpose(1, 2)  # (n, c, t)
    elif layout == "map_last":
        x = x.flatten(1, 2).transpose(1, 2)  # (n, c, h * w)
    else:
        x = x.flatten(2)  # (n, c, h * w)
    return x.mean(2) if pooling == "avg" else x.amax(2)
