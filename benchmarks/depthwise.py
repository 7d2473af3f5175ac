"""Training on small images: the library's gradient of depthwise kernels against torch's.

Forward and backward passes of a network whose last maps are small, in turns; medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from _common import environment, table

from sktransfer import get_model
from sktransfer._training.depthwise import FastDepthwise


def seconds(network: torch.nn.Module, x: torch.Tensor, mode: Any) -> float:
    """Return the time of one forward and backward pass."""
    start = time.perf_counter()
    with mode:
        y = network(x)
    y.mean().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[32, 48, 64, 96, 128, 224])
    parser.add_argument("--batch-size", type=int, default=64, help="of 64 pixels; larger, fewer")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(environment(), flush=True)
    network = copy.deepcopy(get_model(args.backbone, None).network)
    network.to(memory_format=torch.channels_last).requires_grad_(True).train()
    rows = []
    for size in args.image_sizes:
        n = max(4, min(args.batch_size, args.batch_size * 64**2 // size**2))
        x = torch.randn(n, 3, size, size).to(memory_format=torch.channels_last)
        times: dict[str, list[float]] = {"torch": [], "ours": []}
        for repeat in range(args.repeats + 1):
            for side, mode in (("torch", nullcontext()), ("ours", FastDepthwise())):
                times[side].append(1000 * seconds(network, x, mode) / n)
                if repeat == 0:  # warms up
                    times[side].clear()
        plain, ours = (statistics.median(found) for found in times.values())
        rows.append(
            {
                "image size": str(size),
                "torch, ms an image": f"{plain:.1f}",
                "ours": f"{ours:.1f}",
                "times": f"{plain / ours:.2f}",
            }
        )
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
