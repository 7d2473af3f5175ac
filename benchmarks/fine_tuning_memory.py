"""The memory that fine-tuning two blocks on 5,000 image files takes, above that of an idle process.

A process of its own imports the library, loads the backbone and notes its size; then it fits one
epoch from an empty memory on disk, while a thread looks at its size every 20 ms. A part of that
size are pages of files, mostly those of the memory, which the operating system takes back when it
needs them; they are counted, and named besides.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from _common import Peak
from PIL import Image


def write_images(folder: Path, n: int, size: int) -> list[str]:
    def write(i: int) -> str:
        small = np.random.RandomState(i).randint(0, 256, (size // 8, size // 8, 3), np.uint8)
        path = folder / f"{i:05}.jpg"
        Image.fromarray(small).resize((size, size)).save(path, quality=90)
        return str(path)

    with ThreadPoolExecutor() as threads:
        return list(threads.map(write, range(n)))


def fit(paths: list[str], memory: str | None, args: argparse.Namespace) -> None:
    from sktransfer import FineTunedClassifier, get_model

    weights = "default" if args.backbone.startswith("efficientnet_lite") else None
    get_model(args.backbone, weights)
    idle = psutil.Process().memory_info()
    model = FineTunedClassifier(
        args.backbone,
        weights=weights,
        unfreeze=args.unfreeze,
        augment=args.augment,
        max_epochs=args.epochs,
        memory=memory,
        precision=args.precision,
        random_state=0,
    )
    y = np.arange(len(paths)) % 2
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    model.fit(paths, y)
    seconds = time.perf_counter() - start
    peak.stop()
    print(
        f"idle {idle.rss / 1e6:.0f} MB, at the peak {peak.size / 1e6:.0f} MB: "
        f"{(peak.size - idle.rss) / 1e6:.0f} MB more (target: below 1500), "
        f"{(peak.own - (idle.rss - idle.shared)) / 1e6:.0f} MB without pages of files; "
        f"{seconds:.0f} s\n{model.plan_}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side of the files")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--unfreeze", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--augment")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_images(folder, args.images, args.size)
        memory = None if args.no_memory else str(folder / "memory")
        child = multiprocessing.get_context("spawn").Process(target=fit, args=(paths, memory, args))
        child.start()
        child.join()


if __name__ == "__main__":
    main()
