"""Images a second of a plain forward pass by batch size, on a CPU."""

import argparse
import statistics
import time

import timm
import torch
from tabulate import tabulate
from torchvision.models import get_model

NETWORKS = {
    "efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
    "mobilenet_v3_large": lambda: get_model("mobilenet_v3_large"),
    "resnet50": lambda: get_model("resnet50"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    options = parser.parse_args()
    table = []
    for name in options.networks:
        network = NETWORKS[name]().eval().to(memory_format=torch.channels_last)
        x = torch.randn(32, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        speeds: dict[int, list[float]] = {size: [] for size in options.sizes}
        with torch.inference_mode():
            network(x)
            for _ in range(3):  # sides in turns: the machine's speed drifts
                for size in options.sizes:
                    start = time.perf_counter()
                    for i in range(0, 32, size):
                        network(x[i : i + size])
                    speeds[size].append(32 / (time.perf_counter() - start))
        row = {f"batch {k}": f"{statistics.median(v):.0f}" for k, v in speeds.items()}
        table.append({"images/s, median of 3": name} | row)
    print(tabulate(table, headers="keys", disable_numparse=True))


if __name__ == "__main__":
    main()
