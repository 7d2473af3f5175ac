"""How much an audit finds of what was put wrong, and how long a warm one takes.

On the ELPV solar cells, with 50 files doubled (saved again as JPEG, cropped by 2 %, mirrored) and
2 % of the labels flipped: how many of the doubles are found, at which precision; the average
precision of the doubtful labels, against chance. On the cells as they are: which cells it takes for
one, and how far apart these stand in the list, which has the cells of a module one after the other.
On tiles of photographs in class folders, five of them in a wrong one: their ranks. `--speed N`: the
seconds of an audit of N photographs with a warm memory.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import environment, table, write_photographs
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from sklearn.metrics import average_precision_score

from sktransfer._cli.tasks import load_elpv
from sktransfer.model_selection import audit

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


def in_wrong_folders(folder: Path, memory: str) -> dict[str, object]:
    """Return the ranks of five tiles of photographs that lie in a wrong class folder."""
    paths, y = [], []
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for i in range(60):
            top, left = 70 * (i // 10), 64 * (i % 10)
            path = folder / f"{name}{i:02}.png"
            Image.fromarray(photo[top : top + 70, left : left + 64]).save(path)
            paths.append(str(path))
            y.append(name)
    wrong = np.random.default_rng(0).choice(len(y), 5, replace=False)
    for row in wrong:
        y[row] = "flower" if y[row] == "china" else "china"
    found = audit(paths, y, memory=memory)
    ranks = [int(found["rank"][found.row == row].min()) for row in wrong if row in set(found.row)]
    return {"tiles in a wrong folder": 5, "found": len(ranks), "ranks": sorted(ranks)}


def seconds_of_warm_audit(folder: Path, n: int, memory: str) -> dict[str, object]:
    paths = write_photographs(folder / "many", n, (320, 240))
    y = np.arange(n) % 10
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        audit(paths, y, memory=memory)
        seconds.append(f"{time.perf_counter() - start:.1f}")
    return {"images": n, "first audit, s": seconds[0], "warm audit, s": seconds[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--speed", type=int, default=0, metavar="N", help="0: not measured")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth cell only")
    parser.add_argument("--memory", help="by default, a temporary folder")
    options = parser.parse_args()
    print(environment() + "\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        memory = options.memory or f"{folder}/memory"
        tiles = Path(folder) / "tiles"
        tiles.mkdir()
        print(table([in_wrong_folders(tiles, memory)]) + "\n", flush=True)
        rows = [with_faults(seed, memory, options.every) for seed in range(options.seeds)]
        print(table(rows) + "\n\nELPV as it is:\n", flush=True)
        of_cells_as_they_are(memory, options.every)
        if options.speed:
            print("\n" + table([seconds_of_warm_audit(Path(folder), options.speed, memory)]))


if __name__ == "__main__":
    main()
