"""The loss of contrastive learning, and what tells how far it came."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


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
    >>> from sktransfer._training.nt_xent import NTXent
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
        own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        partner = torch.arange(len(rows), device=rows.device).roll(len(rows) // 2)
        return F.cross_entropy(similarities.masked_fill(own, -torch.inf), partner)


def matching_accuracy(rows: torch.Tensor) -> float:
    """Return for which share of n pictures B is the most similar to A of all n; chance is 1 / n.

    Parameters
    ----------
    rows : tensor of shape (2 n, d)
        As `NTXent` takes them.
    """
    a, b = F.normalize(rows, dim=1).chunk(2)
    found = (a @ b.T).argmax(1)  # (n,)
    return (found == torch.arange(len(a), device=rows.device)).float().mean().item()


def spread(rows: torch.Tensor) -> float:
    """Return how far rows of length 1 lie apart: their variance, 0 where all are one, at most 1.

    Parameters
    ----------
    rows : tensor of shape (n, d)
        Of any length: they are brought to 1.
    """
    rows = F.normalize(rows, dim=1)
    return (rows - rows.mean(0)).square().sum(1).mean().item()
