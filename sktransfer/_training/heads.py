"""Heads, what turns an embedding into outputs, and their losses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from sktransfer._splits import Split, UndividedWarning, inner_folds
from sktransfer._threads import WithoutWarnings, small_solve
from sktransfer.models._modules import copy_of

# Inverse regularisation of the logistic head, on embeddings of mean variance 1: alone, and as the
# start of training, where one that is sure of itself costs log-loss (docs/results/fine_tuning.md).
_C = 0.03
_C_START = 0.003
_ALPHA = 10.0  # and of ridge regression
_FIXED = {"class": _C, "label": _C, "value": _ALPHA}
_START = {"class": _C_START, "label": _C_START, "value": _ALPHA}
_WIDTH = 1280  # of the embeddings for which these are good
# By which what is compared differs from them, from the strongest regularisation on.
_FACTORS = 10.0 ** np.arange(-1, 2, 0.5)
_RIDGE_FACTORS = 10.0 ** np.arange(3, -1.5, -0.5)
_FOLDS, _MOST_FOLDS, _FEW = 3, 5, 500  # folds; and of so few images, which takes no time
_ROUGH = 1e-3  # tolerance of what is only compared
_unconverged = WithoutWarnings(ConvergenceWarning)  # what is not there yet does as well


class Scaling(nn.Module):
    """Brings features to comparable scales: less a mean, times a factor. It is never trained."""

    mean: torch.Tensor
    factor: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("factor", torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) * self.factor


def make_head(
    head: Any, width: int, n_outputs: int, dropout: float, scales: bool = False
) -> nn.Module:
    """Build what `head` stands for; a linear layer starts at zero, so at equal chances.

    With `scales`, it is on features of several layers, which it brings to comparable scales.
    """
    if isinstance(head, nn.Module):
        return _checked_copy(head, width, n_outputs)
    hidden = () if isinstance(head, str) else head
    layers: list[nn.Module] = [Scaling(width)] if scales else []
    layers += [nn.Dropout(dropout)]
    for size in _sizes(hidden, "sizes of hidden layers must be positive ints."):
        layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(dropout)]
        width = size
    output = nn.Linear(width, n_outputs)
    nn.init.zeros_(output.weight)
    nn.init.zeros_(output.bias)
    return nn.Sequential(*layers, output)


def _sizes(head: Any, remedy: str) -> list[int]:
    """Return the sizes of layers that a user passes; raise an error if they are none."""
    sizes = list(head)
    if not all(isinstance(s, Integral) and not isinstance(s, bool) and int(s) > 0 for s in sizes):
        raise ValueError(f"head={head!r}: {remedy}")
    return [int(size) for size in sizes]


def _checked_copy(head: nn.Module, width: int, n_outputs: int | None) -> nn.Module:
    """Return a copy of a user's module that takes embeddings; its lazy layers get their shape.

    Parameters
    ----------
    head : nn.Module
    width : int
        Features of an embedding.
    n_outputs : int or None
        That it must return; None for any number of them.
    """
    head = copy_of(head).float().cpu()
    was_training = head.training
    try:
        with torch.no_grad():
            output: Any = head.eval()(torch.zeros(2, width, device="cpu"))
    except Exception as error:
        raise ValueError(
            f"head can't take embeddings of {width} features: {error}. Its first layer must take "
            f"{width}, as nn.Linear({width}, ...) or nn.LazyLinear(...) do."
        ) from error
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else ()
    if len(shape) != 2 or shape[0] != 2 or n_outputs not in (None, shape[1]):
        came = shape if isinstance(output, torch.Tensor) else type(output).__name__
        wanted = "a row" if n_outputs is None else f"a row of {n_outputs} outputs"
        d = "d" if n_outputs is None else n_outputs
        raise ValueError(
            f"head must return {wanted} for each embedding, so shape (2, {d}) for 2; it returned "
            f"{came}."
        )
    return head.train(was_training)


class Learnt(NamedTuple):
    """What a linear head is solved for: rows, and what they are to become.

    Attributes
    ----------
    rows : ndarray of shape (n, width), float32
    targets : ndarray
        Class numbers (n,) of kind "class"; zeros and ones (n, k) of kind "label"; values (n, k)
        of kind "value".
    weights : ndarray of shape (n,)
    kind : {"class", "label", "value"}
    n_outputs : int
    """

    rows: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    kind: str
    n_outputs: int

    def part(self, numbers: np.ndarray) -> Learnt:
        """Return some rows of all this."""
        parts = (self.rows[numbers], self.targets[numbers], self.weights[numbers])
        return Learnt(*parts, self.kind, self.n_outputs)


def solve_head(
    head: nn.Sequential,
    embeddings: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray | None,
    kind: str,
    *,
    is_start: bool = False,
    n_views: int = 1,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> None:
    """Set the linear layer of `head` to the optimum on frozen embeddings.

    Logistic regression, or ridge regression, on embeddings of mean 0 and mean variance 1; this
    scaling is folded into the layer, or stays in front of it, if the head has a place for it. How
    much it is regularised is chosen by cross-validation. Features are divided by the root of their
    deviations (Pareto scaling).

    Parameters
    ----------
    head : nn.Sequential
        From ``make_head("linear", ...)``.
    embeddings : ndarray of shape (n, width), float32
    targets : ndarray
        See `Learnt`.
    weights : ndarray of shape (n,) or None
    kind : {"class", "label", "value"}
    is_start : bool, default=False
        Whether blocks are trained from here on: a logistic regression is then regularised more,
        by a fixed value.
    n_views : int, default=1
        Rows that follow each other and show one image.
    seed : int, default=0
        Of the folds.
    groups : ndarray of shape (n // n_views,) or None
        Of the images, which no fold tears apart.
    """
    weights = np.ones(len(embeddings)) if weights is None else weights
    mean = np.average(embeddings, axis=0, weights=weights)
    scale = _scale(np.average((embeddings - mean) ** 2, axis=0, weights=weights), is_start)
    rows = ((embeddings - mean) / scale).astype(np.float32)
    layer = head[-1]
    assert isinstance(layer, nn.Linear)
    learnt = Learnt(rows, targets, weights, kind, layer.out_features)
    with small_solve(rows.size):
        chosen = _START[kind] if is_start else _choose_strength(learnt, n_views, groups, seed)
        coef, intercept = _fit(learnt, chosen)
    with torch.no_grad():
        if isinstance(head[0], Scaling):
            # A step of AdamW moves an output by up to the rate times the sum of all features, which
            # is to be about that of a single layer: else the first steps undo the optimum.
            shrinking = max(1.0, 2 * len(mean) / _WIDTH)
            head[0].mean.copy_(torch.from_numpy(mean))
            head[0].factor.copy_(torch.from_numpy(1 / scale / shrinking))
            coef = coef * shrinking
        else:
            coef = coef / scale
            intercept = intercept - coef @ mean
        layer.weight.copy_(torch.from_numpy(coef))
        layer.bias.copy_(torch.from_numpy(intercept))


def _scale(variances: np.ndarray, is_start: bool) -> np.ndarray:
    """Return by what features are divided, so that their variances are 1 in the mean.

    It is between one scale for all, by which the layers that vary most decide, and one for each,
    by which noise counts as much as all else: see `benchmarks/all_layers.py`.
    """
    deviations = np.sqrt(variances)
    if is_start:
        # With a scale for each, those that hardly vary would get weights so large that their
        # gradients spoil the blocks as soon as these are trained.
        deviations = np.full_like(deviations, np.sqrt(variances.mean()))
    scale = np.sqrt(deviations * deviations.mean())
    return np.where(scale > 0, scale, 1.0)


def _choose_strength(learnt: Learnt, n_views: int, groups: np.ndarray | None, seed: int) -> float:
    """Return the strength of the regularisation of the smallest loss on rows held out.

    From the strongest on, until the loss rises: it has one minimum, and weak ones take long. Too
    few images, or groups of them, to hold some of each class out leave the fixed value.
    """
    # By the width: what a row adds up to has one variance, however many features it has.
    share, is_ridge = learnt.rows.shape[1] / _WIDTH, learnt.kind == "value"
    chosen = _FIXED[learnt.kind] * (share if is_ridge else 1 / share)
    strengths = chosen * (_RIDGE_FACTORS if is_ridge else _FACTORS)
    folds = _folds(learnt.targets[::n_views], learnt.kind, groups, seed)
    numbers = np.arange(len(learnt.rows)).reshape(-1, n_views)
    models: list[dict[int, Any]] = [{} for _ in folds]  # each goes on from the one before
    best = np.inf
    for strength in strengths if folds else ():
        loss = 0.0
        for fold, known in zip(folds, models, strict=True):
            # One fold at a time: copies of all take several times the memory of the rows.
            train, test = (learnt.part(numbers[images].ravel()) for images in fold)
            loss += _loss(test, *_fit(train, strength, known))
        if loss > best:
            break
        best, chosen = loss, strength
    return chosen


def _folds(targets: np.ndarray, kind: str, groups: np.ndarray | None, seed: int) -> list[Split]:
    """Return numbers of images to learn from, and to score on; none if there are too few."""
    n_folds = _MOST_FOLDS if len(targets) <= _FEW else _FOLDS
    folds = inner_folds(n_folds, targets, kind, groups, seed)
    if not folds and groups is not None and inner_folds(n_folds, targets, kind, None, seed):
        warnings.warn(
            "How much the head is regularised can't be chosen by cross-validation, as the groups "
            "can't be dealt into folds that leave some of each class to learn from: a fixed value "
            "is taken. If that matters, pass smaller groups, or more images.",
            UndividedWarning,
            stacklevel=12,
        )
    return folds


def _fit(
    learnt: Learnt, strength: float, models: dict[int, Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return coefficients (n_outputs, width) and intercepts of the optimum on rows.

    With `models`, only roughly, from what they are; they are there for the next call.
    """
    rows, targets, weights, kind, n_outputs = learnt
    if kind == "value":
        known = {} if models is None else models
        if not known:
            known[0] = _Ridge(rows, targets, weights)
        return known[0].solve(rows, strength)
    if kind == "class":
        return _logistic(rows, targets, weights, range(n_outputs), _model(strength, models, 0))
    parts = [
        _logistic(rows, column, weights, [0, 1], _model(strength, models, i))
        for i, column in enumerate(targets.T)
    ]
    coef = np.stack([coef[1] - coef[0] for coef, _ in parts])
    return coef, np.stack([intercept[1] - intercept[0] for _, intercept in parts])


def _model(C: float, models: dict[int, Any] | None, number: int) -> LogisticRegression:
    if models is None:
        return LogisticRegression(C=C, max_iter=1000)
    rough = LogisticRegression(tol=_ROUGH, warm_start=True)
    return models.setdefault(number, rough).set_params(C=C)


class _Ridge:
    """Ridge regression, for several strengths: what takes longest is computed once.

    In float64, as products of many rows differ so much in size that float32 may not do.

    Parameters
    ----------
    rows : ndarray of shape (n, width)
    targets : ndarray of shape (n, k)
    weights : ndarray of shape (n,)
    """

    def __init__(self, rows: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
        self.mean = np.average(rows, axis=0, weights=weights)
        self.mean_target = np.average(targets, axis=0, weights=weights)
        self.roots = np.sqrt(weights)[:, None]
        rows, targets = (rows - self.mean) * self.roots, (targets - self.mean_target) * self.roots
        self.is_wide = rows.shape[1] > len(rows)  # then a coefficient for each row is sought
        self.products = rows @ rows.T if self.is_wide else rows.T @ rows
        self.right = targets if self.is_wide else rows.T @ targets

    def solve(self, rows: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """Return coefficients (k, width) and intercepts (k,); `rows` are those that it has seen."""
        products = self.products.copy()
        products.flat[:: len(products) + 1] += alpha
        coef = np.linalg.solve(products, self.right)
        if self.is_wide:
            of_rows = coef * self.roots
            coef = rows.T @ of_rows.astype(rows.dtype) - np.outer(self.mean, of_rows.sum(0))
        return coef.T, self.mean_target - self.mean @ coef


def _loss(learnt: Learnt, coef: np.ndarray, intercept: np.ndarray) -> float:
    """Return the sum of the weighted losses of rows."""
    outputs = torch.from_numpy(learnt.rows @ coef.T + intercept)
    targets = torch.from_numpy(learnt.targets)
    if learnt.kind != "class":
        targets = targets.reshape(len(outputs), -1).to(outputs.dtype)
    losses = Loss(learnt.kind)(outputs, targets).double().numpy()
    return float(losses @ learnt.weights)


def _logistic(
    X: np.ndarray, y: np.ndarray, weights: np.ndarray, classes: Sequence[int], model: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return a row of coefficients and an intercept for each class; one never seen is unlikely."""
    coef = np.zeros((len(classes), X.shape[1]))
    intercept = np.full(len(classes), -10.0)
    seen = np.unique(y)
    if len(seen) == 1:
        intercept[int(seen[0])] = 0.0
        return coef, intercept
    with _unconverged:
        model.fit(X, y, weights)
    rows, offsets = model.coef_, model.intercept_
    if len(seen) == 2:  # scikit-learn gives one row, the difference of two
        rows, offsets = np.concatenate([-rows, rows]) / 2, np.concatenate([-offsets, offsets]) / 2
    coef[seen.astype(int)], intercept[seen.astype(int)] = rows, offsets
    return coef, intercept


# ------------------------------------------------------------------------------ pairs


def make_projection(head: Sequence[int] | nn.Module, width: int) -> nn.Module:
    """Build a projection head; it is thrown away after the training.

    Parameters
    ----------
    head : sequence of int or nn.Module
        Sizes of its layers: linear ones, with batch-norm and ReLU between them. Or a module, which
        is copied, from (n, width) to (n, d).
    width : int
        Features of an embedding.
    """
    if isinstance(head, nn.Module):
        return _checked_copy(head, width, None)
    remedy = (
        "pass the sizes of the projection head's layers, one or more positive ints, or a "
        "torch.nn.Module."
    )
    sizes = _sizes(head, remedy)
    if not sizes:
        raise ValueError(f"head={head!r}: {remedy}")
    layers: list[nn.Module] = []
    for size in sizes[:-1]:
        layers += [nn.Linear(width, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, sizes[-1]))


class NTXent(nn.Module):
    """Normalised temperature-scaled cross-entropy of pairs.

    Of 2 n rows, row i and row n + i are the pair A and B of one picture. With the cosine s of two
    rows and the temperature t, each row's loss is

        - log( exp(s(row, its partner) / t) / sum over all other rows r of exp(s(row, r) / t) ),

    and the loss is the mean over all 2 n rows, so that A looks for B and B for A alike.

    Parameters
    ----------
    temperature : float
        Above 0; the smaller, the more the nearest wrong rows count.

    References
    ----------
    Chen, Kornblith, Norouzi and Hinton, "A simple framework for contrastive learning of visual
    representations" (2020), equation 1.

    Examples
    --------
    >>> import torch
    >>> from sktransfer._training.heads import NTXent
    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(NTXent(0.5)(rows).item(), 4)                               # log(1 + 2 exp(-2))
    0.2395
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the loss of rows (2 n, d), a number."""
        rows = F.normalize(rows, dim=1)
        similarities = rows @ rows.T / self.temperature  # (2n, 2n)
        is_itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        partner = torch.arange(len(rows), device=rows.device).roll(len(rows) // 2)
        return F.cross_entropy(similarities.masked_fill(is_itself, -torch.inf), partner)


def matching_accuracy(rows: torch.Tensor) -> float:
    """Return for which share of n pictures B is the most similar to A of all n; chance is 1 / n.

    Parameters
    ----------
    rows : tensor of shape (2 n, d)
        As `NTXent` takes them.
    """
    a, b = F.normalize(rows, dim=1).chunk(2)
    nearest = (a @ b.T).argmax(1)  # (n,)
    return (nearest == torch.arange(len(a), device=rows.device)).float().mean().item()


def spread(rows: torch.Tensor) -> float:
    """Return how far rows of length 1 lie apart: their variance, 0 where all are one, at most 1.

    Parameters
    ----------
    rows : tensor of shape (n, d)
        Of any length: they are brought to 1.
    """
    rows = F.normalize(rows, dim=1)
    return (rows - rows.mean(0)).square().sum(1).mean().item()


# ------------------------------------------------------------------------------ losses


class Loss(nn.Module):
    """Cross-entropy of classes or labels, or squared error of values: one loss for each image."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the losses (n,)."""
        if self.kind == "class":
            return F.cross_entropy(outputs, y, reduction="none")
        if self.kind == "label":
            return F.binary_cross_entropy_with_logits(outputs, y, reduction="none").mean(1)
        return F.mse_loss(outputs, y, reduction="none").mean(1)
