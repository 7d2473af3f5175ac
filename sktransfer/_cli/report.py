"""Show a comparison: as text and as CSV; `page` has the page."""

from __future__ import annotations

import csv
import importlib.util
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sktransfer._cli.page import page
from sktransfer._cli.results import METRICS, Report, Result
from sktransfer._cli.tables import as_table
from sktransfer._escaping import csv_cell


def as_text(report: Report) -> str:
    """Return the tables as they are printed on a terminal."""
    parts = [f"{report.task.name}: {len(report.task.images)} images, {report.n_splits} splits"]
    for convention in report.conventions:
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
    results, rows = report.of(convention), []
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
    for figure in report.published(convention):
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
    paths[1].write_text(page(report), encoding="utf-8")
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
    counts = report.counts(convention)
    shown = [f"{n} {label}" for label, n in list(counts.items())[:6]]
    more = f" and {len(counts) - 6} more classes" if len(counts) > 6 else ""
    return ", ".join(shown) + more


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
