"""What the displays share: axes, grids of images, and matplotlib only when it is needed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from sktransfer.io import ImageSequence
from sktransfer.transforms import Preprocessing

_CELL = 2.0  # inches of an image
_LINE = 0.22  # and of a line above it
_MOST_AROUND = 6  # times the pixels of the part that a network saw
_SIDE = 224  # pixels of the longer side of an image that is shown


def single_axes(ax: Any, figsize: tuple[float, float] = (5.6, 4.2)) -> Any:
    """Return the axes that were given, or those of a new figure."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1] if ax is None else ax


def grid_axes(ax: Any, n_rows: int, n_cols: int, n_lines: int = 2) -> tuple[Any, np.ndarray]:
    """Return the axes around, of a new figure if none were given, and those in a grid inside."""
    import matplotlib.pyplot as plt

    if ax is None:
        size = (n_cols * _CELL, n_rows * (_CELL + n_lines * _LINE))
        ax = plt.figure(figsize=size, layout="constrained").add_subplot()
    if (place := ax.get_subplotspec()) is None:
        raise ValueError("ax must be a subplot, as plt.subplots() makes it, to hold several images")
    ax.set_axis_off()
    grid = place.subgridspec(n_rows, n_cols)
    inner = [[ax.figure.add_subplot(grid[i, j]) for j in range(n_cols)] for i in range(n_rows)]
    for axes in np.ravel(inner):
        axes.set_axis_off()
    return ax, np.array(inner, object).reshape(n_rows, n_cols)


def n_rows_and_cols(n: int, n_cols: int | None) -> tuple[int, int]:
    """Return the shape of a grid for `n` images, about twice as wide as high."""
    if n_cols is None:
        n_rows = math.ceil(n / min(6, math.ceil(math.sqrt(2 * n))))
        n_cols = math.ceil(n / n_rows)  # as few gaps in the last row as can be
    return math.ceil(n / n_cols), min(n, n_cols)


def shown(images: ImageSequence, i: int, side: int = _SIDE) -> np.ndarray:
    """Return an image as it is shown: uint8 (height, width, 3), its longer side `side` pixels."""
    image = as_rgb(images.load(i))  # (3, height, width)
    scale = side / max(image.shape[1:])
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    return F.resize(image, size, antialias=True).permute(1, 2, 0).numpy()


def put_image(axes: Any, image: np.ndarray, lines: Sequence[str], color: str = "black") -> None:
    """Show an image with lines of text above it, none of them wider than the image."""
    axes.imshow(image)
    put_title(axes, lines, color)


def put_title(axes: Any, lines: Sequence[str], color: str = "black") -> None:
    text = "\n".join(textwrap.shorten(line, 27, placeholder="…") for line in lines)
    axes.set_title(text, fontsize=8, color=color)


def images_of(estimator: Any, X: Any) -> Any:
    """Return `X` as images of the channels that an estimator takes; as it is if nobody can tell."""
    first = estimator.steps[0][1] if hasattr(estimator, "steps") else estimator
    return first.check_images(X) if hasattr(first, "check_images") else X


def as_rgb(image: torch.Tensor) -> torch.Tensor:
    """Return images ([n,] 3, h, w) of which other channels are shown: the first three, or one."""
    return image[..., :3, :, :] if image.shape[-3] >= 3 else image[..., [0, 0, 0], :, :]


def as_seen(images: ImageSequence, preprocessing: Preprocessing) -> torch.Tensor:
    """Return images as they enter a network, uint8 (n, channels, height, width)."""
    return torch.stack([images.load(i, None, preprocessing.fit_size) for i in range(len(images))])


def surroundings(images: ImageSequence, preprocessing: Preprocessing) -> list[Any]:
    """Return whole images at the scale of `as_seen`, each with where its part begins.

    None in place of a very long one.
    """
    return [_surroundings(images, i, preprocessing) for i in range(len(images))]


def _surroundings(
    images: ImageSequence, i: int, preprocessing: Preprocessing
) -> tuple[np.ndarray, tuple[int, int]] | None:
    image = as_rgb(images.load(i))
    size = preprocessing.scaled_size(*image.shape[1:])
    if math.prod(size) > _MOST_AROUND * math.prod(preprocessing.size):
        return None
    whole = F.resize(image, list(size), antialias=True).permute(1, 2, 0).numpy()
    (top, left) = (
        round((length - part) / 2) for length, part in zip(size, preprocessing.size, strict=True)
    )
    return whole, (top, left)


def put_maps(
    axes: np.ndarray,
    images: np.ndarray,
    maps: np.ndarray,
    around: Sequence[Any] | None,
    **kwargs: Any,
) -> Any:
    """Show images with maps upon them, and faintly what `surroundings` has; return the last map."""
    whole = around or [None] * len(images)
    for ax, image, heat, its_whole in zip(axes, images, maps, whole, strict=True):
        ax.imshow(image)
        upon = ax.imshow(heat, **kwargs)
        if its_whole is not None:
            _put_faintly(ax, *its_whole)
    return upon


def _put_faintly(axes: Any, whole: np.ndarray, start: tuple[int, int]) -> None:
    """Show a whole image below its part, which begins at `start` and has the axes' scale."""
    (top, left), (height, width) = start, whole.shape[:2]
    edges = (-left - 0.5, width - left - 0.5, height - top - 0.5, -top - 0.5)
    xlim, ylim = axes.get_xlim(), axes.get_ylim()
    axes.imshow(whole, alpha=0.3, extent=edges, zorder=-1)
    axes.set_xlim(min(xlim[0], edges[0]), max(xlim[1], edges[1]))
    axes.set_ylim(max(ylim[0], edges[2]), min(ylim[1], edges[3]))


def text_of(label: Any) -> str:
    """Return a label as text, without what NumPy writes around it."""
    return str(label.item() if isinstance(label, np.generic) else label)
