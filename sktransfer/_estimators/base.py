"""What all estimators on images share: their input, their tags, their network."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, _fit_context
from sklearn.utils import Tags
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions, validate_params
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import _check_sample_weight as check_sample_weight
from sklearn.utils.validation import _check_y as check_y
from sklearn.utils.validation import _is_fitted as is_fitted
from sklearn.utils.validation import validate_data
from torch import nn
from torch.export import ExportedProgram
from torchvision.models import WeightsEnum

from sktransfer._engine.cut_network import POOLINGS
from sktransfer._engine.device import INT8, PRECISIONS
from sktransfer._engine.runner import Runner, get_runner
from sktransfer._engine.runtime import RUNTIMES
from sktransfer._training.interrupt import Interrupted
from sktransfer._training.summary import blocks_html
from sktransfer.io import ImageSequence, check_images
from sktransfer.models._modules import portable
from sktransfer.models._registry import (
    Backbone,
    channels_of,
    loaded_model,
    portable_name,
    seeded_model,
)
from sktransfer.models._state_files import portable_weights
from sktransfer.transforms import Channels, Preprocessing

__all__ = [
    "HasMethods",
    "ImageEstimator",
    "Interval",
    "StrOptions",
    "_fit_context",
    "atomic",
    "check_sample_weight",
    "check_y",
    "takes_dask",
    "validate_params",
]


def is_dask(X: Any) -> bool:
    """Return whether `X` is a dask collection; nobody has one before dask is imported."""
    dask = sys.modules.get("dask")
    return dask is not None and dask.is_dask_collection(X)


def takes_dask(empty: Callable[[Any], np.ndarray]) -> Callable[[Callable], Callable]:
    """Let a method of images take a dask collection as well, and return a lazy dask array then.

    It decorates a method ``method(self, X)`` of an :class:`ImageEstimator` that returns an array
    with an entry for each image.

    Parameters
    ----------
    empty : callable
        ``empty(estimator)`` is what the method returns for no images, of shape (0,) or (0, width).
        It says the dtype and the width of a result that is not computed yet.

    Returns
    -------
    callable
        The decorator. Of images that are no dask collection, the method returns what it did.

    See Also
    --------
    ImageEstimator : The base class of estimators on images.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> from sktransfer import PretrainedFeatureExtractor
    >>> from sktransfer.base import takes_dask
    >>> class Extractor(PretrainedFeatureExtractor):
    ...     @takes_dask(lambda self: np.empty(0, np.float32))
    ...     def norms(self, X):
    ...         return np.linalg.norm(self.transform(X), axis=1)
    >>> images = da.zeros((3, 32, 32, 3), dtype=np.uint8, chunks=(2, -1, -1, -1))
    >>> norms = Extractor(image_size=32).norms(images)  # lazy
    >>> norms.chunks, norms.dtype
    (((2, 1),), dtype('float32'))
    >>> norms.compute().shape
    (3,)
    """

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(self: Any, X: Any) -> Any:
            if not is_dask(X):
                return method(self._snapshot(), X)
            from sktransfer._estimators.dask_collections import on_partitions

            name = method.__name__
            if name == "transform" and _get_output_config(name, self)["dense"] != "default":
                raise ValueError(
                    "Of a dask collection, transform returns a dask array alone: call "
                    "set_output(transform='default'), and make a data frame of the array by "
                    "dask.dataframe.from_dask_array(rows, columns=get_feature_names_out())."
                )
            return on_partitions(self, name, X, empty)

        return call

    return decorate


def atomic(fit: Callable) -> Callable:
    """Let a `fit` or `partial_fit` change its estimator only at its end.

    It learns into a twin of the estimator, whose attributes are taken over in one step. If it
    fails, the estimator is what it was. If it raises `Interrupted`, what it learnt until then is
    taken over, and the caller gets a plain KeyboardInterrupt with the same message.
    """

    @functools.wraps(fit)
    def fit_twin(self: Any, *args: Any, **kwargs: Any) -> Any:
        twin = twin_of(self)
        try:
            fit(twin, *args, **kwargs)
        except Interrupted as stopped:
            _adopt_what_was_learnt(self, twin)
            raise KeyboardInterrupt(str(stopped)) from None
        _adopt_what_was_learnt(self, twin)
        return self

    return fit_twin


def twin_of(estimator: Any) -> Any:
    """Return another estimator with the same attributes, which can get others."""
    twin = object.__new__(type(estimator))
    vars(twin).update(vars(estimator))
    return twin


def interrupted_refit() -> KeyboardInterrupt:
    """Return what Ctrl-C raises in a fit that leaves its estimator as an earlier one did."""
    return KeyboardInterrupt(
        "fit was interrupted. This estimator had been fitted before, and it is as that fit left it."
    )


def interrupted_fit(n_done: int, n_epochs: int) -> Interrupted:
    """Return what Ctrl-C raises in a fit that keeps what it learnt until then."""
    return Interrupted(
        f"fit was interrupted after {n_done} of {n_epochs} epochs. What was learnt until then is "
        "kept; with warm_start=True, fit goes on from there."
    )


def change_since_fit(fitted: Mapping[str, Any], values: Mapping[str, Any]) -> ValueError | None:
    """Return the error of the first value that is another than in the first fit, None if none is.

    Names that only one of both has are no change.
    """
    for name, value in values.items():
        before = fitted.get(name, value)
        if value is not before and bool(value != before):
            return ValueError(
                f"{name} has changed from {before!r} to {value!r} since the first fit, with which "
                "warm_start and partial_fit go on. Set it back, or fit a new estimator, as "
                "sklearn.base.clone makes it."
            )
    return None


def check_fingerprint(loaded: str, fitted: str, named: Mapping[str, Any]) -> None:
    """Raise an error if the weights that parameters name are not those of the fit."""
    if loaded == fitted:
        return
    parameters = ", ".join(f"{name}={value!r}" for name, value in named.items())
    raise ValueError(
        f"The weights that {parameters} name are not those on which this estimator was fitted "
        f"(fingerprint {loaded[:8]}, then {fitted[:8]}), and its trained layers do not fit to "
        "others. Pass the old weights by set_params(weights='path/to/file.pth'), or fit it again."
    )


def refuse_auto_depth(unfreeze: Any, reason: str) -> None:
    """Raise an error for a depth that can't be searched for."""
    if unfreeze == "auto":
        raise ValueError(
            f"unfreeze='auto' compares depths by scores on labels of images, and {reason}: pass a "
            "number of blocks, a name or 'all'."
        )


def _adopt_what_was_learnt(estimator: Any, twin: Any) -> None:
    """Give an estimator all attributes of its twin but the parameters, in one assignment."""
    parameters = estimator.get_params(deep=False)
    given = {name: value for name, value in vars(estimator).items() if name in parameters}
    learnt = {name: value for name, value in vars(twin).items() if name not in parameters}
    estimator.__dict__ = {**given, **learnt}


_only_looks: ContextVar[bool] = ContextVar("_only_looks", default=False)


@contextmanager
def _only_looking() -> Iterator[None]:
    """Let estimators use only what is loaded already: nothing is downloaded to print them."""
    token = _only_looks.set(True)
    try:
        yield
    finally:
        _only_looks.reset(token)


class _NotLoadedError(AttributeError):
    """What scikit-learn takes, while it prints an estimator, for an attribute that is not there."""


class _AttributesAndBlocks:
    """What scikit-learn's diagram shows of a fitted estimator, and its blocks below."""

    def __init__(self, attributes: Any, blocks: str) -> None:
        self.attributes, self.blocks = attributes, blocks

    def __len__(self) -> int:
        return len(self.attributes) + bool(self.blocks)

    def _repr_html_inner(self) -> str:
        return (self.attributes._repr_html_inner() if self.attributes else "") + self.blocks


class ImageEstimator(BaseEstimator):
    """Base of the estimators whose `X` is a sequence of images.

    It knows how to validate such an `X` and how to get the backbone that its parameters name.
    A subclass has `backbone`, `weights`, `image_shape`, `image_size`, `device`, `precision` and
    `runtime` as parameters, or as attributes of the class; their meaning is that of
    :class:`sktransfer.PretrainedFeatureExtractor`. What takes dask collections has `n_jobs`, too.

    See Also
    --------
    takes_dask : Let a method take dask collections as well.
    sktransfer.io.ImageSequence : What `check_images` returns.

    Examples
    --------
    The mean colour of what a network gets to see of each image:

    >>> import numpy as np
    >>> import torch
    >>> from sklearn.base import TransformerMixin
    >>> from sktransfer.base import ImageEstimator
    >>> class MeanColour(TransformerMixin, ImageEstimator):
    ...     weights, image_shape, image_size = "default", None, None
    ...     device, precision, runtime = "cpu", "float32", "torch"
    ...
    ...     def __init__(self, backbone="efficientnet_lite0"):
    ...         self.backbone = backbone
    ...
    ...     def fit(self, X, y=None):
    ...         return self
    ...
    ...     def transform(self, X):
    ...         images = self.check_images(X)
    ...         _, preprocessing = self.load_network()
    ...         seen = [preprocessing.fit_size(images.load(i)) for i in range(len(images))]
    ...         return torch.stack(seen).double().mean((2, 3)).numpy()  # (n, 3)
    >>> MeanColour().fit_transform([np.full((30, 40, 3), 0.2), np.full((50, 50), 1.0)])
    array([[ 51.,  51.,  51.],
           [255., 255., 255.]])
    """

    # Think twice before adding to it: what only some estimators need belongs to them.

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        # That of torch.export is refused by `get_model`, which says what to pass.
        "backbone": [str, nn.Module, Backbone, HasMethods(["to_backbone"]), ExportedProgram],
        "weights": [str, os.PathLike, WeightsEnum, None],
        "pooling": [StrOptions(set(POOLINGS))],
        "image_shape": [tuple, list, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), tuple, list, None],
        "memory": [str, os.PathLike, HasMethods(["cache"]), None],
        "device": [str, torch.device],
        "precision": [StrOptions({*PRECISIONS, INT8})],
        "runtime": [StrOptions(set(RUNTIMES))],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "n_jobs": [Integral, None],
        "verbose": ["verbose"],
    }

    backbone: Any
    weights: Any
    image_shape: Any
    image_size: Any
    device: Any
    precision: str
    runtime: str
    _weights_seed = 0  # of random weights, for weights=None; a fit that draws takes another

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
        if is_dask(X):
            raise TypeError(
                "fit takes images or their paths, got a dask collection: pass X.compute(), or a "
                "part of it. To spread a search over a cluster, call its fit under "
                "joblib.parallel_config('dask'); to embed or predict, a dask collection can go to "
                "transform or predict."
            )
        if self.image_shape is not None:
            X = validate_data(self, X, reset=reset, dtype="numeric")
            shape = tuple(self.image_shape)
            return check_images(X, image_shape=shape, channels=self._channels(reset))
        # Without fit, there are no names of columns to compare with.
        if reset or hasattr(self, "n_features_in_") or hasattr(self, "feature_names_in_"):
            validate_data(self, X, reset=reset, skip_check_array=True, ensure_2d=False)
        return check_images(X, channels=self._channels(reset))

    def _channels(self, reset: bool) -> Channels:
        """Return what the pixels are that the network takes: the one that is fitted, if one is."""
        fitted = None if reset else getattr(self, "_network", None)
        if fitted is not None:
            return fitted.preprocessing.channels
        return channels_of(self.backbone, self._backbone)

    def __getstate__(self) -> dict[str, Any]:
        # The copy may be opened in another folder; the parameters stay as they were given.
        state = super().__getstate__()
        if "weights" in state:
            state = {**state, "weights": portable_weights(state["weights"])}
        return {**state, "backbone": portable(portable_name(state["backbone"]))}

    def __sklearn_clone__(self) -> Self:
        cloned = super().__sklearn_clone__()
        # scikit-learn clones what is a parameter of a parameter, too: a fitted estimator would lose
        # the weights for which it is the backbone.
        if hasattr(self.backbone, "to_backbone") and is_fitted(self.backbone):
            cloned.backbone = self.backbone
        return cloned

    def check_images(self, X: Any) -> ImageSequence:
        """Check images as a prediction takes them.

        Parameters
        ----------
        X : sequence of images
            As in :func:`sktransfer.io.check_images`; flat rows if `image_shape` is set.

        Returns
        -------
        ImageSequence
            The images, which are decoded when they are asked for.

        Raises
        ------
        TypeError, ValueError
            If `X` is no sequence of images, or has other columns than in `fit`.
        """
        return self._check_images(X, reset=False)

    def _snapshot(self) -> Self:
        """Return what a prediction uses to its end; a fit in another thread may end meanwhile."""
        return self

    def prepare(self) -> None:
        """Load all that a prediction needs, before several threads ask for it at once."""
        self._prepare()

    def _prepare(self) -> None:
        self.load_network()[0].can_be_cut  # noqa: B018 traces the network

    # scikit-learn calls the next two for notebooks, if it is recent enough to show attributes.

    def _html_repr(self) -> str:
        with _only_looking():
            return super()._html_repr()

    def _get_fitted_attr_html(self, *args: Any, **kwargs: Any) -> _AttributesAndBlocks:
        with _only_looking():  # it reads all properties, of estimators inside others as well
            attributes = super()._get_fitted_attr_html(*args, **kwargs)
            return _AttributesAndBlocks(attributes, blocks_html(self))

    def _backbone(self) -> Backbone:
        """Return the network that the parameters name."""
        if not _only_looks.get():
            return seeded_model(self.backbone, self.weights, self._weights_seed)
        loaded = loaded_model(self.backbone, self.weights, self._weights_seed)
        if loaded is None:
            raise _NotLoadedError(f"{self.backbone!r} is not loaded.")
        return loaded

    @property
    def _is_from_scratch(self) -> bool:
        """Whether the parameters name random weights; what is no name has weights of its own."""
        return self.weights is None and isinstance(self.backbone, str)

    def load_network(self) -> tuple[Runner, Preprocessing]:
        """Load the network that the parameters name, if it is not loaded yet.

        Returns
        -------
        runner : object
            The network on its device: `block_names` lists its blocks, and `backbone` is the
            :class:`sktransfer.models.Backbone`.
        preprocessing : Preprocessing
            What the network wants images to be.
        """
        return self._placed(self._backbone(), self.image_size)

    def _placed(self, backbone: Backbone, image_size: Any) -> tuple[Runner, Preprocessing]:
        """Return a network on the device and the runtime that the parameters name."""
        preprocessing = backbone.preprocessing.with_size(image_size)
        options = {"image_size": preprocessing.size}
        precision = "float32" if self.precision == "auto" else self.precision  # but for training
        runner = get_runner(backbone, self.device, precision, self.runtime, **options)
        return runner, preprocessing


class KeepsTrainer(ImageEstimator):
    """Base of the estimators that keep what they trained as a trainer.

    It is rebuilt where the parameters now want it: after unpickling, and on another device.
    """

    _trainer: Any
    _place: tuple[Any, ...] | None  # where the trainer computes
    _network: Backbone | None  # on which it was fitted
    _named: dict[str, Any] | None  # the parameters that are known to name the pretrained weights
    _fingerprint: str  # of these weights
    _shape: dict[str, Any]  # the parameters that say what is fitted

    def trainer(self) -> Any:
        """Return what was trained, where the parameters want it."""
        raise NotImplementedError

    def _wanted_place(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def _named_fingerprint(self) -> str:
        """Return the fingerprint of the pretrained weights that the parameters now name."""
        raise NotImplementedError

    def _check_shape(self) -> None:
        """Raise an error if the parameters name something else than what is fitted."""
        parameters = self.get_params(deep=False)
        if error := change_since_fit(self._shape, parameters):
            raise error
        named = self._named or {}  # unpickled: the weights are compared where they are loaded
        error = change_since_fit(named, parameters)
        if error and self._named_fingerprint() != self._fingerprint:
            raise error

    def _rebuilt(self) -> Any:
        """Return a new trainer with the trained values."""
        raise NotImplementedError

    def _trainer_in_place(self) -> Any:
        # Of one fit: that of another thread may end meanwhile.
        fitted: dict[str, Any] = self.__dict__
        place = self._wanted_place()
        if fitted["_trainer"] is None or fitted["_place"] != place:
            self._validate_params()
            twin = twin_of(self)
            trainer = twin._rebuilt()
            fitted |= {"_trainer": trainer, "_place": place}
            fitted |= {"_network": twin._network, "_named": twin._named}
            fitted.pop("net_", None)  # of layers that are no longer these
        return fitted["_trainer"]

    def _snapshot(self) -> Self:
        self.trainer()  # rebuilt here if it must be, so that the next call finds it
        return twin_of(self)

    def _prepare(self) -> None:
        self.trainer()
