"""Heads, what turns an embedding into outputs, and their losses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.nn import functional as F

from sktransfer.models._modules import copy_of

# Inverse regularisation of the logistic head, on embeddings of mean variance 1: alone, and as the
# start of training, where one that is sure of itself costs log-loss; tables in docs/results.md.
_C = 0.03
_C_START = 0.003
_ALPHA = 10  # and of ridge regression


def make_head(head: Any, width: int, n_outputs: int, dropout: float) -> nn.Module:
    """Build what `head` stands for; a linear layer starts at zero, so at equal chances."""
    if isinstance(head, nn.Module):
        return _checked_copy(head, width, n_outputs)
    hidden = () if isinstance(head, str) else head
    layers: list[nn.Module] = [nn.Dropout(dropout)]
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
    head = copy_of(head).float()
    was_training = head.training
    try:
        with torch.no_grad():
            output: Any = head.eval()(torch.zeros(2, width))
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


def solve_head(
    head: nn.Sequential,
    embeddings: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray | None,
    kind: str,
    *,
    is_start: bool = False,
) -> None:
    """Set the linear layer of `head` to the optimum on frozen embeddings.

    Logistic regression, or ridge regression, on embeddings of mean 0 and mean variance 1; this
    scaling is folded into the layer.

    Parameters
    ----------
    head : nn.Sequential
        From ``make_head("linear", ...)``.
    embeddings : ndarray of shape (n, width), float32
    targets : ndarray
        Class numbers (n,) of kind "class"; zeros and ones (n, k) of kind "label"; values (n, k)
        of kind "value".
    weights : ndarray of shape (n,) or None
    kind : {"class", "label", "value"}
    is_start : bool, default=False
        Whether blocks are trained from here on: a logistic regression is then regularised more.
    """
    C = _C_START if is_start else _C
    weights = np.ones(len(embeddings)) if weights is None else weights
    mean = np.average(embeddings, axis=0, weights=weights)
    # One scale for all features: with one for each, those that hardly vary would get weights so
    # large that their gradients spoil the blocks as soon as these are trained.
    scale = np.sqrt(np.average((embeddings - mean) ** 2, axis=0, weights=weights).mean()) or 1.0
    X = ((embeddings - mean) / scale).astype(np.float32)
    layer = head[-1]
    assert isinstance(layer, nn.Linear)
    n_outputs = layer.out_features
    if kind == "value":
        model = Ridge(alpha=_ALPHA).fit(X, targets, weights)
        coef, intercept = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
    elif kind == "label":
        parts = [_logistic(X, column, weights, [0, 1], C) for column in targets.T]
        coef = np.stack([coef[1] - coef[0] for coef, _ in parts])
        intercept = np.stack([intercept[1] - intercept[0] for _, intercept in parts])
    else:
        coef, intercept = _logistic(X, targets, weights, range(n_outputs), C)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(coef / scale))
        layer.bias.copy_(torch.from_numpy(intercept - (coef / scale) @ mean))


def _logistic(
    X: np.ndarray, y: np.ndarray, weights: np.ndarray, classes: Sequence[int], C: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return a row of coefficients and an intercept for each class; one never seen is unlikely."""
    coef = np.zeros((len(classes), X.shape[1]))
    intercept = np.full(len(classes), -10.0)
    seen = np.unique(y)
    if len(seen) == 1:
        intercept[int(seen[0])] = 0.0
        return coef, intercept
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # training goes on from here
        model = LogisticRegression(C=C, max_iter=1000).fit(X, y, weights)
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
