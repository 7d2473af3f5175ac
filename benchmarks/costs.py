"""What this library costs around the network: memory, single images, import, many images.

--part memory   embeddings of all files from a warm memory, against computing them; asked: 50
                times faster
--part one      one image in a warm process, from a path and from an array, against torch's
                eager forward pass on that image with the preprocessing of the weights; asked:
                at most 1.2 times its latency
--part import   seconds of `import sktransfer` behind `import torch, sklearn`, in new processes;
                asked: less than 0.3
--part number   time an image, and memory above that after one batch, against the number of
                images, with a small network, each in a new process; asked: flat within 10 %
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from _common import (
    Built,
    Peak,
    embedding_network,
    environment,
    kilobytes,
    median,
    our_runtime,
    say,
    sides,
    table,
    take_turns,
    weights_of,
    write_photographs,
)
from PIL import Image
from throughput import published_preprocessing
from torch import nn

from sktransfer import PretrainedFeatureExtractor


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of our estimator that are not left to their defaults."""
    runtime = {} if args.runtime is None else {"runtime": args.runtime}
    return {"device": "cpu", "precision": args.precision, **runtime}


def extractor(backbone: str, args: argparse.Namespace, **more: Any) -> PretrainedFeatureExtractor:
    options = {**options_of(args), **more}
    return PretrainedFeatureExtractor(backbone, weights=weights_of(backbone), **options)


# ------------------------------------------------------------------------------ memory


def part_memory(args: argparse.Namespace, folder: Path) -> None:
    n = args.images or 20_000
    files = write_photographs(folder / "files", n, (args.size, args.size))
    print(f"{n} files of {args.size} × {args.size} pixels, {kilobytes(files)}.\n", flush=True)
    rows = []
    for backbone in args.backbones or ["efficientnet_lite0"]:
        # The network is there and has run, but the memory is empty.
        extractor(backbone, args).transform(files[:64])
        memory = str(folder / f"memory-{backbone}")
        say(f"  {backbone}: cold")
        cold, first = timed(lambda b=backbone, m=memory: extractor(b, args, memory=m), files)
        warm = []
        for number in range(args.repeats):
            say(f"  {backbone}: warm, {number + 1} of {args.repeats}")
            seconds, again = timed(lambda b=backbone, m=memory: extractor(b, args, memory=m), files)
            assert np.array_equal(first, again)
            warm.append(seconds)
        rows.append(
            {
                "network": backbone,
                "cold, s": f"{cold:.2f}",
                "cold, images/s": f"{n / cold:.0f}",
                "warm, s": f"{median(warm):.3f}",
                "warm, images/s": f"{n / median(warm):.0f}",
                "cold / warm": f"{cold / median(warm):.1f}",
                "asked": "≥ 50",
            }
        )
    print(table(rows))


def timed(make: Callable[[], Any], files: list[str]) -> tuple[float, np.ndarray]:
    """Return the seconds of a new estimator's `transform`, and its rows."""
    start = time.perf_counter()
    found = make().transform(files)
    return time.perf_counter() - start, found


# ------------------------------------------------------------------------------ one image


def build_one(kind: str, backbone: str, path: str, calls: int, args: argparse.Namespace) -> Built:
    """Build a side whose turn is `calls` times the embedding of one image."""
    array = np.asarray(Image.open(path))
    make = ours_of_one if kind.startswith("ours") else bare_of_one
    embed = make(kind, backbone, path, array, args)

    def run() -> None:
        for _ in range(calls):
            embed()

    run()
    return Built(run, {})


def ours_of_one(
    kind: str, backbone: str, path: str, array: np.ndarray, args: argparse.Namespace
) -> Callable[[], Any]:
    model = extractor(backbone, args)
    return functools.partial(model.transform, [path] if kind == "ours, path" else [array])


def bare_of_one(
    kind: str, backbone: str, path: str, array: np.ndarray, args: argparse.Namespace
) -> Callable[[], Any]:
    """Eager torch with channels last, which is its faster layout on a CPU."""
    network = embedding_network(backbone).to(memory_format=torch.channels_last)
    preprocess, _ = published_preprocessing(backbone)
    ready = preprocess(Image.fromarray(array)).unsqueeze(0)  # (1, 3, height, width)
    ready = ready.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def embed() -> np.ndarray:
        x = ready
        if kind != "bare, tensor":
            image = Image.open(path) if kind == "bare, path" else Image.fromarray(array)
            x = preprocess(image.convert("RGB")).unsqueeze(0)
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16"):
            return network(x).float().numpy()

    return embed


def part_one(args: argparse.Namespace, folder: Path) -> None:
    (path,) = write_photographs(folder / "files", 1, (500, 375), grain=5)
    kinds = ("ours, path", "bare, path", "ours, array", "bare, array", "bare, tensor")
    print(
        f"A file of 500 × 375 pixels; runtime {our_runtime(args.runtime)}; medians of "
        f"{args.repeats} turns of {args.calls} calls; milliseconds. `bare, tensor` is the forward "
        "pass alone.\n"
    )
    rows = []
    for backbone in args.backbones or ["resnet50", "mobilenet_v3_large", "efficientnet_lite0"]:
        say(backbone)
        named = {kind: (build_one, kind, backbone, path, args.calls, args) for kind in kinds}
        with sides(named) as built:
            seconds = take_turns(built, args.repeats)
        each = {kind: median(times) / args.calls for kind, times in seconds.items()}
        row = {"network": backbone} | {kind: f"{1e3 * found:.2f}" for kind, found in each.items()}
        for source in ("path", "array"):
            row[f"ratio, {source}"] = f"{each[f'ours, {source}'] / each[f'bare, {source}']:.2f}"
        rows.append({**row, "asked": "≤ 1.2"})
    print(table(rows))


# ------------------------------------------------------------------------------ import


ESTIMATOR = "from sktransfer import PretrainedFeatureExtractor"
IMPORTS = (  # what is imported before, and then; only the first is asked about
    ("import torch, sklearn", "import sktransfer"),
    ("import torch, sklearn", ESTIMATOR),
    ("import torch, sklearn, torchvision", ESTIMATOR),
    ("import torch, sklearn, torchvision, timm", ESTIMATOR),
)


def part_import(args: argparse.Namespace, folder: Path) -> None:
    seconds: dict[tuple[str, str], list[list[float]]] = {pair: [] for pair in IMPORTS}
    for number in range(args.repeats + 1):  # the first one finds cold files
        say(f"  round {number} of {args.repeats}")
        for before, then in IMPORTS:
            code = (
                f"import time; a = time.perf_counter()\n{before}\nb = time.perf_counter()\n{then}\n"
                "print(b - a, time.perf_counter() - b)"
            )
            answer = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            seconds[before, then].append([float(value) for value in answer.stdout.split()])
    rows = []
    for (before, then), times in seconds.items():
        first, above = (median(column) for column in zip(*times[1:], strict=True))
        rows.append(
            {
                "before": before,
                "takes, s": f"{first:.3f}",
                "then": then,
                "above it, s": f"{above:.3f}",
                "asked": "< 0.3" if then == "import sktransfer" else "",
            }
        )
    print(
        f"Medians of {args.repeats} new processes each. The package imports its modules when a "
        f"name of theirs is first used; the other rows are what that takes.\n\n{table(rows)}"
    )


# ------------------------------------------------------------------------------ many images


class SmallNetwork(nn.Sequential):
    """Three convolutions: 64 features."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def measure_number(
    files: list[str], memory: str | None, args: argparse.Namespace
) -> tuple[float, int, int, int]:
    """Embed all files; return seconds, and bytes: the peak, without pages of files, the rows."""
    options = {**options_of(args), "image_size": args.size}
    model = PretrainedFeatureExtractor(SmallNetwork(), memory=None, **options)
    model.transform(files[:64])
    model.set_params(memory=memory)
    before = psutil.Process().memory_info()
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    rows = model.transform(files)
    seconds = time.perf_counter() - start
    peak.stop()
    own = peak.own - (before.rss - before.shared)
    return seconds, peak.size - before.rss - rows.nbytes, own - rows.nbytes, rows.nbytes


def part_number(args: argparse.Namespace, folder: Path) -> None:
    numbers = args.numbers
    files = write_photographs(folder / "files", max(numbers), (args.size, args.size))
    print(
        f"Files of {args.size} × {args.size} pixels, {kilobytes(files)}; three convolutions, "
        f"runtime {our_runtime(args.runtime)}; medians of {args.repeats} processes for each "
        "number, in turns. Memory: the peak above the process after one batch, without the rows "
        "that are returned; `own` also without pages of files, which the system can take back.\n",
        flush=True,
    )
    context = multiprocessing.get_context("spawn")
    kinds = ("none",) if args.no_memory else ("none", "folder")
    found: dict[tuple[str, int], list[tuple]] = {}
    for number in range(args.repeats):
        for kind in kinds:
            for n in numbers:
                say(f"  round {number + 1} of {args.repeats}: memory {kind}, {n} images")
                memory = str(folder / f"memory-{number}-{n}") if kind == "folder" else None
                with ProcessPoolExecutor(1, context) as process:
                    answer = process.submit(measure_number, files[:n], memory, args).result()
                found.setdefault((kind, n), []).append(answer)
    rows = []
    for (kind, n), values in found.items():
        seconds, peak, own, nbytes = (median(column) for column in zip(*values, strict=True))
        first = median([value[0] for value in found[kind, numbers[0]]]) / numbers[0]
        rows.append(
            {
                "memory": kind,
                "images": str(n),
                "ms an image": f"{1e3 * seconds / n:.3f}",
                "against the first": f"{seconds / n / first:.2f}",
                "peak, MB": f"{peak / 1e6:.1f}",
                "own, MB": f"{own / 1e6:.1f}",
                "rows, MB": f"{nbytes / 1e6:.1f}",
                "asked": "flat within 10 %",
            }
        )
    print(table(rows))


# ------------------------------------------------------------------------------ the command line

PARTS = {
    "memory": part_memory,
    "one": part_one,
    "import": part_import,
    "number": part_number,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--backbones", nargs="+", help="memory, one")
    parser.add_argument("--images", type=int, help="memory: files, by default 20,000")
    parser.add_argument("--size", type=int, default=128, help="memory, number: pixels of a side")
    parser.add_argument("--numbers", type=int, nargs="+", default=[500, 5_000, 50_000])
    parser.add_argument("--no-memory", action="store_true", help="number: only without a memory")
    parser.add_argument("--calls", type=int, default=10, help="one: images of a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--runtime", help="of our estimator; not passed by default")
    args = parser.parse_args()
    print(environment("openvino", "lmdb"), flush=True)
    for part in args.part:
        print(f"\n**{part}**. ", end="", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](args, Path(folder))


if __name__ == "__main__":
    main()
