"""Classifiers on embeddings of the ELPV solar cells: the tables of the documentation.

The same as `sktransfer benchmark`, with more of them: whole cells beside the usual crop of the
center, the four probabilities of the experts as classes, and, as a check for leakage between cells
of one module, contiguous quarters of the list: the cells come from 44 modules whose ids are not
published, but neighbours in the list come from one module.
"""

import argparse

import numpy as np
from _common import environment, quarters, say, table, without_crop
from tqdm.auto import tqdm

from sktransfer import PretrainedFeatureExtractor
from sktransfer._cli import benchmark as _benchmark
from sktransfer._cli import report as _report

CONVENTION = "defective: p > 0.5"
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


def _thin_out(task: _benchmark.Task, every: int) -> None:
    """Keep every so manieth image only."""
    task.images, task.strata = task.images[::every], task.strata[::every]
    task.targets = {name: labels[::every] for name, labels in task.targets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backbones", nargs="*", default=[f"efficientnet_lite{i}" for i in range(3)])
    parser.add_argument("--whole", type=int, default=224, help="size of whole cells; 0 for none")
    parser.add_argument("--memory", help="folder that keeps embeddings")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth image only")
    parser.add_argument("--splits", type=int, default=5)
    args = parser.parse_args()
    backbones = list(args.backbones)
    if args.whole:
        backbones.append(without_crop(backbones[0], args.whole))
    print(environment("openvino"), "\n")
    task = _benchmark.load_elpv()
    names = {0: "0", 1: "1/3", 2: "2/3", 3: "1"}
    fourths = np.rint(3 * _benchmark.read_elpv()[1]).astype(int)
    task.targets["the four probabilities"] = np.array([names[number] for number in fourths])
    _thin_out(task, args.every)
    options = {"n_splits": args.splits, "memory": args.memory, "verbose": 1}
    print(_report.as_text(_benchmark.compare(task, backbones, **options)))
    print(f"\nContiguous quarters of the list, {CONVENTION}\n")
    for backbone in backbones:
        say(backbone)
        print(table(contiguous(task, backbone, args.memory)), "\n", flush=True)


if __name__ == "__main__":
    main()
