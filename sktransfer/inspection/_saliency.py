"""Where in an image a network sees what it predicts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from sktransfer._engine.cut_network import as_map, layout_of
from sktransfer._engine.runner import Runner
from sktransfer._estimators.pretrained_classifier import PretrainedClassifier, logits_of
from sktransfer._optional import load_optional
from sktransfer._torch_state import network_lock, ready_to_train
from sktransfer._training.whole import WholeNetwork, whole_of_runner, whole_of_trainer
from sktransfer.inspection._plotting import (
    as_rgb,
    as_seen,
    grid_axes,
    n_rows_and_cols,
    put_maps,
    put_title,
    surroundings,
    text_of,
)
from sktransfer.transforms import Preprocessing

__all__ = ["SaliencyDisplay"]

_STEP = 8  # images at once: the activations of all blocks are held for them


class SaliencyDisplay:
    """Heat maps of what speaks for a class in an image, by Grad-CAM.

    Parameters
    ----------
    images : ndarray of shape (n, height, width, 3), uint8
        As they enter the network.
    saliency : ndarray of shape (n, height, width), float in [0, 1]
        Each image has its own scale.
    titles : sequence of n str
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

    Notes
    -----
    The map is the sum of the channels of an activation, each weighted by the mean gradient of the
    output for the class, where it is positive; scaled up from the few positions that the
    activation has. It shows where, not why, and a network may be right for a wrong reason.

    References
    ----------
    Selvaraju, Cogswell, Das, Vedantam, Parikh and Batra, "Grad-CAM: visual explanations from deep
    networks via gradient-based localization" (2017). Computed by the package `grad-cam`.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import PretrainedClassifier
    >>> from sktransfer.inspection import SaliencyDisplay
    >>> images = load_sample_images().images                     # two arrays (427, 640, 3)
    >>> display = SaliencyDisplay.from_estimator(PretrainedClassifier(), images)
    >>> display.saliency.shape
    (2, 224, 224)
    """

    def __init__(
        self,
        images: np.ndarray,
        saliency: np.ndarray,
        titles: Sequence[str],
        surroundings: Sequence[Any] | None = None,
    ) -> None:
        self.images, self.saliency, self.titles = images, saliency, titles
        self.surroundings = surroundings

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        *,
        targets: Any = None,
        layer: int | str | None = None,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Compute and plot heat maps.

        Parameters
        ----------
        estimator : FineTunedClassifier, FineTunedRegressor or PretrainedClassifier
            Fitted, if it has to be; of a network that has blocks.
        X : sequence of n images
            A few.
        targets : array-like of shape (n,), default=None
            The class whose traces are looked for in each image; None for the predicted one. For a
            regressor, the number of an output; None for the first.
        layer : int or str, default=None
            Block whose output is looked at, as `layer` of
            :class:`sktransfer.PretrainedFeatureExtractor`. None for the last feature map; of token
            sequences the one before the last, as behind the last block only the class token may
            count.
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        SaliencyDisplay

        Raises
        ------
        ValueError
            If a target is no class, or if the block's output has no positions.
        ImportError
            If grad-cam is not installed.
        """
        load_optional("pytorch_grad_cam", f"{cls.__name__}.from_estimator", "'.[inspection]'")
        source = _source(estimator)
        images = estimator.check_images(X)
        columns = _columns(estimator, targets, len(images))
        position = _position(source.runner, layer, source.preprocessing.size)
        fitted = as_seen(images, source.preprocessing)  # (n, c, h, w) uint8
        saliency, outputs, columns = _grad_cam(source, position, fitted, columns)
        titles = _titles(estimator, outputs, columns, X)
        shown = as_rgb(fitted).permute(0, 2, 3, 1).numpy()
        around = surroundings(images, source.preprocessing)
        return cls(shown, saliency, titles, around).plot(ax=ax, **kwargs)

    def plot(
        self,
        ax: Any = None,
        *,
        n_cols: int | None = None,
        cmap: str = "inferno",
        alpha: float = 0.55,
    ) -> Self:
        """Draw the images with the maps upon them.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            A subplot that makes room for them; None for a new figure.
        n_cols : int, default=None
            Images in a row.
        cmap : str, default="inferno"
            Colours from cold to hot.
        alpha : float in [0, 1], default=0.55
            Share of the map in what is seen.

        Returns
        -------
        self
        """
        shape = n_rows_and_cols(len(self.images), n_cols)
        self.ax_, grid = grid_axes(ax, *shape, n_lines=1)
        self.figure_ = self.ax_.figure
        self.axes_ = grid.ravel()[: len(self.images)]
        colors = {"cmap": cmap, "alpha": alpha, "vmin": 0, "vmax": 1}
        put_maps(self.axes_, self.images, self.saliency, self.surroundings, **colors)
        for axes, title in zip(self.axes_, self.titles, strict=True):
            put_title(axes, [title])
        return self


# ------------------------------------------------------------------------------ networks


class _Source(NamedTuple):
    whole: WholeNetwork
    runner: Runner
    preprocessing: Preprocessing


def _source(estimator: Any) -> _Source:
    """Return the network on which an estimator decides, in blocks."""
    if isinstance(estimator, PretrainedClassifier):
        embedding = logits_of(estimator)
        runner, preprocessing = embedding.runner, embedding.preprocessing
        return _Source(whole_of_runner(runner, preprocessing.size), runner, preprocessing)
    if not hasattr(estimator, "to_feature_extractor"):
        raise TypeError(
            "A saliency map needs gradients from the prediction to the image, so a "
            "FineTunedClassifier, FineTunedRegressor or PretrainedClassifier; got "
            f"{type(estimator).__name__}."
        )
    check_is_fitted(estimator)
    trainer = estimator.trainer()
    runner, preprocessing = trainer.frozen.runner, trainer.frozen.preprocessing
    return _Source(whole_of_trainer(trainer), runner, preprocessing)


def _position(runner: Runner, layer: int | str | None, image_size: tuple[int, int]) -> int:
    """Return the cut whose activation is looked at."""
    layouts = {
        position: layout_of(runner.shape(position, image_size), image_size)
        for position in range(1, runner.embedding)
    }
    if layer is not None:
        position = runner.trace.blocks(layer).stop
        if layouts[position] in ("vector", "other"):
            raise ValueError(
                f"layer={layer!r} has an output of shape {runner.shape(position, image_size)}, "
                "without positions in the image. Choose an earlier block."
            )
        return position
    if not runner.can_be_cut:
        runner.trace  # noqa: B018 raises an error that says why
    spatial = [p for p, layout in layouts.items() if layout not in ("vector", "other")]
    if not spatial:
        raise ValueError(f"No block of {runner.name!r} has an output with positions in the image.")
    is_tokens = layouts[spatial[-1]] == "tokens"
    return spatial[-2] if is_tokens and len(spatial) > 1 else spatial[-1]


def _grad_cam(
    source: _Source, position: int, fitted: torch.Tensor, columns: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return maps (n, h, w), outputs (n, n_outputs) and the columns looked at (n,)."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    runner, size = source.runner, source.preprocessing.size
    layout = layout_of(runner.shape(position, size), size)
    to_map: Callable[[torch.Tensor], torch.Tensor] = partial(
        as_map, layout=layout, n_prefix=runner.n_prefix(position), image_size=size
    )
    target_layer = source.whole.blocks[position - 1]
    maps, outputs, chosen = [], [], []
    explaining = threading.Lock()
    grad_cam = GradCAM(source.whole, [target_layer], to_map)
    with explaining, ready_to_train(explaining), grad_cam as cam:
        for start in range(0, len(fitted), _STEP):
            x = source.preprocessing.normalize(fitted[start : start + _STEP].to(runner.device))
            asked = None if columns is None else columns[start : start + _STEP]
            targets = None if asked is None else [ClassifierOutputTarget(int(c)) for c in asked]
            with network_lock.shared():
                maps.append(cam(x.requires_grad_(), targets))  # as the weights want no gradients
            output = cam.outputs.detach().cpu().numpy()
            outputs.append(output)
            chosen.append(output.argmax(1) if asked is None else asked)
    return np.concatenate(maps), np.concatenate(outputs), np.concatenate(chosen)


# ------------------------------------------------------------------------------ labels


def _columns(estimator: Any, targets: Any, n: int) -> np.ndarray | None:
    """Return the outputs to look at (n,), None for the largest."""
    if targets is None:
        return None if hasattr(estimator, "classes_") else np.zeros(n, int)
    targets = np.asarray(targets)
    if targets.ndim != 1:
        raise ValueError(f"targets must be one class an image, got shape {targets.shape}.")
    check_consistent_length(targets, range(n))
    if hasattr(estimator, "classes_"):
        classes = estimator.classes_.tolist()
    else:
        classes = list(range(estimator.trainer().settings.n_outputs))
    if unknown := sorted({text_of(t) for t in targets.tolist() if t not in classes}):
        raise ValueError(f"targets holds {', '.join(unknown)}, which the estimator does not know.")
    return np.array([classes.index(target) for target in targets.tolist()])


def _titles(estimator: Any, outputs: np.ndarray, columns: np.ndarray, X: Any) -> list[str]:
    if not hasattr(estimator, "classes_"):
        values = np.asarray(estimator.predict(X), float).reshape(len(columns), -1)
        return [f"{values[i, column]:.3g}" for i, column in enumerate(columns)]
    logits = torch.from_numpy(outputs)
    is_multilabel = getattr(estimator, "multilabel_", False)
    proba = (logits.sigmoid() if is_multilabel else logits.softmax(1)).numpy()
    return [
        f"{text_of(estimator.classes_[column])} ({proba[i, column]:.2f})"
        for i, column in enumerate(columns)
    ]
