"""How long a training step takes by the number of images that are trained on at once.

A batch of 32 is taken in pieces whose gradients are added up; the maths is the same. Milliseconds
an image, the median of some steps, in turns.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from torch.nn import functional as F

from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._engine.runner import get_runner
from sktransfer._training.cut import find_cut
from sktransfer._training.heads import make_head
from sktransfer._training.trained_part import TrainedPart
from sktransfer.models import get_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--backbone", default="efficientnet_lite0")
parser.add_argument("--weights", default="default")
parser.add_argument("--unfreeze", nargs="+", default=["1", "2", "4", "8", "all"])
parser.add_argument("--pieces", nargs="+", type=int, default=[2, 4, 8, 16, 32])
parser.add_argument("--precision", default="float32")
parser.add_argument("--repeats", type=int, default=5)
options = parser.parse_args()

backbone = get_model(options.backbone, None if options.weights == "None" else options.weights)
runner = get_runner(backbone, "cpu", options.precision)
frozen = FrozenBlocks(runner, backbone.preprocessing, "avg")
print("unfreeze", *(f"{piece:>7}" for piece in options.pieces), "   chosen")
for depth in options.unfreeze:
    unfrozen = find_cut(runner, int(depth) if depth.isdecimal() else depth)
    head = make_head("linear", frozen.width, 2, 0.0)
    module = TrainedPart(frozen, unfrozen.cut, unfrozen, head, 4, False)
    shape, dtype = (32, *frozen.shape(unfrozen.cut)), frozen.dtype(unfrozen.cut)
    stored = torch.from_numpy(np.random.RandomState(0).randint(0, 2, shape).astype(dtype))
    y = torch.zeros(32, dtype=torch.long)
    seconds = {piece: [] for piece in options.pieces}
    for _ in range(options.repeats + 1):
        for piece in options.pieces:
            start = time.perf_counter()
            for some, labels in zip(stored.split(piece), y.split(piece), strict=True):
                F.cross_entropy(module.train()(some), labels).backward()
            seconds[piece].append(time.perf_counter() - start)
    medians = [1000 / 32 * statistics.median(seconds[piece][1:]) for piece in options.pieces]
    chosen = module.piece(32)
    print(f"{depth:>8}", *(f"{median:7.2f}" for median in medians), f"{chosen:9d}", flush=True)
