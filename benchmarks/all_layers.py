"""What the features of all layers give beside the last one's, and what they cost.

`--part time`: seconds to embed ELPV solar cells from files, by the layers taken.
"""

import argparse
from functools import partial

from _common import Built, environment, median, sides, table, take_turns

from sktransfer import PretrainedFeatureExtractor
from sktransfer._cli import benchmark as _benchmark

ALL = {"layer": "all", "pooling": ("avg", "max")}
CHOICES = {
    "last layer": {"layer": "auto"},
    "stages, mean": {"layer": "stages"},
    "all layers, mean": {"layer": "all"},
    "all layers, mean and maximum": ALL,
}


# ------------------------------------------------------------------------------ time


def _build(options: dict, n: int) -> Built:
    files = _benchmark.load_elpv().images[:n]
    extractor = PretrainedFeatureExtractor(**options)
    extractor.transform(files)  # to warm up; it also settles what computes
    return Built(partial(extractor.transform, files), {})


def time(n: int = 300, repeats: int = 7) -> None:
    """Print the seconds by the layers taken, the sides in turns."""
    print(environment("openvino"), "\n")
    for runtime in ("openvino", "torch"):
        builders = {
            name: (_build, {**options, "runtime": runtime}, n) for name, options in CHOICES.items()
        }
        with sides(builders) as built:
            seconds = {name: median(found) for name, found in take_turns(built, repeats).items()}
        first = seconds["last layer"]
        rows = [
            {"features of": name, "seconds": f"{s:.2f}", "of the last layer's": f"{s / first:.2f}"}
            for name, s in seconds.items()
        ]
        print(f"{runtime}: {n} ELPV cells from files, efficientnet_lite0, medians of {repeats}\n")
        print(table(rows), "\n")


PARTS = {"time": time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="(default: all parts)")
    for part in parser.parse_args().part or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
