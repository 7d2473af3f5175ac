"""Pre-training without labels: which two tiles are of one picture."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sktransfer._engine.tiles import TILES
from sktransfer._estimators.base import (
    Interval,
    StrOptions,
    _fit_context,
    atomic,
    refuse_auto_depth,
    takes_dask,
)
from sktransfer._estimators.pretrained import embedding_of
from sktransfer._estimators.trained import TrainedEstimator
from sktransfer._threads import n_threads
from sktransfer._training.pairs import PairSettings, PairTrainer, why_collapsed
from sktransfer._training.trainer import Trainer
from sktransfer.io import ImageSequence
from sktransfer.io._clips import Frames, check_clips, is_clips

__all__ = ["ContrastivePretrainer"]


class ContrastivePretrainer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, TrainedEstimator):
    """Train a network on images without labels, to serve as a backbone.

    Of each picture, two tiles A and B are cut at random and changed. All tiles of a batch go
    through the network and a projection head, which learn to make A and B of one picture similar,
    and all others unlike. What is fitted is a backbone: pass it as `backbone` to other
    estimators of this library.

    Parameters
    ----------
    backbone : str, torch.nn.Module, Backbone or fitted estimator, default="efficientnet_lite0"
        The network to start from; see :class:`PretrainedFeatureExtractor`.
    weights : str, path or None, default="default"
        `"default"` for the best published weights, another published name, a path to a state dict,
        or None: random weights. Only then do the statistics of batch-norms move. A network or an
        estimator has weights of its own, which `"default"` and None leave as they are.
    unfreeze : int, str or list of str, default="all"
        What is trained: `"all"`; a number of blocks from the end, at least 1; a block's name or
        prefix; or a list of them. See :class:`FineTunedClassifier`; its `"auto"` compares scores on
        labels, and there are none here.
    head : tuple of int or torch.nn.Module, default=(512, 128)
        The projection head: sizes of its linear layers, with batch-norm and ReLU between them; or a
        module. It is thrown away afterwards.
    temperature : float, default=0.2
        Of the loss, above 0. The smaller, the more the most similar wrong tiles count.
    pooling : {"avg", "max", "token", "flatten"}, default="avg"
        How the last activations become an embedding, where the network has not pooled them.
    max_epochs : int, default=20
        Each shows every picture once, in two tiles.
    batch_size : int or "auto", default=64
        Pictures of a training step, at least 2, and images that frozen blocks take at once. Each
        tile is compared with two tiles of all pictures of its step: a larger step compares more,
        and takes more memory. `"auto"`: 64 of a step, and as many as suit the device. Batches are
        of about one size.
    lr : float, default=1e-3
        Learning rate of the pretrained layers, for AdamW: that of the last unfrozen block. It rises
        over the first tenth of the steps and falls to zero by a cosine.
    head_lr : float, default=None
        Learning rate of the new layers, which are the projection head; None for `lr`.
    lr_decay : float in (0, 1], default=1.0
        Factor of the learning rate from each unfrozen block to the one in front of it.
    weight_decay : float, default=0.01
        AdamW's; of matrices and kernels, not of biases and norms.
    augment : {"auto", "dihedral"} or callable, default="auto"
        What makes a tile. `"auto"`: a crop of random size, place and proportions, mirrored or not,
        in other brightness and contrast; of colour pictures more so, also in other colours or in
        grey, and blurred or not, if tiles are at least 32 pixels wide. `"dihedral"`: also turned by
        quarters, for images without an upright direction. Or any random callable from uint8 tensors
        (3, height, width), which come at twice the network's image size, to such tensors of any
        size, as transforms of :mod:`torchvision.transforms.v2` are.
    crop_scale : tuple of (float, float), default=(0.2, 1.0)
        Least and greatest share of the picture's area in a crop, above 0 and up to 1. What you
        look for must be likely to be seen in both crops.
    n_views : int, default=None
        Fixed tiles of each picture if there are frozen blocks, at least 2; None for 4. The frozen
        blocks run once on each, and every epoch takes another two of them. With nothing frozen
        every epoch draws new ones.
    callbacks : list of skorch.callbacks.Callback, default=None
        skorch's own or yours; one that raises KeyboardInterrupt ends the training.
    warm_start : bool, default=False
        Whether another call of `fit` goes on with what the last one trained.
    image_shape : tuple of (height, width) or (height, width, channels), default=None
        Shape of an image if `X` has flat rows; None if `X` holds images.
    image_size : int or tuple of (height, width), default=None
        Size in pixels of tiles, and of images for the resulting backbone; None for the size of the
        weights.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep the results of frozen blocks, and embeddings, on disk.
    device : str or torch.device, default="auto"
        `"auto"` takes a CUDA device if there is one, else the CPU.
    precision : {"auto", "float32", "bfloat16"}, default="float32"
        What the network computes in. Trained weights are float32 in any case, and kept activations
        are in half precision. `"auto"` is `"float32"`, but trains in bfloat16 where that is faster;
        see :class:`FineTunedClassifier`.
    runtime : {"auto", "torch", "openvino"}, default="auto"
        What frozen blocks and `transform` run on; see :class:`PretrainedFeatureExtractor`.
    n_jobs : int, default=None
        Threads that read and decode images. None or -1: one a core.
    random_state : int, RandomState instance or None, default=None
        Seed of all that is random, the weights of `weights=None` included. The order of the rows,
        `n_jobs` and `memory` change nothing.
    verbose : int, default=0
        1 shows one progress bar, 2 the plan and skorch's table of epochs as well.

    Attributes
    ----------
    history_ : list of dict
        Of each epoch, among others: `train_loss`; `matching_accuracy`, for which share of the
        pictures of a batch B is the most similar to A of all B (chance is 1 / `batch_size`); and
        `spread`, the variance of the projected tiles, brought to length 1: 0 if all are one.
    n_iter_ : int
        Number of epochs.
    stop_reason_ : str or None
        Why the training stopped early, or should not be used: the representation collapsed.
    net_ : skorch.NeuralNet
        Its `module_` is what lies behind the cut.
    block_names_ : list of str
        All blocks of the network, in order.
    unfrozen_block_names_ : list of str
        The blocks that were trained.
    n_trainable_parameters_ : int
        Number of parameters that were trained, those of the projection head included.
    plan_ : Plan
        What is kept and what recomputed; its text is one line.
    n_features_in_ : int
        Number of columns of `X`, if it has any.
    feature_names_in_ : ndarray of str
        Name of the column, if `X` is a data frame.

    Raises
    ------
    ValueError, TypeError
        In `fit`: for a single image; for clips of fewer than two frames, or of
        different lengths; for an image that can't be read, naming its row, file and reason.
    MemoryError
        In `fit`, for a batch that does not fit into the memory.
    KeyboardInterrupt
        In `fit`, on Ctrl-C. A first fit, `partial_fit`, and one with ``warm_start=True`` keep what
        they learnt until then; another fit leaves the estimator as it was, as an error does.

    Warns
    -----
    ConvergenceWarning
        If all images are the same; or if the representation collapsed: for three epochs in a row,
        or in the last one, all tiles had one and the same row. The training stops;
        `stop_reason_` says the same.

    See Also
    --------
    FineTunedClassifier : Takes the result as its `backbone`, and a few labels.
    PretrainedFeatureExtractor : Takes it, too; `transform` is a short form of it.

    Notes
    -----
    `X` may hold clips instead of images, each a sequence of frames: then A and B are the two halves
    of a clip (the middle one of an odd number of frames is left out), all frames of a half are cut
    and changed alike, and their projections are averaged. All clips have one length.

    Equal images count once: they could not be told apart.

    Pickles hold the trained blocks and the head. The frozen rest is loaded again by its name when
    it is needed, and must be what it was. `sklearn.base.clone` of an estimator that has a fitted
    pre-trainer as its backbone keeps it fitted. As one value of a grid, where scikit-learn clones
    values, pass `to_backbone()`.

    References
    ----------
    Chen, Kornblith, Norouzi and Hinton, "A simple framework for contrastive learning of visual
    representations" (2020), for tiles, projection head and loss. Qian, Meng, Gong, Yang, Wang,
    Belongie and Cui, "Spatiotemporal contrastive video representation learning" (2021), for frames
    that are changed alike.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import ContrastivePretrainer, FineTunedClassifier
    >>> china, flower = load_sample_images().images                  # two arrays (427, 640, 3)
    >>> X = [image[:, i : i + 160] for image in (china, flower) for i in range(0, 640, 160)]
    >>> pretrainer = ContrastivePretrainer(
    ...     unfreeze=1, max_epochs=2, image_size=64, random_state=0
    ... ).fit(X)
    >>> sorted(pretrainer.history_[-1].keys() & {"train_loss", "matching_accuracy", "spread"})
    ['matching_accuracy', 'spread', 'train_loss']
    >>> pretrainer.transform(X).shape
    (8, 1280)
    >>> model = FineTunedClassifier(pretrainer, unfreeze=0).fit(X, ["china"] * 4 + ["flower"] * 4)
    >>> model.predict([flower]).tolist()
    ['flower']
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **TrainedEstimator._parameter_constraints,
        "head": [list, tuple, nn.Module],
        "temperature": [Interval(Real, 0, None, closed="neither")],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 2, None, closed="left")],
        "augment": [StrOptions(set(TILES)), callable],
        "crop_scale": [list, tuple],
        "n_views": [Interval(Integral, 2, None, closed="left"), None],
    }

    _trainer_class = PairTrainer
    _settings_class = PairSettings
    _prefix = "contrastive"
    _kind = "pair"
    stop_reason_: str | None

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: Any = "default",
        unfreeze: Any = "all",
        head: Any = (512, 128),
        temperature: float = 0.2,
        pooling: str = "avg",
        max_epochs: int = 20,
        batch_size: int | str = 64,
        lr: float = 1e-3,
        head_lr: float | None = None,
        lr_decay: float = 1.0,
        weight_decay: float = 1e-2,
        augment: Any = "auto",
        crop_scale: Any = (0.2, 1.0),
        n_views: int | None = None,
        callbacks: Any = None,
        warm_start: bool = False,
        image_shape: Any = None,
        image_size: Any = None,
        memory: Any = None,
        device: Any = "auto",
        precision: str = "float32",
        runtime: str = "auto",
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.unfreeze = unfreeze
        self.head = head
        self.temperature = temperature
        self.pooling = pooling
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.head_lr = head_lr
        self.lr_decay = lr_decay
        self.weight_decay = weight_decay
        self.augment = augment
        self.crop_scale = crop_scale
        self.n_views = n_views
        self.callbacks = callbacks
        self.warm_start = warm_start
        self.image_shape = image_shape
        self.image_size = image_size
        self.memory = memory
        self.device = device
        self.precision = precision
        self.runtime = runtime
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    # ------------------------------------------------------------------------ fitting

    @_fit_context(prefer_skip_nested_validation=True)
    @atomic
    def fit(self, X: Any, y: Any = None) -> Self:
        """Train the unfrozen blocks on unlabelled images or clips.

        Parameters
        ----------
        X : sequence of images, or of clips
            See :class:`sktransfer.PretrainedFeatureExtractor`. Clips are sequences of frames:
            lists of images; or arrays (n_frames, height, width, channels), or one of all of them.
        y : ignored

        Returns
        -------
        self
        """
        return self._fit(X, in_parts=False)

    @_fit_context(prefer_skip_nested_validation=True)
    @atomic
    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Train for one epoch on some of the images, at a constant learning rate.

        Parameters
        ----------
        X : sequence of images, or of clips
            At least two different ones: they are told apart from each other.
        y : ignored

        Returns
        -------
        self
        """
        return self._fit(X, in_parts=True)

    def _fit(self, X: Any, *, in_parts: bool) -> Self:
        goes_on = (in_parts or self.warm_start) and hasattr(self, "_trainer")
        images, n_frames = self._check_images(X, reset=not goes_on), 1
        if isinstance(images, Frames):
            images, n_frames = images.halves()
        images, n_items = self._distinct(images, n_frames)
        self._check_crop_scale()
        refuse_auto_depth(self.unfreeze, f"{type(self).__name__} has no labels")
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        if goes_on:
            trainer = self._resume(in_parts=in_parts)
        else:
            self._keep_shape(seed)
            trainer = self._new_trainer(n_outputs=0)
            self._check_depth(trainer)
        digests = images.digests(n_threads(self.n_jobs))
        are_same = digests[:n_frames] == digests[n_frames : 2 * n_frames]
        if are_same:
            trainer.settings.max_epochs = min(1, self.max_epochs)
        numbers = np.arange(n_items)
        self._train(trainer, images, numbers, None, seed, in_parts=in_parts, goes_on=goes_on)
        if are_same:
            self.stop_reason_ = (
                "All images are the same, so that none can be told from another: look at them."
            )
        if self.stop_reason_ is not None:
            warnings.warn(self.stop_reason_, ConvergenceWarning, stacklevel=5)
        return self

    def _set_fitted(self, trainer: Trainer) -> None:
        super()._set_fitted(trainer)
        self.stop_reason_ = why_collapsed(self.history_)

    def _check_images(self, X: Any, *, reset: bool) -> ImageSequence:
        if self.image_shape is None and is_clips(X):
            if not self._channels(reset).are_rgb:
                raise ValueError(
                    "Clips are read as RGB, and the backbone takes other images: pass single "
                    "images as X, or a backbone for RGB."
                )
            return check_clips(X)
        return super()._check_images(X, reset=reset)

    def _distinct(self, images: ImageSequence, n_frames: int) -> tuple[ImageSequence, int]:
        """Return different pictures or clips in an order of their own, and how many they are.

        A fit then does not depend on the order of the rows.
        """
        digests = images.digests(n_threads(self.n_jobs))
        first: dict[bytes, int] = {}
        for start in range(0, len(images), n_frames):
            first.setdefault(b"".join(digests[start : start + n_frames]), start)
        if len(images) == n_frames:
            raise ValueError(
                f"{type(self).__name__} learns to tell images apart, so it needs at least 2 "
                "different ones; got 1 sample."
            )
        starts = np.array([first[key] for key in sorted(first)])
        if len(starts) == 1:  # nothing can be learnt, which is said then
            starts = np.array([0, n_frames])
        return images[(starts[:, None] + np.arange(n_frames)).ravel()], len(starts)

    def _check_crop_scale(self) -> None:
        scale = tuple(self.crop_scale)
        are_numbers = all(isinstance(share, Real) for share in scale)
        if len(scale) != 2 or not are_numbers or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale!r}: pass the least and the greatest share of the "
                "picture's area in a crop, as (0.2, 1.0); above 0 and up to 1."
            )

    def _check_depth(self, trainer: Any) -> None:
        if not trainer.unfrozen.blocks:
            raise ValueError(
                f"unfreeze={self.unfreeze!r} leaves all blocks frozen: only the projection head "
                "would be trained, which is thrown away. Pass at least 1."
            )

    def _settings(self, n_outputs: int) -> PairSettings:
        settings = super()._settings(n_outputs)
        assert isinstance(settings, PairSettings)
        low, high = settings.crop_scale
        settings.crop_scale = (float(low), float(high))  # alike in the memory's keys
        return settings

    # ------------------------------------------------------------------------ embeddings

    @takes_dask(lambda self: np.empty((0, self._n_features_out), np.float32))
    def transform(self, X: Any) -> np.ndarray:
        """Compute the embeddings of images by the trained network.

        Parameters
        ----------
        X : sequence of images or clips, or dask collection of images
            As in `fit`. Clips may be of any length.

        Returns
        -------
        ndarray of shape (n, n_features_out), float32
            Those of :class:`PretrainedFeatureExtractor` with this backbone. Of a clip, the mean
            over its frames.
        """
        check_is_fitted(self, "plan_")
        self._validate_params()
        images = self._check_images(X, reset=False)
        rows = embedding_of(self.to_feature_extractor())(images)
        return images.means(rows) if isinstance(images, Frames) else rows

    @property
    def _n_features_out(self) -> int:
        return self.trainer().frozen.width

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags
