"""Which images are most like a given one."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np

from sktransfer._estimators.base import Interval, validate_params
from sktransfer._estimators.pretrained import embedding_of, extractor_by
from sktransfer._neighbors import nearest_in_order


@validate_params(
    {"n_neighbors": [Interval(Integral, 1, None, closed="left")]},
    prefer_skip_nested_validation=True,
)
def find_similar(
    queries: Any,
    X: Any,
    *,
    n_neighbors: int = 5,
    metric: str = "cosine",
    backbone: Any = "efficientnet_lite0",
    memory: Any = None,
    verbose: int = 0,
    **parameters: Any,
) -> Any:
    """Find the images whose embeddings are nearest to those of some others.

    Parameters
    ----------
    queries : sequence of images
        See :class:`sktransfer.PretrainedFeatureExtractor`; of one image, pass ``[image]``.
    X : sequence of images
        Those that are searched. A query may be one of them; it is then its own nearest image.
    n_neighbors : int, default=5
        How many of them are returned for each query.
    metric : str, default="cosine"
        Distance between embeddings; see :class:`sklearn.neighbors.NearestNeighbors`.
    backbone : str, torch.nn.Module, Backbone or fitted estimator, default="efficientnet_lite0"
        See :class:`sktransfer.PretrainedFeatureExtractor`. For images of other channels than red,
        green and blue: :class:`sktransfer.ChannelAdapter`.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep the embeddings: only images that are not in it run through the network.
    verbose : int, default=0
        1 shows progress bars.
    **parameters
        Further parameters of :class:`sktransfer.PretrainedFeatureExtractor`: `weights`,
        `image_shape`, `image_size`, `device`, `precision`, `runtime`, `batch_size` and `n_jobs`.

    Returns
    -------
    pandas.DataFrame
        `n_neighbors` rows for each query, the nearest first, and copies of one image in the order
        of `X`. Columns: `query_row`, `query_path`, `rank` from 1 on, `row`, `path` and `distance`.
        Paths are None of images that are no files.

    Raises
    ------
    ValueError, TypeError
        For an image that can't be read, naming row, file and reason, or if `X` has fewer than
        `n_neighbors` images.

    See Also
    --------
    PrototypeDisplay : Shows them.
    sktransfer.model_selection.suggest_groups : Images that are nearly the same.

    Notes
    -----
    All distances are computed. Of more than 100,000 images, an index of faiss reads a part of the
    rows instead, if it is installed (``pip install '.[neighbors]'``), and may miss a few.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer.inspection import find_similar
    >>> china, flower = load_sample_images().images                  # two arrays (427, 640, 3)
    >>> X = [china[:, :320], china[:, 320:], flower[:, :320], flower[:, 320:]]
    >>> sorted(find_similar([flower], X, n_neighbors=2)["row"].tolist())
    [2, 3]
    """
    import pandas

    extractor = extractor_by(
        "find_similar", backbone=backbone, memory=memory, verbose=verbose, **parameters
    )
    asked, images = extractor.check_images(queries), extractor.check_images(X)
    if n_neighbors > len(images):
        raise ValueError(f"n_neighbors={n_neighbors}, but there are {len(images)} images in X.")
    embedding = embedding_of(extractor)
    of_queries = embedding(asked)  # first: one that can't be read is said before the long part
    embeddings = embedding(images)
    distances, rows = nearest_in_order(embeddings, of_queries, n_neighbors, metric=metric)
    numbers = np.repeat(np.arange(len(asked)), n_neighbors)
    paths = [asked.file(i) for i in numbers.tolist()], [images.file(i) for i in rows.ravel()]
    return pandas.DataFrame(
        {
            "query_row": numbers,
            "query_path": pandas.Series(paths[0], dtype=object),
            "rank": np.tile(np.arange(1, n_neighbors + 1), len(asked)),
            "row": rows.ravel(),
            "path": pandas.Series(paths[1], dtype=object),
            "distance": distances.ravel(),
        }
    )
