"""Images with the boxes of what was found in them, and of what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_consistent_length

from sktransfer.inspection._plotting import (
    grid_axes,
    images_of,
    n_rows_and_cols,
    shown,
    text_of,
)
from sktransfer.io import check_images

__all__ = ["DetectionDisplay"]

_SIDE = 320  # pixels of the longer side of an image that is shown


class DetectionDisplay:
    """Images, the boxes that were predicted and, dashed and white, those that are true.

    Parameters
    ----------
    images : sequence of n ndarrays (height, width, 3), uint8
    predicted : sequence of n dicts
        `boxes` (k, 4), x1, y1, x2, y2 in pixels of these images, `labels` and perhaps `scores`.
    true : sequence of n dicts or None, default=None
        The same, without scores.
    rows : array-like of shape (n,), default=None
        Their rows in `X`.

    Attributes
    ----------
    classes : list
        The labels, each of which has a colour.
    ax_ : matplotlib Axes
        Around the images.
    axes_ : ndarray of matplotlib Axes
        One for each image.
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer.inspection import DetectionDisplay
    >>> flower = load_sample_images().images[1]                      # (427, 640, 3)
    >>> found = [{"boxes": [[200, 50, 440, 350]], "labels": ["blossom"], "scores": [0.9]}]
    >>> display = DetectionDisplay.from_predictions([flower], found)
    >>> [text.get_text() for text in display.axes_[0].texts]
    ['blossom 0.90']
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        predicted: Sequence[Mapping[str, Any]],
        true: Sequence[Mapping[str, Any]] | None = None,
        rows: Any = None,
    ) -> None:
        self.images, self.predicted, self.true, self.rows = images, predicted, true, rows

    @property
    def classes(self) -> list[Any]:
        everything = [*self.predicted, *(self.true or [])]
        labels = [
            label for objects in everything for label in np.asarray(objects["labels"]).tolist()
        ]
        return sorted(dict.fromkeys(labels), key=str)

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, y: Any = None, *, n_images: int = 12, **kwargs: Any
    ) -> Self:
        """Predict, and plot the first images.

        Parameters
        ----------
        estimator : FineTunedDetector
            Fitted.
        X : sequence of images
        y : sequence of dicts, default=None
            The true boxes, to be drawn as well.
        n_images : int, default=12
            How many images to predict, and to show.
        **kwargs
            For `from_predictions`.

        Returns
        -------
        DetectionDisplay
        """
        images = X[:n_images]
        truth = None if y is None else y[:n_images]
        predicted = estimator.predict(images)
        images = images_of(estimator, images)
        return cls.from_predictions(images, predicted, truth, n_images=n_images, **kwargs)

    @classmethod
    def from_predictions(
        cls,
        X: Any,
        y_pred: Any,
        y_true: Any = None,
        *,
        n_images: int = 12,
        score_threshold: float = 0.3,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Plot predictions that are there.

        Parameters
        ----------
        X : sequence of n images
        y_pred : sequence of n dicts
            As `FineTunedDetector.predict` returns them; or true boxes alone, without scores.
        y_true : sequence of n dicts, default=None
        n_images : int, default=12
            How many to show, the first ones.
        score_threshold : float, default=0.3
            Boxes of a lower score are left out.
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        DetectionDisplay
        """
        images = check_images(X)
        check_consistent_length(images, y_pred, images if y_true is None else y_true)
        rows = np.arange(min(n_images, len(images)))
        pictures, predicted, true = [], [], []
        for i in rows.tolist():
            picture = shown(images, i, _SIDE)
            height, width = images.load(i).shape[1:]
            scale = np.array([picture.shape[1] / width, picture.shape[0] / height] * 2)
            pictures.append(picture)
            predicted.append(_scaled(y_pred[i], scale, score_threshold))
            if y_true is not None:
                true.append(_scaled(y_true[i], scale, score_threshold))
        display = cls(pictures, predicted, None if y_true is None else true, rows)
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, *, n_cols: int | None = None) -> Self:
        """Draw the images with their boxes, a colour for each label.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            A subplot that makes room for them; None for a new figure.
        n_cols : int, default=None
            Images in a row.

        Returns
        -------
        self
        """
        import matplotlib.pyplot as plt

        colours = plt.get_cmap("tab10")(range(10))
        colour = {label: colours[i % len(colours)] for i, label in enumerate(self.classes)}
        shape = n_rows_and_cols(len(self.images), n_cols)
        self.ax_, grid = grid_axes(ax, *shape, n_lines=0)
        self.figure_ = self.ax_.figure
        self.axes_ = grid.ravel()[: len(self.images)]
        for i, axes in enumerate(self.axes_):
            axes.imshow(self.images[i])
            for box in [] if self.true is None else self.true[i]["boxes"]:
                _draw(axes, box, "white", linestyle="--", linewidth=2.2)
            _draw_objects(axes, self.predicted[i], colour)
        return self


def _scaled(objects: Mapping[str, Any], scale: np.ndarray, threshold: float) -> dict[str, Any]:
    """Return the boxes in pixels of the image that is shown, those of low scores left out."""
    boxes = np.asarray(objects["boxes"], float).reshape(-1, 4) * scale
    labels = np.asarray(objects["labels"])
    if "scores" not in objects:
        return {"boxes": boxes, "labels": labels}
    scores = np.asarray(objects["scores"], float)
    kept = scores >= threshold
    return {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]}


def _draw(axes: Any, box: Sequence[float], colour: Any, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, **style))


def _draw_objects(axes: Any, objects: Mapping[str, Any], colour: Mapping[Any, Any]) -> None:
    scores = objects.get("scores", [None] * len(objects["boxes"]))
    labels = np.asarray(objects["labels"]).tolist()
    for box, label, score in zip(objects["boxes"], labels, scores, strict=True):
        _draw(axes, box, colour[label], linewidth=1.4)
        text = text_of(label) if score is None else f"{text_of(label)} {score:.2f}"
        style = {"facecolor": colour[label], "edgecolor": "none", "pad": 0.8}
        axes.text(*box[:2], text, fontsize=6, color="white", va="bottom", bbox=style)
