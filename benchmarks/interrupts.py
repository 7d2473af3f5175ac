"""Press Ctrl-C at random moments of a transform with a memory, and look at what is left.

Run as ``python benchmarks/interrupts.py --seconds 120``. A timer sends real signals, at times a
second one shortly after the first. After each, another process looks for claims that are still
held, and the same call is made again: it must return the right rows, and soon.
"""

import argparse
import fcntl
import multiprocessing
import random
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sktransfer import PretrainedFeatureExtractor

N_IMAGES = 64


def network() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def look_for_claims(path: Path, connection) -> None:
    while connection.recv():
        with open(path, "r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                connection.send(False)
            except OSError:
                connection.send(True)


def pressed(model, images: np.ndarray, duration: float, random_: random.Random) -> bool:
    """Run a transform into which signals come; tell whether one cut it short."""
    again = random_.uniform(1e-4, 5e-3) if random_.random() < 0.3 else 0
    try:
        signal.setitimer(signal.ITIMER_REAL, random_.uniform(1e-4, duration), again)
        try:
            model.transform(images)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (KeyboardInterrupt, RuntimeError):  # threading's, of a second signal in a Condition
        signal.setitimer(signal.ITIMER_REAL, 0)
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    torch.set_num_threads(1)
    random_, rng = random.Random(arguments.seed), np.random.default_rng(arguments.seed)
    counts = {"transforms": 0, "interrupted": 0, "with claims left": 0, "wrong rows": 0}
    backbone, slowest = network(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        options = {"image_size": 32, "n_jobs": 2, "batch_size": 8}
        model = PretrainedFeatureExtractor(backbone, memory=folder, **options)
        plain = PretrainedFeatureExtractor(backbone, **options)
        first = rng.integers(0, 255, (N_IMAGES, 32, 32, 3)).astype(np.uint8)
        model.transform(first)
        start = time.perf_counter()
        model.transform(255 - first)
        duration = 1.2 * (time.perf_counter() - start)
        ours, theirs = multiprocessing.Pipe()
        claims = Path(folder) / "joblib" / "claims"
        watcher = multiprocessing.get_context("fork").Process(
            target=look_for_claims, args=(claims, theirs), daemon=True
        )
        watcher.start()
        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            images = rng.integers(0, 255, (N_IMAGES, 32, 32, 3)).astype(np.uint8)
            counts["transforms"] += 1
            counts["interrupted"] += pressed(model, images, duration, random_)
            for _ in range(50):  # a second signal keeps a call from waiting for what it cleans up
                ours.send(True)
                if not (are_left := ours.recv()):
                    break
                time.sleep(0.1)
            counts["with claims left"] += are_left
            start = time.perf_counter()
            rows = model.transform(images)
            slowest = max(slowest, time.perf_counter() - start)
            counts["wrong rows"] += not np.allclose(rows, plain.transform(images), atol=1e-5)
    print(counts, f"slowest call afterwards: {slowest:.2f} s")


if __name__ == "__main__":
    main()
