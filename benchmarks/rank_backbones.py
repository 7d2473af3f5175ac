"""Rank the embedded networks, with their weights and without, on the ELPV solar cells.

Two questions. Are pretrained weights above random ones of the same network by every score? And how
well does each score order the networks as their accuracy after fine-tuning does (Kendall's tau)?
With six networks, of which three are random, tau says little more than the first answer does; that
of the three pretrained ones alone is printed as well, and takes only four values.
"""

import argparse
import tempfile

import numpy as np
from scipy.stats import kendalltau
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedShuffleSplit
from tabulate import tabulate

from sktransfer import FineTunedClassifier
from sktransfer._cli.benchmark import load_elpv
from sktransfer.model_selection import rank_backbones

SCORES = ("knn", "logistic", "logme", "h_score", "leep")


def fine_tune(name, weights, X, y, strata, options, memory) -> tuple[float, float]:
    """Return accuracy and ROC AUC, means over the splits, after fine-tuning the last blocks."""
    splitter = StratifiedShuffleSplit(options.splits, test_size=0.25, random_state=0)
    found = []
    for seed, (train, test) in enumerate(splitter.split(strata, strata)):
        model = FineTunedClassifier(
            name,
            weights=weights,
            unfreeze=options.unfreeze,
            max_epochs=options.epochs,
            image_size=options.image_size,
            memory=memory,
            random_state=seed,
        ).fit(X[train], y[train])
        probability = model.predict_proba(X[test])[:, 0]  # of "defective"
        predicted = model.classes_[(probability <= 0.5).astype(int)]
        found.append(
            ((predicted == y[test]).mean(), roc_auc_score(y[test] == "defective", probability))
        )
    accuracy, auc = np.mean(found, axis=0)
    print(f"  fine-tuned {name}, weights={weights}: {accuracy:.4f}, AUC {auc:.4f}", flush=True)
    return accuracy, auc


def tau(one, other) -> str:
    known = np.isfinite(one) & np.isfinite(other)
    return f"{kendalltau(one[known], other[known]).statistic:+.2f}" if known.sum() > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbones", nargs="+", default=[f"efficientnet_lite{i}" for i in "012"])
    parser.add_argument("--every", type=int, default=1, help="take every so manieth image only")
    parser.add_argument(
        "--fine-tune-every", type=int, default=1, help="of those, for fine-tuning; 0 for none"
    )
    parser.add_argument("--cv", type=int, default=5)
    parser.add_argument("--splits", type=int, default=2, help="for fine-tuning")
    parser.add_argument("--unfreeze", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--memory", help="by default, a temporary folder")
    options = parser.parse_args()
    task = load_elpv()
    X, kinds = np.array(task.images)[:: options.every], task.strata[:: options.every]
    y = task.targets["defective: p > 0.5"][:: options.every]
    networks = [(name, weights) for name in options.backbones for weights in ("default", None)]
    with tempfile.TemporaryDirectory() as folder:
        memory = options.memory or folder
        table = rank_backbones(
            X,
            y,
            networks,
            scoring=SCORES,
            pairs=False,
            cv=options.cv,
            image_size=options.image_size,
            memory=memory,
            random_state=0,
        )
        print(f"{len(X)} ELPV cells, defective: p > 0.5; accuracy over {options.cv} folds")
        shown = table.assign(weights=table.weights.map(lambda w: w or "random"))
        print(tabulate(shown, headers="keys", showindex=False, floatfmt=".4f"), flush=True)
        by = table.set_index(["backbone", table.weights.map(lambda w: w is not None)])
        for score in SCORES[:-1]:  # LEEP has no value for random weights
            above = [by[score][name, True] > by[score][name, False] for name in options.backbones]
            print(f"{score}: pretrained above random in {sum(above)} of {len(above)} networks")
        if not options.fine_tune_every:
            return
        some = slice(None, None, options.fine_tune_every)
        strata = np.char.add(np.char.add(y, "/"), kinds)[some]
        found = [
            fine_tune(name, weights, X[some], y[some], strata, options, memory)
            for name, weights in zip(table.backbone, table.weights, strict=True)
        ]
    accuracy, auc = np.array(found).T
    pretrained = np.array([weights is not None for weights in table.weights])
    rows = []
    for score in SCORES:
        values = table[score].to_numpy(float)
        row = {"score": score}
        for title, target in (("accuracy", accuracy), ("ROC AUC", auc)):
            row[f"tau with {title}"] = tau(values, target)
            row[f"of pretrained ones, {title}"] = tau(values[pretrained], target[pretrained])
        rows.append(row)
    print(
        f"Fine-tuned: unfreeze={options.unfreeze}, {options.epochs} epochs, {options.splits} splits"
    )
    print(tabulate(rows, headers="keys", disable_numparse=True))


if __name__ == "__main__":
    main()
