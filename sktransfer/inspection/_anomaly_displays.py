"""Displays of when not to answer: where an image is strange, and what rejecting gains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.utils import check_array, column_or_1d
from sklearn.utils.validation import check_consistent_length

from sktransfer._estimators.labels import plain_labels
from sktransfer.inspection._plotting import (
    as_rgb,
    as_seen,
    grid_axes,
    n_rows_and_cols,
    put_maps,
    put_title,
    single_axes,
    surroundings,
)

__all__ = ["AnomalyMapDisplay", "RejectionCurveDisplay"]

_ANOMALY = "firebrick"


class AnomalyMapDisplay:
    """Heat maps of where images look like nothing in the images of a training.

    Parameters
    ----------
    images : ndarray of shape (n, height, width, 3), uint8
        As they enter the network.
    maps : ndarray of shape (n, height, width)
        As :meth:`sktransfer.PatchAnomalyDetector.anomaly_map` returns them: the higher, the
        stranger. All images have one scale.
    scores : array-like of shape (n,), default=None
        Of `score_samples`: the higher, the more normal.
    offset : float, default=None
        The score below which an image is an anomaly.
    surroundings : sequence of n pairs (ndarray (height, width, 3), (top, left)), default=None
        The whole images, at the scale of `images`, and where in them those begin: they are shown
        faintly around what the network saw.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Around the images.
    axes_ : ndarray of matplotlib Axes
        One for each image.
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import PatchAnomalyDetector
    >>> from sktransfer.inspection import AnomalyMapDisplay
    >>> china = load_sample_images().images[0]                   # an array (427, 640, 3)
    >>> tiles = [china[200:300, left : left + 100] for left in range(0, 540, 60)]
    >>> detector = PatchAnomalyDetector(image_size=96, random_state=0).fit(tiles)
    >>> scratched = tiles[3].copy()
    >>> scratched[40:44, 20:80] = 255
    >>> display = AnomalyMapDisplay.from_estimator(detector, [scratched])
    >>> display.maps.shape
    (1, 96, 96)
    """

    def __init__(
        self,
        images: np.ndarray,
        maps: np.ndarray,
        scores: Any = None,
        offset: float | None = None,
        surroundings: Sequence[Any] | None = None,
    ) -> None:
        self.images, self.maps, self.scores = images, maps, scores
        self.offset, self.surroundings = offset, surroundings

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any, *, ax: Any = None, **kwargs: Any) -> Self:
        """Compute and plot heat maps.

        Parameters
        ----------
        estimator : PatchAnomalyDetector
            Fitted.
        X : sequence of n images
            A few.
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        AnomalyMapDisplay

        Raises
        ------
        TypeError
            If the estimator has no maps.
        """
        if not hasattr(estimator, "anomaly_map"):
            raise TypeError(
                f"{type(estimator).__name__} has no anomaly_map: pass a fitted "
                "PatchAnomalyDetector."
            )
        maps, scores = estimator.anomaly_map(X), estimator.score_samples(X)
        images, preprocessing = estimator.check_images(X), estimator.features().preprocessing
        seen = as_rgb(as_seen(images, preprocessing)).permute(0, 2, 3, 1).numpy()
        around = surroundings(images, preprocessing)
        return cls(seen, maps, scores, estimator.offset_, around).plot(ax=ax, **kwargs)

    def plot(
        self,
        ax: Any = None,
        *,
        n_cols: int | None = None,
        cmap: str = "inferno",
        alpha: float = 0.55,
        vmin: float | None = None,
        vmax: float | None = None,
    ) -> Self:
        """Draw the images with the maps upon them, and their scores above.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            A subplot that makes room for them; None for a new figure.
        n_cols : int, default=None
            Images in a row.
        cmap : str, default="inferno"
            Colours from normal to strange.
        alpha : float in [0, 1], default=0.55
            Share of the map in what is seen.
        vmin, vmax : float, default=None
            The values that the first and the last colour stand for, in all images. None for a half
            of minus `offset` and one and a half of it; without `offset`, for the least and the
            greatest.

        Returns
        -------
        self
        """
        shape = n_rows_and_cols(len(self.images), n_cols)
        self.ax_, grid = grid_axes(ax, *shape, n_lines=1)
        self.figure_ = self.ax_.figure
        self.axes_ = grid.ravel()[: len(self.images)]
        if self.offset is None:
            ends = np.min(self.maps), np.max(self.maps)
        else:
            ends = -self.offset / 2, -self.offset * 1.5
        vmin, vmax = (e if v is None else v for v, e in zip((vmin, vmax), ends, strict=True))
        colors = {"cmap": cmap, "alpha": alpha, "vmin": vmin, "vmax": vmax}
        heat = put_maps(self.axes_, self.images, self.maps, self.surroundings, **colors)
        for i, axes in enumerate(self.axes_):
            put_title(axes, *self._title(i))
        label = "distance to sound patches (1: usual)"
        self.figure_.colorbar(heat, ax=list(grid.ravel()), label=label)
        return self

    def _title(self, i: int) -> tuple[list[str], str]:
        """Return the lines above an image, and their colour."""
        if self.scores is None:
            return [], "black"
        is_anomaly = self.offset is not None and self.scores[i] < self.offset
        words = f"{'anomaly, ' if is_anomaly else ''}score {self.scores[i]:.2f}"
        return [words], _ANOMALY if is_anomaly else "black"


class RejectionCurveDisplay:
    """The error rate of the predictions that are left when the least sure ones are rejected.

    Parameters
    ----------
    rejected : ndarray of shape (n_points,)
        Shares of the images that are rejected, rising from 0.
    errors : ndarray of shape (n_points,)
        Share of wrong predictions among the rest.
    thresholds : ndarray of shape (n_points,)
        The least confidence that is accepted.
    name : str, default=None
        For the legend.

    Attributes
    ----------
    area : float
        The mean error rate over all shares of rejection: the lower, the better the confidence
        tells right from wrong.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    line_ : matplotlib Artist

    See Also
    --------
    sklearn.calibration.CalibrationDisplay : Whether probabilities are what they say.

    Examples
    --------
    >>> from sktransfer.inspection import RejectionCurveDisplay
    >>> display = RejectionCurveDisplay.from_predictions(
    ...     ["cat", "dog", "dog", "cat"], ["cat", "dog", "cat", "cat"], [0.9, 0.8, 0.5, 0.7]
    ... )
    >>> display.rejected.tolist(), display.errors.tolist()
    ([0.0, 0.25, 0.5, 0.75], [0.25, 0.0, 0.0, 0.0])
    """

    def __init__(
        self,
        rejected: np.ndarray,
        errors: np.ndarray,
        thresholds: np.ndarray,
        name: str | None = None,
    ) -> None:
        self.rejected, self.errors, self.thresholds = rejected, errors, thresholds
        self.name = name

    @property
    def area(self) -> float:
        shares = np.diff([*self.rejected, 1.0])
        return float((shares * self.errors).sum())

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        confidence: Any = None,
        name: str | None = None,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Predict, and plot the curve.

        Parameters
        ----------
        estimator : classifier
            Fitted.
        X : sequence of n images
        y : array-like of shape (n,)
            True labels. Labels that the estimator does not know are allowed: what it says of such
            images is always wrong.
        confidence : array-like of shape (n,), default=None
            The higher, the surer; None for the probability of the predicted class.
        name : str, default=None
            For the legend; None for the name of the estimator's class.
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        RejectionCurveDisplay
        """
        if confidence is None:
            if not hasattr(estimator, "predict_proba"):
                raise TypeError(
                    f"{type(estimator).__name__} has no predict_proba: pass confidence, a number "
                    "for each image, or wrap it in a CalibratedClassifierCV."
                )
            proba = np.asarray(estimator.predict_proba(X))
            if proba.ndim != 2 or not hasattr(estimator, "classes_"):
                raise TypeError("A rejection curve needs one label an image, of known classes.")
            confidence, predicted = proba.max(1), np.asarray(estimator.classes_)[proba.argmax(1)]
        else:
            predicted = estimator.predict(X)
        name = type(estimator).__name__ if name is None else name
        return cls.from_predictions(y, predicted, confidence, name=name, ax=ax, **kwargs)

    @classmethod
    def from_predictions(
        cls,
        y_true: Any,
        y_pred: Any,
        confidence: Any,
        *,
        name: str | None = None,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Plot the curve of predictions that are there.

        Parameters
        ----------
        y_true, y_pred : array-like of shape (n,)
            Labels.
        confidence : array-like of shape (n,)
            The higher, the surer: probabilities, a novelty score, ... Equal values are accepted or
            rejected together.
        name : str, default=None
            For the legend.
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        RejectionCurveDisplay

        Raises
        ------
        ValueError
            If lengths differ, nothing is there, or a confidence is no number.
        """
        y_true, y_pred = (column_or_1d(plain_labels(y)) for y in (y_true, y_pred))
        confidence = column_or_1d(confidence)
        check_consistent_length(y_true, y_pred, confidence)
        confidence = check_array(confidence, ensure_2d=False, dtype=float, input_name="confidence")
        order = np.argsort(-confidence, kind="stable")
        sure = confidence[order]
        n_wrong = np.cumsum(y_true[order] != y_pred[order])
        ends = np.flatnonzero(np.r_[sure[1:] != sure[:-1], True])[::-1]  # of equal values
        accepted = ends + 1
        rejected = 1 - accepted / len(sure)
        display = cls(rejected, n_wrong[ends] / accepted, sure[ends], name)
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, *, name: str | None = None, **kwargs: Any) -> Self:
        """Draw the error rate against the share that is rejected.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            None for those of a new figure.
        name : str, default=None
            For the legend, in place of the display's own.
        **kwargs
            For matplotlib's `plot`.

        Returns
        -------
        self
        """
        ax = single_axes(ax)
        name = self.name if name is None else name
        label = f"{'' if name is None else f'{name}, '}mean {self.area:.3f}"
        kwargs = {"label": label, "drawstyle": "steps-post", **kwargs}
        (self.line_,) = ax.plot([*self.rejected, 1.0], [*self.errors, self.errors[-1]], **kwargs)
        ax.set(xlabel="share rejected", ylabel="error rate of the rest", xlim=(0, 1))
        ax.set_ylim(bottom=0)
        ax.legend()
        self.ax_, self.figure_ = ax, ax.figure
        return self
