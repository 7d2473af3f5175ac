"""8 bits: images a second, the loss in the features, and the loss in accuracy.

    python benchmarks/int8.py speed       # images that are ready, in every precision; cosines
    python benchmarks/int8.py accuracy    # ELPV and digits, in float32 and in 8 bits
    python benchmarks/int8.py files       # from JPEG files, against float32, peers and limits
    python benchmarks/int8.py start       # seconds to the first row in a new process
    python benchmarks/int8.py exported    # files of OpenVINO, against `transform`

`speed`: what a network does with images of its size in memory, by our extractor; the precisions
take turns, in processes of their own; medians. The cosine is the mean of those of embeddings to
float32 ones on the calibration crops, resized again. Networks without embedded weights have random
ones, their batch-norms set by crops: their speed is right, and their cosine says only that the
conversion is.
`accuracy`: ELPV, p > 0.5, the five 75/25 splits of `elpv.py`, and scikit-learn's digits, five-fold;
an SVM (C=10) and a logistic regression (C=0.01) on standardised features, trained and tested in
one precision. `files`: the sides of `throughput.py`; the bare forward pass in 8 bits is NNCF's
network without any layer but the last, one image at a time in a stream on each core; "decoding and
bare" is the simplest program that does both: each thread decodes an image and runs it. `exported`:
photographs of 500 × 375 pixels that are decoded already; files of `export_openvino` scale them too,
one at a time in a stream on each core, as `transform` does. "off" is the largest difference of rows
to those of `transform` in that precision, as a share of the largest value.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import (
    Built,
    Side,
    environment,
    median,
    say,
    sides,
    table,
    take_turns,
    weights_of,
    write_photographs,
)
from runtimes import build_forward
from sklearn.datasets import load_digits, load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from throughput import (
    Case,
    Job,
    build_decoding,
    build_embetter,
    build_img2vec,
    build_loader,
    decode_and_resize,
)
from torch import nn

from sktransfer import PretrainedFeatureExtractor, export_openvino, get_model
from sktransfer._cli import benchmark as _benchmark
from sktransfer._engine.quantising import calibration_images
from sktransfer._engine.runner import get_runner
from sktransfer._threads import one_core_threads
from sktransfer.models import Backbone

PRECISIONS = ("float32", "bfloat16", "int8")
LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
NETWORKS = (*LITE, "resnet50", "mobilenet_v3_large", "vit_b_16", "convnext_tiny")
FILES = ("resnet50", "efficientnet_lite0", "mobilenet_v3_large")
CLASSIFIERS = {
    "SVM": SVC(C=10),
    "logistic regression": LogisticRegression(C=0.01, max_iter=1000),
}
PEERS = {
    "loader": (build_loader, True),
    "loader-plain": (build_loader, False),
    "img2vec": (build_img2vec,),
    "embetter": (build_embetter,),
}
_START = """
import time, sys, numpy as np
from sktransfer import PretrainedFeatureExtractor, export_openvino, get_model
name, weights, precision, memory = sys.argv[1:]
options = {"weights": weights if weights == "default" else None, "precision": precision}
get_model(name, options["weights"])
X = np.random.default_rng().integers(256, size=(2, 300, 300, 3), dtype=np.uint8)
start, processor = time.perf_counter(), time.process_time()
PretrainedFeatureExtractor(name, memory=memory, **options).transform(X)
print(time.process_time() - processor, time.perf_counter() - start)
"""


def extractor(backbone: str, precision: str, **options: Any) -> PretrainedFeatureExtractor:
    weights = weights_of(backbone)
    return PretrainedFeatureExtractor(backbone, weights=weights, precision=precision, **options)


def prepared(
    backbone: str, precision: str, kept: str | None, build: Callable[..., Built], *args: Any
) -> Built:
    """Build a side of this network, whose 8 bits are kept in a folder, if there is one."""
    loaded = get_model(backbone, weights_of(backbone))
    if weights_of(backbone) is None:
        set_statistics(loaded)
    if kept is not None and precision == "int8":
        runner = get_runner(loaded, "cpu", "int8", "openvino")
        runner.in_8_bits(loaded.preprocessing, f"{kept}/{backbone}")
    return build(*args)


def set_statistics(loaded: Backbone) -> None:
    """Set batch-norms by crops: with random weights, activations become zero behind many layers."""
    norms = [m for m in loaded.network.modules() if isinstance(m, nn.BatchNorm2d)]
    crops = torch.from_numpy(calibration_images(loaded.preprocessing, 8)).permute(0, 3, 1, 2)
    for norm in norms:
        norm.train().momentum = None  # the mean over all batches, of which there is one
        norm.reset_running_stats()
    with torch.no_grad():
        loaded.network(loaded.preprocessing.normalize(crops))
    for norm in norms:
        norm.eval()


# ------------------------------------------------------------------------------ speed


def build_ready(backbone: str, precision: str, n: int) -> Built:
    """Build a side whose turn is the embedding of images that have the size of the network."""
    preprocessing = get_model(backbone, weights_of(backbone)).preprocessing
    crops = calibration_images(preprocessing)
    model = extractor(backbone, precision, runtime="openvino")
    rows = model.transform(crops)
    images = crops[np.arange(n) % len(crops)]
    return Built(lambda: model.transform(images), {"rows": rows})


def speed(args: argparse.Namespace) -> None:
    found = []
    for backbone in args.networks or NETWORKS:
        say(backbone)
        named = {
            p: (prepared, backbone, p, args.kept, build_ready, backbone, p, args.images)
            for p in args.precisions
        }
        with sides(named) as built:
            seconds, processor = measure(built, args.repeats)
            rows = {p: side.notes.get("rows") for p, side in built.items()}
            errors = {p: side.error for p, side in built.items()}
        row = {"network": backbone, "weights": weights_of(backbone) or "random"}
        for p in args.precisions:
            row[p] = f"{args.images / median(seconds[p]):.1f}"
            row[f"{p}, ms of a core"] = f"{1000 * processor[p] / args.images:.1f}"
        row["int8 / float32"] = f"{median(seconds['float32']) / median(seconds['int8']):.2f}"
        row["by processor time"] = f"{processor['float32'] / processor['int8']:.2f}"
        for p in args.precisions[1:]:
            both = rows[p], rows["float32"]
            row[f"cosine {p}"] = errors[p] or f"{cosine(*both):.4f}"
        found.append(row)
        print(table(found[-1:]), flush=True)
    print(table(found))


def measure(
    built: dict[str, Side], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of turns, and the processor time of one, which a busy machine leaves."""
    before = {name: side.processor_seconds() for name, side in built.items()}
    seconds = take_turns(built, repeats)
    after = {name: side.processor_seconds() for name, side in built.items()}
    return seconds, {name: (after[name] - before[name]) / repeats for name in built}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())


# ------------------------------------------------------------------------------ accuracy


def tasks(name: str) -> tuple[Any, np.ndarray, list[Any]]:
    """Return the images, labels and splits of a task."""
    if name == "digits":
        X, y = load_digits(return_X_y=True)
        images = np.repeat((X.reshape(-1, 8, 8) * 15.9).astype(np.uint8), 16, 1).repeat(16, 2)
        return images, y, list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))
    task = _benchmark.load_elpv()
    y = task.targets["defective: p > 0.5"]
    strata = np.char.add(np.char.add(y, "/"), task.strata)
    splitter = StratifiedShuffleSplit(5, test_size=0.25, random_state=0)
    return task.images, y, list(splitter.split(strata, strata))


def accuracy(args: argparse.Namespace) -> None:
    found = []
    for name in args.tasks:
        images, y, splits = tasks(name)
        for backbone in args.networks or LITE:
            exact = None
            for precision in args.precisions:
                say(f"{name}, {backbone}, {precision}")
                X = extractor(backbone, precision, memory=args.memory).transform(images)
                row = {"task": name, "network": backbone, "precision": precision}
                for label, model in CLASSIFIERS.items():
                    pipeline = make_pipeline(StandardScaler(), model)
                    scores = cross_val_score(pipeline, X, y, cv=splits, n_jobs=args.n_jobs)
                    row[label] = f"{scores.mean():.4f} ± {scores.std():.3f}"
                exact = X if exact is None else exact
                row["cosine"] = f"{cosine(X, exact):.4f}"
                found.append(row)
                print(table(found[-1:]), flush=True)
    print(table(found))


# ------------------------------------------------------------------------------ files


def build_files(backbone: str, precision: str, files: list[str]) -> Built:
    model = extractor(backbone, precision, runtime="openvino")
    model.transform(files)
    return Built(lambda: model.transform(files), {"images": len(files)})


def build_bare(backbone: str, n: int, files: list[str] | None = None) -> Built:
    """Build a side whose turn is OpenVINO's forward pass in 8 bits, behind decoding if at all."""
    import openvino
    from openvino import opset13

    loaded = get_model(backbone, weights_of(backbone))
    runner = get_runner(loaded, "cpu", "int8", "openvino")
    made = runner.in_8_bits(loaded.preprocessing).made
    core = openvino.Core()
    model = core.read_model(made.graph, made.weights)
    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    name, index = made.places[runner.embedding]
    results = [opset13.result(nodes[name].output(index))]
    model = openvino.Model(results, model.get_parameters(), "bare")
    n_cores = torch.get_num_threads()
    settings = {"NUM_STREAMS": n_cores, "INFERENCE_NUM_THREADS": n_cores}
    settings |= {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
    compiled = core.compile_model(model, "CPU", settings)
    crops = calibration_images(loaded.preprocessing)
    requests = [compiled.create_infer_request() for _ in range(n_cores)]
    threads = one_core_threads(n_cores)

    def image(k: int) -> np.ndarray:
        if files is None:
            return crops[k % len(crops)]
        decoded = decode_and_resize(files[k], loaded.preprocessing, "torchvision")
        return np.ascontiguousarray(decoded.transpose(1, 2, 0))

    def part(i: int) -> None:
        for k in range(i, n, n_cores):
            requests[i].infer({0: image(k)[None]})

    def run() -> None:
        list(threads.map(part, range(n_cores)))

    run()
    return Built(run, {"images": n})


def files(args: argparse.Namespace) -> None:
    for backbone in args.networks or FILES:
        say(backbone)
        with tempfile.TemporaryDirectory() as name:
            paths = write_photographs(Path(name, "files"), args.images, (500, 375), grain=5)
            job = Job(Case(backbone, "float32", (500, 375), 8), paths, 32, name, {})
            named: dict[str, tuple[Any, ...]] = {
                p: (build_files, backbone, p, paths) for p in PRECISIONS
            }
            for p in ("float32", "bfloat16"):
                bare = backbone, "openvino", p, args.images, 32, (1,), False
                named[f"bare {p}"] = (build_forward, *bare)
            named["bare int8"] = build_bare, backbone, args.images
            named["decoding and bare int8"] = build_bare, backbone, args.images, paths
            named = {
                n: (prepared, backbone, n.split()[-1], args.kept, *build)
                for n, build in named.items()
            }
            named["decoding"] = build_decoding, job
            for peer in args.peers:
                build, *more = PEERS[peer]
                named[peer] = (build, job, *more)
            named = {n: named[n] for n in args.sides or named}
            with sides(named) as built:
                seconds, processor = measure(built, args.repeats)
                n_of = {n: side.notes.get("images", args.images) for n, side in built.items()}
                errors = {n: side.error for n, side in built.items()}
        speeds = {n: n_of[n] / median(times) for n, times in seconds.items()}
        costs = {n: processor[n] / n_of[n] for n in seconds}
        print(f"\n{backbone}, {args.images} files of 500 × 375 pixels")
        print(table([_row(n, speeds, costs, errors[n]) for n in speeds]), flush=True)


def _row(
    name: str, speeds: dict[str, float], costs: dict[str, float], error: str | None
) -> dict[str, str]:
    row = {"side": name, "images/s": error or f"{speeds[name]:.1f}"}
    row["int8 / this"] = f"{speeds['int8'] / speeds[name]:.2f}"
    row["ms of a core"] = f"{1000 * costs[name]:.1f}"
    row["by processor time"] = f"{costs[name] / costs['int8']:.2f}"
    if name in PRECISIONS and {"decoding", f"bare {name}"} <= speeds.keys():
        one_by_one = 1 / (1 / speeds["decoding"] + 1 / speeds[f"bare {name}"])
        row["of one by one"] = f"{speeds[name] / one_by_one:.2f}"
        cost = costs["decoding"] + costs[f"bare {name}"]
        row["the same by processor time"] = f"{cost / costs[name]:.2f}"
    return row


# ------------------------------------------------------------------------------ exported


def photographs(n: int) -> list[np.ndarray]:
    """Return arrays (375, 500, 3): parts of scikit-learn's photographs."""
    photos = load_sample_images().images
    shifts = ((i, i % 2 * 7 + 3 * (i % 40)) for i in range(n))
    return [
        np.ascontiguousarray(photos[i % 2][i % 50 : i % 50 + 375, left : left + 500])
        for i, left in shifts
    ]


def build_transform(backbone: str, precision: str, n: int) -> Built:
    images = photographs(n)
    model = extractor(backbone, precision, runtime="openvino")
    return Built(lambda: model.transform(images), {"rows": model.transform(images)})


def build_exported(backbone: str, precision: str, n: int) -> Built:
    """Build a side whose turn is that of a program without this library."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.xml")
        export_openvino(extractor(backbone, "float32"), path, precision=precision)
        core = openvino.Core()
        n_cores = torch.get_num_threads()
        settings = {"NUM_STREAMS": n_cores, "INFERENCE_NUM_THREADS": n_cores}
        settings["INFERENCE_PRECISION_HINT"] = "bf16" if precision == "bfloat16" else "f32"
        settings["ENABLE_CPU_PINNING"] = False
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
    images = [image.transpose(2, 0, 1)[None].copy() for image in photographs(n)]
    rows = [np.empty(0)] * n
    queue = openvino.AsyncInferQueue(compiled, n_cores)

    def keep(request: Any, i: int) -> None:
        rows[i] = request.get_output_tensor(0).data.copy()

    queue.set_callback(keep)

    def run() -> None:
        for i, image in enumerate(images):
            queue.start_async({"images": image}, i)
        queue.wait_all()

    run()
    return Built(run, {"rows": np.concatenate(rows)})


def exported(args: argparse.Namespace) -> None:
    found = []
    for backbone in args.networks or ("efficientnet_lite0", "resnet50"):
        named: dict[str, tuple[Any, ...]] = {}
        for p in PRECISIONS:
            for what, build in (("transform", build_transform), ("file", build_exported)):
                named[f"{what} {p}"] = prepared, backbone, p, args.kept, build, backbone, p
                named[f"{what} {p}"] += (args.images,)
        with sides(named) as built:
            seconds, processor = measure(built, args.repeats)
            rows = {name: side.notes.get("rows") for name, side in built.items()}
            errors = {name: side.error for name, side in built.items()}
        for p in PRECISIONS:
            row = {"network": backbone, "weights": weights_of(backbone) or "random"}
            row["precision"] = p
            for what in ("transform", "file"):
                name = f"{what} {p}"
                row[f"{what}, images/s"] = (
                    errors[name] or f"{args.images / median(seconds[name]):.1f}"
                )
                row[f"{what}, ms of a core"] = f"{1000 * processor[name] / args.images:.1f}"
            mine, theirs = rows[f"file {p}"], rows[f"transform {p}"]
            if mine is not None and theirs is not None:
                row["off"] = f"{np.abs(mine - theirs).max() / np.abs(theirs).max():.4f}"
                row["cosine"] = f"{cosine(mine, theirs):.5f}"
            found.append(row)
        print(table(found[-3:]), flush=True)


# ------------------------------------------------------------------------------ start


def start(args: argparse.Namespace) -> None:
    found = []
    for backbone in args.networks or ("efficientnet_lite0", "resnet50"):
        with tempfile.TemporaryDirectory() as memory:
            for what in ("made", *["kept"] * args.repeats):
                command = [sys.executable, "-c", _START, backbone, weights_of(backbone) or "none"]
                begin = time.perf_counter()
                done = subprocess.run(
                    [*command, "int8", memory], capture_output=True, text=True, check=True
                )
                processor, seconds = map(float, done.stdout.split())
                row = {"network": backbone, "8 bits": what, "first rows, s": f"{seconds:.2f}"}
                row["of this process's processor time, s"] = f"{processor:.2f}"
                row["process, s"] = f"{time.perf_counter() - begin:.1f}"
                found.append(row)
    print(table(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("piece", choices=["speed", "accuracy", "files", "start", "exported"])
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--images", type=int, default=64, help="of a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=["elpv", "digits"])
    parser.add_argument("--memory", help="where `accuracy` keeps its rows")
    parser.add_argument("--sides", nargs="*", help="of `files`, int8 among them; default: all")
    parser.add_argument("--kept", help="folder of networks in 8 bits, for the next piece")
    parser.add_argument("--n-jobs", type=int, default=1)
    parser.add_argument("--peers", nargs="*", default=["loader", "loader-plain"])
    parser.add_argument("--without-bfloat16", action="store_true", help="of `speed`, `accuracy`")
    args = parser.parse_args()
    args.precisions = ("float32", "int8") if args.without_bfloat16 else PRECISIONS
    print(environment("openvino", "nncf"), flush=True)
    globals()[args.piece](args)


if __name__ == "__main__":
    main()
