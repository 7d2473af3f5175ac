"""Show a comparison: as text and as CSV; `page` has the page."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sktransfer._cli.checks import counted
from sktransfer._cli.page import page
from sktransfer._cli.results import METRICS, Report, Result, best_of, full_name, gains
from sktransfer._cli.tables import as_table, head_lines, row_lines
from sktransfer._escaping import csv_cell

_TITLES = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "f1": "F1"}
_TITLES["roc_auc"] = "ROC AUC"
_WIDTHS = {"accuracy": 13, "balanced": 8, "F1": 5, "ROC AUC": 7}  # and two spaces between columns


def as_text(report: Report) -> str:
    """Return all that is printed on a terminal, at once."""
    counts = counted(len(report.task.images), "image"), counted(report.n_splits, "split")
    first = f"{report.task.name}: {', '.join(counts)}"
    lines = [line for i in range(len(report.results)) for line in lines_of(report, i)]
    return "\n".join([first, *lines, closing(report)])


def lines_of(report: Report, i: int) -> list[str]:
    """Return the lines that a result adds to those before it, and that no later one changes.

    So they can be printed as soon as it is known. All tables have columns of the same widths, 80
    characters with what is between them.
    """
    result = report.results[i]
    earlier = [r for r in report.results[:i] if r.convention == result.convention]
    of_table = [r for r in earlier if r.table == result.table]
    widths = _widths(with_depths=result.depth is not None)
    lines = [] if of_table else [""]
    if not earlier:
        lines += textwrap.wrap(_heading(report, result.convention), 80)
    if not of_table:
        lines += head_lines(widths)
    rows: list[dict[str, str]] = []
    if result.backbone != "none" and all(r.backbone == "none" for r in earlier):
        rows += map(_published_row, report.published(result.convention))
    if result.backbone != "none" and all(r.backbone == "none" for r in of_table):
        rows.append({"classifier": f"{result.backbone}:"})
    rows.append(_row(result, several=report.n_splits > 1))
    return lines + [line for row in rows for line in row_lines(row, widths)]


def closing(report: Report) -> str:
    """Return what is printed below the tables: which is best, what it cost, what the words mean."""
    parts = []
    for convention in report.conventions:
        said = f"{convention}: {_verdict(report.of(convention))}".removeprefix(": ")
        parts += ["", *textwrap.wrap(said, 80)]
    words = "Means over the splits, ± one standard deviation; " if report.n_splits > 1 else ""
    words += f"F1{_positive_in_words(report.results[0])}; fit: tuning included."
    parts += ["", as_table(_columns(_cost_rows(report))), ""]
    return "\n".join(parts + textwrap.wrap(f"{words} {report.task.note}", 80))


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


def _widths(*, with_depths: bool) -> dict[str, int]:
    if with_depths:
        return {"classifier": 19, **_WIDTHS, "trained": 10, "fit, s": 6}
    return {"classifier": 31, **_WIDTHS, "fit, s": 6}


def _row(result: Result, *, several: bool) -> dict[str, str]:
    row = {title: f"{result.scores[m].mean():.3f}" for m, title in _TITLES.items()}
    row["accuracy"] += f" ± {result.scores['accuracy'].std():.3f}" if several else ""
    row["trained"] = "" if result.n_trained is None else f"{result.n_trained:,}"
    row["fit, s"] = f"{result.fit_seconds.mean():.1f}"
    return {"classifier": result.classifier, **row}


def _published_row(figure: dict[str, Any]) -> dict[str, str]:
    scores = {t: f"{figure[m]:.3f}" for m, t in _TITLES.items() if m in figure}
    return {"classifier": figure["classifier"], **scores}


def _verdict(results: Sequence[Result]) -> str:
    best = best_of(results)
    right = f"{best.scores['accuracy'].mean():.1%} of the images"
    said = "; ".join(gains(results, best))
    return f"{full_name(best)} gets {right} right{f': {said}' if said else ''}."


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
    """Make the folder: before the hour of work, not after."""
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{folder!r} is a file; name a folder for the report.") from error
    return target


# ------------------------------------------------------------------------------ tables


def _heading(report: Report, convention: str) -> str:
    counts = report.counts(convention)
    shown = [f"{n} {label}" for label, n in list(counts.items())[:6]]
    more = f" and {len(counts) - 6} more classes" if len(counts) > 6 else ""
    shares = f"({', '.join(shown)}{more})"
    return f"{convention}  {shares}" if convention else shares


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
