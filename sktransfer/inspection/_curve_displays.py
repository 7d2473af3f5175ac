"""Displays of numbers: scores against the depth, losses of the epochs, gains by transfer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_is_fitted

from sktransfer.inspection._plotting import single_axes, text_of

__all__ = ["DepthCurveDisplay", "HistoryDisplay", "TransferGainDisplay"]

_LEAST_SHARE = 0.25  # of a fit; less may be the noise of its seconds


class DepthCurveDisplay:
    """Score and cost against the number of unfrozen blocks.

    Parameters
    ----------
    depths : sequence of n ints, str or lists
        Values of `unfreeze`.
    scores : array-like of shape (n,)
        Mean cross-validated score of each.
    scores_std : array-like of shape (n,)
        Standard deviation over the folds.
    seconds : array-like of shape (n,) or None, default=None
        Mean time of a fit.
    score_name : str, default="score"
    shared_seconds : array-like of shape (n,) or None, default=None
        What it took besides because others had not run the frozen blocks on its images before.

    Attributes
    ----------
    ax_ : matplotlib Axes
        With the scores.
    ax_cost_ : matplotlib Axes or None
        With the seconds, on the right.
    figure_ : matplotlib Figure

    See Also
    --------
    sklearn.model_selection.LearningCurveDisplay : Score against the number of images.

    Examples
    --------
    >>> from sktransfer.inspection import DepthCurveDisplay
    >>> display = DepthCurveDisplay([0, 1, 4], [0.80, 0.86, 0.85], [0.02, 0.01, 0.02], [3, 9, 30])
    >>> display.plot().ax_.get_ylabel()
    'score'
    """

    def __init__(
        self,
        depths: Sequence[Any],
        scores: Any,
        scores_std: Any,
        seconds: Any = None,
        *,
        score_name: str = "score",
        shared_seconds: Any = None,
    ) -> None:
        self.depths, self.scores, self.scores_std = depths, scores, scores_std
        self.seconds, self.score_name = seconds, score_name
        self.shared_seconds = shared_seconds

    @classmethod
    def from_estimator(
        cls, search: Any, *, metric: str | None = None, ax: Any = None, **kwargs: Any
    ) -> Self:
        """Plot a fitted search.

        Parameters
        ----------
        search : GridSearchCV, RandomizedSearchCV or a halving one
            Fitted; one of the parameters that it varies is `unfreeze`, of an estimator or of a
            step of a pipeline. If it varies others as well, the best candidate of each depth
            counts.
        metric : str, default=None
            Which score, if the search has several; None for the one that it refits by.
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        DepthCurveDisplay

        Raises
        ------
        ValueError
            If the search does not vary `unfreeze`, or has no such metric.
        """
        check_is_fitted(search, "cv_results_")
        results = search.cv_results_
        metric = _metric(results, metric or getattr(search, "refit", None))
        rows = _best_of_each_depth(results, f"mean_test_{metric}")
        depths = [results[_depth_column(results)][row] for row in rows]
        name = "score" if metric == "score" else metric.replace("_", " ")
        shared = _shared_seconds(results)[rows]
        display = cls(
            depths,
            results[f"mean_test_{metric}"][rows],
            results[f"std_test_{metric}"][rows],
            results["mean_fit_time"][rows] - shared,
            score_name=f"cross-validated {name}",
            shared_seconds=shared,
        )
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, *, color: str = "C0") -> Self:
        """Draw scores as a line with bars of one standard deviation, and seconds as grey columns.

        What the first candidate paid for all is hatched.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            None for those of a new figure.
        color : str, default="C0"
            Of the line.

        Returns
        -------
        self
        """
        ax = single_axes(ax)
        places = np.arange(len(self.depths))
        ax.errorbar(
            places, self.scores, self.scores_std, color=color, marker="o", capsize=3, zorder=3
        )
        names = [_depth_name(depth) for depth in self.depths]
        is_long = max(map(len, names)) > 8
        slant = {"rotation": 30, "ha": "right"} if is_long else {}
        ax.set_xticks(places, names, **slant)
        ax.set(xlabel="unfrozen blocks (unfreeze)", ylabel=self.score_name)
        ax.margins(x=0.12, y=0.1)
        self.ax_cost_ = None
        if self.seconds is not None:
            self.ax_cost_ = cost = ax.twinx()
            cost.bar(places, self.seconds, width=0.5, color="0.88")
            tops = np.asarray(self.seconds, float)
            if self.shared_seconds is not None and np.any(self.shared_seconds):
                hatched = {"hatch": "///", "facecolor": "none", "edgecolor": "0.85"}
                cost.bar(places, self.shared_seconds, width=0.5, bottom=tops, **hatched)
                tops = tops + self.shared_seconds
            # Columns below the line: they take the lower half, the line what it needs.
            cost.set(ylabel="seconds of a fit", ylim=(0, 2 * max([*tops, 1e-9])))
            cost.yaxis.label.set_color("0.45")
            cost.tick_params(axis="y", colors="0.45")
            ax.set_zorder(cost.get_zorder() + 1)
            ax.patch.set_visible(False)
        self.ax_, self.figure_ = ax, ax.figure
        return self


class HistoryDisplay:
    """Losses of the epochs of a fit.

    Parameters
    ----------
    train_loss : sequence of float
        One for each epoch.
    valid_loss : sequence of float or None, default=None
        On the part that was held out.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sktransfer.inspection import HistoryDisplay
    >>> history = [{"train_loss": 0.9, "valid_loss": 0.8}, {"train_loss": 0.4, "valid_loss": 0.6}]
    >>> HistoryDisplay.from_history(history).ax_.get_xlabel()
    'epoch'
    """

    def __init__(
        self, train_loss: Sequence[float], valid_loss: Sequence[float] | None = None
    ) -> None:
        self.train_loss, self.valid_loss = train_loss, valid_loss

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None, **kwargs: Any) -> Self:
        """Plot `history_` of a fitted estimator.

        Parameters
        ----------
        estimator : FineTunedClassifier or FineTunedRegressor
            Fitted.
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        HistoryDisplay

        Raises
        ------
        ValueError
            If it has no epochs: with ``unfreeze=0`` a linear head is solved at once.
        """
        check_is_fitted(estimator, "history_")
        return cls.from_history(estimator.history_, ax=ax, **kwargs)

    @classmethod
    def from_history(
        cls, history: Sequence[Mapping[str, Any]], *, ax: Any = None, **kwargs: Any
    ) -> Self:
        """Plot a list of epochs, each a dict with `train_loss` and perhaps `valid_loss`.

        Parameters
        ----------
        history : list of dict
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        HistoryDisplay
        """
        if not history:
            raise ValueError(
                "history_ is empty: no epoch was trained. A linear head alone (unfreeze=0) is "
                "solved at once."
            )
        train = [epoch["train_loss"] for epoch in history]
        valid = [epoch.get("valid_loss", np.nan) for epoch in history]
        display = cls(train, None if np.isnan(valid).all() else valid)
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None) -> Self:
        """Draw a line for the training, and one for the held-out part with its best epoch.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            None for those of a new figure.

        Returns
        -------
        self
        """
        ax = single_axes(ax)
        epochs = np.arange(1, len(self.train_loss) + 1)
        ax.plot(epochs, self.train_loss, marker=".", label="training")
        if self.valid_loss is not None:
            (line,) = ax.plot(epochs, self.valid_loss, marker=".", label="held out")
            best = int(np.nanargmin(self.valid_loss))
            label = f"best: epoch {best + 1}"
            ax.plot(
                epochs[best], self.valid_loss[best], "o", ms=9, mfc="none", c=line.get_color(),
                label=label,
            )  # fmt: skip
            ax.legend()
        ax.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        self.ax_, self.figure_ = ax, ax.figure
        return self


class TransferGainDisplay:
    """How much better a pretrained network does than what it is compared with.

    Parameters
    ----------
    names : sequence of n str
        What it is compared with.
    gains : array-like of shape (n,)
        Score with pretrained weights minus that without.
    intervals : array-like of shape (n, 2)
        Lower and upper ends of their intervals.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sktransfer.inspection import TransferGainDisplay
    >>> names = ["from scratch", "RBF SVM on pixels", "majority class"]
    >>> gains, intervals = [0.11, -0.01, 0.3], [(0.08, 0.14), (-0.03, 0.01), (0.28, 0.32)]
    >>> display = TransferGainDisplay.from_result(names, gains, intervals)
    >>> [text.get_text() for text in display.ax_.get_yticklabels()]
    ['from scratch', 'RBF SVM on pixels', 'majority class']
    """

    def __init__(self, names: Sequence[Any], gains: Any, intervals: Any) -> None:
        self.names, self.gains, self.intervals = names, gains, intervals

    @classmethod
    def from_result(
        cls, names: Sequence[Any], gains: Any, intervals: Any, *, ax: Any = None, **kwargs: Any
    ) -> Self:
        """Plot gains, such as the columns of a table of comparisons.

        Parameters
        ----------
        names : array-like of shape (n,)
        gains : array-like of shape (n,)
        intervals : array-like of shape (n, 2)
            Lower and upper ends.
        ax : matplotlib Axes, default=None
        **kwargs
            For `plot`.

        Returns
        -------
        TransferGainDisplay

        Raises
        ------
        ValueError
            If the shapes do not go together, or a gain lies outside of its interval.
        """
        names, gains = list(names), np.asarray(gains, float)
        intervals = np.asarray(intervals, float)
        if gains.shape != (len(names),) or intervals.shape != (len(names), 2):
            raise ValueError(
                f"{len(names)} names, but gains of shape {gains.shape} and intervals of shape "
                f"{intervals.shape}: pass gains (n,), and intervals (n, 2) of lower and upper ends."
            )
        outside = ~((intervals[:, 0] <= gains) & (gains <= intervals[:, 1]))
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            raise ValueError(
                f"The gain {gains[i]} of {names[i]!r} lies outside of its interval {intervals[i]}."
            )
        return cls(names, gains, intervals).plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, *, score_name: str = "score") -> Self:
        """Draw a bar for each comparison: blue where transfer helps, red where it hurts.

        Grey: the interval holds 0, so neither can be said.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            None for those of a new figure.
        score_name : str, default="score"
            For the axis.

        Returns
        -------
        self
        """
        n = len(self.names)
        ax = single_axes(ax, (5.6, 1.3 + 0.45 * n))
        gains, ends = np.asarray(self.gains), np.asarray(self.intervals)
        colors = np.where(ends[:, 0] > 0, "C0", np.where(ends[:, 1] < 0, "C3", "0.6"))
        places = np.arange(n)
        lengths = np.abs(ends - gains[:, None]).T  # (2, n)
        ax.barh(places, gains, 0.6, xerr=lengths, color=colors, capsize=3, ecolor="0.2")
        ax.axvline(0, color="black", linewidth=1)
        ax.set_yticks(places, [text_of(name) for name in self.names])
        ax.invert_yaxis()  # the first on top
        ax.set(xlabel=f"gain by transfer ({score_name})", ylabel="compared with")
        ax.margins(x=0.08)
        self.ax_, self.figure_ = ax, ax.figure
        return self


# ------------------------------------------------------------------------------ depths


def _depth_column(results: Mapping[str, Any]) -> str:
    columns = [name for name in results if name.startswith("param_")]
    depths = [c for c in columns if c == "param_unfreeze" or c.endswith("__unfreeze")]
    if len(depths) != 1:
        varied = ", ".join(column.removeprefix("param_") for column in columns)
        raise ValueError(
            f"The search must vary one 'unfreeze' parameter; it varies {varied}. Search over "
            "{'unfreeze': [0, 1, 2]} of a FineTunedClassifier or FineTunedRegressor."
        )
    return depths[0]


def _metric(results: Mapping[str, Any], wanted: Any) -> str:
    known = [name.removeprefix("mean_test_") for name in results if name.startswith("mean_test_")]
    if known == ["score"] and not isinstance(wanted, str):
        return "score"
    if wanted not in known:
        raise ValueError(f"metric={wanted!r}, but the search has the metrics {', '.join(known)}.")
    return wanted


def _shared_seconds(results: Mapping[str, Any]) -> np.ndarray:
    """Estimate what the first candidate of a search paid for all, as a mean over its fits.

    With a memory, its fit on the first fold runs the network on the images of that one, (k - 1) / k
    of all; the fit on the second on the rest, 1 / k; later ones on none. That spreads the seconds
    of its fits, by which it is told; of two folds it can't be.
    """
    seconds, spread = results["mean_fit_time"], results["std_fit_time"]
    shared = np.zeros(len(seconds))
    k = len({key.split("_")[0] for key in results if re.match(r"split\d+_test_", key)})
    if k > 2:
        mean = spread[0] * math.sqrt(k / ((k - 1) * (k - 2)))
        is_known = mean > _LEAST_SHARE * seconds[0]  # else it may be chance
        shared[0] = min(mean, seconds[0]) if is_known else 0
    return shared


def _best_of_each_depth(results: Mapping[str, Any], scores: str) -> list[int]:
    """Return a row for each depth: its best score or, of a halving search, its last ones' best."""
    depths = results[_depth_column(results)]
    rounds = results.get("iter", np.zeros(len(depths)))
    values = np.nan_to_num(results[scores], nan=-np.inf)
    best: dict[str, int] = {}
    for row, depth in enumerate(depths):
        known = best.get(repr(depth))
        if known is None or (rounds[row], values[row]) > (rounds[known], values[known]):
            best[repr(depth)] = row
    return sorted(best.values(), key=lambda row: _order(depths[row]))


def _order(depth: Any) -> tuple[int, int]:
    """Numbers come first, "all" last; the sort keeps names in between as they came."""
    if isinstance(depth, str | list | tuple):
        return (2 if isinstance(depth, str) and depth == "all" else 1), 0
    return 0, int(depth)


def _depth_name(depth: Any) -> str:
    return ", ".join(depth) if isinstance(depth, list | tuple) else text_of(depth)
