"""Images that stand out by themselves: blank, dark, bright, blurred, small, of another shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sktransfer.model_selection._image_facts import ImageFacts

_SAME = 4  # levels of 255, within which all but 2 % of a blank image's pixels lie
_DARK, _BRIGHT = 50, 230  # levels that 95 % of the pixels do not exceed, or that 95 % reach
_SMALL = 64  # pixels of the shorter side
_HALF = 0.5  # of what is usual in these data
_BLURRED = 0.25  # of the usual sharpness
_ODD = 2.5  # times as long, for its width, as is usual
_FAR = 3.5  # robust standard deviations above the median (Iglewicz and Hoaglin 1993)
_LEAST = 0.05  # of these deviations, of logarithms: where many images are equally far
_FEW = 20  # images, of which none is an outlier


class ImageFinding(NamedTuple):
    """What is odd about one image: a kind, how odd (in a kind, more is odder), and why in words."""

    row: int
    kind: str
    score: float
    reason: str


def odd_images(facts: ImageFacts) -> Iterator[ImageFinding]:
    """Yield images that are blank, dark, bright, blurred, tiny or of an odd shape.

    All but blank ones are so by themselves and beside the other images: of data that are dark by
    nature, no image is called dark.
    """
    if not len(facts.rows):
        return
    blank = facts.column("brightest") - facts.column("darkest") <= _SAME
    level = facts.column("bright") / 255
    for row in np.flatnonzero(blank).tolist():
        reason = f"All of it has one brightness, {level[row]:.0%} of white."
        yield ImageFinding(row, "blank", 1.0, reason)
    for find in (_dark, _bright, _blurred, _tiny, _odd_shaped):
        yield from (finding for finding in find(facts) if not blank[finding.row])


def _dark(facts: ImageFacts) -> Iterator[ImageFinding]:
    level = facts.column("bright")
    usual = np.median(level)
    for row in np.flatnonzero((level < _DARK) & (level < _HALF * usual)).tolist():
        reason = (
            f"95% of its pixels are darker than {level[row] / 255:.0%} of white; of an image in "
            f"the middle of these data, they are darker than {usual / 255:.0%}."
        )
        yield ImageFinding(row, "dark", float(1 - level[row] / 255), reason)


def _bright(facts: ImageFacts) -> Iterator[ImageFinding]:
    level = facts.column("dark")
    usual = np.median(level)
    for row in np.flatnonzero((level > _BRIGHT) & (255 - level < _HALF * (255 - usual))).tolist():
        reason = (
            f"95% of its pixels reach {level[row] / 255:.0%} of white; of an image in the middle "
            f"of these data, they reach {usual / 255:.0%}."
        )
        yield ImageFinding(row, "bright", float(level[row] / 255), reason)


def _blurred(facts: ImageFacts) -> Iterator[ImageFinding]:
    sharpness = facts.column("sharpness")
    usual = _median(sharpness)
    for row in np.flatnonzero(sharpness < _BLURRED * usual).tolist():
        share = sharpness[row] / usual
        reason = f"Its finest details have {share:.0%} of the contrast that is usual in these data."
        yield ImageFinding(row, "blurred", float(1 - share), reason)


def _tiny(facts: ImageFacts) -> Iterator[ImageFinding]:
    height, width = facts.column("height"), facts.column("width")
    side = np.minimum(height, width)
    usual = np.median(side)
    for row in np.flatnonzero((side < _SMALL) & (side < _HALF * usual)).tolist():
        reason = (
            f"It has {width[row]:.0f} × {height[row]:.0f} pixels; the shorter side of an image in "
            f"the middle of these data has {usual:.0f}."
        )
        yield ImageFinding(row, "tiny", float(1 - side[row] / usual), reason)


def _odd_shaped(facts: ImageFacts) -> Iterator[ImageFinding]:
    height, width = facts.column("height"), facts.column("width")
    shape = np.log(width / height)
    usual = np.median(shape)
    factor = np.exp(np.abs(shape - usual))
    for row in np.flatnonzero(factor > _ODD).tolist():
        kind = "wide for its height" if shape[row] > usual else "high for its width"
        reason = (
            f"It has {width[row]:.0f} × {height[row]:.0f} pixels: {factor[row]:.1f} times as "
            f"{kind} as is usual in these data."
        )
        yield ImageFinding(row, "odd shape", float(1 - 1 / factor[row]), reason)


def _median(values: np.ndarray) -> float:
    """Return the median of what is a number, 0 if nothing is."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else 0.0


def outliers(distances: np.ndarray) -> Iterator[ImageFinding]:
    """Yield images that are far from all others.

    Parameters
    ----------
    distances : ndarray of shape (n, n_neighbors)
        To the nearest other images.
    """
    if len(distances) < _FEW:
        return
    mean = distances.mean(axis=1)
    logs = np.log(mean.clip(1e-6))
    middle = np.median(logs)
    spread = 1.4826 * np.median(np.abs(logs - middle))  # of a normal distribution, its deviation
    for row in np.flatnonzero(logs - middle > _FAR * max(spread, _LEAST)).tolist():
        factor = np.exp(logs[row] - middle)
        reason = (
            f"Its {distances.shape[1]} nearest images are {factor:.1f} times as far away as is "
            "usual in these data: it may not belong to them."
        )
        yield ImageFinding(row, "outlier", float(1 - 1 / factor), reason)
