"""The commands that look at images: what is wrong with them, and which are alike."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sktransfer._cli.audit_page import audit_page, similar_page
from sktransfer._cli.checks import counted
from sktransfer._cli.groups import groups_of
from sktransfer._cli.options import common_parameters
from sktransfer._cli.tables import as_table, show, show_columns
from sktransfer._cli.tasks import files_of, readable
from sktransfer._cli.words import in_options
from sktransfer._escaping import csv_cell, escape, map_text
from sktransfer.inspection import find_similar
from sktransfer.io import list_images
from sktransfer.model_selection import audit as _audit

_SHOWN = 20  # findings that are printed


def audit(options: argparse.Namespace) -> None:
    """List what should be looked at before a model is trained on a folder of images."""
    files, y = _files_and_labels(options.folder)
    groups, test = groups_of(files, options), None
    if options.test:
        files_of_test, y_of_test = _files_and_labels(options.test)
        if groups is not None:
            groups = groups + groups_of(files_of_test, options, options.test)
        test = np.repeat([False, True], [len(files), len(files_of_test)])
        files = files + files_of_test
        y = None if y is None or y_of_test is None else y + y_of_test
    parameters = {"random_state": options.seed, **common_parameters(options)}
    table = _audit(files, y, groups, test=test, **parameters)
    table["reason"] = [in_options(reason, options) for reason in table["reason"]]
    counts = Counter(table["kind"])
    document: dict[str, Any] = {"n_images": len(files), "n_findings": len(table)}
    document["counts"] = dict(counts)
    document["findings"] = table.astype(object).where(table.notna(), None).to_dict("records")
    text = _as_text(table, counts, len(files), bool(options.output))
    if options.output:
        document["written"] = _write(table, options)
        text += "".join(f"\nwritten: {escape(path)}" for path in document["written"])
    show(options, document, text)


def _files_and_labels(folder: str) -> tuple[list[str], list[str] | None]:
    """Return the images of a folder and their classes, its subfolders; None if it has none.

    What lies beside the subfolders has no class and is left out, with a warning.
    """
    files = list_images(folder)
    parts = [Path(file).relative_to(folder).parts for file in files]
    with_class = [i for i, part in enumerate(parts) if len(part) > 1]
    if not with_class:
        return files, None
    if beside := len(files) - len(with_class):
        warnings.warn(
            f"Left out {beside} of {len(files)} images of {folder!r}, which lie beside its class "
            "folders: move each into the folder of its class.",
            stacklevel=2,
        )
    return [files[i] for i in with_class], [escape(parts[i][0]) for i in with_class]


def _as_text(table: Any, counts: Counter, n: int, all_are_written: bool) -> str:
    """Return how many findings of each kind there are, and the first; only paths may be long."""
    if not len(table):
        return f"{counted(n, 'image')}: nothing was found"
    lines = [f"{counted(n, 'image')}, {counted(len(table), 'finding')}", ""]
    lines += [as_table({"finding": [*counts], "images": [*map(str, counts.values())]}), ""]
    first = table.head(_SHOWN)
    for one in first.itertuples():
        lines.append(escape(f"{one.kind}: {one.path}"))
        lines += [] if one.other_path is None else [escape(f"  and {one.other_path}")]
        lines += textwrap.wrap(escape(one.reason), 76, initial_indent="  ", subsequent_indent="  ")
    if more := len(table) - len(first):
        where = "are written as well" if all_are_written else "are in --output DIR, or --json"
        lines.append(f"and {more:,} more, which {where}")
    return "\n".join(lines)


def _write(table: Any, options: argparse.Namespace) -> list[str]:
    """Write the page and the table; return their paths."""
    os.makedirs(options.output, exist_ok=True)
    page, findings = (os.path.join(options.output, name) for name in ("audit.html", "findings.csv"))
    name = escape(Path(options.folder).resolve().name)
    Path(page).write_text(audit_page(table, name), encoding="utf-8")
    map_text(table, csv_cell).to_csv(findings, index=False)
    return [page, findings]


def similar(options: argparse.Namespace) -> None:
    """Print the images of a folder that are most like some others."""
    files, skipped = readable(list_images(options.folder), options)
    queries, skipped_queries = readable(files_of(options.files), options)
    k = min(options.k, len(files))
    table = find_similar(queries, files, n_neighbors=k, **common_parameters(options))
    if options.html:
        Path(options.html).write_text(similar_page(table), encoding="utf-8")
        print(f"written: {escape(options.html)}", file=sys.stderr)
    columns: dict[str, Any] = {
        "query": table["query_path"].tolist(),
        "rank": table["rank"].tolist(),
        "path": table["path"].tolist(),
        "distance": [round(float(value), 4) for value in table["distance"]],
    }
    if not options.csv and not options.json:  # a query's name once
        columns["query"] = table["query_path"].where(table["rank"] == 1, "").tolist()
    show_columns(options, columns, "similar", skipped | skipped_queries)
