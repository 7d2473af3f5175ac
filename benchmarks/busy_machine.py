"""Small solves and embeddings beside busy processes, with and without the limit of their threads.

Where other programs run, threads of BLAS and OpenMP that wait for each other take several times as
long as one thread. Each row is one piece of work, done by one thread, with as many threads as there
are cores, and as the library does it, in turns: medians of seconds, and processor seconds, which
other programs change less. `--busy 2` starts that many processes that compute without end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from _common import environment, median, say, table
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from threadpoolctl import threadpool_limits

from sktransfer import PretrainedFeatureExtractor, _threads
from sktransfer._training.heads import make_head, solve_head
from sktransfer.metrics import h_score, log_me_score

Work = Callable[[], Any]


def _spin() -> None:
    while True:
        pass


@contextmanager
def _beside(n_busy: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_spin, daemon=True) for _ in range(n_busy)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()


def _rows(n: int, width: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(0)
    y = np.arange(n) % n_classes
    X = chance.normal(size=(n, width)) + chance.normal(size=(n_classes, width))[y] / 4
    return X.astype(np.float32), y


def _solves(n: int, width: int, n_classes: int) -> dict[str, Work]:
    X, y = _rows(n, width, n_classes)

    def head() -> None:
        solve_head(make_head("linear", width, n_classes, 0.0), X, y, None, "class")

    models = {
        "logistic regression, 3 folds": make_pipeline(StandardScaler(), LogisticRegression(C=0.01)),
        "k-NN, 3 folds": KNeighborsClassifier(metric="cosine"),
        "RBF SVM, 3 folds": SVC(C=10),
        "linear SVM, 3 folds": LinearSVC(),
    }
    works: dict[str, Work] = {k: _cross_validated(model, X, y) for k, model in models.items()}
    scores = {"LogME": lambda: log_me_score(X, y), "H-score": lambda: h_score(X, y)}
    return works | scores | {"head": head}


def _cross_validated(model: Any, X: np.ndarray, y: np.ndarray) -> Work:
    return lambda: cross_val_score(model, X, y, cv=3)


SPINS = {"one thread": None, "OpenMP's own": "300000", "the library": "1000"}  # GOMP_SPINCOUNT


def _embedding(n: int, repeats: int) -> dict[str, str]:
    """Measure embeddings in new processes: torch, when it is loaded, settles how threads wait."""
    found: dict[str, list[tuple[float, float]]] = {}
    for how, spins in SPINS.items():
        os.environ["GOMP_SPINCOUNT"] = spins or "1000"
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[how] = pool.apply(_embed, (n, repeats, spins is None))
        say(f"  embedding: {how}")
    del os.environ["GOMP_SPINCOUNT"]
    return {"work": f"embedding {n} images by torch"} | {k: _cell(v) for k, v in found.items()}


def _embed(n: int, repeats: int, in_one_thread: bool) -> list[tuple[float, float]]:
    if in_one_thread:
        torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (n, 300, 300, 3)).astype(np.uint8)
    extractor = PretrainedFeatureExtractor(runtime="torch")
    extractor.transform(images[:4])  # to warm up
    return [_timed(lambda: extractor.transform(images), nullcontext()) for _ in range(repeats)]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def _timed(work: Work, limit: Any) -> tuple[float, float]:
    with limit:
        start = time.perf_counter(), time.process_time()
        work()
        return time.perf_counter() - start[0], time.process_time() - start[1]


def _solve_row(name: str, work: Work, size: int, repeats: int) -> dict[str, str]:
    """Measure one piece of work on rows of so many values."""
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        limits = {"one thread": _one_thread(), "all threads": nullcontext()}
        for how, limit in {**limits, "the library": _threads.small_solve(size)}.items():
            found.setdefault(how, []).append(_timed(work, limit))
    say(f"  {name}")
    return {"work": name} | {how: _cell(times) for how, times in found.items()}


def _cell(times: list[tuple[float, float]]) -> str:
    seconds, cpu = (median(values) for values in zip(*times, strict=True))
    return f"{seconds:.2f} s, {cpu:.2f} CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="processes (default 0)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=50, help="to embed; 0 for none")
    shapes = ["238x1280x8", "238x6240x8", "1000x6240x8", "2600x6240x2"]
    parser.add_argument("--rows", nargs="*", default=shapes, metavar="NxWIDTHxCLASSES")
    options = parser.parse_args()
    rows = []
    with _beside(options.busy):
        for shape in options.rows:
            n, width, n_classes = map(int, shape.split("x"))
            for name, work in _solves(n, width, n_classes).items():
                rows.append(_solve_row(f"{shape}: {name}", work, n * width, options.repeats))
        embedded = [_embedding(options.images, options.repeats)] if options.images else []
    print(environment("threadpoolctl"), "\n")
    print(f"Beside {options.busy} busy processes, medians of {options.repeats}\n")
    for part in (rows, embedded):
        print(table(part), "\n")


if __name__ == "__main__":
    main()
