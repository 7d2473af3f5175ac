"""What a comparison found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sktransfer._cli.tasks import Task
from sktransfer.model_selection._transfer_gain import corrected_interval

_LEVEL = 0.95  # of intervals

LOGISTIC = "logistic regression"
ALL_LAYERS = ", all layers"  # ends the names of classifiers on them

METRICS = ("accuracy", "balanced_accuracy", "f1", "roc_auc")


@dataclass
class Result:
    """One classifier on one representation under one convention, over all splits."""

    convention: str
    backbone: str
    classifier: str
    scores: dict[str, np.ndarray]  # metric: one value a split
    fit_seconds: np.ndarray  # one value a split, tuning included
    y_true: list[np.ndarray] = field(repr=False)  # of the test images of each split
    y_pred: list[np.ndarray] = field(repr=False)
    y_score: list[np.ndarray] = field(repr=False)  # (n,) for two classes, else (n, n_classes)
    classes: np.ndarray = field(repr=False)
    tests: list[np.ndarray] = field(repr=False)  # numbers of the test images of each split
    positive: Any = None  # of two classes, the one that F1 and ROC are about
    depth: Any = None  # of a fine-tuned network, `unfreeze`
    n_trained: int | None = None  # its trained parameters
    table: str = ""  # what the rows of its table share, beside the convention


@dataclass
class Cost:
    """What embedding all images cost, and what it costs again with a memory."""

    backbone: str
    n_images: int
    n_computed: int  # fewer than n_images if the memory knew some
    n_features: int
    seconds: float
    second_seconds: float


@dataclass
class Report:
    """All that a comparison found."""

    task: Task
    results: list[Result]
    costs: list[Cost]
    n_splits: int
    best: Best | None = None  # if it was asked for
    findings: Any = None  # of an audit, a data frame, if it was asked for

    @property
    def conventions(self) -> list[str]:
        return list(dict.fromkeys(result.convention for result in self.results))

    def of(self, convention: str) -> list[Result]:
        """Return the results under a convention."""
        return [result for result in self.results if result.convention == convention]

    def published(self, convention: str) -> list[dict[str, Any]]:
        """Return what others published under a convention."""
        return [each for each in self.task.published if each["convention"] == convention]

    def counts(self, convention: str) -> dict[str, int]:
        """Return the images of each class."""
        labels, counts = np.unique(self.task.targets[convention], return_counts=True)
        return dict(zip(map(str, labels), counts.tolist(), strict=True))


@dataclass
class Best:
    """The most accurate classifier of a network, fitted on all images under one convention."""

    result: Result
    model: Any = field(repr=False)


def best_of(results: Sequence[Result]) -> Result:
    """Return the most accurate; of several, rather `make_classifier`'s, then one on all layers."""

    def order(result: Result) -> tuple[float, bool, bool]:
        name = result.classifier
        accuracy = round(result.scores["accuracy"].mean(), 9)  # sums differ by their order
        return accuracy, name == f"{LOGISTIC}{ALL_LAYERS}", name.endswith(ALL_LAYERS)

    return max(results, key=order)


def full_name(result: Result) -> str:
    """Return a classifier and, if there is one, the network whose embeddings it has."""
    on = "" if result.backbone == "none" else f" on {result.backbone}"
    return result.classifier + on


def gains(results: Sequence[Result], best: Result) -> list[str]:
    """Say by how many points the best is above what uses no network, or above the networks."""
    others = [result for result in results if result.backbone == "none" and result is not best]
    if best.backbone == "none" and (networks := [r for r in results if r.backbone != "none"]):
        others.append(best_of(networks))
    return [_gain(best, other) for other in others]


def _gain(best: Result, other: Result) -> str:
    differences = 100 * (best.scores["accuracy"] - other.scores["accuracy"])
    over = "always the largest class" if other.classifier == "majority class" else full_name(other)
    said = f"{differences.mean():+.1f} points over {over}"
    if len(differences) > 1:
        # Two splits give an interval that is wider than accuracies can differ.
        low, high = np.clip(corrected_interval(differences, 1 / 3, _LEVEL), -100, 100)
        ends = f"{low:.1f}", f"{high:.1f}"
        # Of splits that differ by the same, it says nothing.
        said += f" ({_LEVEL:.0%} interval {' to '.join(ends)})" if len({*ends}) > 1 else ""
    return said
