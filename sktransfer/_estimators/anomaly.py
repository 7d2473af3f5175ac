"""Anomalies in images, found by patches that no sound image has."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from sktransfer._engine.device import PRECISIONS
from sktransfer._engine.frozen import Activations
from sktransfer._engine.patch_bank import (
    choose_bank,
    distances_to,
    normality,
    one_map,
    over_pixels,
    usual,
)
from sktransfer._engine.patches import PatchFeatures
from sktransfer._estimators.base import (
    ImageEstimator,
    Interval,
    StrOptions,
    _fit_context,
    atomic,
    check_fingerprint,
    takes_dask,
    twin_of,
)
from sktransfer._memory.memory import check_memory
from sktransfer._threads import n_threads
from sktransfer._training.data import allocate
from sktransfer._training.net import Progress
from sktransfer._training.phases import saying_what_is_kept
from sktransfer.io import ImageSequence
from sktransfer.models import Backbone

__all__ = ["PatchAnomalyDetector"]

_CHUNK = 32  # images whose patches are compared at once
_SHAPE = ("layer", "image_size")  # what a fit sets for all that follows


class PatchAnomalyDetector(OutlierMixin, ImageEstimator):
    """Find images, and places in them, that look like nothing in a set of sound images.

    It learns from sound images alone. A pretrained network is cut in its middle; what some of its
    blocks have there at each place of an image describes patches. `fit` keeps, for each block, a
    choice of the patches of all images, the bank. The distance of a patch to the bank says how
    strange its place is, and the strangest place how strange the image is.

    Parameters
    ----------
    backbone : str, torch.nn.Module, Backbone or fitted estimator, default="efficientnet_lite0"
        A network with blocks; see :class:`PretrainedFeatureExtractor`.
    weights : str, path or None, default="default"
        `"default"` for the best published weights, another published name, a path to a state
        dict, or None for random ones.
    layer : int, str or list of these, default="middle"
        Blocks whose outputs describe a patch, as `layer` of :class:`PretrainedFeatureExtractor`;
        they must have places in the image: be maps, or tokens of patches. Each has a bank of its
        own; see Notes. `"middle"` stands for those of `"stages"` with at
        least 4 × 4 pixels to a place, but for the last one. What `"stages"` and `"all"` stand for
        is taken without vectors.
    coreset : float in (0, 1] or int, default=0.1
        The size of the bank of each block: a share of all patches, but 1,000 at most; or their
        number. They are chosen one by one, each the farthest from those before, among 50,000
        patches that are drawn at random if there are more.
    contamination : float in (0, 0.5], default=0.05
        Share of the images of the training that are beyond the threshold. As each of them is
        compared with the others alone, about this share of new images like them is as well.
    image_shape : tuple of (height, width) or (height, width, channels), default=None
        Shape of an image if `X` has flat rows; None if `X` holds images.
    image_size : int or tuple of (height, width), default=None
        Size in pixels at which images enter the network; None for the size of its weights. Small
        defects want more.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep the activations of every image on disk, in half precision: those that
        :class:`FineTunedClassifier` keeps at the same cuts. See Notes.
    device : str or torch.device, default="auto"
        `"auto"` takes a CUDA device if there is one, else the CPU. Neighbours are looked for on
        the CPU.
    precision : {"float32", "bfloat16", "float16"}, default="float32"
        What the network computes in; see :class:`PretrainedFeatureExtractor`. Predict in the
        precision of the fit: others give other patches.
    runtime : {"auto", "torch", "openvino"}, default="auto"
        What computes; see :class:`PretrainedFeatureExtractor`.
    batch_size : int or "auto", default="auto"
        Images in flight at once and, on a GPU, in one batch.
    n_jobs : int or None, default=None
        Threads that read and decode images and, with OpenVINO, run the network. None or -1: one a
        core and two spare ones, or what joblib leaves to a worker process.
    random_state : int, RandomState instance or None, default=None
        For the choice of patches.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    bank_ : list of ndarray of shape (n_patches, n_features), float32
        The patches that new ones are compared with, for each block.
    usual_distances_ : ndarray of shape (n_blocks,)
        The mean distance of the patches of the training to the bank, for each block.
    offset_ : float
        The score below which an image is an anomaly.
    block_names_ : list of str
        Names of the network's blocks, in order.
    n_features_in_ : int
        Number of columns of `X`, if it has any.
    feature_names_in_ : ndarray of str
        Name of the column, if `X` is a data frame.

    Raises
    ------
    ValueError, TypeError
        In `fit`, for a single image, and for a layer without places; for an image that can't be
        read, or for which the network returns NaN: the message names row, file and reason.

    See Also
    --------
    PretrainedFeatureExtractor : In front of a scaler and a novelty detector of scikit-learn. On
        polycrystalline solar cells this was slightly better (`benchmarks/anomaly.py`).
    sktransfer.inspection.AnomalyMapDisplay : Shows where images are strange.

    Notes
    -----
    An early block sees thin lines, a later one larger things. So the patches of each block are
    compared by themselves, on the grid of this block, but for none finer than a place for 8 × 8
    pixels. Blocks differ in how far apart their patches are: so distances are divided by the usual
    one of sound patches. Then the maps of the blocks are scaled up to the finest grid, and
    averaged: a distance of 2 is twice the usual one.

    An image of the training, which is known by its content, is compared with the patches of the
    others, in `fit` and in all predictions. Its own would make it look more normal than a new one.

    A pickle holds the bank, 4 bytes for each feature of each patch: at most 1 MB with the defaults,
    and 16 bytes for each image of the training. The network is loaded again by name, and checked.

    In `fit`, the activations of all images lie in memory or, where a block's take more than 512
    MiB, in a temporary file. An image of 224 × 224 pixels takes 258 KB with the defaults, also in
    the `memory`.

    References
    ----------
    Roth, Pemula, Zepeda, Schölkopf, Brox and Gehler, "Towards total recall in industrial anomaly
    detection" (2022).

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import PatchAnomalyDetector
    >>> china = load_sample_images().images[0]                   # an array (427, 640, 3)
    >>> tiles = [china[0:96, left : left + 96] for left in range(0, 540, 20)]
    >>> detector = PatchAnomalyDetector(image_size=96, random_state=0).fit(tiles)
    >>> scratched = tiles[3].copy()
    >>> scratched[40:44, 20:80] = 255
    >>> detector.predict([scratched]).tolist()
    [-1]
    >>> detector.anomaly_map([scratched]).shape
    (1, 96, 96)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **{
            name: constraint
            for name, constraint in ImageEstimator._parameter_constraints.items()
            if name != "pooling"
        },
        "layer": [Integral, str, list, tuple],
        "coreset": [
            Interval(Integral, 1, None, closed="left"),
            Interval(Real, 0, 1, closed="right"),
        ],
        "contamination": [Interval(Real, 0, 0.5, closed="right")],
        "precision": [StrOptions(set(PRECISIONS))],
        "random_state": ["random_state"],
    }

    # A fit sets the following; a pickle leaves the network out.
    _network: Backbone | None
    _fingerprint: str
    _shape: dict[str, Any]

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: Any = "default",
        layer: Any = "middle",
        coreset: float | int = 0.1,
        contamination: float = 0.05,
        image_shape: Any = None,
        image_size: Any = None,
        memory: Any = None,
        device: Any = "auto",
        precision: str = "float32",
        runtime: str = "auto",
        batch_size: int | str = "auto",
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.coreset = coreset
        self.contamination = contamination
        self.image_shape = image_shape
        self.image_size = image_size
        self.memory = memory
        self.device = device
        self.precision = precision
        self.runtime = runtime
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    # ------------------------------------------------------------------------ fitting

    @_fit_context(prefer_skip_nested_validation=True)
    @atomic
    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn what the patches of sound images look like.

        Parameters
        ----------
        X : sequence of images
            Sound ones, at least two different ones. See
            :class:`sktransfer.PretrainedFeatureExtractor`.
        y : ignored

        Returns
        -------
        self
        """
        images = self._check_images(X, reset=True)
        digests = images.digests(n_threads(self.n_jobs))
        self._check_different(digests)
        self._digests = np.array([np.frombuffer(d, np.uint8) for d in dict.fromkeys(digests)])
        self._network, self._shape = self._backbone(), {n: getattr(self, n) for n in _SHAPE}
        self._fingerprint = self._network.fingerprint
        features, progress = self.features(), Progress()
        progress.n_shown = len(images)
        with progress.shown(3 * len(images), self.verbose):  # for each of the three steps
            stored = self._stored(features, images, progress)
            self._choose_bank(features, stored, digests, progress)
            progress.stage("scores")
            of_chunks = []
            for chunk in _chunks(len(images)):
                patches = features([x[chunk] for x in stored])
                of_chunks.append(self._distances(patches, digests[chunk]))
                progress.update(len(patches[0]))
        distances = [np.concatenate(of_block) for of_block in zip(*of_chunks, strict=True)]
        self.usual_distances_ = np.array([usual(of_block) for of_block in distances])
        scores = normality(one_map(distances, features.grids, self.usual_distances_))
        self.offset_ = float(np.percentile(scores, 100 * self.contamination))
        self.block_names_ = features.frozen.runner.block_names
        return self

    def _check_different(self, digests: list[bytes]) -> None:
        name = type(self).__name__
        if len(digests) == 1:
            raise ValueError(
                f"{name} compares each image with the others, so it needs at least 2, and a few "
                "dozen to know what is normal; got 1 sample."
            )
        if len(set(digests)) == 1:
            warnings.warn(
                f"All {len(digests)} images are the same, so {name} can't know how much sound "
                "images differ, and calls any other one an anomaly: look at them.",
                UserWarning,
                stacklevel=5,
            )

    def _stored(
        self, features: PatchFeatures, images: ImageSequence, progress: Progress
    ) -> list[np.ndarray]:
        """Run images; return what each block has, in half precision, in memory or on disk."""
        forms = features.forms(len(images))
        outs = [out for out in (allocate(*form) for form in forms) if out is not None]
        if len(outs) < len(forms):
            raise ValueError(
                f"The activations of {len(images)} images fit neither into memory nor into the "
                "folder for temporary files: pass fewer images, a smaller image_size or a later "
                "layer."
            )
        stream = self._stream(features, progress)
        with saying_what_is_kept(stream, len(images)):
            return stream(features.views(images), outs)

    def _choose_bank(
        self,
        features: PatchFeatures,
        stored: list[np.ndarray],
        digests: list[bytes],
        progress: Progress,
    ) -> None:
        progress.stage("bank")
        chance = check_random_state(self.random_state)
        numbers, n_blocks = self._numbers(digests), len(stored)

        def tell(n_images: float) -> None:
            progress.update(n_images / n_blocks)

        chosen = [
            choose_bank(features, i, of_block, numbers, self.coreset, chance, tell)
            for i, of_block in enumerate(stored)
        ]
        self.bank_, self._owners = [bank for bank, _ in chosen], [owners for _, owners in chosen]

    # ------------------------------------------------------------------------ patches

    def features(self) -> PatchFeatures:
        """Return what makes patches of activations, as the fit had it; for the displays."""
        network = self._fitted_network()
        return PatchFeatures(
            *self._placed(network, self._shape["image_size"]), self._shape["layer"]
        )

    def _fitted_network(self) -> Backbone:
        """Return the network of the fit; after unpickling, the one that the parameters name."""
        if self._network is None:
            network = self._backbone()
            named = {"backbone": self.backbone, "weights": self.weights}
            check_fingerprint(network.fingerprint, self._fingerprint, named)
            self._network = network
        return self._network

    def _stream(self, features: PatchFeatures, progress: Progress) -> Activations:
        progress.stage(features.frozen.runner.name)
        return features.stream(
            memory=check_memory(self.memory),
            batch_size=self.batch_size,
            n_jobs=self.n_jobs,
            progress=progress,
        )

    def _numbers(self, digests: list[bytes]) -> np.ndarray:
        """Return which image of the training each is, -1 for a new one."""
        known = {digest.tobytes(): number for number, digest in enumerate(self._digests)}
        return np.array([known.get(digest, -1) for digest in digests])

    def _distances(self, patches: list[np.ndarray], digests: list[bytes]) -> list[np.ndarray]:
        """Return the distances (n, n_patches) to the bank, in each block."""
        numbers = self._numbers(digests)
        banks = zip(self.bank_, self._owners, patches, strict=True)
        return [distances_to(*bank, numbers) for bank in banks]

    def _maps(self, X: Any) -> tuple[np.ndarray, PatchFeatures]:
        """Return the distances of the patches of images (n, rows, columns)."""
        check_is_fitted(self, "offset_")
        self._validate_params()
        images, progress = self._check_images(X, reset=False), Progress()
        features = self.features()
        maps = np.empty((len(images), *features.grid), np.float32)
        with progress.shown(len(images), self.verbose):
            stream = self._stream(features, progress)
            stream.n_expected = len(images)
            for rows in _chunks(len(images)):
                chunk = images[rows]
                digests = chunk.digests(n_threads(self.n_jobs))
                patches = features(stream(features.views(chunk)))
                distances = self._distances(patches, digests)
                maps[rows] = one_map(distances, features.grids, self.usual_distances_)
        return maps, features

    # ------------------------------------------------------------------------ what it finds

    @takes_dask(lambda self: np.empty(0))
    def score_samples(self, X: Any) -> np.ndarray:
        """Return how normal images are: the higher, the more.

        Parameters
        ----------
        X : sequence of images
            Of any sizes.

        Returns
        -------
        ndarray of shape (n,)
            Minus the distance of the strangest place, of which 1 is the usual one. An image of the
            training is compared with the patches of the others.
        """
        return normality(self._maps(X)[0])

    @takes_dask(lambda self: np.empty(0))
    def decision_function(self, X: Any) -> np.ndarray:
        """Return `score_samples` minus `offset_`: what is negative is an anomaly.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n,)
        """
        return self.score_samples(X) - self.offset_

    @takes_dask(lambda self: np.empty(0, int))
    def predict(self, X: Any) -> np.ndarray:
        """Tell sound images from anomalies.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n,), int
            1 for a sound image, -1 for an anomaly.
        """
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def anomaly_map(self, X: Any) -> np.ndarray:
        """Return how strange each place of images is.

        Parameters
        ----------
        X : sequence of images

        Returns
        -------
        ndarray of shape (n, height, width), float32
            A value for each pixel that the network saw: of the image after resizing and cropping
            to `image_size`. Distances of patches to the bank, of which 1 is the usual one,
            interpolated and smoothed.
        """
        maps, features = self._snapshot()._maps(X)
        return over_pixels(maps, features.preprocessing.size)

    # ------------------------------------------------------------------------ state

    def _snapshot(self) -> Self:
        check_is_fitted(self, "offset_")
        self._fitted_network()
        return twin_of(self)

    def _prepare(self) -> None:
        self.features()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # the network is loaded again, and checked
        return {**state, "_network": None} if "_network" in state else state


def _chunks(n: int) -> list[slice]:
    return [slice(start, min(n, start + _CHUNK)) for start in range(0, n, _CHUNK)]
