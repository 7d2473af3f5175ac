"""A comparison as one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from sktransfer._cli.audit_page import main_findings
from sktransfer._cli.plots import plot_cost, plot_depth, plot_reliability, plot_roc
from sktransfer._cli.results import Report, Result, best_of, full_name, gains
from sktransfer._cli.whole_page import small_image, whole_page
from sktransfer._escaping import printable

_N_MISTAKES, _N_RIGHT = 8, 4  # thumbnails


def page(report: Report) -> str:
    """Return the whole page as text; it loads nothing from elsewhere."""
    title = html.escape(f"{report.task.name}: {len(report.task.images)} images")
    body = "".join(_section(report, convention) for convention in report.conventions)
    if report.findings is not None:
        body += main_findings(report.findings)
    return whole_page(title, body + _costs(report), html.escape(report.task.note))


def _section(report: Report, convention: str) -> str:
    results = report.of(convention)
    best = best_of(results)
    plots = [
        ("Accuracy against seconds", plot_cost(report, results)),
        ("ROC curves", plot_roc(results)),
        ("How far probabilities can be believed", plot_reliability(results)),
    ]
    if any(result.depth is not None for result in results):
        plots.insert(0, ("Accuracy and seconds against the depth", plot_depth(results)))
    figures = "".join(_figure(caption, *plot) for caption, plot in plots)
    heading = f"<h2>{html.escape(convention)}</h2>" if convention else ""
    return (
        f"{heading}{_headline(report, results, best)}{_bars(report, results, best)}"
        f"{_confusion(best)}{_thumbnails(report, best)}"
        f'<h3>Curves</h3><div class="plots">{figures}</div>'
    )


def _figure(caption: str, drawn: str, said: str) -> str:
    if not drawn:
        return ""
    words = f"<strong>{caption}.</strong> {html.escape(said)}"
    return f"<figure>{drawn}<figcaption>{words}</figcaption></figure>"


# ------------------------------------------------------------------------------ in words


def _headline(report: Report, results: Sequence[Result], best: Result) -> str:
    right = f"{100 * best.scores['accuracy'].mean():.1f} %"
    said = "; ".join(gains(results, best))
    counts = ", ".join(f"{n} {label}" for label, n in report.counts(best.convention).items())
    return (
        f'<p class="headline">{html.escape(full_name(best))} gets <em>{right}</em> of the '
        f"images right{html.escape(': ' + said if said else '')}.</p>"
        f'<p class="note">{html.escape(counts)}. Means over {report.n_splits} random '
        f"split{'s' * (report.n_splits > 1)}, a quarter of the images in each test part.</p>"
    )


def _costs(report: Report) -> str:
    lines = []
    for cost in report.costs:
        line = f"{cost.backbone}: {cost.n_features:,} features an image. "
        if cost.n_computed:
            speed = cost.n_images / cost.seconds
            line += (
                f"The first run took {_duration(cost.seconds)} for {cost.n_images:,} images, "
                f"{speed:,.0f} a second"
            )
            known = cost.n_images - cost.n_computed
            line += f" ({known:,} known or repeated)" if known else ""
        else:
            line += "All were in the memory"
        lines.append(f"{line}; reading them again takes {_duration(cost.second_seconds)}.")
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>What the embeddings cost</h2><ul>{items}</ul>" if lines else ""


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


# ------------------------------------------------------------------------------ tables


def _bars(report: Report, results: Sequence[Result], best: Result) -> str:
    metrics = {"balanced_accuracy": "balanced", "f1": "F1", "roc_auc": "ROC AUC"}
    several = report.n_splits > 1
    head = ["", "accuracy", "mean ± sd" if several else "", *metrics.values(), "fit, s"]
    rows, network = [], "none"
    for result in results:
        if result.backbone != network:
            network = result.backbone
            rows.append(f'<tr class="network"><td colspan="7">{html.escape(network)}</td></tr>')
        accuracy = result.scores["accuracy"]
        spread = accuracy.std() if several else 0
        cells = [html.escape(result.classifier), _bar(accuracy.mean(), spread)]
        cells.append(f"{accuracy.mean():.3f}" + (f" ± {spread:.3f}" if several else ""))
        cells += [f"{result.scores[metric].mean():.3f}" for metric in metrics]
        cells.append(f"{result.fit_seconds.mean():.1f}")
        rows.append(_row(cells, "best" if result is best else ""))
    for figure in report.published(best.convention):
        shown = [f"{figure[m]:.3f}" if m in figure else "" for m in metrics]
        cells = [html.escape(figure["classifier"]), _bar(figure["accuracy"], 0)]
        rows.append(_row([*cells, f"{figure['accuracy']:.3f}", *shown, ""], "published"))
    titles = "".join(f"<th>{title}</th>" for title in head)
    mean = "" if best.positive is not None else ", of all classes"
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="note">F1{html.escape(f" of {best.positive!r}" if not mean else mean)}; fit: '
        "seconds for one training part, tuning included.</p>"
    )


def _row(cells: Sequence[str], kind: str) -> str:
    first, bar, *others = cells
    rest = "".join(f"<td>{cell}</td>" for cell in others)
    return f'<tr class="{kind}"><td>{first}</td><td class="bars">{bar}</td>{rest}</tr>'


def _bar(value: float, spread: float) -> str:
    low, high = max(0, value - spread), min(1, value + spread)
    whisker = (
        f'<div class="whisker" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></div>'
    )
    return (
        f'<div class="track"><div class="bar" style="width:{100 * value:.2f}%"></div>'
        f"{whisker if spread else ''}</div>"
    )


def _confusion(best: Result) -> str:
    """Counts over all splits, and shares of each true class."""
    truth, said = np.concatenate(best.y_true), np.concatenate(best.y_pred)
    counts = confusion_matrix(truth, said, labels=best.classes)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    names = [html.escape(printable(str(name))) for name in best.classes]
    rows = []
    for name, numbers, parts in zip(names, counts, shares, strict=True):
        cells = "".join(
            f'<td style="background:color-mix(in srgb, var(--bar) {100 * share:.0f}%, '
            f'transparent)">{f"{n}<br><small>{share:.0%}</small>" if n else "·"}</td>'
            for n, share in zip(numbers, parts, strict=True)
        )
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f"<h3>What {html.escape(full_name(best))} takes for what</h3>"
        '<div class="scroll"><table class="confusion">'
        f"<thead><tr><th>is, and is taken for</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="note">Test images of all splits, and their share of the true class.</p>'
    )


# ------------------------------------------------------------------------------ thumbnails


def _thumbnails(report: Report, best: Result) -> str:
    margins = np.concatenate([_margins(best, i) for i in range(len(best.y_true))])
    numbers, truth, said = map(np.concatenate, (best.tests, best.y_true, best.y_pred))
    wrong = truth != said
    parts = [
        ("Its worst mistakes", wrong, _N_MISTAKES),
        ("And some it is sure of", ~wrong, _N_RIGHT),
    ]
    shown = ""
    for heading, which, n in parts:
        order = [int(k) for k in np.argsort(-margins, kind="stable") if which[k]]
        firsts = {int(numbers[k]): k for k in reversed(order)}  # of each image, the worst time
        picked = sorted(firsts.values(), key=order.index)[:n]
        figures = [_thumbnail(report, int(numbers[k]), truth[k], said[k]) for k in picked]
        if figures:
            shown += f'<h3>{heading}</h3><div class="thumbs">{"".join(figures)}</div>'
    return shown


def _margins(result: Result, split: int) -> np.ndarray:
    """Return by how much each test image of a split seems to be what was said of it, in ranks."""
    score = result.y_score[split]
    if score.ndim == 1:
        margin = np.abs(score)
    else:
        two = np.sort(score, axis=1)[:, -2:]
        margin = two[:, 1] - two[:, 0]
    return np.argsort(np.argsort(margin)) / len(margin)


def _thumbnail(report: Report, number: int, truth: Any, said: Any) -> str:
    name = html.escape(printable(str(report.task.images[number]).rpartition("/")[2]))
    kind = "" if truth == said else ' class="wrong"'
    words = f"is {truth}" if truth == said else f"taken for {said}, is {truth}"
    return (
        f'<figure><img alt="{name}" src="{small_image(report.task.images[number])}">'
        f"<figcaption><span{kind}>{html.escape(printable(words))}</span><br>{name}</figcaption></figure>"
    )
