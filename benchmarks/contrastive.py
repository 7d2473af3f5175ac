"""What contrastive pre-training on unlabelled solar cells gains: ELPV, defective: p > 0.5.

The training part of a random 75/25 split, stratified by label and module type, is pre-trained on
without its labels; the test part is not seen. Then a logistic regression, scaled and tuned by
3-fold cross-validation on its own labels, learns from 25, 50, ... of the training cells, once on
the embeddings of the network before the pre-training, and once on those after it. The labelled
subsets of a draw are nested and stratified. Gains are differences on the same test cells and the
same labels; intervals are 95 % ones of Student's t over the draws, of which each has a split, a
pre-training (its seed too) and labels of its own.

`--start random` is asked to gain 5 points at 100 labels; `--start imagenet`, not to hurt.
`--seed` tells sets of draws apart: defaults were chosen on other draws than those that are
reported.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from _common import environment, say, table
from depth_auto import nested
from elpv_fine_tuning import without_crop
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import ContrastivePretrainer, PretrainedFeatureExtractor
from sktransfer._cli.benchmark import load_elpv

STARTS = {"random": None, "imagenet": "default"}


def auc(X: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Return the ROC AUC on `test` of a logistic regression fitted on `train`."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    grid = {"logisticregression__C": np.logspace(-4, 0, 5)}
    search = GridSearchCV(model, grid, cv=3, scoring="roc_auc").fit(X[train], y[train])
    return roc_auc_score(y[test], search.decision_function(X[test]))


def pretrain(args: argparse.Namespace, backbone: str, images: np.ndarray, seed: int) -> Any:
    """Return a fitted pre-trainer; parameters that were not given are its defaults."""
    names = "augment batch_size crop_scale head lr lr_decay max_epochs temperature unfreeze".split()
    given = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    model = ContrastivePretrainer(
        backbone, weights=STARTS[args.start], random_state=seed, verbose=args.verbose, **given
    )
    return model.fit(images)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each draw and number of labels."""
    task = load_elpv()
    images, kinds = np.array(task.images)[:: args.every], task.strata[:: args.every]
    label = task.targets["defective: p > 0.5"][:: args.every]
    y, strata = (label == "defective").astype(int), np.char.add(np.char.add(label, "/"), kinds)
    backbone = without_crop(args.backbone, args.image_size)
    extractor = PretrainedFeatureExtractor(backbone, weights=STARTS[args.start])
    before = extractor.transform(images)
    splitter = StratifiedShuffleSplit(args.draws, test_size=0.25, random_state=args.seed)
    rows = []
    for draw, (train, test) in enumerate(splitter.split(strata, strata)):
        start = time.perf_counter()
        model = pretrain(args, backbone, images[train], draw)
        seconds = time.perf_counter() - start
        first, last = model.history_[0], model.history_[-1]
        print(
            f"draw {draw}: {len(train)} unlabelled cells, {model.n_iter_} epochs in {seconds:.0f} "
            f"s; loss {first['train_loss']:.3f} to {last['train_loss']:.3f}, matching accuracy "
            f"{first['matching_accuracy']:.3f} to {last['matching_accuracy']:.3f}, spread "
            f"{first['spread']:.3f} to {last['spread']:.3f}",
            flush=True,
        )
        after = PretrainedFeatureExtractor(model).transform(images)
        order = nested(train, strata, draw)
        for n in args.labels:
            scores = [auc(X, y, order[:n], test) for X in (before, after)]
            rows.append({"draw": draw, "n": n, "before": scores[0], "after": scores[1]})
            say(f"  {n} labels: {scores[0]:.3f} before, {scores[1]:.3f} after")
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return means over the draws, and the interval of the gain."""
    found = []
    for n in sorted({row["n"] for row in rows}):
        before, after = np.array([(r["before"], r["after"]) for r in rows if r["n"] == n]).T
        gains = 100 * (after - before)
        cells = f"{gains.mean():+.1f}"
        if len(gains) > 1:
            half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
            cells += f" ({gains.mean() - half:+.1f} to {gains.mean() + half:+.1f})"
        found.append(
            {
                "labels": str(n),
                "before": f"{before.mean():.3f}",
                "after": f"{after.mean():.3f}",
                "gain, points": cells,
                "of each draw": ", ".join(f"{gain:+.1f}" for gain in gains),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", choices=STARTS, default="random")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=64, help="of whole cells")
    parser.add_argument("--labels", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the set of draws")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth image only")
    parser.add_argument("--epochs", type=int, dest="max_epochs")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--head", type=int, nargs="+", help="sizes of the projection head's layers")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--lr-decay", type=float)
    parser.add_argument("--unfreeze", type=lambda x: int(x) if x.isdecimal() else x)
    parser.add_argument("--augment", choices=("auto", "dihedral"))
    parser.add_argument("--crop-scale", type=float, nargs=2)
    parser.add_argument("--verbose", type=int, default=0)
    args = parser.parse_args()
    print(environment("skorch"))
    given = {k: v for k, v in vars(args).items() if v is not None and k != "verbose"}
    print(f"\n{', '.join(f'{k}={v}' for k, v in given.items())}\n", flush=True)
    print(f"\n{table(summary(measure(args)))}")


if __name__ == "__main__":
    main()
