"""Classifiers on embeddings of the ELPV solar cells: the table of the documentation.

The same as `sktransfer benchmark`, with the embedded backbones side by side and, as a check for
leakage between cells of one module, a contiguous-block split: the cells come from 44 modules whose
ids are not published, but neighbours in the list come from one module.
"""

import sys

import numpy as np
from sklearn.model_selection import KFold
from tabulate import tabulate

from sktransfer import PretrainedFeatureExtractor
from sktransfer._cli import benchmark as _benchmark
from sktransfer._cli import report as _report


def contiguous_blocks(X: np.ndarray, y: np.ndarray, kinds: np.ndarray) -> list[dict[str, str]]:
    """Score on four contiguous quarters of each module type in turn, as the list has them."""
    quarters = np.empty(len(y), int)
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        for quarter, (_, test) in enumerate(KFold(4).split(rows)):
            quarters[rows[test]] = quarter
    table = []
    for name, model in _benchmark.classifiers(len(y)).items():
        scores = []
        for quarter in range(4):
            train, test = quarters != quarter, quarters == quarter
            scores.append(model.fit(X[train], y[train]).score(X[test], y[test]))
        table.append(
            {"classifier": name, "accuracy": f"{np.mean(scores):.3f} ± {np.std(scores):.3f}"}
        )
    return table


def main() -> None:
    backbones = sys.argv[1:] or [f"efficientnet_lite{i}" for i in range(3)]
    task = _benchmark.load_elpv()
    print(_report.as_text(_benchmark.compare(task, backbones)))
    X = PretrainedFeatureExtractor(backbones[0]).transform(task.images)
    X = _benchmark.power_normalize(X)
    print(f"\nContiguous quarters of the list, {backbones[0]}, defective: p > 0.5")
    y = task.targets["defective: p > 0.5"]
    print(tabulate(contiguous_blocks(X, y, task.groups), headers="keys", disable_numparse=True))


if __name__ == "__main__":
    main()
