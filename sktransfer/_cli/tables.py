"""What models predict as columns, and columns as text."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any
from unicodedata import combining, east_asian_width

import numpy as np
from scipy.sparse import issparse
from sklearn.base import is_regressor
from sklearn.metrics import classification_report, confusion_matrix
from sklearn.pipeline import Pipeline

from sktransfer._escaping import csv_cell, escape
from sktransfer._estimators.fine_tuning import FineTunedClassifier
from sktransfer._estimators.labels import labels_of

_NARROWEST = 12  # a column, for the sake of others
_MOST_MISTAKES = 20  # that are printed


def predicted_columns(model: Any, files: list[str], for_all: bool) -> dict[str, Any]:
    """Return the columns of a table with a row for each file, by their names."""
    predicted, probabilities = predict_once(model, files)
    columns: dict[str, Any] = {"path": files}
    if is_regressor(model):
        columns |= _numbered("value", predicted)
    elif predicted.ndim == 1:
        columns["label"] = predicted.tolist()
        if probabilities is not None:
            of_label = np.where(model.classes_ == predicted[:, None], probabilities, 0).max(1)
            columns["probability"] = [round(float(value), 4) for value in of_label]
    elif _is_indicator(model):
        if isinstance(probabilities, list):  # an array (n, 1 or 2) for each label
            pairs = zip(probabilities, model.classes_, strict=True)
            ones = [(p * (classes == 1)).sum(1) for p, classes in pairs]
            probabilities = np.stack(ones, axis=1)
        columns |= _several_labels(predicted, probabilities, for_all)
    else:
        columns |= _numbered("label", predicted)
    return columns


def predict_once(model: Any, files: list[str]) -> tuple[np.ndarray, Any]:
    """Return predictions, and probabilities or None; images run through the network once."""
    X: Any = files
    model = getattr(model, "best_estimator_", model)
    if isinstance(model, Pipeline) and len(model) > 1:
        X, model = model[:-1].transform(files), model[-1]
    if isinstance(model, FineTunedClassifier):
        probabilities = model.predict_proba(X)
        labels = labels_of(probabilities, model.classes_, model.multilabel_)
        return labels, probabilities
    probabilities = model.predict_proba(X) if hasattr(model, "predict_proba") else None
    predicted = model.predict(X)
    return predicted.toarray() if issparse(predicted) else np.asarray(predicted), probabilities


def _is_indicator(model: Any) -> bool:
    """Return whether predictions (n, n_labels) are zeros and ones: any number of labels each."""
    classes = model.classes_  # a list of arrays, if every column of `y` has its own
    return not isinstance(classes, list) or all({*of_column} <= {0, 1} for of_column in classes)


def _several_labels(
    predicted: np.ndarray, probabilities: np.ndarray | None, for_all: bool
) -> dict[str, Any]:
    """Return columns for a multilabel model; labels are numbers of columns of its `y`."""
    columns_of_rows = [np.flatnonzero(row) for row in predicted]
    columns = {"labels": [" ".join(map(str, labels)) for labels in columns_of_rows]}
    if probabilities is None:
        return columns
    if for_all:
        return columns | _numbered("probability", np.round(probabilities, 4))
    texts = np.array([[f"{value:.4f}" for value in row] for row in probabilities])
    pairs = zip(texts, columns_of_rows, strict=True)
    return columns | {"probabilities": [" ".join(row[labels]) for row, labels in pairs]}


def _numbered(name: str, values: np.ndarray) -> dict[str, Any]:
    """Return the columns of an array as `name_0`, `name_1`, ...; one of shape (n,) as `name`."""
    if values.ndim == 1:
        return {name: values.tolist()}
    return {f"{name}_{i}": column for i, column in enumerate(values.T.tolist())}


def with_skipped(columns: dict[str, Any], skipped: Mapping[str, str]) -> dict[str, Any]:
    """Return columns with one row more for each path that was skipped, and a column of reasons."""
    more = {name: ["" for _ in skipped] for name in columns} | {"path": [*skipped]}
    n_rows = len(columns["path"])
    longer = {name: [*values, *more[name]] for name, values in columns.items()}
    return longer | {"skipped": ["" for _ in range(n_rows)] + [*skipped.values()]}


def print_csv(columns: Mapping[str, Any]) -> None:
    """Print CSV, by columns of one length."""
    writer = csv.writer(sys.stdout or io.StringIO(), lineterminator="\n")
    writer.writerow(map(csv_cell, columns))
    for row in zip(*columns.values(), strict=True):
        writer.writerow(map(csv_cell, row))


def as_table(columns: Mapping[str, Sequence[Any]]) -> str:
    """Return a table that fits the terminal, or 80 columns: paths are shortened, text is wrapped.

    By columns of one length; of paths, the beginning and the end are shown.
    """
    cells = {name: [_shown(value) for value in values] for name, values in columns.items()}
    widths = {k: max(map(_width, [k, *values])) for k, values in cells.items()}
    limit = max(80, shutil.get_terminal_size().columns) - 2 * (len(cells) - 1)
    while sum(widths.values()) > limit and max(widths.values()) > _NARROWEST:
        widths[max(widths, key=lambda name: widths[name])] -= 1
    if "path" in cells:
        cells["path"] = [shortened(value, widths["path"]) for value in cells["path"]]
    lines = head_lines(widths)
    for row in zip(*cells.values(), strict=True):
        lines += _lines(row, widths)
    return "\n".join(lines)


def head_lines(widths: Mapping[str, int]) -> list[str]:
    """Return the names of columns of these widths, and a rule below."""
    return [*_lines([*widths], widths), "  ".join("-" * width for width in widths.values())]


def row_lines(row: Mapping[str, Any], widths: Mapping[str, int]) -> list[str]:
    """Return one row of a table whose other rows are not known yet."""
    return _lines([_shown(row.get(name, "")) for name in widths], widths)


def _lines(row: Sequence[str], widths: Mapping[str, int]) -> list[str]:
    """Return a row as lines, as many as the text that is wrapped needs."""
    parts = [
        [text] if _width(text) <= width else textwrap.wrap(text, width)
        for text, width in zip(row, widths.values(), strict=True)
    ]
    return [
        "  ".join(
            part + " " * (width - _width(part))
            for part, width in zip(line, widths.values(), strict=True)
        ).rstrip()
        for line in zip_longest(*parts, fillvalue="")
    ]


def _width(text: str) -> int:
    """Return how many columns of a terminal text takes."""
    return sum(0 if combining(c) else 1 + (east_asian_width(c) in ("W", "F")) for c in text)


def shortened(text: str, width: int) -> str:
    """Return text of at most so many characters, with dots for what is left out of the middle."""
    if len(text) <= width:
        return text
    n_first = (width - 3) // 3
    return f"{text[:n_first]}...{text[n_first + 3 - width :]}"


def _shown(value: Any) -> str:
    """Return a cell as the terminal shows it; it must be known how wide that is."""
    text = f"{value:.6g}" if isinstance(value, float) else escape(str(value))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


# ------------------------------------------------------------------------------ for programs


def as_json(document: Any) -> str:
    """Return a document as JSON, which has no numbers that are none: they become null."""
    return json.dumps(_plain(document), indent=2, allow_nan=False)


def records(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------ what was held out


def held_out(files: Sequence[str], y: np.ndarray, predicted: np.ndarray, p: np.ndarray) -> dict:
    """Return how images that a model has not seen are labelled.

    Parameters
    ----------
    files : sequence of str
    y, predicted : ndarray of shape (n,)
        Labels.
    p : ndarray of shape (n, n_classes)
        Probabilities.
    """
    classes = np.unique(np.concatenate([y, predicted]))
    wrong = np.flatnonzero(y != predicted)
    wrong = wrong[np.argsort(-p[wrong].max(1), kind="stable")]
    mistakes = {
        "path": [str(files[i]) for i in wrong.tolist()],
        "label": y[wrong].tolist(),
        "predicted": predicted[wrong].tolist(),
        "probability": [round(float(value), 4) for value in p[wrong].max(1)],
    }
    shown = [shortened(escape(str(name)), 30) for name in classes]
    report = classification_report(
        *(y, predicted), labels=classes, target_names=shown, zero_division=0.0
    )
    return {
        "n_images": len(y),
        "accuracy": float((y == predicted).mean()),
        "classes": classes.tolist(),
        "confusion": confusion_matrix(y, predicted, labels=classes).tolist(),
        "mistakes": records(mistakes),
        "report": report,
    }


def held_out_text(found: dict[str, Any]) -> str:
    """Return the same as tables: scores, what was taken for what, and the mistakes."""
    parts = [
        f"on {found['n_images']} images that were held out, {found['accuracy']:.1%} right:",
        found["report"],
        _confusion(found["classes"], np.array(found["confusion"])),
    ]
    if mistakes := found["mistakes"]:
        first = mistakes[:_MOST_MISTAKES]
        columns = {name: [row[name] for row in first] for name in first[0]}
        columns["probability"] = [f"{value:.2f}" for value in columns["probability"]]
        parts.append(f"mistakes, the surest first:\n\n{as_table(columns)}")
        if more := len(mistakes) - len(first):
            parts[-1] += f"\nand {more} more, which --json lists"
    return "\n\n".join(part.rstrip() for part in parts)


def _confusion(classes: Sequence[Any], counts: np.ndarray) -> str:
    """Return a table of what was taken for what; of many classes, a list of the commonest."""
    numbers = [str(i + 1) for i in range(len(classes))]
    width = max(map(len, [*numbers, *map(str, counts.flat)]))
    if 28 + len(classes) * (width + 2) <= 80:
        names = [
            f"{i} {shortened(escape(str(c)), 22)}" for i, c in zip(numbers, classes, strict=True)
        ]
        table = {"": names} | {
            number: [str(k or ".").rjust(width) for k in column]
            for number, column in zip(numbers, counts.T, strict=True)
        }
        return f"images of each class (rows) by the label predicted (columns):\n\n{as_table(table)}"
    pairs = [(n, i, j) for (i, j), n in np.ndenumerate(counts) if n and i != j]
    first = sorted(pairs, key=lambda pair: -pair[0])[:_MOST_MISTAKES]
    columns = {
        "label": [classes[i] for _, i, _ in first],
        "predicted": [classes[j] for *_, j in first],
        "images": [n for n, *_ in first],
    }
    return f"what was taken for what, the commonest first:\n\n{as_table(columns)}" if first else ""


# ------------------------------------------------------------------------------ what is printed


def show(
    options: argparse.Namespace,
    document: dict[str, Any],
    text: str,
    skipped: dict[str, str] | None = None,
) -> None:
    """Print the text or, for a program, the document; and what was skipped, and why."""
    if skipped is not None and options.skip_unreadable:
        document["skipped"] = records(_reasons(skipped))
    if skipped:
        text += f"\n\nskipped, as they can't be read:\n\n{as_table(_reasons(skipped))}"
    print(as_json(document) if options.json else text)


def show_columns(
    options: argparse.Namespace, columns: dict[str, Any], what: str, skipped: dict[str, str]
) -> None:
    """Print a table, for a program as a list of its rows."""
    if options.json:
        show(options, {what: records(columns)}, "", skipped)
        return
    probabilities = [name for name in columns if name.startswith("probability")]
    columns |= {name: _four_digits(columns[name]) for name in probabilities}
    if options.csv:
        if options.skip_unreadable:
            columns = with_skipped(columns, skipped)
        print_csv(columns)
    else:
        show(options, {}, as_table(columns), skipped)


def _reasons(skipped: dict[str, str]) -> dict[str, list[str]]:
    return {"path": [*skipped], "reason": [*skipped.values()]}


def _four_digits(values: Sequence[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]
