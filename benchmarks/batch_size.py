"""Images a second of a plain forward pass by batch size, on a CPU."""

import statistics
import time

import timm
import torch
from tabulate import tabulate
from torchvision.models import get_model

SIZES = (1, 2, 4, 8, 16, 32)


def main() -> None:
    networks = {
        "efficientnet_lite0": timm.create_model("tf_efficientnet_lite0"),
        "mobilenet_v3_large": get_model("mobilenet_v3_large"),
        "resnet50": get_model("resnet50"),
    }
    table = []
    for name, network in networks.items():
        network = network.eval().to(memory_format=torch.channels_last)
        x = torch.randn(32, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        speeds: dict[int, list[float]] = {size: [] for size in SIZES}
        with torch.inference_mode():
            network(x)
            for _ in range(3):  # sides in turns: the machine's speed drifts
                for size in SIZES:
                    start = time.perf_counter()
                    for i in range(0, 32, size):
                        network(x[i : i + size])
                    speeds[size].append(32 / (time.perf_counter() - start))
        row = {f"batch {k}": f"{statistics.median(v):.0f}" for k, v in speeds.items()}
        table.append({"images/s, median of 3": name} | row)
    print(tabulate(table, headers="keys", disable_numparse=True))


if __name__ == "__main__":
    main()
