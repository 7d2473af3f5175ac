"""How far the probabilities of a fine-tuned network can be believed, and what makes them better.

    head    a linear head on the embedding of frozen layers, of one regularisation path: as it is,
            with the temperature of `CalibratedClassifierCV`, with smoothed labels, and with rows
            that are mixed (mixup). All are chosen by the log-loss of three folds.
    blocks  `FineTunedClassifier(unfreeze=1)` as it is, with the temperature, with smoothed labels

Log-loss, expected calibration error and accuracy on ELPV (p > 0.5) and scikit-learn's digits, with
50, 200 and all labels, means of splits 75/25. Smoothing and mixing are no part of the library:
this is where they were compared.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from _common import environment, say, table
from all_layers import _splits, _tasks
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import StratifiedKFold
from torch.nn import functional as F

from sktransfer import FineTunedClassifier, PretrainedFeatureExtractor
from sktransfer._training import heads as _heads
from sktransfer._training.heads import Loss
from sktransfer.metrics import expected_calibration_error

STRENGTHS = 10.0 ** np.arange(-4, 1.1, 0.5)  # of the weights' squares, on scaled rows
SMOOTHING = (0.05, 0.1)
_MIXES = 4  # times the rows


class SoftLogistic(ClassifierMixin, BaseEstimator):
    """Logistic regression on rows scaled as those of a head; targets may be smoothed or mixed."""

    def __init__(self, smoothing: float = 0.0, mixup: float = 0.0, strength: float | None = None):
        self.smoothing = smoothing
        self.mixup = mixup
        self.strength = strength

    def fit(self, X: np.ndarray, y: np.ndarray) -> SoftLogistic:
        self.classes_ = np.unique(y)
        strength = self.strength or self._chosen(X, y)
        self._mean, self._scale = X.mean(0), _heads._scale(X.var(0), is_start=False)
        rows = torch.from_numpy((X - self._mean) / self._scale)
        targets = F.one_hot(torch.from_numpy(np.searchsorted(self.classes_, y))).float()
        targets = targets * (1 - self.smoothing) + self.smoothing / len(self.classes_)
        if self.mixup:
            rows, targets = _mixed(rows, targets, self.mixup)
        self._weights = _solved(rows.float(), targets, strength)
        return self

    def _chosen(self, X: np.ndarray, y: np.ndarray) -> float:
        folds = min(3, int(np.unique(y, return_counts=True)[1].min()))
        if folds < 2:
            return 0.1
        losses = np.zeros(len(STRENGTHS))
        for train, test in StratifiedKFold(folds, shuffle=True, random_state=0).split(X, y):
            for i, strength in enumerate(STRENGTHS):
                model = SoftLogistic(self.smoothing, self.mixup, strength).fit(X[train], y[train])
                losses[i] += log_loss(y[test], model.predict_proba(X[test]), labels=self.classes_)
        return float(STRENGTHS[losses.argmin()])

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        weight, bias = self._weights
        logits = (X - self._mean) / self._scale @ weight.T + bias
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        weight, bias = self._weights
        logits = (X - self._mean) / self._scale @ weight.T + bias
        return softmax(logits.astype(float), axis=1)

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self.classes_[self.predict_proba(X).argmax(1)]


def _mixed(
    rows: torch.Tensor, targets: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows between pairs of rows, as mixup (Zhang et al. 2018) draws them."""
    chance = np.random.default_rng(0)
    n = len(rows) * _MIXES
    first, second = chance.integers(0, len(rows), (2, n))
    share = torch.from_numpy(chance.beta(alpha, alpha, (n, 1))).float()
    return (
        share * rows[first] + (1 - share) * rows[second],
        share * targets[first] + (1 - share) * targets[second],
    )


def _solved(
    rows: torch.Tensor, targets: torch.Tensor, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    weight = torch.zeros(targets.shape[1], rows.shape[1], requires_grad=True)
    bias = torch.zeros(targets.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = F.cross_entropy(rows @ weight.T + bias, targets) + strength * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weight.detach().numpy(), bias.detach().numpy()


@contextmanager
def smoothed(share: float) -> Iterator[None]:
    """Within this context the loss of classes is that of smoothed labels."""
    plain = Loss.forward

    def forward(self: Loss, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # Smoothed in training alone: what is held out is scored as it is.
        share_now = share if outputs.requires_grad else 0.0
        return F.cross_entropy(outputs, y, reduction="none", label_smoothing=share_now)

    Loss.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Loss.forward = plain  # type: ignore[method-assign]


# ------------------------------------------------------------------------------ the comparison


def scores(y: np.ndarray, proba: np.ndarray, classes: np.ndarray) -> tuple[float, float, float]:
    return (
        log_loss(y, proba, labels=classes),
        expected_calibration_error(y, proba, labels=classes),
        accuracy_score(y, classes[proba.argmax(1)]),
    )


def calibrated(model: Any) -> CalibratedClassifierCV:
    return CalibratedClassifierCV(model, method="temperature", cv=3, ensemble=False)


def heads(X: np.ndarray) -> dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]]:
    models: dict[str, Any] = {"as it is": SoftLogistic()}
    models["temperature"] = calibrated(SoftLogistic())
    models |= {f"smoothed labels, {share}": SoftLogistic(smoothing=share) for share in SMOOTHING}
    models |= {f"mixup, {alpha}": SoftLogistic(mixup=alpha) for alpha in (0.2, 1.0)}

    def predictor(model: Any) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        return lambda train, test, y: model.fit(X[train], y[train]).predict_proba(X[test])

    return {name: predictor(model) for name, model in models.items()}


def blocks(
    images: Any, memory: str
) -> dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]]:
    images = np.asarray(images)
    model = FineTunedClassifier(unfreeze=1, memory=memory, precision="auto", random_state=0)

    def predict(train: np.ndarray, test: np.ndarray, y: np.ndarray, by: Any = model) -> np.ndarray:
        return by.fit(images[train], y[train]).predict_proba(images[test])

    def smooth(train: np.ndarray, test: np.ndarray, y: np.ndarray) -> np.ndarray:
        with smoothed(0.1):
            return predict(train, test, y)

    return {
        "as it is": predict,
        "temperature": lambda train, test, y: predict(train, test, y, calibrated(model)),
        "smoothed labels, 0.1": smooth,
    }


def compare(part: str, tasks: Sequence[str], labels: Sequence[Any], n: int, memory: str) -> None:
    """Print a table for each task; a row is one way, columns are scores by numbers of labels."""
    for task, images, y in _tasks():
        if task not in tasks:
            continue
        if part == "head":
            ways = heads(PretrainedFeatureExtractor(memory=memory).transform(images))
        else:
            ways = blocks(images, memory)
        rows: dict[str, dict[str, str]] = {name: {"": name} for name in ways}
        for n_labels in labels:
            splits = list(_splits(y, n_labels, n))
            for name, way in ways.items():
                found = [
                    scores(y[test], way(train, test, y), np.unique(y)) for train, test in splits
                ]
                loss, error, accuracy = np.mean(found, axis=0)
                spread = np.std([each[0] for each in found])
                rows[name] |= {
                    f"{n_labels} labels: log-loss": f"{loss:.3f} ± {spread:.3f}",
                    f"{n_labels}: ECE": f"{error:.3f}",
                    f"{n_labels}: accuracy": f"{accuracy:.3f}",
                }
                say(f"  {part}, {task}, {n_labels} labels, {name}: {loss:.3f}")
        print(f"\n{part}, {task}, {n} splits\n\n{table(list(rows.values()))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=("head", "blocks"), default=["head", "blocks"])
    parser.add_argument("--task", nargs="+", default=["digits", "ELPV"])
    parser.add_argument("--labels", nargs="+", default=["50", "200", "all"])
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--memory", help="folder that keeps the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)  # its solves are small
    print(environment(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        labels = [int(n) if n.isdigit() else n for n in args.labels]
        for part in args.part:
            compare(part, args.task, labels, args.splits, args.memory or folder)


if __name__ == "__main__":
    main()
