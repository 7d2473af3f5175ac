"""Small random networks by the hundred, in threads: what OpenVINO computes against torch.

Networks come from files and in turn, so that older ones are destroyed while others run; five
images each, `batch_size=3`. Some end in blocks that only pass on what they get. Freed memory is
overwritten at once, and large blocks of it are given back to the system: what is read too late
shows. Prints each result that is wrong and each network that falls back to torch; ends with
exit code 1 if there was one.
"""

import argparse
import os
import random
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

# Of the C library; Python's own allocator would keep freed memory to itself.
SETTINGS = {
    "PYTHONMALLOC": "malloc",
    "MALLOC_PERTURB_": "165",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536",
}
if __name__ == "__main__" and any(os.environ.get(k) != v for k, v in SETTINGS.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SETTINGS})

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from sktransfer import PretrainedFeatureExtractor, get_model, register_model  # noqa: E402
from sktransfer._engine.augmentation import Augmentation, Views  # noqa: E402
from sktransfer._engine.frozen import Activations, FrozenBlocks  # noqa: E402
from sktransfer._engine.runner import get_runner  # noqa: E402
from sktransfer.io import check_images  # noqa: E402
from sktransfer.models import Backbone  # noqa: E402

KEPT = 6  # networks that are run once more, later: more than the library keeps loaded
LARGEST = {"rows": 1e-3, "activations": 1e-2}  # shares of the norm; activations are rounded


class Residual(nn.Module):
    """Convolutions around a shortcut."""

    def __init__(self, width: int, side: int, groups: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, side, padding=side // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.mix(self.norm(self.spatial(x)).relu())).relu()


class Tokens(nn.Module):
    """A layer of a transformer, without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))


def network(seed: int) -> nn.Module:
    """Return a network whose architecture and weights follow from the seed."""
    chance = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = chance.choice([32, 64, 96])
        body: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), nn.ReLU()]
        groups = (1, 4, width)
        for _ in range(chance.randint(1, 4)):
            body.append(Residual(width, chance.choice([1, 3, 5]), chance.choice(groups)))
        if chance.random() < 0.4:
            body += [nn.Flatten(2), Transposed(), *(Tokens(width) for _ in range(2))]
        body += chance.choice([[], [nn.Dropout()], [nn.Identity()]])  # these compute nothing
        made = nn.Sequential(*body)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return made.eval()


class Transposed(nn.Module):
    """From a map's channels and places to tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def build(weights: Path) -> Backbone:
    made = network(int(weights.stem))
    made.load_state_dict(torch.load(weights, weights_only=True))
    return Backbone(made)


def rows(path: Path, images: Any, size: int, runtime: str) -> np.ndarray:
    options = {"weights": path, "image_size": size, "batch_size": 3, "runtime": runtime}
    return PretrainedFeatureExtractor("soak", **options).transform(images)


def activations(path: Path, images: Any, size: int, runtime: str) -> list[np.ndarray]:
    backbone = get_model("soak", path)
    preprocessing = backbone.preprocessing.with_size(size)
    runner = get_runner(backbone, "cpu", "float32", runtime)
    frozen = FrozenBlocks(runner, preprocessing, "avg")
    views = Views(check_images(images), preprocessing, Augmentation(None, None, (size, size)))
    return Activations(frozen, list(range(1, frozen.embedding + 1)), batch_size=3)(views)


def difference(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference of an image's results, as a share of their norm."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (mine, theirs))
    return float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())


class Soak:
    """What the threads share: the next network, older ones, and what was found."""

    def __init__(self, seed: int, end: float, folder: Path) -> None:
        self.seed, self.end, self.folder = seed, end, folder
        self.lock = threading.Lock()
        self.older: list[tuple[Path, np.ndarray, int, np.ndarray]] = []
        self.n_networks = self.n_compared = self.n_wrong = 0
        self.worst = dict.fromkeys(LARGEST, 0.0)

    def run(self) -> None:
        while time.monotonic() < self.end:
            with self.lock:
                self.seed += 1
                seed = self.seed
            try:
                self.one(seed)
            except Exception as error:  # the other networks still tell something
                self.complain(f"network {seed}: {error!r}")

    def one(self, seed: int) -> None:
        chance = np.random.default_rng(seed)
        size = int(chance.choice([32, 64]))
        images = chance.integers(256, size=(5, size, size, 3), dtype=np.uint8)
        path = self.folder / f"{seed}.pth"
        torch.save(network(seed).state_dict(), path)
        expected = rows(path, images, size, "torch")
        self.compare(seed, "rows", rows(path, images, size, "openvino"), expected)
        both = (activations(path, images, size, runtime) for runtime in ("openvino", "torch"))
        for mine, theirs in zip(*both, strict=True):
            self.compare(seed, "activations", mine, theirs)
        with self.lock:
            self.n_networks += 1
            self.older.append((path, images, size, expected))
            if len(self.older) <= KEPT:
                return
            path, images, size, expected = self.older.pop(int(chance.integers(KEPT)))
        self.compare(int(path.stem), "rows", rows(path, images, size, "openvino"), expected)
        path.unlink()

    def compare(self, seed: int, what: str, mine: np.ndarray, theirs: np.ndarray) -> None:
        found = difference(mine, theirs)
        with self.lock:
            self.n_compared += 1
            self.worst[what] = max(self.worst[what], found)
        if not found <= LARGEST[what]:
            self.complain(f"network {seed}: {what} differ by {found:.2g} of their norm")

    def complain(self, text: str) -> None:
        with self.lock:
            self.n_wrong += 1
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("error", UserWarning)  # a network that falls back to torch is a failure
    register_model("soak", build)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options.seed, time.monotonic() + options.seconds, Path(folder))
        threads = [threading.Thread(target=soak.run) for _ in range(options.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    worst = ", ".join(f"{what} {value:.1g}" for what, value in soak.worst.items())
    print(f"{soak.n_networks} networks, {soak.n_compared} comparisons; worst difference: {worst}")
    print(f"{soak.n_wrong} wrong")
    sys.exit(soak.n_wrong > 0)


if __name__ == "__main__":
    main()
