"""The plots of a comparison's page, as SVG in the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import auc, roc_curve

from sktransfer._cli.results import Report, Result, best_of, full_name
from sktransfer.metrics import expected_calibration_error

_GREY = "#9a9a9a"
_INK = "#123456"  # of plots, replaced by the colour of the page's text
_COLORS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a7a00", "#7a7a7a"]


def _draw(draw: Callable[[Any], None], height: float = 3.6) -> str:
    """Return a figure as SVG in the colours of the page; `draw` gets the figure."""
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(keys, _INK) | {
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=_COLORS),
        "legend.frameon": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=(5.4, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.S)  # it would be the whole page's
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawn)


def _drawn(text: str) -> str:
    """Return text as matplotlib draws it: no formula, and escapes of what the font has not."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    shown = "".join(
        c if ord(c) in known else c.encode("ascii", "backslashreplace").decode() for c in text
    )
    return shown.replace("$", r"\$")


def _style(result: Result, results: Sequence[Result]) -> dict[str, Any]:
    """One colour for a classifier, one marker for a backbone, in all plots."""
    names = list(dict.fromkeys(other.classifier for other in results))
    backbones = [name for name in dict.fromkeys(r.backbone for r in results) if name != "none"]
    several = len(backbones) > 1 and result.backbone != "none"
    label = f"{result.classifier} ({result.backbone})" if several else result.classifier
    return {
        "color": _COLORS[names.index(result.classifier) % len(_COLORS)],
        "marker": "osD^v<>P"[backbones.index(result.backbone) % 8] if several else "o",
        "label": _drawn(label),
    }


def _plain_log(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def plot_cost(report: Report, results: Sequence[Result]) -> tuple[str, str]:
    embedding = {cost.backbone: cost.seconds for cost in report.costs}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for result in results:
            accuracy, style = result.scores["accuracy"], _style(result, results)
            if result.classifier == "majority class":
                axes.axhline(accuracy.mean(), color=_GREY, label=style["label"])
                continue
            seconds = embedding.get(result.backbone, 0) + result.fit_seconds.mean()
            axes.errorbar(seconds, accuracy.mean(), accuracy.std(), capsize=3, ls="none", **style)
        published = report.published(results[0].convention)
        for figure_, style_ in zip(published, ("--", ":", "-."), strict=False):
            axes.axhline(figure_["accuracy"], color=_GREY, ls=style_, label=figure_["classifier"])
        axes.set(xscale="log", xlabel="seconds", ylabel="accuracy")
        _plain_log(axes.xaxis)
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
        axes.grid(alpha=0.3)

    return _draw(draw, 4.2), "To embed all images, and to fit one training part."


def plot_depth(results: Sequence[Result]) -> tuple[str, str]:
    tuned = [result for result in results if result.depth is not None]
    names = list(dict.fromkeys(str(result.depth) for result in tuned))

    def draw(figure: Any) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for backbone in dict.fromkeys(result.backbone for result in tuned):
            ours = [result for result in tuned if result.backbone == backbone]
            places = [names.index(str(result.depth)) for result in ours]
            accuracies = [result.scores["accuracy"] for result in ours]
            means, deviations = [a.mean() for a in accuracies], [a.std() for a in accuracies]
            upper.errorbar(places, means, deviations, marker="o", capsize=3, label=_drawn(backbone))
            lower.plot(places, [r.fit_seconds.mean() for r in ours], marker="o")
            for result in (r for r in results if r.backbone == backbone and r.depth is None):
                label = f"{result.classifier} on embeddings"
                upper.axhline(result.scores["accuracy"].mean(), color=_GREY, ls=":", label=label)
        upper.set(ylabel="accuracy")
        lower.set(yscale="log", ylabel="seconds of a fit", xlabel="unfrozen blocks (depth)")
        _plain_log(lower.yaxis)
        lower.set_xticks(range(len(names)), [_drawn(name) for name in names])
        upper.legend(fontsize="small")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)

    return _draw(draw, 4.4), "Means and standard deviations over the splits."


def plot_roc(results: Sequence[Result]) -> tuple[str, str]:
    """Two classes: a curve for each classifier. More: a curve for each class, of the best."""
    if len(results[0].classes) == 2:
        positive, said = results[0].positive, f"Of {results[0].positive!r}; "
        curves = [
            (_style(r, results), np.concatenate(r.y_true) == positive, _ranks(r))
            for r in results
            if r.classifier != "majority class"
        ]
    else:
        best = best_of(results)
        said = f"Of each class against the rest, by {full_name(best)}; "
        scores, truth = np.concatenate(best.y_score), np.concatenate(best.y_true)
        curves = [
            (
                {"label": _drawn(str(c)), "color": _COLORS[i % len(_COLORS)]},
                truth == c,
                scores[:, i],
            )
            for i, c in enumerate(best.classes)
        ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for style, truth, score in curves:
            rates = roc_curve(truth, score)[:2]  # false and true positives
            name = f"{style['label']} ({auc(*rates):.2f})"
            dash = "-" if style.get("marker", "o") == "o" else "--"
            axes.plot(*rates, color=style["color"], linestyle=dash, label=name)
        axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1)
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")

    said += "the splits are pooled by rank, so areas differ a little from the table."
    return _draw(draw, 4.2 + 0.09 * len(curves)), said


def _ranks(result: Result) -> np.ndarray:
    """Scores of all splits on one scale: classifiers of two splits differ in theirs."""
    return np.concatenate([np.argsort(np.argsort(s)) / len(s) for s in result.y_score])


def plot_reliability(results: Sequence[Result]) -> tuple[str, str]:
    """How often what was said with a probability was so; nothing without probabilities."""
    known = [r for r in results if r.depth is not None or "logistic" in r.classifier]
    if not known:
        return "", ""
    best = best_of(known)
    right, confidence = _confidences(best)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        shares, means = calibration_curve(right, confidence, n_bins=10, strategy="quantile")
        axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1)
        axes.plot(means, shares, marker="o", color=_COLORS[0])
        low = min(0.5, *means, *shares)
        axes.set(xlim=(low, 1.01), ylim=(low, 1.01), ylabel="share that is right")
        axes.set(xlabel="probability of what is said")

    gap = f"On average {confidence.mean():.0%} sure and {right.mean():.0%} right"
    error = f"expected calibration error {_calibration_error(best):.3f}"
    return _draw(draw), f"{full_name(best)}. {gap}, {error}; below the dotted line it is too sure."


def _calibration_error(result: Result) -> float:
    y, score = np.concatenate(result.y_true), np.concatenate(result.y_score)
    if score.ndim == 2:
        return expected_calibration_error(y, score, labels=result.classes)
    (other,) = result.classes[result.classes != result.positive]
    return expected_calibration_error(y, expit(score), labels=[other, result.positive])


def _confidences(result: Result) -> tuple[np.ndarray, np.ndarray]:
    right = np.concatenate(result.y_true) == np.concatenate(result.y_pred)
    score = np.concatenate(result.y_score)
    probability = expit(np.abs(score)) if score.ndim == 1 else score.max(axis=1)
    return right, probability
