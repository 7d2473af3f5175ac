"""Small real networks for the tests."""

import os
import signal
import threading
from pathlib import Path

import torch
import xxhash
from torch import nn

from sktransfer.models._trial import noise

LOG = "SKTRANSFER_TEST_LOG"  # names the file that counted networks write to, while it exists


def count(x: torch.Tensor) -> torch.Tensor:
    """Append the digest of every distinct image of a real batch to the log file.

    The noise by which networks are tried out is none.
    """
    log = Path(os.environ.get(LOG, ""))
    if log.is_file() and x.device.type != "meta" and type(x) is torch.Tensor:
        digests = _digests(x) - _digests(noise(x.shape[1:]))
        with log.open("a") as file:
            file.write("".join(f"{digest}\n" for digest in digests))
    return x


def _digests(images: torch.Tensor) -> set[str]:
    return {xxhash.xxh3_64_hexdigest(row.contiguous().cpu().numpy()) for row in images}


torch.fx.wrap("count")


class Small(nn.Module):
    """Three convolutions, a pooling and a head; every image that runs through it is counted."""

    def __init__(self, n_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, n_classes)

    def forward(self, x):
        x = self.body(self.stem(count(x)))
        return self.head(self.pool(x).flatten(1))


def small(seed: int = 0) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small()


class Untraceable(nn.Module):
    """What it does depends on the pixels, so it can't be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if x.isnan().any():
            x = x + 1
        return self.conv(x).mean((2, 3))


STRIKE = "SKTRANSFER_TEST_STRIKE"  # names a file; while it exists, a white image is deadly


def strike(x: torch.Tensor) -> torch.Tensor:
    """Kill this process, and remove the file, if a white image is in a real batch."""
    if os.environ.get(STRIKE) and x.device.type != "meta" and type(x) is torch.Tensor:
        if (x.flatten(1).min(1).values > 1.5).any() and os.path.exists(os.environ[STRIKE]):
            os.unlink(os.environ[STRIKE])
            os.kill(os.getpid(), signal.SIGKILL)
    return x


torch.fx.wrap("strike")


class Deadly(Small):
    """Its process dies at the first white image."""

    def forward(self, x):
        return super().forward(strike(x))


def pause(x: torch.Tensor) -> torch.Tensor:
    """Wait in the middle of a real batch, if this thread has events for it."""
    events = getattr(threading.current_thread(), "pause", None)
    if events is not None and x.device.type != "meta" and type(x) is torch.Tensor:
        started, go_on = events
        started.set()
        assert go_on.wait(600)
    return x


torch.fx.wrap("pause")


class Pausing(Small):
    """It waits in front of its first layer, in threads that have events for it."""

    def forward(self, x):
        return super().forward(pause(x))
