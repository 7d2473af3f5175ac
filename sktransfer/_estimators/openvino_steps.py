"""Steps of scikit-learn as modules of torch, which OpenVINO takes.

There are no products of matrices: where OpenVINO computes in bfloat16, it does so up to the last of
them, and what is here stays in float32. Distances are exact for the same reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import (
    LogisticRegression,
    LogisticRegressionCV,
    Perceptron,
    RidgeClassifier,
    RidgeClassifierCV,
    SGDClassifier,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, Normalizer, StandardScaler
from sklearn.svm import SVC, LinearSVC, NuSVC
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sktransfer._estimators.onnx_steps import check_whitening, noise, rows_between, step_models

_N_ROWS = 16  # by which a module is compared with its step
_TOLERANCE = 1e-3  # of the largest value
_SMALLEST_PROBABILITY = 1e-7  # of libsvm


class _Scaled(nn.Module):
    """Each feature, `(x - center) * factor + shift`, clipped to limits if there are some."""

    center: torch.Tensor
    factor: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self, center: Any = 0, factor: Any = 1, shift: Any = 0, limits: Any = None
    ) -> None:
        super().__init__()
        for name, value in (("center", center), ("factor", factor), ("shift", shift)):
            self.register_buffer(name, _floats(value))
        self._limits = limits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.center) * self.factor + self.shift
        return x if self._limits is None else x.clamp(*self._limits)


class _Normalized(nn.Module):
    """Each row, divided by its length in this norm."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self._norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._norm == "l2":
            lengths = (x * x).sum(1, keepdim=True).sqrt()
        elif self._norm == "l1":
            lengths = x.abs().sum(1, keepdim=True)
        else:
            lengths = x.abs().amax(1, keepdim=True)
        tiny = 10 * float(np.finfo(np.float32).eps)
        return x / torch.where(lengths < tiny, torch.ones_like(lengths), lengths)


class _Linear(nn.Module):
    """Weighted sums (n, n_outputs) of the features of each row, and a constant for each sum."""

    weights: torch.Tensor
    intercept: torch.Tensor

    def __init__(self, weights: Any, intercept: Any = 0) -> None:
        super().__init__()
        self.register_buffer("weights", _floats(weights)[None])  # (1, n_outputs, d)
        self.register_buffer("intercept", _floats(intercept))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _sums(x[:, None] * self.weights) + self.intercept


class _Sigmoid(nn.Module):
    """Probabilities of two classes, from one score."""

    def forward(self, score: torch.Tensor) -> torch.Tensor:
        p = score.sigmoid()
        return torch.cat([1 - p, p], 1)


class _SigmoidOfEach(nn.Module):
    """Probabilities of classes from a score of each against all others.

    Each score has a probability, and these are divided by their sum. Where all of them are 0,
    scikit-learn makes the classes equally probable. It computes in the dtype of the coefficients,
    which says how small they can be; here, of small ones the logarithms are known.

    Parameters
    ----------
    dtype : numpy.dtype
        Of the coefficients.
    """

    def __init__(self, dtype: np.dtype) -> None:
        super().__init__()
        self._smallest = float(np.log(np.finfo(dtype).tiny))

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        logarithms = scores.clamp(max=0) - torch.log1p(torch.exp(-scores.abs()))
        are_zero = (scores.amax(1, keepdim=True) < self._smallest).float()
        return are_zero / scores.shape[1] + (1 - are_zero) * logarithms.softmax(1)


class _Kernel(nn.Module):
    """Similarities (n, n_vectors) of rows to support vectors."""

    vectors: torch.Tensor

    def __init__(self, step: SVC) -> None:
        super().__init__()
        self._kernel, self._gamma = step.kernel, float(step._gamma)
        self._coef0, self._degree = float(step.coef0), float(step.degree)
        self.register_buffer("vectors", _floats(step.support_vectors_)[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernel == "rbf":
            difference = x[:, None] - self.vectors
            return torch.exp(-self._gamma * _sums(difference * difference))
        product = _sums(x[:, None] * self.vectors)
        if self._kernel == "linear":
            return product
        product = self._gamma * product + self._coef0
        return product.tanh() if self._kernel == "sigmoid" else product**self._degree


class _Votes(nn.Module):
    """Scores of classes from those of their pairs, as scikit-learn's `decision_function`."""

    first: torch.Tensor
    second: torch.Tensor

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        pairs = list(combinations(range(n_classes), 2))
        first = np.array([[i == k for i, _ in pairs] for k in range(n_classes)], float)
        second = np.array([[j == k for _, j in pairs] for k in range(n_classes)], float)
        self.register_buffer("first", _floats(first)[None])  # (1, n_classes, n_pairs)
        self.register_buffer("second", _floats(second)[None])

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        won = (pairs >= 0).float()[:, None]
        votes = _sums(won * self.first + (1 - won) * self.second)
        sums = _sums(pairs[:, None] * (self.first - self.second))
        return votes + sums / (3 * (sums.abs() + 1))


class _Platt(nn.Module):
    """Probabilities of two classes from a support vector machine's score, as libsvm has them.

    It looks for those that suit a probability `r`, and is content with what is near it.
    """

    _ENOUGH = 0.005 / 2
    _N_ROUNDS = 2  # it never needs more of two classes

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self._a, self._b = a, b

    def forward(self, score: torch.Tensor) -> torch.Tensor:
        first = (self._a * score - self._b).sigmoid()  # the sign of libsvm's score is the other one
        first = first.clamp(_SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
        r = torch.cat([first, 1 - first], 1)
        other = r.flip(1)
        p = torch.full_like(r, 0.5)
        for _ in range(self._N_ROUNDS):
            slopes = other * (other * p - r * p.flip(1))  # of a square error, (n, 2)
            mean = (p * slopes).sum(1, keepdim=True)
            is_near = ((slopes - mean).abs().amax(1, keepdim=True) < self._ENOUGH).float()
            p = is_near * p + (1 - is_near) * self._next(p, other, slopes, mean)
        return p

    def _next(
        self, p: torch.Tensor, other: torch.Tensor, slopes: torch.Tensor, mean: torch.Tensor
    ) -> torch.Tensor:
        """Return probabilities of which one after the other is improved."""
        p0, p1 = p.split(1, 1)
        slope0, slope1 = slopes.split(1, 1)
        o0, o1 = other.split(1, 1)
        step = (mean - slope0) / (o0 * o0)
        mean = (mean + step * (step * o0 * o0 + 2 * slope0)) / (1 + step) ** 2
        slope1 = (slope1 - step * o0 * o1) / (1 + step)
        p0, p1 = (p0 + step) / (1 + step), p1 / (1 + step)
        step = (mean - slope1) / (o1 * o1)
        return torch.cat([p0 / (1 + step), (p1 + step) / (1 + step)], 1)


class _Neighbors(nn.Module):
    """Probabilities of classes: their shares among the nearest of the rows of the fit."""

    rows: torch.Tensor
    classes: torch.Tensor

    def __init__(self, step: KNeighborsClassifier) -> None:
        super().__init__()
        self._k, self._by_distance = int(step.n_neighbors), step.weights == "distance"
        self.register_buffer("rows", _floats(step._fit_X)[None])  # (1, n_rows, d)
        self.register_buffer("classes", _floats(np.eye(len(step.classes_))[step._y]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        difference = x[:, None] - self.rows
        squares, nearest = _sums(difference * difference).topk(self._k, dim=1, largest=False)
        votes = self.classes[nearest]  # (n, k, n_classes)
        if self._by_distance:
            is_equal = (squares == 0).float()  # (n, k)
            weights = 1 / (squares + is_equal).sqrt()
            any_is_equal = is_equal.amax(1, keepdim=True)  # then only those that are equal count
            weights = any_is_equal * is_equal + (1 - any_is_equal) * weights
            votes = votes * weights[:, :, None]
        shares = votes.sum(1)
        return shares / shares.sum(1, keepdim=True)


def _sums(x: torch.Tensor) -> torch.Tensor:
    """Return sums (n, k) over the last axis.

    OpenVINO merges a sum with what follows it feature by feature, and then reads what lies behind
    its numbers, if there are several rows. It does not merge it with this choice of a column.
    """
    return x.sum(2, keepdim=True)[:, :, 0]


def _floats(value: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(value, np.float32))


# ------------------------------------------------------------------------------ steps


def _standard(step: StandardScaler) -> nn.Module:
    center = step.mean_ if step.with_mean else 0
    return _Scaled(center, 1 / step.scale_ if step.with_std else 1)


def _min_max(step: MinMaxScaler) -> nn.Module:
    return _Scaled(0, step.scale_, step.min_, step.feature_range if step.clip else None)


def _max_abs(step: MaxAbsScaler) -> nn.Module:
    return _Scaled(0, 1 / step.scale_, 0, (-1, 1) if getattr(step, "clip", False) else None)


def _pca(step: PCA) -> nn.Module:
    scale = 1.0
    check_whitening(step)
    if step.whiten:
        tiny = np.finfo(step.explained_variance_.dtype).eps
        scale = 1 / np.maximum(np.sqrt(step.explained_variance_), tiny)[:, np.newaxis]
    return nn.Sequential(_Scaled(step.mean_), _Linear(step.components_ * scale))


def _scores(step: Any) -> nn.Module:
    return _Linear(step.coef_, step.intercept_)


def _probabilities(step: Any) -> nn.Module:
    is_binary = len(step.classes_) == 2
    return nn.Sequential(_scores(step), _Sigmoid() if is_binary else nn.Softmax(1))


def _sgd(step: SGDClassifier) -> nn.Module:
    if not hasattr(step, "predict_proba"):
        return _scores(step)
    if step.loss != "log_loss":
        raise ValueError(f"its probabilities with loss={step.loss!r} are not written")
    is_binary = len(step.classes_) == 2
    last = _Sigmoid() if is_binary else _SigmoidOfEach(step.coef_.dtype)
    return nn.Sequential(_scores(step), last)


def _svc(step: SVC) -> nn.Module:
    if step.kernel not in ("linear", "rbf", "poly", "sigmoid") or issparse(step.support_vectors_):
        raise ValueError("its kernel must be linear, rbf, poly or sigmoid, on rows that are dense")
    n_classes = len(step.classes_)
    if n_classes == 2:
        score = nn.Sequential(_Kernel(step), _Linear(step.dual_coef_, step.intercept_))
        if not hasattr(step, "predict_proba"):
            return score
        if not len(step.probA_):
            raise ValueError("it was fitted with probability=False: fit it again")
        return nn.Sequential(score, _Platt(float(step.probA_[0]), float(step.probB_[0])))
    if hasattr(step, "predict_proba"):
        raise ValueError(
            "its probabilities of several classes are not written: pass probability=False, whose "
            "scores are"
        )
    ends = np.cumsum([0, *step.n_support_])
    weights = []
    for i, j in combinations(range(n_classes), 2):  # each pair by the vectors of both classes
        row = np.zeros(ends[-1])
        row[ends[i] : ends[i + 1]] = step.dual_coef_[j - 1, ends[i] : ends[i + 1]]
        row[ends[j] : ends[j + 1]] = step.dual_coef_[i, ends[j] : ends[j + 1]]
        weights.append(row)
    pairs = nn.Sequential(_Kernel(step), _Linear(weights, step.intercept_))
    is_ovr = step.decision_function_shape == "ovr"
    return nn.Sequential(pairs, _Votes(n_classes)) if is_ovr else pairs


def _neighbors(step: KNeighborsClassifier) -> nn.Module:
    is_euclidean = step.effective_metric_ in ("euclidean", "l2")
    if not is_euclidean or step.weights not in ("uniform", "distance", None):
        raise ValueError("its metric must be euclidean, and its weights 'uniform' or 'distance'")
    if step.outputs_2d_:
        raise ValueError("it has several targets")
    if issparse(step._fit_X):
        raise ValueError("it was fitted on sparse rows")
    return _Neighbors(step)


_MODULES: dict[type, Callable[[Any], nn.Module]] = {
    StandardScaler: _standard,
    MinMaxScaler: _min_max,
    MaxAbsScaler: _max_abs,
    Normalizer: lambda step: _Normalized(step.norm),
    PCA: _pca,
    TruncatedSVD: lambda step: _Linear(step.components_),
    LogisticRegression: _probabilities,
    LogisticRegressionCV: _probabilities,
    LinearDiscriminantAnalysis: _probabilities,
    LinearSVC: _scores,
    RidgeClassifier: _scores,
    RidgeClassifierCV: _scores,
    Perceptron: _scores,
    SGDClassifier: _sgd,
    SVC: _svc,
    NuSVC: _svc,
    KNeighborsClassifier: _neighbors,
}


def steps_module(steps: list[tuple[str, Any]]) -> nn.Module:
    """Return the steps behind a network as one module, which takes and returns float32 rows.

    Each is compared with its step, on a few rows; an error names the step that can't be written.
    """
    modules = []
    for number, (name, step) in enumerate(steps, 1):
        check_is_fitted(step, msg=f"Step {name!r}, a %(name)s, is not fitted: call fit first.")
        if hasattr(step, "classes_") and number < len(steps):
            raise ValueError(
                f"Step {name!r}, a {type(step).__name__}, can't be exported for OpenVINO: it is a "
                "classifier in the middle of a pipeline, and what it transforms is not written."
            )
        try:
            modules.append(_checked(step))
        except Exception as error:
            raise ValueError(
                f"Step {name!r}, a {type(step).__name__}, can't be exported for OpenVINO: "
                f"{str(error).rstrip('.')}.{_other_way(name, step)}"
            ) from error
    return nn.Sequential(*modules).eval()


def method_of(step: Any) -> str:
    """Return the name of the method whose results a file has if the step is the last one."""
    names = ("predict_proba", "decision_function", "transform")
    return next(name for name in names if hasattr(step, name))


def _checked(step: Any) -> nn.Module:
    """Return a module that computes what a step does; an error if it differs on a few rows."""
    make = _MODULES.get(type(step))
    if make is None:
        raise ValueError(
            "it is none of the steps that are written, which the notes of export_openvino list"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of attributes that scikit-learn will drop one day
        module = make(step)
    if not hasattr(step, "n_features_in_"):  # of steps that need no fit
        raise ValueError("it is not fitted, which says how many features it takes: call fit first")
    rows = rows_between(step, _N_ROWS)
    rows = noise(step, _N_ROWS) if rows is None else rows
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of rows like these
        expected = np.asarray(getattr(step, method_of(step))(rows)).reshape(_N_ROWS, -1)
        # One by one: of neighbours, each takes as much memory as all rows that were fitted.
        found = torch.cat([module(row) for row in torch.from_numpy(rows).split(1)]).numpy()
    most = _TOLERANCE * max(np.abs(expected).max(), 1e-12)
    if found.shape != expected.shape or not np.abs(found - expected).max() <= most:
        raise ValueError("what is written of it computes other numbers than the step itself")
    return module


def _other_way(name: str, step: Any) -> str:
    """Return a sentence that says that `to_onnx` may take a step; empty if it does not."""
    try:
        step_models([(name, step)], "rows")
    except ImportError:
        return " to_onnx takes more steps."
    except Exception:  # whatever skl2onnx says of a step that it can't write either
        return ""
    return " to_onnx may take it."
