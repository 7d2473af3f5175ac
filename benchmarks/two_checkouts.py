"""This checkout against another one, such as that of before a change: the same jobs, in turns.

Each side lives in a process of its own that imports its checkout's package, is warm before anything
is timed, and takes its turn in every round, the first in every other one: so the drift of a shared
machine hits both. Only what both have in public is used. Medians of the turns, and of the ratios of
those that follow each other; processor time is that of all turns.

    git worktree add --detach ../before COMMIT
    python benchmarks/two_checkouts.py ../before

    files, resnet50, torch  embeddings of JPEG files, no memory: EfficientNet-Lite0 and ResNet50 by
                            OpenVINO, EfficientNet-Lite0 by torch
    layers, int8            EfficientNet-Lite0 by OpenVINO: mean and maximum of all layers; 8 bits
    one                     ten images one by one, from paths
    cold, warm              embeddings of small files into an empty memory, and out of a full one
    head                    a fit of the head on features that the memory has
    blocks                  a fit with two blocks unfrozen, from activations that the memory has
    all                     an epoch of all blocks, from images
    grid                    a grid search over three freezing depths, from an empty memory
    import                  a new process that imports the feature extractor
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from _common import environment, median, say, table, weights_of, write_photographs
from sklearn.model_selection import GridSearchCV

from sktransfer import FineTunedClassifier, PretrainedFeatureExtractor

HERE = Path(__file__).resolve().parent
LARGE, SMALL = (500, 375), (128, 128)
IMPORT = "import torch, sklearn, torchvision\nfrom sktransfer import PretrainedFeatureExtractor"


class Job(NamedTuple):
    """What is timed: ``build(files, folder)`` returns it, warm; and the files that it takes."""

    build: Callable[[list[str], str], Callable[[], Any]]
    n_files: int
    size: tuple[int, int] = LARGE


# ------------------------------------------------------------------------------ jobs


def extractor(backbone: str, **options: Any) -> PretrainedFeatureExtractor:
    options = {"runtime": "openvino", **options}
    return PretrainedFeatureExtractor(backbone, weights=weights_of(backbone), **options)


def embed(backbone: str, files: list[str], folder: str, **options: Any) -> Callable[[], Any]:
    return partial(extractor(backbone, **options).transform, files)


def embed_one_by_one(files: list[str], folder: str) -> Callable[[], Any]:
    model = extractor("efficientnet_lite0")
    return lambda: [model.transform([file]) for file in files]


def fill_memory(files: list[str], folder: str) -> Callable[[], Any]:
    def run() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as memory:
            extractor("efficientnet_lite0", memory=memory).transform(files)

    return run


def read_memory(files: list[str], folder: str) -> Callable[[], Any]:
    model = extractor("efficientnet_lite0", memory=folder)
    return lambda: [model.transform(files) for _ in range(5)]


def fine_tune(unfreeze: int | str, epochs: int, files: list[str], folder: str) -> Callable[[], Any]:
    memory = None if unfreeze == "all" else folder
    model = FineTunedClassifier(
        "efficientnet_lite0", unfreeze=unfreeze, max_epochs=epochs, memory=memory, random_state=0
    )
    return lambda: model.fit(files, labels(files))


def search(files: list[str], folder: str) -> Callable[[], Any]:
    def run() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as memory:
            model = FineTunedClassifier(
                "efficientnet_lite0", max_epochs=2, memory=memory, random_state=0
            )
            grid = GridSearchCV(model, {"unfreeze": [0, 1, 2]}, cv=2, refit=False)
            grid.fit(files, labels(files))

    return run


def import_anew(files: list[str], folder: str) -> Callable[[], Any]:
    return partial(subprocess.run, [sys.executable, "-c", IMPORT], check=True)


def labels(files: list[str]) -> list[str]:
    return ["even" if number % 2 == 0 else "odd" for number in range(len(files))]


JOBS = {
    "files": Job(partial(embed, "efficientnet_lite0"), 96),
    "resnet50": Job(partial(embed, "resnet50"), 24),
    "torch": Job(partial(embed, "efficientnet_lite0", runtime="torch"), 24),
    "layers": Job(partial(embed, "efficientnet_lite0", layer="all", pooling=("avg", "max")), 96),
    "int8": Job(partial(embed, "efficientnet_lite0", precision="int8"), 96),
    "one": Job(embed_one_by_one, 10),
    "cold": Job(fill_memory, 200, SMALL),
    "warm": Job(read_memory, 500, SMALL),
    "head": Job(partial(fine_tune, 0, 1), 200, SMALL),
    "blocks": Job(partial(fine_tune, 2, 4), 64, SMALL),
    "all": Job(partial(fine_tune, "all", 1), 32, SMALL),
    "grid": Job(search, 60, SMALL),
    "import": Job(import_anew, 1, SMALL),
}


# ------------------------------------------------------------------------------ sides


class Side:
    """A process that imports the package of a checkout and runs a job when it is told to."""

    def __init__(self, checkout: Path, job: str, files: str) -> None:
        paths = [str(checkout), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(checkout), "--serve", job, files],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        self._read()  # once it is warm

    def _read(self) -> float:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"a side ended with {self._process.wait()}")
        return float(line)

    def turn(self) -> float:
        """Return the seconds of one turn."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def processor_seconds(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system + times.children_user + times.children_system

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(checkout: Path, name: str, files: str) -> None:
    """Run a job for each line that comes in; print its seconds, zero once it is warm."""
    import sktransfer

    found = Path(sktransfer.__file__).resolve().parent.parent
    if found != checkout.resolve():
        raise SystemExit(f"sktransfer is imported from {found}, not from {checkout}")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        run = JOBS[name].build(sorted(map(str, Path(files).iterdir())), folder)
        run()
        print(0.0, flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            run()
            print(time.perf_counter() - start, flush=True)


def compare(checkouts: dict[str, Path], name: str, repeats: int) -> dict[str, str]:
    """Return a row of the table: seconds of both sides, and their ratios."""
    job = JOBS[name]
    with tempfile.TemporaryDirectory() as files:
        write_photographs(Path(files), job.n_files, job.size, grain=5)
        built = {side: Side(checkout, name, files) for side, checkout in checkouts.items()}
        before = {side: one.processor_seconds() for side, one in built.items()}
        seconds: dict[str, list[float]] = {side: [] for side in built}
        for number in range(repeats):
            for side in list(built) if number % 2 else reversed(built):
                seconds[side].append(built[side].turn())
        processor = {side: one.processor_seconds() - before[side] for side, one in built.items()}
        for one in built.values():
            one.close()
    pairs = zip(seconds["this"], seconds["other"], strict=True)
    row = {"job": name, "files": str(job.n_files)}
    row |= {f"{side}, s": f"{median(times):.3f}" for side, times in seconds.items()}
    row["this / other"] = f"{median(seconds['this']) / median(seconds['other']):.3f}"
    row["median of pairs"] = f"{median([mine / theirs for mine, theirs in pairs]):.3f}"
    row["by processor time"] = f"{processor['this'] / processor['other']:.3f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "other",
        type=Path,
        nargs="?",
        default=HERE.parent,
        help="folder of the other checkout; by default this one, which shows the machine's noise",
    )
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--repeats", type=int, default=9, help="turns of each side")
    parser.add_argument("--serve", nargs=2, metavar=("JOB", "FILES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.other, *args.serve)
        return
    print(environment("openvino", "skorch"), "\n", flush=True)
    rows = []
    for name in args.jobs:
        say(name)
        rows.append(compare({"other": args.other, "this": HERE.parent}, name, args.repeats))
        print(table(rows[-1:]), flush=True)
    print(f"\nMedians of {args.repeats} turns of each side.\n\n{table(rows)}")


if __name__ == "__main__":
    main()
