"""Displays of images in rows: the worst predictions, and the nearest training images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_consistent_length

from sktransfer._neighbors import nearest_in_order
from sktransfer.inspection._embedding_display import embed
from sktransfer.inspection._plotting import (
    grid_axes,
    images_of,
    n_rows_and_cols,
    put_image,
    shown,
    text_of,
)
from sktransfer.io import check_images

__all__ = ["PrototypeDisplay", "TopLossesDisplay"]

_WRONG = "firebrick"


class TopLossesDisplay:
    """The images that are most wrongly classified, with both labels.

    Parameters
    ----------
    images : sequence of n ndarrays (height, width, 3), uint8
    rows : array-like of shape (n,)
        Their rows in `X`, in falling order of their losses.
    true, predicted : array-like of shape (n,)
        Labels.
    true_proba, predicted_proba : array-like of shape (n,)
        Their predicted probabilities.

    Attributes
    ----------
    losses : ndarray of shape (n,)
        Minus the logarithm of `true_proba`.
    ax_ : matplotlib Axes
        Around the images.
    axes_ : ndarray of matplotlib Axes
        One for each image.
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer.inspection import TopLossesDisplay
    >>> images = load_sample_images().images
    >>> proba = [[0.9, 0.1], [0.7, 0.3]]
    >>> display = TopLossesDisplay.from_predictions(
    ...     images, ["china", "flower"], proba, classes=["china", "flower"]
    ... )
    >>> display.rows.tolist(), display.predicted.tolist()
    ([1, 0], ['china', 'china'])
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        rows: Any,
        true: Any,
        predicted: Any,
        true_proba: Any,
        predicted_proba: Any,
    ) -> None:
        self.images, self.rows = images, rows
        self.true, self.predicted = true, predicted
        self.true_proba, self.predicted_proba = true_proba, predicted_proba

    @property
    def losses(self) -> np.ndarray:
        return -np.log(np.maximum(self.true_proba, np.finfo(np.float32).tiny))

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, y: Any, *, n_images: int = 12, ax: Any = None, **kwargs: Any
    ) -> Self:
        """Predict, and plot the worst.

        Parameters
        ----------
        estimator : classifier with `predict_proba` and `classes_`
            Fitted: a :class:`sktransfer.FineTunedClassifier`, a pipeline with a
            :class:`sktransfer.PretrainedFeatureExtractor`, ...
        X : sequence of images
        y : array-like of shape (n,)
            True labels.
        n_images : int, default=12
            How many to show.
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        TopLossesDisplay

        Raises
        ------
        TypeError
            If the estimator predicts no probabilities.
        ValueError
            If `y` holds labels that it does not know.
        """
        if not hasattr(estimator, "predict_proba"):
            raise TypeError(
                f"{type(estimator).__name__} has no predict_proba, from which losses are taken. "
                "Use a LogisticRegression, or wrap it in a CalibratedClassifierCV."
            )
        proba = estimator.predict_proba(X)
        images = images_of(estimator, X)
        return cls.from_predictions(
            images, y, proba, classes=estimator.classes_, n_images=n_images, ax=ax, **kwargs
        )

    @classmethod
    def from_predictions(
        cls,
        X: Any,
        y_true: Any,
        y_proba: Any,
        *,
        classes: Any,
        n_images: int = 12,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Plot the worst of predictions that are there.

        Parameters
        ----------
        X : sequence of n images
        y_true : array-like of shape (n,)
        y_proba : array-like of shape (n, n_classes)
        classes : array-like of shape (n_classes,)
            Labels of the columns of `y_proba`.
        n_images : int, default=12
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        TopLossesDisplay
        """
        images, y_true = check_images(X), np.asarray(y_true)
        y_proba, classes = np.asarray(y_proba, float), np.asarray(classes)
        check_consistent_length(images, y_true, y_proba)
        if y_proba.ndim != 2 or y_proba.shape[1] != len(classes) or y_true.ndim != 1:
            raise ValueError(
                f"y_true of shape {y_true.shape}, y_proba of shape {y_proba.shape} and "
                f"{len(classes)} classes do not go together: one label an image, and a column of "
                "y_proba for each class are needed."
            )
        column = {label: i for i, label in enumerate(classes.tolist())}
        if unknown := sorted({text_of(label) for label in y_true.tolist() if label not in column}):
            raise ValueError(f"y_true holds labels that are not in classes: {', '.join(unknown)}.")
        true = np.array([column[label] for label in y_true.tolist()])
        of_true = y_proba[np.arange(len(true)), true]
        rows = np.argsort(of_true, kind="stable")[:n_images]
        predicted = y_proba[rows].argmax(1)
        display = cls(
            [shown(images, i) for i in rows],
            rows,
            y_true[rows],
            classes[predicted],
            of_true[rows],
            y_proba[rows, predicted],
        )
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, *, n_cols: int | None = None) -> Self:
        """Draw the images, each with what was predicted and what is true.

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
        shape = n_rows_and_cols(len(self.images), n_cols)
        self.ax_, grid = grid_axes(ax, *shape)
        self.figure_ = self.ax_.figure
        self.axes_ = grid.ravel()[: len(self.images)]
        for i, axes in enumerate(self.axes_):
            is_wrong = self.predicted[i] != self.true[i]
            said = f"said {text_of(self.predicted[i])} ({self.predicted_proba[i]:.2f})"
            is_ = f"is {text_of(self.true[i])} ({self.true_proba[i]:.2f})"
            put_image(axes, self.images[i], [said, is_], _WRONG if is_wrong else "black")
        return self


class PrototypeDisplay:
    """Images, and the training images that lie nearest in the space of embeddings.

    Parameters
    ----------
    images : sequence of n ndarrays (height, width, 3), uint8
    titles : sequence of n str
        What is predicted for them.
    neighbors : sequence of n lists of k ndarrays (height, width, 3), uint8
    neighbor_titles : sequence of n lists of k str
        Their labels.
    distances : ndarray of shape (n, k)
    rows : ndarray of shape (n, k)
        Of the neighbors, in the training images.
    metric : str, default="cosine"
        Of the distances.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Around the images.
    axes_ : ndarray of matplotlib Axes, shape (n, 1 + k)
        The image first, then its neighbors.
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import PretrainedFeatureExtractor
    >>> from sktransfer.inspection import PrototypeDisplay
    >>> china, flower = load_sample_images().images                  # two arrays (427, 640, 3)
    >>> X = [china[:, :320], china[:, 320:], flower[:, :320], flower[:, 320:]]
    >>> display = PrototypeDisplay.from_estimator(
    ...     PretrainedFeatureExtractor(), [flower], X, ["china", "china", "flower", "flower"],
    ...     n_neighbors=2,
    ... )
    >>> sorted(display.rows[0].tolist())
    [2, 3]
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        titles: Sequence[str],
        neighbors: Sequence[Sequence[np.ndarray]],
        neighbor_titles: Sequence[Sequence[str]],
        distances: np.ndarray,
        rows: np.ndarray,
        metric: str = "cosine",
    ) -> None:
        self.images, self.titles, self.metric = images, titles, metric
        self.neighbors, self.neighbor_titles = neighbors, neighbor_titles
        self.distances, self.rows = distances, rows

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        X_train: Any,
        y_train: Any = None,
        *,
        n_neighbors: int = 5,
        metric: str = "cosine",
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Embed images and training images, and plot the nearest of them.

        Parameters
        ----------
        estimator : FineTunedClassifier, Pipeline, PretrainedFeatureExtractor, ...
            What embeds, as for `EmbeddingDisplay`, and predicts, if it can.
        X : sequence of images
            A few: each is a row of the figure.
        X_train : sequence of images
        y_train : array-like, default=None
            Labels of `X_train`.
        n_neighbors : int, default=5
        metric : str, default="cosine"
            Distance between embeddings; see :class:`sklearn.neighbors.NearestNeighbors`.
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        PrototypeDisplay

        Raises
        ------
        ValueError
            If there are fewer than `n_neighbors` training images.
        """
        predictions = estimator.predict(X) if hasattr(estimator, "predict") else None
        return cls.from_embeddings(
            embed(estimator, X),
            embed(estimator, X_train),
            images_of(estimator, X),
            images_of(estimator, X_train),
            y_train,
            predictions=predictions,
            n_neighbors=n_neighbors,
            metric=metric,
            ax=ax,
            **kwargs,
        )

    @classmethod
    def from_embeddings(
        cls,
        embeddings: Any,
        embeddings_train: Any,
        X: Any,
        X_train: Any,
        y_train: Any = None,
        *,
        predictions: Any = None,
        n_neighbors: int = 5,
        metric: str = "cosine",
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Plot the neighbors by embeddings that are there.

        Parameters
        ----------
        embeddings : array-like of shape (n, n_features)
        embeddings_train : array-like of shape (n_train, n_features)
        X, X_train : sequences of n and n_train images
        y_train, n_neighbors, metric, ax, **kwargs
            As for `from_estimator`.
        predictions : array-like of shape (n,), default=None
            Written above the images.

        Returns
        -------
        PrototypeDisplay
        """
        images, train = check_images(X), check_images(X_train)
        check_consistent_length(embeddings, images)
        check_consistent_length(embeddings_train, train, train if y_train is None else y_train)
        if not 1 <= n_neighbors <= len(train):
            raise ValueError(
                f"n_neighbors={n_neighbors}, but there are {len(train)} training images."
            )
        distances, rows = nearest_in_order(embeddings_train, embeddings, n_neighbors, metric=metric)
        labels = None if y_train is None else np.asarray(y_train)
        said = None if predictions is None else [f"said {_value(p)}" for p in predictions]
        display = cls(
            [shown(images, i) for i in range(len(images))],
            said or [f"image {i}" for i in range(len(images))],
            [[shown(train, j) for j in nearest_rows] for nearest_rows in rows],
            [
                [f"image {j}" if labels is None else _value(labels[j]) for j in nearest_rows]
                for nearest_rows in rows
            ],
            distances,
            rows,
            metric if isinstance(metric, str) else "",
        )
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None) -> Self:
        """Draw a row for each image: itself, then its neighbors with their distances.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            A subplot that makes room for them; None for a new figure.

        Returns
        -------
        self
        """
        n, k = self.distances.shape
        self.ax_, self.axes_ = grid_axes(ax, n, 1 + k)
        self.figure_ = self.ax_.figure
        for i, (first, *others) in enumerate(self.axes_):
            put_image(first, self.images[i], ["query", self.titles[i]])
            first.title.set_fontweight("bold")
            for j, axes in enumerate(others):
                distance = f"{self.metric} distance {self.distances[i, j]:.2f}".strip()
                lines = [self.neighbor_titles[i][j], distance]
                put_image(axes, self.neighbors[i][j], lines)
        return self


def _value(value: Any) -> str:
    is_number = isinstance(value, float | np.floating)
    return f"{value:.3g}" if is_number else text_of(value)
