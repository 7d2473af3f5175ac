"""What is wrong, or odd, in a collection of images: one table, the most urgent first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length

from sktransfer._engine.layers import power_normalize
from sktransfer._estimators.base import check_y, validate_params
from sktransfer._estimators.labels import plain_labels
from sktransfer._estimators.pretrained import (
    GOOD_FEATURES,
    PretrainedFeatureExtractor,
    embedding_of,
    extractor_by,
)
from sktransfer._estimators.recipe import make_classifier
from sktransfer._memory.memory import check_memory
from sktransfer._neighbors import nearest
from sktransfer._splits import check_groups
from sktransfer._threads import small_solve
from sktransfer.io import ImageSequence
from sktransfer.model_selection._image_checks import ImageFinding, odd_images, outliers
from sktransfer.model_selection._image_facts import ImageFacts, look_at
from sktransfer.model_selection._label_suspects import N_FOLDS, label_suspects
from sktransfer.model_selection._near_duplicates import (
    EMBEDDING,
    EXACT,
    PICTURE,
    Duplicates,
    components,
    find_duplicates,
)

# In the order in which they are worth a look: what stops or falsifies a comparison comes first.
KINDS = (
    "damaged",
    "small class",
    "leak",
    "duplicate across classes",
    "label",
    "exact duplicate",
    "near duplicate",
    "blank",
    "dark",
    "bright",
    "blurred",
    "tiny",
    "odd shape",
    "outlier",
)
_NEIGHBORS = 10
_DIRECTIONS = 256  # of the features, in which labels are judged
_SAMPLE = 2000  # images, by which these are found


class _Finding(NamedTuple):
    kind: str
    row: int
    score: float
    reason: str
    other: int | None = None  # the row of the image of which it is a copy
    label: Any = None  # which it seems to have


@validate_params(
    {"test": ["array-like", None], "random_state": ["random_state"]},
    prefer_skip_nested_validation=True,
)
def audit(
    X: Any,
    y: Any = None,
    groups: Any = None,
    *,
    test: Any = None,
    backbone: Any = "efficientnet_lite0",
    memory: Any = None,
    random_state: Any = 0,
    verbose: int = 0,
    **parameters: Any,
) -> Any:
    """List what should be looked at before a model is trained on images.

    Parameters
    ----------
    X : sequence of images
        See :class:`sktransfer.PretrainedFeatureExtractor`. Images that can't be read, or not
        whole, are listed, and left out of all that follows.
    y : array-like of shape (n,), default=None
        Labels of any type, one an image. Without them, labels are not judged.
    groups : array-like of shape (n,), default=None
        Groups that are meant for the `groups` of scikit-learn's splitters: patients, modules, days.
        Equal or nearly equal images in two groups are leaks, as a split may part the groups.
        Labels are judged by models that saw other groups.
    test : array-like of shape (n,) of bool, or of ints, default=None
        The test part of a split: a mask, or rows, as a splitter yields them. Equal or nearly equal
        images in the test part and in the other one are leaks.
    backbone : str, torch.nn.Module, Backbone or fitted estimator, default="efficientnet_lite0"
        See :class:`sktransfer.PretrainedFeatureExtractor`. For images of other channels than red,
        green and blue: :class:`sktransfer.ChannelAdapter`.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep what is known of each image: a second audit decodes only damaged images, and
        nothing runs through the network. Without it, labelled images run through it twice.
    random_state : int, RandomState instance or None, default=0
        Seed of the folds in which labels are judged.
    verbose : int, default=0
        1 shows progress bars.
    **parameters
        Further parameters of :class:`sktransfer.PretrainedFeatureExtractor`: `weights`,
        `image_shape`, `image_size`, `device`, `precision`, `runtime`, `batch_size` and `n_jobs`.

    Returns
    -------
    pandas.DataFrame
        One row a finding, the first to be looked at first; none if nothing was found. An image may
        have several.

        ======================================  =================================================
        column                                  holds
        ======================================  =================================================
        `rank`                                  1, 2, ...
        `kind`                                  see below
        `row`, `path`, `label`                  the image; path and label are None if it has none
        `other_row`, `other_path`,              the image of which it is a copy; of `"label"`,
        `other_label`                           `other_label` is the class it seems to be
        `score`                                 within a kind, more is more urgent; at most 1
        `reason`                                in words
        ======================================  =================================================

        ==============================  =========================================================
        kind, in this order             what it says
        ==============================  =========================================================
        `"damaged"`                     the image can't be read, or not whole
        `"small class"`                 a class has too few images for five folds; its first image
        `"leak"`                        a copy is in the other part of the split, or in another
                                        group
        `"duplicate across classes"`    a copy has another label: one of both is wrong
        `"label"`                       other images say that its label is wrong, or may be
        `"exact duplicate"`             an image of equal content comes before it
        `"near duplicate"`              almost the same image comes before it
        `"blank"`, `"dark"`,            as they say: but for blank ones, by themselves and beside
        `"bright"`, `"blurred"`,        the other images
        `"tiny"`, `"odd shape"`
        `"outlier"`                     it is far from all other images
        ==============================  =========================================================

    Raises
    ------
    ValueError, TypeError
        For labels, groups or a test part that do not go with the images; not for images that
        can't be read.

    See Also
    --------
    suggest_groups : The same copies as groups for splitters; its notes say how they are found.
    sktransfer.inspection.AuditDisplay : Plots the first findings.
    sktransfer.io.find_unreadable : Damaged files alone.

    Notes
    -----
    Of n copies of one image, n - 1 are listed, each with the copy that it is most like.

    Labels are judged by confident learning, on the out-of-fold probabilities of
    :func:`sktransfer.make_classifier` in five folds, in which copies stay together; it sees the 256
    main directions of the features, not all of them. A class is credible for an image
    if its probability is at least its mean probability for its own images; if the most probable of
    the credible classes is not the given one, the label is listed, and so it is if another class is
    at least three times as probable as the given one. If these are fewer than 15, the labels that
    are least sure are listed as well, up to 15 or to a quarter of the images: those for which
    another class is at least a tenth as probable. The score is the share of the other class in the
    sum of both probabilities. Classes without two images that are no copies are not judged.

    An outlier's mean cosine distance to its ten nearest images lies, as a logarithm, more than 3.5
    robust standard deviations above the median.

    References
    ----------
    Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels"
    (2021). Iglewicz and Hoaglin, "How to detect and handle outliers" (1993).

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer.model_selection import audit
    >>> china, flower = load_sample_images().images                  # two arrays (427, 640, 3)
    >>> X = [photo[:, left : left + 80] for photo in (china, flower) for left in range(0, 640, 80)]
    >>> X += [np.fliplr(X[3]), np.zeros((80, 80, 3), np.uint8)]
    >>> y = ["china"] * 8 + ["flower"] * 8 + ["flower", "china"]
    >>> table = audit(X, y, image_size=64)
    >>> table[table.kind != "label"][["kind", "row", "other_row"]].values.tolist()
    [['duplicate across classes', 16, 3], ['blank', 17, <NA>]]
    """
    extractor = extractor_by(
        "audit", backbone=backbone, memory=memory, verbose=verbose, **parameters
    )
    images = extractor.check_images(X)
    labels = None if y is None else _check_labels(y, images)
    groups = check_groups(groups, len(images))
    in_test = None if test is None else _test_mask(test, len(images))
    facts = look_at(images, check_memory(memory), extractor.n_jobs, verbose)
    rows = np.array([row for row in range(len(images)) if row not in facts.damage], int)
    findings = [_Finding("damaged", row, 1.0, why) for row, why in facts.damage.items()]
    if labels is not None:
        findings += _small_classes(labels)
    if len(rows):
        sound = _Sound(
            images[rows],
            facts.of(rows),
            None if labels is None else labels[rows],
            None if groups is None else groups[rows],
            None if in_test is None else in_test[rows],
        )
        found = _findings(sound, extractor, random_state)
        numbers = rows.tolist()
        findings += [
            one._replace(
                row=numbers[one.row], other=None if one.other is None else numbers[one.other]
            )
            for one in found
        ]
    return _table(findings, images, labels)


# ------------------------------------------------------------------------------ input


def _check_labels(y: Any, images: ImageSequence) -> np.ndarray:
    labels = check_y(plain_labels(y))
    check_consistent_length(images, labels)
    check_classification_targets(labels)
    return labels


def _test_mask(test: Any, n: int) -> np.ndarray:
    """Return which images are in the test part."""
    try:
        test = np.asarray(test)
    except ValueError:  # a pair of what is learnt from and tested on, of different lengths
        test = np.fromiter(test, object, len(test))
    if test.dtype == bool and test.shape == (n,):
        return test
    is_rows = test.ndim == 1 and (test.dtype.kind in "iu" or not test.size)
    if not is_rows or (test.size and not (-1 < test.min() and test.max() < n)):
        raise ValueError(
            f"test must be a mask of {n} booleans, or rows from 0 to {n - 1}, as a splitter yields "
            f"them; got an array of {test.dtype} of shape {test.shape}"
            + (f", with values from {test.min()} to {test.max()}." if is_rows else ".")
        )
    mask = np.zeros(n, bool)
    mask[test.astype(int)] = True
    return mask


# ------------------------------------------------------------------------------ findings


class _Sound(NamedTuple):
    """Images that are not damaged, and what is known of them."""

    images: ImageSequence
    facts: ImageFacts
    labels: np.ndarray | None
    groups: np.ndarray | None
    in_test: np.ndarray | None


def _small_classes(labels: np.ndarray) -> Iterator[_Finding]:
    names, firsts, counts = np.unique(labels, return_index=True, return_counts=True)
    for name, first, n in zip(names.tolist(), firsts.tolist(), counts.tolist(), strict=True):
        if n < N_FOLDS:
            images = "1 image" if n == 1 else f"{n} images"
            reason = (
                f"Class {name!r} has {images}, too few for {N_FOLDS} folds: add images, or leave "
                "it out."
            )
            yield _Finding("small class", first, 1 - n / N_FOLDS, reason)


def _findings(
    sound: _Sound, extractor: PretrainedFeatureExtractor, random_state: Any
) -> list[_Finding]:
    """Return all that needs the pixels, with rows of the sound images."""
    judged = sound.labels is not None and len(np.unique(sound.labels)) > 1
    # First: what the network computes on the way, the next pass finds in the memory.
    features = _features(extractor, sound.images) if judged else None
    embeddings = embedding_of(extractor)(sound.images)
    duplicates = find_duplicates(sound.facts, embeddings)
    found = [*_copies(sound, duplicates)]
    if features is not None:
        found += _labels(sound, features, duplicates, random_state, extractor.verbose)
    odd: list[ImageFinding] = [*odd_images(sound.facts)]
    if len(embeddings) > 1:
        k = min(_NEIGHBORS, len(embeddings) - 1)
        odd += outliers(nearest(embeddings, None, k)[0])
    return found + [_Finding(one.kind, one.row, one.score, one.reason) for one in odd]


def _features(extractor: PretrainedFeatureExtractor, images: ImageSequence) -> np.ndarray:
    """Return the features of the good recipe; of a network without blocks, what its head sees."""
    all_layers = clone(extractor).set_params(**GOOD_FEATURES)
    if not embedding_of(extractor).runner.block_names:
        all_layers = extractor
    embedding = embedding_of(all_layers)
    return power_normalize(embedding(images), embedding.columns)


_HOW = {
    EXACT: "Its content equals that of the other image",
    PICTURE: "It is the picture of the other image, as if saved again, cropped, turned or mirrored "
    "({distance:.2%} of its variance differ)",
    EMBEDDING: "It looks almost like the other image (cosine {cosine:.3f})",
}


def _copies(sound: _Sound, duplicates: Duplicates) -> Iterator[_Finding]:
    """Yield one copy after the other, each with that which it is most like."""
    for row, other, distance, kind in _tree(len(sound.images), duplicates):
        how = _HOW[kind].format(distance=distance, cosine=1 - distance)
        score = float(1 - distance)
        if sound.in_test is not None and sound.in_test[row] != sound.in_test[other]:
            row, other = (row, other) if sound.in_test[row] else (other, row)
            reason = f"{how}, which is not in the test part, where this one is."
            yield _Finding("leak", row, score, reason, other)
        elif sound.groups is not None and sound.groups[row] != sound.groups[other]:
            reason = f"{how}, which is in another group: a split may part them."
            yield _Finding("leak", row, score, reason, other)
        elif sound.labels is not None and sound.labels[row] != sound.labels[other]:
            reason = f"{how}, but their labels differ: one of both is wrong."
            yield _Finding("duplicate across classes", row, score, reason, other)
        else:
            name = "exact duplicate" if kind == EXACT else "near duplicate"
            yield _Finding(name, row, score, f"{how}.", other)


def _tree(n: int, duplicates: Duplicates) -> Iterator[tuple[int, int, float, int]]:
    """Yield each image but the first of those that are one, with that which it is most like.

    They form a minimum spanning tree, in which pictures come before embeddings.
    """
    places = {(i, j): k for k, (i, j) in enumerate(duplicates.pairs.tolist())}
    weights = duplicates.distances + (duplicates.kinds == EMBEDDING) + 1e-9  # 0 would be no edge
    ends = tuple(duplicates.pairs.T.astype(np.int32))  # some versions of SciPy's trees want these
    graph = coo_array((weights, ends), shape=(n, n)).tocsr()
    tree = minimum_spanning_tree(graph)
    numbers = components(n, duplicates.pairs)
    counts = np.bincount(numbers, minlength=n)
    for root in np.unique(numbers, return_index=True)[1].tolist():
        if counts[numbers[root]] == 1:
            continue
        order, before = breadth_first_order(tree, root, directed=False)
        for row, other in ((row, int(before[row])) for row in order[1:].tolist()):
            place = places[min(row, other), max(row, other)]
            yield row, other, float(duplicates.distances[place]), int(duplicates.kinds[place])


def _labels(
    sound: _Sound,
    features: np.ndarray,
    duplicates: Duplicates,
    random_state: Any,
    verbose: int,
) -> Iterator[_Finding]:
    """Yield the labels that models of the other images doubt."""
    assert sound.labels is not None
    classes, codes = np.unique(sound.labels, return_inverse=True)
    pairs = duplicates.pairs
    if sound.groups is not None:
        firsts, numbers = np.unique(sound.groups, return_index=True, return_inverse=True)[1:]
        pairs = np.concatenate([pairs, np.stack([firsts[numbers], np.arange(len(codes))], axis=1)])
    together = components(len(codes), pairs)
    model = make_classifier()[1:]
    if features.shape[1] > _DIRECTIONS:
        features, model = _main_directions(features), model[1:]
    for suspect in label_suspects(
        model, features, codes, together, random_state=random_state, verbose=verbose
    ):
        given, other = classes[[codes[suspect.row], suspect.other]].tolist()
        given_of, other_of = f"{given!r} ({suspect.given:.0%})", f"{other!r} ({suspect.best:.0%})"
        if suspect.best > suspect.given:
            reason = f"A model of the other images takes it for {other_of}, not {given_of}."
        else:
            reason = (
                f"A model of the other images is not sure that it is {given_of}: it may be "
                f"{other_of}."
            )
        score = suspect.best / (suspect.best + suspect.given)
        yield _Finding("label", suspect.row, score, reason, label=other)


def _main_directions(features: np.ndarray) -> np.ndarray:
    """Return standardised features along the directions in which a sample varies most.

    They leave at most 256 columns to fit on, in place of thousands.
    """
    rows = StandardScaler().set_output(transform="default").fit_transform(features)
    sample = rows[np.unique(np.linspace(0, len(rows) - 1, _SAMPLE).astype(int))]
    pca = PCA(min(_DIRECTIONS, len(sample)), svd_solver="randomized", random_state=0)
    with small_solve(sample.size):
        return pca.set_output(transform="default").fit(sample).transform(rows)


# ------------------------------------------------------------------------------ the table


def _table(findings: list[_Finding], images: ImageSequence, labels: np.ndarray | None) -> Any:
    import pandas

    found = sorted(findings, key=lambda one: (KINDS.index(one.kind), -one.score, one.row))
    rows = [one.row for one in found]
    others = [one.other for one in found]
    names = None if labels is None else labels.tolist()

    def objects(values: list[Any]) -> Any:  # which keeps None, and names that are not UTF-8
        return pandas.Series(values, dtype=object)

    def label_of(row: int | None) -> Any:
        return None if names is None or row is None else names[row]

    return pandas.DataFrame(
        {
            "rank": np.arange(1, len(found) + 1),
            "kind": objects([one.kind for one in found]),
            "row": np.array(rows, int),
            "path": objects([images.file(row) for row in rows]),
            "label": objects([label_of(row) for row in rows]),
            "other_row": pandas.array(others, dtype="Int64"),
            "other_path": objects([None if row is None else images.file(row) for row in others]),
            "other_label": objects(
                [label_of(one.other) if one.label is None else one.label for one in found]
            ),
            "score": np.array([one.score for one in found], float),
            "reason": objects([one.reason for one in found]),
        }
    )
