"""The projection head: what turns an embedding into the row that is compared with others."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from sktransfer.models._modules import copy_of


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
        return _check_rows(copy_of(head).float(), width)
    sizes: list[Any] = list(head)
    valid = (isinstance(s, Integral) and not isinstance(s, bool) and int(s) > 0 for s in sizes)
    if not sizes or not all(valid):
        raise ValueError(
            f"head={head!r}: pass the sizes of the projection head's layers, one or more positive "
            "ints, or a torch.nn.Module."
        )
    layers: list[nn.Module] = []
    for size in map(int, sizes[:-1]):
        layers += [nn.Linear(width, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, int(sizes[-1])))


def _check_rows(head: nn.Module, width: int) -> nn.Module:
    was_training = head.training
    try:
        with torch.no_grad():
            output: Any = head.eval()(torch.zeros(2, width))  # also shapes lazy layers
    except Exception as error:
        raise ValueError(
            f"head can't take embeddings of {width} features: {error}. Its first layer must take "
            f"{width}, as nn.Linear({width}, ...) or nn.LazyLinear(...) do."
        ) from error
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != 2:
        came = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(
            f"head must return a row for each embedding, so shape (2, d) for 2; it returned {came}."
        )
    return head.train(was_training)
