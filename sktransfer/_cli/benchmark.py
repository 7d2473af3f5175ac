"""Compare classifiers on embeddings with pixels and the majority class, on repeated splits."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC, LinearSVC
from tqdm.auto import tqdm

from sktransfer._escaping import escape
from sktransfer._estimators.fine_tuning import FineTunedClassifier
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor
from sktransfer._training.cut import find_cut
from sktransfer.io import check_images, load_image_folder
from sktransfer.model_selection._comparison import (
    PIXELS,
    embed,
    fit_and_score,
    name_rare_classes,
    pixel_svm,
    thumbnails,
)

_ON_ALL_LAYERS = ("logistic regression", "RBF SVM")  # the best two; others take long on wide rows
METRICS = ("accuracy", "balanced_accuracy", "f1", "roc_auc")


@dataclass
class Task:
    """Images with labels, under one or several conventions of what the labels are.

    Parameters
    ----------
    name : str
    images : list of str
        Paths.
    targets : dict of str to ndarray of shape (n,)
        The labels under each convention.
    groups : ndarray of shape (n,) or None
        Splits are stratified by label and, if given, by this as well.
    published : list of dict
        Figures of others: `convention`, `classifier`, and those of `METRICS` that they give.
    note : str
        Source and licence.
    positive : str or None
        Of two classes, the one that F1 and the ROC curve are about; None for the second.
    """

    name: str
    images: list[str]
    targets: dict[str, np.ndarray]
    groups: np.ndarray | None = None
    published: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    positive: str | None = None


@dataclass
class Result:
    """One classifier on one representation under one convention, over all splits."""

    convention: str
    backbone: str
    classifier: str
    scores: dict[str, np.ndarray]  # metric: one value a split
    fit_seconds: np.ndarray  # one value a split, tuning included
    y_true: list[np.ndarray] = field(repr=False)  # of the test images of each split
    y_pred: list[np.ndarray] = field(repr=False)
    y_score: list[np.ndarray] = field(repr=False)  # (n,) for two classes, else (n, n_classes)
    classes: np.ndarray = field(repr=False)
    positive: Any = None  # of two classes, the one that F1 and ROC are about
    depth: Any = None  # of a fine-tuned network, `unfreeze`
    n_trained: int | None = None  # its trained parameters


@dataclass
class Cost:
    """What embedding all images cost, and what it costs again with a memory."""

    backbone: str
    n_images: int
    n_computed: int  # fewer than n_images if the memory knew some
    n_features: int
    seconds: float
    second_seconds: float


@dataclass
class Report:
    """All that a comparison found."""

    task: Task
    results: list[Result]
    costs: list[Cost]
    n_splits: int


# ------------------------------------------------------------------------------ tasks


def read_elpv() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the paths of the ELPV solar cells, their probabilities, and their module types.

    2,624 electroluminescence photographs, 300 × 300 pixels. Deitsch et al., "Automatic
    classification of defective photovoltaic module cells in electroluminescence images", Solar
    Energy 185 (2019). Experts gave each cell a probability p of being defective: 0, 1/3, 2/3 or 1.
    """
    try:
        import elpv_dataset
    except ImportError as error:
        raise ImportError(
            "The ELPV solar cells come with an extra: pip install 'sktransfer[demo]'. "
            "Or name a folder of your own with one subfolder of images a class."
        ) from error
    data = Path(elpv_dataset.__file__).parent / "data"
    table = [line.split() for line in (data / "labels.csv").read_text().splitlines() if line]
    paths, probability, kinds = zip(*table, strict=True)
    return [str(data / path) for path in paths], np.array(probability, float), np.array(kinds)


def load_elpv() -> Task:
    """Make a task of the ELPV solar cells, by two conventions of which cells are defective."""
    paths, probability, kinds = read_elpv()
    return Task(
        "ELPV solar cells",
        paths,
        {
            f"defective: p > {threshold}": np.where(probability > threshold, "defective", "sound")
            for threshold in (0.5, 0)
        },
        kinds,
        [
            {
                "convention": "defective: p > 0.5",
                "classifier": f"Deitsch et al. 2019, {classifier} (published)",
                "accuracy": accuracy,
                "roc_auc": auc,
            }
            for classifier, accuracy, auc in (
                ("SVM on features", 0.824, 0.885),
                ("fine-tuned VGG-19", 0.884, 0.944),
            )
        ],
        "Images: elpv-dataset, CC BY-NC-SA 4.0. Splits 75/25, stratified by label and module "
        "type. The published figures are of one split of the authors' own, and count p = 1/3 as "
        "positive with weight 0.33.",
        "defective",
    )


def load_folder(folder: str) -> Task:
    """Make a task of a folder with one subfolder of images a class, names escaped to be shown."""
    data = load_image_folder(folder)
    names = data.target_names
    labels = np.array([escape(name) for name in data.target])
    if len(names) < 2 or (rare := name_rare_classes(data.target, 8)):
        few = rare if len(names) > 1 else f"one class, {names[0]!r}"
        raise ValueError(
            f"{folder!r}: only {few}. A comparison needs at least two classes of 8 images each: "
            "add images, or remove the folders of small classes."
        )
    return Task(escape(Path(folder).resolve().name), list(data.data), {"": labels})


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
        results, costs = _results(task, backbones, depths, n_splits, random_state, options)
    return Report(task, results, costs, n_splits)


def _results(
    task: Task,
    backbones: Sequence[str],
    depths: Sequence[Any],
    n_splits: int,
    random_state: int,
    options: dict[str, Any],
) -> tuple[list[Result], list[Cost]]:
    for name in backbones if depths else ():
        runner, _ = PretrainedFeatureExtractor(name, **options).load_network()
        for depth in depths:
            find_cut(runner, depth)  # a wrong one is an error now, not after an hour
    costs, candidates = [], _baselines(task, with_pixels=not depths)
    for name in backbones:
        rows, cost = _embed(PretrainedFeatureExtractor(name, **options), task.images)
        costs.append(cost)
        models = classifiers(len(task.images))
        for layers, X in rows.items():
            asked = [k for k in models if k in _ON_ALL_LAYERS or not layers]
            asked = ["RBF SVM"] if depths else asked
            candidates += [_Candidate(name, f"{k}{layers}", models[k], X) for k in asked]
        candidates += _depths(name, task.images, depths, random_state, options)
    conventions = list(task.targets)[:1] if depths else list(task.targets)
    results = []
    total = len(conventions) * len(candidates) * n_splits
    with tqdm(total=total, desc="fits", unit="fit", disable=not options["verbose"]) as progress:
        for convention in conventions:
            y = task.targets[convention]
            strata = y if task.groups is None else np.char.add(np.char.add(y, "/"), task.groups)
            splitter = StratifiedShuffleSplit(n_splits, test_size=0.25, random_state=random_state)
            splits = list(splitter.split(strata, strata))
            for one in candidates:
                scored = _score(one.model, one.X, y, splits, task.positive, progress)
                results.append(
                    Result(convention, one.backbone, one.name, **scored, depth=one.depth)
                )
    return results, costs


class _Candidate(NamedTuple):
    """A classifier, and what it is fitted on."""

    backbone: str
    name: str
    model: Any
    X: np.ndarray
    depth: Any = None


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
            f"fine-tuned, unfreeze={depth!r}",
            FineTunedClassifier(backbone, **settings).set_params(unfreeze=depth),
            np.array(images),
            depth,
        )
        for depth in depths
    ]


def _embed(
    extractor: PretrainedFeatureExtractor, images: list[str]
) -> tuple[dict[str, np.ndarray], Cost]:
    """Return the rows of the last layer and of all layers, by what their names end with.

    A network without blocks has the first only. The images are embedded twice: the second time
    shows what the memory is worth.
    """
    asked: dict[str, dict[str, Any]] = {"": {}}
    if extractor.load_network()[0].block_names:
        asked[", all layers"] = {"layer": "all", "pooling": ("avg", "max")}
    *_, most = asked.values()
    X, n_computed, seconds = embed(extractor.set_params(**most), check_images(images))
    extractor.set_params(verbose=0, normalize=True)
    start = time.perf_counter()
    extractor.transform(images)
    cost = Cost(
        str(extractor.backbone),
        len(images),
        n_computed,
        X.shape[1],
        seconds,
        time.perf_counter() - start,
    )
    last = {"layer": "auto", "pooling": "avg"}
    rows = {k: extractor.set_params(**(last | v)).transform(images) for k, v in asked.items()}
    return rows, cost


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
