"""Compare classifiers on embeddings with pixels and the majority class, on repeated splits."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, clone
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import SVC, LinearSVC

from sktransfer._bars import tqdm
from sktransfer._cli.results import (
    ALL_LAYERS,
    LOGISTIC,
    METRICS,
    Best,
    Cost,
    Report,
    Result,
    best_of,
)
from sktransfer._cli.tasks import Task, load_elpv, load_folder, read_elpv
from sktransfer._estimators.fine_tuning import FineTunedClassifier
from sktransfer._estimators.pretrained import GOOD_FEATURES, PretrainedFeatureExtractor
from sktransfer._estimators.recipe import make_classifier
from sktransfer._splits import Folds, Split, hold_outs
from sktransfer._threads import search_in_threads
from sktransfer._training.cut import find_cut
from sktransfer.io import check_images
from sktransfer.model_selection import audit
from sktransfer.model_selection._comparison import (
    PIXELS,
    RowKernel,
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

SVM = "RBF SVM"

# ------------------------------------------------------------------------------ classifiers


def classifiers(n_images: int, rbf: Callable = rbf_kernel) -> dict[str, BaseEstimator]:
    """Return classifiers of normalised embeddings, each tuned inside its training split.

    `rbf(X, Y, gamma)` is the kernel of the support vector machine, of whatever it is fitted on.
    """
    neighbors = [k for k in (1, 5, 10, 20) if k <= n_images // 2]  # 2/3 of 3/4 are fitted at once
    # Matrix products, which are faster than the support vector machine's own loops.
    kernels = [partial(rbf, gamma=gamma) for gamma in (2, 4, 8)]
    grids: dict[str, tuple[Any, dict[str, Sequence[Any]]]] = {
        "k-NN": (KNeighborsClassifier(), {"n_neighbors": neighbors}),
        LOGISTIC: (LogisticRegression(max_iter=1000), {"C": [1, 10, 100]}),
        "linear SVM": (LinearSVC(), {"C": [0.1, 1, 10]}),
        SVM: (SVC(), {"C": [3, 10, 30], "kernel": kernels}),
    }
    options = {"cv": Folds(3), "n_jobs": -1}
    return {k: GridSearchCV(model, grid, **options) for k, (model, grid) in grids.items()}


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
    with_audit: bool = False,
    on_result: Callable[[Report], None] | None = None,
    **options: Any,
) -> Report:
    """Score every classifier on the embeddings of every backbone, or every freezing depth.

    The order is that of a reader's questions, as results are shown while others are computed. Is a
    network worth more than none? The first convention without a network, and on the last layer of
    the first backbone. Does more help? All layers, then the other backbones, of which each embeds
    the images when its turn comes.
    Is it so under another convention? The others follow, each in the same order.

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
    with_audit : bool, default=False
        Whether the images are audited as well, with the labels of the first convention, on what the
        first network has computed.
    on_result : callable, default=None
        It is called with the report after each result, which is the last of `report.results`.
    **options
        Further parameters of :class:`sktransfer.PretrainedFeatureExtractor` and, with `depths`,
        of :class:`sktransfer.FineTunedClassifier`.

    Returns
    -------
    Report
    """
    if n_splits < 1:
        raise ValueError(f"The number of splits must be at least 1, got {n_splits}.")
    report = Report(task, [], [], n_splits)
    with tempfile.TemporaryDirectory() as folder:
        options |= {"memory": memory or folder, "verbose": verbose}
        networks = _networks(task, backbones, depths, options)
        candidates = _candidates(task, networks, depths, random_state, options)
        for result in _results(task, candidates, bool(depths), n_splits, random_state, verbose):
            report.results.append(result)
            report.costs = [network.cost for network in networks if network.cost]
            if on_result:
                on_result(report)
        if fit_best:
            report.best = _fit_best(task, candidates, report.results)
        if with_audit:
            y = task.targets[report.results[0].convention]
            network = {"backbone": backbones[0], "random_state": random_state}
            report.findings = audit(task.images, y, task.groups, **network, **options)
    return report


def _networks(
    task: Task, backbones: Sequence[str], depths: Sequence[Any], options: dict[str, Any]
) -> list[_Network]:
    """Load each network: a wrong name or depth is an error now, not after an hour."""
    networks = []
    for name in backbones:
        extractor = PretrainedFeatureExtractor(name, **options)
        runner, _ = extractor.load_network()
        for depth in depths:
            find_cut(runner, depth)
        networks.append(_Network(extractor, task.images, has_blocks=bool(runner.block_names)))
    return networks


def _candidates(
    task: Task,
    networks: Sequence[_Network],
    depths: Sequence[Any],
    random_state: int,
    options: dict[str, Any],
) -> list[_Candidate]:
    """Return all that is to be compared, in the order in which `compare` says it is."""
    first = networks[0].name if networks else "none"
    candidates = _baselines(task, first, with_pixels=not depths)
    # Whole groups leave fewer images to tune on.
    n_images = len(task.images) // (1 if task.groups is None else 2)
    for network in networks:
        for layers, extractor in network.extractors.items():
            rows = partial(network.rows, layers)
            kernel = RowKernel(rows)
            models = classifiers(n_images, kernel.rbf)
            svm = {SVM: models[SVM]}
            # On wide rows the others take long.
            asked = {LOGISTIC: make_classifier()[1:], **svm} if layers else models
            table = network.name if depths else f"{network.name}{layers}"
            candidates += [
                _Candidate(
                    table,
                    network.name,
                    f"{name}{layers}",
                    model,
                    kernel.numbers if name == SVM else rows,
                    extractor=extractor,
                )
                for name, model in (svm if depths else asked).items()
            ]
        candidates += _depths(network.name, task.images, depths, random_state, options)
    return candidates


def _results(
    task: Task,
    candidates: Sequence[_Candidate],
    are_tuned: bool,
    n_splits: int,
    random_state: int,
    verbose: int,
) -> Iterator[Result]:
    """Yield each result as soon as it is known."""
    conventions = list(task.targets)[:1] if are_tuned else list(task.targets)
    total = len(conventions) * len(candidates) * n_splits
    with tqdm(total=total, desc="fits", unit="fit", disable=not verbose) as progress:
        for convention in conventions:
            y = task.targets[convention]
            splits = _splits_of(task, y, n_splits, random_state)
            for one in candidates:
                X = one.rows()
                with one.limited():
                    scored = _score(one.model, X, y, splits, task, progress)
                scored |= {"tests": [test for _, test in splits], "depth": one.depth}
                yield Result(convention, one.backbone, one.name, **scored, table=one.table)


def _splits_of(task: Task, y: np.ndarray, n_splits: int, random_state: int) -> list[Split]:
    """Return splits that leave all classes on both sides, stratified or in whole groups."""
    strata = y
    if task.strata is not None and task.groups is None:
        strata = np.char.add(np.char.add(y, "/"), task.strata)
    # Two groups of a class are left to tune with.
    splits = hold_outs(n_splits, 0.25, strata, "class", task.groups, random_state, n_left=2)
    for _, test in splits:
        if len(missed := np.setdiff1d(y, y[test])):
            raise ValueError(
                f"The groups can't be split so that {str(missed[0])!r} is scored on and all "
                "classes are learnt from: pass smaller groups, or none."
            )
    return splits


class _Candidate(NamedTuple):
    """A classifier, what it is fitted on, and what makes that of images, if it isn't images."""

    table: str
    backbone: str
    name: str
    model: Any
    rows: Callable[[], np.ndarray]
    depth: Any = None
    extractor: PretrainedFeatureExtractor | None = None

    def limited(self) -> AbstractContextManager[None]:
        """Return the limit of the threads that solve; a network's training has none.

        On wide rows, too, a logistic regression is no faster with more: see
        benchmarks/busy_machine.py.
        """
        return nullcontext() if self.depth is not None else search_in_threads()


def _baselines(task: Task, table: str, *, with_pixels: bool) -> list[_Candidate]:
    nothing = np.zeros((len(task.images), 1))
    baselines = [_Candidate(table, "none", "majority class", DummyClassifier(), lambda: nothing)]
    if with_pixels:
        pixels = cache(lambda: thumbnails(check_images(task.images)))
        name = f"RBF SVM on {PIXELS} × {PIXELS} pixels"
        baselines.append(_Candidate(table, "none", name, pixel_svm(PIXELS**2, n_jobs=-1), pixels))
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
            f"{backbone}, fine-tuned",
            backbone,
            f"fine-tuned, depth {depth}",
            FineTunedClassifier(backbone, **settings).set_params(unfreeze=depth),
            lambda: np.array(images),
            depth,
        )
        for depth in depths
    ]


class _Network:
    """Rows of the last layer and of all layers, by what names of classifiers on them end with.

    A network without blocks has the first only. The images are embedded when rows are first needed,
    and twice: the second time shows what the memory is worth.
    """

    def __init__(
        self, extractor: PretrainedFeatureExtractor, images: list[str], *, has_blocks: bool
    ) -> None:
        self.name, self.images, self.verbose = str(extractor.backbone), images, extractor.verbose
        self.extractors = {"": clone(extractor).set_params(normalize=True, verbose=0)}
        if has_blocks:
            self.extractors[ALL_LAYERS] = clone(extractor).set_params(**GOOD_FEATURES, verbose=0)
        self.cost: Cost | None = None
        self._rows: dict[str, np.ndarray] = {}

    def rows(self, layers: str) -> np.ndarray:
        if not self._rows:
            self._embed()
        return self._rows[layers]

    def _embed(self) -> None:
        *_, most = self.extractors.values()
        loud = clone(most).set_params(verbose=self.verbose)
        X, n_computed, seconds = embed(loud, check_images(self.images))
        start = time.perf_counter()
        rows = most.transform(self.images)
        second_seconds = time.perf_counter() - start
        sizes = len(self.images), n_computed, X.shape[1]
        self.cost = Cost(self.name, *sizes, seconds, second_seconds)
        self._rows = {
            layers: rows if one is most else one.transform(self.images)
            for layers, one in self.extractors.items()
        }


def _fit_best(task: Task, candidates: Sequence[_Candidate], results: Sequence[Result]) -> Best:
    """Fit the best that takes images, on all of them, tuned as in the comparison."""
    convention = results[0].convention
    of_networks = [r for r in results if r.backbone != "none" and r.convention == convention]
    best = best_of(of_networks)
    chosen = next(c for c in candidates if (c.backbone, c.name) == (best.backbone, best.classifier))
    X = chosen.rows()
    y = np.array([task.names.get(label, label) for label in task.targets[convention]])
    if chosen.extractor is None:
        model = clone(chosen.model).fit(X, y, groups=task.groups)
    else:
        with chosen.limited():
            classifier = _tuned(chosen.model, X, y, task.groups)
        steps = classifier if isinstance(classifier, Pipeline) else [classifier]
        model = make_pipeline(clone(chosen.extractor), *steps).fit(task.images, y)
    images_to_rows = model[0] if isinstance(model, Pipeline) else model
    images_to_rows.set_params(memory=None, verbose=0)  # of this run, not of those that load it
    return Best(best, model)


def _tuned(
    search: BaseEstimator, X: np.ndarray, y: np.ndarray, groups: np.ndarray | None
) -> BaseEstimator:
    """Return a classifier with the parameters that a search, if it is one, finds; not fitted.

    A kernel that is a function becomes the name of the same, which a model file may hold.
    """
    if not isinstance(search, GridSearchCV):
        return clone(search)
    parameters = clone(search).set_params(refit=False).fit(X, y, groups=groups).best_params_
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
    splits: Sequence[Split],
    task: Task,
    progress: tqdm,
) -> dict[str, Any]:
    """Fit and score on every split; the fields of a `Result`."""
    classes = np.unique(y)
    positive = (task.positive or str(classes[1])) if len(classes) == 2 else None
    scorer, results, n_trained = _Scorer(classes, positive), [], None
    for split in splits:
        result = fit_and_score(model, X, y, split, scorer, task.groups)
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
