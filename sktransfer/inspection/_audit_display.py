"""The first findings of an audit, as images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from sktransfer.inspection._plotting import grid_axes, put_image, shown, text_of
from sktransfer.io import check_images

_PAIRS_IN_A_ROW = 3


class AuditDisplay:
    """The first findings of an audit: each image, and beside it the one of which it is a copy.

    Parameters
    ----------
    images : sequence of n ndarrays (height, width, 3), uint8, or None
        None for an image that can't be read.
    others : sequence of n ndarrays (height, width, 3), uint8, or None
        None where there is no other image.
    titles, other_titles : sequences of n lists of str
        Lines above them.
    rows : ndarray of shape (n,)
        Of the images.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Around the images.
    axes_ : ndarray of matplotlib Axes, shape (n_grid_rows, n_grid_columns)
        The images, each with its other one on the right.
    figure_ : matplotlib Figure

    See Also
    --------
    sktransfer.model_selection.audit : Makes the findings.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer.inspection import AuditDisplay
    >>> from sktransfer.model_selection import audit
    >>> china, flower = load_sample_images().images                  # two arrays (427, 640, 3)
    >>> X = [china, flower, np.fliplr(china)]
    >>> display = AuditDisplay.from_audit(audit(X), X)
    >>> display.rows.tolist()
    [2]
    """

    def __init__(
        self,
        images: Sequence[np.ndarray | None],
        others: Sequence[np.ndarray | None],
        titles: Sequence[Sequence[str]],
        other_titles: Sequence[Sequence[str]],
        rows: np.ndarray,
    ) -> None:
        self.images, self.others, self.rows = images, others, rows
        self.titles, self.other_titles = titles, other_titles

    @classmethod
    def from_audit(
        cls, findings: Any, X: Any, *, n_findings: int = 12, ax: Any = None, **kwargs: Any
    ) -> Self:
        """Plot the first findings.

        Parameters
        ----------
        findings : pandas.DataFrame
            What :func:`sktransfer.model_selection.audit` returns, or a part of its rows, such as
            ``findings[findings.kind == "label"]``.
        X : sequence of images
            Those that were audited.
        n_findings : int, default=12
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        AuditDisplay

        Raises
        ------
        ValueError
            If there are no findings to plot.
        """
        images = check_images(X)
        first = findings.head(n_findings)
        if not len(first):
            raise ValueError("findings has no rows: there is nothing to plot.")
        others = [None if row is None else int(row) for row in _plain(first["other_row"])]
        rows = first["row"].to_numpy()
        titles = [
            [kind, _name(row, label)]
            for kind, row, label in zip(first["kind"], rows, first["label"], strict=True)
        ]
        for lines, row, label in zip(titles, others, first["other_label"], strict=True):
            if row is None and label is not None:
                lines[0] += f": {text_of(label)}?"
        other_titles = [
            [] if row is None else ["copy of", _name(row, label)]
            for row, label in zip(others, first["other_label"], strict=True)
        ]
        display = cls(
            [_picture(images, row) for row in rows.tolist()],
            [None if row is None else _picture(images, row) for row in others],
            titles,
            other_titles,
            rows,
        )
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None) -> Self:
        """Draw the findings.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            A subplot that makes room for them; None for a new figure.

        Returns
        -------
        self
        """
        n = len(self.images)
        n_across = min(_PAIRS_IN_A_ROW, n)
        shape = -(-n // n_across), 2 * n_across
        self.ax_, self.axes_ = grid_axes(ax, *shape)
        self.figure_ = self.ax_.figure
        places = self.axes_.reshape(-1, 2)
        for i, (first, second) in enumerate(places[:n]):
            _put(first, self.images[i], self.titles[i], "no image")
            _put(second, self.others[i], self.other_titles[i], "")
        return self


def _plain(values: Any) -> list[Any]:
    return values.astype(object).where(values.notna(), None).tolist()


def _name(row: int, label: Any) -> str:
    return f"image {row}" if label is None else f"{text_of(label)} (image {row})"


def _picture(images: Any, row: int) -> np.ndarray | None:
    """Return an image as it is shown, None if it can't be read."""
    try:
        return shown(images, row)
    except ValueError:
        return None


def _put(axes: Any, image: np.ndarray | None, lines: Sequence[str], instead: str) -> None:
    if image is not None:
        put_image(axes, image, lines)
    elif lines:
        put_image(axes, np.full((1, 1, 3), 230, np.uint8), lines)
        axes.text(0, 0, instead, ha="center", va="center", fontsize=8)
