"""A map of images by their embeddings."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.pipeline import Pipeline
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_consistent_length

from sktransfer._estimators.pretrained import PretrainedFeatureExtractor
from sktransfer._estimators.pretrained_classifier import PretrainedClassifier
from sktransfer.inspection._plotting import images_of, shown, single_axes, text_of
from sktransfer.io import check_images

__all__ = ["EmbeddingDisplay"]

_THUMBNAIL = 48  # pixels of its longer side
_SPACING = (0.07, 0.09)  # of the map's width and height, between thumbnails
_MANY = 20  # classes; more have no colours that can be told apart


class EmbeddingDisplay:
    """A map of images: those that a network finds alike lie close together.

    Parameters
    ----------
    positions : ndarray of shape (n, 2)
    labels : array-like of shape (n,) or None, default=None
        Classes, or numbers, by which points are coloured.
    thumbnails : dict of int to ndarray (height, width, 3), default=None
        Rows that are drawn as images.
    axis_names : tuple of two str, default=("", "")

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import PretrainedFeatureExtractor
    >>> from sktransfer.inspection import EmbeddingDisplay
    >>> china, flower = load_sample_images().images                  # two arrays (427, 640, 3)
    >>> X = [china[:, :320], china[:, 320:], flower[:, :320], flower[:, 320:]]
    >>> y = ["china", "china", "flower", "flower"]
    >>> display = EmbeddingDisplay.from_estimator(PretrainedFeatureExtractor(), X, y)
    >>> display.positions.shape
    (4, 2)
    """

    def __init__(
        self,
        positions: np.ndarray,
        labels: Any = None,
        thumbnails: dict[int, np.ndarray] | None = None,
        axis_names: tuple[str, str] = ("", ""),
    ) -> None:
        self.positions, self.labels = positions, labels
        self.thumbnails, self.axis_names = thumbnails, axis_names

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        method: str = "pca",
        n_thumbnails: int = 100,
        random_state: Any = None,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Embed images, and plot the map.

        Parameters
        ----------
        estimator : PretrainedFeatureExtractor, FineTunedClassifier, Pipeline, ...
            What embeds. Of a fine-tuned estimator, the fine-tuned network; of a pipeline that ends
            in a predictor, the steps before.
        X : sequence of n images
        y : array-like of shape (n,), default=None
            Classes, or numbers, by which points are coloured.
        method : {"pca", "tsne"}, default="pca"
            How embeddings get two coordinates: the first principal components, or t-SNE.
        n_thumbnails : int, default=100
            Images drawn at most, chosen such that they do not cover each other; the others are
            dots.
        random_state : int, RandomState instance or None, default=None
            Of t-SNE, and of the choice of images.
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        EmbeddingDisplay
        """
        return cls.from_embeddings(
            embed(estimator, X),
            images_of(estimator, X),
            y,
            method=method,
            n_thumbnails=n_thumbnails,
            random_state=random_state,
            ax=ax,
            **kwargs,
        )

    @classmethod
    def from_embeddings(
        cls,
        embeddings: Any,
        X: Any = None,
        y: Any = None,
        *,
        method: str = "pca",
        n_thumbnails: int = 100,
        random_state: Any = None,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Plot a map of embeddings that are there.

        Parameters
        ----------
        embeddings : array-like of shape (n, n_features)
            At least three of them.
        X : sequence of n images, default=None
            None for dots alone.
        y, method, n_thumbnails, random_state, ax, **kwargs
            As for `from_estimator`.

        Returns
        -------
        EmbeddingDisplay
        """
        embeddings = np.asarray(embeddings)
        check_consistent_length(*(part for part in (embeddings, X, y) if part is not None))
        random = check_random_state(random_state)
        positions, names = _two_dimensions(embeddings, method, random)
        thumbnails = None
        if X is not None and n_thumbnails:
            images = check_images(X)
            rows = _spread(positions, n_thumbnails, random)
            thumbnails = {row: shown(images, row, _THUMBNAIL) for row in rows}
        return cls(positions, y, thumbnails, names).plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, *, thumbnail_size: float = 28) -> Self:
        """Draw the map; frames of thumbnails have the colours of the dots.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            None for those of a new figure.
        thumbnail_size : float, default=28
            Of the longer side of a thumbnail, in points.

        Returns
        -------
        self
        """
        ax = single_axes(ax, (8, 6))
        colors = self._scatter(ax)
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        for row, thumbnail in (self.thumbnails or {}).items():
            image = OffsetImage(thumbnail, zoom=thumbnail_size / max(thumbnail.shape[:2]))
            frame = {"edgecolor": colors[row], "linewidth": 1.5}
            ax.add_artist(AnnotationBbox(image, self.positions[row], pad=0.1, bboxprops=frame))
        ax.set(xticks=[], yticks=[], xlabel=self.axis_names[0], ylabel=self.axis_names[1])
        ax.margins(0.08)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _scatter(self, ax: Any) -> np.ndarray:
        """Draw dots with a legend or a scale; return their colours (n, 4)."""
        x, y = self.positions.T
        if self.labels is None:
            return ax.scatter(x, y, s=14).get_facecolor().repeat(len(x), 0)
        labels = np.asarray(self.labels)
        if labels.ndim != 1:
            raise ValueError(f"y must be one label an image, got shape {labels.shape}.")
        if type_of_target(labels).startswith("continuous"):
            dots = ax.scatter(x, y, s=14, c=labels)
            ax.figure.colorbar(dots, ax=ax)
            return dots.to_rgba(labels)
        import matplotlib as mpl

        names, numbers = np.unique(labels, return_inverse=True)
        palette = mpl.colormaps["tab10" if len(names) <= 10 else "tab20"]
        if len(names) > _MANY:
            palette = mpl.colormaps["turbo"].resampled(len(names))
        colors = palette(numbers)
        for number, name in enumerate(names):
            is_of_class = numbers == number
            ax.scatter(
                x[is_of_class], y[is_of_class], s=14, color=colors[is_of_class], label=text_of(name)
            )
        if len(names) <= _MANY:
            ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small")
        return colors


# ------------------------------------------------------------------------------ embeddings


def embed(estimator: Any, X: Any) -> np.ndarray:
    """Return the embeddings on which an estimator decides (n, n_features)."""
    if isinstance(estimator, PretrainedClassifier):
        extractor = PretrainedFeatureExtractor(**estimator.get_params(deep=False))
    elif hasattr(estimator, "to_feature_extractor"):
        extractor = estimator.to_feature_extractor()
    elif isinstance(estimator, Pipeline) and not hasattr(estimator[-1], "transform"):
        extractor = estimator[:-1]
    else:
        extractor = estimator
    if not hasattr(extractor, "transform"):
        raise TypeError(
            f"{type(estimator).__name__} does not embed images. Pass a PretrainedFeatureExtractor, "
            "a FineTunedClassifier, or a pipeline that begins with an extractor."
        )
    return np.asarray(extractor.transform(X))


def _two_dimensions(
    embeddings: np.ndarray, method: str, random: np.random.RandomState
) -> tuple[np.ndarray, tuple[str, str]]:
    if embeddings.ndim != 2 or len(embeddings) < 3:
        raise ValueError(f"A map needs at least 3 embeddings, got shape {embeddings.shape}.")
    if method == "pca":
        pca = PCA(2, random_state=random).fit(embeddings)
        shares = pca.explained_variance_ratio_
        first, second = (f"component {i + 1} ({share:.0%})" for i, share in enumerate(shares))
        return np.asarray(pca.transform(embeddings)), (first, second)
    if method == "tsne":
        perplexity = min(30.0, (len(embeddings) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=random)
        return np.asarray(tsne.fit_transform(embeddings)), ("t-SNE 1", "t-SNE 2")
    raise ValueError(f"method must be 'pca' or 'tsne', got {method!r}.")


def _spread(positions: np.ndarray, n: int, random: np.random.RandomState) -> list[int]:
    """Choose up to `n` rows at random, none of them too close to another."""
    extent = np.ptp(positions, axis=0)
    scaled = positions / np.where(extent > 0, extent, 1)  # (n, 2)
    chosen: list[int] = []
    for row in random.permutation(len(positions)).tolist():
        if len(chosen) == n:
            break
        if all((np.abs(scaled[other] - scaled[row]) > _SPACING).any() for other in chosen):
            chosen.append(row)
    return chosen
