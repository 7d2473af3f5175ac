"""Compare classifiers on embeddings with pixels and the majority class, on repeated splits."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, clone
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import SVC, LinearSVC

from sktransfer._bars import tqdm
from sktransfer._cli.results import METRICS, Best, Cost, Report, Result, best_of
from sktransfer._cli.tasks import Task, load_elpv, load_folder, read_elpv
from sktransfer._estimators.fine_tuning import FineTunedClassifier
from sktransfer._estimators.pretrained import (
    GOOD_FEATURES,
    PretrainedFeatureExtractor,
    make_classifier,
)
from sktransfer._threads import small_solve
from sktransfer._training.cut import find_cut
from sktransfer.io import check_images
from sktransfer.model_selection._comparison import (
    PIXELS,
    embed,
    fit_and_score,
    pixel_svm,
    rbf_kernel,
    thumbnails,
)

__all__ = [
    "Task",
    "classifiers",
    "compare",
    "load_elpv",
    "load_folder",
    "read_elpv",
]


# ------------------------------------------------------------------------------ classifiers


def classifiers(n_images: int) -> dict[str, BaseEstimator]:
    """Return classifiers of normalised embeddings, each tuned inside its training split."""
    neighbors = [k for k in (1, 5, 10, 20) if k <= n_images // 2]  # 2/3 of 3/4 are fitted at once
    # Matrix products, which take a tenth of the time of the support vector machine's own loops.
    kernels = [partial(rbf_kernel, gamma=gamma) for gamma in (2, 4, 8)]
    grids: dict[str, tuple[Any, dict[str, Sequence[Any]]]] = {
        "k-NN": (KNeighborsClassifier(), {"n_neighbors": neighbors}),
        "logistic regression": (LogisticRegression(max_iter=1000), {"C": [1, 10, 100]}),
        "linear SVM": (LinearSVC(), {"C": [0.1, 1, 10]}),
        "RBF SVM": (SVC(), {"C": [3, 10, 30], "kernel": kernels}),
    }
    return {k: GridSearchCV(model, grid, cv=3, n_jobs=-1) for k, (model, grid) in grids.items()}


# ------------------------------------------------------------------------------ the comparison


def compare(
    task: Task,
    backbones: Sequence[str] = ("efficientnet_lite0",),
    *,
    depths: Sequence[Any] = (),
    n_splits: int = 5,
    memory: str | None = None,
    random_state: int = 0,
    verbose: int = 0,
    fit_best: bool = False,
    **options: Any,
) -> Report:
    """Score every classifier on the embeddings of every backbone, or every freezing depth.

    Parameters
    ----------
    task : Task
    backbones : sequence of str
        Names of :func:`sktransfer.list_models`.
    depths : sequence of int or str
        Values of `unfreeze`: then the backbones are fine-tuned to these depths, under the first
        convention alone, and compared with an RBF SVM.
    n_splits : int, default=5
        Random splits, a quarter of the images for the test.
    memory : str or None, default=None
        Folder that keeps embeddings; None for one that lasts as long as the comparison.
    random_state : int, default=0
        Of the splits.
    verbose : int, default=0
        1 shows progress bars.
    fit_best : bool, default=False
        Whether the most accurate classifier on a network, under the first convention, is fitted
        once more on all images, as an estimator that takes images.
    **options
        Further parameters of :class:`sktransfer.PretrainedFeatureExtractor` and, with `depths`,
        of :class:`sktransfer.FineTunedClassifier`.

    Returns
    -------
    Report
    """
    if n_splits < 1:
        raise ValueError(f"The number of splits must be at least 1, got {n_splits}.")
    with tempfile.TemporaryDirectory() as folder:
        options |= {"memory": memory or folder, "verbose": verbose}
        candidates, costs = _candidates(task, backbones, depths, random_state, options)
        results = _results(task, candidates, bool(depths), n_splits, random_state, verbose)
        best = _fit_best(task, candidates, results) if fit_best else None
    return Report(task, results, costs, n_splits, best)


def _candidates(
    task: Task,
    backbones: Sequence[str],
    depths: Sequence[Any],
    random_state: int,
    options: dict[str, Any],
) -> tuple[list[_Candidate], list[Cost]]:
    """Embed the images; return all that is to be compared, and what the embeddings cost."""
    for name in backbones if depths else ():
        runner, _ = PretrainedFeatureExtractor(name, **options).load_network()
        for depth in depths:
            find_cut(runner, depth)  # a wrong one is an error now, not after an hour
    costs, candidates = [], _baselines(task, with_pixels=not depths)
    for name in backbones:
        representations, cost = _embed(PretrainedFeatureExtractor(name, **options), task.images)
        costs.append(cost)
        models = classifiers(len(task.images))
        for layers, (X, extractor) in representations.items():
            # On wide rows the others take long.
            asked = {"logistic regression": make_classifier()[1:]} if layers else models
            asked = asked | {"RBF SVM": models["RBF SVM"]}
            asked = {"RBF SVM": models["RBF SVM"]} if depths else asked
            candidates += [
                _Candidate(name, f"{k}{layers}", model, X, extractor=extractor)
                for k, model in asked.items()
            ]
        candidates += _depths(name, task.images, depths, random_state, options)
    return candidates, costs


def _results(
    task: Task,
    candidates: Sequence[_Candidate],
    are_tuned: bool,
    n_splits: int,
    random_state: int,
    verbose: int,
) -> list[Result]:
    conventions = list(task.targets)[:1] if are_tuned else list(task.targets)
    results = []
    total = len(conventions) * len(candidates) * n_splits
    with tqdm(total=total, desc="fits", unit="fit", disable=not verbose) as progress:
        for convention in conventions:
            y = task.targets[convention]
            strata = y if task.groups is None else np.char.add(np.char.add(y, "/"), task.groups)
            splitter = StratifiedShuffleSplit(n_splits, test_size=0.25, random_state=random_state)
            splits = list(splitter.split(strata, strata))
            for one in candidates:
                with one.limited():
                    scored = _score(one.model, one.X, y, splits, task.positive, progress)
                scored |= {"tests": [test for _, test in splits], "depth": one.depth}
                results.append(Result(convention, one.backbone, one.name, **scored))
    return results


class _Candidate(NamedTuple):
    """A classifier, what it is fitted on, and what makes that of images, if it isn't images."""

    backbone: str
    name: str
    model: Any
    X: np.ndarray
    depth: Any = None
    extractor: PretrainedFeatureExtractor | None = None

    def limited(self) -> AbstractContextManager[None]:
        """Return the limit of the threads that solve; a network's training has none."""
        return nullcontext() if self.depth is not None else small_solve(self.X.size)


def _baselines(task: Task, *, with_pixels: bool) -> list[_Candidate]:
    nothing = np.zeros((len(task.images), 1))
    baselines = [_Candidate("none", "majority class", DummyClassifier(), nothing)]
    if with_pixels:
        pixels = thumbnails(check_images(task.images))
        name = f"RBF SVM on {PIXELS} × {PIXELS} pixels"
        baselines.append(_Candidate("none", name, pixel_svm(pixels.shape[1], n_jobs=-1), pixels))
    return baselines


def _depths(
    backbone: str,
    images: list[str],
    depths: Sequence[Any],
    random_state: int,
    options: dict[str, Any],
) -> list[_Candidate]:
    settings = {**options, "random_state": random_state, "verbose": 0}
    return [
        _Candidate(
            backbone,
            f"fine-tuned, depth {depth}",
            FineTunedClassifier(backbone, **settings).set_params(unfreeze=depth),
            np.array(images),
            depth,
        )
        for depth in depths
    ]


def _embed(
    extractor: PretrainedFeatureExtractor, images: list[str]
) -> tuple[dict[str, tuple[np.ndarray, PretrainedFeatureExtractor]], Cost]:
    """Return rows of the last layer and of all layers, by what their names end with, and by whom.

    A network without blocks has the first only. The images are embedded twice: the second time
    shows what the memory is worth.
    """
    extractors = {"": clone(extractor).set_params(normalize=True, verbose=0)}
    if extractor.load_network()[0].block_names:
        extractors[", all layers"] = clone(extractor).set_params(**GOOD_FEATURES, verbose=0)
    *_, most = extractors.values()
    X, n_computed, seconds = embed(
        clone(most).set_params(verbose=extractor.verbose), check_images(images)
    )
    start = time.perf_counter()
    rows = most.transform(images)
    second_seconds = time.perf_counter() - start
    cost = Cost(
        str(extractor.backbone), len(images), n_computed, X.shape[1], seconds, second_seconds
    )
    return {k: (rows if e is most else e.transform(images), e) for k, e in extractors.items()}, cost


def _fit_best(task: Task, candidates: Sequence[_Candidate], results: Sequence[Result]) -> Best:
    """Fit the best that takes images, on all of them, tuned as in the comparison."""
    convention = results[0].convention
    of_networks = [r for r in results if r.backbone != "none" and r.convention == convention]
    best = best_of(of_networks)
    chosen = next(c for c in candidates if (c.backbone, c.name) == (best.backbone, best.classifier))
    y = np.array([task.names.get(label, label) for label in task.targets[convention]])
    if chosen.extractor is None:
        model = clone(chosen.model).fit(chosen.X, y)
    else:
        with chosen.limited():
            classifier = _tuned(chosen.model, chosen.X, y)
        steps = classifier if isinstance(classifier, Pipeline) else [classifier]
        model = make_pipeline(clone(chosen.extractor), *steps).fit(task.images, y)
    images_to_rows = model[0] if isinstance(model, Pipeline) else model
    images_to_rows.set_params(memory=None, verbose=0)  # of this run, not of those that load it
    return Best(best, model)


def _tuned(search: BaseEstimator, X: np.ndarray, y: np.ndarray) -> BaseEstimator:
    """Return a classifier with the parameters that a search, if it is one, finds; not fitted.

    A kernel that is a function becomes the name of the same, which a model file may hold.
    """
    if not isinstance(search, GridSearchCV):
        return clone(search)
    parameters = clone(search).set_params(refit=False).fit(X, y).best_params_
    if callable(kernel := parameters.get("kernel")):
        parameters |= {"kernel": "rbf", "gamma": kernel.keywords["gamma"]}
    return clone(search.estimator).set_params(**parameters)


class _Scorer:
    """Scores fitted classifiers, and keeps what they said of the test images of each split."""

    def __init__(self, classes: np.ndarray, positive: Any) -> None:
        self.classes, self.positive = classes, positive
        self.y_true: list[np.ndarray] = []
        self.y_pred: list[np.ndarray] = []
        self.y_score: list[np.ndarray] = []

    def __call__(self, fitted: Any, X: Any, y: np.ndarray) -> dict[str, float]:
        predicted, scores = fitted.predict(X), _scores(fitted, X, self.positive)
        self.y_true.append(y)
        self.y_pred.append(predicted)
        self.y_score.append(scores)
        return _metrics(y, predicted, scores, self.classes, self.positive)


def _score(
    model: Any,
    X: np.ndarray,
    y: np.ndarray,
    splits: Sequence[tuple],
    positive: Any,
    progress: tqdm,
) -> dict[str, Any]:
    """Fit and score on every split; the fields of a `Result`."""
    classes = np.unique(y)
    positive = (positive or str(classes[1])) if len(classes) == 2 else None
    scorer, results, n_trained = _Scorer(classes, positive), [], None
    for split in splits:
        result = fit_and_score(model, X, y, split, scorer)
        n_trained = getattr(result.pop("estimator"), "n_trainable_parameters_", None)
        results.append(result)
        progress.update()
    return {
        "scores": {m: np.array([result[f"test_{m}"] for result in results]) for m in METRICS},
        "fit_seconds": np.array([result["fit_time"] for result in results]),
        "y_true": scorer.y_true,
        "y_pred": scorer.y_pred,
        "y_score": scorer.y_score,
        "classes": classes,
        "positive": positive,
        "n_trained": n_trained,
    }


def _scores(fitted: Any, X: np.ndarray, positive: Any) -> np.ndarray:
    """Return one score an image for two classes, else one a class that sum to 1."""
    has_decision = hasattr(fitted, "decision_function")
    raw = fitted.decision_function(X) if has_decision else fitted.predict_proba(X)
    if positive is None:
        return softmax(raw, axis=1) if has_decision else raw
    score = raw if raw.ndim == 1 else raw[:, 1] - raw[:, 0]
    return score if positive == fitted.classes_[1] else -score


def _metrics(
    y: Any, predicted: Any, score: Any, classes: np.ndarray, positive: Any
) -> dict[str, float]:
    if positive is not None:
        f1 = f1_score(y, predicted, pos_label=positive, zero_division=0)
        auc = roc_auc_score(y == positive, score)
    else:
        f1 = f1_score(y, predicted, average="macro", zero_division=0)
        auc = roc_auc_score(y, score, multi_class="ovr", labels=classes)
    return {
        "accuracy": accuracy_score(y, predicted),
        "balanced_accuracy": balanced_accuracy_score(y, predicted),
        "f1": f1,
        "roc_auc": auc,
    }
