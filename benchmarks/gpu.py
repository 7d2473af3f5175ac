"""What a CUDA device is made of use: embeddings a second and fine-tuning, in bfloat16.

    --part features   images a second from uint8 arrays in memory, against the bare forward pass on
                      tensors that lie on the device (asked: at least 0.8 of it), and from JPEG
                      files. The bare pass is eager torch with channels last; batch size, and
                      autocast or weights in bfloat16, are chosen by trial. `decoding` is the
                      processor's share alone: files to arrays of the network's size
    --part training   seconds an epoch, and the peak of the device's memory, of fine-tuning the last
                      two blocks and all; from the second epoch on

Sides take turns in one process, medians. Networks have random weights: speed does not depend on
them. Without a CUDA device, this says so and exits with 2.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import (
    embedding_network,
    environment,
    kilobytes,
    median,
    say,
    table,
    tune,
    weights_of,
    write_photographs,
)
from PIL import Image
from throughput import decode_and_resize
from training_step import weights_file

from sktransfer import FineTunedClassifier, PretrainedFeatureExtractor, get_model

NETWORKS = ("resnet50", "vit_b_16", "convnext_base")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------ features


def bare_forward(
    backbone: str, n: int, args: argparse.Namespace
) -> tuple[Callable[[], None], dict[str, Any]]:
    """Return the forward pass of `n` images that lie on the device, and its settings."""
    device = torch.device(args.device)
    network = embedding_network(backbone).to(device, memory_format=torch.channels_last)
    size = get_model(backbone, weights_of(backbone)).preprocessing.size

    def make(batch: int, cast: str) -> Callable[[], None]:
        dtype = torch.bfloat16 if cast == "weights" else torch.float32
        network.to(dtype)
        x = torch.randn(batch, 3, *size, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)

        @torch.inference_mode()
        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=cast == "autocast"):
                for _ in range(-(-n // batch)):
                    network(x)
            synchronize(device)

        return run

    axes = {"batch": [b for b in args.batch if b <= n] or [n], "cast": ["autocast", "weights"]}
    # Batches that do not divide n run a few images more, which is not to decide.
    axes["batch"] = [b for b in axes["batch"] if n % b == 0] or axes["batch"][:1]
    settings = tune(axes, make)
    settings["images"] = -(-n // settings["batch"]) * settings["batch"]
    return make(settings["batch"], settings["cast"]), settings


def extractor(backbone: str, args: argparse.Namespace) -> PretrainedFeatureExtractor:
    options = {"batch_size": args.batch_size, "runtime": args.runtime}
    options = {name: value for name, value in options.items() if value is not None}
    return PretrainedFeatureExtractor(
        backbone,
        weights=weights_of(backbone),
        device=args.device,
        precision="bfloat16",
        memory=None,
        **options,
    )


def features(
    backbone: str, files: list[str], arrays: np.ndarray, args: argparse.Namespace
) -> dict[str, str]:
    """Return a row of the table."""
    say(f"features: {backbone}")
    model, n = extractor(backbone, args), len(files)
    bare, settings = bare_forward(backbone, n, args)
    preprocessing = get_model(backbone, weights_of(backbone)).preprocessing
    decode = functools.partial(
        decode_and_resize, preprocessing=preprocessing, decoder="torchvision"
    )
    n_cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(n_cores) as threads:
        runs: dict[str, Callable[[], Any]] = {
            "bare": bare,
            "arrays": lambda: model.transform(arrays),
            "files": lambda: model.transform(files),
            "decoding": lambda: sum(1 for _ in threads.map(decode, files)),
        }
        seconds = in_turns(runs, args.repeats)
    images = dict.fromkeys(runs, n) | {"bare": settings["images"]}
    speed = {name: images[name] / median(times) for name, times in seconds.items()}
    slower = "decoding" if speed["decoding"] < speed["bare"] else "the network"
    return {
        "network": backbone,
        "bare forward, images/s": f"{speed['bare']:.0f}",
        "its settings": f"batch {settings['batch']}, {settings['cast']}",
        "from arrays": f"{speed['arrays']:.0f}",
        "arrays / bare": f"{speed['arrays'] / speed['bare']:.2f}",
        "asked": "≥ 0.8",
        "from files": f"{speed['files']:.0f}",
        f"decoding alone, {n_cores} cores": f"{speed['decoding']:.0f}",
        "bottleneck of files": slower,
    }


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each turn of each side; a first one warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def part_features(args: argparse.Namespace, folder: Path) -> None:
    files = write_photographs(folder / "files", args.images, (500, 375), grain=5)
    size = (args.size, args.size)
    arrays = np.stack([np.asarray(Image.open(file).resize(size)) for file in files])
    print(
        f"\n{len(files)} arrays of {args.size} × {args.size} pixels, and files of 500 × 375, "
        f"{kilobytes(files)}; medians of {args.repeats} turns.\n",
        flush=True,
    )
    print_table(features(backbone, files, arrays, args) for backbone in args.networks)


# ------------------------------------------------------------------------------ training


def fine_tune(
    backbone: str, depth: Any, arrays: np.ndarray, weights: str, args: argparse.Namespace
) -> dict[str, str]:
    """Return a row of the table."""
    say(f"training: {backbone}, unfreeze={depth}")
    warnings.simplefilter("ignore")
    options = {} if args.runtime is None else {"runtime": args.runtime}
    model = FineTunedClassifier(
        backbone,
        weights=weights,
        unfreeze=depth,
        head_epochs=0,
        max_epochs=args.repeats + 1,
        batch_size=args.training_batch_size,
        lr=1e-6,  # nothing is to be learnt from these labels
        device=args.device,
        precision="bfloat16",
        random_state=0,
        **options,
    )
    is_cuda = torch.device(args.device).type == "cuda"
    start = time.perf_counter()
    model.fit(arrays, np.arange(len(arrays)) % 2)
    whole = time.perf_counter() - start
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if is_cuda else ""
    each = median([epoch["dur"] for epoch in model.history_][1:])
    return {
        "network": backbone,
        "unfreeze": str(depth),
        "s an epoch": f"{each:.2f}",
        "images/s": f"{len(arrays) / each:.0f}",
        "whole fit, s": f"{whole:.1f}",
        "peak memory, GB": peak,
    }


def part_training(args: argparse.Namespace, folder: Path) -> None:
    chance = np.random.default_rng(0)
    arrays = chance.integers(0, 256, (args.images, args.size, args.size, 3), np.uint8)
    print(
        f"\n{args.images} arrays of {args.size} × {args.size} pixels, batches of "
        f"{args.training_batch_size}, {args.repeats + 1} epochs.\n",
        flush=True,
    )

    def rows() -> Iterator[dict[str, str]]:
        for backbone in args.networks:
            weights = weights_file(backbone, folder)
            for depth in (2, "all"):  # in a process each: nothing else lies on the device
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    found = process.submit(fine_tune, backbone, depth, arrays, weights, args)
                    yield found.result()

    print_table(rows())


def print_table(rows: Iterable[dict[str, str]]) -> None:
    """Print a table; report each row as it comes, as a device is often lent by the minute."""
    found = []
    for row in rows:
        say("  " + ", ".join(f"{name}: {value}" for name, value in row.items() if value))
        found.append(row)
    print(table(found), flush=True)


# ------------------------------------------------------------------------------ the command line

PARTS: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    "features": part_features,
    "training": part_training,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--device", default="cuda", help="cpu, to check that this script runs")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--size", type=int, default=256, help="pixels of a side of the arrays")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 64, 128, 512])
    parser.add_argument("--batch-size", type=int, help="of our estimator; not passed by default")
    parser.add_argument("--training-batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runtime", help="of our estimator; not passed by default")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was measured.", file=sys.stderr)
        sys.exit(2)
    warnings.simplefilter("ignore")
    if args.device.startswith("cuda"):
        print(
            f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN "
            f"{torch.backends.cudnn.version()}; host: ",
            end="",
        )
    print(environment("skorch"), flush=True)
    with tempfile.TemporaryDirectory() as name:
        for part in args.part:
            PARTS[part](args, Path(name))


if __name__ == "__main__":
    main()
