"""Anomalies: patches against whole images on solar cells, and made-up defects that are located.

A detector learns from 500 sound cells of one kind, contiguous in the list, so that few modules are
on both sides, and ranks the other sound cells and the defective ones; twice, by the first 500 and
by the last. Defects of three kinds are painted into tiles of digits and of two photographs, and
each pixel is ranked. `--part choose` compares what the defaults might be on every third cell,
learnt from the first 500, and on other tiles of the photographs, so that the rest can be reported.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from _common import environment, say, table
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from sktransfer import PatchAnomalyDetector, PretrainedFeatureExtractor

_N_SOUND = 500
_ROWS: dict[str, dict[str, Any]] = {
    "last layer": {},
    "all layers": {"layer": "all", "pooling": ("avg", "max"), "normalize": True},
}
_SIDE = 128  # of a tile
_N_TILES = 60  # of each defect
KINDS = ("scratch", "blot", "missing corner")


# ------------------------------------------------------------------------------ solar cells


def cells(kind: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield cells to learn from, those to rank, and which of these are defective, twice."""
    import elpv_dataset

    folder = Path(elpv_dataset.__file__).parent / "data"
    names = ["file", "probability", "kind"]
    listed = pd.read_csv(folder / "labels.csv", sep=r"\s+", names=names)
    listed = listed[listed.kind == kind]
    paths = np.array([str(folder / file) for file in listed.file])
    sound, defective = paths[listed.probability == 0], paths[listed.probability == 1]
    for learnt in (np.arange(_N_SOUND), np.arange(len(sound) - _N_SOUND, len(sound))):
        ranked = np.concatenate([np.delete(sound, learnt), defective])
        yield sound[learnt], ranked, np.arange(len(ranked)) >= len(ranked) - len(defective)


def global_scores(learnt: np.ndarray, ranked: np.ndarray, memory: str) -> Iterator[tuple[str, Any]]:
    """Yield names and scores, the higher the stranger, of what judges whole images by one row."""
    for name, options in _ROWS.items():
        extractor = PretrainedFeatureExtractor(memory=memory, **options)
        scaler = make_pipeline(extractor, StandardScaler())
        X, Z = scaler.fit_transform(list(learnt)), scaler.transform(list(ranked))
        lof, svm = LocalOutlierFactor(novelty=True).fit(X), OneClassSVM(nu=0.1).fit(X)
        neighbors = NearestNeighbors(n_neighbors=5).fit(X)
        yield f"{name}, LocalOutlierFactor", -lof.score_samples(Z)
        yield f"{name}, OneClassSVM", -svm.score_samples(Z)
        yield f"{name}, 5 nearest neighbours", neighbors.kneighbors(Z)[0].mean(1)


def patch_scores(
    learnt: np.ndarray, ranked: np.ndarray, memory: str, **options: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return scores of a detector, the higher the stranger, and what else is to be known."""
    start = time.perf_counter()
    detector = PatchAnomalyDetector(memory=memory, random_state=0, **options).fit(list(learnt))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    scores = -detector.score_samples(list(ranked))
    per_image = 1000 * (time.perf_counter() - start) / len(ranked)
    bank = " + ".join(f"{len(of_block):,} × {of_block.shape[1]}" for of_block in detector.bank_)
    megabytes = f"{sum(of_block.nbytes for of_block in detector.bank_) / 1e6:.1f}"
    notes = {"bank": bank, "MB": megabytes, "fit s": f"{seconds:.0f}", "ms": f"{per_image:.0f}"}
    return scores, notes | {"offset": -detector.offset_}


def solar_cells(memory: str, n_tiles: int) -> None:
    """Print ROC AUC on both kinds of cells, and the share of alarms at the default threshold."""
    found: dict[str, dict[str, list[str]]] = {}
    alarms = []
    for kind in ("poly", "mono"):
        for learnt, ranked, is_bad in cells(kind):
            scores, notes = patch_scores(learnt, ranked, memory)
            found.setdefault("patches", {}).setdefault(kind, []).append(
                roc_auc_score(is_bad, scores)
            )
            offset = notes.pop("offset")
            alarms.append(
                {
                    "cells": kind,
                    "sound cells called anomalies": f"{(scores[~is_bad] > offset).mean():.3f}",
                    "defective cells found": f"{(scores[is_bad] > offset).mean():.3f}",
                    **notes,
                }
            )
            for name, scores in global_scores(learnt, ranked, memory):
                found.setdefault(name, {}).setdefault(kind, []).append(
                    roc_auc_score(is_bad, scores)
                )
            say(f"  {kind}")
    rows = [
        {"method": name}
        | {kind: " and ".join(f"{v:.3f}" for v in values) for kind, values in k.items()}
        for name, k in found.items()
    ]
    print(f"ROC AUC, defective against sound cells; {_N_SOUND} sound ones to learn from: the first")
    print("and the last of the list\n")
    print(table(rows), "\n")
    print("At contamination=0.05; seconds with the activations in the memory\n")
    print(table(alarms), "\n")


# ------------------------------------------------------------------------------ made-up defects


def tiles(name: str, n: int, chance: np.random.Generator, is_new: bool) -> list[Image.Image]:
    """Return tiles of digits, or crops of a photograph in other light, with the camera's noise."""
    if name == "digits":
        images = load_digits().images[1000:] if is_new else load_digits().images[:1000]
        chosen = chance.choice(len(images), n, replace=False)
        small = [Image.fromarray((images[i] * 15.9).astype(np.uint8)) for i in chosen]
        return [s.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).convert("RGB") for s in small]
    photo = load_sample_images().images[("china", "flower").index(name)]
    found = []
    for _ in range(n):
        top, left = (chance.integers(0, side - _SIDE + 1) for side in photo.shape[:2])
        crop = photo[top : top + _SIDE, left : left + _SIDE] * chance.uniform(0.8, 1.1)
        crop = crop + chance.normal(0, 3, crop.shape)
        found.append(Image.fromarray(crop.clip(0, 255).astype(np.uint8)))
    return found


def spoil(
    tile: Image.Image, kind: str, chance: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Return a tile with a defect, and the mask of the defect."""
    mask = Image.new("L", tile.size)
    draw, side = ImageDraw.Draw(mask), tile.width
    if kind == "scratch":
        start, angle = chance.uniform(0.25, 0.75, 2) * side, chance.uniform(0, np.pi)
        step = np.array([np.cos(angle), np.sin(angle)]) * chance.uniform(0.15, 0.3) * side
        draw.line([*(start - step), *(start + step)], 255, int(chance.integers(2, 5)))
    elif kind == "blot":
        (x, y), (a, b) = chance.uniform(0.25, 0.75, 2) * side, chance.uniform(0.05, 0.12, 2) * side
        draw.ellipse([x - a, y - b, x + a, y + b], 255)
    else:
        (right, down), legs = chance.integers(0, 2, 2), chance.uniform(0.2, 0.35, 2) * side
        x, y = right * (side - 1), down * (side - 1)
        across, along = (1 - 2 * right) * legs[0], (1 - 2 * down) * legs[1]
        draw.polygon([(x, y), (x + across, y), (x, y + along)], 255)
    dark = np.asarray(tile).mean() < 128
    colour = {"scratch": 230 if dark else 30, "blot": 200 if dark else 60, "missing corner": 127}
    shade = Image.new("RGB", tile.size, (colour[kind],) * 3)
    soft = mask.filter(ImageFilter.GaussianBlur(1))
    return Image.composite(shade, tile, soft), mask


def located(
    name: str, kind: str, n_tiles: int, draw: tuple[int, ...] = (), **options: Any
) -> dict[str, Any]:
    """Return how well a kind of defect is found and located in tiles."""
    chance = np.random.default_rng([*name.encode(), *kind.encode(), *draw])
    detector = PatchAnomalyDetector(random_state=0, **options)
    detector.fit(tiles(name, n_tiles, chance, is_new=False))
    sound, more = (tiles(name, _N_TILES, chance, is_new=True) for _ in range(2))
    bad, masks = zip(*(spoil(tile, kind, chance) for tile in more), strict=True)
    fit_size = detector.features().preprocessing.fit_size
    as_tensors = (torch.from_numpy(np.asarray(mask.convert("RGB")).copy()) for mask in masks)
    seen = np.stack([fit_size(mask.permute(2, 0, 1))[0].numpy() > 127 for mask in as_tensors])
    maps = detector.anomaly_map(list(bad))
    each = [
        roc_auc_score(mask.ravel(), heat.ravel())
        for mask, heat in zip(seen, maps, strict=True)
        if mask.any()
    ]
    scores = detector.score_samples([*sound, *bad])
    return {
        "tiles": name,
        "defect": kind,
        "pixel ROC AUC": f"{roc_auc_score(seen.ravel(), maps.ravel()):.3f}",
        "mean of images": f"{np.mean(each):.3f}",
        "image ROC AUC": f"{roc_auc_score(np.repeat([0, 1], _N_TILES), -scores):.3f}",
    }


def defects(memory: str, n_tiles: int) -> None:
    """Print how well made-up defects are located."""
    rows = [
        located(name, kind, n_tiles) for name in ("digits", "china", "flower") for kind in KINDS
    ]
    print(f"Defects in {_N_TILES} tiles of {_SIDE} pixels, learnt from {n_tiles} sound ones\n")
    print(table(rows), "\n")


# ------------------------------------------------------------------------------ choice

CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "layer='stages'": {"layer": "stages"},
    "layer='blocks.1'": {"layer": "blocks.1"},
    "layer='blocks.2'": {"layer": "blocks.2"},
    "layer='blocks.4'": {"layer": "blocks.4"},
    "layer=['blocks.2', 'blocks.4']": {"layer": ["blocks.2", "blocks.4"]},
    "coreset=3000": {"coreset": 3000},
    "coreset=10000": {"coreset": 10000},
    "image_size=320": {"image_size": 320},
}


def choose(memory: str, n_tiles: int) -> None:
    """Print what the defaults were chosen by."""
    rows = []
    for name, options in CHOICES.items():
        row: dict[str, Any] = {"": name}
        for kind in ("poly", "mono"):
            learnt, ranked, is_bad = next(cells(kind))
            scores, notes = patch_scores(learnt, ranked[::3], memory, **options)
            row[kind] = f"{roc_auc_score(is_bad[::3], scores):.3f}"
        notes.pop("offset")
        for photo in ("china", "flower"):
            found = located(photo, "scratch", n_tiles, draw=(1,), memory=memory, **options)
            row[f"{photo}: pixels"] = found["pixel ROC AUC"]
            row[f"{photo}: tiles"] = found["image ROC AUC"]
        rows.append(row | notes)
        say(f"  {name}: {row | notes}")
    print("ROC AUC of cells, and of scratches in other tiles than those of the table\n")
    print(table(rows), "\n")


PARTS: dict[str, Callable[[str, int], None]] = {
    "choose": choose,
    "cells": solar_cells,
    "defects": defects,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="(default: all parts)")
    parser.add_argument("--memory", help="folder that keeps activations, about 1 GB")
    parser.add_argument("--tiles", type=int, default=200, help="sound ones to learn from")
    options = parser.parse_args()
    print(environment("openvino"), "\n")
    with tempfile.TemporaryDirectory() as folder:
        for part in options.part or PARTS:
            PARTS[part](options.memory or os.path.join(folder, "cache"), options.tiles)


if __name__ == "__main__":
    main()
