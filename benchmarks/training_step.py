"""What training costs above a bare torch loop on the same batches, in the same pieces.

Ours is the second phase of a `FineTunedClassifier`: one epoch, as skorch times it, from activations
that are kept, or from images with `unfreeze="all"`. The bare loop is what one would write for just
this: read a batch of the same activations by the same numbers, convert it, run the same blocks and
a linear layer in the same pieces, add up the gradients, step a fused AdamW. It runs behind every
epoch of ours, in the same process: the sides take turns. The first turns warm up and are dropped;
medians of the others. Asked: at most 1.3 times the bare loop.

Networks without embedded weights get random ones from a file: without any, batch-norms would move
and a batch would be one piece.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment, median, say, table, weights_of, write_photographs
from skorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from sktransfer import FineTunedClassifier, get_model
from sktransfer._engine.cut_network import layout_of
from sktransfer.models._blocks import TracedNetwork

N_CLASSES = 2


class BareLoop:
    """A loop in plain torch over stored batches.

    Parameters
    ----------
    backbone : str
    weights : str
    precision : {"float32", "bfloat16"}
    start, cut : int
        Where batches come from, and the first trained block.
    stored : Tensor
        What batches are taken from: activations in half precision, maps with channels last; rows
        of embeddings, float32; or images, uint8.
    y : Tensor of int64
    batch_size, piece : int
    """

    def __init__(
        self,
        backbone: str,
        weights: str,
        precision: str,
        start: int,
        cut: int,
        stored: torch.Tensor,
        y: torch.Tensor,
        batch_size: int,
        piece: int,
    ) -> None:
        built = get_model(backbone, weights)
        self.preprocessing, size = built.preprocessing, built.preprocessing.size
        network = copy.deepcopy(built.network).eval().to(memory_format=torch.channels_last)
        traced = TracedNetwork(network, size)
        network.requires_grad_(False)
        self.frozen = traced.slice(start, cut) if start < cut else None
        self.trained = traced.slice(cut, traced.embedding) if cut < traced.embedding else None
        if self.trained is not None:
            self.trained.requires_grad_(True)
        width = int(np.prod(traced.shape(traced.embedding)))
        self.head = nn.Linear(width, N_CLASSES)
        self.is_map = 0 < start and layout_of(traced.shape(start), size) == "map"
        self.start, self.stored, self.y = start, stored, y
        self.precision, self.batch_size, self.piece = precision, batch_size, piece
        parameters = [p for p in network.parameters() if p.requires_grad]
        parameters += self.head.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def input_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what the network takes at `start`."""
        x = self.stored[rows]
        if self.start == 0:
            x = self.preprocessing.normalize(x)
            return x.contiguous(memory_format=torch.channels_last)
        if x.dtype == torch.float16 and self.precision == "float32":
            x = x.float()  # under autocast, bfloat16 goes in as it is
        return x.permute(0, 3, 1, 2) if self.is_map else x

    def epoch(self, order: torch.Tensor) -> None:
        """Train on every image once."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            for batch in order.split(self.batch_size):
                self.optimizer.zero_grad(set_to_none=True)
                for rows in batch.split(self.piece):
                    x = self.input_of(rows)
                    if self.frozen is not None:
                        with torch.no_grad():
                            x = self.frozen(x)
                    if self.trained is not None:
                        x = self.trained(x).flatten(1)
                    loss = F.cross_entropy(self.head(x).float(), self.y[rows])
                    (loss * (len(rows) / len(batch))).backward()
                self.optimizer.step()


class Turns(Callback):
    """Lets a bare loop have its turn behind every epoch."""

    def __init__(self, make: Callable[..., BareLoop]) -> None:
        self.make = make
        self.seconds: list[float] = []
        self.facts: dict[str, int] = {}

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        part, batch_size = net.module_, net.batch_size
        piece = part.piece(min(batch_size, len(X)))
        stored = images_of(X) if X.stored is None else torch.from_numpy(X.stored)
        if stored.dtype == torch.int16:  # NumPy's way to hold bfloat16
            stored = stored.view(torch.bfloat16)
        self.facts = {"start": part.start, "cut": part.cut, "piece": piece}
        self.loop = self.make(**self.facts, stored=stored, y=X.targets, batch_size=batch_size)

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        order = torch.randperm(len(self.loop.y))
        say(f"    epoch {len(net.history)}: ours {net.history[-1, 'dur']:.2f} s")
        with torch.enable_grad():
            start = time.perf_counter()
            self.loop.epoch(order)
            self.seconds.append(time.perf_counter() - start)


def images_of(data: Any) -> torch.Tensor:
    """Return the images of training data at the network's size, uint8 (n, 3, height, width)."""
    views = data.views
    fitted = [views.preprocessing.fit_size(views.images.load(i)) for i in range(len(views.images))]
    return torch.stack(fitted)


def measure(
    depth: Any, precision: str, files: list[str], weights: str, args: argparse.Namespace
) -> dict[str, str]:
    """Return a row of the table."""
    say(f"  unfreeze={depth}, {precision}")
    y = np.arange(len(files)) % N_CLASSES
    turns = Turns(lambda **facts: BareLoop(args.backbone, weights, precision, **facts))
    options = {} if args.runtime is None else {"runtime": args.runtime}
    model = FineTunedClassifier(
        args.backbone,
        weights=weights,
        unfreeze=depth,
        head_epochs=0,
        max_epochs=args.repeats + 1,
        batch_size=args.batch_size,
        lr=1e-6,  # nothing is to be learnt from these labels
        callbacks=[turns],
        device="cpu",
        precision=precision,
        random_state=0,
        **options,
    ).fit(files, y)
    n_batches = -(-len(files) // args.batch_size)
    ours = 1e3 * median([epoch["dur"] for epoch in model.history_][1:]) / n_batches
    bare = 1e3 * median(turns.seconds[1:]) / n_batches
    start, cut = turns.facts["start"], turns.facts["cut"]
    names = ["the images", *model.block_names_, "the embedding"]
    return {
        "unfreeze": str(depth),
        "precision": precision,
        "from": names[start] + ("" if start == cut else f", frozen up to {names[cut]}"),
        "pieces of": str(turns.facts["piece"]),
        "ours, ms a batch": f"{ours:.2f}",
        "bare loop": f"{bare:.2f}",
        "ratio": f"{ours / bare:.2f}",
        "asked": "≤ 1.3",
    }


def weights_file(backbone: str, folder: Path) -> str:
    """Return weights by which a network counts as pretrained."""
    if weights_of(backbone) is not None:
        return "default"
    torch.save(get_model(backbone, None).network.state_dict(), folder / f"{backbone}.pth")
    return str(folder / f"{backbone}.pth")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--unfreeze", nargs="+", default=["0", "1", "2", "4", "8", "all"])
    parser.add_argument(
        "--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--images", type=int, default=256, help="of an epoch")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each side")
    parser.add_argument("--runtime", help="of our estimator; not passed by default")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(environment("skorch"))
    print(
        f"\n{args.backbone}, {args.images} images in batches of {args.batch_size}, medians of "
        f"{args.repeats} epochs.\n",
        flush=True,
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
        files = write_photographs(Path(name, "files"), args.images, (320, 240))
        weights = weights_file(args.backbone, Path(name))
        for precision in args.precisions:
            for depth in args.unfreeze:
                depth = int(depth) if depth.isdecimal() else depth
                rows.append(measure(depth, precision, files, weights, args))
    print(table(rows))


if __name__ == "__main__":
    main()
