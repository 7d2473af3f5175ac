"""What bfloat16 and float16 cost: accuracy on ELPV, the features, and the speed.

ELPV solar cells, defective: p > 0.5, the five 75/25 splits and the classifiers of the main job,
tuned inside each training part. Embeddings are computed in each precision; a classifier is trained
and tested in one and the same. `largest` and `mean` are differences of the features from float32
ones: the largest, relative to the largest feature, and their mean, relative to the mean feature
(absolute values). Images a second come from files, without a memory; the precisions take turns, in
processes of their own; medians.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from _common import (
    Built,
    environment,
    median,
    our_runtime,
    say,
    sides,
    table,
    take_turns,
    weights_of,
)
from sklearn.model_selection import StratifiedShuffleSplit
from tqdm.auto import tqdm

from sktransfer import PretrainedFeatureExtractor
from sktransfer._cli import benchmark as _benchmark

CONVENTION = "defective: p > 0.5"
PRECISIONS = ("float32", "bfloat16", "float16")


def extractor(backbone: str, precision: str, options: dict[str, Any]) -> PretrainedFeatureExtractor:
    weights = weights_of(backbone)
    return PretrainedFeatureExtractor(backbone, weights=weights, precision=precision, **options)


def build(backbone: str, precision: str, options: dict[str, Any], files: list[str]) -> Built:
    """Build a side whose turn is the embedding of some files."""
    model = extractor(backbone, precision, options)
    model.transform(files)
    return Built(lambda: model.transform(files), {})


def scores(
    task: _benchmark.Task, X: np.ndarray, n_splits: int, names: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Return accuracy and ROC AUC of each classifier on every split."""
    y = task.targets[CONVENTION]
    strata = np.char.add(np.char.add(y, "/"), task.strata)
    splitter = StratifiedShuffleSplit(n_splits, test_size=0.25, random_state=0)
    splits = list(splitter.split(strata, strata))
    models = _benchmark.classifiers(len(X))
    with tqdm(disable=True) as progress:
        return {
            name: _benchmark._score(models[name], X, y, splits, task, progress)["scores"]
            for name in names
        }


def speeds(
    backbone: str, files: list[str], options: dict[str, Any], args: argparse.Namespace
) -> dict[str, float]:
    named = {p: (build, backbone, p, options, files) for p in args.precisions}
    with sides(named) as built:
        seconds = take_turns(built, args.repeats)
    return {precision: len(files) / median(times) for precision, times in seconds.items()}


def compare(backbone: str, task: _benchmark.Task, args: argparse.Namespace) -> list[dict[str, str]]:
    """Return a row of the table for each precision."""
    options = {} if args.runtime is None else {"runtime": args.runtime}
    options["image_size"] = args.image_size
    say(f"{backbone}: speed")
    n = args.speed_images
    speed = speeds(backbone, task.images[:n], options, args) if n else {}
    rows, exact = [], None
    for precision in args.precisions:
        say(f"{backbone}: {precision}")
        embedding = extractor(backbone, precision, options).set_params(normalize=True)
        X = embedding.transform(task.images)
        row = {"network": backbone, "precision": precision}
        if speed:
            row["images/s"] = f"{speed[precision]:.1f}"
        if precision == "float32":
            exact = X
        elif exact is not None:
            differences = np.abs(X - exact)
            row["largest"] = f"{differences.max() / np.abs(exact).max():.1e}"
            row["mean"] = f"{differences.mean() / np.abs(exact).mean():.1e}"
        for name, found in scores(task, X, args.splits, args.classifiers).items():
            for metric, title in (("accuracy", "accuracy"), ("roc_auc", "ROC AUC")):
                values = found[metric]
                row[f"{name}, {title}"] = f"{values.mean():.4f} ± {values.std():.4f}"
        rows.append(row)
    return rows


def thin_out(task: _benchmark.Task, n_images: int) -> None:
    """Keep every so many cells."""
    chosen = slice(None, None, max(1, len(task.images) // n_images))
    task.images, task.strata = task.images[chosen], task.strata[chosen]
    task.targets = {name: y[chosen] for name, y in task.targets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(_benchmark.classifiers(100))
    parser.add_argument("--backbones", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument(
        "--classifiers", nargs="+", choices=names, default=["logistic regression", "RBF SVM"]
    )
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--images", type=int, help="about so many cells; by default, all 2,624")
    parser.add_argument("--image-size", type=int, help="pixels; by default the network's own")
    parser.add_argument("--speed-images", type=int, default=256, help="of a turn; 0: no speeds")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--runtime", help="of our estimator; not passed by default")
    args = parser.parse_args()
    task = _benchmark.load_elpv()
    if args.images:
        thin_out(task, args.images)
    print(environment("openvino"))
    print(
        f"\n{len(task.images)} cells, {args.splits} splits, runtime {our_runtime(args.runtime)}.\n",
        flush=True,
    )
    rows = [row for backbone in args.backbones for row in compare(backbone, task, args)]
    print(table(rows))


if __name__ == "__main__":
    main()
