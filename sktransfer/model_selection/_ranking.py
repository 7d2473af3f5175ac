"""Which network to transfer, and whether to transfer at all."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import check_scoring
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from torch import nn

from sktransfer._bars import tqdm
from sktransfer._estimators.base import StrOptions, validate_params
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor, embedding_of
from sktransfer._estimators.zero_shot import ZeroShotClassifier
from sktransfer._splits import (
    Folds,
    Split,
    check_groups,
    class_sizes,
    name_rare_classes,
    without_words_on_small_classes,
)
from sktransfer._threads import small_solve
from sktransfer.io import ImageSequence, check_images
from sktransfer.metrics import h_score, leep_score, log_me_score
from sktransfer.model_selection._comparison import (
    check_labels,
    embed,
    fit_and_score,
    stratified_folds,
)
from sktransfer.model_selection._transfer_gain import TransferGain, transfer_gain
from sktransfer.models._builders import RECOMMENDED
from sktransfer.models._registry import Backbone, get_model, imagenet_accuracy
from sktransfer.models._text_towers import reads_words
from sktransfer.transforms import Channels

__all__ = ["TransferGain", "rank_backbones", "transfer_gain"]

SCORES = ("knn", "logistic", "logme", "h_score", "leep", "zero_shot", "few_shot")
_OF_WORDS = {"zero_shot", "few_shot"}
_WITHOUT_PAIRS = {"leep", *_OF_WORDS}  # two heads, or two languages, make no third
_NEIGHBORS = 5
_PAIRED = 3  # of how many networks, the best, pairs are formed
_CS = [0.001, 0.01, 0.1, 1]  # coarse: they differ by a tenfold, and most tasks lie inside


@validate_params(
    {
        "backbones": [list, tuple, None],
        "scoring": [list, tuple, StrOptions(set(SCORES))],
        "sort_by": [StrOptions(set(SCORES)), None],
        "metric": [str, callable],
        "pairs": ["boolean"],
        "cv": ["cv_object"],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    },
    prefer_skip_nested_validation=True,
)
def rank_backbones(
    X: Any,
    y: Any,
    backbones: Sequence[Any] | None = None,
    *,
    scoring: Sequence[str] | str = ("knn", "logistic", "logme", "h_score"),
    sort_by: str | None = None,
    metric: str | Callable[..., float] = "accuracy",
    pairs: bool = True,
    cv: Any = 5,
    groups: Any = None,
    random_state: Any = None,
    image_shape: Any = None,
    image_size: Any = None,
    memory: Any = None,
    device: Any = "auto",
    precision: str = "float32",
    runtime: str = "auto",
    batch_size: int | str = "auto",
    n_jobs: int | None = None,
    verbose: int = 0,
) -> Any:
    """Rank pretrained networks for a task by scores of their embeddings, without fine-tuning.

    Every image runs through every network once; its embedding is what the network's own head
    sees, as of ``PretrainedFeatureExtractor(layer="auto")``.

    Parameters
    ----------
    X : sequence of images
        See :class:`sktransfer.PretrainedFeatureExtractor`.
    y : array-like of shape (n,)
        Labels of any type.
    backbones : list of str, (str, weights), torch.nn.Module, Backbone or estimator, default=None
        None for all of :data:`sktransfer.models.RECOMMENDED` that can be loaded here: without a
        connection, the embedded ones and what was downloaded before; a warning says which are left
        out. Else names of :func:`sktransfer.list_models`; pairs of a name and its weights, as of
        :func:`sktransfer.get_model`: ``("resnet50", "IMAGENET1K_V1")``, or
        ``("resnet50", None)`` for random ones, the ranking's zero; or networks, fitted
        estimators that trained one, and :class:`sktransfer.ChannelAdapter`, all for images of the
        same channels.
    scoring : list of str, default=("knn", "logistic", "logme", "h_score")
        `"knn"`: the vote of the 5 nearest neighbours by the cosine, cross-validated.
        `"logistic"`: logistic regression on standardised embeddings, cross-validated, its C the
        best of 0.001, 0.01, 0.1 and 1 in three folds of the training part.
        `"logme"`, `"h_score"`: :func:`sktransfer.metrics.log_me_score` and `h_score`.
        `"leep"`: :func:`sktransfer.metrics.leep_score` of the network's own head; NaN where the
        network has no classes of its own.
        `"zero_shot"`: the `metric` of :class:`sktransfer.ZeroShotClassifier` with the labels as
        prompts, which learns from no image; NaN where the network reads no words.
        `"few_shot"`: that of the same model, cross-validated: its `fit` learns from the training
        part what to add to the words. It is comparable with `"logistic"`, which knows no words.
        How much is added is chosen without regard to `groups`.
    sort_by : str, default=None
        The one of them that the rows are sorted by, best first; None for the first. As `refit`
        of :class:`sklearn.model_selection.GridSearchCV`, it says what is best where there are
        several opinions.
    metric : str or callable, default="accuracy"
        What `"knn"`, `"logistic"`, `"zero_shot"` and `"few_shot"` are scored by: a scorer, or the
        name of one.
    pairs : bool, default=True
        Whether the best pair is ranked as well: of the first three networks, those two whose
        embeddings side by side, each of mean length 1, score best. `"leep"`, `"zero_shot"` and
        `"few_shot"` know none.
    cv : int, splitter or iterable, default=5
        Folds; of a number of them, stratified and shuffled ones. All networks see the same.
    groups : array-like of shape (n,), default=None
        The group of each image, as of those of one patient or one part. A number of folds is then
        one of whole groups, as of :class:`sklearn.model_selection.StratifiedGroupKFold`, and so are
        the folds in which C is chosen. A splitter gets them. The formulas split nothing: of images
        that are alike in a group, they stay too high.
    random_state : int, RandomState instance or None, default=None
        Seed of the folds.
    image_shape, image_size, memory, device, precision, runtime, batch_size, n_jobs : \
            default=None, None, None, "auto", "float32", "auto", "auto", None
        As of :class:`sktransfer.PretrainedFeatureExtractor`. With a `memory`, what was embedded
        before, by an earlier call or one that failed, is not embedded again.
    verbose : int, default=0
        1 shows progress bars.

    Returns
    -------
    pandas.DataFrame
        One row a network, and one for the best pair of them, the best first:

        =========================  ==========================================================
        column                     holds
        =========================  ==========================================================
        `backbone`, `weights`      as given; of the pair, `"a + b"` and both weights in a tuple
        a column a score           higher is better; `knn_std`, `logistic_std` and `few_shot_std`:
                                   standard deviation over the folds
        `seconds_per_1000_images`  of embedding; NaN if all came from the memory
        `n_parameters`             of the network, its own head included
        `n_features`               width of an embedding
        `imagenet_accuracy`        published top-1 accuracy of these weights, from 0 to 1, where
                                   torchvision brings it; else NaN
        =========================  ==========================================================

    Raises
    ------
    ValueError, TypeError
        For an image that can't be read, labels that can't be ranked by, or a network that does
        not exist or can't be cut, naming it.
    OSError, ImportError
        For weights that could not be downloaded, or whose package is missing.
        All networks are loaded once before the first embeds an image.

    See Also
    --------
    transfer_gain : Whether to transfer at all.
    sklearn.pipeline.FeatureUnion : Puts the rows of two extractors side by side.

    Notes
    -----
    No score is best on all tasks: take two or three networks from the top by several, and
    fine-tune those. Cross-validated scores of embeddings do as well as the formulas, or better, in
    independent comparisons.

    References
    ----------
    Kornblith, Shlens and Le, "Do better ImageNet models transfer better?" (2019), for logistic
    regression on embeddings. Renggli, Pinto, Rimanic, Puigcerver, Riquelme, Zhang and Lucic,
    "Which model to transfer? Finding the needle in the growing haystack" (2022), for the comparison
    of scores. See :mod:`sktransfer.metrics` for the others.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer.model_selection import rank_backbones
    >>> china, flower = load_sample_images().images                  # two arrays (427, 640, 3)
    >>> X = [photo[:, left : left + 80] for photo in (china, flower) for left in range(0, 640, 80)]
    >>> y = ["china"] * 8 + ["flower"] * 8
    >>> network = "efficientnet_lite0"
    >>> both = [(network, None), network]
    >>> options = {"cv": 2, "image_size": 64, "random_state": 0}
    >>> table = rank_backbones(X, y, both, pairs=False, **options)
    >>> table[["backbone", "weights"]].values.tolist()
    [['efficientnet_lite0', 'default'], ['efficientnet_lite0', None]]
    >>> table.columns[2:8].tolist()
    ['knn', 'knn_std', 'logistic', 'logistic_std', 'logme', 'h_score']
    """
    import pandas

    scores = (scoring,) if isinstance(scoring, str) else tuple(scoring)
    sort_by = _check_scores(scores, sort_by)
    channels = next(filter(None, map(_channels_of, backbones or ())), None)
    images = check_images(X, image_shape=image_shape, channels=channels)
    y = check_labels(y, images, "rank_backbones")
    groups = check_groups(groups, len(images))
    seed = check_random_state(random_state).randint(2**31 - 1)
    folds = _Folds(y, _splits(cv, y, groups, seed), groups, metric, seed)
    folds.check_training_parts(scores)
    options = {
        "image_size": image_size,
        "memory": memory,
        "device": device,
        "precision": precision,
        "runtime": runtime,
        "batch_size": batch_size,
        "n_jobs": n_jobs,
        "verbose": verbose,
    }
    candidates = _recommended(options) if backbones is None else _candidates(backbones, options)
    # As each network takes them: what does not fit is an error before any image is embedded.
    given = [
        images if image_shape is not None else one.extractor.check_images(images)
        for one in candidates
    ]
    ranked: list[_Ranked] = []
    with tqdm(total=len(candidates), desc="backbones", disable=not verbose) as progress:
        for candidate, own in zip(candidates, given, strict=True):
            progress.set_postfix_str(candidate.name)
            ranked = _best_first([*ranked, _rank(candidate, own, folds, scores)], sort_by)
            # The embeddings of many networks would fill the memory.
            ranked[_PAIRED:] = [one._replace(X=None) for one in ranked[_PAIRED:]]
            progress.update()
    if pairs and len(ranked) > 1 and sort_by not in _WITHOUT_PAIRS:
        two = max(
            combinations(ranked[:_PAIRED], 2),
            key=lambda two: _side_by_side(two[0], two[1], folds, [sort_by]).row[sort_by],
        )
        pair = _side_by_side(two[0], two[1], folds, scores)
        ranked = _best_first([*ranked, pair], sort_by)
    table = pandas.DataFrame([one.row for one in ranked])
    # Else it loses None.
    table["weights"] = pandas.Series([one.row["weights"] for one in ranked], dtype=object)
    return table


def _channels_of(item: Any) -> Channels | None:
    """Return what pixels a network takes that says it by itself."""
    backbone = item.to_backbone() if hasattr(item, "to_backbone") else item
    return backbone.preprocessing.channels if isinstance(backbone, Backbone) else None


@dataclass
class _Candidate:
    """A network to rank."""

    name: str
    weights: Any  # as the table shows them
    extractor: PretrainedFeatureExtractor
    accuracy: float


class _Ranked(NamedTuple):
    """A row of the table, and the embeddings that it is about, if they may be paired."""

    row: dict[str, Any]
    X: np.ndarray | None = None


@dataclass
class _Folds:
    """What the cross-validated scores share."""

    y: np.ndarray
    splits: list[Split]
    groups: np.ndarray | None
    metric: Any
    seed: int

    def score(self, model: Any, X: Any) -> np.ndarray:
        with without_words_on_small_classes:
            results = [
                fit_and_score(model, X, self.y, split, self.metric, self.groups)
                for split in self.splits
            ]
        return np.array([result["test_score"] for result in results])

    @property
    def n_train(self) -> int:
        """The number of images in the smallest training part."""
        return min(len(train) for train, _ in self.splits)

    @property
    def n_of_two_classes(self) -> int:
        """Of how many images, or groups, each training part has at least two classes."""
        return self._n_of_two_classes(self.groups)

    def _n_of_two_classes(self, groups: np.ndarray | None) -> int:
        sizes = [
            class_sizes(self.y[train], None if groups is None else groups[train])[1]
            for train, _ in self.splits
        ]
        return min(int(np.sort(counts)[-2]) if len(counts) > 1 else 0 for counts in sizes)

    def check_training_parts(self, scores: Sequence[str]) -> None:
        """Refuse what can't be cross-validated, before any image is embedded."""
        if not {"knn", "logistic"} & {*scores}:
            return
        groups = self.groups if "logistic" in scores else None  # which splits them once more
        if self._n_of_two_classes(groups) < 2:
            units, more = ("images", "Add images")
            if groups is not None:
                units, more = ("groups", "Pass smaller groups")
            raise ValueError(
                "The scores 'knn' and 'logistic' train on parts of the images, and each part needs "
                f"2 {units} of at least two classes, but {name_rare_classes(self.y, 5, groups)}. "
                f"{more}, or pass another cv."
            )


def _check_scores(scores: Sequence[str], sort_by: str | None) -> str:
    """Return the score to sort by."""
    unknown = [score for score in scores if score not in SCORES]
    if unknown or not scores:
        raise ValueError(f"scoring={list(scores)!r}: pass one or several of {', '.join(SCORES)}.")
    if sort_by is not None and sort_by not in scores:
        raise ValueError(f"sort_by={sort_by!r} is not one of scoring={list(scores)!r}.")
    return sort_by or scores[0]


def _splits(cv: Any, y: np.ndarray, groups: np.ndarray | None, seed: int) -> list[Split]:
    """Return the folds, the same for every network."""
    splitter = Folds(int(cv), random_state=seed) if isinstance(cv, Integral) else cv
    return stratified_folds(splitter, y, cv, groups)


def _recommended(options: dict[str, Any]) -> list[_Candidate]:
    """Load the recommended networks; leave out, with a warning, what can't be had here."""
    names = list(dict.fromkeys(name for of_purpose in RECOMMENDED.values() for name in of_purpose))
    candidates, left_out, why = [], [], ""
    for number, name in enumerate(names):
        try:
            candidates.append(_candidate(name, number, options))
        except (ImportError, OSError) as error:
            left_out.append(name)
            why = why or str(error)
    if not candidates:
        raise OSError(f"None of the recommended networks can be loaded: {why}")
    if left_out:
        warnings.warn(
            f"Ranked are {', '.join(one.name for one in candidates)}. Of the recommended networks, "
            f"these can't be loaded here: {', '.join(left_out)}. The first of them: {why}",
            UserWarning,
            stacklevel=4,
        )
    return candidates


def _candidates(backbones: Sequence[Any], options: dict[str, Any]) -> list[_Candidate]:
    if not backbones:
        raise ValueError("backbones is empty: name at least one network, or pass None.")
    return [_candidate(item, number, options) for number, item in enumerate(backbones)]


def _candidate(item: Any, number: int, options: dict[str, Any]) -> _Candidate:
    """Load a network once, so that a wrong one is an error before any image is embedded."""
    backbone: Any
    if isinstance(item, (nn.Module, Backbone)) or hasattr(item, "to_backbone"):
        backbone, weights = item, "default"
    elif isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], str):
        backbone, weights = item
    elif isinstance(item, str):
        backbone, weights = item, "default"
    else:
        raise TypeError(
            f"backbones[{number}] is {item!r}: pass a name, a pair (name, weights), a "
            "torch.nn.Module, a Backbone, or an estimator with a method to_backbone."
        )
    extractor = PretrainedFeatureExtractor(backbone, weights=weights, **options)
    extractor._validate_params()
    kinds = (ImportError, OSError, TypeError, ValueError)
    try:
        name = get_model(backbone, weights).name
        embedding_of(extractor)
    except kinds as error:
        kind = next(kind for kind in kinds if isinstance(error, kind))
        which = item if isinstance(item, (str, tuple, list)) else type(item).__name__
        raise kind(
            f"backbones[{number}], {which!r}, can't be ranked: {error} What a memory holds of the "
            "others stays there."
        ) from error
    is_name = isinstance(backbone, str)
    accuracy = imagenet_accuracy(backbone, weights) if is_name else np.nan
    return _Candidate(name, weights if is_name else "own", extractor, accuracy)


def _best_first(ranked: list[_Ranked], sort_by: str) -> list[_Ranked]:
    return sorted(ranked, key=lambda one: -np.nan_to_num(one.row[sort_by], nan=-np.inf))


def _rank(
    candidate: _Candidate, images: ImageSequence, folds: _Folds, scores: Sequence[str]
) -> _Ranked:
    """Embed the images and score them."""
    extractor = candidate.extractor
    backbone = get_model(extractor.backbone, extractor.weights)
    # The head's logits come in the same pass.
    with_head = "leep" in scores and backbone.categories is not None
    extractor.set_params(layer=["auto", "output"] if with_head else "auto")
    X, n_computed, seconds = embed(extractor, images)
    width = embedding_of(extractor).columns[0].stop
    X, logits = X[:, :width], X[:, width:]
    row: dict[str, Any] = {"backbone": candidate.name, "weights": candidate.weights}
    for score in scores:
        row |= _score(score, X, logits, folds)
    if _OF_WORDS & {*scores} and reads_words(extractor.backbone):
        row |= _scores_of_words(extractor, images, folds, scores)
    row |= {
        "seconds_per_1000_images": 1000 * seconds / n_computed if n_computed else np.nan,
        "n_parameters": sum(p.numel() for p in backbone.network.parameters()),
        "n_features": X.shape[1],
        "imagenet_accuracy": candidate.accuracy,
    }
    return _Ranked(row, X)


def _side_by_side(a: _Ranked, b: _Ranked, folds: _Folds, scores: Sequence[str]) -> _Ranked:
    """Score the embeddings of two networks, side by side."""
    assert a.X is not None and b.X is not None
    no_logits = np.empty((len(a.X), 0))
    # So that both have a say in distances: networks differ in scale.
    X = np.hstack([one / (np.sqrt((one**2).sum(1).mean()) or 1.0) for one in (a.X, b.X)])
    row: dict[str, Any] = {"backbone": f"{a.row['backbone']} + {b.row['backbone']}"}
    row["weights"] = (a.row["weights"], b.row["weights"])
    for score in scores:
        row |= _score(score, X, no_logits, folds)
    for cost in ("seconds_per_1000_images", "n_parameters", "n_features"):
        row[cost] = a.row[cost] + b.row[cost]
    return _Ranked(row | {"imagenet_accuracy": np.nan})


def _scores_of_words(
    extractor: PretrainedFeatureExtractor,
    images: ImageSequence,
    folds: _Folds,
    scores: Sequence[str],
) -> dict[str, float]:
    """Score a network by its words for the labels: alone, on all images, or as labels add to them.

    Every image runs once, as the memory, perhaps one for the time being, has it for all folds.
    """
    shared = ZeroShotClassifier().get_params().keys() & extractor.get_params().keys()
    model = ZeroShotClassifier(**{name: getattr(extractor, name) for name in shared})
    model.set_params(prompts={label: str(label) for label in np.unique(folds.y).tolist()})
    row = {}
    with tempfile.TemporaryDirectory() as folder:
        model.set_params(memory=extractor.memory or folder)
        if "zero_shot" in scores:
            scorer = check_scoring(model, scoring=folds.metric)
            row["zero_shot"] = float(scorer(model, images, folds.y))
        if "few_shot" in scores:
            row |= _mean_and_std("few_shot", folds.score(model, images))
    return row


def _mean_and_std(name: str, values: np.ndarray) -> dict[str, float]:
    return {name: float(values.mean()), f"{name}_std": float(values.std())}


def _score(name: str, X: np.ndarray, logits: np.ndarray, folds: _Folds) -> dict[str, float]:
    """Return a score and, of a cross-validated one, its standard deviation over the folds."""
    with small_solve(X.size):
        return _solved_score(name, X, logits, folds)


def _solved_score(name: str, X: np.ndarray, logits: np.ndarray, folds: _Folds) -> dict[str, float]:
    if name in ("logme", "h_score"):
        return {name: (log_me_score if name == "logme" else h_score)(X, folds.y)}
    if name in _OF_WORDS:  # of what reads none
        return _mean_and_std(name, np.array([np.nan])) if name == "few_shot" else {name: np.nan}
    if name == "leep":
        known = logits.shape[1] > 0
        return {name: leep_score(softmax(logits, axis=1), folds.y) if known else np.nan}
    model: Any = KNeighborsClassifier(min(_NEIGHBORS, folds.n_train), metric="cosine")
    if name == "logistic":
        inner = Folds(min(3, folds.n_of_two_classes), random_state=folds.seed)
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        grid = {"logisticregression__C": _CS}
        model = GridSearchCV(pipeline, grid, cv=inner, scoring=folds.metric, error_score="raise")
    return _mean_and_std(name, folds.score(model, X))
