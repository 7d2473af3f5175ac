"""What a few labelled images add to words: the probe of ZeroShotClassifier, and Tip-Adapter.

No pretrained CLIP is at hand, so words are made up; images are real. Rows are embeddings by
EfficientNet-Lite0, scaled to length 1: of the ELPV solar cells, defective (p > 0.5) or not, and of
scikit-learn's digits. The word of a class is a row of length 1 as well: `quality` times the
direction in which its images differ from the mean, plus a direction between two images taken at
random, which says nothing; 0 is words that know nothing. The scale of the logits is the one that
makes words of quality 0.8 most probable on the test images. Words are made of one half of the
images, labelled images are others of this half, and the other half is tested on.

Compared are the words alone; Tip-Adapter: likeness to the labelled images of each class is added,
by weight and sharpness with the least log-loss where each of them is judged by the others; the
probe of ZeroShotClassifier; and a logistic regression (C = 100) that knows no words. Accuracy and
log-loss are means over the draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
from _common import environment, say, table
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from sktransfer import PretrainedFeatureExtractor
from sktransfer._cli.benchmark import load_elpv
from sktransfer._estimators.word_probe import choose_probe

WEIGHTS = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SHARPNESS = (1.0, 3.0, 10.0, 30.0)  # in units of the median distance
SCALES = (1.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 50.0)
GOOD = 0.8  # quality of the words to which the scale is fitted


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def load(task: str, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of length 1 and the numbers of their classes."""
    if task == "digits":
        digits = load_digits()
        X, y, size = list(digits.images[::every] / 16), digits.target[::every], 64
    else:
        cells = load_elpv()
        X, size = list(cells.images[::every]), 128
        y = cells.targets["defective: p > 0.5"][::every] == "defective"
    rows = PretrainedFeatureExtractor(image_size=size).transform(X)
    return unit(rows.astype(float)), np.asarray(y).astype(int)


def loss(logits: np.ndarray, y: np.ndarray) -> float:
    return -float(log_softmax(logits, axis=1)[np.arange(len(y)), y].mean())


def likeness(
    rows: np.ndarray, seen: np.ndarray, is_class: np.ndarray, sharpness: float, *, itself: bool
) -> np.ndarray:
    """Return the mean likeness to the images of each class; without `itself`, to the others."""
    affinity = np.exp(sharpness * (rows @ seen.T - 1))
    counts = is_class.sum(0)
    if not itself:
        np.fill_diagonal(affinity, 0)
        counts = counts - is_class
    return affinity @ is_class / np.maximum(counts, 1)


def tip_adapter(
    rows: np.ndarray, y: np.ndarray, words: np.ndarray, new: np.ndarray, new_words: np.ndarray
) -> np.ndarray:
    is_class = np.eye(words.shape[1])[y]
    unit_distance = np.median((1 - rows @ rows.T)[np.triu_indices(len(rows), 1)])
    choices = [(w, s / max(unit_distance, 1e-6)) for s in SHARPNESS for w in WEIGHTS]
    weight, sharpness = min(
        choices,
        key=lambda c: loss(words + c[0] * likeness(rows, rows, is_class, c[1], itself=False), y),
    )
    return new_words + weight * likeness(new, rows, is_class, sharpness, itself=True)


def word_rows(
    rows: np.ndarray, y: np.ndarray, quality: float, chance: np.random.Generator
) -> np.ndarray:
    """Return a row for each class that knows as much of it as `quality` says."""
    means = np.stack([rows[y == k].mean(0) for k in range(y.max() + 1)])
    pairs = rows[chance.choice(len(rows), (len(means), 2))]
    noise = unit(pairs[:, 0] - pairs[:, 1] + 1e-9)
    return unit(quality * unit(means - means.mean(0)) + np.sqrt(1 - quality**2) * noise)


def draw(
    rows: np.ndarray, y: np.ndarray, quality: float, n: int, seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the name of a method, its logits and the truth on the test images."""
    order = np.random.default_rng(seed).permutation(len(y))
    half, test = order[: len(y) // 2], order[len(y) // 2 :]
    few = np.concatenate([half[y[half] == k][:n] for k in np.unique(y)])
    rest = np.setdiff1d(half, few)
    made = {
        q: word_rows(rows[rest], y[rest], q, np.random.default_rng(seed)) for q in (quality, GOOD)
    }
    scale = min(SCALES, key=lambda scale: loss(scale * rows[test] @ made[GOOD].T, y[test]))
    words, new_words = (scale * rows[part] @ made[quality].T for part in (few, test))
    yield "words", new_words, y[test]
    yield "Tip-Adapter", tip_adapter(rows[few], y[few], words, rows[test], new_words), y[test]
    weights, _ = choose_probe(rows[few], y[few], words)
    yield "probe", new_words + rows[test] @ weights, y[test]
    alone = LogisticRegression(C=100, max_iter=1000).fit(rows[few], y[few])
    yield "without words", alone.predict_log_proba(rows[test]), y[test]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for task in args.tasks:
        rows, y = load(task, args.every)
        for quality in args.qualities:
            for n in args.shots:
                results: dict[str, list[tuple[float, float]]] = {}
                for seed in range(args.draws):
                    for name, logits, truth in draw(rows, y, quality, n, seed):
                        right = float((logits.argmax(1) == truth).mean())
                        results.setdefault(name, []).append((right, loss(logits, truth)))
                cells = {k: "{:.3f} / {:.2f}".format(*np.mean(v, 0)) for k, v in results.items()}
                found.append({"task": task, "quality": quality, "images a class": n, **cells})
                say(str(found[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=("ELPV", "digits"), default=["ELPV", "digits"]
    )
    parser.add_argument("--qualities", type=float, nargs="+", default=[0.0, 0.2, 0.5, 0.8])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--every", type=int, default=1, help="take every so manieth image only")
    args = parser.parse_args()
    print(environment())
    print(f"\n{table(measure(args))}")


if __name__ == "__main__":
    main()
