"""What each way of learning makes of 25, 50, ... labels: ELPV solar cells, defective: p > 0.5.

Four ways: a network from random weights; an SVM on small thumbnails; an SVM on embeddings of the
frozen network; the network fine-tuned. The training parts of the splits of `sktransfer benchmark`
are cut to nested subsets, stratified by label and module type; the test parts stay whole. Every
fit pays for all that it does to its images, so nothing is taken from a memory.

Each fit is added to the file of results when it is done, and those that are in it are not measured
again: so a run can be interrupted, and `--plot` draws what is there. Use another file for other
options.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from codecarbon import OfflineEmissionsTracker
from elpv_fine_tuning import without_crop
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedShuffleSplit
from tabulate import tabulate

from sktransfer import FineTunedClassifier, PretrainedFeatureExtractor
from sktransfer._cli.benchmark import classifiers, load_elpv
from sktransfer.io import check_images
from sktransfer.model_selection._comparison import pixel_svm, thumbnails

WAYS = {
    "scratch": "from scratch",
    "pixels": "SVM on pixels",
    "frozen": "frozen + SVM",
    "fine-tuned": "fine-tuned",
}
COLOURS = {"scratch": "#b5651d", "pixels": "#7f7f7f", "frozen": "#1f77b4", "fine-tuned": "#c2185b"}
Scorer = Callable[[np.ndarray], np.ndarray]  # rows to what speaks for class 1


def nested(rows: np.ndarray, strata: np.ndarray, seed: int) -> np.ndarray:
    """Order rows at random so that every first part has about the same share of each stratum."""
    random = np.random.RandomState(seed)
    place = np.empty(len(rows))
    for stratum in np.unique(strata[rows]):
        members = random.permutation(np.flatnonzero(strata[rows] == stratum))
        place[members] = (np.arange(len(members)) + random.uniform()) / len(members)
    return rows[np.argsort(place)]


class Energy:
    """Measures, or estimates, the electricity that a piece of work takes."""

    def __init__(self, mode: str) -> None:
        self.tracker = OfflineEmissionsTracker(
            country_iso_code="USA",
            save_to_file=False,
            log_level="error",
            measure_power_secs=1,
            tracking_mode=mode,
        )
        self.tracker.start_task("warm-up")  # looks for sensors, which takes seconds
        self.tracker.stop_task()
        parts = [vars(part) for part in self.tracker._hardware]
        cpu = next((part for part in parts if "_tdp" in part), {"_mode": "unknown", "_tdp": None})
        whose = "the whole machine, other programs included" if mode == "machine" else "the process"
        if cpu["_mode"] in ("constant", "cpu_load"):
            times = " times its load" if cpu["_mode"] == "cpu_load" else ""
            self.note = (
                "an estimate, as no sensor was found: a constant power of "
                f"{cpu['_tdp']} W for the processor{times}, and a constant one for the memory; "
                f"of {whose}"
            )
        else:
            self.note = f"measured ({cpu['_mode']}), of {whose}"

    def of(self, work: Callable[[], Any]) -> tuple[Any, float, float]:
        """Return what `work` returns, its seconds and its watt-hours."""
        self.tracker.start_task()
        start = time.perf_counter()
        try:
            result = work()
        finally:
            seconds = time.perf_counter() - start
            energy = self.tracker.stop_task()
        return result, seconds, 1000 * energy.energy_consumed


class Ways:
    """The four ways: each fits some rows, and returns how to score others."""

    def __init__(self, args: argparse.Namespace, images: np.ndarray, y: np.ndarray) -> None:
        self.args, self.images, self.y = args, images, y
        self.thumbnails: np.ndarray | None = None  # of all images, for scoring only
        self.embeddings: np.ndarray | None = None

    def fit(self, way: str, rows: np.ndarray) -> Scorer:
        if way == "pixels":
            return self._fit_pixels(rows)
        if way == "frozen":
            return self._fit_frozen(rows)
        return self._fit_network(way, rows)

    def prepare(self, way: str) -> None:
        """Do, outside the measured time, what scoring takes; and wake joblib's workers."""
        if way in ("pixels", "frozen"):
            pixel_svm(2, n_jobs=-1).fit(np.random.RandomState(0).rand(30, 2), np.arange(30) % 2)
        if way == "pixels" and self.thumbnails is None:
            self.thumbnails = thumbnails(check_images(self.images))
        if way == "frozen" and self.embeddings is None:
            self.embeddings = self._embed(np.arange(len(self.images)))

    def _embed(self, rows: np.ndarray) -> np.ndarray:
        extractor = PretrainedFeatureExtractor(
            self.args.backbone,
            normalize=True,
            image_size=self.args.image_size,
            precision=self.args.precision,
        )
        return extractor.transform(self.images[rows])

    def _fit_pixels(self, rows: np.ndarray) -> Scorer:
        X = thumbnails(check_images(self.images[rows]))
        svm = pixel_svm(X.shape[1], n_jobs=-1).fit(X, self.y[rows])
        return lambda rows: svm.decision_function(self.thumbnails[rows])

    def _fit_frozen(self, rows: np.ndarray) -> Scorer:
        svm = classifiers(len(rows))["RBF SVM"].fit(self._embed(rows), self.y[rows])
        return lambda rows: svm.decision_function(self.embeddings[rows])

    def _fit_network(self, way: str, rows: np.ndarray) -> Scorer:
        args = self.args
        shared = {
            "backbone": args.backbone,
            "image_size": args.image_size,
            "precision": args.precision,
            "random_state": 0,
        }
        if way == "scratch":
            epochs = max(args.scratch_epochs, math.ceil(args.scratch_steps * 32 / len(rows)))
            options = {"weights": None, "unfreeze": "all", "lr": args.scratch_lr, "augment": "flip"}
            if args.scratch_image_size is not None:
                options["image_size"] = args.scratch_image_size
        else:
            epochs = args.epochs
            augment = None if args.augment == "none" else args.augment
            options = {
                "unfreeze": args.unfreeze,
                "lr": args.lr,
                "weight_decay": args.weight_decay,
                "augment": augment,
                "predict_views": args.predict_views,
            }
        model = FineTunedClassifier(**{**shared, "max_epochs": epochs, **options})
        model.fit(self.images[rows], self.y[rows])
        return lambda rows: model.decision_function(self.images[rows])


def measure(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Fit and score what is not yet found, adding to the file after each."""
    task = load_elpv()
    images, kinds = np.array(task.images)[:: args.every], task.strata[:: args.every]
    label = task.targets["defective: p > 0.5"][:: args.every]
    y, strata = (label == "defective").astype(int), np.char.add(np.char.add(label, "/"), kinds)
    splitter = StratifiedShuffleSplit(args.splits, test_size=0.25, random_state=0)
    ways, energy = Ways(args, images, y), Energy(args.tracking)
    found["energy"] = energy.note
    print(f"Watt-hours: {energy.note}", flush=True)
    done = {(row["way"], row["n"], row["split"]) for row in found["rows"]}
    for split, (train, test) in enumerate(splitter.split(strata, strata)):
        order = nested(train, strata, split)
        sizes = sorted({min(n or len(order), len(order)) for n in args.sizes})
        for n in sizes:
            for way in args.ways:
                if (way, n, split) in done:
                    continue
                ways.prepare(way)
                scorer, seconds, watt_hours = energy.of(partial(ways.fit, way, order[:n]))
                scores = scorer(test)
                row = {
                    "way": way,
                    "n": n,
                    "split": split,
                    "accuracy": accuracy_score(y[test], scores > 0),
                    "roc_auc": roc_auc_score(y[test], scores),
                    "seconds": seconds,
                    "watt_hours": watt_hours,
                }
                found["rows"].append(row)
                Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
                print(
                    f"  split {split}, {n} labels, {way}: accuracy {row['accuracy']:.3f}, ROC AUC "
                    f"{row['roc_auc']:.3f}, {seconds:.1f} s, {watt_hours:.3f} Wh",
                    flush=True,
                )


def curve(found: dict[str, Any], way: str, name: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return the numbers of labels, and mean and standard deviation over the splits."""
    rows = [row for row in found["rows"] if row["way"] == way]
    sizes = sorted({row["n"] for row in rows})
    values = [[row[name] for row in rows if row["n"] == n] for n in sizes]
    return sizes, np.array([np.mean(v) for v in values]), np.array([np.std(v) for v in values])


def print_tables(found: dict[str, Any]) -> None:
    digits = {"accuracy": 3, "roc_auc": 3, "seconds": 1, "watt_hours": 3}
    for name, places in digits.items():
        table = []
        for way, title in WAYS.items():
            sizes, mean, std = curve(found, way, name)
            cells = (f"{m:.{places}f} ± {s:.{places}f}" for m, s in zip(mean, std, strict=True))
            if sizes:
                table.append({name: title} | dict(zip(map(str, sizes), cells, strict=True)))
        print(f"\n{tabulate(table, headers='keys', disable_numparse=True)}")
    print(f"\nWatt-hours: {found['energy']}")


def plot(found: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), width_ratios=[5, 3], layout="constrained")
    sizes: list[int] = sorted({row["n"] for row in found["rows"]})
    panels = [
        (axes[0], "roc_auc", "ROC AUC of test cells"),
        (axes[1], "seconds", "seconds per fit"),
    ]
    for ax, name, title in panels:
        ends = []
        for way, text in WAYS.items():
            x, mean, std = curve(found, way, name)
            if x:
                ax.plot(x, mean, "o-", color=COLOURS[way], markersize=4)
                if name == "roc_auc":
                    low, high = mean - std, mean + std
                    ax.fill_between(x, low, high, color=COLOURS[way], alpha=0.15, linewidth=0)
                ends.append((mean[-1], x[-1], way, text))
        ax.set_xscale("log")
        if name == "seconds":
            ax.set_yscale("log")
        ax.set_xticks(sizes, [str(n) for n in sizes])
        ax.minorticks_off()
        room = 0.28 if name == "roc_auc" else 0.05  # for the names of the lines
        ax.set_xlim(sizes[0] * 0.85, sizes[-1] * (sizes[-1] / sizes[0]) ** room)
        ax.set_xlabel("labels")
        ax.set_title(title, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
        if name == "roc_auc":
            label_lines(ax, ends)
    figure.savefig(path, dpi=160)
    print(f"plot: {path}")


def label_lines(ax: Any, ends: list[tuple[float, int, str, str]]) -> None:
    """Write the name of each line behind its end, a line's height apart at least."""
    low, high = ax.get_ylim()
    place = -math.inf
    for y, x, way, text in sorted(ends):
        place = max(y, place + 0.055 * (high - low))
        ax.annotate(
            text,
            (x, y),
            (x * 1.12, place),
            color=COLOURS[way],
            va="center",
            fontsize=10,
            annotation_clip=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[25, 50, 100, 200, 500, 0], help="0 for all"
    )
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--whole", type=int, help="size of whole cells: none of the border is cut")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--unfreeze", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--augment", choices=("none", "flip", "dihedral"), default="none")
    parser.add_argument("--predict-views", type=int, default=1)
    parser.add_argument("--scratch-epochs", type=int, default=10)
    parser.add_argument("--scratch-steps", type=int, default=100, help="at least; so more epochs")
    parser.add_argument("--scratch-lr", type=float, default=1e-3)
    parser.add_argument("--scratch-image-size", type=int, help="by default, as the others")
    parser.add_argument("--tracking", choices=("machine", "process"), default="machine")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth image only")
    parser.add_argument("--output", default="learning_curves.json")
    parser.add_argument("--plot", help="a picture to draw; with --splits 0, of what is there")
    args = parser.parse_args()
    if args.whole:
        args.backbone = without_crop(args.backbone, args.whole)
    file = Path(args.output)
    found = {"args": vars(args), "energy": "", "rows": []}
    if file.exists():
        found = json.loads(file.read_text())
    if args.splits:
        measure(args, found)
    print_tables(found)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
