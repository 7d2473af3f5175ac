"""What a pass over images reads from the memory and writes to it, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from sktransfer.models._weights import is_finite, not_finite


class Names(NamedTuple):
    """Names, in the memory, of what a pass computes.

    Attributes
    ----------
    wanted : list of str
        Of the results that are asked for; an image is computed if one of them is missing.
    by_products : list of str
        Of the results that the computation of an image has besides.
    kept : set of str
        Those of both that the memory keeps.
    claim : str
        Passes that share work claim images under one name.
    texts : dict of str to str
        What users call some of them; the memory keeps it, to say what it holds.
    """

    wanted: list[str]
    by_products: list[str]
    kept: set[str]
    claim: str
    texts: dict[str, str] = {}


class Write(NamedTuple):
    """Results to keep: their name in the memory, digests of the images, a row for each."""

    key: str
    digests: list[bytes]
    rows: np.ndarray

    def not_finite(self) -> set[bytes]:
        """Return the digests of images whose rows hold NaN or infinity."""
        rows = torch.from_numpy(self.rows)
        rows = rows.view(torch.bfloat16) if rows.dtype == torch.int16 else rows  # see FrozenBlocks
        if is_finite(rows):
            return set()
        return {d for d, row in zip(self.digests, rows, strict=True) if not is_finite(row)}

    def without(self, digests: set[bytes]) -> Write:
        """Return what is left without some images."""
        kept = [i for i, digest in enumerate(self.digests) if digest not in digests]
        return Write(self.key, [self.digests[i] for i in kept], self.rows[kept])


def why_not_finite(runner: Any) -> str:
    """Return why a result holds NaN or infinity, and a remedy."""
    precision = getattr(runner, "precision", "float32")
    problem = (
        f"network {runner.name!r} returned NaN or infinity for this image, computing in {precision}"
    )
    if (name := not_finite(runner.network)) is not None:
        return f"{problem}: its {name} holds such values. Pass other weights."
    if precision == "float16":
        return (
            f"{problem}, whose largest number is 65504. Pass precision='bfloat16', which has the "
            "range of float32, or precision='float32'."
        )
    if precision == "bfloat16":
        return f"{problem}. Pass precision='float32'."
    return (
        f"{problem}. Its weights are finite, so one of its layers overflows or divides by zero: "
        "pass the weights and the preprocessing that belong together, or another network."
    )
