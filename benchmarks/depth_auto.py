"""Which depth unfreeze="auto" takes at 25, 100, 500 and all labels: ELPV, defective: p > 0.5.

On the splits and nested subsets of `learning_curves.py`. More labels should lead to deeper choices.
With `--compare`, fixed depths are fitted as well, to see what the choice is worth on the test part.
"""

import argparse
import tempfile
import time

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedShuffleSplit
from tabulate import tabulate

from sktransfer import FineTunedClassifier
from sktransfer._cli.benchmark import load_elpv


def nested(rows: np.ndarray, strata: np.ndarray, seed: int) -> np.ndarray:
    """Order rows at random so that every first part has about the same share of each stratum."""
    random = np.random.RandomState(seed)
    place = np.empty(len(rows))
    for stratum in np.unique(strata[rows]):
        members = random.permutation(np.flatnonzero(strata[rows] == stratum))
        place[members] = (np.arange(len(members)) + random.uniform()) / len(members)
    return rows[np.argsort(place)]


def show(found: dict, n: int, split: int) -> None:
    """Print what the search saw."""
    results = found["cv_results_"]
    print(f"split {split}, {n} labels: took {found['unfreeze']}, best {found['best']}", flush=True)
    names = ("iter", "param_max_epochs", "param_unfreeze", "mean_test_score", "std_test_score")
    rows = zip(*(results[name] for name in names), strict=True)
    headers = ["round", "epochs", "depth", "accuracy", "std"]
    print(tabulate(rows, headers, floatfmt=".3f"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 100, 500, 0], help="0 for all")
    parser.add_argument("--splits", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--compare", type=int, nargs="*", default=[], help="fixed depths")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth image only")
    parser.add_argument("--memory", help="by default, a temporary folder")
    options = parser.parse_args()
    task = load_elpv()
    X, kinds = np.array(task.images)[:: options.every], task.strata[:: options.every]
    y = task.targets["defective: p > 0.5"][:: options.every]
    strata = np.char.add(np.char.add(y, "/"), kinds)
    splitter = StratifiedShuffleSplit(options.splits, test_size=0.25, random_state=0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for split, (train, test) in enumerate(splitter.split(strata, strata)):
            order = nested(train, strata, split)
            for n in sorted({min(size or len(order), len(order)) for size in options.sizes}):
                for depth in ("auto", *options.compare):
                    start = time.perf_counter()
                    model = FineTunedClassifier(
                        unfreeze=depth,
                        max_epochs=options.epochs,
                        image_size=options.image_size,
                        memory=options.memory or folder,
                        random_state=split,
                    ).fit(X[order[:n]], y[order[:n]])
                    seconds = time.perf_counter() - start
                    if depth == "auto":
                        show(model.depth_search_, n, split)
                    score = model.decision_function(X[test])  # for "sound"
                    rows.append(
                        {
                            "split": split,
                            "labels": n,
                            "unfreeze": depth,
                            "taken": len(model.unfrozen_block_names_),
                            "accuracy": f"{(model.predict(X[test]) == y[test]).mean():.3f}",
                            "ROC AUC": f"{roc_auc_score(y[test] == 'sound', score):.3f}",
                            "fit, s": f"{seconds:.1f}",
                        }
                    )
    print(tabulate(rows, headers="keys", disable_numparse=True))


if __name__ == "__main__":
    main()
