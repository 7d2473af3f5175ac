"""The options that several commands share, and what they say to estimators."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any


def add_json(parser: Any) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document instead, for programs; all else goes to the standard error",
    )


def add_csv_or_json(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--csv", action="store_true", help="print CSV, text in it never a formula")
    add_json(formats)


def add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="images, or folders of them (with subfolders)"
    )


def add_output(
    parser: argparse.ArgumentParser, metavar: str, text: str, *, required: bool = False
) -> None:
    parser.add_argument("-o", "--output", metavar=metavar, help=text, required=required)


def add_network(parser: argparse.ArgumentParser, several: str | None = None) -> None:
    """Add what names a network or, where a text says which are the default, several."""
    text = (
        "a pretrained network: efficientnet_lite0, which needs no download, a name of torchvision "
        "such as resnet50, or timm/NAME"
    )
    if several is None:
        parser.add_argument(
            "--backbone", default="efficientnet_lite0", metavar="NAME", help=f"{text} (the default)"
        )
    else:
        text += f"; may be given several times ({several})"
        parser.add_argument("--backbone", action="append", metavar="NAME", help=text)
    parser.add_argument(
        "--weights", default="default", metavar="NAME|FILE", help="published name, or a file"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="size at which images enter the network"
    )


def add_running(
    parser: argparse.ArgumentParser,
    precisions: Sequence[str] = ("float32", "bfloat16", "float16", "int8"),
    *,
    skips: bool = True,
) -> None:
    """Add where and how it runs."""
    add = parser.add_argument
    add(
        "--memory",
        metavar="DIR",
        help="keep what frozen blocks compute there, for later runs: 5 KB an image with "
        "efficientnet_lite0, about 40 KB where one block is trained; `sktransfer cache` shows it",
    )
    add("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--precision", default="float32", choices=precisions, help="(default float32)")
    add("--n-jobs", type=int, metavar="N", help="threads that decode images (default: all cores)")
    add_reading(parser, skips=skips)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add how a network is trained."""
    add = parser.add_argument
    add("--max-epochs", type=int, default=10, metavar="N", help="of the blocks (default 10)")
    add(
        "--augment",
        choices=["flip", "dihedral", "auto"],
        help="train on other views of the images as well: mirrored; turned by quarters and "
        "mirrored; or mirrored and changed at random",
    )
    add("--balanced", action="store_true", help="weigh classes inversely to their numbers")


def add_reading(parser: argparse.ArgumentParser, *, skips: bool = True) -> None:
    """Add how image files are read; where it `skips`, also whether unreadable ones are."""
    add = parser.add_argument
    if skips:
        add(
            "--skip-unreadable",
            action="store_true",
            help="go on without images that can't be read, and list them at the end (default: an "
            "error); in CSV, each has a row, with the reason in a column `skipped`",
        )
    add(
        "--damaged",
        choices=["warn", "error"],
        help="what to do with damaged images of which a part can be decoded (default warn)",
    )
    add(
        "--max-pixels",
        type=int,
        metavar="N",
        help="refuse images of more pixels (default: twice PIL.Image.MAX_IMAGE_PIXELS)",
    )
    add(
        "--background",
        metavar="COLOUR",
        help="on which transparent images lie, as black or '#808080'; the same for fit and predict "
        "(default white)",
    )


# ------------------------------------------------------------------------------ as parameters


def common_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters that all estimators take."""
    return {
        "backbone": options.backbone,
        "weights": options.weights,
        "image_size": options.image_size,
        "memory": options.memory,
        "device": options.device,
        "precision": options.precision,
        "n_jobs": options.n_jobs,
        "verbose": int(sys.stderr.isatty()),
    }


def depth_of(text: str) -> int | str:
    """Return a number of blocks, or a name."""
    return int(text) if text.lstrip("-").isdecimal() else text


def one_or_several(text: str, read: Callable[[str], Any]) -> Any:
    """Return a value or, of several with commas between them, a list."""
    values = [read(part.strip()) for part in text.split(",")]
    return values[0] if len(values) == 1 else values
