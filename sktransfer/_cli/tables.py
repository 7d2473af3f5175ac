"""What models predict as columns, and columns as text."""

from __future__ import annotations

import csv
import io
import sys
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.base import is_regressor
from sklearn.pipeline import Pipeline
from tabulate import tabulate

from sktransfer._escaping import csv_cell, escape
from sktransfer._estimators.fine_tuning import FineTunedClassifier
from sktransfer._estimators.labels import labels_of


def predicted_columns(model: Any, files: list[str], as_csv: bool) -> dict[str, Any]:
    """Return the columns of a table with a row for each file, by their names."""
    predicted, probabilities = _predict(model, files)
    columns: dict[str, Any] = {"path": files}
    if is_regressor(model):
        columns |= _numbered("value", predicted)
    elif predicted.ndim == 1:
        columns["label"] = predicted.tolist()
        if probabilities is not None:
            of_label = np.where(model.classes_ == predicted[:, None], probabilities, 0).max(1)
            columns["probability"] = [f"{value:.4f}" for value in of_label]
    elif _is_indicator(model):
        if isinstance(probabilities, list):  # an array (n, 1 or 2) for each label
            pairs = zip(probabilities, model.classes_, strict=True)
            ones = [(p * (classes == 1)).sum(1) for p, classes in pairs]
            probabilities = np.stack(ones, axis=1)
        columns |= _several_labels(predicted, probabilities, as_csv)
    else:
        columns |= _numbered("label", predicted)
    return columns


def _predict(model: Any, files: list[str]) -> tuple[np.ndarray, Any]:
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
    texts = np.array([[f"{value:.4f}" for value in row] for row in probabilities])
    if for_all:
        return columns | _numbered("probability", texts)
    pairs = zip(texts, columns_of_rows, strict=True)
    return columns | {"probabilities": [" ".join(row[labels]) for row, labels in pairs]}


def _numbered(name: str, values: np.ndarray) -> dict[str, Any]:
    """Return the columns of an array as `name_0`, `name_1`, ...; one of shape (n,) as `name`."""
    if values.ndim == 1:
        return {name: values.tolist()}
    return {f"{name}_{i}": column for i, column in enumerate(values.T.tolist())}


def print_columns(columns: dict[str, Any], as_csv: bool) -> None:
    """Print a table, by columns of one length."""
    if as_csv:
        writer = csv.writer(sys.stdout or io.StringIO(), lineterminator="\n")
        writer.writerow(map(csv_cell, columns))
        for row in zip(*columns.values(), strict=True):
            writer.writerow(map(csv_cell, row))
    else:
        cells = {name: [_shown(value) for value in values] for name, values in columns.items()}
        print(tabulate(cells, headers="keys", disable_numparse=True))


def _shown(value: Any) -> str:
    """Return a cell as the terminal shows it; it must be known how wide that is."""
    text = f"{value:.6g}" if isinstance(value, float) else escape(str(value))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
