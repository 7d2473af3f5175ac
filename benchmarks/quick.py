"""Run a quick form of every benchmark: does each still run?

Each script runs in a process and an empty folder of its own, with its smallest sizes, so what it
prints is no result: it has one thread, unless OMP_NUM_THREADS says otherwise. Its name, its seconds
and its exit code are printed, and of one that fails the end of what it said. What needs a GPU, or a
library that is not installed, is named and left out. The exit code is 1 if a script failed.

    python benchmarks/quick.py                        all of them
    python benchmarks/quick.py elpv.py recipe.py      these alone
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class Quick(NamedTuple):
    """The arguments of a quick form, and the modules that it needs beside the extra `test`."""

    arguments: str = ""
    needs: Sequence[str] = ()  # "cuda": a GPU


QUICK = {
    "all_layers.py": Quick(
        "--part time --runtimes torch --images 8 --repeats 1"
        " --part groups --labels 50 --splits 2 --every 16"
    ),
    "anomaly.py": Quick("--part defects --tiles 8"),
    "audit.py": Quick("--seeds 1 --draws 1 --every 40"),
    "batch_size.py": Quick("--networks mobilenet_v3_large --sizes 1 4"),
    "busy_machine.py": Quick("--rows 60x64x3 --images 4 --repeats 1"),
    "calibration.py": Quick("--part head --task digits --labels 50 --splits 1"),
    "cold_start.py": Quick("--part gain --backbones efficientnet_lite0 --repeats 1"),
    "contrastive.py": Quick(
        "--start imagenet --image-size 32 --unfreeze 1 --epochs 1 --every 16 --draws 2 --labels 25"
    ),
    "costs.py": Quick(
        "--images 32 --size 64 --backbones efficientnet_lite0 --numbers 16 32 --calls 2 --repeats 1"
    ),
    "depth_auto.py": Quick("--sizes 50 --splits 1 --epochs 1 --image-size 64 --every 8"),
    "depthwise.py": Quick("--image-sizes 32 --depths 2 --repeats 1"),
    "detector.py": Quick("--parts new --train 8 --test 4 --epochs 1"),
    "elpv.py": Quick("efficientnet_lite0 --whole 0 --every 16 --splits 1"),
    "elpv_fine_tuning.py": Quick(
        "--unfreeze 1 --epochs 1 --image-size 64 --every 16 --splits 1 --conventions 0.5"
    ),
    "every_image_once.py": Quick("--images 20"),
    "fine_tuning_defaults.py": Quick(
        "--tasks digits --labels 50 --depths 1 --values 5e-4 --splits 1"
    ),
    "fine_tuning_memory.py": Quick("--images 32 --size 64"),
    "frozen_is_frozen.py": Quick("--pattern resnet18"),
    "fuzz.py": Quick("--seconds 5"),
    "gpu.py": Quick("--networks resnet50 --images 256 --repeats 1", needs=["cuda"]),
    "gpu_suite.sh": Quick(needs=["cuda"]),
    "grid_search.py": Quick(
        "--images 48 --image-size 64 --folds 2 --epochs 1 --depths 0 1 --steps 1 --repeats 1"
    ),
    "half_precision.py": Quick("--images 82 --image-size 64 --epochs 1 --depths 0 1"),
    "int8.py": Quick("speed efficientnet_lite0 --images 8 --repeats 1"),
    "interrupts.py": Quick("--seconds 5"),
    "large_images.py": Quick("-n 1 --kinds jpg"),
    "learning_curves.py": Quick(
        "--sizes 25 --splits 1 --epochs 1 --image-size 64 --unfreeze 1 --scratch-epochs 1"
        " --scratch-steps 1 --every 8",
        needs=["codecarbon"],
    ),
    "masked_language.py": Quick("--sentences 20 --epochs 1"),
    "memory_kill.py": Quick("--kills 2"),
    "memory_peak.py": Quick("-n 16"),
    "memory_reads.py": Quick("--rows 200 --width 64 --rounds 1", needs=["diskcache"]),
    "newcomer.sh": Quick("own_folder python"),
    "pieces.py": Quick("--unfreeze 1 --pieces 8 32 --repeats 1"),
    "precision.py": Quick("--images 82 --image-size 64 --splits 1 --speed-images 4 --repeats 1"),
    "rank_backbones.py": Quick(
        "--backbones efficientnet_lite0 --image-size 64 --every 16 --cv 2 --splits 1 --unfreeze 1"
        " --epochs 1"
    ),
    "recipe.py": Quick("--task photographs --splits 1 --labels 50"),
    "reference_features.py": Quick("mobilenet_v3_large"),
    "runtime_soak.py": Quick("--seconds 5"),
    "runtimes.py": Quick(
        "--networks efficientnet_lite0 --runtimes torch openvino --batch 1 --images 4 --tune 2"
        " --repeats 1"
    ),
    "scale_out.py": Quick("--core resnet50/float32=24"),
    "scaled_decoding.py": Quick("--images 4 --multiples 2 --repeats 1"),
    "throughput.py": Quick(
        "--cases lite0 --sides ours loader-plain decoding --images 8 --tune 4 --repeats 1 --batch 1"
    ),
    "training_step.py": Quick(
        "--unfreeze 0 1 --precisions float32 --images 32 --batch-size 8 --repeats 1"
    ),
    "transfer_gain.py": Quick(
        "--tasks digits --baselines pixels majority --every 16 --epochs 1 --cv 2"
    ),
    "two_checkouts.py": Quick("--jobs one --repeats 1"),
    "words.py": Quick("--tasks digits --every 8 --draws 1 --shots 2 --qualities 0.5"),
}


def missing(needs: Iterable[str]) -> list[str]:
    """Return what is needed and not here."""
    return [need for need in needs if not _is_here(need)]


def _is_here(need: str) -> bool:
    if need == "cuda":
        import torch

        return torch.cuda.is_available()
    return importlib.util.find_spec(need) is not None


def run(script: Path, arguments: Sequence[str], seconds: float) -> tuple[int, str]:
    """Run a script in an empty folder; return exit code (124: it was ended) and output."""
    environ = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHON": sys.executable}
    environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
    )
    program = "bash" if script.suffix == ".sh" else sys.executable
    with (
        tempfile.TemporaryDirectory() as folder,
        open(Path(folder, "output"), "w+", errors="replace") as output,
    ):
        process = subprocess.Popen(
            [program, str(script), *arguments],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children end with it
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            _end(process)
        output.seek(0)
        return code, output.read()


def _end(process: subprocess.Popen) -> None:
    """End a process and its children; nothing happens to those that have ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_each(scripts: dict[Path, Quick], seconds: float) -> list[str]:
    """Run scripts, print what became of each, and return the names of those that failed."""
    failed = []
    for script, quick in scripts.items():
        if lacks := missing(quick.needs):
            print(f"{script.name:26}{'':>8}  left out: no {', '.join(lacks)}", flush=True)
            continue
        start = time.perf_counter()
        code, output = run(script, quick.arguments.split(), seconds)
        took = time.perf_counter() - start
        print(f"{script.name:26}{took:6.1f} s  exit code {code}", flush=True)
        if code:
            failed.append(script.name)
            print("".join(f"    {line}\n" for line in output.splitlines()[-15:]), flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="by default, all")
    parser.add_argument("--seconds", type=float, default=600, help="until a script is ended")
    options = parser.parse_args()
    if unknown := [name for name in options.scripts if name not in QUICK]:
        parser.error(f"no script {', '.join(unknown)}; there are {', '.join(QUICK)}")
    start = time.perf_counter()
    scripts = {HERE / name: QUICK[name] for name in options.scripts or QUICK}
    failed = run_each(scripts, options.seconds)
    print(f"{len(scripts)} scripts in {(time.perf_counter() - start) / 60:.1f} minutes")
    if failed:
        print(f"failed: {', '.join(failed)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
