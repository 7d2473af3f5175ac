"""Detectors with new categories: digits pasted into photographs.

Scenes are made of what scikit-learn ships: handwritten digits 0 and 1, pasted as slips of paper of
random places and sizes onto random parts of two photographs. Training and test scenes have no
digit in common, and lie on different halves of the photographs.

    python benchmarks/detector.py [--train 300] [--test 60] [--epochs 15] [--parts new replaced]

`new`: FCOS on the embedded backbone, which stays frozen. `replaced`: a state dict of
`fasterrcnn_mobilenet_v3_large_320_fpn`, random as no weights come with the installation, is saved,
loaded from the file, its predictor cut off and replaced, and trained with all that lies in front
of it; it shows that this runs, no more.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from tabulate import tabulate
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from sktransfer import FineTunedDetector
from sktransfer.inspection import DetectionDisplay
from sktransfer.metrics import coco_scores

_NAMES = ("zero", "one")
_SIZES = (320, 256)  # width and height of a scene
_SIDES = (32, 96)  # of a pasted digit
_MOST = 4  # digits in a scene
_REPLACED = "fasterrcnn_mobilenet_v3_large_320_fpn"


def make_scenes(n: int, is_test: bool, seed: int) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Return scenes (256, 320, 3) and their boxes; every tenth one is without objects."""
    rng = np.random.RandomState(seed)
    digits = load_digits()
    own = [np.flatnonzero(digits.target == label)[int(is_test) :: 2] for label in (0, 1)]
    photos = [Image.fromarray(photo).crop(_half(is_test)) for photo in load_sample_images().images]
    X, y = [], []
    for i in range(n):
        scene = _background(photos[rng.randint(len(photos))], rng)
        boxes: list[list[int]] = []
        labels = []
        for _ in range(0 if i % 10 == 9 else rng.randint(1, _MOST + 1)):
            label = rng.randint(2)
            slip = _slip(digits.images[rng.choice(own[label])], rng)
            left, top = (rng.randint(a - b + 1) for a, b in zip(_SIZES, slip.size, strict=True))
            box = [left, top, left + slip.width, top + slip.height]
            if not any(_overlap(box, other) for other in boxes):
                scene.paste(slip, (left, top))
                boxes.append(box)
                labels.append(_NAMES[label])
        X.append(np.asarray(scene))
        y.append({"boxes": np.array(boxes, float).reshape(-1, 4), "labels": labels})
    return X, y


def _half(is_test: bool) -> tuple[int, int, int, int]:
    return (320, 0, 640, 427) if is_test else (0, 0, 320, 427)


def _background(photo: Image.Image, rng: np.random.RandomState) -> Image.Image:
    """Return a random part, at 1 to 1.6 times its size, perhaps mirrored."""
    width, height = (int(side / rng.uniform(1, 1.6)) for side in _SIZES)
    left, top = rng.randint(photo.width - width + 1), rng.randint(photo.height - height + 1)
    part = photo.crop((left, top, left + width, top + height)).resize(_SIZES)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.randint(2) else part


def _slip(digit: np.ndarray, rng: np.random.RandomState) -> Image.Image:
    """Return a digit, 0 to 16, as ink on paper of random colours."""
    paper, ink = rng.uniform(150, 255, 3), rng.uniform(0, 90, 3)
    share = digit[..., None] / 16
    pixels = (paper * (1 - share) + ink * share).astype(np.uint8)  # (8, 8, 3)
    side = rng.randint(*_SIDES)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def _overlap(a: list[int], b: list[int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def run(name: str, model: FineTunedDetector, train: Any, test: Any) -> dict[str, Any]:
    """Fit, predict and score; return a row of the table."""
    start = time.perf_counter()
    model.fit(*train)
    fitted = time.perf_counter() - start
    found = model.predict(test[0])
    scores = coco_scores(test[1], found)
    DetectionDisplay.from_predictions(test[0], found, test[1], n_images=12).figure_.savefig(
        f"detector_{name}.png", dpi=120
    )
    return {
        "detector": name,
        "trained parameters": model.n_trainable_parameters_,
        "AP50": f"{scores['map_50']:.3f}",
        "mAP": f"{scores['map']:.3f}",
        **{f"AP {label}": f"{value:.3f}" for label, value in scores["map_per_class"].items()},
        "loss": f"{model.history_[0]['train_loss']:.2f} to {model.history_[-1]['train_loss']:.2f}",
        "fit, s": f"{fitted:.0f}",
        "all, s": f"{time.perf_counter() - start:.0f}",
    }


def replaced(folder: str, **parameters: Any) -> FineTunedDetector:
    """Return a detector whose state dict of 91 categories was saved to a file."""
    torch.manual_seed(0)
    path = Path(folder) / "detector.pth"
    network = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    torch.save(network.state_dict(), path)
    return FineTunedDetector(detector=_REPLACED, weights=path, **parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=300, help="scenes")
    parser.add_argument("--test", type=int, default=60, help="scenes")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--parts", nargs="+", default=["new", "replaced"])
    options = parser.parse_args()
    print(environment("skorch", "pycocotools"), flush=True)
    train, test = make_scenes(options.train, False, 0), make_scenes(options.test, True, 1)
    table = []
    if "new" in options.parts:
        model = FineTunedDetector(
            image_size=192,
            width=64,
            batch_size=4,
            max_epochs=options.epochs,
            random_state=0,
            verbose=1,
        )
        table.append(run("new", model, train, test))
        print(tabulate(table, headers="keys", disable_numparse=True), flush=True)
    if "replaced" in options.parts:
        n = max(8, options.train // 20)
        with tempfile.TemporaryDirectory() as folder:
            model = replaced(folder, unfreeze=3, max_epochs=2, random_state=0, verbose=1)
            few = train[0][:n], train[1][:n]
            table.append(run("replaced", model, few, (test[0][:8], test[1][:8])))
    print(tabulate(table, headers="keys", disable_numparse=True))


if __name__ == "__main__":
    main()
