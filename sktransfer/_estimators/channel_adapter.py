"""Backbones for images of more or fewer channels than red, green and blue."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, _fit_context
from sklearn.exceptions import NotFittedError

from sktransfer._estimators.base import (
    ImageEstimator,
    Interval,
    StrOptions,
    atomic,
    change_since_fit,
)
from sktransfer._threads import n_threads
from sktransfer.io import ImageSequence, check_images
from sktransfer.io._images import count_channels
from sktransfer.models import Backbone, get_model
from sktransfer.models._inflation import channel_statistics, inflated
from sktransfer.models._modules import portable
from sktransfer.models._registry import portable_name
from sktransfer.models._state_files import portable_weights
from sktransfer.transforms import Channels, Preprocessing, range_pairs

__all__ = ["ChannelAdapter"]

_CONSTANT = 1e-6  # of the range; rounding leaves as much of the deviation of a constant channel


class ChannelAdapter(BaseEstimator):
    """A backbone for images of any number of channels: one (radar, X-rays), four, twelve.

    It is what other estimators take as their `backbone`. The weights of the network's first
    convolution are repeated over the channels and rescaled; all other weights stay as they are.
    The images are then arrays (height, width, channels), or TIFF files of so many channels.

    Parameters
    ----------
    backbone : str, torch.nn.Module, Backbone or fitted estimator, default="efficientnet_lite0"
        A network for RGB. See :func:`sktransfer.get_model`.
    weights : str, path or None, default="default"
        Of that network. Weights of a network that takes these channels already go to the estimator
        that gets this backbone, by its own `weights`.
    n_channels : int or "auto", default="auto"
        Channels of an image. `"auto"`: those of the images that `fit` gets.
    value_range : tuple of (low, high), or one such pair for each channel, default=None
        The values of black and white, as ``(0, 4095)`` for 12 bits. What lies outside is clipped,
        and what lies inside is brought to 256 steps, so let it be no wider than the data. None: 0
        to 255 of integers, 0 to 1 of floats; uint16 then is an error.
    mean, std : sequence of n_channels floats, default=None
        Of each channel, with 0 for black and 1 for white. None: those of the images that `fit`
        gets; without `fit` the network's own, repeated as the weights are.
    n_jobs : int or None, default=None
        Threads in which `fit` reads images. None or -1: one a core.

    Attributes
    ----------
    n_channels_ : int
        Channels of an image.
    mean_, std_ : ndarray of shape (n_channels,)
        Of the channels of all images, each with the same weight; `std_` is 1 for a channel that is
        the same everywhere.

    See Also
    --------
    sktransfer.models.Backbone : A network of your own that takes such images already, with a
        `Preprocessing` whose `mean` and `std` have a number for each channel.

    Notes
    -----
    `fit` is optional: it learns how many channels there are, and their statistics. Fit it to
    images of the training alone. A row of features is a function of one image and of these
    statistics, which are part of the memory's key. Copies of an estimator that has a fitted
    adapter, as cross-validation makes them, keep it as it is.

    Files: TIFF is read by tifffile (``pip install '.[tiff]'``), whose channels are the
    samples of a page, or pages of one size. PNG and others count as what they hold: one channel of
    grey, or three, or four with alpha, which here is not blended with a background.

    The inflated network was trained on none of these channels but three, so measure what it gains
    against three of them: with few images often little.

    Which convolution is the first is what timm says of its networks; through others, a blank image
    is run, and all that get it are inflated. A convolution in groups can't be.

    `precision="int8"` is for photographs and is refused. ``augment="auto"`` changes brightness and
    shapes alike in all channels, and leaves out what only colours have.

    References
    ----------
    Wightman, "PyTorch Image Models" (timm), `adapt_input_conv`: repeat the weights of the three
    channels in turn and scale them by 3 / n_channels; add them up for one channel. Carreira and
    Zisserman, "Quo vadis, action recognition?" (2017), for the idea of inflation.

    Examples
    --------
    >>> import numpy as np
    >>> from sktransfer import ChannelAdapter, PretrainedFeatureExtractor
    >>> X = np.random.default_rng(0).integers(3000, size=(4, 64, 64, 5), dtype=np.uint16)
    >>> backbone = ChannelAdapter(value_range=(0, 3000)).fit(X)          # 5 channels
    >>> backbone.mean_.round(1).tolist()
    [0.5, 0.5, 0.5, 0.5, 0.5]
    >>> PretrainedFeatureExtractor(backbone).transform(X).shape
    (4, 1280)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "backbone": ImageEstimator._parameter_constraints["backbone"],
        "weights": ImageEstimator._parameter_constraints["weights"],
        "n_channels": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "value_range": ["array-like", None],
        "mean": ["array-like", None],
        "std": ["array-like", None],
        "n_jobs": [Integral, None],
    }

    # What `to_backbone` made last: of which network, for which preprocessing.
    _made: tuple[Backbone, Preprocessing, Backbone] | None = None

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: Any = "default",
        n_channels: int | str = "auto",
        value_range: Any = None,
        mean: Any = None,
        std: Any = None,
        n_jobs: int | None = None,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.n_channels = n_channels
        self.value_range = value_range
        self.mean = mean
        self.std = std
        self.n_jobs = n_jobs

    @_fit_context(prefer_skip_nested_validation=True)
    @atomic
    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn the number of channels, and the mean and standard deviation of each.

        Parameters
        ----------
        X : sequence of images
            Arrays (height, width[, channels]), one array (n, height, width[, channels]), tensors
            (channels, height, width), PIL images, or files. See :mod:`sktransfer.io`.
        y : ignored

        Returns
        -------
        self
        """
        n_channels = count_channels(X) if self.n_channels == "auto" else int(self.n_channels)
        channels = Channels(n_channels, range_pairs(self.value_range, n_channels))
        images = check_images(X, channels=channels)
        self.mean_, self.std_ = _statistics(images, n_threads(self.n_jobs))
        self.n_channels_, self._fitted = n_channels, self._settings()
        return self

    def to_backbone(self) -> Backbone:
        """Return the network for these channels; estimators that get this one do it by themselves.

        Returns
        -------
        Backbone
        """
        self._validate_params()
        base = get_model(self.backbone, self.weights)
        wanted = self._wanted(base)
        if self._made is None or self._made[0] is not base or self._made[1] != wanted:
            network = inflated(base, len(wanted.mean))
            # Kept by the registry, which so does not copy it at every call.
            made = get_model(replace(network, preprocessing=wanted))
            self._made = base, wanted, made
        return self._made[2]

    def _wanted(self, base: Backbone) -> Preprocessing:
        """Return how images are brought to the network."""
        is_fitted = hasattr(self, "n_channels_")
        if is_fitted and (error := change_since_fit(self._fitted, self._settings())):
            raise error
        n_channels = self.n_channels_ if is_fitted else self.n_channels
        if isinstance(n_channels, str):
            raise NotFittedError(
                "n_channels='auto' takes the channels of the images that fit gets: call "
                "ChannelAdapter.fit(X), or pass their number as n_channels."
            )
        own = channel_statistics(base, n_channels)
        learnt = (self.mean_, self.std_) if is_fitted else own
        given = zip(("mean", "std"), (self.mean, self.std), learnt, strict=True)
        mean, std = (_numbers(name, at, value, n_channels) for name, at, value in given)
        return replace(base.preprocessing, mean=mean, std=std, value_range=self.value_range)

    def _settings(self) -> dict[str, Any]:
        """Return the parameters on which the statistics depend."""
        value_range = range_pairs(self.value_range, None)
        return {"n_channels": self.n_channels, "value_range": value_range}

    def __getstate__(self) -> dict[str, Any]:
        state = {name: v for name, v in super().__getstate__().items() if name != "_made"}
        weights = portable_weights(state["weights"])
        return {**state, "weights": weights, "backbone": portable(portable_name(state["backbone"]))}


def _numbers(name: str, given: Any, learnt: Any, n_channels: int) -> Any:
    """Return the given numbers, one for each channel, or those that were learnt."""
    if given is not None and np.shape(given) != (n_channels,):
        raise ValueError(
            f"{name} has shape {np.shape(given)}, and there are {n_channels} channels: pass a "
            "number for each."
        )
    return learnt if given is None else given


def _statistics(images: ImageSequence, n_jobs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel, in which each image counts as one."""

    def moments(i: int) -> np.ndarray:
        pixels = images.load(i).numpy() / 255  # (c, h, w)
        return np.stack([pixels.mean((1, 2)), np.square(pixels).mean((1, 2))])

    with ThreadPoolExecutor(n_jobs) as threads:
        mean, square = np.mean(list(threads.map(moments, range(len(images)))), axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return mean, np.where(std < _CONSTANT, 1, std)
