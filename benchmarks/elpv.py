"""Classifiers on embeddings of the ELPV solar cells: the tables of the documentation.

`--part comparison`: the same as `sktransfer benchmark`, with more of them: whole cells beside the
usual crop of the center, and the four probabilities of the experts as classes.

`--part quarters`: as a check for leakage between cells of one module, contiguous quarters of the
list: the cells come from 44 modules whose ids are not published, but neighbours in the list come
from one module.

`--part probabilities`: on all layers of the last network named, so of whole cells unless `--whole`
is 0: classifiers of p > 0.5 that learn from the four probabilities as well, and which of them each
split chooses inside its training part.
"""

import argparse
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from _common import environment, quarters, say, table, without_crop
from sklearn.base import clone, is_regressor
from sklearn.ensemble import BaggingClassifier
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import SVC, SVR
from tqdm.auto import tqdm

from sktransfer import PretrainedFeatureExtractor
from sktransfer._cli import benchmark as _benchmark
from sktransfer._cli import report as _report
from sktransfer.model_selection._comparison import rbf_kernel

PARTS = ("comparison", "quarters", "probabilities")
CONVENTION = "defective: p > 0.5"
PROBABILITIES = "the four probabilities"
ALL = {"layer": "all", "pooling": ("avg", "max")}


def contiguous(task: _benchmark.Task, backbone: str, memory: str | None) -> list[dict[str, str]]:
    """Score on four contiguous quarters, by the last layer and by all layers."""
    y, splits, rows = task.targets[CONVENTION], list(quarters(task.strata)), []
    for layers, options in {"last": {}, "all": ALL}.items():
        extractor = PretrainedFeatureExtractor(backbone, normalize=True, memory=memory, **options)
        X = extractor.transform(task.images)
        models = _benchmark.classifiers(len(y))
        for name in models if layers == "last" else ("logistic regression", "RBF SVM"):
            with tqdm(disable=True) as progress:
                found = _benchmark._score(models[name], X, y, splits, task, progress)
            row = {"backbone": backbone, "layers": layers, "classifier": name}
            for metric in ("accuracy", "roc_auc"):
                values = found["scores"][metric]
                row[metric] = f"{values.mean():.3f} ± {values.std():.3f}"
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------ probabilities

# Models, grids, candidates and the criterion were fixed before any was scored on a test part.
KERNELS = [partial(rbf_kernel, gamma=gamma) for gamma in (2, 4, 8)]
OF_CLASSES = {"C": [3, 10, 30], "kernel": KERNELS}
OF_VALUES = {"C": [0.3, 1, 3, 10], "epsilon": [0.05, 0.15, 0.25], "kernel": KERNELS}
CANDIDATES = {  # of which models the mean output counts
    "SVC of two classes": ["SVC"],
    "SVC, cells of 1/3 and 2/3 weigh a third": ["weighted SVC"],
    "SVR of the probabilities": ["SVR"],
    "SVC and SVR": ["SVC", "SVR"],
    "weighted SVC and SVR": ["weighted SVC", "SVR"],
    "ten bagged SVC": ["bagged SVC"],
}


class NoRowLeftOut(SVC):
    """An SVC of weights above 0: else scikit-learn mixes up the rows of kernels as functions."""

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray) -> SVC:
        return super().fit(X, y, sample_weight.clip(1e-6))


def _output(model: Any, X: np.ndarray) -> np.ndarray:
    """Return values above 0 for the cells that a model takes for defective."""
    return model.predict(X) - 0.5 if is_regressor(model) else model.decision_function(X)


def _scores(output: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return accuracy and ROC AUC."""
    is_defective = p > 0.5
    accuracy = accuracy_score(is_defective, output > 0)
    return np.array([accuracy, roc_auc_score(is_defective, output)])


def _criterion(model: Any, X: np.ndarray, p: np.ndarray, sample_weight: Any = None) -> float:
    """Return the sum of accuracy and ROC AUC; here all cells weigh the same."""
    return float(_scores(_output(model, X), p).sum())


def _learn(
    X: np.ndarray, p: np.ndarray, test: np.ndarray
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the criterion of each candidate in three folds, and its output for other rows.

    All is tuned by the criterion in the same folds. Outputs are divided by their standard deviation
    in the folds before they are averaged.
    """
    is_defective, ones, certainty = (p > 0.5).astype(float), np.ones(len(p)), np.abs(2 * p - 1)
    folds = list(StratifiedKFold(3).split(X, is_defective))
    held_out, outputs = {}, {}

    def tune(name: str, model: Any, grid: dict, y: np.ndarray, weights: np.ndarray) -> Any:
        search = GridSearchCV(model, grid, scoring=_criterion, cv=folds)
        best = search.fit(X, y, sample_weight=weights).best_estimator_
        in_folds = np.empty(len(p))
        for learnt, rest in folds:
            fitted = clone(best).fit(X[learnt], y[learnt], weights[learnt])
            in_folds[rest] = _output(fitted, X[rest])
        held_out[name] = in_folds / in_folds.std()
        outputs[name] = _output(best, test) / in_folds.std()
        return best

    svc = tune("SVC", SVC(), OF_CLASSES, is_defective, ones)
    tune("weighted SVC", SVC(), OF_CLASSES, is_defective, certainty)
    tune("SVR", SVR(), OF_VALUES, p, ones)
    bagged = BaggingClassifier(NoRowLeftOut(**svc.get_params()), random_state=0)
    tune("bagged SVC", bagged, {"max_samples": [0.5, 1.0]}, is_defective, ones)
    criteria, means = {}, {}
    for candidate, names in CANDIDATES.items():
        mean = np.mean([held_out[name] for name in names], axis=0)
        of_folds = [_scores(mean[rest], p[rest]).sum() for _, rest in folds]
        criteria[candidate] = float(np.mean(of_folds))
        means[candidate] = np.mean([outputs[name] for name in names], axis=0)
    return criteria, means


def probabilities(
    X: np.ndarray, p: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[dict[str, str]]:
    """Score candidates, and the one that each split chooses inside its training part."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in [*CANDIDATES, "chosen"]}
    criteria, choices = [], []
    for number, (train, test) in enumerate(splits):
        of_split, outputs = _learn(X[train], p[train], X[test])
        criteria.append(of_split)
        choices.append(max(of_split, key=lambda name: of_split[name]))
        for name in found:
            output = outputs[choices[-1] if name == "chosen" else name]
            found[name].append(_scores(output, p[test]))
        say(f"  split {number + 1} of {len(splits)}")
    rows = []
    for name, scores in found.items():
        (accuracy, auc), (spread, auc_spread) = np.mean(scores, axis=0), np.std(scores, axis=0)
        row = {"classifier": name}
        row |= {f"{i + 1}": f"{each[0]:.3f} ({each[1]:.3f})" for i, each in enumerate(scores)}
        row["mean"] = f"{accuracy:.4f} ± {spread:.4f} ({auc:.4f} ± {auc_spread:.4f})"
        if name in CANDIDATES:
            row["criterion in the folds"] = f"{np.mean([each[name] for each in criteria]):.4f}"
        rows.append(row)
    rows.append({"classifier": "is", **{f"{i + 1}": name for i, name in enumerate(choices)}})
    return rows


# ------------------------------------------------------------------------------ all parts


def _thin_out(task: _benchmark.Task, every: int) -> None:
    """Keep every so manieth image only."""
    task.images, task.strata = task.images[::every], task.strata[::every]
    task.targets = {name: labels[::every] for name, labels in task.targets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backbones", nargs="*", default=[f"efficientnet_lite{i}" for i in range(3)])
    parser.add_argument("--whole", type=int, default=224, help="size of whole cells; 0 for none")
    parser.add_argument("--part", choices=PARTS, action="append", help="(default: all parts)")
    parser.add_argument("--memory", help="folder that keeps embeddings")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth image only")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the splits of `probabilities`")
    args = parser.parse_args()
    backbones, parts = list(args.backbones), args.part or PARTS
    if args.whole:
        backbones.append(without_crop(backbones[0], args.whole))
    print(environment("openvino"), "\n")
    task = _benchmark.load_elpv()
    names = {0: "0", 1: "1/3", 2: "2/3", 3: "1"}
    fourths = np.rint(3 * _benchmark.read_elpv()[1]).astype(int)
    task.targets[PROBABILITIES] = np.array([names[number] for number in fourths])
    _thin_out(task, args.every)
    if "comparison" in parts:
        options = {"n_splits": args.splits, "memory": args.memory, "verbose": 1}
        print(_report.as_text(_benchmark.compare(task, backbones, **options)))
    if "quarters" in parts:
        print(f"\nContiguous quarters of the list, {CONVENTION}\n")
        for backbone in backbones:
            say(backbone)
            print(table(contiguous(task, backbone, args.memory)), "\n", flush=True)
    if "probabilities" in parts:
        print(f"\n{CONVENTION}: accuracy (ROC AUC) on all layers of {backbones[-1]}\n")
        splits = _benchmark._splits_of(task, task.targets[CONVENTION], args.splits, args.seed)
        extractor = PretrainedFeatureExtractor(
            backbones[-1], normalize=True, memory=args.memory, **ALL
        )
        p = np.array([float(Fraction(name)) for name in task.targets[PROBABILITIES]])
        print(table(probabilities(extractor.transform(task.images), p, splits)))


if __name__ == "__main__":
    main()
