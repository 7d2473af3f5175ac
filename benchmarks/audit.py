"""How much an audit finds of what was put wrong, and how long a warm one takes.

On the ELPV solar cells, with 50 files doubled (saved again as JPEG, cropped by 2 %, mirrored) and
2 % of the labels flipped: how many of the doubles are found, at which precision; the average
precision of the doubtful labels, against chance. On the cells as they are: which cells it takes for
one, and how far apart these stand in the list, which has the cells of a module one after the other.
In class folders of what is at hand, five images in a wrong one: their ranks among the labels that
may be wrong (faces and more photographs with scikit-image). `--speed N`: the seconds of an audit of
N images with a warm memory. `--report N`: the seconds that the audit adds to the comparison of
classifiers of which `sktransfer benchmark FOLDER --output` writes a report.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from _common import environment, table
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import average_precision_score

from sktransfer._cli.benchmark import compare
from sktransfer._cli.tasks import Task, load_elpv
from sktransfer.model_selection import audit

_FIRST = 20  # draws of wrong folders, that are reported; what is listed was chosen by earlier ones
COPIES = ("exact duplicate", "near duplicate", "duplicate across classes")


def double(path: str, how: int, chance: np.random.Generator) -> bytes:
    """Return a cell saved again, cropped by 2 % of its sides, or mirrored."""
    image, file = Image.open(path).convert("L"), io.BytesIO()
    if how == 0:
        image.save(file, "JPEG", quality=int(chance.integers(30, 91)))
        return file.getvalue()
    if how == 1:
        n = round(0.02 * image.width)
        left, top = (int(chance.integers(0, n + 1)) for _ in range(2))
        image = image.crop((left, top, image.width - n + left, image.height - n + top))
    else:
        image = (ImageOps.mirror if chance.random() < 0.5 else ImageOps.flip)(image)
    image.save(file, "PNG")
    return file.getvalue()


def with_faults(seed: int, memory: str, every: int) -> dict[str, object]:
    """Return what an audit finds of doubles and of flipped labels."""
    chance, task = np.random.default_rng(seed), load_elpv()
    cells, y = task.images[::every], task.targets["defective: p > 0.5"][::every].copy()
    picks = chance.choice(len(cells), min(50, len(cells)), replace=False)
    doubles = [double(cells[row], i % 3, chance) for i, row in enumerate(picks)]
    X = [Path(path).read_bytes() for path in cells] + doubles
    flipped = chance.choice(len(cells), round(0.02 * len(cells)), replace=False)
    labels = np.concatenate([y, y[picks]])
    labels[flipped] = np.where(labels[flipped] == "sound", "defective", "sound")
    found = audit(X, labels, memory=memory)
    copies = found[found.kind.isin(COPIES)]
    pairs = {(min(a, b), max(a, b)) for a, b in zip(copies.row, copies.other_row, strict=True)}
    right = {(int(row), len(cells) + i) for i, row in enumerate(picks)}
    suspects = found[found.kind == "label"]
    score = np.full(len(X), -1.0)
    score[suspects.row] = suspects.score
    is_flipped = np.isin(np.arange(len(X)), flipped)
    average, share = average_precision_score(is_flipped, score), is_flipped.mean()
    return {
        "seed": seed,
        "doubles found": f"{len(pairs & right)} of {len(picks)}",
        "precision": f"{len(pairs & right) / max(1, len(pairs)):.3f}",
        "suspect labels": len(suspects),
        "average precision": f"{average:.3f}",
        "times chance": f"{average / share:.1f}",
    }


def of_cells_as_they_are(memory: str, every: int) -> None:
    task = load_elpv()
    labels = task.targets["defective: p > 0.5"]
    found = audit(task.images[::every], labels[::every], memory=memory)
    print(found.kind.value_counts(sort=False).to_string())
    copies = found[found.kind.isin(COPIES)]
    for one in copies.itertuples():
        print(f"  rows {one.other_row} and {one.row}: {one.reason}")


def collections(folder: Path) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Yield names, files and labels of collections that are at hand, as class folders."""
    photos = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    yield "tiles of 2 photographs", *_tiles(folder / "two", photos)
    task = load_elpv()
    yield "solar cells, by kind of module", task.images, task.strata
    digits = load_digits()
    images = {f"{i:04}": image for i, image in enumerate((digits.images * 15.9).astype(np.uint8))}
    yield "digits", _written(folder / "digits", images), digits.target
    if find_spec("skimage") is None:
        print("Without scikit-image: no faces, and no tiles of its photographs\n", flush=True)
        return
    from skimage import data

    for name in ("astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel"):
        photos[name] = getattr(data, name)()
    for name in ("hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket"):
        photos[name] = getattr(data, name)()
    yield f"tiles of {len(photos)} photographs", *_tiles(folder / "many", photos)
    faces = (data.lfw_subset() * 255).astype(np.uint8)  # 100 faces, then 100 others
    images = {f"{i:04}": image for i, image in enumerate(faces)}
    yield "faces, and what is none", _written(folder / "faces", images), np.repeat([1, 0], 100)


def _tiles(folder: Path, photos: dict[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Write 24 tiles of each photograph, that do not overlap."""
    tiles = {}
    for name, photo in photos.items():
        height, width = photo.shape[0] // 4, photo.shape[1] // 6
        for i in range(24):
            top, left = height * (i // 6), width * (i % 6)
            tiles[f"{name}{i:02}"] = photo[top : top + height, left : left + width]
    return _written(folder, tiles), np.repeat(list(photos), 24)


def _written(folder: Path, images: dict[str, np.ndarray]) -> list[str]:
    folder.mkdir()
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    return [str(folder / f"{name}.png") for name in images]


def in_wrong_folders(
    name: str, paths: list[str], y: np.ndarray, memory: str, n_draws: int
) -> dict[str, object]:
    """Return where among the doubtful labels five images are that lie in a wrong class folder."""
    ranks = []
    for seed in range(_FIRST, _FIRST + n_draws):
        chance, labels = np.random.default_rng(seed), y.copy()
        wrong = chance.choice(len(y), 5, replace=False)
        for row in wrong:
            labels[row] = chance.choice(np.setdiff1d(y, y[row]))
        found = audit(paths, labels, memory=memory)
        suspects = found.row[found.kind == "label"].tolist()
        ranks.append(sorted(1 + suspects.index(row) for row in wrong if row in suspects))
    return {
        "images": name,
        "": len(y),
        "classes": len(np.unique(y)),
        "among the first 15": ", ".join(f"{sum(r <= 15 for r in of)}" for of in ranks),
        "ranks": "; ".join(", ".join(map(str, of)) for of in ranks),
    }


def write_mosaics(folder: Path, n: int) -> list[str]:
    """Write JPEG files of four crops of photographs each; return their paths.

    Crops of two photographs alone would be copies of each other.
    """
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    width, height = 160, 120

    def write(i: int) -> str:
        chance, mosaic = np.random.default_rng(i), Image.new("RGB", (2 * width, 2 * height))
        for place, which in enumerate(chance.permutation(np.arange(4) < i % 5).astype(int)):
            photo, scale = photos[which], chance.uniform(0.6, 1.4)
            left = chance.uniform(0, photo.width - scale * width)
            top = chance.uniform(0, photo.height - scale * height)
            box = (left, top, left + scale * width, top + scale * height)
            tile = photo.resize((width, height), Image.Resampling.BICUBIC, box)
            tile = ImageOps.mirror(tile) if chance.random() < 0.5 else tile
            mosaic.paste(tile, (place % 2 * width, place // 2 * height))
        path = folder / f"{i:06}.jpg"
        mosaic.save(path, quality=90)
        return str(path)

    folder.mkdir()
    with ThreadPoolExecutor() as threads:
        return list(threads.map(write, range(n)))


def seconds_of_warm_audit(folder: Path, n: int, memory: str) -> dict[str, object]:
    """Return how long two audits take of mosaics, by how many parts are of one photograph.

    At 64 pixels, which spares time at first: what is read and compared later has the same size.
    """
    paths = write_mosaics(folder / "mosaics", n)
    y = np.arange(n) % 5
    found: dict[str, object] = {"images": n}
    for name in ("first audit", "warm audit"):
        start, cpu = time.perf_counter(), time.process_time()
        audit(paths, y, memory=memory, image_size=64)
        found[f"{name}, s"] = f"{time.perf_counter() - start:.1f}"
        found[f"{name}, s of CPU"] = f"{time.process_time() - cpu:.1f}"
    return found


def seconds_of_a_report(folder: Path, n: int, memory: str) -> list[dict[str, object]]:
    """Return how long a comparison of classifiers takes, and the audit behind it.

    The comparison's processes are not in the seconds of CPU.
    """
    paths = write_mosaics(folder / "mosaics", n)
    task = Task("mosaics", paths, {"": np.array([f"class {i % 5}" for i in range(n)])})
    parts = {
        "comparison": lambda: compare(task, memory=memory),
        "audit": lambda: audit(paths, task.targets[""], memory=memory),
    }
    rows: list[dict[str, object]] = []
    for state in ("first", "warm"):
        rows.append({"images": n, "memory": state})
        for name, part in parts.items():
            start, cpu = time.perf_counter(), time.process_time()
            part()
            rows[-1][f"{name}, s"] = f"{time.perf_counter() - start:.1f}"
            rows[-1][f"{name}, s of CPU"] = f"{time.process_time() - cpu:.1f}"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of doubles and flipped labels")
    parser.add_argument("--draws", type=int, default=10, help="of images in wrong folders")
    parser.add_argument("--report", type=int, metavar="N", help="measure its seconds instead")
    parser.add_argument("--speed", type=int, metavar="N", help="measure the seconds instead")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth cell only")
    parser.add_argument("--memory", help="by default, a temporary folder")
    options = parser.parse_args()
    print(environment() + "\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        memory = options.memory or f"{folder}/memory"
        if options.speed:
            print(table([seconds_of_warm_audit(Path(folder), options.speed, memory)]))
            return
        if options.report:
            print(table(seconds_of_a_report(Path(folder), options.report, memory)))
            return
        every, draws = options.every, options.draws
        found = [
            in_wrong_folders(name, paths[::every], y[::every], memory, draws)
            for name, paths, y in collections(Path(folder))
        ]
        print(table(found) + "\n", flush=True)
        rows = [with_faults(seed, memory, options.every) for seed in range(options.seeds)]
        print(table(rows) + "\n\nELPV as it is:\n", flush=True)
        of_cells_as_they_are(memory, options.every)


if __name__ == "__main__":
    main()
