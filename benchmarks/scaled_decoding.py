"""What decoding JPEG files at a part of their resolution gains, and what it does to embeddings.

libjpeg can leave out high frequencies while it decodes. Here it decodes to the smallest size whose
sides are at least a multiple of what the network's resize wants (256 for EfficientNet-Lite0), and
the antialiased resize does the rest. Files of 1600 × 1200 pixels, quality 90: scikit-learn's two
photographs in many crops, with grain as of a camera, and ELPV cells, enlarged. The sides take turns
in one process; medians of time of the CPU, so that other programs disturb little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import simplejpeg
import torch
from _common import environment, table, write_photographs
from PIL import Image

from sktransfer import PretrainedFeatureExtractor, get_model
from sktransfer._cli.benchmark import load_elpv
from sktransfer.io import _codecs, load_image

SIZE = (1600, 1200)


def write_cells(folder: Path, n: int) -> list[str]:
    """Write ELPV cells as large JPEG files; return their paths."""
    folder.mkdir()
    images = load_elpv().images
    paths = [str(folder / f"{i:06}.jpg") for i in range(n)]
    for path, image in zip(paths, images[:: len(images) // n], strict=False):
        large = Image.open(image).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)
        large.save(path, quality=90)
    return paths


@contextmanager
def scaled(least: int) -> Iterator[None]:
    """Decode JPEG files to sides of at least so many pixels."""

    def decode(image: Any, data: bytes) -> tuple[np.ndarray, str]:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least), ""

    with mock.patch.object(_codecs, "_jpeg_pixels", decode):
        yield


def cpu_times(run: Callable[[], Any], sides: dict[str, Any], n: int, repeats: int) -> list[float]:
    """Return the medians of each side's turns, milliseconds an image."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            with side():
                start = time.process_time()
                run()
            if repeat:  # the first turns warm up
                times[name].append(1000 * (time.process_time() - start) / n)
    return [statistics.median(found) for found in times.values()]


def compare(
    source: str, files: list[str], multiple: float, args: argparse.Namespace
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return what scaled decoding does to embeddings, and rows of what it gains."""
    preprocessing = get_model(args.backbone).preprocessing
    least = round(multiple * preprocessing.resize[0])
    sides = {"in full": nullcontext, "scaled": lambda: scaled(least)}
    rows = []
    for runtime, precision in (
        ("openvino", "float32"),
        ("openvino", "bfloat16"),
        ("torch", "float32"),
    ):
        extractor = PretrainedFeatureExtractor(
            args.backbone, runtime=runtime, precision=precision, device="cpu", n_jobs=args.n_jobs
        )
        full, fast = cpu_times(
            lambda e=extractor: e.transform(files), sides, len(files), args.repeats
        )
        rows.append({"": f"transform, {runtime}, {precision}", "full": full, "fast": fast})
    exact = PretrainedFeatureExtractor(args.backbone, runtime="openvino", device="cpu")
    X = exact.transform(files)
    with scaled(least):
        Y = exact.transform(files)
        shape = load_image(files[0]).shape[1:]
    cosines = (X * Y).sum(1) / np.linalg.norm(X, axis=1) / np.linalg.norm(Y, axis=1)
    full, fast = cpu_times(
        lambda: [preprocessing.fit_size(load_image(file)) for file in files],
        sides,
        len(files),
        args.repeats,
    )
    rows.insert(0, {"": "decoding and resizing alone", "full": full, "fast": fast})
    facts = {
        "files": source,
        "decoded to": f"{shape[1]} × {shape[0]}",
        "cosine, mean": f"{cosines.mean():.5f}",
        "least": f"{cosines.min():.5f}",
        "norm of the difference": f"{np.linalg.norm(X - Y) / np.linalg.norm(X):.3f}",
    }
    return facts, [
        {
            "files": f"{source}, {facts['decoded to']}",
            "ms an image": row[""],
            "in full": f"{row['full']:.2f}",
            "scaled": f"{row['fast']:.2f}",
            "times": f"{row['full'] / row['fast']:.2f}",
        }
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--images", type=int, default=32, help="of each kind")
    parser.add_argument("--multiples", type=float, nargs="+", default=[2.0, 1.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--n-jobs", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.n_jobs)
    print(environment("openvino", "simplejpeg"), flush=True)
    facts, times = [], []
    with tempfile.TemporaryDirectory() as folder:
        sources = {
            "photographs": write_photographs(Path(folder, "photos"), args.images, SIZE, grain=5),
            "cells": write_cells(Path(folder, "cells"), args.images),
        }
        for multiple in args.multiples:
            for source, files in sources.items():
                found, rows = compare(source, files, multiple, args)
                facts.append(found)
                times += rows
    print(f"\n{table(facts)}\n\n{table(times)}")


if __name__ == "__main__":
    main()
