"""What several of these scripts need: photographs, networks, sides in turns, and what ran."""

from __future__ import annotations

import copy
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images
from sklearn.model_selection import KFold
from tabulate import tabulate
from torch import nn

from sktransfer import get_model, register_model
from sktransfer.models import Backbone

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_PACKAGES = ("sktransfer", "torch", "torchvision", "timm", "scikit-learn", "numpy", "pillow")


# ------------------------------------------------------------------------------ what ran where


def environment(*packages: str) -> str:
    """Return the processor, threads and versions that the figures belong to, as one paragraph."""
    cpu, flags = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        cpu = facts.get("model name", cpu)
        found = facts.get("flags", "").split()
        flags = ", ".join(flag for flag in _FLAGS if flag in found) or "none of " + ", ".join(
            _FLAGS
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = []
    for package in (*_PACKAGES, *packages):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    limits = {k: os.environ[k] for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if k in os.environ}
    return (
        f"{cpu} ({flags}), {cores} cores, {torch.get_num_threads()} torch threads"
        f"{f', {limits}' if limits else ''}; Python {platform.python_version()}, "
        f"{', '.join(versions)}."
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def say(text: str) -> None:
    """Report progress: not a part of what the script prints."""
    print(text, file=sys.stderr, flush=True)


def median(seconds: Sequence[float]) -> float:
    """Return the median; not a number if nothing was measured."""
    return statistics.median(seconds) if seconds else float("nan")


# ------------------------------------------------------------------------------ files


def write_photographs(
    folder: Path, n: int, size: tuple[int, int], quality: int = 90, grain: float = 0.0
) -> list[str]:
    """Write `n` JPEG files, all different, of `size` (width, height) pixels; return their paths.

    They are crops of scikit-learn's two photographs (640 × 427), mirrored or not, in other
    brightness and colour. Crops that must be enlarged would be smoother than a camera's files and
    decode faster: `grain`, the standard deviation of noise in 8-bit levels, makes up for it.
    """
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    noise = np.random.default_rng(0).normal(0, grain, (size[1] + 64, size[0] + 64, 1))
    noise = noise.astype(np.int16)

    def write(i: int) -> str:
        chance = np.random.default_rng(i)
        photo = photos[i % 2]
        # The largest crop of this shape, or down to 0.77 of it.
        width = min(photo.width, photo.height * size[0] / size[1]) * chance.uniform(0.77, 1)
        height = width * size[1] / size[0]
        left, top = chance.uniform(0, photo.width - width), chance.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        image = photo.resize(size, Image.Resampling.BICUBIC, box)
        image = ImageOps.mirror(image) if chance.random() < 0.5 else image
        image = ImageEnhance.Brightness(image).enhance(chance.uniform(0.7, 1.2))
        image = ImageEnhance.Color(image).enhance(chance.uniform(0.7, 1.3))
        if grain:
            y, x = chance.integers(0, 64, 2)
            pixels = np.asarray(image) + noise[y : y + size[1], x : x + size[0]]
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        path = folder / f"{i:06}.jpg"
        image.save(path, quality=quality)
        return str(path)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as threads:
        return list(threads.map(write, range(n)))


def kilobytes(paths: Sequence[str]) -> str:
    """Return the mean and the range of the sizes of files."""
    sizes = [os.path.getsize(path) / 1000 for path in paths]
    return f"{statistics.mean(sizes):.0f} KB each ({min(sizes):.0f} to {max(sizes):.0f})"


# ------------------------------------------------------------------------------ solar cells


def quarters(kinds: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield four contiguous quarters of each module type in turn, as the list has them."""
    number = np.empty(len(kinds), int)
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        for quarter, (_, test) in enumerate(KFold(4).split(rows)):
            number[rows[test]] = quarter
    for quarter in range(4):
        yield np.flatnonzero(number != quarter), np.flatnonzero(number == quarter)


def without_crop(name: str, size: int) -> str:
    """Register the network with images squeezed to its input, no border cut off; return a name."""

    def build(weights: Any) -> Backbone:
        backbone, shape = get_model(name, weights), (size, size)
        preprocessing = replace(backbone.preprocessing, size=shape, resize=shape, mode="squash")
        return Backbone(backbone.network, preprocessing)

    new_name = f"{name} on whole cells of {size}"
    register_model(new_name, build)
    return new_name


# ------------------------------------------------------------------------------ networks


def weights_of(backbone: str) -> str | None:
    """Return the weights of a backbone that need no download; speed does not depend on them."""
    return "default" if backbone.startswith("efficientnet_lite") else None


def embedding_network(backbone: str) -> nn.Module:
    """Return a copy of a network that ends in its embedding: its last linear layer is gone."""
    network = copy.deepcopy(get_model(backbone, weights_of(backbone)).network).eval()
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    network.set_submodule(last, nn.Identity())
    return network


def our_runtime(runtime: str | None) -> str:
    """Return what runs the network in our estimators, by the parameter `runtime` if it is given."""
    from sktransfer import PretrainedFeatureExtractor

    if runtime in ("torch", "openvino"):
        return runtime
    if "runtime" not in PretrainedFeatureExtractor().get_params():
        return "torch"
    try:
        metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return "torch"
    return "openvino"


# ------------------------------------------------------------------------------ sides in turns


class Built(NamedTuple):
    """A side, warm."""

    run: Callable[[], Any]  # one turn
    notes: dict[str, Any]  # for the table


class Side:
    """A side of a comparison in a process of its own, where it is built, tuned and warmed up.

    In one process the thread pools, the allocator and the global settings of one side reach the
    next. A side waits there, idle, for its turns: so every side is warm, and the drift of a shared
    machine's speed hits all alike.

    Parameters
    ----------
    name : str
    build : callable
        ``build(*args) -> Built``; of a module, as another process must find it.
    *args
        Picklable.

    Attributes
    ----------
    notes : dict
        Those of `Built`.
    error : str or None
        Why this side can't be measured.
    """

    def __init__(self, name: str, build: Callable[..., Built], *args: Any) -> None:
        self.name, self.notes, self.error = name, {}, None
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, args))
        self._process.start()
        theirs.close()
        say(f"  building {name}")
        self.notes = self._receive() or {}

    def _receive(self) -> Any:
        try:
            answer, self.error = self._pipe.recv()
        except EOFError:
            self._process.join()
            answer, self.error = None, f"its process ended with {self._process.exitcode}"
        if self.error:
            say(f"  {self.name}: {self.error}")
        return answer

    def turn(self) -> float | None:
        """Return the seconds of one turn; None if this side fails."""
        if self.error is None:
            self._pipe.send("run")
            return self._receive()
        return None

    def processor_seconds(self) -> float:
        """Return the processor time that its process, and those that it has started, have taken."""
        try:
            mine = psutil.Process(self._process.pid)
            times = [p.cpu_times() for p in (mine, *mine.children(recursive=True))]
        except psutil.NoSuchProcess:
            return float("nan")
        return sum(some.user + some.system for some in times)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _serve(pipe: Any, build: Callable[..., Built], args: tuple) -> None:
    try:
        built = build(*args)
        pipe.send((built.notes, None))
        while True:
            pipe.recv()
            start = time.perf_counter()
            built.run()
            pipe.send((time.perf_counter() - start, None))
    except EOFError:  # no more turns
        pass
    except Exception as error:
        traceback.print_tb(error.__traceback__)
        reason = next(iter(str(error).splitlines()), "")  # some print a graph behind it
        pipe.send((None, f"{type(error).__name__}: {reason[:120]}"))


@contextmanager
def sides(builders: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Side]]:
    """Build sides, ``{name: (build, *args)}``, one after the other; end them all."""
    built: dict[str, Side] = {}
    try:
        for name, (build, *args) in builders.items():
            built[name] = Side(name, build, *args)
        yield built
    finally:
        for side in built.values():
            side.close()


def take_turns(built: dict[str, Side], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every turn of every side; none of those that fail."""
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for number in range(repeats):
        say(f"  round {number + 1} of {repeats}")
        for name, side in built.items():
            if (found := side.turn()) is not None:
                seconds[name].append(found)
    return seconds


def tune(axes: dict[str, Sequence[Any]], make: Callable[..., Callable[[], Any]]) -> dict[str, Any]:
    """Choose the fastest value of each setting, one setting after the other.

    Parameters
    ----------
    axes : dict
        The values of each setting; the first one is where the search starts.
    make : callable
        ``make(**settings)`` returns what is timed, after it ran once to warm up.
    """
    known: dict[tuple, float] = {}

    def seconds(settings: dict[str, Any]) -> float:
        key = tuple(settings.items())
        if key not in known:
            run = make(**settings)
            run()
            times = []
            for _ in range(2):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            known[key] = min(times)
        return known[key]

    best = {name: values[0] for name, values in axes.items()}
    for name, values in axes.items():
        if len(values) > 1:
            best[name] = min(values, key=lambda value, name=name: seconds({**best, name: value}))
    return best


# ------------------------------------------------------------------------------ memory


class Peak(threading.Thread):
    """Watches the resident size of this process.

    Attributes
    ----------
    size : int
        The largest size in bytes.
    own : int
        The largest size without pages of files, which the system takes back when it needs them.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.size = self.own = 0
        self.ended = threading.Event()

    def run(self) -> None:
        process = psutil.Process()
        while not self.ended.wait(0.02):
            found = process.memory_info()
            self.size = max(self.size, found.rss)
            self.own = max(self.own, found.rss - found.shared)

    def stop(self) -> None:
        self.ended.set()
        self.join()
