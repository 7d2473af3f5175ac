"""Fine-tuning on the ELPV cells by a recipe that is chosen inside the training part of each split.

The parent only hands out fits and writes down what comes back; each fit runs in one of several
processes, as on a GPU fits of a small network wait for the processor that launches their kernels.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import environment, say, table, without_crop
from PIL import Image
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from sktransfer import FineTunedClassifier, PretrainedFeatureExtractor, get_model
from sktransfer._cli.benchmark import load_elpv, read_elpv
from sktransfer.io import check_images

SIZE = 224
ALL = {"layer": "all", "pooling": ("avg", "max")}
# Depths; with +layers, the head sees all layers; behind @, another learning rate. Fixed before any
# of them was fitted here. A head on all layers is solved for all fixed views, which takes minutes:
# with nothing frozen there are none.
RECIPES = ("12", "all", "all+layers")
SHARED = {"augment": "dihedral", "predict_views": 8, "weight_decay": 0.05}
SVM, START = "SVM, all layers", "head alone, all layers"
FINE_TUNED = "fine-tuned"


# ------------------------------------------------------------------------------ cells


class Cells(NamedTuple):
    """Whole cells as the network takes them, and what is known of them."""

    images: np.ndarray  # (n, size, size) uint8
    probability: np.ndarray  # of a defect, by the experts
    kinds: np.ndarray  # of the modules


def cells_of_package(backbone: str, size: int) -> Cells:
    """Bring the cells of the package elpv-dataset to the size of the network, as the library does.

    None of the border is cut off.
    """
    paths, probability, kinds = read_elpv()
    images, fit_size = check_images(paths), _preprocessing(backbone, size).fit_size
    cells = np.empty((len(images), size, size), np.uint8)

    def load(i: int) -> None:
        red, green, blue = images.load(i, None, fit_size).numpy()
        assert np.array_equal(red, green) and np.array_equal(red, blue), paths[i]
        cells[i] = red

    with ThreadPoolExecutor() as threads:
        list(threads.map(load, range(len(images))))
    return Cells(cells, probability, kinds)


def _preprocessing(backbone: str, size: int) -> Any:
    return get_model(without_crop(backbone, size)).preprocessing


def write_cells(path: str, backbone: str, size: int) -> None:
    """Write the cells to a file, and compare what it holds with the originals."""
    cells = cells_of_package(backbone, size)
    with ThreadPoolExecutor() as threads:
        files = list(threads.map(_as_webp, cells.images))
    np.savez(  # compressed they are already
        path,
        webp=np.frombuffer(b"".join(files), np.uint8),
        ends=np.cumsum([len(file) for file in files]),
        probability=cells.probability,
        kinds=cells.kinds,
    )
    found = read_cells(path)
    assert all(map(np.array_equal, found, cells)), "the file holds other cells"
    extractor = PretrainedFeatureExtractor(without_crop(backbone, size), runtime="torch", **ALL)
    some = slice(0, None, 100)
    rows = extractor.transform(load_elpv().images[some])
    assert np.array_equal(rows, extractor.transform(found.images[some])), "other features"
    print(
        f"{len(files)} cells, {os.path.getsize(path) / 1e6:.1f} MB; pixels, and features of "
        f"{len(rows)} of them, are those of the originals"
    )


def _as_webp(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert("RGB").save(file, "WEBP", lossless=True, quality=50, method=6)
    return file.getvalue()


def read_cells(path: str) -> Cells:
    """Read cells from a file that `write_cells` wrote, or that has them as an array `images`.

    This is uint8 (n, size, size), grey, or (n, size, size, 3).
    """
    with np.load(path) as file:
        labels = file["probability"], file["kinds"]
        if "images" in file:
            return Cells(file["images"], *labels)
        webp, ends = file["webp"].tobytes(), file["ends"].tolist()
    with ThreadPoolExecutor() as threads:
        files = (webp[start:end] for start, end in zip([0, *ends], ends, strict=False))
        images = threads.map(lambda file: np.asarray(Image.open(io.BytesIO(file)))[..., 0], files)
        return Cells(np.stack(list(images)), *labels)


# ------------------------------------------------------------------------------ fits


class Fit(NamedTuple):
    """A fit, and what it is scored on: the inner holdout, or the test part."""

    recipe: str
    split: int
    seed: int
    is_inner: bool


class _Work(NamedTuple):
    """What all fits of a process share."""

    folder: str  # of the arrays
    args: argparse.Namespace


_work: _Work


def _begin(work: _Work) -> None:
    """Make a process ready for fits."""
    global _work
    _work = work
    torch.set_num_threads(work.args.threads)


def _run(fit: Fit) -> dict[str, Any]:
    """Fit a recipe and score it; in a process of its own."""
    start, args = time.perf_counter(), _work.args
    images = np.load(Path(_work.folder, "images.npy"), mmap_mode="r")
    y, strata = (np.load(Path(_work.folder, f"{name}.npy")) for name in ("y", "strata"))
    learnt, scored = rows_of(fit, strata)
    # Registered anew in each process, and for each size.
    model = _model(fit, without_crop(args.backbone, images.shape[1]), args)
    model.fit(images[learnt], y[learnt])
    if hasattr(model, "predict_proba"):
        p = model.predict_proba(images[scored])[:, 0]  # "defective" comes before "sound"
    else:
        p = 1 / (1 + np.exp(model.decision_function(images[scored])))
    return {
        **fit._asdict(),
        **scores(y[scored], p),
        "seconds": round(time.perf_counter() - start, 2),
        "probability": [round(float(value), 5) for value in p],
    }


def rows_of(fit: Fit, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to learn from, and those to score on; the splits are those of elpv.py."""
    outer = StratifiedShuffleSplit(fit.split + 1, test_size=0.25, random_state=0)
    *_, (train, test) = outer.split(strata, strata)
    if not fit.is_inner:
        return train, test
    inner = StratifiedShuffleSplit(1, test_size=0.25, random_state=fit.split)
    learnt, held_out = next(inner.split(strata[train], strata[train]))
    return train[learnt], train[held_out]


def scores(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """Score probabilities of a defect."""
    is_defective = y == "defective"
    return {
        "accuracy": accuracy_score(is_defective, p > 0.5),
        "roc_auc": roc_auc_score(is_defective, p),
    }


def _model(fit: Fit, backbone: str, args: argparse.Namespace) -> Any:
    shared = {"device": args.device, "memory": args.memory, "n_jobs": args.threads}
    options = {"batch_size": args.batch_size, "precision": args.precision, **shared}
    if fit.recipe == SVM:
        precision = "float32" if args.precision == "auto" else args.precision
        extractor = PretrainedFeatureExtractor(backbone, **{**options, "precision": precision})
        return make_pipeline(extractor.set_params(**ALL), StandardScaler(), SVC(C=10))
    if fit.recipe == START:
        return FineTunedClassifier(backbone, unfreeze=0, **ALL, **options)
    recipe, _, lr = fit.recipe.partition("@")
    depth, _, layers = recipe.partition("+")
    return FineTunedClassifier(
        backbone,
        unfreeze=int(depth) if depth.isdigit() else depth,
        **(ALL if layers else {}),
        **SHARED,
        n_views=args.views if depth != "all" else None,
        max_epochs=args.epochs,
        lr=float(lr or args.lr),
        head_lr=args.head_lr,
        random_state=fit.seed,
        **options,
    )


# ------------------------------------------------------------------------------ the parent


def choose(args: argparse.Namespace) -> None:
    """Run all fits that are not in the file of results yet, then print the table."""
    args.recipes = args.recipes or list(RECIPES)
    defaults = {"whole": SIZE, "epochs": 12, "batch_size": 64, "lr": 7e-4, "views": 8}
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name) or value)
    cells = read_cells(args.cells) if args.cells else cells_of_package(args.backbone, args.whole)
    cells = Cells(*(array[:: args.every] for array in cells))
    y = np.where(cells.probability > 0.5, "defective", "sound")
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "images.npy"), cells.images)
        np.save(Path(folder, "y.npy"), y)
        strata = np.char.add(np.char.add(y, "/"), cells.kinds)
        np.save(Path(folder, "strata.npy"), strata)
        results = Results(args)
        try:
            _run_all(_Work(folder, args), results)
        finally:
            print(environment(), "\n")
            print(results.table(y, strata), flush=True)


class Results:
    """What fits found, in a file of JSON lines as well."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.recipes, self.n_splits, self.seeds = args.recipes, args.splits, range(args.seeds)
        names = ("backbone", "whole", "every", "epochs", "batch_size", "lr", "head_lr", "views")
        self.settings = {name: getattr(args, name) for name in (*names, "precision", "device")}
        self.file = None if args.output is None else Path(args.output)
        self.others = [_written(path, args) for path in args.average]
        self.found: dict[Fit, dict[str, Any]] = {}
        if self.file is not None and self.file.exists():
            for line in map(json.loads, self.file.read_text().splitlines()):
                settings = line.pop("settings")
                if {**settings, "device": args.device} == self.settings:  # wherever it was fitted
                    self.found[Fit(*(line[name] for name in Fit._fields))] = line

    def add(self, result: dict[str, Any]) -> None:
        """Keep what a fit found."""
        fit = Fit(*(result[name] for name in Fit._fields))
        self.found[fit] = result
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps({**result, "settings": self.settings}) + "\n")
        part = "inner holdout" if fit.is_inner else "test"
        say(
            f"  split {fit.split}, {fit.recipe}, seed {fit.seed}: {part} accuracy "
            f"{result['accuracy']:.4f}, ROC AUC {result['roc_auc']:.4f}, {result['seconds']} s"
        )

    def chosen(self, split: int) -> str | None:
        """Return the recipe of the best ROC AUC on the inner holdout; None if some lack."""
        fits = [Fit(recipe, split, 0, True) for recipe in self.recipes]
        if not all(fit in self.found for fit in fits):
            return None
        return max(fits, key=lambda fit: self.found[fit]["roc_auc"]).recipe

    def wanted(self) -> list[Fit]:
        """Return the fits that are not there and can be run by now, the most urgent first."""
        splits, recipes = range(self.n_splits), self.recipes
        chosen = [(split, recipe) for split in splits if (recipe := self.chosen(split))]
        fits = [Fit(recipe, split, 0, False) for split, recipe in chosen]
        fits += [Fit(recipe, split, 0, True) for split in splits for recipe in recipes]
        fits += [Fit(SVM, split, 0, is_inner) for split in splits for is_inner in (True, False)]
        fits += [Fit(recipe, split, seed, False) for split, recipe in chosen for seed in self.seeds]
        fits += [Fit(START, split, 0, False) for split in splits]
        return [fit for fit in dict.fromkeys(fits) if fit not in self.found]

    def table(self, y: np.ndarray, strata: np.ndarray) -> str:
        """Return the scores on the test parts."""
        lines = [list(self._lines(split, y, strata)) for split in range(self.n_splits)]
        rows = [row for split in lines for row in split]
        means = []
        for fitted in dict.fromkeys(row["fitted"] for row in rows):
            some = [row for row in rows if row["fitted"] == fitted]
            row = {"split": f"mean of {len(some)}", "fitted": fitted, "recipe": ""}
            for metric in ("accuracy", "roc_auc"):
                values = [row[metric] for row in some]
                row[metric] = f"{np.mean(values):.4f} ± {np.std(values):.4f}"
            means.append(row)
        for row in rows:
            row |= {metric: f"{row[metric]:.4f}" for metric in ("accuracy", "roc_auc")}
        return table(rows + means)

    def said(self, what: str, split: int, is_inner: bool) -> list[np.ndarray]:
        """Return what the SVM, or each seed of the chosen recipe, says of the scored part."""
        recipe, seeds = (SVM, [0]) if what == SVM else (self.chosen(split) or "", self.seeds)
        fits = [Fit(recipe, split, seed, is_inner) for seed in seeds]
        return [np.array(self.found[fit]["probability"]) for fit in fits if fit in self.found]

    def _mix(self, split: int, y: np.ndarray, strata: np.ndarray) -> Iterator[dict[str, Any]]:
        """Score the mean of that mix which has the best ROC AUC on the inner holdout.

        A mix is what one network says when fine-tuned, or all of them, alone or with their SVMs on
        frozen layers.
        """
        networks = (self, *self.others)
        sets: dict[str, Sequence[Results]] = {str(n.settings["backbone"]): [n] for n in networks}
        sets["all"] = networks
        found = {}
        for name, some in sets.items():
            for kinds in ((FINE_TUNED,), (FINE_TUNED, SVM)):
                parts = [
                    [n.said(kind, split, is_inner) for n in some for kind in kinds]
                    for is_inner in (True, False)
                ]
                if all(map(all, parts)):
                    found[" + ".join((name, *kinds[1:]))] = [_mean_of_means(p) for p in parts]
        if len(found) == 2 * len(sets):
            held_out = y[rows_of(Fit("", split, 0, True), strata)[1]]
            best = max(found, key=lambda name: scores(held_out, found[name][0])["roc_auc"])
            truth = y[rows_of(Fit("", split, 0, False), strata)[1]]
            row = {"split": split, "fitted": "the mix that is best inside", "recipe": best}
            yield row | scores(truth, found[best][1])

    def _lines(self, split: int, y: np.ndarray, strata: np.ndarray) -> Iterator[dict[str, Any]]:
        truth = y[rows_of(Fit("", split, 0, False), strata)[1]]
        found = self.said(FINE_TUNED, split, False)
        for n in sorted({1, len(found)} if found else ()):
            name = f"fine-tuned, {n} seeds averaged" if n > 1 else "fine-tuned"
            row = {"split": split, "fitted": name, "recipe": self.chosen(split)}
            yield row | scores(truth, np.mean(found[:n], axis=0))
        networks = (self, *self.others)
        each = [fits for network in networks if (fits := network.said(FINE_TUNED, split, False))]
        yield from _averaged(FINE_TUNED, split, truth, [np.mean(fits, axis=0) for fits in each])
        yield from self._mix(split, y, strata)
        for name in (SVM, START):
            fit = Fit(name, split, 0, False)
            if fit in self.found:
                row = {"split": split, "fitted": name, "recipe": ""}
                yield row | scores(truth, np.array(self.found[fit]["probability"]))
            each = [np.array(n.found[fit]["probability"]) for n in networks if fit in n.found]
            yield from _averaged(name, split, truth, each)


def _mean_of_means(parts: list[list[np.ndarray]]) -> np.ndarray:
    return np.mean([np.mean(fits, axis=0) for fits in parts], axis=0)


def _averaged(
    name: str, split: int, truth: np.ndarray, each: list[np.ndarray]
) -> Iterator[dict[str, Any]]:
    """Score the mean of what several networks say, if there are several."""
    if len(each) > 1:
        row = {"split": split, "fitted": f"{name}, {len(each)} networks averaged", "recipe": ""}
        yield row | scores(truth, np.mean(each, axis=0))


def _written(path: str, args: argparse.Namespace) -> Results:
    """Return what a run of other settings wrote to its file."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    recipes = list(dict.fromkeys(line["recipe"] for line in lines if line["is_inner"]))
    told = {**lines[0]["settings"], "recipes": recipes, "output": path, "average": ()}
    return Results(argparse.Namespace(**{**vars(args), **told}))


def _run_all(work: _Work, results: Results) -> None:
    """Run fits, `jobs` at once, until none is wanted or the time is over."""
    args, running, done = work.args, set[Fit](), queue.SimpleQueue()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)  # of the processes to come
    end = time.monotonic() + args.seconds
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs, _begin, (work,)) as pool:  # which ends its processes
        while True:
            wanted = [fit for fit in results.wanted() if fit not in running]
            for fit in wanted[: args.jobs - len(running)]:
                running.add(fit)
                pool.apply_async(_run, (fit,), {}, done.put, _failed(done, fit))
            if not running:
                pool.close()
                return pool.join()
            try:
                result = done.get(timeout=end - time.monotonic())
            except (queue.Empty, ValueError):
                say(f"{args.seconds:.0f} s are over; {len(running)} fits were cut off")
                return
            if isinstance(result, BaseException):
                raise result
            results.add(result)
            running.discard(Fit(*(result[name] for name in Fit._fields)))


def _failed(done: queue.SimpleQueue, fit: Fit) -> Callable[[BaseException], None]:
    def put(error: BaseException) -> None:
        error.add_note(f"in {fit}")
        done.put(error)

    return put
