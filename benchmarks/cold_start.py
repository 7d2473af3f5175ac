"""How long a new process takes to its first result.

--part fit      `FineTunedClassifier(unfreeze=0).fit` on 200 ELPV cells, then its first `score`,
                for each runtime; asked: 1.1 times the faster one for `runtime="auto"`
--part program  a network is loaded, cut into blocks, and run once on one image: by torch, by
                OpenVINO, and by OpenVINO with a file of the compiled program; asked: less than
                1 s with the file
--part gain     what compiling costs and gains: by how many images it has paid off

Each measurement is a new process, in turns; the imports are not counted. `cpu` is the time of all
threads, which counts where other programs take the cores as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment, median, say, table

from sktransfer import FineTunedClassifier, get_model
from sktransfer._engine.folding import fold_batch_norms
from sktransfer._engine.openvino_program import OpenVinoProgram
from sktransfer._engine.program_file import ProgramFile
from sktransfer.models._blocks import TracedNetwork

N_CELLS = 200


class Clock:
    """Seconds, of the wall and of all threads, since the last time that it was asked."""

    def __init__(self) -> None:
        self.last = time.perf_counter(), time.process_time()

    def __call__(self) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        passed = now[0] - self.last[0], now[1] - self.last[1]
        self.last = now
        return passed


# ------------------------------------------------------------------------------ in a new process


def fit(runtime: str, folder: str) -> dict[str, tuple[float, float]]:
    files = sorted(map(str, Path(folder, "cells").glob("*.png")))
    y = np.loadtxt(Path(folder, "y.txt"), dtype=str)
    clock = Clock()
    model = FineTunedClassifier(unfreeze=0, runtime=runtime, random_state=0).fit(files, y)
    found = {"fit": clock()}
    model.score(files, y)
    return found | {"score": clock()}


def program(kind: str, backbone: str, folder: str) -> dict[str, tuple[float, float]]:
    file = ProgramFile(folder, backbone) if kind == "file" else None
    clock = Clock()
    network, size = network_of(backbone)
    found = {"network": clock()}
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    if kind == "torch":
        with torch.inference_mode():
            network(x)
    else:
        n = torch.get_num_threads()
        OpenVinoProgram(lambda: network, x, "float32", n, n, file)(x)
    return found | {"program": clock()}


def network_of(backbone: str) -> tuple[Any, tuple[int, int]]:
    """Return a network up to its embedding, as it is compiled, and the size of its images."""
    torch.manual_seed(0)
    loaded = get_model(backbone, "default" if backbone.startswith("efficientnet_lite") else None)
    assert loaded.fingerprint
    size = loaded.preprocessing.size
    with torch.no_grad():
        blocks = TracedNetwork(loaded.network.eval(), size)
        return fold_batch_norms(blocks.slice(0, blocks.embedding, size)), size


def gain(backbone: str) -> dict[str, tuple[float, float]]:
    """Measure on one core, by the time of the CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(1)
    network, size = network_of(backbone)
    x = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            network(x[:1])
        network(x)
        clock = Clock()
        network(x)
        by_torch = clock()
    import openvino  # noqa: F401  # its import is counted by --part program

    clock()
    compiled = OpenVinoProgram(lambda: network, x[:1], "float32", 1, 1)
    compiling = clock()
    for image in x:
        compiled(image[None])
    by_openvino = clock()
    return {
        "gflop": (counter.get_total_flops() / 1e9,) * 2,
        "compiling": compiling,
        "torch": (by_torch[0] / 4, by_torch[1] / 4),
        "openvino": (by_openvino[0] / 4, by_openvino[1] / 4),
    }


# ------------------------------------------------------------------------------ all processes


def in_turns(jobs: dict[str, list[str]], repeats: int) -> dict[str, dict[str, tuple[float, ...]]]:
    """Run every job in a new process, in turns; return medians of the wall and of the CPU."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for number in range(repeats + 1):  # the first one finds cold files, and leaves some
        say(f"  round {number} of {repeats}")
        for name, arguments in jobs.items():
            command = [sys.executable, __file__, "--job", *arguments]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(answer.stdout.splitlines()[-1]))
    return {
        name: {
            step: tuple(median([one[step][i] for one in runs[1:]]) for i in (0, 1))
            for step in runs[0]
        }
        for name, runs in found.items()
    }


def write_cells(folder: Path) -> None:
    from sktransfer._cli.benchmark import load_elpv

    task = load_elpv()
    chosen = np.random.default_rng(0).permutation(len(task.images))[:N_CELLS]
    (folder / "cells").mkdir()
    for number, i in enumerate(chosen):
        shutil.copy(task.images[i], folder / "cells" / f"{number:03d}.png")
    targets = next(iter(task.targets.values()))
    np.savetxt(folder / "y.txt", targets[chosen], fmt="%s")


def part_fit(args: argparse.Namespace, folder: Path) -> None:
    write_cells(folder)
    jobs = {runtime: ["fit", runtime, str(folder)] for runtime in ("torch", "openvino", "auto")}
    show("runtime", in_turns(jobs, args.repeats))


def part_program(args: argparse.Namespace, folder: Path) -> None:
    for backbone in args.backbones:
        jobs = {
            f"{backbone}, {kind}": ["program", kind, backbone, str(folder)]
            for kind in ("torch", "compiled", "file")
        }
        show("network", in_turns(jobs, args.repeats))
    sizes = [f"{path.stat().st_size / 1e6:.0f} MB" for path in folder.glob("*.program")]
    print("Files:", ", ".join(sizes))


def part_gain(args: argparse.Namespace, folder: Path) -> None:
    rows = []
    for name, found in in_turns({n: ["gain", n] for n in args.backbones}, args.repeats).items():
        cpu = {step: values[1] for step, values in found.items()}
        saved = cpu["torch"] - cpu["openvino"]
        rows.append(
            {
                "network": name,
                "GFLOP": f"{cpu['gflop']:.2f}",
                "compiling, s": f"{cpu['compiling']:.2f}",
                "torch, ms": f"{1e3 * cpu['torch']:.1f}",
                "OpenVINO, ms": f"{1e3 * cpu['openvino']:.1f}",
                "images a core to pay off": f"{cpu['compiling'] / saved:.0f}",
            }
        )
    print(table(rows))


def show(what: str, found: dict[str, dict[str, tuple[float, ...]]]) -> None:
    rows = []
    for name, steps in found.items():
        row = {what: name}
        for step, (wall, cpu) in steps.items():
            row |= {f"{step}, s": f"{wall:.2f}", f"{step}, cpu s": f"{cpu:.2f}"}
        rows.append(row)
    print(table(rows), flush=True)


JOBS = {"fit": fit, "program": program, "gain": gain}
PARTS = {"fit": part_fit, "program": part_program, "gain": part_gain}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument(
        "--backbones", nargs="+", default=["efficientnet_lite0", "resnet50", "vit_b_16"]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(JOBS[args.job[0]](*args.job[1:])))
        return
    print(environment("openvino"), flush=True)
    for part in args.part:
        print(f"\n**{part}**. Medians of {args.repeats} new processes.\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](args, Path(folder))


if __name__ == "__main__":
    main()
