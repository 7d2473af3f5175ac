"""Training in float32 and bfloat16, by torch's gradients of depthwise convolutions and by ours.

Forward and backward passes of the last blocks of networks, in turns, milliseconds an image;
medians. Weights are random where none are embedded, which speed does not depend on. By default on
one thread and in time of the CPU, so that other programs on the machine disturb little.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from _common import environment, table, weights_of
from torch import nn

from sktransfer import get_model
from sktransfer._training.depthwise import FastDepthwise
from sktransfer.models._blocks import TracedNetwork

SIDES = {
    "float32, torch": (False, nullcontext),
    "float32, ours": (False, FastDepthwise),
    "bfloat16, torch": (True, nullcontext),
    "bfloat16, ours": (True, FastDepthwise),
}


def seconds(part: nn.Module, x: torch.Tensor, is_bfloat16: bool, mode: Any, clock: Any) -> float:
    """Return the time of one forward and backward pass."""
    start = clock()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16), mode():
        y = part(x)
    y.float().mean().backward()
    part.zero_grad()
    return clock() - start


def measure(
    backbone: str, size: int | None, depths: list[str], args: argparse.Namespace
) -> list[dict[str, str]]:
    """Return a row of the table for each depth."""
    built = get_model(backbone, weights_of(backbone))
    shape = built.preprocessing.with_size(size).size
    network = copy.deepcopy(built.network).eval().to(memory_format=torch.channels_last)
    traced = TracedNetwork(network, shape)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    rows = []
    for depth in depths:
        start = 0 if depth == "all" else traced.embedding - int(depth)
        part = traced.slice(start, traced.embedding).requires_grad_(True)
        n = max(4, min(args.batch_size, args.batch_size * 64**2 // shape[0] ** 2))
        n = n if depth == "all" else args.batch_size
        x = torch.randn(n, *(traced.shape(start) if start else (3, *shape)))
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for repeat in range(args.repeats + 1):
            for side, (is_bfloat16, mode) in SIDES.items():
                times[side].append(1000 * seconds(part, x, is_bfloat16, mode, clock) / n)
                if repeat == 0:  # warms up
                    times[side].clear()
        medians = {side: statistics.median(found) for side, found in times.items()}
        exact, _, rounded, ours = medians.values()
        rows.append(
            {"network": backbone, "image size": str(shape[0]), "blocks": depth}
            | {side: f"{found:.2f}" for side, found in medians.items()}
            | {"before: bfloat16 is faster, times": f"{exact / rounded:.2f}"}
            | {"now": f"{medians['float32, ours'] / ours:.2f}"}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument("--image-sizes", type=int, nargs="+", help="by default, the network's own")
    parser.add_argument("--depths", nargs="+", default=["2", "4", "all"])
    parser.add_argument("--batch-size", type=int, default=16, help='with "all", fewer')
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(environment(), flush=True)
    rows = []
    for backbone in args.backbones:
        for size in args.image_sizes or [None]:
            rows += measure(backbone, size, args.depths, args)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
