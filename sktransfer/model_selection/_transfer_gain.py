"""When to transfer: a fine-tuned pretrained network against what needs no pretraining."""

from __future__ import annotations

import math
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
from scipy.stats import t as student
from sklearn.base import clone
from sklearn.dummy import DummyClassifier
from sklearn.utils import check_random_state
from tabulate import tabulate

from sktransfer._bars import tqdm
from sktransfer._estimators.base import Interval, StrOptions, validate_params
from sktransfer._estimators.fine_tuning import FineTunedClassifier
from sktransfer._splits import Folds, Split, check_groups
from sktransfer.io import ImageSequence, check_images
from sktransfer.model_selection._comparison import (
    PIXELS,
    check_labels,
    fit_and_score,
    pixel_svm,
    stratified_folds,
    thumbnails,
)
from sktransfer.models import get_model

BASELINES = {
    "scratch": "the same network from random weights",
    "pixels": f"an RBF SVM on {PIXELS} × {PIXELS} pixels",
    "majority": "the most frequent class",
}
_SCRATCH_LR = 1e-3
_SCRATCH_STEPS = 100  # at least, of training from random weights


@dataclass(repr=False)
class TransferGain:
    """What :func:`transfer_gain` found; printing it shows the table and the verdict.

    Attributes
    ----------
    verdict : str
        One paragraph: whether transfer helps, hurts, or whether that can't be told.
    gains : pandas.DataFrame
        One row an alternative without transfer, named in the index. `score`: the mean of its
        scores; `gain`: the mean of the differences, that of the pretrained network less its own;
        `low` and `high`: the interval of the gain; `transfer`: "helps" where the interval lies
        above 0, "hurts" where it lies below, else "unclear".
    scores : pandas.DataFrame
        One row a fold; a column for "transfer" and for each alternative.
    confidence_level : float
        Of the intervals.
    """

    verdict: str
    gains: Any = field(compare=False)
    scores: Any = field(compare=False)
    confidence_level: float

    def __str__(self) -> str:
        header = ["compared with", "score", "gain", f"{self.confidence_level:.0%} interval", ""]
        lines = [
            [
                f"{name}: {BASELINES[str(name)]}",
                f"{row.score:.3f}",
                f"{row.gain:+.3f}",
                f"{row.low:+.3f} to {row.high:+.3f}",
                row.transfer,
            ]
            for name, row in self.gains.iterrows()
        ]
        transfer = self.scores["transfer"]
        mean, deviation = transfer.mean(), transfer.std(ddof=0)
        verdict = textwrap.fill(self.verdict, 80, break_on_hyphens=False)
        title = f"transfer: {mean:.3f} ± {deviation:.3f} over {len(transfer)} folds"
        return f"{title}\n{tabulate(lines, header, disable_numparse=True)}\n{verdict}"

    __repr__ = __str__


@validate_params(
    {
        "backbone": [str],
        "baselines": [list, tuple, StrOptions(set(BASELINES))],
        "scratch": [dict, None],
        "scoring": [str, callable],
        "cv": ["cv_object"],
        "n_repeats": [Interval(Integral, 1, None, closed="left")],
        "confidence_level": [Interval(Real, 0, 1, closed="neither")],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    },
    prefer_skip_nested_validation=True,
)
def transfer_gain(
    X: Any,
    y: Any,
    *,
    backbone: str = "efficientnet_lite0",
    weights: Any = "default",
    unfreeze: Any = 1,
    baselines: Sequence[str] | str = ("scratch", "pixels", "majority"),
    scratch: dict[str, Any] | None = None,
    scoring: str | Callable[..., float] = "accuracy",
    cv: Any = 5,
    n_repeats: int = 2,
    groups: Any = None,
    confidence_level: float = 0.95,
    random_state: Any = None,
    memory: Any = None,
    image_shape: Any = None,
    verbose: int = 0,
    **parameters: Any,
) -> TransferGain:
    """Find out what a pretrained network is worth for a task, against what needs none.

    The network is fine-tuned on every training fold, and so is every alternative; the gain is the
    mean of the differences of their scores on the test folds.

    Parameters
    ----------
    X : sequence of images
        See :class:`sktransfer.PretrainedFeatureExtractor`.
    y : array-like of shape (n,)
        Labels of any type.
    backbone, weights, unfreeze : default="efficientnet_lite0", "default", 1
        The transfer: as of :class:`sktransfer.FineTunedClassifier`. A network by name, as
        there must be a way to have it with random weights.
    baselines : list of {"scratch", "pixels", "majority"}, default=all of them
        The alternatives. `"scratch"`: the same network, all of it trained from random weights;
        `"pixels"`: an RBF SVM on grey thumbnails of 32 × 32 pixels, tuned on the training fold;
        `"majority"`: the most frequent class, always.
    scratch : dict, default=None
        Parameters of :class:`sktransfer.FineTunedClassifier` in which training from scratch
        differs. It is by far the longest part, as nothing is frozen: ``{"image_size": 96}`` or
        fewer `max_epochs` make it affordable. Left out, `lr` is 1e-3, and `max_epochs` that of
        the transfer, or more, so that there are 100 steps at least.
    scoring : str or callable, default="accuracy"
        A scorer, or the name of one; the SVM has no probabilities.
    cv : int, splitter or iterable, default=5
        Folds; of a number of them, stratified and shuffled ones.
    n_repeats : int, default=2
        How often images are dealt out to that number of folds; a splitter says that itself.
    groups : array-like of shape (n,), default=None
        The group of each image, as of those of one patient or one part. A number of folds is then
        one of whole groups, as of :class:`sklearn.model_selection.StratifiedGroupKFold`; deals that
        come out as an earlier one are left out. A splitter gets them, and so do the networks and
        the SVM, which split what they are fitted on.
    confidence_level : float in (0, 1), default=0.95
        Of each interval by itself.
    random_state : int, RandomState instance or None, default=None
        Seed of the folds and of the training.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep the results of frozen blocks; None for a folder that lasts as long as the
        call, shared by the folds.
    image_shape : tuple, default=None
        As of :class:`sktransfer.FineTunedClassifier`.
    verbose : int, default=0
        1 shows a progress bar of the fits.
    **parameters
        Further parameters of :class:`sktransfer.FineTunedClassifier`, for both networks, such as
        `image_size`, `max_epochs` or `augment`.

    Returns
    -------
    TransferGain
        Its `verdict` says "Transfer helps" if the gain over every alternative has its interval
        above 0; "Transfer hurts (negative transfer)" if the gain over one of them has it below 0;
        else that it can't be told.

    Raises
    ------
    ValueError, TypeError
        For labels or images that can't be learnt from, or a network that has no random start.

    See Also
    --------
    rank_backbones : Which network to transfer.

    Notes
    -----
    Training folds overlap, so the differences of r repeated k folds are not independent, and a
    plain t-test finds gains where there are none. The interval is that of the corrected resampled
    t-test,

    .. math::

        \\bar d \\pm t_{J-1} \\sqrt{\\left(\\frac{1}{J} + \\frac{n_{test}}{n_{train}}\\right) s^2}

    over the :math:`J = rk` differences d of variance s². It was derived for random splits, and is
    used for repeated folds as well. It speaks of other training sets of this size from the same
    source, not of a new camera.

    References
    ----------
    Nadeau and Bengio, "Inference for the generalization error" (2003). Bouckaert and Frank,
    "Evaluating the replicability of significance tests for comparing learning algorithms" (2004),
    for repeated folds. Wang, Dai, Póczos and Carbonell, "Characterizing and avoiding negative
    transfer" (2019).

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer.model_selection import transfer_gain
    >>> china, flower = load_sample_images().images                  # two arrays (427, 640, 3)
    >>> X = [photo[:, left : left + 80] for photo in (china, flower) for left in range(0, 640, 80)]
    >>> y = ["china"] * 8 + ["flower"] * 8
    >>> gain = transfer_gain(
    ...     X, y, unfreeze=0, image_size=64, baselines=["majority"], cv=4, random_state=0
    ... )
    >>> print(gain.verdict.partition(":")[0])
    Transfer helps
    """
    import pandas

    names = (baselines,) if isinstance(baselines, str) else tuple(baselines)
    if not names or set(names) - set(BASELINES):
        raise ValueError(f"baselines={list(names)!r}: pass some of {', '.join(BASELINES)}.")
    images = check_images(X, image_shape=image_shape)
    y = check_labels(y, images, "transfer_gain")
    groups = check_groups(groups, len(images))
    seed = check_random_state(random_state).randint(2**31 - 1)
    splitter = cv
    if isinstance(cv, Integral):
        splitter = Folds(int(cv), random_state=seed, n_repeats=n_repeats)
    splits = stratified_folds(splitter, y, cv, groups)
    if len(splits) < 2:
        raise ValueError("cv has one fold only: an interval takes at least 2.")
    with tempfile.TemporaryDirectory() as folder:
        model = FineTunedClassifier(
            backbone,
            weights=weights,
            unfreeze=unfreeze,
            memory=memory or folder,
            random_state=seed,
            **parameters,
        )
        models = {"transfer": (model, images)}
        n_train = min(len(train) for train, _ in splits)
        models |= {name: _baseline(name, model, scratch, images, n_train) for name in names}
        scores = pandas.DataFrame(_score(models, y, splits, groups, scoring, verbose))
    share = float(np.mean([len(test) / len(train) for train, test in splits]))
    gains = pandas.DataFrame(
        {name: _gain(scores, name, share, confidence_level) for name in names}
    ).T.infer_objects()
    return TransferGain(_verdict(scores, gains), gains, scores, confidence_level)


def _baseline(
    name: str,
    model: FineTunedClassifier,
    scratch: dict[str, Any] | None,
    images: ImageSequence,
    n_train: int,
) -> tuple[Any, Any]:
    """Return an alternative to the transfer, and what it is fitted on."""
    if name == "majority":
        return DummyClassifier(), np.zeros((len(images), 1))
    if name == "pixels":
        X = thumbnails(images)
        return pixel_svm(X.shape[1]), X
    start = get_model(model.backbone, None)
    if start.fingerprint == get_model(model.backbone, model.weights).fingerprint:
        raise ValueError(
            f"backbone={model.backbone!r} with weights={model.weights!r} has the weights that it "
            "has with weights=None: there is nothing to transfer, or its builder ignores "
            "`weights`. Name pretrained weights, or leave 'scratch' out of baselines."
        )
    n_at_once = 32 if isinstance(model.batch_size, str) else model.batch_size
    steps = math.ceil(_SCRATCH_STEPS * n_at_once / n_train)
    options = {"lr": _SCRATCH_LR, "max_epochs": max(model.max_epochs, steps), **(scratch or {})}
    return clone(model).set_params(weights=None, unfreeze="all", **options), images


def _score(
    models: dict[str, tuple[Any, Any]],
    y: np.ndarray,
    splits: Sequence[Split],
    groups: np.ndarray | None,
    scoring: Any,
    verbose: int,
) -> dict[str, list[float]]:
    """Fit and score every model on every split."""
    scores: dict[str, list[float]] = {name: [] for name in models}
    total = len(models) * len(splits)
    with tqdm(total=total, desc="fits", unit="fit", disable=not verbose) as progress:
        for split in splits:
            for name, (model, X) in models.items():
                progress.set_postfix_str(name)
                result = fit_and_score(model, X, y, split, scoring, groups)
                scores[name].append(float(result["test_score"]))
                progress.update()
    return scores


def corrected_interval(
    differences: np.ndarray, test_share: float, confidence_level: float
) -> tuple[float, float]:
    """Return the interval of the corrected resampled t-test of Nadeau and Bengio (2003).

    Parameters
    ----------
    differences : ndarray of shape (n_splits,)
    test_share : float
        Test rows of a split for each training row.
    confidence_level : float
    """
    n = len(differences)
    mean = differences.mean()
    error = math.sqrt((1 / n + test_share) * differences.var(ddof=1))
    half = student.ppf((1 + confidence_level) / 2, n - 1) * error
    return float(mean - half), float(mean + half)


def _gain(scores: Any, name: str, share: float, confidence_level: float) -> dict[str, Any]:
    """Return a row of `TransferGain.gains`."""
    differences = (scores["transfer"] - scores[name]).to_numpy()
    low, high = corrected_interval(differences, share, confidence_level)
    transfer = "helps" if low > 0 else "hurts" if high < 0 else "unclear"
    gain = differences.mean()
    score = scores[name].mean()
    return {"score": score, "gain": gain, "low": low, "high": high, "transfer": transfer}


def _verdict(scores: Any, gains: Any) -> str:
    """Say in words what the intervals say."""
    transfer = f"with transfer the score is {scores['transfer'].mean():.3f}"

    def against(rows: Any) -> str:
        return "; ".join(
            f"against {name} ({row.score:.3f}) the gain is {row.gain:+.3f} "
            f"({row.low:+.3f} to {row.high:+.3f})"
            for name, row in rows.iterrows()
        )

    hurt = gains[gains.transfer == "hurts"]
    unclear = gains[gains.transfer == "unclear"]
    if len(hurt):
        return f"Transfer hurts (negative transfer): {transfer}; {against(hurt)}."
    if len(unclear):
        return (
            f"It can't be told whether transfer helps: {transfer}; {against(unclear)}. More images "
            "narrow the interval, and so do more repeats, a little."
        )
    return f"Transfer helps: {transfer}; {against(gains)}."
