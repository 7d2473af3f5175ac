"""Show a comparison: as text, as CSV, and as one self-contained HTML page."""

from __future__ import annotations

import base64
import csv
import html
import importlib.util
import io
import platform
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import auc, roc_curve

from sktransfer._cli.benchmark import METRICS, Report, Result, best_of
from sktransfer._cli.tables import as_table
from sktransfer._escaping import csv_cell


def _titles(result: Result) -> dict[str, str]:
    return {
        "accuracy": "accuracy",
        "balanced_accuracy": "balanced acc.",
        "f1": "macro F1" if result.positive is None else f"F1 of {result.positive!r}",
        "roc_auc": "ROC AUC",
    }


def as_text(report: Report) -> str:
    """Return the tables as they are printed on a terminal."""
    parts = [f"{report.task.name}: {len(report.task.images)} images, {report.n_splits} splits"]
    for convention in _conventions(report):
        if convention:
            parts.append(f"\n{convention}  ({_shares(report, convention)})")
        else:
            parts.append(f"({_shares(report, convention)})")
        parts.append(as_table(_columns(_short_rows(report, convention))))
    parts += ["", as_table(_columns(_cost_rows(report)))]
    words = "Means over the splits, ± one standard deviation; F1"
    words += _positive_in_words(report.results[0]) + "; fit: tuning included."
    return "\n".join([*parts, "", *textwrap.wrap(f"{words} {report.task.note}", 80)])


def as_document(report: Report) -> dict[str, Any]:
    """Return all that a program may want to know."""
    return {
        "task": report.task.name,
        "n_images": len(report.task.images),
        "n_splits": report.n_splits,
        "results": list(_csv_rows(report)),
        "embeddings": [asdict(cost) for cost in report.costs],
    }


def _columns(rows: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _short_rows(report: Report, convention: str) -> list[dict[str, str]]:
    """Return rows of which 80 columns hold all: one deviation, and a line for each network."""
    results, rows = _of(report, convention), []
    titles = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "f1": "F1"}
    titles["roc_auc"] = "ROC AUC"
    network = "none"
    for result in results:
        if result.backbone != network:
            network = result.backbone
            rows.append({"classifier": f"{network}:"})
        row = {"classifier": result.classifier}
        row |= {title: f"{result.scores[m].mean():.3f}" for m, title in titles.items()}
        row["accuracy"] += f" ± {result.scores['accuracy'].std():.3f}"
        if any(other.depth is not None for other in report.results):
            row["trained"] = "" if result.n_trained is None else f"{result.n_trained:,}"
        rows.append(row | {"fit, s": f"{result.fit_seconds.mean():.1f}"})
    for figure in _published(report, results):
        row = {t: f"{figure[m]:.3f}" for m, t in titles.items() if m in figure}
        rows.append({"classifier": figure["classifier"], **row})
    return [dict.fromkeys(rows[0], "") | row for row in rows]


def _positive_in_words(result: Result) -> str:
    return ": their mean" if result.positive is None else f" of {result.positive!r}"


def write(report: Report, folder: str) -> list[Path]:
    """Write `results.csv` and `report.html`; return their paths."""
    target = prepare(folder)
    paths = [target / "results.csv", target / "report.html"]
    with paths[0].open("w", newline="", encoding="utf-8") as file:
        rows = list(_csv_rows(report))
        writer = csv.writer(file)
        writer.writerow(map(csv_cell, rows[0]))
        for row in rows:
            writer.writerow(csv_cell(row.get(column, "")) for column in rows[0])
    paths[1].write_text(_page(report), encoding="utf-8")
    return paths


def prepare(folder: str) -> Path:
    """Make the folder and see that the plots can be drawn: before the hour of work, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("The report's plots need matplotlib: pip install 'sktransfer[demo]'")
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{folder!r} is a file; name a folder for the report.") from error
    return target


# ------------------------------------------------------------------------------ tables


def _shares(report: Report, convention: str) -> str:
    labels, counts = np.unique(report.task.targets[convention], return_counts=True)
    shown = [f"{n} {label}" for label, n in zip(labels[:6], counts[:6], strict=True)]
    more = f" and {len(labels) - 6} more classes" if len(labels) > 6 else ""
    return ", ".join(shown) + more


def _rows(report: Report, convention: str) -> list[dict[str, str]]:
    rows, titles = [], _titles(_of(report, convention)[0])
    for result in _of(report, convention):
        row = {"backbone": result.backbone, "classifier": result.classifier}
        for metric, title in titles.items():
            values = result.scores[metric]
            row[title] = f"{values.mean():.3f} ± {values.std():.3f}"
        if any(other.depth is not None for other in report.results):
            row["trained"] = "" if result.n_trained is None else f"{result.n_trained:,}"
        row["fit, s"] = f"{result.fit_seconds.mean():.1f}"
        rows.append(row)
    for figure in report.task.published:
        if figure["convention"] == convention:
            row = {"backbone": "", "classifier": figure["classifier"]}
            row |= {t: f"{figure[m]:.3f}" if m in figure else "" for m, t in titles.items()}
            rows.append(dict.fromkeys(rows[0], "") | row)
    return rows


def _cost_rows(report: Report) -> list[dict[str, str]]:
    rows = []
    for cost in report.costs:
        known = cost.n_images - cost.n_computed
        row = {"embedding by": cost.backbone, "features": str(cost.n_features)}
        if cost.n_computed:
            row["first run"] = f"{cost.seconds:.1f} s"
            row["images/s"] = f"{cost.n_images / cost.seconds:.0f}"
        else:
            row["first run"], row["images/s"] = "all in the memory", ""
        if known and cost.n_computed:
            row["images/s"] += f" ({known} known or repeated)"
        row["second run"] = f"{cost.second_seconds:.2f} s"
        rows.append(row)
    return rows


def _csv_rows(report: Report) -> Iterable[dict[str, Any]]:
    costs = {cost.backbone: cost for cost in report.costs}
    for result in report.results:
        cost = costs.get(result.backbone)
        row: dict[str, Any] = {
            "task": report.task.name,
            "convention": result.convention,
            "backbone": result.backbone,
            "classifier": result.classifier,
            "source": "this run",
            "n_splits": report.n_splits,
        }
        for metric in METRICS:
            row[f"{metric}_mean"] = result.scores[metric].mean()
            row[f"{metric}_std"] = result.scores[metric].std()
        yield row | {
            "unfreeze": "" if result.depth is None else result.depth,
            "n_trained": "" if result.n_trained is None else result.n_trained,
            "fit_seconds": result.fit_seconds.mean(),
            "n_images": len(report.task.images),
            "n_embedded": cost.n_computed if cost else "",
            "embedding_seconds": cost.seconds if cost else "",
            "second_embedding_seconds": cost.second_seconds if cost else "",
        }
    for figure in report.task.published:
        row = dict.fromkeys(row, "") | {
            "task": report.task.name,
            "convention": figure["convention"],
            "classifier": figure["classifier"],
            "source": "published",
        }
        yield row | {f"{metric}_mean": figure[metric] for metric in METRICS if metric in figure}


def _conventions(report: Report) -> list[str]:
    return list(dict.fromkeys(result.convention for result in report.results))


def _of(report: Report, convention: str) -> list[Result]:
    return [result for result in report.results if result.convention == convention]


# ------------------------------------------------------------------------------ the page

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2330; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #dfe3ea;
         white-space: nowrap; }
th { font-weight: 600; border-bottom-color: #8a93a3; }
td:nth-child(1), td:nth-child(2), th:nth-child(1), th:nth-child(2) { text-align: left; }
tr.best td { background: #eaf2fb; } tr.published td { color: #5b6474; font-style: italic; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; align-items: flex-start; }
.plots img { max-width: 100%; height: auto; flex: 0 1 auto; min-width: 0; }
p.note { color: #5b6474; font-size: .9rem; }
"""


def _page(report: Report) -> str:
    sections = []
    for convention in _conventions(report):
        results = _of(report, convention)
        plots = [
            ("Accuracy against cost", _plot_cost(report, results)),
            ("ROC curves", _plot_roc(results)),
            ("Confusion matrix", _plot_confusion(best_of(results), results)),
        ]
        if any(result.depth is not None for result in results):
            plots.insert(0, ("Accuracy and cost against the depth", _plot_depth(results)))
        images = "".join(f'<img alt="{title}" src="{source}">' for title, source in plots)
        heading = html.escape(convention or "Classifiers")
        sections.append(
            f"<h2>{heading}</h2><p>{html.escape(_shares(report, convention))}</p>"
            f"{_table(_rows(report, convention), best_of(results))}"
            f'<div class="plots">{images}</div>'
        )
    title = html.escape(f"{report.task.name}: {len(report.task.images)} images")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f'<p class="note">Mean ± standard deviation over {report.n_splits} splits; '
        "fit: seconds for one training split, tuning included. Best accuracy in blue. The ROC "
        "curves pool the test images of all splits by rank, so their areas differ a little from "
        f"the means of the table. {html.escape(report.task.note)}"
        f"</p>{''.join(sections)}<h2>Cost of the embeddings</h2>{_table(_cost_rows(report))}"
        f'<p class="note">sktransfer on {html.escape(machine)}.</p></body></html>\n'
    )


def _table(rows: Sequence[dict[str, str]], best: Result | None = None) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in rows[0])
    body = []
    for row in rows:
        kind = "published" if "(published)" in row.get("classifier", "") else ""
        if best and (row["backbone"], row["classifier"]) == (best.backbone, best.classifier):
            kind = "best"
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row.values())
        body.append(f'<tr class="{kind}">{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _figure(width: float = 5.2, height: float = 4.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _drawn(text: str) -> str:
    """Return text as matplotlib draws it: no formula, and escapes of what the font has not."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    shown = "".join(
        c if ord(c) in known else c.encode("ascii", "backslashreplace").decode() for c in text
    )
    return shown.replace("$", r"\$")


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _style(result: Result, results: Sequence[Result]) -> dict[str, Any]:
    """One colour for a classifier, one marker for a backbone, in all plots."""
    names = list(dict.fromkeys(other.classifier for other in results))
    backbones = [name for name in dict.fromkeys(r.backbone for r in results) if name != "none"]
    several = len(backbones) > 1 and result.backbone != "none"
    label = f"{result.classifier} ({result.backbone})" if several else result.classifier
    return {
        "color": f"C{names.index(result.classifier)}",
        "marker": "osD^v<>P"[backbones.index(result.backbone) % 8] if several else "o",
        "label": _drawn(label),
    }


def _plot_cost(report: Report, results: Sequence[Result]) -> str:
    """Seconds for all that it takes to get a classifier against its accuracy."""
    figure, axes = _figure(5.6)
    embedding = {cost.backbone: cost.seconds for cost in report.costs}
    for result in results:
        accuracy, style = result.scores["accuracy"], _style(result, results)
        if result.classifier == "majority class":
            axes.axhline(accuracy.mean(), color="lightgrey", label=style["label"])
            continue
        seconds = embedding.get(result.backbone, 0) + result.fit_seconds.mean()
        axes.errorbar(
            seconds, accuracy.mean(), accuracy.std(), capsize=3, linestyle="none", **style
        )
    for figure_, style_ in zip(_published(report, results), ("--", ":", "-."), strict=False):
        axes.axhline(
            figure_["accuracy"], color="grey", linestyle=style_, label=figure_["classifier"]
        )
    axes.set(
        xscale="log",
        xlabel="seconds: embedding all images and fitting one split",
        ylabel="accuracy",
        title="Accuracy against cost",
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize="x-small")
    axes.grid(alpha=0.3)
    return _png(figure)


def _plot_depth(results: Sequence[Result]) -> str:
    """Accuracy, and seconds of a fit, against the number of unfrozen blocks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    tuned = [result for result in results if result.depth is not None]
    names = list(dict.fromkeys(str(result.depth) for result in tuned))
    for backbone in dict.fromkeys(result.backbone for result in tuned):
        of_backbone = [result for result in tuned if result.backbone == backbone]
        places = [names.index(str(result.depth)) for result in of_backbone]
        accuracies = [result.scores["accuracy"] for result in of_backbone]
        means, deviations = [a.mean() for a in accuracies], [a.std() for a in accuracies]
        upper.errorbar(places, means, deviations, marker="o", capsize=3, label=_drawn(backbone))
        lower.plot(places, [r.fit_seconds.mean() for r in of_backbone], marker="o")
        svm = [r for r in results if r.backbone == backbone and r.depth is None]
        for result in svm:
            label = f"{result.classifier} on embeddings"
            upper.axhline(result.scores["accuracy"].mean(), color="grey", ls=":", label=label)
    upper.set(ylabel="accuracy", title="Accuracy and cost against the depth")
    lower.set(yscale="log", ylabel="seconds of a fit", xlabel="unfrozen blocks (depth)")
    lower.set_xticks(range(len(names)), [_drawn(name) for name in names])
    upper.legend(fontsize="x-small")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return _png(figure)


def _published(report: Report, results: Sequence[Result]) -> list[dict[str, Any]]:
    convention = results[0].convention
    return [figure for figure in report.task.published if figure["convention"] == convention]


def _plot_roc(results: Sequence[Result]) -> str:
    """Two classes: a curve for each classifier. More: a curve for each class, of the best."""
    figure, axes = _figure()
    if len(results[0].classes) == 2:
        positive = results[0].positive
        curves = [
            (_style(r, results), np.concatenate(r.y_true) == positive, _ranks(r))
            for r in results
            if r.classifier != "majority class"
        ]
        title = f"ROC curves, all splits pooled: {_drawn(repr(positive))}"
    else:
        best = best_of(results)
        scores, truth = np.concatenate(best.y_score), np.concatenate(best.y_true)
        curves = [
            ({"label": _drawn(str(c)), "color": f"C{i}"}, truth == c, scores[:, i])
            for i, c in enumerate(best.classes[:10])
        ]
        title = f"{_style(best, results)['label']}: each class against the rest"
    for style, truth, score in curves:
        rates = roc_curve(truth, score)[:2]  # false and true positives
        name = f"{style['label']} (AUC {auc(*rates):.2f})"
        dash = "-" if style.get("marker", "o") == "o" else "--"
        axes.plot(*rates, color=style["color"], linestyle=dash, label=name)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=title)
    axes.legend(fontsize="x-small", loc="lower right")
    return _png(figure)


def _ranks(result: Result) -> np.ndarray:
    """Scores of all splits on one scale: classifiers of two splits differ in theirs."""
    return np.concatenate([np.argsort(np.argsort(s)) / len(s) for s in result.y_score])


def _plot_confusion(best: Result, results: Sequence[Result]) -> str:
    from sklearn.metrics import ConfusionMatrixDisplay

    n = len(best.classes)
    figure, axes = _figure(min(4.6 + 0.25 * n, 12), min(3.6 + 0.2 * n, 11))
    ConfusionMatrixDisplay.from_predictions(
        np.concatenate(best.y_true),
        np.concatenate(best.y_pred),
        labels=best.classes,
        display_labels=[_drawn(str(name)) for name in best.classes],
        normalize="true",
        values_format=".2f",
        include_values=n <= 15,
        xticks_rotation="vertical" if n > 4 else "horizontal",
        cmap="Blues",
        im_kw={"vmin": 0, "vmax": 1},
        ax=axes,
    )
    name = _style(best, results)["label"]
    axes.set_title(f"best accuracy: {name}\nshare of each true class", fontsize="medium")
    return _png(figure)
