"""What the features of all layers give beside the last one's, and what they cost.

`--part time`: seconds to embed ELPV solar cells from files, by the layers taken.

`--part head`: linear heads on the rows of frozen layers, by how they are regularised and scaled, on
ELPV (p > 0.5) and scikit-learn's digits as images, with 50, 200 and all labels of five splits.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from _common import Built, environment, median, say, sides, table, take_turns
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import train_test_split

from sktransfer import PretrainedFeatureExtractor
from sktransfer._cli import benchmark as _benchmark
from sktransfer._training import heads as _heads

ALL = {"layer": "all", "pooling": ("avg", "max")}
CHOICES = {
    "last layer": {"layer": "auto"},
    "stages, mean": {"layer": "stages"},
    "all layers, mean": {"layer": "all"},
    "all layers, mean and maximum": ALL,
}


# ------------------------------------------------------------------------------ time


def _build(options: dict, n: int) -> Built:
    files = _benchmark.load_elpv().images[:n]
    extractor = PretrainedFeatureExtractor(**options)
    extractor.transform(files)  # to warm up; it also settles what computes
    return Built(partial(extractor.transform, files), {})


def time(n: int = 300, repeats: int = 7, runtimes: Sequence[str] = ("openvino", "torch")) -> None:
    """Print the seconds by the layers taken, the sides in turns."""
    print(environment("openvino"), "\n")
    for runtime in runtimes:
        builders = {
            name: (_build, {**options, "runtime": runtime}, n) for name, options in CHOICES.items()
        }
        with sides(builders) as built:
            seconds = {name: median(found) for name, found in take_turns(built, repeats).items()}
        first = seconds["last layer"]
        rows = [
            {"features of": name, "seconds": f"{s:.2f}", "of the last layer's": f"{s / first:.2f}"}
            for name, s in seconds.items()
        ]
        print(f"{runtime}: {n} ELPV cells from files, efficientnet_lite0, medians of {repeats}\n")
        print(table(rows), "\n")


# ------------------------------------------------------------------------------ heads

LABELS = (50, 200, "all")
HEADS = {  # regularisation, scales of the features
    "C = 0.03, one scale": (True, True),
    "chosen, one scale": (False, True),
    "chosen, Pareto": (False, False),
}


def _tasks() -> Iterator[tuple[str, Any, np.ndarray]]:
    task = _benchmark.load_elpv()
    is_defective = task.targets["defective: p > 0.5"] == "defective"
    yield "ELPV", task.images, is_defective.astype(np.int64)
    digits = load_digits()
    yield "digits", (digits.images / 16 * 255).astype(np.uint8), digits.target.astype(np.int64)


def _features(images: Any, memory: str) -> dict[str, np.ndarray]:
    choices = dict(reversed(CHOICES.items()))  # the largest first: the others are read
    del choices["stages, mean"]
    return {
        name: PretrainedFeatureExtractor(memory=memory, **options).transform(images)
        for name, options in choices.items()
    }


def _probabilities(X: np.ndarray, y: np.ndarray, test: np.ndarray, how: str) -> np.ndarray:
    is_fixed, has_one_scale = HEADS[how]
    choose, scale = _heads._choose_strength, _heads._scale
    head: Any = _heads.make_head("linear", X.shape[1], int(y.max()) + 1, 0.0)
    try:
        if is_fixed:
            _heads._choose_strength = lambda *_: _heads._C
        if has_one_scale:
            _heads._scale = lambda variances, _: scale(variances, True)
        _heads.solve_head(head, X, y, None, "class")
    finally:
        _heads._choose_strength, _heads._scale = choose, scale
    with torch.inference_mode():
        return head.eval()(torch.from_numpy(test)).double().softmax(1).numpy()


def _scores(y: np.ndarray, p: np.ndarray) -> tuple[float, ...]:
    auc = roc_auc_score(y, p[:, 1]) if p.shape[1] == 2 else np.nan
    return float((p.argmax(1) == y).mean()), float(auc), float(log_loss(y, p))


def head(n_splits: int = 5, memory: str | None = None) -> None:
    """Print accuracy, ROC AUC and log-loss of linear heads, means over splits."""
    print(f"Accuracy (ROC AUC), log-loss of linear heads, means of {n_splits} splits 75/25\n")
    with tempfile.TemporaryDirectory() as folder:
        for task, images, y in _tasks():
            rows: list[dict[str, Any]] = []
            features = _features(images, memory or folder)
            for n in LABELS:
                found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
                for split in range(n_splits):
                    train, test = train_test_split(
                        np.arange(len(y)), test_size=0.25, stratify=y, random_state=split
                    )
                    if n != "all":
                        train, _ = train_test_split(
                            train, train_size=n, stratify=y[train], random_state=split
                        )
                    for name, X in features.items():
                        for how in HEADS:
                            p = _probabilities(X[train], y[train], X[test], how)
                            found.setdefault((name, how), []).append(_scores(y[test], p))
                    say(f"  {task}, {n} labels: split {split + 1} of {n_splits}")
                for (name, how), scores in found.items():
                    accuracy, auc, loss = np.mean(scores, axis=0)
                    cell = f"{accuracy:.3f}" + ("" if np.isnan(auc) else f" ({auc:.3f})")
                    start = {"task": task, "labels": n, "features of": name}
                    if not rows or any(rows[-1][key] != value for key, value in start.items()):
                        rows.append(start)
                    rows[-1][how] = f"{cell}, {loss:.2f}"
            print(table(rows), "\n", flush=True)


PARTS = {"time": time, "head": head}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="(default: all parts)")
    parser.add_argument("--memory", help="folder that keeps the rows of --part head")
    options = parser.parse_args()
    for part in options.part or PARTS:
        PARTS[part](**({"memory": options.memory} if part == "head" else {}))


if __name__ == "__main__":
    main()
