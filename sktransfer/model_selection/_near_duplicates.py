"""Images that come twice: equal files, the same picture, or almost the same in what they show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sktransfer._estimators.pretrained import extractor_by
from sktransfer._memory.memory import check_memory
from sktransfer._neighbors import nearest
from sktransfer.model_selection._alignment import ORIENTATIONS, coarse, differences, turned
from sktransfer.model_selection._comparison import embed
from sktransfer.model_selection._image_facts import ImageFacts, look_at

EXACT, PICTURE, EMBEDDING = range(3)  # by what two images are found to be one
_CANDIDATES = 5  # by the embeddings, and as many by the pictures
_OF_TURNED = 3  # more by pictures that are turned or mirrored
_TURNED = 0.02  # cosine distance of the coarse pictures that makes them candidates
_UNRELATED = 10  # rank of the neighbour that is taken for another image
_CLOSEST = 0.01  # the share of images whose unrelated neighbours are the closest ones
_MARGINS = 12, 4  # times as near as those are duplicates: by pictures, by embeddings
_SAMPLE = 1000  # images whose unrelated neighbours are looked at
_UNLIKE = 0.2  # by how much two pictures differ that can't be one, whatever their embeddings
_FEW = 20  # images, whose distances say nothing
_OF_PICTURES = (0.002, 0.01, 0.05)  # the least limit, that of few images, and the most
_OF_EMBEDDINGS = (0.001, 0.005, 0.01)


@dataclass
class Duplicates:
    """Pairs of images that are one, a row for each pair.

    Attributes
    ----------
    pairs : ndarray of shape (n_pairs, 2)
        Rows, the smaller first, and no pair twice.
    distances : ndarray of shape (n_pairs,)
        0 for equal content; else of the pictures or, where these differ, of the embeddings.
    kinds : ndarray of shape (n_pairs,)
        `EXACT`, `PICTURE` or `EMBEDDING`.
    limits : tuple of two floats
        Below which two pictures, and two embeddings, are taken for one image.
    """

    pairs: np.ndarray
    distances: np.ndarray
    kinds: np.ndarray
    limits: tuple[float, float]


def suggest_groups(
    X: Any,
    *,
    backbone: Any = "efficientnet_lite0",
    memory: Any = None,
    verbose: int = 0,
    **parameters: Any,
) -> np.ndarray:
    """Put images that are nearly the same into one group, so that no split parts them.

    A model that is tested on a copy of what it was trained on seems better than it is.

    Parameters
    ----------
    X : sequence of images
        See :class:`sktransfer.PretrainedFeatureExtractor`.
    backbone : str, torch.nn.Module, Backbone or fitted estimator, default="efficientnet_lite0"
        See :class:`sktransfer.PretrainedFeatureExtractor`. For images of other channels than red,
        green and blue: :class:`sktransfer.ChannelAdapter`.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep what is known of each image: a second call decodes no image, and nothing runs
        through the network.
    verbose : int, default=0
        1 shows progress bars.
    **parameters
        Further parameters of :class:`sktransfer.PretrainedFeatureExtractor`: `weights`,
        `image_shape`, `image_size`, `device`, `precision`, `runtime`, `batch_size` and `n_jobs`.

    Returns
    -------
    ndarray of shape (n,), int
        The number of each image's group, from 0 in the order of `X`: for the `groups` of
        scikit-learn's splitters, such as :class:`sklearn.model_selection.StratifiedGroupKFold`.
        An image without a copy is a group of its own.

    Raises
    ------
    ValueError, TypeError
        For an image that can't be read, naming row, file and reason.

    See Also
    --------
    audit : Lists these images, and what else should be looked at.

    Notes
    -----
    Two images are in one group if one of three holds, or if a chain of such pairs links them:

    1. Their content is equal: the bytes of files, the pixels of other images.
    2. They show the same picture. Grey copies of 64 × 64 pixels are turned, mirrored, shifted,
       stretched and changed in brightness and contrast until they agree best. So a file that was
       saved again, a mirror image and a crop of a few per cent are found. What is left is a share
       of the picture's variance.
    3. Their embeddings nearly agree, by the cosine, and their pictures differ by less than a fifth:
       what has no texture, such as sky, is almost the same to a network.

    How near is near is taken from the data. The tenth nearest neighbour of an image is taken for
    another image, as few images have ten copies. The hundredth part of the images with the closest
    such neighbours says how alike different images of these data may look. Copies must agree
    better: twelve times as pictures, four times as embeddings. The limit lies between 0.002, which
    the eye does not see, and 0.05 for pictures, 0.001 and 0.01 for embeddings; for fewer than 20
    images it is 0.01 and 0.005. So solar cells, or cells under a microscope, which look alike, are
    not put together. If more than a hundredth of the images have more than ten copies, the limit
    is too strict, and only the most similar copies are found.

    Of more than 100,000 images, an index of faiss looks for neighbours, if it is installed.

    References
    ----------
    Lucas and Kanade, "An iterative image registration technique with an application to stereo
    vision" (1981).

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer.model_selection import suggest_groups
    >>> china, flower = load_sample_images().images                  # two arrays (427, 640, 3)
    >>> suggest_groups([china, flower, np.fliplr(china), china[4:-4, 6:-6]]).tolist()
    [0, 1, 0, 0]
    """
    extractor = extractor_by(
        "suggest_groups", backbone=backbone, memory=memory, verbose=verbose, **parameters
    )
    images = extractor.check_images(X)
    embeddings = embed(extractor, images)[0]  # first: it says what can't be read
    facts = look_at(images, check_memory(memory), extractor.n_jobs, verbose)
    return components(len(images), find_duplicates(facts, embeddings).pairs)


def components(n: int, pairs: np.ndarray) -> np.ndarray:
    """Return for each of n images the number of those with which a chain of pairs links it."""
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return connected_components(links, directed=False)[1]


def find_duplicates(facts: ImageFacts, embeddings: np.ndarray) -> Duplicates:
    """Return the pairs of images that are one; see `suggest_groups`.

    Of images of equal content, each is paired with the first alone, which stands for all.
    """
    first_of: dict[bytes, int] = {}
    firsts = np.array([first_of.setdefault(d, i) for i, d in enumerate(facts.digests)], int)
    copies = np.flatnonzero(firsts != np.arange(len(firsts)))
    exact = np.stack([firsts[copies], copies], axis=1)
    rows = np.flatnonzero(firsts == np.arange(len(firsts)))
    pairs, distances, kinds, limits = _near(facts.small[rows], embeddings[rows])
    return Duplicates(
        np.concatenate([exact, rows[pairs]]),
        np.concatenate([np.zeros(len(exact)), distances]),
        np.concatenate([np.full(len(exact), EXACT), kinds]),
        limits,
    )


def _near(
    small: np.ndarray, embeddings: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, float]]:
    """Return pairs, distances, kinds and limits, of images no two of which are equal."""
    n = len(small)
    if n < 2:
        return (
            np.zeros((0, 2), int),
            np.zeros(0),
            np.zeros(0, int),
            (_OF_PICTURES[1], _OF_EMBEDDINGS[1]),
        )
    of_embeddings, by_embedding = nearest(embeddings, None, min(_UNRELATED, n - 1))
    pairs, of_pictures, limit_of_pictures = _same_pictures(small, by_embedding)
    limit = _limit(of_embeddings[:, -1], n, _MARGINS[1], _OF_EMBEDDINGS)
    rows, columns = np.nonzero(of_embeddings < limit)
    alike = np.stack([rows, by_embedding[rows, columns]], axis=1)
    # What has no texture, such as sky, is the same to a network.
    is_like = differences(small, alike) < _UNLIKE
    rows, columns, alike = rows[is_like], columns[is_like], alike[is_like]
    all_pairs, firsts = _unique(np.concatenate([pairs, alike]), n)
    distances = np.concatenate([of_pictures, of_embeddings[rows, columns]])
    kinds = np.repeat([PICTURE, EMBEDDING], [len(pairs), len(alike)])
    return all_pairs, distances[firsts], kinds[firsts], (limit_of_pictures, limit)


def _same_pictures(
    small: np.ndarray, by_embedding: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the pairs of equal pictures, by how much they differ, and the limit of that."""
    n, k = by_embedding.shape
    pictures = coarse(small)
    flat = pictures.reshape(n, -1)
    by_picture = nearest(flat, None, k)[1]
    sample = np.unique(np.linspace(0, n - 1, _SAMPLE).astype(int))
    farthest = [_with_neighbors(by[sample, -1:], sample) for by in (by_embedding, by_picture)]
    unrelated = differences(small, _unique(np.concatenate(farthest), n)[0])
    candidates = [_with_neighbors(by[:, :_CANDIDATES]) for by in (by_embedding, by_picture)]
    for way in ORIENTATIONS[1:]:
        queries = turned(pictures, way).reshape(n, -1)
        distances, by_turned = nearest(flat, queries, min(_OF_TURNED, n))
        candidates.append(_with_neighbors(by_turned)[distances.ravel() < _TURNED])
    pairs = _unique(np.concatenate(candidates), n)[0]
    found, limit = differences(small, pairs), _limit(unrelated, n, _MARGINS[0], _OF_PICTURES)
    return pairs[found < limit], found[found < limit], limit


def _limit(
    unrelated: np.ndarray, n: int, margin: float, bounds: tuple[float, float, float]
) -> float:
    """Return below which distance two of n images are taken for one, by those of other images."""
    least, of_few, most = bounds
    if n < _FEW:
        return of_few
    return float(np.clip(np.quantile(unrelated, _CLOSEST) / margin, least, most))


def _with_neighbors(neighbors: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Return pairs of each row, all by default, with its neighbors (n_rows, k), in order."""
    rows = np.arange(len(neighbors)) if rows is None else rows
    return np.stack([np.repeat(rows, neighbors.shape[1]), neighbors.ravel()], axis=1)


def _unique(pairs: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each pair of two of n images once, the smaller first; and where it came first."""
    pairs = np.sort(pairs, axis=1)
    apart = np.flatnonzero(pairs[:, 0] < pairs[:, 1])
    _, firsts = np.unique(pairs[apart, 0] * n + pairs[apart, 1], return_index=True)
    return pairs[apart[firsts]], apart[firsts]
