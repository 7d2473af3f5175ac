"""The memory that embedding 5,000 JPEG files of 2 megapixels takes, above that after one batch.

The files are photographs of scikit-learn, enlarged to 1,632 × 1,224 pixels and varied. One
process embeds a batch, then all files; the peak is read from the operating system.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from sktransfer import PretrainedFeatureExtractor


def write_photographs(folder: Path, n: int) -> list[str]:
    photos = [Image.fromarray(p).resize((1632, 1224)) for p in load_sample_images().images]

    def write(i: int) -> str:
        photo = ImageEnhance.Brightness(photos[i % 2]).enhance(0.5 + i / n)
        path = folder / f"{i:05}.jpg"
        photo.save(path, quality=90)
        return str(path)

    with ThreadPoolExecutor() as threads:
        return list(threads.map(write, range(n)))


def embed(paths: list[str], memory: str | None) -> None:
    model = PretrainedFeatureExtractor(memory=memory)
    model.transform(paths[:32])
    after_batch = psutil.Process().memory_info().rss
    start = time.perf_counter()
    rows = model.transform(paths)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"memory={'a folder' if memory else None}: peak {(peak - after_batch) / 1e6:.0f} MB above "
        f"the {after_batch / 1e6:.0f} MB after one batch, {rows.nbytes / 1e6:.0f} MB of it rows; "
        f"{len(paths) / seconds:.0f} images/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=5000)
    n = parser.parse_args().n
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_photographs(folder, n)
        size = np.mean([Path(path).stat().st_size for path in paths])
        print(f"{n} files of 1632 × 1224 pixels, {size / 1e3:.0f} KB each", flush=True)
        for memory in (None, str(folder / "memory")):
            # In a process of its own: the peak of a process never falls.
            child = multiprocessing.get_context("spawn").Process(target=embed, args=(paths, memory))
            child.start()
            child.join()


if __name__ == "__main__":
    main()
