"""Fine-tuning on the ELPV solar cells, on the splits of `sktransfer benchmark`.

Five random 75/25 splits, stratified by label and module type; or, with --contiguous, four
contiguous quarters of the list: the cells come from 44 modules whose ids are not published, but
neighbours in the list come from one module, so this is nearer to modules never seen.

--choose compares a few recipes on one inner holdout of each split's training part, fits the best
anew on all of it, and scores this one on the test part, p > 0.5; whole cells, in the eight views of
a square. The SVM, and the head alone, on all layers of the same cells stand beside it.

    elpv_fine_tuning.py --write-cells cells.npz
    elpv_fine_tuning.py --choose --cells cells.npz --device cuda --jobs 8 --output fits.jsonl
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import quarters, without_crop
from _elpv_choice import RECIPES, choose, write_cells
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import StratifiedShuffleSplit
from tabulate import tabulate

from sktransfer import FineTunedClassifier
from sktransfer._cli.benchmark import load_elpv

METRICS = ("accuracy", "roc_auc", "balanced_accuracy", "f1")
CONVENTIONS = {"0.5": "defective: p > 0.5", "0": "defective: p > 0"}


def score(model: FineTunedClassifier, X: Any, y: np.ndarray) -> dict[str, float]:
    probability = model.predict_proba(X)  # (n, 2), its second column for "sound"
    predicted = model.classes_[probability.argmax(1)]
    return {
        "accuracy": accuracy_score(y, predicted),
        "roc_auc": roc_auc_score(y == "defective", probability[:, 0]),
        "balanced_accuracy": balanced_accuracy_score(y, predicted),
        "f1": f1_score(y, predicted, pos_label="defective", zero_division=0),
    }


def unfreeze(text: str) -> int | str | list[str]:
    """Read a number, a name, "all", or names with commas between them."""
    if "," in text:
        return text.split(",")
    return int(text) if text.isdigit() else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--unfreeze", type=unfreeze, default=2)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--whole", type=int, help="size of whole cells: none of the border is cut")
    parser.add_argument("--augment", choices=("none", "flip", "dihedral", "auto"), default="none")
    parser.add_argument("--views", type=int, help="in training")
    parser.add_argument("--predict-views", type=int, default=1)
    parser.add_argument("--head-epochs", type=lambda x: x if x == "auto" else int(x))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--head-lr", type=float)
    parser.add_argument("--lr-decay", type=float)
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--class-weight", choices=("balanced",))
    parser.add_argument("--early-stopping", action="store_true")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", help="folder; by default, one that lasts as long as the run")
    parser.add_argument("--conventions", nargs="+", choices=CONVENTIONS, default=["0.5", "0"])
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--contiguous", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth image only")
    parser.add_argument("--output", help="a file of results, to which these are added")
    add_choice(parser)
    args = parser.parse_args()
    if args.write_cells:
        return write_cells(args.write_cells, args.backbone, args.whole or 224)
    if args.choose:
        return choose(args)
    if args.whole:
        args.backbone = without_crop(args.backbone, args.whole)
    # What is not given stays as the library has it.
    given = {
        "head_epochs": args.head_epochs,
        "max_epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "head_lr": args.head_lr,
        "lr_decay": args.lr_decay,
        "weight_decay": args.weight_decay,
        "dropout": args.dropout,
        "n_views": args.views,
        "class_weight": args.class_weight,
        "image_size": args.image_size,
    }
    options = {name: value for name, value in given.items() if value is not None}
    model = FineTunedClassifier(
        args.backbone,
        weights=None if args.weights == "none" else args.weights,
        unfreeze=args.unfreeze,
        augment=None if args.augment == "none" else args.augment,
        predict_views=args.predict_views,
        early_stopping=args.early_stopping,
        precision=args.precision,
        device=args.device,
        **options,
    )
    print(model, flush=True)
    task = load_elpv()
    X, kinds = np.array(task.images)[:: args.every], task.strata[:: args.every]
    with tempfile.TemporaryDirectory() as folder:
        model.set_params(memory=args.memory or folder)
        for convention in args.conventions:
            y = task.targets[CONVENTIONS[convention]][:: args.every]
            strata = np.char.add(np.char.add(y, "/"), kinds)
            splitter = StratifiedShuffleSplit(args.splits, test_size=0.25, random_state=0)
            splits = quarters(kinds) if args.contiguous else splitter.split(strata, strata)
            rows = []
            for number, (train, test) in enumerate(splits):
                start = time.perf_counter()
                model.set_params(random_state=number).fit(X[train], y[train])
                seconds = time.perf_counter() - start
                rows.append({**score(model, X[test], y[test]), "seconds": seconds})
                found = ", ".join(f"{metric} {rows[-1][metric]:.4f}" for metric in METRICS)
                print(f"  split {number}: {found}, fit {seconds:.1f} s", flush=True)
            report(CONVENTIONS[convention], rows, task.published, args)
    print(model.plan_)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--choose`."""
    group = parser.add_argument_group("a recipe chosen inside the training part")
    group.add_argument("--choose", action="store_true")
    recipes = "as 2, all+layers or 2+layers@1e-4: blocks, what the head sees, learning rate"
    group.add_argument("--recipes", nargs="+", help=f"{recipes}; by default {' '.join(RECIPES)}")
    group.add_argument("--seeds", type=int, default=2, help="fits of the chosen recipe, averaged")
    average = "files of --output by other networks: averaged with this, and mixed by the holdout"
    group.add_argument("--average", nargs="+", default=(), metavar="FILE", help=average)
    group.add_argument("--jobs", type=int, default=1, help="fits at once, in processes")
    group.add_argument("--threads", type=int, default=2, help="of each process")
    group.add_argument("--seconds", type=float, default=1e6, help="until fits are cut off")
    group.add_argument("--cells", help="file of --write-cells, instead of the package")
    group.add_argument("--write-cells", help="file for the cells at the size of the network")


def report(
    convention: str, rows: list[dict[str, float]], published: list[dict], args: argparse.Namespace
) -> None:
    """Print a table with the published figures; add the rows to the file of results."""
    lines = [
        {"classifier": line["classifier"], **{m: f"{line[m]:.3f}" for m in METRICS if m in line}}
        for line in published
        if line["convention"] == convention
    ]
    own = {"classifier": f"{args.backbone}, unfreeze={args.unfreeze}"}
    for metric in METRICS:
        values = [row[metric] for row in rows]
        own[metric] = f"{np.mean(values):.3f} ± {np.std(values):.3f}"
    own["fit, s"] = f"{np.mean([row['seconds'] for row in rows]):.1f}"
    which = "contiguous quarters" if args.contiguous else f"{len(rows)} random splits"
    print(f"{convention}, {which}")
    print(tabulate([own, *lines], headers="keys", disable_numparse=True), flush=True)
    if args.output:
        file = Path(args.output)
        records = json.loads(file.read_text()) if file.exists() else []
        record = {"args": vars(args), "convention": convention, "splits": rows}
        file.write_text(json.dumps([*records, record], indent=1) + "\n")


if __name__ == "__main__":
    main()
