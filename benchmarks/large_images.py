"""The memory that decoding images just below Pillow's limit takes: one of them, and eight.

WebP files of 10,900 × 16,383 pixels, PNG files of 9,400 × 9,400 with alpha and JPEG files of
13,000 × 13,000, of noise in blocks. Each figure is the peak of a process of its own that
decodes and scales them in 8 threads, above what it took after an image of 64 × 64 pixels.
"""

import argparse
import multiprocessing
import resource
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from tabulate import tabulate

from sktransfer.io import check_images
from sktransfer.transforms import Preprocessing

KINDS = {
    "webp": ("RGB", (10_900, 16_383), {"quality": 5}),
    "png": ("RGBA", (9_400, 9_400), {"compress_level": 1}),
    "jpg": ("RGB", (13_000, 13_000), {"quality": 75}),
}


def write(path: Path, mode: str, size: tuple[int, int], options: dict[str, Any]) -> None:
    """Write noise, enlarged 500 times, so that the files weigh little beside the pixels."""
    shape = (size[1] // 500, size[0] // 500, len(mode))
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(noise, mode).resize(size, Image.Resampling.NEAREST)
    image.save(path, **options)


def peak(paths: list[str], n_threads: int, small: str, pipe: Any) -> None:
    """Send the megabytes that decoding takes above those after a small image."""
    Image.MAX_IMAGE_PIXELS = 2**30  # no warnings
    fit = Preprocessing((224, 224), (256, 256)).fit_size
    check_images([small]).load(0, None, fit)
    before = psutil.Process().memory_info().rss
    images = check_images(paths)
    with ThreadPoolExecutor(n_threads) as threads:
        list(threads.map(lambda i: images.load(i, None, fit), range(len(paths))))
    top = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send((top - before) / 1e6)


def measure(paths: list[str], n_threads: int, small: str) -> float:
    """Return the megabytes of a process of its own: a peak never falls."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=peak, args=(paths, n_threads, small, theirs))
    child.start()
    theirs.close()  # so that a child that fails ends the waiting
    found = ours.recv()
    child.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        small = str(Path(folder, "small.png"))
        Image.new("RGB", (64, 64)).save(small)
        for kind in options.kinds:
            mode, size, settings = KINDS[kind]
            path = Path(folder, f"large.{kind}")
            maker = multiprocessing.get_context("spawn").Process(
                target=write, args=(path, mode, size, settings)
            )
            maker.start()
            maker.join()
            one = measure([str(path)], 1, small)
            many = measure([str(path)] * options.n, options.n, small)
            decoded = 3 * size[0] * size[1] / 1e6
            rows.append([kind, *size, path.stat().st_size / 1e6, decoded, one, many, many / one])
    heads = ["file", "width", "height", "MB", "pixels MB", "one", f"{options.n} at once", "ratio"]
    print(tabulate(rows, heads, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
