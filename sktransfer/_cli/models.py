"""Commands that fit a model, or label images by one: `fit`, `predict`, `classify`."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import skops.io

from sktransfer._cli.classes import refuse_to_hold_out
from sktransfer._cli.groups import groups_of
from sktransfer._cli.options import common_parameters, depth_of
from sktransfer._cli.tables import (
    as_table,
    held_out,
    held_out_text,
    predict_once,
    predicted_columns,
    show,
    show_columns,
)
from sktransfer._cli.tasks import files_of, labelled, readable
from sktransfer._escaping import escape
from sktransfer._estimators.fine_tuning import FineTunedClassifier
from sktransfer._estimators.model_file import load_model
from sktransfer._estimators.onnx_export import to_onnx
from sktransfer._estimators.openvino_export import export_openvino
from sktransfer._estimators.pretrained import GOOD_FEATURES
from sktransfer._estimators.pretrained_classifier import PretrainedClassifier
from sktransfer._splits import Split, check_groups, hold_outs, name_rare_classes


def fit(options: argparse.Namespace) -> None:
    """Fine-tune a network on a folder of classes; score it; write it."""
    X, y, skipped = labelled(options.folder, options)
    groups = check_groups(groups_of(X, options), len(X))
    model = FineTunedClassifier(
        unfreeze=depth_of(options.depth),
        max_epochs=options.max_epochs,
        augment=options.augment,
        class_weight="balanced" if options.balanced else None,
        random_state=options.seed,
        **common_parameters(options),
    )
    if model.unfreeze == 0 and model.load_network()[0].block_names:
        # As `make_classifier`: it is ahead of a head on the last layer.
        model.set_params(layer=GOOD_FEATURES["layer"], pooling=GOOD_FEATURES["pooling"])
    learnt, held = _split(y, groups, options)
    model.fit(X[learnt], y[learnt], groups=None if groups is None else groups[learnt])
    model.set_params(memory=None, verbose=0)  # of this run, not of those that load it
    written = write_model(model, options.output)  # before an image that can't be read stops it
    document = _what_was_fitted(model, len(learnt)) | {"written": written}
    lines = [_as_lines(model, len(learnt))]
    if groups is not None:
        of_parts = [len(np.unique(groups[part])) for part in (learnt, held)]
        document["n_groups"], document["n_groups_held_out"] = of_parts
        lines.append("groups: {} to train on, {} held out".format(*of_parts))
    lines.append("")
    if options.test_size:
        files = X[held].tolist()
        predicted, probabilities = predict_once(model, files)
        document["held_out"] = held_out(files, y[held], predicted, probabilities)
        lines += [held_out_text(document["held_out"]), ""]
    show(options, document, "\n".join([*lines, where_and_how_to_use(written)]), skipped)


def _split(y: np.ndarray, groups: np.ndarray | None, options: argparse.Namespace) -> Split:
    """Return the rows to train on, and those to score on."""
    share = options.test_size
    if not share:
        return np.arange(len(y)), np.arange(0)
    refuse_to_hold_out(options.folder, y, groups, share)
    # Of several groups that are left, the fit takes some to tune.
    n_left = 1 if name_rare_classes(y, 3, groups) else 2
    return hold_outs(1, share, y, "class", groups, options.seed, n_left=n_left)[0]


def predict(options: argparse.Namespace) -> None:
    """Label images with a model from a file."""
    model = _load(options.model)
    files, skipped = readable(files_of(options.files), options)
    with _blaming(options.model):
        columns = predicted_columns(model, files, options.csv or options.json)
    show_columns(options, columns, "images", skipped)


@contextmanager
def _blaming(path: str, what: str = "predict") -> Iterator[None]:
    """Let errors that have no remedy of their own name the model's file."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError):  # of images, weights or the machine
        raise
    except Exception as error:  # attributes that no fit would set raise almost anything
        raise ValueError(
            f"The model in {path!r} can't {what} ({type(error).__name__}: {error}); the file may "
            "be damaged. Write it again, or fit the model again."
        ) from error


def export(options: argparse.Namespace) -> None:
    """Write a model from a file as one of ONNX or OpenVINO."""
    model = load_model(options.model)
    is_openvino = Path(options.output).suffix == ".xml"
    with _blaming(options.model, "be exported"):
        try:
            if is_openvino:
                precision = options.precision or "float32"
                written = export_openvino(model, options.output, precision=precision)
            else:
                written = to_onnx(model, options.output)
        except TypeError as error:  # a step that can't be exported
            raise ValueError(str(error)) from error
    path = os.fspath(written)
    n_bytes = os.path.getsize(path)
    if is_openvino:
        n_bytes += os.path.getsize(written.with_suffix(".bin"))
    text = f"written: {escape(path)} ({n_bytes / 1e6:,.1f} MB)"
    show(options, {"written": {"path": path, "n_bytes": n_bytes}}, text)


def classify(options: argparse.Namespace) -> None:
    """Print the best labels of a network as it is."""
    files, skipped = readable(files_of(options.files), options)
    table = PretrainedClassifier(**common_parameters(options)).top_k(files, k=options.k)
    columns = {"path": table["file"].tolist(), "rank": table["rank"].tolist()}
    columns["label"] = table["label"].tolist()
    columns["probability"] = [round(float(value), 4) for value in table["probability"]]
    if not options.csv and not options.json:  # a file's name once
        columns["path"] = table["file"].where(table["rank"] == 1, "").tolist()
    show_columns(options, columns, "labels", skipped)


def _load(path: str) -> Any:
    """Load a model that can predict."""
    model = load_model(path)
    with _blaming(path):
        can_predict = hasattr(model, "predict")
    if not can_predict:
        raise ValueError(f"{path!r} holds a {type(model).__name__}, which can't predict.")
    return model


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
    head = "the head alone, on all layers" if model.layer == "all" else "the head alone"
    blocks = f"{len(names)} of {len(model.block_names_)} blocks" if names else head
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


# ------------------------------------------------------------------------------ files


def write_model(model: Any, path: str) -> dict[str, Any]:
    skops.io.dump(model, path)
    return {"path": path, "n_bytes": os.path.getsize(path)}


def where_and_how_to_use(written: dict[str, Any]) -> str:
    """Return where a model is, and the line that uses it."""
    path, n_bytes = escape(written["path"]), written["n_bytes"]
    size = f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.0f} KB"
    return (
        f"written: {path} ({size}); to label images by it:\n"
        f"  sktransfer predict {shlex.quote(path)} FOLDER"
    )
