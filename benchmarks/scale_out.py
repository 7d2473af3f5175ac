"""Plan 100 million images on paper: storage, hours and where the first bottleneck is.

Bytes of a row are measured, on files of random rows; rates are those you give, of a core or of a
card. What has no rate is left out.

    python benchmarks/scale_out.py [--core resnet50/float32=24] [--card resnet50/bfloat16=2500]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping

import numpy as np
import pandas as pd

from sktransfer._memory.memory import check_memory

IMAGES = 1e8
JPEG = 120e3  # bytes of a photograph of about 500 x 375 pixels
LINK = 10e9 / 8  # bytes a second of a network of 10 Gbit/s
CORES, CARDS = 1000, 8
WIDTHS = {"resnet50": 2048, "efficientnet_lite0": 1280}
CASES = [f"{name}/{precision}" for name in WIDTHS for precision in ("float32", "bfloat16")]


def bytes_a_row(width: int, n_rows: int = 10_000) -> tuple[float, float]:
    """Return what a row of float32 takes in Parquet and in the memory."""
    rows = np.random.default_rng(0).random((n_rows, width), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.parquet")
        frame = pd.DataFrame(rows, columns=[f"x{i}" for i in range(width)])
        frame.to_parquet(path, use_dictionary=False)
        memory = check_memory(os.path.join(folder, "memory"))
        assert memory is not None
        memory.write("rows", [i.to_bytes(16, "big") for i in range(n_rows)], rows)
        return os.path.getsize(path) / n_rows, memory.info()["n_bytes"] / n_rows


def storage() -> list[list[str]]:
    table = [["rows of", "width", "a row, B", "all, GB", "in Parquet, GB", "in the memory, GB"]]
    for name, width in WIDTHS.items():
        parquet, memory = bytes_a_row(width)
        sizes = (4 * width * IMAGES, parquet * IMAGES, memory * IMAGES)
        row = [f"{size / 1e9:,.0f}" for size in sizes]
        table.append([name, f"{width:,}", f"{4 * width:,}", *row])
    table.append(["the JPEG files", "", f"{JPEG:,.0f}", f"{JPEG * IMAGES / 1e9:,.0f}", "", ""])
    return table


def work(rates: Mapping[str, float], unit: str, number: int) -> list[list[str]]:
    header = ["network", f"images/s a {unit}", f"{unit}-hours", f"hours on {number:,}"]
    header += [f"read by {number:,}, MB/s", f"{unit}s that 10 Gbit/s feed"]
    table = [header]
    for case in CASES:
        if case not in rates:
            continue
        rate = rates[case]
        hours = IMAGES / rate / 3600
        figures = [rate, hours, hours / number, rate * number * JPEG / 1e6, LINK / (rate * JPEG)]
        cells = [f"{figure:,.1f}" if figure < 10 else f"{figure:,.0f}" for figure in figures]
        table.append([case.replace("/", ", "), *cells])
    return table


def show(table: list[list[str]]) -> None:
    for i, row in enumerate(table):
        print("| " + " | ".join(row) + " |")
        if i == 0:
            print("| " + " | ".join("---" for _ in row) + " |")
    print()


def rate(text: str) -> tuple[str, float]:
    case, _, value = text.partition("=")
    if case not in CASES:
        raise argparse.ArgumentTypeError(f"{case!r} is none of {', '.join(CASES)}")
    return case, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--core", type=rate, action="append", default=[], metavar="CASE=RATE")
    parser.add_argument("--card", type=rate, action="append", default=[], metavar="CASE=RATE")
    options = parser.parse_args()
    print(f"{IMAGES:,.0f} images\n")
    show(storage())
    for rates, unit, number in ((options.core, "core", CORES), (options.card, "card", CARDS)):
        if rates:
            show(work(dict(rates), unit, number))


if __name__ == "__main__":
    main()
