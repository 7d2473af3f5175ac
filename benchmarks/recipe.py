"""Classifiers of frozen features, to choose the one that `make_classifier` returns.

Accuracy on scikit-learn's digits as images, on 240 photographs and drawings in 8 classes, some of
them cut out (RGBA), and on ELPV (p > 0.5), with 50, 200 and all labels, means of five splits 75/25.
The embeddings are computed once; what is compared is which layers they are of, how they are scaled,
and what learns from them.
"""

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from _common import say, table
from all_layers import _splits, _tasks
from PIL import Image, ImageDraw, ImageFilter
from sklearn.base import clone
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from sktransfer import PretrainedFeatureExtractor, make_classifier

ALL = {"layer": "all", "pooling": ("avg", "max")}
LAST = {"layer": "auto", "pooling": "avg"}
FEATURES: dict[str, dict[str, Any]] = {
    "all, normalised": ALL | {"normalize": True},
    "last, normalised": LAST | {"normalize": True},
    "last": LAST | {"normalize": False},
}
_LOGISTIC = LogisticRegression(C=30, max_iter=1000)
NORMALISED = {"RBF SVM, C=10": SVC(C=10), "logistic regression, C=30": _LOGISTIC}
MODELS: dict[str, dict[str, Any]] = {
    "all, normalised": {"make_classifier": make_classifier()[1:]}
    | {"scaler, RBF SVM, C=10": make_pipeline(StandardScaler(), SVC(C=10))}
    | NORMALISED,
    "last, normalised": NORMALISED,
    "last": {
        "scaler, RBF SVM, C=1": make_pipeline(StandardScaler(), SVC()),
        "scaler, logistic regression, C=1": make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=1000)
        ),
    },
}


# ------------------------------------------------------------------------------ images


def photos_and_drawings(n: int = 30) -> tuple[list[Image.Image], np.ndarray]:
    """Return n images in each of 8 classes; of the drawings, every other one is cut out (RGBA).

    Four classes are small noisy crops of regions of scikit-learn's two photographs, which look
    much alike; four are drawings of one shape each, at random places, sizes, angles and colours.
    """
    chance, images, labels = np.random.default_rng(0), [], []
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for name, photo, left in (
        ("palace", 0, 60),
        ("roofs", 0, 330),
        ("petals", 1, 240),
        ("leaves", 1, 0),
    ):
        for _ in range(n):
            images.append(_crop(photos[photo], left, chance))
            labels.append(name)
    for shape in ("circle", "square", "triangle", "star"):
        for number in range(n):
            images.append(_drawing(shape, number % 2 == 0, chance))
            labels.append(shape)
    return images, np.array(labels)


def _crop(photo: Image.Image, left: int, chance: np.random.Generator) -> Image.Image:
    x, y, size = left + chance.integers(0, 220), chance.integers(0, 330), chance.integers(48, 96)
    crop = photo.crop((x, y, x + size, y + size)).rotate(int(chance.integers(-20, 20)))
    pixels = np.asarray(crop.resize((96, 96)), float) * chance.uniform(0.5, 1.5)
    pixels += chance.normal(0, 20, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _drawing(shape: str, is_cut_out: bool, chance: np.random.Generator) -> Image.Image:
    color = tuple(chance.integers(0, 256, 3).tolist())
    ground = (0, 0, 0, 0) if is_cut_out else (*chance.integers(0, 256, 3).tolist(), 255)
    image = Image.new("RGBA", (96, 96), ground)
    draw, radius = ImageDraw.Draw(image), int(chance.integers(8, 28))
    x, y = chance.integers(30, 66, 2).tolist()
    corners = {"circle": 40, "square": 4, "triangle": 3, "star": 10}[shape]
    angles = chance.uniform(0, 6.3) + np.arange(corners) * 2 * np.pi / corners
    lengths = np.where(np.arange(corners) % 2, 0.5, 1) if shape == "star" else np.ones(corners)
    points = np.stack(
        [x + radius * lengths * np.cos(angles), y + radius * lengths * np.sin(angles)]
    )
    draw.polygon([tuple(point) for point in points.T], fill=(*color, 255))
    image = image.filter(ImageFilter.GaussianBlur(float(chance.uniform(0, 2))))
    return image if is_cut_out else image.convert("RGB")


# ------------------------------------------------------------------------------ the comparison


def _named_tasks(chosen: list[str]) -> Iterator[tuple[str, Any, np.ndarray]]:
    if "photographs" in chosen:
        yield "photographs", *photos_and_drawings()
    yield from (task for task in _tasks() if task[0] in chosen)


def compare(chosen: list[str], labels: list[int | str], n_splits: int, memory: str) -> None:
    """Print a table for each task; a row is one classifier, a column a number of labels."""
    for task, images, y in _named_tasks(chosen):
        extractor = PretrainedFeatureExtractor(memory=memory)
        rows = {k: extractor.set_params(**v).transform(images) for k, v in FEATURES.items()}
        found: dict[tuple[str, str], dict[str, str]] = {}
        for n in labels:
            if (n != "all" and n > 0.7 * len(y)) or (n == "all" and task == "digits"):
                continue  # too few images; and of all digits, all classifiers know nearly all
            splits = list(_splits(y, n, n_splits))
            for name, by, model in ((k, by, m) for k in MODELS for by, m in MODELS[k].items()):
                scores = [
                    clone(model).fit(rows[name][train], y[train]).score(rows[name][test], y[test])
                    for train, test in splits
                ]
                row = found.setdefault((name, by), {"features": name, "by": by})
                row[f"{n} labels"] = f"{np.mean(scores):.3f} ± {np.std(scores):.3f}"
            say(f"  {task}: {n} labels")
        title = f"{task}: {len(y)} images, {len(np.unique(y))} classes"
        print(f"\n{title}\n\n{table(list(found.values()))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    tasks = ["photographs", "digits", "ELPV"]
    parser.add_argument("--task", choices=tasks, action="append", help="(default: all of them)")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--labels", nargs="*", default=["50", "200", "all"])
    parser.add_argument("--memory", help="folder that keeps the rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        labels = [int(n) if n.isdigit() else n for n in options.labels]
        compare(options.task or tasks, labels, options.splits, options.memory or folder)


if __name__ == "__main__":
    main()
