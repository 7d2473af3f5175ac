"""A grid search over the freezing depth is cheap: timed against the same search written plainly.

The plain side is what one writes with skorch: the same network with the same weights and a new
linear layer, the same trained parameters, AdamW, learning rates step by step, batches, epochs and
precision, frozen blocks in evaluation mode and outside the graph of gradients, channels last. It
runs the frozen blocks in every epoch of every fit. Both sides run in turns in one process,
candidate by candidate, each as a `GridSearchCV` without refit on the first cells of a seeded
permutation of ELPV (defective: p > 0.5).

    --part equal-work      depths 0, 1, 2, 4. From ready tensors, together with the bound: what bare
                           training steps, without any library, say that the ratio can be. With
                           --source files: both decode the image files, the plain side in two
                           workers of a DataLoader. Ours starts from an empty memory.
    --part head-only       the head alone, 12 candidates
    --part second-search   images that a search over other learning rates runs through the network
    --part same-score      time until our defaults reach the plain side's best score over depths and
                           learning rates

EfficientNet-Lite0 has its weights; other networks get random ones, as none of this depends on them
but the scores.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import GridSearchCV, ParameterGrid, StratifiedKFold
from skorch import NeuralNetClassifier
from skorch.callbacks import LRScheduler
from skorch.dataset import Dataset
from tabulate import tabulate
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms import v2

from sktransfer import FineTunedClassifier, get_model, register_model
from sktransfer._cli.benchmark import load_elpv
from sktransfer._engine.program import Program
from sktransfer._engine.runner import Runner, get_runner
from sktransfer.io import load_image
from sktransfer.models import Backbone

BACKBONE = "benchmark"  # the name under which both sides get the network
PLAIN_NAMES = {
    "unfreeze": "module__unfreeze",
    "dropout": "module__dropout",
    "weight_decay": "optimizer__weight_decay",
    "lr": "lr",
}


# ------------------------------------------------------------------------------ what is shared


def prepare(args: argparse.Namespace) -> tuple[Any, Any, np.ndarray]:
    """Register the network; return `X` of the plain side, `X` of ours, and `y`."""
    task = load_elpv()
    rows = np.random.RandomState(0).permutation(len(task.images))[: args.images]
    paths = [task.images[row] for row in rows]
    y = (task.targets["defective: p > 0.5"][rows] == "defective").astype(np.int64)
    embedded = args.backbone.startswith("efficientnet_lite")
    backbone = get_model(args.backbone, "default" if embedded else None)
    preprocessing = backbone.preprocessing.with_size(args.image_size)
    network = copy.deepcopy(backbone.network)
    fitted = [preprocessing.fit_size(load_image(path)) for path in paths]
    if not embedded:
        move_statistics(network, preprocessing.normalize(torch.stack(fitted[:64])))
    if args.source == "tensors":  # they need no resizing
        size = preprocessing.size
        preprocessing = replace(preprocessing, resize=size, mode="squash")
    register_model(BACKBONE, lambda weights: Backbone(network, preprocessing))
    if args.source == "files":
        return np.array(paths), paths, y
    pixels = torch.stack(fitted)  # (n, 3, height, width) uint8
    return pixels.numpy(), pixels, y


def move_statistics(network: nn.Module, x: torch.Tensor) -> None:
    """Give batch-norms of random weights the statistics of images: else activations explode."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
    network.train()
    with torch.no_grad():
        for batch in x.split(16):
            network(batch)
    for norm in norms:
        norm.momentum = 0.1
    network.eval()


def runner_of(args: argparse.Namespace) -> Runner:
    return get_runner(get_model(BACKBONE), "cpu", args.precision)


def cut_of(runner: Runner, unfreeze: int) -> int:
    """Return the position in front of the first trained block."""
    return len(runner.block_names) - unfreeze if unfreeze else runner.embedding


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def make_head(width: int, dropout: float = 0.0) -> nn.Module:
    layer = nn.Linear(width, 2)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout(dropout), layer)


def evaluate(
    estimator: Any,
    candidate: dict[str, Any],
    X: Any,
    y: np.ndarray,
    folds: int,
    n_run: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Cross-validate one candidate, as a grid search does; of `n_run` folds, the time of all."""
    grid = {name: [value] for name, value in candidate.items()}
    splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
    splits = list(splitter.split(y, y))[: n_run or folds]
    search = GridSearchCV(estimator, grid, cv=splits, refit=False, error_score="raise")
    torch.manual_seed(seed)
    start = time.perf_counter()
    search.fit(X, y)
    seconds = (time.perf_counter() - start) * folds / len(splits)
    mean, std = (float(search.cv_results_[f"{what}_test_score"][0]) for what in ("mean", "std"))
    return {"seconds": seconds, "mean": mean, "std": std}


# ------------------------------------------------------------------------------ the plain side


class Plain(nn.Module):
    """A network with a new head, its last blocks trained."""

    def __init__(self, unfreeze: int, precision: str, dropout: float = 0.0) -> None:
        super().__init__()
        backbone = get_model(BACKBONE)
        runner = get_runner(backbone, "cpu", precision)
        self.precision, self.preprocessing = precision, backbone.preprocessing
        self.network = copy.deepcopy(backbone.network).to(memory_format=torch.channels_last)
        linear = [n for n, m in self.network.named_modules() if isinstance(m, nn.Linear)][-1]
        self.head = make_head(self.network.get_submodule(linear).in_features, dropout)
        self.network.set_submodule(linear, nn.Identity())
        blocks = range(cut_of(runner, unfreeze), runner.embedding)
        segments = [runner.segment(i, self.preprocessing.size) for i in blocks]
        trained = {name for segment in segments for name, _ in segment.named_parameters()}
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in trained)

    def train(self, mode: bool = True) -> Plain:
        super().train(mode)
        self.network.eval()  # batch-norms keep their statistics
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.preprocessing.normalize(x).contiguous(memory_format=torch.channels_last)
        with autocast(self.precision):
            # Nothing in front of the first trained parameter enters the graph of gradients.
            return self.head(self.network(x)).float()


class Files(Dataset):
    """Decodes and resizes a file whenever it is asked for."""

    def transform(self, X: Any, y: Any) -> tuple[Any, Any]:
        preprocessing = get_model(BACKBONE).preprocessing
        to_tensor = v2.Compose(
            [
                v2.Resize(preprocessing.resize, v2.InterpolationMode(preprocessing.interpolation)),
                v2.CenterCrop(preprocessing.size),
                v2.PILToTensor(),
            ]
        )
        with Image.open(str(X)) as image:
            return super().transform(to_tensor(image.convert("RGB")), y)


def warm_cosine(step: int, n_steps: int) -> float:
    """Up in a tenth of the steps, down by a cosine."""
    n_warm = max(1, round(0.1 * n_steps))
    if step < n_warm:
        return (step + 1) / n_warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - n_warm) / max(1, n_steps - n_warm))))


def plain(args: argparse.Namespace) -> NeuralNetClassifier:
    n_train = args.images - math.ceil(args.images / args.folds)
    n_steps = math.ceil(n_train / args.batch_size) * args.epochs
    options: dict[str, Any] = {}
    if args.source == "files":
        options = {
            "dataset": Files,
            "iterator_train__num_workers": args.workers,
            "iterator_train__persistent_workers": args.workers > 0,  # for all epochs of a fit
            "iterator_valid__num_workers": args.workers,
        }
    return NeuralNetClassifier(
        Plain,
        module__unfreeze=0,
        module__precision=args.precision,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        optimizer__fused=True,
        optimizer__weight_decay=1e-2,
        lr=1e-3,
        max_epochs=args.epochs,
        batch_size=args.batch_size,
        train_split=None,
        iterator_train__shuffle=True,
        callbacks=[
            LRScheduler(
                LambdaLR, lr_lambda=partial(warm_cosine, n_steps=n_steps), step_every="batch"
            )
        ],
        verbose=0,
        **options,
    )


def in_plain_words(candidate: dict[str, Any]) -> dict[str, Any]:
    return {PLAIN_NAMES[name]: value for name, value in candidate.items()}


# ------------------------------------------------------------------------------ our side


def ours(args: argparse.Namespace, memory: str) -> FineTunedClassifier:
    """Return the estimator that does the same work: no phase for the head, no augmentation."""
    return FineTunedClassifier(
        BACKBONE,
        head_epochs=0,
        max_epochs=args.epochs,
        batch_size=args.batch_size,
        lr=1e-3,
        head_lr=None,
        lr_decay=1.0,
        weight_decay=1e-2,
        augment=None,
        precision=args.precision,
        memory=memory,
        random_state=args.seed,
    )


# ------------------------------------------------------------------------------ the bound


def train_steps(module: nn.Module, x: torch.Tensor, y: torch.Tensor, n: int) -> Callable[[], None]:
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def run() -> None:
        for _ in range(n):
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()

    return run


def predict_steps(module: Callable, batches: list[torch.Tensor], n: int) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        for _ in range(n):
            for batch in batches:
                module(batch)

    return run


class TrainedPart(nn.Module):
    """What follows the cut, with a head."""

    def __init__(self, runner: Runner, cut: int, size: tuple[int, int], precision: str) -> None:
        super().__init__()
        self.precision = precision
        self.blocks = copy.deepcopy(runner.trace.slice(cut, runner.embedding, size))
        self.blocks.requires_grad_(True)
        self.head = make_head(runner.shape(runner.embedding, size)[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with autocast(self.precision):
            return self.head(self.blocks(x)).float()


def step_seconds(args: argparse.Namespace, pixels: torch.Tensor, y: np.ndarray) -> dict[Any, float]:
    """Measure bare steps in turns; return the median seconds an image of each kind."""
    runner, backbone = runner_of(args), get_model(BACKBONE)
    size, precision, n = backbone.preprocessing.size, args.precision, args.steps
    batch, labels = pixels[: args.batch_size], torch.from_numpy(y[: args.batch_size])
    whole = Plain(0, precision)
    sides: dict[Any, Callable[[], None]] = {
        ("predict", "whole"): predict_steps(whole, [batch], n),
        # A CPU is fastest in batches of 4, and the one pass is free to take them.
        ("pass", "whole"): predict_steps(whole, list(batch.split(4)), n),
    }
    for depth in args.depths:
        cut = cut_of(runner, depth)
        part = TrainedPart(runner, cut, size, precision)
        with torch.inference_mode(), autocast(precision):
            x = backbone.preprocessing.normalize(batch)
            x = x.contiguous(memory_format=torch.channels_last)
            stored = runner.trace.slice(0, cut, size)(x).float()
        stored = stored.clone()  # no tensor of the inference mode
        sides["train", "whole", depth] = train_steps(Plain(depth, precision), batch, labels, n)
        sides["train", "part", depth] = train_steps(part, stored, labels, n)
        sides["predict", "part", depth] = predict_steps(part, [stored], n)
    seconds: dict[Any, list[float]] = {side: [] for side in sides}
    for run in sides.values():
        run()
    for _ in range(args.repeats):
        for side, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[side].append((time.perf_counter() - start) / (n * len(batch)))
    return {side: statistics.median(times) for side, times in seconds.items()}


def bound(args: argparse.Namespace, each: dict[Any, float]) -> float:
    """Return the plain search's time over one frozen pass and all that must be trained."""
    n_trained = args.images * (args.folds - 1) * args.epochs * len(args.lr)  # over all folds
    n_predicted = args.images * len(args.lr)
    whole = part = 0.0
    for depth in args.depths:
        whole += n_trained * each["train", "whole", depth] + n_predicted * each["predict", "whole"]
        part += n_trained * each["train", "part", depth]
        part += n_predicted * each["predict", "part", depth]
    once = args.images * min(each["pass", "whole"], each["predict", "whole"])
    return whole / (part + once)


def print_steps(args: argparse.Namespace, each: dict[Any, float]) -> None:
    table = [
        {
            "unfreeze, ms an image": str(depth),
            "whole network, training step": f"{1e3 * each['train', 'whole', depth]:.2f}",
            "trained part alone": f"{1e3 * each['train', 'part', depth]:.2f}",
            "whole network, prediction": f"{1e3 * each['predict', 'whole']:.2f}",
            "trained part": f"{1e3 * each['predict', 'part', depth]:.2f}",
        }
        for depth in args.depths
    ]
    print(tabulate(table, headers="keys", disable_numparse=True))
    print(f"one pass in batches of 4: {1e3 * each['pass', 'whole']:.2f} ms an image", flush=True)


# ------------------------------------------------------------------------------ the parts


def in_turns(
    args: argparse.Namespace, candidates: list[dict[str, Any]], X: Any, our_X: Any, y: np.ndarray
) -> list[dict[str, Any]]:
    """Evaluate every candidate on both sides; --extrapolate leaves some to the plain average."""
    timed = set(range(len(candidates)))
    if args.extrapolate:
        timed = set(np.linspace(0, len(candidates) - 1, args.extrapolate).astype(int).tolist())
    rows = []
    with tempfile.TemporaryDirectory() as memory:
        for i, candidate in enumerate(candidates):
            row: dict[str, Any] = dict(candidate)
            if i in timed:
                words = in_plain_words(candidate)
                row["plain"] = evaluate(
                    plain(args), words, X, y, args.folds, args.plain_folds, args.seed
                )
            row["ours"] = evaluate(ours(args, memory), candidate, our_X, y, args.folds)
            rows.append(row)
            sides = {side: row[side] for side in ("plain", "ours") if side in row}
            found = ", ".join(f"{k} {v['seconds']:.2f} s {v['mean']:.3f}" for k, v in sides.items())
            print(f"  {candidate}: {found}", flush=True)
    return rows


def print_rows(rows: list[dict[str, Any]], args: argparse.Namespace) -> float:
    table = []
    for row in rows:
        line = {k: f"{v:g}" for k, v in row.items() if k not in ("plain", "ours")}
        for side in ("plain", "ours"):
            if side in row:
                found = row[side]
                line[f"{side}, s"] = f"{found['seconds']:.2f}"
                line[f"{side}, accuracy"] = f"{found['mean']:.3f} ± {found['std']:.3f}"
        table.append(line)
    print(tabulate(table, headers="keys", disable_numparse=True))
    times = [row["plain"]["seconds"] for row in rows if "plain" in row]
    total = statistics.mean(times) * len(rows)
    own = sum(row["ours"]["seconds"] for row in rows)
    note = f" (from {args.plain_folds} of {args.folds} folds)" if args.plain_folds else ""
    if len(times) < len(rows):
        note += f" (extrapolated from {len(times)} of {len(rows)} candidates)"
    print(f"plain {total:.1f} s{note}, ours {own:.1f} s: ratio {total / own:.1f}", flush=True)
    return total / own


def equal_work(args: argparse.Namespace) -> dict[str, Any]:
    X, our_X, y = prepare(args)
    candidates = [{"unfreeze": depth, "lr": lr} for lr in args.lr for depth in args.depths]
    each = step_seconds(args, our_X, y) if args.source == "tensors" else None
    rows = in_turns(args, candidates, X, our_X, y)
    ratio = print_rows(rows, args)
    found: dict[str, Any] = {"rows": rows, "ratio": ratio}
    if each is None:
        target = 4 if args.backbone == "resnet50" else 5
        print(f"target: at least {target}")
    else:
        print_steps(args, each)
        found |= {"bound": bound(args, each), "steps": {str(k): v for k, v in each.items()}}
        print(
            f"bound {found['bound']:.1f}: reached {ratio / found['bound']:.2f} of it "
            "(target: at least 0.8)"
        )
    return found


def head_only(args: argparse.Namespace) -> dict[str, Any]:
    X, our_X, y = prepare(args)
    grid = {
        "unfreeze": [0],
        "lr": [3e-4, 1e-3, 3e-3],
        "weight_decay": [1e-3, 1e-2],
        "dropout": [0.0, 0.2],
    }
    rows = in_turns(args, list(ParameterGrid(grid)), X, our_X, y)
    ratio = print_rows(rows, args)
    print("target: at least 50")
    return {"rows": rows, "ratio": ratio}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the images that run through frozen blocks."""
    images: Counter[str] = Counter()
    results = Program.results

    def count(program: Program, batch: torch.Tensor, n: int) -> list[torch.Tensor]:
        images["from the image"] += n
        return results(program, batch, n)

    with mock.patch.object(Program, "results", count):
        yield images


def second_search(args: argparse.Namespace) -> dict[str, Any]:
    _, X, y = prepare(args)
    found = {}
    with tempfile.TemporaryDirectory() as memory:
        for name, rates in {"first": args.lr, "second": [lr / 2 for lr in args.lr]}.items():
            grid = {"unfreeze": args.depths, "lr": rates}
            with counted() as images:
                start = time.perf_counter()
                splitter = StratifiedKFold(args.folds, shuffle=True, random_state=0)
                GridSearchCV(ours(args, memory), grid, cv=splitter, refit=False).fit(X, y)
                seconds = time.perf_counter() - start
            found[name] = {"seconds": seconds, "computed": dict(images)}
            where = ", ".join(f"{n} {start}" for start, n in images.items())
            print(
                f"{name} search, learning rates {rates}: {len(y)} images, {images.total()} times "
                f"one ran through frozen blocks ({where or 'none'}), {seconds:.1f} s",
                flush=True,
            )
    return found


def same_score(args: argparse.Namespace) -> dict[str, Any]:
    X, our_X, y = prepare(args)
    found = plain_rows(args, X, y)
    seconds = sum(row["plain"]["seconds"] for row in found)
    best = max(found, key=lambda row: row["plain"]["mean"])
    goal = best["plain"]
    print(
        f"plain: {len(found)} candidates in {seconds:.1f} s, best {goal['mean']:.4f} ± "
        f"{goal['std']:.4f} with unfreeze={best['unfreeze']}, lr={best['lr']}",
        flush=True,
    )
    rows, spent, reached = [], 0.0, None
    with tempfile.TemporaryDirectory() as memory:
        estimator = FineTunedClassifier(
            BACKBONE,
            early_stopping=args.early_stopping,
            precision=args.precision,
            memory=memory,
            random_state=args.seed,
        )
        for depth in args.depths:
            row = evaluate(estimator, {"unfreeze": depth}, our_X, y, args.folds)
            spent += row["seconds"]
            rows.append({"unfreeze": depth, "ours": row})
            if reached is None and row["mean"] >= goal["mean"]:
                reached = spent
            score = f"{row['mean']:.4f} ± {row['std']:.4f}"
            print(f"  ours unfreeze={depth}: {score} after {spent:.1f} s", flush=True)
    if reached is None:
        print(f"ours did not reach the plain score in {spent:.1f} s")
    else:
        print(
            f"ours reached the plain score after {reached:.1f} s, {reached / seconds:.3f} of the "
            f"plain time (target: at most 0.1); the whole search took {spent / seconds:.3f} of it"
        )
    return {"plain": found, "rows": rows, "reached": reached, "spent": spent}


def plain_rows(args: argparse.Namespace, X: Any, y: np.ndarray) -> list[dict[str, Any]]:
    """Return what `equal-work` wrote for these depths and rates, or evaluate them."""
    known = []
    if args.plain_from:
        of_interest = ("source", "backbone", "images", "folds", "epochs", "precision")
        of_interest += ("image_size", "batch_size", "seed", "plain_folds")
        absent = {"seed": 0, "plain_folds": None}  # in files from before there were these
        for record in json.loads(Path(args.plain_from).read_text()):
            known_args = {**absent, **record["args"]}
            same = all(known_args[name] == getattr(args, name) for name in of_interest)
            if same and record["args"]["part"] == "equal-work":
                known += [row for row in record["rows"] if "plain" in row]
    rows = []
    for lr in args.lr:
        for depth in args.depths:
            hits = [row for row in known if (row["lr"], row["unfreeze"]) == (lr, depth)]
            row = hits[-1] if hits else {"unfreeze": depth, "lr": lr}
            if not hits:
                words = in_plain_words(row)
                found = evaluate(plain(args), words, X, y, args.folds, args.plain_folds, args.seed)
                row = {**row, "plain": found}
            rows.append(row)
            print(f"  plain {lr=:g} unfreeze={depth}: {row['plain']}", flush=True)
    return rows


# ------------------------------------------------------------------------------ the command line

PARTS = {
    "equal-work": equal_work,
    "head-only": head_only,
    "second-search": second_search,
    "same-score": same_score,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, default="equal-work")
    parser.add_argument("--source", choices=("tensors", "files"), default="tensors")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--image-size", type=int, help="by default, that of the weights")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument(
        "--lr", type=float, nargs="+", help="by default 1e-3; same-score: 1e-4, 3e-4, 1e-3"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--workers", type=int, default=2, help="of the plain side's DataLoader")
    parser.add_argument("--steps", type=int, default=12, help="of a kind, for the bound")
    parser.add_argument("--repeats", type=int, default=3, help="of these steps")
    parser.add_argument("--extrapolate", type=int, help="candidates that the plain side runs")
    parser.add_argument("--plain-folds", type=int, help="that the plain side runs, of all")
    parser.add_argument("--early-stopping", action="store_true", help="same-score, our side")
    parser.add_argument("--plain-from", help="a file of results with equal-work's plain rows")
    parser.add_argument("--seed", type=int, default=0, help="of the training, on both sides")
    parser.add_argument("--output", help="a file of results, to which these are added")
    args = parser.parse_args()
    args.lr = args.lr or ([1e-4, 3e-4, 1e-3] if args.part == "same-score" else [1e-3])
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"{args.part}, {args.backbone}, {args.images} images from {args.source}, {args.folds} "
        f"folds, {args.epochs} epochs, {args.precision}, {torch.get_num_threads()} threads",
        flush=True,
    )
    found = PARTS[args.part](args)
    if args.output:
        file = Path(args.output)
        records = json.loads(file.read_text()) if file.exists() else []
        file.write_text(json.dumps([*records, {"args": vars(args), **found}], indent=1) + "\n")


if __name__ == "__main__":
    main()
