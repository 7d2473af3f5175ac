"""Estimators on pretrained networks that are used as they are."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin, _fit_context
from sklearn.utils import Tags

from sktransfer._engine.augmentation import Augmentation
from sktransfer._engine.cut_network import POOLINGS
from sktransfer._engine.embedding import Embedding, MeanEmbedding, Rows
from sktransfer._engine.layers import poolings_of, power_normalize, row_names, rows_of
from sktransfer._estimators.base import (
    ImageEstimator,
    Interval,
    StrOptions,
    atomic,
    takes_dask,
)
from sktransfer._memory.memory import check_memory

__all__ = ["PretrainedFeatureExtractor"]


class PretrainedFeatureExtractor(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ImageEstimator):
    """Turn images into embeddings by a pretrained network.

    The network is cut behind a block; what comes out there is pooled to one row an image. Nothing
    is learnt from `X`, so `transform` works without `fit`.

    Parameters
    ----------
    backbone : str, torch.nn.Module, Backbone or fitted estimator, default="efficientnet_lite0"
        A name of :func:`sktransfer.models.list_models`: torchvision's (`"resnet50"`), timm's
        (`"timm/vit_small_patch14_dinov2.lvd142m"`), or an embedded one that needs no download;
        `"hf:owner/name"` on the hub, or a folder, see :func:`sktransfer.models.get_model`;
        a network; or a fitted estimator that trained one, such as
        :class:`ContrastivePretrainer`.
    weights : str, path or None, default="default"
        `"default"` for the best published weights, another published name, a path to a state
        dict, or None for random ones. See :func:`sktransfer.models.get_model`.
    layer : int, str or list of these, default="auto"
        Where to cut. The pooled outputs of several layers are concatenated; the images run through
        the network once, and the memory keeps each layer's row as an entry of its own.

        ====================  ==================================================================
        layer                 what it stands for
        ====================  ==================================================================
        `"auto"`              what the network's own head sees
        a number              a block, from 0; from -1 at the end
        a name                a block of `block_names_`; or, as `"layer3"`, the last of several
                              that share this prefix
        `"all"`               every block, in order
        `"stages"`            the last block of each resolution; of a network with a single one,
                              as a vision transformer, the ends of the four quarters of its
                              encoder. Hidden linear layers, as VGG's, count as a resolution.
        `"output"`            the whole network, head included; it works for networks that can't
                              be traced, too
        a list                several of these, each layer once
        ====================  ==================================================================
    pooling : {"avg", "max", "token", "flatten"} or tuple of these, default="avg"
        How the activations of an image become one row. Of a tuple, each layer contributes one part
        for each pooling: ``layer=["a", "b"], pooling=("avg", "max")`` gives a's mean, a's maximum,
        b's mean, b's maximum. Where the network itself has pooled before the cut, as for most with
        `layer="auto"`, there is nothing left to pool, and the layer contributes once.

        ============  ==========================  ==============================================
        pooling       feature map (c, h, w)       token sequence (t, c)
        ============  ==========================  ==============================================
        `"avg"`       mean over positions: c      mean over patch tokens, class and register
                                                  tokens left out: c
        `"max"`       maximum over positions: c   maximum over patch tokens: c
        `"token"`     not defined: an error       the class token: c
        `"flatten"`   all values: c · h · w       all values of all tokens: t · c
        ============  ==========================  ==============================================
    normalize : bool, default=False
        Whether the values of each layer and pooling are replaced by their signed square roots and
        scaled to one length, so that all layers weigh alike and a whole row has length 1. A row
        stays a function of one image, and the memory keeps what the network has. See Notes.
    augment : {"flip", "dihedral"} or None, default=None
        Views over which a row is the mean. `"flip"`: the image, and mirrored left to right;
        `"dihedral"`: turned by quarters and mirrored, for images without an upright direction. Each
        view runs through the network, and is an entry of the memory, which a
        :class:`FineTunedClassifier` with these views shares. Views are taken of what the network
        sees, the scaled and cropped image.
    n_views : int, default=None
        Views of each image, itself included; None for all 2 of "flip" and all 8 of "dihedral" (4 if
        images are not square). The first ones are the mildest: of "dihedral", the image, mirrored
        left to right, upside down, and both.
    image_shape : tuple of (height, width) or (height, width, channels), default=None
        Shape of an image if `X` has flat rows, as scikit-learn's data sets do. One entry may be
        -1, as in `numpy.reshape`. None if `X` holds images.
    image_size : int or tuple of (height, width), default=None
        Size in pixels at which images enter the network; None for the size of its weights.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep the result of every image on disk. The key is the content of the image and
        all that shapes its result, so any later call with this image finds it: in another order,
        fold, candidate or process, or tomorrow.
    device : str or torch.device, default="auto"
        `"auto"` takes a CUDA device if there is one, else the CPU.
    precision : {"float32", "bfloat16", "float16", "int8"}, default="float32"
        What the network computes in. Rows are float32 in any case. `"int8"` needs the extra
        `int8` and a CPU. NNCF then quantises weights and activations, in half a minute for
        the default network, and OpenVINO computes. It is calibrated on 128 crops of
        scikit-learn's two photographs, always the same, so a row depends on its image alone. A
        `memory` keeps the network, for the next process. What lies behind the embedding stays in
        float32. If the embeddings of the crops differ much from those of float32 (a mean cosine
        below 0.95), a warning says so; below 0.85 it is an error. The user guide says more, under
        "8 bits".
    runtime : {"auto", "torch", "openvino"}, default="auto"
        What computes. `"auto"`: on a CPU OpenVINO, if it is installed (extra `openvino`), unless
        the network has fewer than 100,000 parameters; else torch. In float32, torch also
        computes until there are enough images for OpenVINO to pay off, whose start takes a second
        or more. Their float32 rows agree within 0.001 of the largest value and share the memory's
        entries. A network that OpenVINO can't take runs on torch, with a warning that says why.
    batch_size : int or "auto", default="auto"
        Images in flight at once and, on a GPU, in one batch; `"auto"`: 32, or as many as a GPU's
        memory takes, up to 256. Torch on a CPU takes 4 of them at a time, and fewer of
        large ones; OpenVINO one on each core. 4 are the fastest for two of the three networks of
        `benchmarks/batch_size.py`, within noise; MobileNetV3 is 1.4 times as fast with 32. A batch
        that does not fit into the memory is halved, with a warning.
    n_jobs : int or None, default=None
        Threads that read and decode images and, with OpenVINO, run the network. None or -1: one a
        core and two spare ones, or what joblib leaves to a worker process.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    block_names_ : list of str
        Names of the blocks, in order. Empty if it has none, or if it can't be traced.
    n_features_in_ : int
        Number of columns of `X`, if it has any.
    feature_names_in_ : ndarray of str
        Name of the column, if `X` is a data frame.

    Raises
    ------
    ValueError, TypeError
        In `transform`, for an image that can't be read: the message names row, file and reason.
        Images computed until then stay in the memory.

    See Also
    --------
    sktransfer.models.list_models : Names that `backbone` takes.
    sktransfer.load_image_folder : Paths and labels of a folder of class folders.
    sktransfer.make_classifier : The features of all layers, with a classifier behind them.

    Notes
    -----
    A row does not depend on the other images of its batch: batches have one size, and the last is
    padded. Equal images in one call run through the network once if there is a memory.

    Layers differ in scale. Pass `normalize=True`, or put a `StandardScaler` behind
    several of them, which learns the scales of all features from the training part. In most
    comparisons of docs/results/features.md the first is the better of the two for a support
    vector machine.

    References
    ----------
    Perronnin, Sánchez and Mensink, "Improving the Fisher kernel for large-scale image
    classification" (2010), for the normalisation.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import PretrainedFeatureExtractor
    >>> images = load_sample_images().images                     # two arrays (427, 640, 3)
    >>> PretrainedFeatureExtractor().transform(images).shape
    (2, 1280)
    >>> extractor = PretrainedFeatureExtractor(layer=["blocks.3", "conv_head"], pooling="max")
    >>> extractor.transform(images).shape
    (2, 1360)
    >>> extractor.set_params(layer="all", pooling=("avg", "max")).transform(images).shape
    (2, 6240)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **ImageEstimator._parameter_constraints,
        "layer": [Integral, str, list, tuple],
        "pooling": [StrOptions(set(POOLINGS)), list, tuple],
        "normalize": ["boolean"],
        "augment": [StrOptions({"flip", "dihedral"}), None],
        "n_views": [Interval(Integral, 1, None, closed="left"), None],
    }

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: Any = "default",
        layer: Any = "auto",
        pooling: Any = "avg",
        normalize: bool = False,
        augment: str | None = None,
        n_views: int | None = None,
        image_shape: Any = None,
        image_size: Any = None,
        memory: Any = None,
        device: Any = "auto",
        precision: str = "float32",
        runtime: str = "auto",
        batch_size: int | str = "auto",
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.pooling = pooling
        self.normalize = normalize
        self.augment = augment
        self.n_views = n_views
        self.image_shape = image_shape
        self.image_size = image_size
        self.memory = memory
        self.device = device
        self.precision = precision
        self.runtime = runtime
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    @atomic
    def fit(self, X: Any, y: Any = None) -> Self:
        """Check the parameters and the form of `X`; nothing is learnt.

        Parameters
        ----------
        X : sequence of images
            Paths, encoded bytes, PIL images, arrays (height, width[, channels]); or one array
            (n, height, width[, channels]); or a tensor (n, channels, height, width); or, with
            `image_shape`, flat rows (n, n_features). See :mod:`sktransfer.io`.
        y : ignored

        Returns
        -------
        self
        """
        self._check_images(X, reset=True)
        self.block_names_ = embedding_of(self).runner.block_names
        return self

    @takes_dask(lambda self: np.empty((0, self._n_features_out), np.float32))
    def transform(self, X: Any) -> np.ndarray:
        """Compute the embeddings of images.

        Parameters
        ----------
        X : sequence of images, or dask collection
            As in `fit`; or a dask array, bag, Series or data frame of one column with such images.

        Returns
        -------
        ndarray of shape (n, n_features_out), float32
            Of a dask collection, a dask array: one chunk a partition, computed when it is needed.
        """
        self._validate_params()
        images = self._check_images(X, reset=False)
        embedding = embedding_of(self)
        rows = embedding(images)
        return power_normalize(rows, embedding.columns) if self.normalize else rows

    @property
    def _n_features_out(self) -> int:
        return embedding_of(self).columns[-1].stop

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the features.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        ndarray of str
            The name of the class and a number, ``pretrainedfeatureextractor17``. Where `layer` or
            `pooling` stands for several: layer, pooling and number in it, ``blocks.3.2_max_17``,
            with ``vector`` in place of the pooling where a layer has nothing to pool.
        """
        embedding = embedding_of(self)
        n_layers = len({row.position for row in embedding.wanted})
        if n_layers == 1 and len(poolings_of(self.pooling)) == 1:
            return super().get_feature_names_out(input_features)
        size = embedding.preprocessing.size
        return np.array(row_names(embedding.runner, embedding.wanted, size), dtype=object)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = []
        return tags


def embedding_of(estimator: Any) -> Rows:
    """Return a pass over images to the rows of an extractor, or to a classifier's logits.

    What has no parameter `layer` takes the whole network.
    """
    runner, preprocessing = estimator.load_network()
    layer = getattr(estimator, "layer", "output")
    pooling = getattr(estimator, "pooling", "avg")
    what = runner, rows_of(runner, layer, pooling, preprocessing.size), preprocessing
    options = {
        "memory": check_memory(estimator.memory),
        "batch_size": estimator.batch_size,
        "n_jobs": estimator.n_jobs,
        "verbose": estimator.verbose,
    }
    views = getattr(estimator, "augment", None), getattr(estimator, "n_views", None)
    augmentation = Augmentation(*views, preprocessing.size)
    if augmentation.n_views == 1:
        return Embedding(*what, **options)
    return MeanEmbedding(augmentation, *what, **options)


def extractor_by(function: str, **parameters: Any) -> PretrainedFeatureExtractor:
    """Return an extractor for a function that takes parameters of it, checked.

    Which rows it makes is the function's own business, so parameters of these are refused.
    """
    of_rows = "layer", "pooling", "normalize", "augment", "n_views"
    known = [name for name in PretrainedFeatureExtractor().get_params() if name not in of_rows]
    if wrong := [name for name in parameters if name not in known]:
        raise TypeError(
            f"{function} has no parameter {wrong[0]!r}. Of PretrainedFeatureExtractor, it takes "
            f"{', '.join(known[:-1])} and {known[-1]}."
        )
    extractor = PretrainedFeatureExtractor(**parameters)
    extractor._validate_params()
    return extractor


# Of `make_classifier`.
GOOD_FEATURES: dict[str, Any] = {"layer": "all", "pooling": ("avg", "max"), "normalize": True}
